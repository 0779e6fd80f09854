"""Copies beside the engine's steps, in small pieces: a long one would hold the memory's bandwidth, or the lock of the
interpreter, for longer than a step has."""

import time

import torch

_PIECE_BYTES = 4 << 20


def copy_in_pieces(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `target`; rows (axis 0) that it lacks at the end become zero."""
    if source.ndim == 0:
        target.copy_(source)
        return
    if source.shape[0] < target.shape[0]:
        target[source.shape[0] :].zero_()
    row = max(1, target[0].numel() * target.element_size()) if len(target) else 1
    step = max(1, _PIECE_BYTES // row)
    for start in range(0, source.shape[0], step):
        target[start : start + step].copy_(source[start : start + step])
        time.sleep(0)


def copied(source: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous copy on the device, in `dtype` or as stored."""
    target = torch.empty(source.shape, dtype=dtype or source.dtype, device=device)
    copy_in_pieces(target, source)
    return target
