"""How much memory the device that will serve has, for plans that are to fill it."""

import os
from pathlib import Path

from polymoe.config import format_bytes
from polymoe.errors import ConfigError

_SHARE = 0.9  # of the device; the rest is for activations and fragmentation
_PROCESS_BYTES = 2 << 30  # of a process on a CPU before it holds any weights, with room for others
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_budget(device: str, reserved: int) -> str:
    """`--memory` for all weights on `device` ("auto", "cpu", "cuda", "cuda:N") beside `reserved` bytes of caches.

    It depends on what the device has, not on what is free now, so that the same command finds its bundle again.
    Raises `ConfigError` when nothing is left.
    """
    import torch  # here, since it takes a second to load

    if device == "cuda" or device.startswith("cuda:") or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: there is no CUDA device; use --device cpu.")
        index = int(device.partition(":")[2] or 0)
        total = torch.cuda.get_device_properties(index).total_memory
    else:
        total = cpu_memory() - _PROCESS_BYTES
    budget = int(total * _SHARE) - reserved
    if budget <= 0:
        raise ConfigError(
            f"the device has {format_bytes(max(total, 0))} for weights, keys and values, and the caches alone take "
            f"{format_bytes(reserved)}; give smaller --kv-cache and --expert-cache, or a budget with --memory."
        )
    return str(budget)


def cpu_memory() -> int:
    """Bytes of RAM, or of the container's limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.exists() else "max"
        found += [int(text)] if text.isdigit() else []
    return min(found)
