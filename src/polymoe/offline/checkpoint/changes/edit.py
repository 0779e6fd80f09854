"""What a change does to one tensor of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """`apply(tensor)` returns the changed one, of the same shape and dtype, and leaves `tensor` as it was.

    `path` is the file it comes from; `shape`: what it expects to change.
    """

    path: str
    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
