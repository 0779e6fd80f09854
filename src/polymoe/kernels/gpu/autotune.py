"""Which block sizes a kernel runs with, per shape: timed once on the GPU at hand, then read from a file.

The file is `gpu-kernels.json` in the cache (`polymoe.cache_folder`): {"device, triton version":
{"kernel and shape": index of the candidate}}. Nothing is timed while a CUDA graph is captured, nor in the interpreter:
there the first candidate is used, which fits every supported GPU; `POLYMOE_NO_AUTOTUNE=1` means the same everywhere (a
kernel takes seconds to compile, for each candidate the first time). So run each shape once before capturing.
"""

import contextlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor

from polymoe.cache_folder import cache_root

logger = logging.getLogger(__name__)

_REPEATS = 5  # timings of a candidate; the median counts
_FLUSHES = 4  # passes over scratch memory before each, see `_time`
_TYPICAL_KEYS = 1024
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Config:
    """Columns of a tile, inputs of one step, and the launch options."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose(
    kind: str, shape: Sequence[object], candidates: Sequence[Candidate], launch: Callable[[Candidate], None]
) -> Candidate:
    """The fastest of `candidates`, configurations of a kernel or whole kernels, for a shape.

    Args:
        kind, shape: what is remembered; a shape should hold a bucket of the number of rows, not the number.
        candidates: the first is used where nothing can be timed. Give the same ones for the same kind and shape.
        launch: runs the kernel on the current stream; must give the same when run again.
    """
    if not torch.cuda.is_available() or len(candidates) == 1 or os.environ.get("POLYMOE_NO_AUTOTUNE"):
        return candidates[0]
    device = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
    known = _known(device)
    key = " ".join(str(part) for part in (kind, *shape, f"of {len(candidates)}"))
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [_time(launch, candidate) for candidate in candidates]
        if min(times) == float("inf"):
            launch(candidates[0])  # raises what is wrong with it
        known[key] = times.index(min(times))
        _save(device, known)
    return candidates[known[key]]


def row_bucket(num_rows: int) -> int:
    """The next power of two: the number of rows as far as a choice depends on it."""
    return 1 << max(0, num_rows - 1).bit_length()


def typical_decode(key: Tensor, block_table: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """A block table and lengths to time decode with, shaped like those given.

    What is run before the first request has one token a sequence, and a table of which no more may be read.

    Args: `key`: the cache `[blocks, block_size, …]`. The others as in `paged_attention`.
    """
    keys = min(_TYPICAL_KEYS, block_table.shape[1] * key.shape[1])
    blocks = torch.arange(block_table.numel(), device=key.device, dtype=block_table.dtype) % key.shape[0]
    return blocks.view(block_table.shape), torch.full_like(seq_lens, keys)


def _time(launch: Callable[[Candidate], None], candidate: Candidate) -> float:
    """Median milliseconds on the device; infinite where the kernel does not fit it, or cannot be compiled for it.

    Scratch memory is written before each timing. That takes the device longer than a launch takes the host, so the
    host's time is not measured, and clears the L2 cache, in which a step would not find its weights either.
    """
    try:
        launch(candidate)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    except Exception as problem:  # of a compiler: there are other candidates
        logger.warning("a configuration is left out: %s: %s", candidate, " ".join(str(problem).split())[:300])
        return float("inf")
    nbytes = 2 * torch.cuda.get_device_properties().L2_cache_size
    scratch = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(_FLUSHES):
            scratch.zero_()
        start.record()
        launch(candidate)
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)))
    return statistics.median(times)


def _path() -> Path:
    return cache_root() / "gpu-kernels.json"


@cache
def _known(device: str) -> dict[str, int]:
    return _read().get(device, {})


def _read() -> dict[str, dict[str, int]]:
    """The whole file; nothing where there is none or it is damaged: it is only a cache."""
    try:
        found: dict[str, dict[str, int]] = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return found


def _save(device: str, known: dict[str, int]) -> None:
    """Written beside and renamed; a home that cannot be written costs the next process the same timings, no more."""
    with contextlib.suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump({**_read(), device: known}, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
