"""Which files of a folder are read: regular ones that are really in it, or in the Hub's cache.

A link that leads out of a checkpoint would put a file of this machine into a bundle and into answers; a FIFO would be
waited for for ever. The Hub's cache is made of links, to `blobs` beside `snapshots`:

    models--org--name/snapshots/COMMIT/config.json -> ../../blobs/HASH
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from polymoe.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def why_not_to_read(path: Path, folder: Path) -> str | None:
    """Why `path`, a file that belongs to `folder`, must not be read, to follow its name; None: it may be. Nothing of
    it is read."""
    try:
        real, root = path.resolve(strict=True), folder.resolve()
        mode = os.stat(real).st_mode  # noqa: PTH116 - of the file itself, on every version of Python
    except (OSError, RuntimeError, ValueError):  # ValueError: a NUL in its name; RuntimeError: links in a circle
        return "is a link that leads nowhere" if path.is_symlink() else "is missing or cannot be read"
    if not stat.S_ISREG(mode):
        return f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, and only regular files are read"
    if not real.is_relative_to(root) and not _in_hub_cache(real, root):
        return f"leads to {real}, outside of {root}; put a copy of the file in its place"
    return None


def _in_hub_cache(real: Path, root: Path) -> bool:
    """Whether the Hub's client would have put `real` where a snapshot `root` links to."""
    if root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs"):
        return True
    if "blobs" not in real.parts:
        return False
    import huggingface_hub  # here, since most runs never need it

    return real.is_relative_to(Path(huggingface_hub.constants.HF_HUB_CACHE).expanduser().resolve())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises `CheckpointError`."""
    if reason := why_not_to_read(path, path.parent):
        raise CheckpointError(f"{path} {reason}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, this is a {type(value).__name__}.")
    return value


def _constant(text: str) -> float:
    """Infinity is a limit that configs of stock models have; NaN is damage."""
    if text == "NaN":
        raise ValueError("it has a value that is not a number, NaN")
    return float(text)
