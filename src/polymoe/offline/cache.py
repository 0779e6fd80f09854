"""Bundles that `polymoe serve NAME=PATH…` planned on the fly, kept for the next start."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console

import polymoe
from polymoe.errors import BundleError, PlanError
from polymoe.offline.bundle import Bundle
from polymoe.offline.family import parse_variant_specs
from polymoe.offline.manifest import FORMAT_VERSION
from polymoe.offline.source import resolve


def default_root() -> Path:
    """`$XDG_CACHE_HOME/polymoe/bundles`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polymoe" / "bundles"


def plan_cached(
    specs: Sequence[str], policy: str, memory: str | None, root: Path, console: Console | None = None
) -> Path:
    """The bundle of these checkpoints with this policy and budget: found under `root`, or planned now.

    A checkpoint whose files changed (name, size or modification time) gives another bundle.
    Raises what `make_plan` does.
    """
    named = parse_variant_specs(specs)
    folder = root / f"{'-'.join(named)[:80]}-{_key(named, policy, memory)}"
    if _opens(folder):
        _say(console, f"Planned before: {folder}")
        return folder
    with _alone(folder, console):
        if _opens(folder):
            _say(console, f"Planned meanwhile by another polymoe: {folder}")
            return folder
        from polymoe.offline.api import make_plan  # here, since it loads transformers

        make_plan(specs, policy, memory, folder, overwrite=folder.exists(), console=console)
    return folder


def _opens(folder: Path) -> bool:
    try:
        Bundle.open(folder)
    except BundleError:
        return False
    return True


@contextmanager
def _alone(folder: Path, console: Console | None) -> Iterator[None]:
    """Wait until no other process plans `folder`. Raises `PlanError` where nothing can be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PlanError(
            f"{folder.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can, or plan a "
            "bundle with `polymoe plan … --out` and serve that."
        ) from error
    try:
        _wait_for(lock, f"Another polymoe plans {folder}; waiting for it …", console)
        yield
    finally:
        os.close(lock)  # the lock ends with it, however the process ends


def _wait_for(lock: int, waiting: str, console: Console | None) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(console, waiting)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _key(named: dict[str, str], policy: str, memory: str | None) -> str:
    """16 hex digits over everything that decides what the bundle holds."""
    variants = []
    for name, spec in named.items():
        folder = resolve(spec).resolve()
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
        variants.append((name, str(folder), files))
    facts = (FORMAT_VERSION, polymoe.__version__, policy, memory, variants)
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]
