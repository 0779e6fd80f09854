"""Packed experts laid out for 8-bit integer products (tiled_experts.cpp): tiles of 16 outputs, codes and scales.

A pool's tensors keep their sizes: codes and scales of every expert are put in another order in place, so that a model
needs no more memory than its bundle promises. What is in tiles can be multiplied and not decoded.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_experts import why_not_fused
from polymoe.kernels.cpu.packed_pool import PackedPool, TiledPool
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.native.installed import instructions, level
from polymoe.native.library import cpu_kernels, kernel_threads
from polymoe.quant.formats import level_bytes

_LANES, _UNIT = 16, 32  # outputs of a tile, inputs that a tile's codes are grouped by
_NEEDED = {"avx512_vnni", "avx512vbmi"}  # at the level avx512, beside what all its kernels need


class Activations(NamedTuple):
    """Bits that rows of activations are rounded to, 8 or 16, before gate/up and before down.

    8 bits take half the products. What down reads is the product of two activations with heavy tails: 8 bits of it cost
    five times as much fidelity as 8 bits of the layer's input.
    """

    gate_up: int
    down: int

    def __str__(self) -> str:
        return f"{self.gate_up}- and {self.down}-bit activations"


ACTIVATIONS = {"int8": Activations(8, 8), "mixed": Activations(8, 16), "int16": Activations(16, 16)}


def tiled_layer(module: Any, layer: CompressedLayer, dtype: torch.dtype) -> CompressedLayer:
    """`layer` with every pool in tiles that can be; the same where none can, or where another kernel computes it.

    module: the stock experts module. dtype: of activations.
    """
    if not can_multiply_tiles() or why_not_fused(module, dtype, layer):
        return layer
    bases, deltas = (tuple(_tiled(pool) for pool in pools) for pools in (layer.bases, layer.deltas))
    return replace(layer, bases=bases, deltas=deltas)


def tiled_rows(rows: PackedRows, whole: bool) -> PackedRows:
    """A non-expert matrix with its pools in tiles, for bfloat16; the same where it cannot be. Nothing can be looked up
    in it any more.

    whole: False where rows come and go (slots): what comes is as the bundle has it.
    """
    if not can_multiply_tiles() or any(size % _UNIT for size in rows.shape) or not (whole or rows.deltas):
        return rows
    bases = tuple(map(_tiled, rows.bases))
    if not any(isinstance(pool, TiledPool) for pool in bases):  # the other kernel knows no tiles
        return rows
    return replace(rows, bases=bases, deltas=tuple(map(_tiled, rows.deltas)) if whole else rows.deltas)


@functools.cache
def can_multiply_tiles() -> bool:
    """Whether the processor has what the kernels of tiles need."""
    return cpu_kernels() is not None and (level() != "avx512" or instructions() >= _NEEDED)


def _tiled(pool: Any) -> Any:
    if not isinstance(pool, PackedPool) or isinstance(pool, TiledPool) or (levels := level_bytes(pool.fmt)) is None:
        return pool
    if any(len(shape) != 2 or shape[0] % _LANES or shape[1] % _UNIT for shape in pool.shapes.values()):
        return pool
    kernels = cpu_kernels()
    assert kernels is not None
    for name, parts in pool.tensors.items():
        codes, scales = parts["codes"], parts["scales"]
        for expert in range(len(pool)):
            old = codes[expert].clone(), scales[expert].clone()
            kernels.polymoe_make_tiles(
                old[0].data_ptr(), old[1].data_ptr(), pool.fmt.bits, codes.shape[1], pool.shapes[name][-1],
                codes.shape[2], codes[expert].data_ptr(), scales[expert].data_ptr(), kernel_threads(),
            )  # fmt: skip
    table, step = levels
    repeated = torch.tensor(table, dtype=torch.uint8).repeat(max(1, 64 // len(table)))
    return TiledPool(pool.fmt, pool.tensors, pool.shapes, repeated, step)
