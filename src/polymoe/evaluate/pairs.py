"""Pairs of an input and its target from JSON lines: what an encoder–decoder variant is measured on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import Samples

_WANTED = 'write {"input": "…", "target": "…"} on every line, both texts with something in them'


@dataclass(frozen=True)
class Pair:
    input: str
    target: str


def read_pairs(option: str, path: Path) -> list[Pair]:
    """All pairs of a file, in its order; blank lines are left out.

    Args:
        option: where the file was given, for messages.

    Raises `PolymoeError` naming file and line for one that is no pair, and for a file that cannot be read or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PolymoeError(f"{option}: {path} cannot be read as UTF-8 text ({error}).") from error
    pairs = [_pair(f"{option}: {path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise PolymoeError(f"{option}: {path} has no pairs; {_WANTED}.")
    return pairs


def _pair(where: str, line: str) -> Pair:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise PolymoeError(f"{where} is not JSON ({error}); {_WANTED}.") from error
    if not isinstance(found, dict):
        raise PolymoeError(f"{where} is not an object; {_WANTED}.")
    for key in ("input", "target"):
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise PolymoeError(f"{where} has no text {key!r}; {_WANTED}.")
    return Pair(found["input"], found["target"])


def encode_pairs(option: str, pairs: Sequence[Pair], folder: Path, config: Any, limit: int) -> Samples:
    """Token ids as the variant's own tokenizer and configs make them.

        |-- input --|     start | target … end
        the encoder's     the decoder's; every token after the first is predicted

    Args:
        option: where the pairs were given, for messages.
        folder: of the variant's tokenizer and generation config. config: of its model.
        limit: most tokens of an input, and of a target with its start.

    Raises `PolymoeError` for a pair beyond the limit, and for a model that says neither start nor end of a text.
    """
    has_own = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if has_own else config
    start = _first("decoder_start_token_id", generation, config)
    ends = _first("eos_token_id", generation, config)
    if start is None or ends is None:
        raise PolymoeError(f"{folder}: config.json needs decoder_start_token_id and eos_token_id to measure pairs.")
    ends = ends if isinstance(ends, list) else [ends]
    tokenizer = VariantTokenizer(folder)
    windows, inputs = [], []
    for pair in pairs:
        read, target = tokenizer.encode(pair.input), tokenizer.encode(pair.target)
        if not target or target[-1] not in ends:
            target.append(ends[0])
        for what, text, count in (("input", pair.input, len(read)), ("target", pair.target, 1 + len(target))):
            if count > limit:
                raise PolymoeError(
                    f"{option}: the {what} {text[:40]!r} … has {count} tokens; {folder} takes {limit} at most."
                )
        inputs.append(read)
        windows.append([int(start), *target])
    return Samples(windows, inputs)


def _first(field: str, *configs: Any) -> Any:
    """The field in the first of `configs` that has it."""
    return next((value for config in configs if (value := getattr(config, field, None)) is not None), None)
