"""The safetensors format on disk: check a file before it is trusted, and write one piece by piece.

    | 8 bytes: N, little endian | N bytes: JSON header | data: tensors back to back, no holes |

The official loader maps a file first and complains in terms of its own; here a damaged file is named with the fix.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the official reader's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}  # written, not read
# Widths in bits of everything the format knows, also of what is refused later as quantised.
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it. `dtype` is None for a type polymoe does not read (8-bit floats …)."""

    dtype_name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and SHA-256 (hex) of a finished file."""

    size: int
    sha256: str


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'BF16', as safetensors spells it."""
    return _NAMES[dtype]


def _pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def read_header(path: Path, fix: str = "download it again or save the model again") -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, after checking that the file is whole and consistent.

    `fix`: what the message tells to do. Raises `CheckpointError`, naming the file, when it is truncated, too long, not
    safetensors, or when a tensor's offsets do not match its shape.
    """

    def broken(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: {reason}; {fix}.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise broken(f"truncated: {size} bytes cannot hold a safetensors header")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise broken(f"not a safetensors file (its header would be {length} bytes long)")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(raw) < length:
        raise broken(f"truncated: the header promises {8 + length} bytes, the file has {size}")
    try:
        header = json.loads(raw, object_pairs_hook=_pairs_once)
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise broken(f"damaged safetensors header ({error})") from error

    offset = 0
    for name, (entry, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != offset or stop - start != entry.num_bytes:
            raise broken(
                f"inconsistent: tensor {name} of shape {list(entry.shape)} {entry.dtype_name} needs bytes {offset} "
                f"to {offset + entry.num_bytes}, its header says {start} to {stop}"
            )
        offset = stop
    promised = 8 + length + offset
    if size < promised:
        raise broken(f"truncated: the header promises {promised} bytes, the file has {size}")
    if size > promised:
        raise broken(f"{size - promised} bytes too long: the header promises {promised} bytes, the file has {size}")
    return {name: entry for name, (entry, _, _) in entries.items()}


def _parse_entry(value: dict[str, Any]) -> tuple[TensorEntry, int, int]:
    name, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if name not in _BITS:
        raise ValueError(f"unknown dtype {name!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("a size is not a whole number")
    bits = _BITS[name] * math.prod(shape)
    return TensorEntry(name, _DTYPES.get(name), tuple(shape), (bits + 7) // 8), start, stop


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes in row-major order, without a copy where it is contiguous."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class TensorFileWriter:
    """Writes a safetensors file piece by piece, so that a stack of experts never has to exist in memory.

    Declare all tensors first, then `append` their data in the order of `names`; a tensor may come in pieces along its
    first axis. `close` syncs to the disk and returns size and hash. OSError passes through.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        # Widest first, as the official writer does it: every tensor then starts at a multiple of its item size.
        self.names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._missing: dict[str, int] = {}
        self._current = 0  # index of the tensor being written
        for name in self.names:
            dtype, shape = tensors[name]
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [offset, stop]}
            self._missing[name] = stop - offset
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._sha256 = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1)  # beside the writing, in the order of the data
        self._size = 0
        self._file = path.open("xb")
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, data: bytes | memoryview) -> None:
        self._hashing.submit(self._sha256.update, data)
        self._file.write(data)
        self._size += len(data)

    def append(self, name: str, piece: Tensor) -> int:
        """Write the next piece of tensor `name`. Returns the number of bytes written."""
        data = raw_bytes(piece)
        if not data:
            return 0
        while not self._missing[self.names[self._current]]:
            self._current += 1
        assert self.names[self._current] == name, f"{name} comes before {self.names[self._current]} is complete"
        assert len(data) <= self._missing[name], f"{name}: more data than declared"
        self._missing[name] -= len(data)
        self._write(data)
        return len(data)

    def close(self) -> WrittenFile:
        assert not any(self._missing.values()), f"incomplete: {[n for n, left in self._missing.items() if left]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._hashing.shutdown()
        return WrittenFile(self._size, self._sha256.hexdigest())

    def abandon(self) -> None:
        """Close the file as it is; the caller removes it."""
        self._file.close()
        self._hashing.shutdown(cancel_futures=True)
