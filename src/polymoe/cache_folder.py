"""Where polymoe keeps what it can make again: bundles planned on the fly, benchmark families, tuned GPU kernels."""

import os
import tempfile
from pathlib import Path

from polymoe.console import Console, warn
from polymoe.errors import ConfigError, explain

VARIABLE = "POLYMOE_CACHE"
_HOW = f"name a folder that can be written to with --cache or ${VARIABLE}"


def cache_root() -> Path:
    """`$POLYMOE_CACHE`, else `$XDG_CACHE_HOME/polymoe`, else `~/.cache/polymoe`; it need not exist."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "polymoe"
    try:
        return Path.home() / ".cache" / "polymoe"
    except RuntimeError:  # a container's user without a home: nothing can be kept
        return Path(os.devnull) / "polymoe"


def writable_cache(given: Path | None = None, console: Console | None = None) -> Path:
    """The cache as a folder that exists and can be written to.

    Where the default cannot be written to (a read-only container) it is a folder of the user's own below the system's
    temporary one, which `console` is told. Raises `ConfigError` where that cannot be written to either, and where the
    folder was chosen, by `given` (an option) or `$POLYMOE_CACHE`.
    """
    root = cache_root() if given is None else given.expanduser()
    problem = _problem(root)
    if problem is None:
        return root
    if given is not None or os.environ.get(VARIABLE):
        raise ConfigError(f"the cache cannot be written to: {problem} {_HOW[0].upper()}{_HOW[1:]}.")
    instead = _temporary(problem)
    if console is not None:
        what = f"{root} cannot be written to; what is planned is kept in {instead}, which may not last."
        warn(console, f"{what} To keep it, {_HOW}.")
    return instead


def _problem(root: Path) -> str | None:
    """Why nothing can be written in `root`; None where it can. It is made if it does not exist."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return None
    except OSError as error:
        return explain(OSError(error.errno, error.strerror, str(root)))


def _temporary(problem: str) -> Path:
    """A folder that nobody else can write to."""
    try:
        folder = Path(tempfile.gettempdir()) / f"polymoe-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"the cache cannot be written to: {problem} No temporary folder can: {_HOW}.") from error
    # Others may write to the folder above: one that they made could hold weights that they chose.
    mine = not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not mine or _problem(folder) is not None:
        raise ConfigError(f"the cache cannot be written to: {problem} {folder} is not yours alone either: {_HOW}.")
    return folder
