"""One non-expert matrix in several versions, packed: multiplied by and looked up in without a version ever being whole.

    W_r = B_b(r) + Δ_d(r)          r: a version's row, b(r): its base, d(r): its delta, if it has one

As planned there is one base for all rows and a delta for each, or a base for each; a variant that is added while others
are served brings a further delta, or its matrix as a checkpoint stores it.

Letters: T tokens, R rows, G groups of tokens that use one row, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_linear import PackedSegments, packed_product
from polymoe.kernels.cpu.packed_pool import PackedPool, StoredPool
from polymoe.kernels.cpu.packed_stack import Matrix
from polymoe.native.library import cpu_kernels, kernel_threads
from polymoe.quant.codec import decode
from polymoe.quant.formats import Format

_NAME = "weight"  # of the one tensor in the pools


@dataclass(frozen=True, eq=False)
class Versions:
    """base, delta: int64 `[R]`, on the CPU: what each row is made of; delta −1: none. Matrices whose rows are alike in
    that have one object (`versions`), so that a pass looks its groups up once for all of them."""

    base: Tensor
    delta: Tensor
    used: tuple[range, range]  # of bases and of deltas: from the lowest to the highest
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both, int32, on a device."""
        if device not in self._on:
            self._on[device] = self.base.to(device, torch.int32), self.delta.to(device, torch.int32)
        return self._on[device]


@lru_cache(maxsize=1024)
def versions(pairs: tuple[tuple[int, int], ...]) -> Versions:
    """Of (base, delta) of each row."""
    bases, deltas = [base for base, _ in pairs], [delta for _, delta in pairs]
    used = range(min(bases), max(bases) + 1), range(min(deltas), max(deltas) + 1)
    return Versions(torch.tensor(bases), torch.tensor(deltas), used)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """bases, deltas: pools whose ids follow in order, and what each row takes of them."""

    bases: tuple[PackedPool | StoredPool, ...]
    deltas: tuple[PackedPool, ...]
    versions: Versions
    shape: torch.Size  # [O, I]

    @property
    def device(self) -> torch.device:
        tensor = self.bases[0].tensors[_NAME]
        return (tensor if isinstance(tensor, Tensor) else tensor["codes"]).device

    @property
    def is_tiled(self) -> bool:
        """Whether any pool is in tiles: nothing can be looked up in it."""
        return self.pools.is_tiled

    @property
    def num_bytes(self) -> int:
        return sum(pool.num_bytes for pool in (*self.bases, *self.deltas))

    @cached_property
    def pools(self) -> CompressedLayer:
        """As a layer of experts has them, of which none is stored."""
        stored = {_NAME: torch.empty(0, *self.shape, dtype=torch.bfloat16)}
        return CompressedLayer(stored, self.bases, self.deltas)

    @cached_property
    def matrix(self) -> Matrix | None:
        """What the compiled kernels are told; None for tensors that they cannot read."""
        stacks = self.pools.stacks
        return None if stacks is None else stacks.matrices[_NAME]

    def version(self, row: int) -> Tensor:
        """float32 [O, I]: what a row stands for."""
        return self.made_of(int(self.versions.base[row]), int(self.versions.delta[row]))

    def made_of(self, base: int, delta: int) -> Tensor:
        """float32 [O, I]: a base and a delta (−1: none)."""
        whole = _decoded(self.bases, base)
        return whole if delta < 0 else whole + _decoded(self.deltas, delta)

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        """float32 [..., I]: row `ids` of the version of each token. `ids`, `rows` int64 [...]."""
        assert not self.is_tiled
        (base, delta), used = self.versions.on(rows.device), self.versions.used
        found = _looked_up(self.bases, ids, base[rows], used[0])
        return found + _looked_up(self.deltas, ids, delta[rows], used[1]) if self.deltas else found


def packed_rows(
    base: tuple[Format, Mapping[str, Tensor]], delta: tuple[Format, Mapping[str, Tensor]] | None, shape: tuple[int, ...]
) -> PackedRows:
    """Of (format, part -> [1 or R, …]) of the bases and (format, part -> [R, …]) of the deltas of matrices `shape`: one
    base for all rows and a delta for each, or a base for each."""
    if delta is None:
        bases = packed_pool(*base, shape)
        return PackedRows((bases,), (), versions(tuple((r, -1) for r in range(len(bases)))), torch.Size(shape))
    deltas = packed_pool(*delta, shape)
    rows = versions(tuple((0, r) for r in range(len(deltas))))
    return PackedRows((packed_pool(*base, shape),), (deltas,), rows, torch.Size(shape))


def packed_pool(fmt: Format, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> PackedPool:
    """Part -> `[n, …]` of n matrices `shape` in one format."""
    return PackedPool(fmt, {_NAME: parts}, {_NAME: shape})


def stored_pool(weights: Tensor) -> StoredPool:
    """`[n, O, I]`, matrices as they are."""
    return StoredPool({_NAME: weights})


def packed_rows_linear(
    x: Tensor, weight: PackedRows, segments: PackedSegments, activation_bits: tuple[int, int] = (16, 16)
) -> Tensor:
    """`x [T, I]` times each segment's version -> `[T, O]` in x's dtype, by the compiled kernels where there are any.

    Args:
        segments: their bases are ids in `weight.bases`, their deltas in `weight.deltas`.
        activation_bits: that rows are rounded to where they meet tiles, before the base and before deltas.
    """
    matrix = weight.matrix if cpu_kernels() is not None and x.device.type == "cpu" else None
    if matrix is None:
        return packed_rows_linear_torch(x, weight, segments)
    if weight.is_tiled:
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
    starts, bases, deltas, _ = (values.tolist() for values in segments)
    for base, delta, start, stop in zip(bases, deltas, starts[:-1], starts[1:], strict=True):
        out[start:stop] = (x[start:stop].float() @ weight.made_of(base, delta).T).to(x.dtype)
    return out


def _decoded(pools: Sequence[PackedPool | StoredPool], index: int) -> Tensor:
    """float32 [O, I]: entry `index` of pools whose ids follow in order."""
    for pool in pools:
        if index < len(pool):
            return pool.tensors[_NAME][index].float() if isinstance(pool, StoredPool) else pool.decoded(_NAME, index)
        index -= len(pool)
    raise IndexError(index)


def _looked_up(pools: Sequence[PackedPool | StoredPool], ids: Tensor, entries: Tensor, used: range) -> Tensor:
    """float32 [..., I]: row `ids` of each token's entry of the pools, zeros where that is −1. used: where they lie."""
    out: Tensor | None = None
    for pool in pools:
        if used.start >= 0 and used.stop <= len(pool) and out is None:  # as planned: the host knows without looking
            return _rows_of(pool, ids, entries)
        here = (entries >= 0) & (entries < len(pool))
        found = torch.where(here[..., None], _rows_of(pool, ids, entries.clamp(0, len(pool) - 1)), 0.0)
        out = found if out is None else out + found
        entries = entries - len(pool)
    assert out is not None
    return out


def _rows_of(pool: PackedPool | StoredPool, ids: Tensor, entries: Tensor) -> Tensor:
    if isinstance(pool, StoredPool):
        return pool.tensors[_NAME][entries, ids].float()
    found = {part: stack[entries, ids] for part, stack in pool.tensors[_NAME].items()}
    return decode(found, pool.fmt, (*ids.shape, pool.shapes[_NAME][-1]), torch.float32)
