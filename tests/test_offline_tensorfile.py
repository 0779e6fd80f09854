"""A damaged safetensors file is named, with the fix, before anything is read from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymoe.bundle.tensor_file import TensorFileWriter, read_header
from polymoe.errors import CheckpointError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    return path


def rewrite(path: Path, change: object) -> None:
    """Replace header entries by `change(header)`, data untouched."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()  # type: ignore[operator]
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_header_of_a_good_file(good: Path) -> None:
    entries = read_header(good)
    assert {name: (e.shape, e.dtype, e.num_bytes) for name, e in entries.items()} == {
        "a": ((2, 3), torch.float32, 24),
        "b": ((5,), torch.bfloat16, 10),
    }


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated(good: Path, keep: int) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: .*download it again"):
        read_header(good)


def test_too_long(good: Path) -> None:
    good.write_bytes(good.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes too long"):
        read_header(good)


def test_not_safetensors(good: Path) -> None:
    good.write_bytes(b"PK\x03\x04" + b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(good)
    good.write_bytes((4).to_bytes(8, "little") + b"nope")
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        read_header(good)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [3, 3], "data_offsets": [0, 24]}, "inconsistent"),
        ({"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 24]}, "inconsistent"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}, "inconsistent"),
        ({"dtype": "F33", "shape": [2, 3], "data_offsets": [0, 24]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}, "not a whole number"),
        ({"dtype": "F32", "shape": [2, 3]}, "damaged"),
        ({"dtype": "F32", "shape": 6, "data_offsets": [0, 24]}, "damaged"),
        ([], "damaged"),
    ],
)
def test_inconsistent_entries(good: Path, entry: object, reason: str) -> None:
    rewrite(good, lambda header: header | {"a": entry})
    with pytest.raises(CheckpointError, match=reason):
        read_header(good)


def test_overlapping_tensors(good: Path) -> None:
    rewrite(good, lambda header: header | {"c": header["a"]})
    with pytest.raises(CheckpointError, match="inconsistent"):
        read_header(good)


def test_writer_makes_what_the_official_reader_reads(tmp_path: Path) -> None:
    """Pieces, mixed dtypes (widest first, so that everything is aligned), empty stacks."""
    stack = torch.randn(3, 2, 5).to(torch.bfloat16)
    wide, table = torch.randn(7, dtype=torch.float64), torch.arange(4, dtype=torch.int32)
    path = tmp_path / "out.safetensors"
    declared = {"stack": stack, "none": torch.empty(0, 4), "wide": wide, "table": table}
    writer = TensorFileWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in declared.items()})
    assert writer.names == ["wide", "none", "table", "stack"]
    for name in writer.names:
        for piece in stack if name == "stack" else [declared[name]]:
            writer.append(name, piece)
    written = writer.close()
    assert written.size == path.stat().st_size
    read_header(path)
    loaded = load_file(path)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in declared.items()
    )


def test_writer_notices_missing_and_misplaced_data(tmp_path: Path) -> None:
    writer = TensorFileWriter(tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    with pytest.raises(AssertionError, match="before a is complete"):
        writer.append("b", torch.zeros(2))
    writer.append("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="incomplete"):
        writer.close()
    writer.abandon()
