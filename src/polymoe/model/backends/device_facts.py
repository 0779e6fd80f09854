"""What a GPU says about itself, and whether polymoe can run on it. Everything is checked before anything is allocated.

`DeviceFacts` is a plain record, so that each refusal is tested without a GPU.
"""

import importlib.util
from dataclasses import dataclass

import torch

from polymoe.config import format_bytes
from polymoe.errors import ConfigError

MIN_CAPABILITY = (8, 0)  # bfloat16 tensor cores and asynchronous copies, which the kernels need


def choose_device(name: str) -> torch.device:
    """`auto`: the first GPU, else the CPU. Raises `ConfigError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.version.cuda is not None and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        _check_torch()
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    return device


def _check_torch() -> None:
    """Raises `ConfigError` for a torch that cannot run on an NVIDIA GPU, or finds none."""
    if torch.version.cuda is None:
        raise ConfigError(
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch (pytorch.org says how) or "
            "use --device cpu."
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} finds no CUDA device; see whether nvidia-smi lists one, whether its driver is "
            f"new enough for CUDA {torch.version.cuda} and what CUDA_VISIBLE_DEVICES says, or use --device cpu."
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Triton is not installed and the GPU's kernels need it; pip install triton, or --device cpu.")


@dataclass(frozen=True)
class DeviceFacts:
    """One GPU as its driver describes it. Bytes; `free_bytes` is what no process has taken."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int

    @property
    def taken_bytes(self) -> int:
        """What other processes hold (and this one, before it has allocated: its context)."""
        return self.total_bytes - self.free_bytes

    def __str__(self) -> str:
        return f"{self.name} ({format_bytes(self.total_bytes)})"


def read_device_facts(device: torch.device) -> DeviceFacts:
    """Ask the driver. Raises `ConfigError` for a device number that does not exist."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there is no cuda:{index}; this machine has {torch.cuda.device_count()} CUDA device(s).")
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    return DeviceFacts(properties.name, (properties.major, properties.minor), total, free)


def check_capability(facts: DeviceFacts) -> None:
    """Raises `ConfigError` for a GPU that the kernels cannot run on."""
    if facts.capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, c)) for c in (facts.capability, MIN_CAPABILITY))
        raise ConfigError(
            f"{facts.name} has compute capability {has} and polymoe's kernels need {needs} or newer (A100, RTX 30 and "
            "later); use another GPU or --device cpu."
        )
