"""Pairs of an input and its target from JSON lines: what an encoder–decoder variant is fitted to and measured on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from polymoe.errors import PolymoeError
from polymoe.offline.calibrate.text_files import read_lines

_WANTED = 'write {"input": "…", "target": "…"} on every line, both texts with something in them'


@dataclass(frozen=True)
class Pair:
    input: str
    target: str


def read_pairs(option: str, path: Path) -> list[Pair]:
    """The pairs of a file, in its order, of a large one some; blank lines are left out.

    Args:
        option: where the file was given, for messages.

    Raises `PolymoeError` naming file and line for one that is no pair, and for a file that cannot be read or has none.
    """
    pairs = [_pair(line.where, line.text) for line in read_lines(option, path)]
    if not pairs:
        raise PolymoeError(f"{option}: {path} has no pairs; {_WANTED}.")
    return pairs


def _pair(where: str, line: str) -> Pair:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PolymoeError(f"{where} is not JSON ({error}); {_WANTED}.") from error
    if not isinstance(found, dict):
        raise PolymoeError(f"{where} is not an object; {_WANTED}.")
    for key in ("input", "target"):
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise PolymoeError(f"{where} has no text {key!r}; {_WANTED}.")
    return Pair(found["input"], found["target"])


def pair_ids(
    pairs: Sequence[Pair], encode: Callable[[str], Sequence[int]], folder: Path, config: Any
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each pair, as the variant's own tokenizer and configs make them: (input, target).

        |-- input --|     start | target … end
        the encoder's     the decoder's; every token after the first is predicted

    Args:
        encode: the tokenizer, with its special tokens.
        folder: of the variant's generation config. config: of its model.

    Raises `PolymoeError` for a model that says neither start nor end of a text.
    """
    has_own = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if has_own else config
    start = _first("decoder_start_token_id", generation, config)
    ends = _first("eos_token_id", generation, config)
    if start is None or ends is None:
        raise PolymoeError(f"{folder}: config.json needs decoder_start_token_id and eos_token_id to read pairs.")
    ends = ends if isinstance(ends, list) else [ends]
    found = []
    for pair in pairs:
        target = list(encode(pair.target))
        if not target or target[-1] not in ends:
            target.append(ends[0])
        found.append((list(encode(pair.input)), [int(start), *target]))
    return found


def _first(field: str, *configs: Any) -> Any:
    """The field in the first of `configs` that has it."""
    return next((value for config in configs if (value := getattr(config, field, None)) is not None), None)
