"""Files of text that users give: plain text or JSON lines. What is large is sampled before anything else is done.

|====|        |====|        |====|        |====|      pieces of a large file, at even distances
"""

import codecs
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from polymoe.errors import PolymoeError, explain
from polymoe.offline.calibrate.spread import spread

WHOLE_BYTES = 4 << 20  # a file up to this size is read whole; to tokenise it takes some 200 times as much for a moment
PIECES = 256  # of a larger one
PIECE_BYTES = 8 << 10
_LONGEST_LINE = 256 << 10  # bytes; longer JSON lines of a large file are left out
_NEAR = 4 << 10  # plain text without the beginning of a line in so many bytes is cut anywhere

_Piece = tuple[int, bytes]  # offset in the file, and what stands there


@dataclass(frozen=True)
class Line:
    """One of JSON lines, and where it stands, for messages: "--text code: FILE, line 3"."""

    where: str
    text: str


def is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def is_sampled(path: Path) -> bool:
    """Whether only pieces of the file are read."""
    return path.stat().st_size > WHOLE_BYTES


def read_plain(option: str, path: Path) -> list[str]:
    """Plain UTF-8 text: the whole file, or pieces of a large one, about 2 MiB in all.

    Args:
        option: where the file was given; messages begin with it.

    Raises `PolymoeError` for a file that cannot be read, and for bytes that are no UTF-8.
    """
    with _open(option, path) as (file, size):
        if size <= WHOLE_BYTES:
            return [_decode(option, path, file.read())]
        pieces = [_plain_piece(file, start) for start, _ in _starts(size)]
    return [_decode(option, path, data) for data in pieces]


def read_lines(option: str, path: Path) -> list[Line]:
    """The lines of a file that have something in them; of a large file some, at most `WHOLE_BYTES`.

    Raises as `read_plain`.
    """
    with _open(option, path) as (file, size):
        if size <= WHOLE_BYTES:
            # Not splitlines: JSON may hold U+2028 and its kind as they are.
            lines = enumerate(_decode(option, path, file.read()).split("\n"), start=1)
            return [Line(f"{option}: {path}, line {number}", text) for number, text in lines if text.strip()]
        pieces = [piece for start, end in _starts(size) for piece in _whole_lines(file, start, end)]
    if not pieces:
        raise PolymoeError(f"{option}: {path} has no lines shorter than {_LONGEST_LINE >> 10} KiB; write shorter ones.")
    fits = WHOLE_BYTES * len(pieces) // sum(len(data) for _, data in pieces)
    return [
        Line(f"{option}: {path}, the line at byte {offset}", text)
        for offset, data in spread(pieces, max(1, fits))
        if (text := _decode(option, path, data)).strip()
    ]


@contextmanager
def _open(option: str, path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size in bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and cannot be read twice
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
            raise PolymoeError(f"{option}: {path} is {what}; give a file of text.")
        with path.open("rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise PolymoeError(f"{option}: {explain(error)}") from error


def _starts(size: int) -> list[tuple[int, int]]:
    """Where each piece begins, and where the next one does."""
    starts = [i * (size - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES)]
    return list(zip(starts, [*starts[1:], size], strict=True))


def _plain_piece(file: BinaryIO, start: int) -> bytes:
    """From the first line that begins near `start`; without one from there. It ends with a line where it can."""
    _to_next_line(file, start, _NEAR)
    data = file.read(PIECE_BYTES)
    end = data.rfind(b"\n") + 1
    return data[:end] if end > PIECE_BYTES // 2 else _whole_characters(data)


def _whole_lines(file: BinaryIO, start: int, end: int) -> list[_Piece]:
    """Lines that begin at `start` or later, before `end`: one at least, and as many as a piece holds."""
    found: list[_Piece] = []
    if not _to_next_line(file, start, _LONGEST_LINE):
        return found
    while (offset := file.tell()) < end and (not found or offset < start + PIECE_BYTES):
        line = file.readline(_LONGEST_LINE)
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            break
        found.append((offset, line))
    return found


def _to_next_line(file: BinaryIO, start: int, within: int) -> bool:
    """Go to the first line that begins at `start` or up to `within` bytes later; to `start` where there is none."""
    if start == 0:
        file.seek(0)
        return True
    file.seek(start - 1)
    if file.readline(within).endswith(b"\n"):
        return True
    file.seek(start)
    return False


def _whole_characters(data: bytes) -> bytes:
    """Without the halves of UTF-8 characters at both ends."""
    start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data[start:]).encode()
    except UnicodeDecodeError:
        return data  # what reads it says so


def _decode(option: str, path: Path, data: bytes) -> str:
    """With line ends as `\\n`, and without a byte order mark."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise PolymoeError(f"{option}: {path} cannot be read as UTF-8 text ({error}).") from error
