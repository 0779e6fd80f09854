"""What a stock model asks of its attention mask, in a trial run that makes none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.errors import UnsupportedModelError
from polymoe.model.per_variant.spec import MaskFunction


@dataclass(frozen=True)
class AskedMask:
    """Stands for the mask of a layer: a token sees the last `window` tokens, itself included; None: all."""

    window: int | None
    length: int  # up to which this was looked at
    function: MaskFunction
    is_window: bool  # whether it is causal, full or over a sliding window

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModelError("it computes with its attention mask, which paged attention never makes.")

    def __getitem__(self, index: object) -> Any:
        return self.__getattr__("")


def ask_mask(*, mask_function: Callable[..., Any], config: Any, **_: Any) -> AskedMask:
    """The function registered with transformers' mask registry: look at some rows of the mask instead of making it."""
    length = min(getattr(config, "max_position_embeddings", None) or 1 << 17, 1 << 24)
    keys = torch.arange(length)
    window = length
    for query in (length - 1, length - 1 - length // 3, length // 2):
        visible = torch.as_tensor(mask_function(0, 0, torch.tensor(query), keys)).expand(length)
        if query == length - 1:
            window = int(visible.sum())
        if not torch.equal(visible, (keys <= query) & (keys > query - window)):
            return AskedMask(None, length, mask_function, is_window=False)
    return AskedMask(window if window < length else None, length, mask_function, is_window=True)
