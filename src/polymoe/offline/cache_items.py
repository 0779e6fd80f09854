"""What the cache holds, and which of it is removed. Only what is recognised as polymoe's own is ever touched."""

import fcntl
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import polymoe
from polymoe.errors import BundleError
from polymoe.offline.atomic import is_ours
from polymoe.offline.cache import forget_use, last_used
from polymoe.offline.manifest import read_manifest, why_not_only_a_bundle

_BUNDLE = re.compile(r".+-[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.(.+-[0-9a-f]{16})\.(tmp|old)-[a-z0-9_]{8}")
_FAMILY = re.compile(r"[\w.-]+-[0-9a-f]{8}")
_DAY = 86400.0


@dataclass(frozen=True)
class CacheItem:
    """One folder of the cache.

    kind: "bundle", "unfinished" (of a run that was killed) or "family" (of `polymoe bench`). what: for people.
    num_bytes: on the disk. used: seconds since the epoch. useless: why it will never be used again; None if it may be.
    """

    path: Path
    kind: str
    what: str
    num_bytes: int
    used: float
    useless: str | None = None


def cache_items(root: Path) -> list[CacheItem]:
    """Bundles, leftovers and benchmark families below `root`, the least recently used first."""
    found = [
        *(item for path in _folders(root / "bundles") if (item := _bundle(path)) is not None),
        *(_family(path) for path in _folders(root / "families") if _is_family(path)),
    ]
    return sorted(found, key=lambda item: item.used)


def to_prune(items: list[CacheItem], days: float, everything: bool) -> list[CacheItem]:
    """Those that are useless or were not used for `days`, or all of them."""
    oldest = time.time() - days * _DAY
    return [item for item in items if everything or item.useless is not None or item.used < oldest]


def remove(item: CacheItem) -> None:
    """Raises `OSError`. A server that runs from a bundle keeps what it has opened."""
    shutil.rmtree(item.path)
    if item.kind == "bundle":
        forget_use(item.path)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bundle(path: Path) -> CacheItem | None:
    """None for what is no bundle of ours, and for a folder that somebody writes at this moment."""
    if match := _UNFINISHED.fullmatch(path.name):
        if _is_locked(path) or not is_ours(path):
            return None
        return CacheItem(path, "unfinished", match[1], *_size(path), "left by a run that was killed")
    if not _BUNDLE.fullmatch(path.name) or why_not_only_a_bundle(path) is not None:
        return None
    num_bytes, _ = _size(path)
    try:
        manifest = read_manifest(path)
    except BundleError:
        return CacheItem(path, "bundle", path.name, num_bytes, last_used(path), "of another format, or damaged")
    names = ", ".join(variant.name for variant in manifest.variants)
    what = f"{names}: policy {manifest.policy} {manifest.memory}".rstrip()
    other = manifest.polymoe_version != polymoe.__version__
    reason = f"of polymoe {manifest.polymoe_version}" if other else None
    return CacheItem(path, "bundle", what, num_bytes, last_used(path), reason)


def _family(path: Path) -> CacheItem:
    return CacheItem(path, "family", f"random checkpoints of the shape {path.name.rpartition('-')[0]}", *_size(path))


def _is_family(path: Path) -> bool:
    return _FAMILY.fullmatch(path.name) is not None and all(
        re.fullmatch(r"v\d+", child.name) and (child / "config.json").is_file() for child in path.iterdir()
    )


def _is_locked(path: Path) -> bool:
    """Whether its writer (`polymoe.offline.atomic`) is alive."""
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _size(path: Path) -> tuple[int, float]:
    """(bytes of all files, when the folder was last changed)."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()), path.stat().st_mtime
