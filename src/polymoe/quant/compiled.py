"""Weights into packed codes and scales, in one call of the compiled kernel (encode.cpp) where it applies."""

import torch

from polymoe.native.library import cpu_kernels, kernel_threads
from polymoe.quant.format import SCALE_DTYPE, Format, group_size, num_groups, row_bytes


def fast_encode(
    weight: torch.Tensor, fmt: Format, levels: torch.Tensor, search: torch.Tensor, limit: float, resolution: int
) -> dict[str, torch.Tensor] | None:
    """One matrix as `polymoe.quant.codec.encode` packs it without a second moment.

    Args:
        weight: float32 `[O, I]` on the CPU.
        levels: float32 `[2^bits]`. search: int32, the code of the nearest level for each step of `1 / resolution` from
            `-limit` to `limit`; neither is looked at for 8 bits.

    Returns: {"codes": uint8 `[O, bytes of a row]`, "scales": bfloat16 `[O, groups]`}, or None where there is no kernel.
        Sums are taken in another order than torch's, so that a scale may be rounded to its other neighbour.
    """
    kernels = cpu_kernels()
    if kernels is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    weight, levels, search = weight.contiguous(), levels.contiguous(), search.contiguous()
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, row_bytes(fmt, inputs), dtype=torch.uint8)
    scales = torch.empty(outputs, num_groups(fmt, inputs), dtype=SCALE_DTYPE)
    kernels.polymoe_encode_f32(
        weight.data_ptr(), outputs, inputs, group_size(fmt, inputs), fmt.bits, levels.data_ptr(), search.data_ptr(),
        limit, float(resolution), codes.data_ptr(), codes.shape[1], scales.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return {"codes": codes, "scales": scales}
