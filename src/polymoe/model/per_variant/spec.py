"""What a trial run learned of a module that runs once for each variant of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MaskFunction = Callable[[int, int, torch.Tensor, torch.Tensor], Any]  # (batch, head, query, key positions) -> visible


@dataclass(frozen=True)
class TokenAxes:
    """Where the tokens of a tensor are: in a pass `[…, 1, …, T, …]`, in a call of the module `[…, B, …, L, …]`.

    batch None: there is no axis of one, and the tensor is `[T, …]` or `[B * L, …]`.
    """

    batch: int | None
    tokens: int

    @classmethod
    def of(cls, x: torch.Tensor, num_tokens: int) -> "TokenAxes | None":
        """`num_tokens` must be the size of no other axis. A tensor of tokens by tokens is none of tokens."""
        if x.shape.count(num_tokens) != 1:
            return None
        tokens = x.shape.index(num_tokens)
        return cls(next((axis for axis in range(tokens) if x.shape[axis] == 1), None), tokens)

    def pick(self, x: torch.Tensor, rows: "slice | torch.Tensor", shape: tuple[int, int]) -> torch.Tensor:
        """The given rows of the tensor of a pass, as a call of `shape = (B, L)` takes them."""
        if isinstance(rows, slice):
            picked = x.narrow(self.tokens, rows.start, rows.stop - rows.start)
        else:
            picked = x.index_select(self.tokens, rows)
        if self.batch is None:
            return picked
        apart = torch.unflatten(picked, self.tokens, shape).squeeze(self.batch)  # B now stands before the tokens' axis
        return apart.movedim(self.tokens - 1, self.batch)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """The other way: what a call returned, as rows of a pass."""
        if self.batch is None:
            return x
        return x.movedim(self.batch, self.tokens - 1).flatten(self.tokens - 1, self.tokens).unsqueeze(self.batch)


@dataclass(frozen=True)
class StateSize:
    """What one sequence of one module keeps: `fixed` bytes, and `per_token` numbers for each of its tokens."""

    fixed: int = 0
    per_token: int = 0


@dataclass(frozen=True, eq=False)
class PerVariantSpec:
    """How one module is called. Arguments and results are counted as `torch.utils._pytree` flattens them."""

    cache_argument: str | None  # the name under which it takes transformers' cache, if it does
    inputs: Mapping[int, TokenAxes]
    masks: Mapping[int, MaskFunction]  # arguments that are attention masks
    outputs: Mapping[int, TokenAxes]
    state: StateSize
    one_by_one: bool  # whether it forgets what was before when it is given several tokens
    joint: bool = False  # whether one call serves sequences of several variants that decode, with stacks for weights

    @property
    def together(self) -> bool:
        """Whether sequences of different lengths can be one call: what they keep has the same size."""
        return not self.state.per_token and not self.masks
