"""What a stock module makes of what its parts return: tried with others in the place of its parts, which keep what they
are given."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.errors import UnsupportedModelError


@dataclass(frozen=True)
class Call:
    """Of the part at `path`."""

    path: str
    given: tuple[Any, ...]
    named: dict[str, Any]


class _Recorder(torch.nn.Module):
    """In the place of the part at `path`: adds to `calls`, returns `out`."""

    def __init__(self, path: str, calls: list[Call], out: Any) -> None:
        super().__init__()
        self.path, self.calls, self.out = path, calls, out

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls.append(Call(self.path, given, named))
        return self.out


def recorded(
    module: torch.nn.Module, returned: Mapping[str, Any], *given: Any, **named: Any
) -> tuple[Any, list[Call]] | None:
    """What `module` returns where its parts at these paths return this, and what they were called with, in order; None
    if it fails. The module itself is left as it is."""
    calls: list[Call] = []
    trial = _with_parts(module, {path: _Recorder(path, calls, out) for path, out in returned.items()})
    try:
        return trial(*given, **named), calls
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, UnsupportedModelError):
        return None


def _with_parts(module: torch.nn.Module, parts: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name in {path.partition(".")[0] for path in parts}:
        if name in parts:
            copied._modules[name] = parts[name]
        else:
            child = module._modules[name]
            assert child is not None
            below = {path.partition(".")[2]: part for path, part in parts.items() if path.startswith(f"{name}.")}
            copied._modules[name] = _with_parts(child, below)
    return copied


def random_bf16(*shape: int) -> torch.Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def equal(found: Any, wanted: torch.Tensor) -> bool:
    """Whether it is such a tensor, bit for bit."""
    return isinstance(found, torch.Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
