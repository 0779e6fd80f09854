"""Which backend computes a model: decided once, when it is loaded."""

import torch

from polymoe.model.backends.base import Backend
from polymoe.model.backends.cpu import CpuBackend
from polymoe.model.backends.cuda import CudaBackend
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.native.library import cpu_kernels


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """A GPU's kernels on a GPU, the compiled ones on a CPU that has them, else torch. dtype: of the model."""
    if device.type == "cuda":
        return CudaBackend()
    return ReferenceBackend() if cpu_kernels() is None else CpuBackend(dtype)
