"""A folder (or a file) that appears at once or not at all, whatever kills the process in between.

.NAME.tmp-XXXXXXXX   being written, locked by its writer, marked as ours by a file
NAME                 always whole: absent, the old one or the new one
.NAME.next           planned beside a server, which takes it in exchange for NAME
.NAME.old-XXXXXXXX   only where folders cannot be exchanged in one step: holds the old one for a moment

Only what polymoe made is ever removed: a folder with the mark of an unfinished one, or a bundle that holds nothing but
what its own manifest lists.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polymoe.bundle.manifest import why_not_only_a_bundle
from polymoe.errors import PlanError, explain

_MARK = ".polymoe-unfinished"  # in a folder while it is written: a later run may remove it
_ASIDE = re.compile(r"\..+\.old-[a-z0-9_]{8}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it takes `target`'s place, on any exception it is removed.

    Leftovers of killed runs are removed first. Raises `PlanError` when `target` exists and `overwrite` is not set,
    when its parent cannot be written, or when the disk fills up.
    """
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        check_target(target, overwrite)  # again: an old bundle may have returned
        folder, lock = _locked_folder(target)
    except OSError as error:
        raise _explained(error, target) from error
    try:
        yield folder
        (folder / _MARK).unlink(missing_ok=True)
        sync_tree(folder)
        _publish(folder, target, overwrite)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _explained(error, target) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to beside `target`, whose place it takes on success. Folders above it are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.part")
    yield unfinished
    unfinished.replace(target)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `PlanError` when `target` is there and may not be replaced: only an empty folder may, or a bundle that
    holds nothing else."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PlanError(f"{target} is not a folder; choose another --out.")
    if target.exists() and not overwrite:
        raise PlanError(f"{target} exists; choose another --out, or replace it with --force.")
    if target.exists() and any(target.iterdir()) and (reason := why_not_only_a_bundle(target)):
        raise PlanError(
            f"{target} {reason}, so --force will not replace it; choose another --out, or remove the folder yourself."
        )


def check_can_write(target: Path) -> None:
    """Raise `PlanError` where nothing named `target` could be made: to be called before hours of work.

    A file system that fills up meanwhile is another matter.
    """
    parent = target.absolute().parent
    try:
        target.with_name(f".{target.name}.calibration").lstat()  # the longest name that is made beside it
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise PlanError(f"{target} cannot be written: {explain(OSError(error.errno, error.strerror))}") from error
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise PlanError(f"{target} cannot be written: {parent} is a file; choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PlanError(f"{target} cannot be written: {parent} is read-only for you; choose another folder.")


def remove_leftovers(target: Path) -> None:
    """Remove temporary folders of `target` whose writers are dead (nobody holds their lock).

    An old bundle that a dead writer had put aside returns to its place.
    """
    all_dead = True
    for folder in _named_by_us(target, "tmp"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_ours(folder)
        except OSError:
            all_dead = False
        finally:
            os.close(lock)
    for aside in _named_by_us(target, "old") if all_dead else ():
        old = aside / target.name
        if old.exists() and not target.exists():
            old.rename(target)
        elif old.is_dir():
            _remove_ours(old)
        with contextlib.suppress(OSError):
            aside.rmdir()


def next_folder(target: Path) -> Path:
    """Where the bundle is planned that shall take the place of `target`."""
    return target.with_name(f".{target.name}.next")


def remove_next(target: Path) -> None:
    """Remove `next_folder(target)`, and what a killed planner left of it, where that may be looked at."""
    folder = next_folder(target)
    with contextlib.suppress(OSError):
        remove_leftovers(folder)
        if folder.is_dir() and not folder.is_symlink():
            _remove_ours(folder)


def remove_files(folder: Path, made: re.Pattern[str]) -> None:
    """Remove the files below `folder` whose path (relative, with slashes) `made` matches, and the folders, itself
    included, that are empty then."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if made.fullmatch(path.relative_to(folder).as_posix()):
                path.unlink()
            elif path.is_dir() and not path.is_symlink():
                path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _named_by_us(target: Path, kind: str) -> list[Path]:
    """Folders beside `target` with a name as `tempfile.mkdtemp` makes it."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[a-z0-9_]{{8}}")
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]


def is_ours(folder: Path) -> bool:
    """Whether polymoe made all that is in `folder`, so that it may be removed: it is unfinished and marked, a bundle
    and nothing else, or empty (killed before it was marked). Where an old bundle was put aside, what holds of that."""
    if (folder / _MARK).exists() or why_not_only_a_bundle(folder) is None:
        return True
    inner = list(folder.iterdir())
    return not inner or (_ASIDE.fullmatch(folder.name) is not None and len(inner) == 1 and is_ours(inner[0]))


def _remove_ours(folder: Path) -> None:
    """Remove an unfinished folder or an old bundle; anything else stays."""
    if is_ours(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it. The lock ends with the process, so it tells who is alive."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        folder.chmod(0o755)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            (folder / _MARK).touch()
            return folder, lock
        os.close(lock)  # another run took it for a leftover before it was locked


def sync_tree(folder: Path) -> None:
    """fsync every folder of the tree (files are synced by who writes them)."""
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # and again: building took a while
    if not target.exists():
        folder.rename(target)
    elif exchange(folder, target):
        # `folder` is the old bundle now. If we are killed here, the next run removes it as a leftover.
        _sync(target.parent)
        _remove_ours(folder)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(aside / target.name)
        try:
            folder.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
        _sync(target.parent)
        _remove_ours(aside / target.name)
        with contextlib.suppress(OSError):
            aside.rmdir()
    _sync(target.parent)


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2). False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _explained(error: OSError, target: Path) -> PlanError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PlanError(
            f"the disk is full while writing {target}; nothing was changed. Free some space and try again."
        )
    return PlanError(f"{target} cannot be written: {explain(OSError(error.errno, error.strerror))}")
