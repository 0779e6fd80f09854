"""One dtype for a family: tensors of a variant that was saved in another one are cast while they are read."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polymoe.errors import CheckpointError

_CHUNK = 1 << 22  # values compared at a time, so that a stack of experts does not exist a third time


@dataclass
class Rounding:
    """What casts did to the tensors read so far: target -> (values changed, values)."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of all values cast so far that the cast changed."""
        changed, values = (sum(column) for column in zip(*self.counts.values(), strict=True)) if self.counts else (0, 1)
        return changed / max(1, values)

    def cast(self, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """`stored` in `dtype`; how many values that changes is noted once. Raises `CheckpointError` for values that
        `dtype` cannot hold."""
        result = stored.to(dtype)
        if name in self.counts:
            return result
        changed = 0
        if torch.promote_types(stored.dtype, dtype) != dtype:  # else every value fits
            for start in range(0, stored.numel(), _CHUNK):
                before, after = (t.reshape(-1)[start : start + _CHUNK] for t in (stored, result))
                if bool((after.isinf() & before.isfinite()).any()):
                    raise CheckpointError(
                        f"{name} has values up to {float(before.abs().max()):.3g}, too large for {short(dtype)}, the "
                        "family's dtype; name this variant first, or one saved in bfloat16 or float32."
                    )
                changed += int((after.to(before.dtype) != before).sum())
        self.counts[name] = changed, stored.numel()
        return result


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
