"""Bundles that were damaged, or written wrong on purpose: the same file in every way that goes wrong, and a manifest
that agrees with what is wrong."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from polymoe.bundle.manifest import MANIFEST, FileRecord, digest_of


def damages(file: Path, other: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what does it) of everything that can happen to one file; `other` is another file of the bundle."""
    content = file.read_bytes()
    middle = len(content) // 2

    def flip(at: int) -> Callable[[], object]:
        return lambda: file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])

    def replace_by(make: Callable[[], object]) -> Callable[[], object]:
        def replaced() -> None:
            file.unlink()
            make()

        return replaced

    yield "delete", file.unlink
    yield "empty", lambda: file.write_bytes(b"")
    if not content.endswith(b"}\n"):  # of JSON that means nothing
        yield "truncate by one byte", lambda: file.write_bytes(content[:-1])
    yield "truncate to a half", lambda: file.write_bytes(content[:middle])
    yield "one byte more", lambda: file.write_bytes(content + b"\0")
    for at in sorted({0, 3, 9, middle, len(content) - 2}):
        yield f"flip a bit of byte {at}", flip(at)
    yield "zeros", lambda: file.write_bytes(bytes(len(content)))
    yield "huge header", lambda: file.write_bytes((2**63 - 1).to_bytes(8, "little") + content[8:])
    yield "deep nesting", lambda: file.write_bytes(b"[" * len(content))
    if (foreign := other.read_bytes()) != content:
        yield "another file's content", lambda: file.write_bytes(foreign)
    yield "folder", replace_by(file.mkdir)
    yield "FIFO", replace_by(lambda: os.mkfifo(file))
    yield "device", replace_by(lambda: file.symlink_to("/dev/zero"))
    yield "link out of the bundle", replace_by(lambda: file.symlink_to("/etc/passwd"))
    yield "link to itself", replace_by(lambda: file.symlink_to(file.name))
    yield "link to nothing", replace_by(lambda: file.symlink_to("nothing"))


class Liar:
    """A bundle whose files are changed and whose manifest is made to agree, as somebody would who means it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def edit_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """`change` the manifest; its digest is right again afterwards."""
        path = self.folder / MANIFEST
        fields = json.loads(path.read_text())
        change(fields)
        fields["digest"] = digest_of(fields)
        path.write_text(json.dumps(fields))

    def edit_tensors(self, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.folder / file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / file)
        self.sign(file)

    def write(self, file: str, content: bytes) -> None:
        (self.folder / file).write_bytes(content)
        self.sign(file)

    def sign(self, file: str) -> None:
        """The manifest agrees with what the file is now."""
        content = (self.folder / file).read_bytes()
        record = FileRecord(file, len(content), hashlib.sha256(content).hexdigest())
        mine = {"path": record.path, "size": record.size, "sha256": record.sha256}
        self.edit_manifest(lambda m: m.update(files=[mine if f["path"] == file else f for f in m["files"]]))


def restore(folder: Path, whole: Path, file: str) -> None:
    """`file` of `folder`, whatever became of it, as it is in `whole`."""
    path = folder / file
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    shutil.copy2(whole / file, path)
