"""Which backend computes a model: decided once, when it is loaded."""

from collections.abc import Callable

import torch

from polymoe.kernels.cpu.tiles import ACTIVATIONS, Activations
from polymoe.model.backends.base import Backend
from polymoe.model.backends.cpu import CpuBackend
from polymoe.model.backends.cuda import CudaBackend
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.native.library import cpu_kernels

# Bytes of bases and deltas over one model's expert parameters, up to which fewer bits of activations cost less than
# about a tenth of what the plan itself costs (docs/quality.md has the figures).
_INT8_UP_TO, _MIXED_UP_TO = 1.3, 2.2

# What makes a backend for a model on this device, of this dtype, with packed experts' activations so; None: not here.
Maker = Callable[[torch.device, torch.dtype, Activations], Backend | None]
_makers: list[Maker] = []


def register(maker: Maker) -> Maker:
    """Have `maker` asked before the package's own backends, by every model that is loaded from now on.

    The one that was registered last is asked first. Returns `maker`, so that it can be a decorator.
    """
    _makers.insert(0, maker)
    return maker


def unregister(maker: Maker) -> None:
    """Have it asked no more. Raises `ValueError` where it was not registered."""
    _makers.remove(maker)


def choose_activations(asked: str, bytes_per_parameter: float) -> Activations:
    """asked: "auto" or a name of `ACTIVATIONS`. bytes_per_parameter: of the bundle's bases and deltas."""
    if asked != "auto":
        return ACTIVATIONS[asked]
    fewest = "int8" if bytes_per_parameter <= _INT8_UP_TO else "mixed"
    return ACTIVATIONS[fewest if bytes_per_parameter <= _MIXED_UP_TO else "int16"]


def choose_backend(
    device: torch.device, dtype: torch.dtype, activations: Activations = ACTIVATIONS["int16"]
) -> Backend:
    """What was registered from outside, else a GPU's kernels on a GPU, the compiled ones on a CPU that has them, else
    torch. dtype: of the model."""
    for maker in _makers:
        if (backend := maker(device, dtype, activations)) is not None:
            return backend
    if device.type == "cuda":
        return CudaBackend()
    return ReferenceBackend() if cpu_kernels() is None else CpuBackend(dtype, activations)
