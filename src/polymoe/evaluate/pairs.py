"""Pairs of an input and its target as token ids: what an encoder–decoder variant is measured on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import Samples
from polymoe.offline.calibrate.pairs import Pair, pair_ids
from polymoe.text.tokenizer import VariantTokenizer


def encode_pairs(option: str, pairs: Sequence[Pair], folder: Path, config: Any, limit: int) -> Samples:
    """Token ids as the variant's own tokenizer and configs make them.

    Args:
        option: where the pairs were given, for messages.
        folder: of the variant's tokenizer and generation config. config: of its model.
        limit: most tokens of an input, and of a target with its start.

    Raises `PolymoeError` for a pair beyond the limit, and as `pair_ids`.
    """
    windows, inputs = [], []
    encoded = pair_ids(pairs, VariantTokenizer(folder).encode, folder, config)
    for pair, (read, window) in zip(pairs, encoded, strict=True):
        for what, text, ids in (("input", pair.input, read), ("target", pair.target, window)):
            if len(ids) > limit:
                raise PolymoeError(
                    f"{option}: the {what} {text[:40]!r} … has {len(ids)} tokens; {folder} takes {limit} at most."
                )
        inputs.append(read)
        windows.append(window)
    return Samples(windows, inputs)
