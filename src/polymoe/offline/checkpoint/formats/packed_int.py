"""AWQ and GPTQ: integers packed into `X.qweight`, with `X.scales` and `X.qzeros` of groups of inputs.

weight[in, out] = (q − zero of its group) · scale of its group, in float32, rounded once; stored models hold [out, in].
The two differ in what is packed along which axis:

    AWQ (gemm)  qweight int32 [in, out/8], 4 bits, outputs in the order 0 2 4 6 1 3 5 7; groups follow each other
    GPTQ        qweight int32 [in/n, out], n = 32/bits; g_idx [in] is an input's group; zeros are stored less 1

The formulas are those of AutoAWQ (`dequantize_gemm`) and of GPTQModel, whose package needs CUDA to be installed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polymoe.errors import CheckpointError, UnsupportedModelError
from polymoe.offline.checkpoint.formats.decoded import Decoded
from polymoe.offline.checkpoint.source_tensor import Load, SourceTensor, TensorFiles

_AWQ_BITS, _AWQ_ORDER = 4, (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each output within its int32
_ONE_LESS = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits -> a one in each place of an int32

# (in, out) and what reads the integers and zeros of a module: load -> q [in, out], zeros [groups, out], group of each
# input [in] (None: groups follow each other)
_Integers = Callable[[Load], tuple[Tensor, Tensor, Tensor | None]]


def read_awq(settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype) -> Decoded:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if version != "gemm" or settings.get("bits", _AWQ_BITS) != _AWQ_BITS:
        raise UnsupportedModelError(
            f"its AWQ weights are of {settings.get('bits')} bits in the layout {version}; only 4 bits in the layout "
            "gemm are read. Give the original in 16 or 32 bits, or an AWQ checkpoint of that layout."
        )
    found = Decoded()
    for module in _modules(files):
        qweight, qzeros, scales = (f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
        inputs, columns = files.entries[qweight].shape
        outputs = columns * 32 // _AWQ_BITS
        groups = files.entries[scales].shape[0]
        if inputs % max(groups, 1) or files.entries[qzeros].shape != (groups, columns):
            raise _misfit(files, qweight, qzeros, scales)

        def integers(load: Load, qweight: str = qweight, qzeros: str = qzeros) -> tuple[Tensor, Tensor, None]:
            return _unpack_awq(load(qweight)), _unpack_awq(load(qzeros)), None

        found.tensors[f"{module}.weight"] = _weight(
            (qweight, qzeros, scales), (inputs, outputs), integers, files, dtype
        )
    return found


def read_gptq(settings: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype) -> Decoded:
    layout, bits = str(settings.get("checkpoint_format", "gptq")), settings.get("bits")
    if layout not in ("gptq", "gptq_v2") or bits not in _ONE_LESS or settings.get("dynamic"):
        kind = f"{bits} bits in the layout {layout}" + (
            " with modules of their own bits" * bool(settings.get("dynamic"))
        )
        raise UnsupportedModelError(
            f"its GPTQ weights are of {kind}; 2, 4 and 8 bits in the layouts gptq and gptq_v2 are read. Give the "
            "original in 16 or 32 bits, or a GPTQ checkpoint of such a layout."
        )
    one_less = _ONE_LESS[bits] if layout == "gptq" else 0
    found = Decoded()
    for module in _modules(files):
        qweight, qzeros, scales, g_idx = (f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))
        rows, outputs = files.entries[qweight].shape
        inputs, groups = rows * 32 // bits, files.entries[scales].shape[0]
        ordered = g_idx in files.entries
        if files.entries[qzeros].shape != (groups, outputs * bits // 32) or (
            files.entries[g_idx].shape != (inputs,) if ordered else inputs % max(groups, 1)
        ):
            raise _misfit(files, qweight, qzeros, scales)

        def integers(
            load: Load, names: tuple[str, str] = (qweight, qzeros), group: str | None = g_idx if ordered else None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            weight, zeros = load(names[0]), load(names[1])
            zeros = (zeros.long() + one_less).to(torch.int32)  # with a carry from place to place, as GPTQModel does it
            return _unpack(weight.T, bits).T, _unpack(zeros, bits), None if group is None else load(group).long()

        parts = (qweight, qzeros, scales, *([g_idx] if ordered else []))
        found.tensors[f"{module}.weight"] = _weight(parts, (inputs, outputs), integers, files, dtype)
    return found


def _modules(files: TensorFiles) -> list[str]:
    """Paths of the modules that are packed. Raises `CheckpointError` for one with a part missing."""
    entries, found = files.entries, []
    for name in entries:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("qweight", "qzeros", "scales") or f"{module}.weight" in entries:
            continue
        for other in ("qweight", "qzeros", "scales"):
            if f"{module}.{other}" not in entries:
                raise CheckpointError(
                    f"{name} is stored without {module}.{other}; is a shard missing? Download it again."
                )
        if leaf == "qweight":
            found.append(module)
    return found


def _weight(
    parts: tuple[str, ...], shape: tuple[int, int], integers: _Integers, files: TensorFiles, dtype: torch.dtype
) -> SourceTensor:
    qweight, qzeros, scales = parts[:3]
    inputs, outputs = shape
    if files.entries[scales].shape[-1] != outputs:
        raise _misfit(files, qweight, qzeros, scales)

    def make(load: Load) -> Tensor:
        weight, zeros, group = integers(load)
        factor = load(scales).float()
        if group is None:
            group = torch.arange(inputs) // (inputs // len(factor))
        return ((weight - zeros[group]) * factor[group]).T.to(dtype).contiguous()

    return SourceTensor((outputs, inputs), dtype, "packed integers", parts, make)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns] -> int32 [rows, columns · 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (1 << bits) - 1).flatten(-2)


def _unpack_awq(packed: Tensor) -> Tensor:
    values = _unpack(packed, _AWQ_BITS)
    return values.reshape(len(values), -1, len(_AWQ_ORDER))[..., list(_AWQ_ORDER)].flatten(-2)


def _misfit(files: TensorFiles, *names: str) -> CheckpointError:
    shapes = ", ".join(f"{name} of shape {list(files.entries[name].shape)}" for name in names)
    return CheckpointError(f"{shapes} do not fit each other. Do config.json and the weights belong together?")
