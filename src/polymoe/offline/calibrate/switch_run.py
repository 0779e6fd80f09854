"""The stock Switch Transformers as `FamilyRun` runs them: whole rows of text, stopped where experts would compute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from polymoe.offline.calibrate.token_rows import TokenRows
from polymoe.offline.checkpoint.architecture import build_on_meta

_ATTENTION = "polymoe_switch_calibration"
_SCORES = 1 << 24  # most attention scores in memory at a time

# (experts module, bool [T] real tokens, hidden [T, H], index [T, 1], gate [T, 1]) -> [T, H]
Stop = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def in_encoder(expert_module: str) -> bool:
    """Whether an experts module of this path sees the encoder's tokens; of a decoder-only model none does."""
    return expert_module.startswith("encoder.")


def stopping_switch_model(config: Any, expert_modules: Sequence[str], text: TokenRows, stop: Stop) -> Any:
    """The stock model on the meta device that calls `stop` in place of experts, for a pass over `text`."""
    model = build_on_meta(config).eval()
    model.set_attn_implementation(_ATTENTION)
    for path in expert_modules:
        model.get_submodule(path).polymoe_experts = _Stopping(stop, text.real(in_encoder(path)).flatten())
    for module in model.decoder.modules():
        if hasattr(module, "expert_capacity"):
            # It counts the tokens of one call, and `generate`, which is what is served, feeds the decoder one.
            module.expert_capacity = sys.maxsize
    return model


@dataclass(frozen=True, eq=False)
class _Stopping:
    """Stands where the expert pool stands in a served model. `real` bool [T]."""

    stop: Stop
    real: Tensor

    def forward(self, module: Any, hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """`gate [T, 1]` is 0 for tokens beyond their expert's capacity, which no expert sees."""
        return self.stop(module, self.real, hidden, index.masked_fill(gate == 0, -1), gate)


def _attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
    position_bias: Tensor, scaling: float, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`query [n, H, q, D]`, `key, value [n, H, k, D]`, `mask [n, 1, 1 or q, k]` and `position_bias [1, H, q, k]` to be
    added to the scores -> `[n, q, H, D]`. A few rows at a time."""
    rows = max(1, _SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    out = []
    for first in range(0, len(query), rows):
        some = slice(first, first + rows)
        bias = position_bias if mask is None else position_bias + mask[some]
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[some], key[some], value[some], attn_mask=bias, scale=scaling
            )
        )
    return torch.cat(out).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, eager_mask)
