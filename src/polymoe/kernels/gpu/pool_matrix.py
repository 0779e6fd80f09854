"""One weight of all experts of a pool, as the kernels take it: tensors, and constants that the compiler knows."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool
from polymoe.kernels.gpu.packed_asm import assembly
from polymoe.kernels.gpu.packed_product import EXACT, FP8, INT8, ONE_BIT, STORED, TABLE, TWO_BITS
from polymoe.quant.codec import decode
from polymoe.quant.exact import changes_before_rows, decode_exact_torch
from polymoe.quant.formats import PLANES, Format, get_format, group_size

CONSTANTS = ("KIND", "WIDE", "NARROW", "GROUP", "LOW", "HIGH", "STEP0", "STEP1", "STEP2", "STEP3")
Constant = int | float | str


@dataclass(frozen=True, eq=False)
class PoolMatrix:
    """Experts `first` … `first + count − 1` of a layer's numbering, one weight each.

    values: `[P, O, I]` stored or `[P, O, bytes]` codes. scales: `[P, O, groups]` or None. bias: `[P, O]` or None.
    levels: the code's values in the dtype of the activations, for formats that are looked up.
    Of lossless deltas, values are the bits, levels the new values of all, and scales where each row's begin in them,
    int64 `[P, O, 1]`.
    inputs: I. constants: the kernel's compile-time arguments, without their prefix.
    """

    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    levels: Tensor | None
    first: int
    inputs: int
    format: str
    constants: Mapping[str, Constant]

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def outputs(self) -> int:
        return self.values.shape[1]

    def __contains__(self, index: int) -> bool:
        return self.first <= index < self.first + self.count

    def product(self, index: int, x: Tensor) -> Tensor:
        """float32 `[..., O]` of expert `index` in the layer's numbering: the reference of the kernels."""
        here = index - self.first
        assert self.format != "exact", "of a lossless delta there is a product only with its base"
        if self.scales is None:
            weight = self.values[here].float()
        else:
            codes = self.values[here].view(torch.float8_e4m3fn) if self.format == "fp8" else self.values[here]
            parts = {"codes": codes, "scales": self.scales[here]}
            weight = decode(parts, get_format(self.format), (self.outputs, self.inputs), torch.float32)
        out = x.float() @ weight.T
        return out if self.bias is None else out + self.bias[here].float()

    def changes(self, index: int, base: "PoolMatrix", base_index: int) -> Tensor:
        """float32 `[O, I]`: what the lossless delta `index` changes of a stored base: the reference of the kernels."""
        assert self.scales is not None
        assert self.levels is not None
        here, old = index - self.first, base.values[base_index - base.first]
        entry = {"bitmap": self.values[here], "values": self.levels[int(self.scales[here, 0, 0]) :]}
        return decode_exact_torch(entry, old).float() - old.float()

    @property
    def expert_bytes(self) -> int:
        """Bytes read for one expert."""
        tensors = [t for t in (self.values, self.scales, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) // max(1, self.count)


def stored_matrix(values: Tensor, bias: Tensor | None, first: int = 0) -> PoolMatrix:
    """Weights as the stock module has them, `[P, O, I]`, on the device or in pinned memory of the host."""
    assert values.is_contiguous()
    constants = _constants(STORED.value)
    return PoolMatrix(values, None, _contiguous(bias), None, first, values.shape[2], "stored", constants)


def packed_matrix(pool: PackedPool, name: str, first: int, dtype: torch.dtype) -> PoolMatrix:
    """Tensor `name` of a packed pool whose ids begin at `first`, for activations of `dtype`."""
    parts, bias = pool.tensors[name], pool.tensors.get(f"{name}_bias")
    inputs = pool.shapes[name][1]
    own_bias = None if bias is None else bias[""].contiguous()
    values = parts["codes"].view(torch.uint8)
    assert values.is_contiguous()
    assert parts["scales"].is_contiguous()
    constants = _packed_constants(pool.fmt, inputs, dtype)
    levels = _levels(pool.fmt, dtype, values.device) if constants["KIND"] == TABLE.value else None
    return PoolMatrix(values, parts["scales"], own_bias, levels, first, inputs, pool.fmt.name, constants)


def exact_matrix(pool: ExactPool, name: str, inputs: int, first: int, dtype: torch.dtype) -> PoolMatrix:
    """Tensor `name` of lossless deltas whose ids begin at `first`, of weights with `inputs` columns in `dtype`."""
    parts = pool.tensors[name]
    bits = parts["bitmap"]
    assert bits.is_contiguous()
    begins = changes_before_rows(bits) + parts["starts"][:-1, None].to(bits.device)
    values = parts["values"].to(dtype)
    return PoolMatrix(bits, begins[..., None], None, values, first, inputs, "exact", _constants(EXACT.value))


@cache
def _packed_constants(fmt: Format, inputs: int, dtype: torch.dtype) -> dict[str, Constant]:
    name = fmt.name
    wide, narrow = (*PLANES[fmt.bits], 0)[:2]
    kind, low, high = TABLE.value, 0.0, 0.0
    if name == "fp8":
        kind = FP8.value
    elif name == "int8":
        kind = INT8.value
    elif fmt.bits == 1:
        kind, low, high = ONE_BIT.value, *fmt.levels
    elif fmt.bits == 2:
        kind, low, high = TWO_BITS.value, *fmt.levels[2:]
    # The interpreter knows no PTX.
    steps = assembly(fmt) if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1" else ()
    return _constants(kind, wide, narrow, group_size(fmt, inputs), low, high, steps)


def lanes(constants: Mapping[str, Any], inputs: int, block_k: int) -> int:
    """Bytes of the narrowest plane to load at once for steps of about `block_k` inputs; see `packed_product`."""
    unit = 256 // (constants["NARROW"] or constants["WIDE"])
    wanted = max(1, block_k // unit)
    spans = constants["GROUP"] < inputs and constants["GROUP"] % (wanted * unit) != 0
    return 32 * (1 if spans else wanted)


def _constants(
    kind: int, wide: int = 8, narrow: int = 0, group: int = 1, low: float = 0.0, high: float = 0.0,
    steps: tuple[str, ...] = (),
) -> dict[str, Constant]:  # fmt: skip
    lines = (*steps, "", "", "", "")[:4]
    return dict(zip(CONSTANTS, (kind, wide, narrow, group, low, high, *lines), strict=True))


@cache
def _levels(fmt: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(fmt.levels, dtype=dtype, device=device)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
