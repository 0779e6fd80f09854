"""The constants of `TierCosts`, measured on the machine at hand in less than a second."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from polymoe.model.experts.tier_cost import TierCosts

_BYTES = 64 << 20
_MANY_ROWS = 64
_REPEATS = 3


def measure_tier_costs(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> TierCosts:
    """Between the host and `device`.

    Args:
        dtype: of the computation on the host.
        shapes: [out, in] of an expert's matrices; biases are left out.
    """
    cuda = device.type == "cuda"

    def seconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(_REPEATS):
            if cuda:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times)

    host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    latency = seconds(lambda: target[:64].copy_(host[:64], non_blocking=True))
    bus = seconds(lambda: target.copy_(host, non_blocking=True))
    row = torch.zeros(1, max(shape[-1] for shape in shapes), dtype=dtype, device=device)
    exchange = seconds(lambda: row.cpu().to(device))
    weights = [torch.zeros(shape, dtype=dtype) for shape in shapes if len(shape) == 2]
    size = sum(math.prod(weight.shape) for weight in weights)

    def multiply(rows: int) -> float:
        inputs = [torch.zeros(rows, weight.shape[1], dtype=dtype) for weight in weights]
        return seconds(lambda: [torch.nn.functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)])

    few, many = multiply(1), multiply(_MANY_ROWS)
    return TierCosts(
        bus_bytes_per_s=_BYTES / max(bus - latency, 1e-9),
        bus_latency_s=latency,
        host_bytes_per_s=size * dtype.itemsize / few,
        host_flops=2 * _MANY_ROWS * size / many,
        exchange_s=exchange,
        mapped_bytes_per_s=_mapped_bytes_per_s(weights[0], device, seconds),
    )


def _mapped_bytes_per_s(
    weight: torch.Tensor, device: torch.device, seconds: Callable[[Callable[[], object]], float]
) -> float:
    """Of a kernel that reads `weight [O, I]` from the host."""
    from polymoe.kernels.gpu.segmented_linear import segmented_linear  # Triton, which not every torch brings

    stack = weight[None].pin_memory() if device.type == "cuda" else weight[None]
    row = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=device)
    only = torch.zeros(1, dtype=torch.int32, device=device)
    start_loc = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return weight.nbytes / seconds(lambda: segmented_linear(row, stack, None, only, start_loc))
