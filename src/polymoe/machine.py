"""What the machine tells of itself, and a process's share of it. Linux; elsewhere the answers are None."""

import contextlib
import ctypes
import importlib.metadata
import itertools
import mmap
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """What a reader of a figure must know."""
    import torch

    cpu = _field(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": len(available_cores()),
        "memory_bytes": total_memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "polymoe")},
    }


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def total_memory() -> int | None:
    """Bytes of memory that the machine has."""
    found = _field(Path("/proc/meminfo"), r"MemTotal:\s*(\d+) kB")
    return None if found is None else int(found) * 1024


def available_memory() -> int | None:
    """Bytes that processes can still take without swapping."""
    found = _field(Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB")
    return None if found is None else int(found) * 1024


def peak_rss(pid: int) -> int | None:
    """Most resident bytes that a process ever had; pages of mapped files count."""
    found = _field(Path(f"/proc/{pid}/status"), r"VmHWM:\s*(\d+) kB")
    return None if found is None else int(found) * 1024


def drop_mapped_pages(folder: Path) -> None:
    """Let go of this process's pages of memory-mapped files below `folder`, which must be mapped to be read only. They
    stay in the page cache, and who looks at one again has it again."""
    try:
        mappings = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    for line in mappings:
        span, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/"):
            start, end = (int(address, 16) for address in span.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))


def split_cores(cores: Sequence[int], parts: int) -> list[list[int]]:
    """Cores of each of `parts`, neighbours together; with fewer cores than parts some share one."""
    if len(cores) < parts:
        return [[cores[i % len(cores)]] for i in range(parts)]
    bounds = [i * len(cores) // parts for i in range(parts + 1)]
    return [list(cores[a:b]) for a, b in itertools.pairwise(bounds)]


@contextlib.contextmanager
def only_on(cores: Sequence[int]) -> Iterator[None]:
    """Run this thread on `cores` only; a process started meanwhile, with all its threads, stays there."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _field(path: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, path.read_text())
    except OSError:
        return None
    return None if match is None else match[1].strip()
