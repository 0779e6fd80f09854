"""A bundle's manifest, changed in one step: who reads the folder finds the old state or the new one."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from polymoe.bundle.live import ADDITIONS
from polymoe.bundle.manifest import MANIFEST, UNFINISHED_MANIFEST, Manifest, encode_manifest, read_manifest


def rewrite_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replace `manifest.json` by what `change` makes of it; two that do it at a time wait for each other.

    Raises `BundleError`, and `OSError` for a folder that cannot be written; the manifest is the old one then.
    """
    temporary = folder / UNFINISHED_MANIFEST
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = change(read_manifest(folder))
        with temporary.open("wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)
        os.fsync(lock)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    return manifest


def rewrite_manifests(changes: Sequence[tuple[Path, Callable[[Manifest], Manifest]]]) -> None:
    """`rewrite_manifest` of several folders, one after the other: all of them, or none. Whoever kills the process
    between two leaves the first ones new.

    Raises as `rewrite_manifest` does; what was written is then taken back.
    """
    written: list[tuple[Path, Manifest]] = []
    try:
        for folder, change in changes:
            before = read_manifest(folder)
            rewrite_manifest(folder, change)
            written.append((folder, before))
    except BaseException:
        for folder, before in reversed(written):
            with contextlib.suppress(OSError):
                rewrite_manifest(folder, lambda _, before=before: before)  # type: ignore[misc]
        raise


def remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Remove the folders of additions that the manifest does not list: of changes that were interrupted or undone."""
    listed = {addition.folder for addition in manifest.live_state.additions}
    place = folder / ADDITIONS
    for path in place.iterdir() if place.is_dir() else ():
        if f"{ADDITIONS}/{path.name}" not in listed and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
