"""Which backend computes a model: decided once, when it is loaded."""

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


def choose_activations(asked: str, bytes_per_parameter: float) -> Activations:
    """asked: "auto" or a name of `ACTIVATIONS`. bytes_per_parameter: of the bundle's bases and deltas."""
    if asked != "auto":
        return ACTIVATIONS[asked]
    fewest = "int8" if bytes_per_parameter <= _INT8_UP_TO else "mixed"
    return ACTIVATIONS[fewest if bytes_per_parameter <= _MIXED_UP_TO else "int16"]


def choose_backend(
    device: torch.device, dtype: torch.dtype, activations: Activations = ACTIVATIONS["int16"]
) -> Backend:
    """A GPU's kernels on a GPU, the compiled ones on a CPU that has them, else torch. dtype: of the model."""
    if device.type == "cuda":
        return CudaBackend()
    return ReferenceBackend() if cpu_kernels() is None else CpuBackend(dtype, activations)
