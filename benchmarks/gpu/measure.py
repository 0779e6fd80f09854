"""What the hardware reaches by itself: the limits that the engine's figures are shares of."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """Measured on the device at hand. Bytes a second and floating-point operations a second."""

    memory_bytes_per_s: float
    bus_bytes_per_s: float  # pinned host memory to the device
    matmul_flops: float  # dense, in the dtype of the models


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Of several runs the shortest, by the device's clock where it has one."""
    work()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - started)
    return best


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """All three; nothing stays allocated."""
    limits = _measure(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return limits


def _measure(device: torch.device, dtype: torch.dtype) -> Limits:
    large = device.type == "cuda"
    array = torch.ones((4 << 30 if large else 64 << 20) // 4, device=device)
    other = torch.empty_like(array[: len(array) // 2])
    reads = [lambda: torch.sum(array), lambda: torch.amax(array)]
    memory = array.nbytes / min(best_seconds(device, read, 10) for read in reads)
    memory = max(memory, 2 * other.nbytes / best_seconds(device, lambda: other.copy_(array[: len(other)]), 10))
    host = torch.ones((1 << 30 if large else 16 << 20), dtype=torch.uint8, pin_memory=large)
    target = torch.empty_like(host, device=device)
    bus = host.nbytes / best_seconds(device, lambda: target.copy_(host, non_blocking=True), 5)
    size = 8192 if large else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / best_seconds(device, lambda: a @ b, 20)
    return Limits(memory, bus, flops)
