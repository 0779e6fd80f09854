"""Are a bundle's weights those that were planned? Hashing them takes as long as reading them, so at a start it is done
beside loading, as far as that comes, and completely when asked to."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import BundleError
from polymoe.machine import available_cores
from polymoe.offline.bundle import Bundle
from polymoe.offline.bundle_checks import FIX, damaged, file_damage, file_sha256, is_weights
from polymoe.offline.manifest import MANIFEST, FileRecord, read_manifest
from polymoe.offline.manifest_checks import check_manifest, files_of
from polymoe.offline.progress import byte_progress

_AT_ONCE = 256 << 20  # bytes that are waited for at every start: a fraction of a second
_MOST_THREADS = 8


def verify_bundle(path: str | Path, console: Console | None = None) -> Bundle:
    """Compare every file with the hash that was recorded when the bundle was planned, then open it.

    Raises `BundleError` that names all files that are damaged.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    check_manifest(str(folder / MANIFEST), manifest)
    total = sum(record.size for record in manifest.files)

    def damage(record: FileRecord) -> str | None:
        found = file_damage(folder, record, with_hash=True)
        advance(record.size)
        return None if found is None else f"{record.path} {found}"

    with byte_progress("Verifying", total, console) as advance, ThreadPoolExecutor(_threads()) as pool:
        found = [reason for reason in pool.map(damage, manifest.files) if reason]
    if found:
        raise BundleError(f"{folder} is damaged: {'; '.join(found)}; {FIX}.")
    bundle = Bundle.open(folder)
    if console is not None:
        console.print(
            f"{bundle.path.name}: {len(manifest.files)} files, {format_bytes(total)}, all as planned.", soft_wrap=True
        )
    return bundle


@contextmanager
def hashed_beside(
    bundle: Bundle, everything: bool, progress: Callable[[str, float], None] | None = None
) -> Iterator[None]:
    """Hash weights in threads of their own while the body loads them.

    With `everything`, and for small bundles, the end waits until all files are hashed. Else only those that are loaded
    are looked at, in the order of loading, and what is not hashed by the end is left.

    Raises `BundleError` at the end for a file that has changed. `progress`: called with ("verifying", fraction done).
    """
    records = {r.path: r for r in bundle.manifest.files if is_weights(r.path)}
    everything = everything or sum(record.size for record in records.values()) <= _AT_ONCE
    paths = [
        path for path in files_of(bundle.manifest) if path in records and (everything or not path.startswith("host/"))
    ]
    stop = threading.Event()
    pool = ThreadPoolExecutor(_threads(), thread_name_prefix="polymoe-hashes")
    try:
        jobs = {pool.submit(_is_changed, bundle.path / p, records[p], stop.is_set): p for p in paths}
        yield
        if not everything:
            stop.set()
        for done, job in enumerate(as_completed(jobs)):
            if job.result() and read_manifest(bundle.path) == bundle.manifest:  # else it was replaced meanwhile
                raise damaged(bundle.path, jobs[job], "has changed")
            if everything and progress is not None:
                progress("verifying", (done + 1) / len(jobs))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _is_changed(path: Path, record: FileRecord, stopped: Callable[[], bool]) -> bool:
    if stopped():
        return False
    try:
        digest = file_sha256(path, stopped)
    except OSError:  # replaced meanwhile, or unreadable, which loading says
        return False
    return digest is not None and digest != record.sha256


def _threads() -> int:
    """One less than there are cores, which loading has."""
    return min(max(1, len(available_cores()) - 1), _MOST_THREADS)
