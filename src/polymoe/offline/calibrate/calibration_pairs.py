"""Calibration text of an encoder–decoder variant: pairs of an input and its target, as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polymoe.errors import PlanError, PolymoeError
from polymoe.offline.calibrate.pairs import pair_ids, read_pairs
from polymoe.offline.calibrate.spread import spread
from polymoe.offline.calibrate.text_tokens import TextTokenizer
from polymoe.offline.calibrate.token_rows import MIN_TOKENS, TokenRows

if TYPE_CHECKING:
    from polymoe.offline.checkpoint.checkpoint import Checkpoint

_MOST = 4096  # pairs that are tokenised
_PADDED = 2  # positions for a token: rows of one batch are as long as the longest


def pair_rows(checkpoint: Checkpoint, paths: Sequence[Path], longest: int, max_tokens: int) -> TokenRows:
    """The pairs of `paths`, evenly sampled so that neither encoder nor decoder reads more than about `max_tokens`.

    Args:
        longest: tokens of an input, and of a target; of those that are longer the middle part before the last token
            is left out.

    Raises `PlanError` for a file that cannot be read or holds anything but pairs, and for too few tokens.
    """
    try:
        tokenizer = TextTokenizer(checkpoint.path, checkpoint.name)
        pairs = [pair for path in paths for pair in read_pairs("--calibrate", path)]
        encoded = pair_ids(spread(pairs, _MOST), tokenizer.encode, checkpoint.path, checkpoint.config)
    except PolymoeError as error:
        raise PlanError(str(error)) from error
    rows = [(_cut(read, longest), _cut(window, longest)) for read, window in encoded]
    count = sum(len(window) for _, window in rows)
    if count < MIN_TOKENS:
        raise PlanError(
            f"the calibration targets for {checkpoint.name} ({', '.join(map(str, paths))}) have {count} tokens; at "
            f"least {MIN_TOKENS} are needed, and some 20,000 are good."
        )
    width = max(len(ids) for row in rows for ids in row)
    return TokenRows.of_pairs(spread(rows, max(1, _PADDED * max_tokens // width)))


def _cut(ids: list[int], longest: int) -> list[int]:
    """The first tokens and the last, which ends the text."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]
