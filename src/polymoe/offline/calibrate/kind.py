"""How each kind of model (`polymoe.model.stock.kind`) reads calibration text, and what its stock attention is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from polymoe.errors import PlanError, PolymoeError
from polymoe.model.stock.kind import DecoderOnly, EncoderDecoder, LanguagePart, kind_of
from polymoe.offline.calibrate.pairs import pair_ids, read_pairs
from polymoe.offline.calibrate.spread import spread
from polymoe.offline.calibrate.text_tokens import TextTokenizer, read_tokens
from polymoe.offline.calibrate.token_rows import MIN_TOKENS, TokenRows
from polymoe.offline.checkpoint.checkpoint import Checkpoint

_MOST = 4096  # pairs that are tokenised
_PADDED = 2  # places for a token: rows of one batch are as long as the longest
_ENCODER_DECODER_ATTENTION = "polymoe_switch_calibration"
_SCORES = 1 << 24  # most attention scores in memory at a time


class CalibratedDecoder:
    """Reads plain text or JSON lines, cut into windows."""

    def rows(self, checkpoint: Checkpoint, paths: Sequence[Path], longest: int, window: int, most: int) -> TokenRows:
        """What `checkpoint` reads of `paths`: at most about `most` windows, evenly sampled.

        Args: `longest`: tokens of its context, as one of its parts has them. `window`: tokens.

        Raises `PlanError` for a file that cannot be read and for too few tokens.
        """
        window = min(window, longest)
        try:
            ids = read_tokens("--calibrate", paths, TextTokenizer(checkpoint.path, checkpoint.name))
        except PolymoeError as error:
            raise PlanError(str(error)) from error
        if len(ids) < max(MIN_TOKENS, window):
            raise _too_few("text", checkpoint, paths, len(ids), max(MIN_TOKENS, window))
        whole = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
        return TokenRows(whole[torch.linspace(0, len(whole) - 1, min(most, len(whole))).round().long()])

    def attention(self, model_class: Any) -> str:
        """The entry of transformers' attention registry to run `model_class` with."""
        return "sdpa" if model_class._supports_sdpa else "eager"


class CalibratedEncoderDecoder(CalibratedDecoder):
    """Reads pairs of an input and its target."""

    def rows(self, checkpoint: Checkpoint, paths: Sequence[Path], longest: int, window: int, most: int) -> TokenRows:
        """Of inputs and targets that are longer than `longest` the middle part before the last token is left out.
        Neither encoder nor decoder reads more than about as many tokens as `most` windows have."""
        try:
            tokenizer = TextTokenizer(checkpoint.path, checkpoint.name)
            pairs = [pair for path in paths for pair in read_pairs("--calibrate", path)]
            encoded = pair_ids(spread(pairs, _MOST), tokenizer.encode, checkpoint.path, checkpoint.config)
        except PolymoeError as error:
            raise PlanError(str(error)) from error
        rows = [(_cut(read, longest), _cut(target, longest)) for read, target in encoded]
        count = sum(len(target) for _, target in rows)
        if count < MIN_TOKENS:
            raise _too_few("targets", checkpoint, paths, count, MIN_TOKENS)
        width = max(len(ids) for row in rows for ids in row)
        return TokenRows.of_pairs(spread(rows, max(1, _PADDED * window * most // width)))

    def attention(self, model_class: Any) -> str:  # noqa: ARG002
        return _ENCODER_DECODER_ATTENTION


_CALIBRATED = {
    DecoderOnly: CalibratedDecoder(),
    LanguagePart: CalibratedDecoder(),
    EncoderDecoder: CalibratedEncoderDecoder(),
}


def calibrated(config: Any) -> CalibratedDecoder:
    return _CALIBRATED[type(kind_of(config))]


def _too_few(what: str, checkpoint: Checkpoint, paths: Sequence[Path], count: int, least: int) -> PlanError:
    have = "has" if what == "text" else "have"
    return PlanError(
        f"the calibration {what} for {checkpoint.name} ({', '.join(map(str, paths))}) {have} {count} tokens; at least "
        f"{least} are needed, and some 20,000 are good."
    )


def _cut(ids: list[int], longest: int) -> list[int]:
    """The first tokens and the last, which ends the text."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


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


AttentionInterface.register(_ENCODER_DECODER_ATTENTION, _attention)
AttentionMaskInterface.register(_ENCODER_DECODER_ATTENTION, eager_mask)
