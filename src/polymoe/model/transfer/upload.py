"""Small arrays of the host to the device without waiting for it."""

from typing import Any

import torch


def upload(array: Any, device: torch.device) -> torch.Tensor:
    """A numpy array, list or CPU tensor on `device`. To a GPU the copy goes through pinned memory and nobody waits."""
    tensor = torch.as_tensor(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
