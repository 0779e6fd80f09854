"""The task of a variant of an encoder–decoder family: some of a file's pairs of an input and its target."""

import random
from pathlib import Path

from polymoe.errors import PolymoeError
from polymoe.offline.pairs import Pair as Pair
from polymoe.offline.pairs import read_pairs

MIN_PAIRS = 20  # fewer say nothing


def draw_pairs(name: str, path: Path, limit: int, seed: int) -> list[Pair]:
    """At most `limit` pairs of a file of `{"input": …, "target": …}` a line, drawn without replacement, in the file's
    order. Blank lines are left out.

    Args:
        name: the variant, for messages.

    Raises `PolymoeError` naming file and line for one that is no pair, and for fewer than `MIN_PAIRS` of them.
    """
    pairs = read_pairs(f"--task {name}", path)
    if len(pairs) < MIN_PAIRS:
        raise PolymoeError(
            f"--task {name}: {path} has {len(pairs)} pairs; at least {MIN_PAIRS} are needed, and 200 are good."
        )
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), min(limit, len(pairs))))
    return [pairs[i] for i in chosen]
