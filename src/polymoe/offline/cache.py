"""Bundles that were planned on the fly (`polymoe serve NAME=PATH…`, `LLM({name: path})`), kept for the next start."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from polymoe.bundle.manifest import FORMAT_VERSION
from polymoe.bundle.reader import Bundle
from polymoe.cache_folder import cache_root, writable_cache
from polymoe.console import Console
from polymoe.errors import BundleError, PlanError
from polymoe.offline.checkpoint.family import parse_variant_specs
from polymoe.offline.checkpoint.place import Place
from polymoe.version import __version__

Specs = Mapping[str, str | Path] | Sequence[str]  # {name: checkpoint} or ["NAME=CHECKPOINT", …]


def planned_bundle(
    specs: Specs,
    policy: str,
    memory: str | None,
    *,
    device: str,
    reserved: int,
    cache: Path | None = None,
    console: Console | None = None,
) -> Path:
    """The folder of these checkpoints' bundle, planned if it was not before; what `serve` and `LLM` serve.

    Args:
        memory: as `--memory`; None: policy `auto` fills `device`, every other takes its default.
        reserved: bytes of the caches that the device holds beside the weights.
        cache: in place of `polymoe.cache_folder`'s.

    Raises what `make_plan` does; `ConfigError` for a cache that cannot be written to.
    """
    if policy == "auto" and memory is None:
        from polymoe.device_memory import device_budget

        memory = device_budget(device, reserved)
    name = _folder_name(specs, policy, memory)
    root = (cache_root() if cache is None else cache) / "bundles"
    if not _opens(root / name):
        root = writable_cache(cache, console) / "bundles"
    return plan_cached(specs, policy, memory, root, console)


def plan_cached(specs: Specs, policy: str, memory: str | None, root: Path, console: Console | None = None) -> Path:
    """The bundle of these checkpoints with this policy and budget: found under `root`, or planned now.

    A checkpoint whose files changed (name, size or modification time) gives another bundle.
    Raises what `make_plan` does.
    """
    folder = root / _folder_name(specs, policy, memory)
    if _opens(folder):
        _say(console, f"Planned before: {folder}")
    else:
        with _alone(folder, console):
            if _opens(folder):
                _say(console, f"Planned meanwhile by another polymoe: {folder}")
            else:
                from polymoe.offline.api import make_plan  # here, since it loads transformers

                make_plan(specs, policy, memory, folder, overwrite=folder.exists(), console=console)
    _note_use(folder)
    return folder


@contextlib.contextmanager
def _alone(folder: Path, console: Console | None) -> Iterator[None]:
    """Wait until no other process plans `folder`. Raises `PlanError` where nothing can be written."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, f"Another polymoe plans {folder}; waiting for it …", console)
    except OSError as error:
        raise PlanError(
            f"{folder.parent} cannot be written ({error.strerror}); name a folder that can with --cache or "
            "$POLYMOE_CACHE, or plan a bundle with `polymoe plan … --out` and serve that."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)  # the lock ends with it, however the process ends


def _locked(path: Path, waiting: str, console: Console | None) -> int:
    """A descriptor of the file `path`, locked. Who had it before us has removed the file, so that it is made again."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(console, waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, soft_wrap=True, highlight=False)


def last_used(folder: Path) -> float:
    """When a bundle of the cache was last served, seconds since the epoch."""
    mark = _mark(folder)
    return (mark if mark.exists() else folder).stat().st_mtime


def forget_use(folder: Path) -> None:
    """To be called when a bundle is removed."""
    _mark(folder).unlink(missing_ok=True)


def _mark(folder: Path) -> Path:
    """Beside the bundle, which holds nothing but what its manifest lists."""
    return folder.with_name(f".{folder.name}.used")


def _note_use(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that came with an image is read-only
        _mark(folder).touch()


def _opens(folder: Path) -> bool:
    try:
        Bundle.open(folder)
    except (BundleError, OSError):  # the latter where the folder must not be looked into
        return False
    return True


def _folder_name(specs: Specs, policy: str, memory: str | None) -> str:
    """The variants' names, and 16 hex digits over everything that decides what the bundle holds."""
    named = dict(specs) if isinstance(specs, Mapping) else parse_variant_specs(specs)
    variants = []
    for name, spec in named.items():
        place = Place.find(spec)
        files = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in place.files)
        variants.append((name, str(place), files))
    facts = (FORMAT_VERSION, __version__, policy, memory, variants)
    return f"{'-'.join(named)[:80]}-{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]}"
