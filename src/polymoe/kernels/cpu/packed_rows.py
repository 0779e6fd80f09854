"""One non-expert matrix in several versions, packed: multiplied by and looked up in without a version ever being whole.

    W_r = B + Δ_r   (one base for all)      or      W_r = B_r   (a base for each)          r: a version's row

Letters: T tokens, R rows, G groups of tokens that use one row, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_linear import PackedSegments, packed_product
from polymoe.kernels.cpu.packed_pool import PackedPool, TiledPool
from polymoe.kernels.cpu.packed_stack import Matrix
from polymoe.native.library import cpu_kernels, kernel_threads
from polymoe.quant.codec import decode
from polymoe.quant.formats import Format

_NAME = "weight"  # of the one tensor in the pools


@dataclass(frozen=True, eq=False)
class PackedRows:
    """bases: one, or one a row. deltas: one a row; None: there are none."""

    bases: PackedPool
    deltas: PackedPool | None

    @property
    def shape(self) -> torch.Size:
        """[O, I]"""
        return torch.Size(self.bases.shapes[_NAME])

    @property
    def device(self) -> torch.device:
        return self.bases.tensors[_NAME]["codes"].device

    @property
    def has_one_base(self) -> bool:
        return self.deltas is not None

    @property
    def num_bytes(self) -> int:
        return self.bases.num_bytes + (0 if self.deltas is None else self.deltas.num_bytes)

    @cached_property
    def pools(self) -> CompressedLayer:
        """As a layer of experts has them, of which none is stored."""
        stored = {_NAME: torch.empty(0, *self.shape, dtype=torch.bfloat16)}
        return CompressedLayer(stored, (self.bases,), () if self.deltas is None else (self.deltas,))

    @cached_property
    def matrix(self) -> Matrix | None:
        """What the compiled kernels are told; None for tensors that they cannot read."""
        stacks = self.pools.stacks
        return None if stacks is None else stacks.matrices[_NAME]

    def version(self, row: int) -> Tensor:
        """float32 [O, I]: what a row stands for."""
        if self.deltas is None:
            return self.bases.decoded(_NAME, row)
        return self.bases.decoded(_NAME, 0) + self.deltas.decoded(_NAME, row)

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """float32 [..., I]: row `ids` of the version of each token. `ids`, `rows` int64 [...]."""
        assert not isinstance(self.bases, TiledPool)
        if self.deltas is None:
            return _looked_up(self.bases, ids, rows)
        return _looked_up(self.bases, ids, None) + _looked_up(self.deltas, ids, rows)


def packed_rows(
    base: tuple[Format, Mapping[str, Tensor]], delta: tuple[Format, Mapping[str, Tensor]] | None, shape: tuple[int, ...]
) -> PackedRows:
    """Of (format, part -> [1 or R, …]) of the bases and (format, part -> [R, …]) of the deltas of matrices `shape`."""
    made = [None if pool is None else PackedPool(pool[0], {_NAME: pool[1]}, {_NAME: shape}) for pool in (base, delta)]
    assert made[0] is not None
    return PackedRows(made[0], made[1])


def packed_rows_linear(
    x: Tensor, weight: PackedRows, segments: PackedSegments, activation_bits: tuple[int, int] = (16, 16)
) -> Tensor:
    """`x [T, I]` times each segment's version -> `[T, O]` in x's dtype, by the compiled kernels where there are any.

    Args:
        segments: their bases are rows of `weight.bases`, their deltas of `weight.deltas`.
        activation_bits: that rows are rounded to where they meet tiles, before the base and before deltas.
    """
    matrix = weight.matrix if cpu_kernels() is not None and x.device.type == "cpu" else None
    if matrix is None:
        return packed_rows_linear_torch(x, weight, segments)
    if isinstance(weight.bases, TiledPool):
        return _tiled_product(x, matrix, segments, activation_bits)
    return packed_product(x, matrix, segments)


def _tiled_product(x: Tensor, matrix: Matrix, segments: PackedSegments, activation_bits: tuple[int, int]) -> Tensor:
    """Of bfloat16 rows."""
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    out = torch.empty(len(x), matrix.outputs, dtype=x.dtype)
    starts, base, delta, _ = segments
    kernels.polymoe_tiled_linear_bf16(
        x.data_ptr(), matrix.inputs, matrix.outputs, len(base), starts.data_ptr(), base.data_ptr(), delta.data_ptr(),
        matrix.bases, matrix.deltas, activation_bits[0], activation_bits[1] < activation_bits[0], out.data_ptr(),
        kernel_threads(),
    )  # fmt: skip
    return out


def packed_rows_linear_torch(x: Tensor, weight: PackedRows, segments: PackedSegments) -> Tensor:
    """The reference, on any device: one version at a time, whole. Arguments as `packed_rows_linear`."""
    out = x.new_empty(len(x), weight.shape[0])
    starts, base, delta, _ = (values.tolist() for values in segments)
    rows = base if weight.deltas is None else delta
    for row, start, stop in zip(rows, starts[:-1], starts[1:], strict=True):
        out[start:stop] = (x[start:stop].float() @ weight.version(row).T).to(x.dtype)
    return out


def _looked_up(pool: PackedPool, ids: Tensor, rows: Tensor | None) -> Tensor:
    """float32 [..., I] of a pool's only matrix (rows None), or of each token's own."""
    found = {part: stack[0][ids] if rows is None else stack[rows, ids] for part, stack in pool.tensors[_NAME].items()}
    return decode(found, pool.fmt, (*ids.shape, pool.shapes[_NAME][-1]), torch.float32)
