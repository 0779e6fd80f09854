"""Texts to measure on: read, tokenised with a variant's own tokenizer and cut into windows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymoe.errors import PolymoeError, UnknownVariantError
from polymoe.evaluate.fidelity import Samples
from polymoe.evaluate.pairs import encode_pairs
from polymoe.model.stock.kind import kind_of
from polymoe.offline.calibrate.pairs import read_pairs
from polymoe.offline.calibrate.spread import spread
from polymoe.offline.calibrate.text_tokens import TextTokenizer, read_tokens
from polymoe.offline.checkpoint.checkpoint import read_config
from polymoe.offline.checkpoint.family import max_model_len

MIN_TOKENS = 256  # of a text whose figures are kept; fewer say nothing
WINDOW = 256  # tokens
MAX_WINDOWS = 64  # a variant
MAX_PAIRS = 256  # a variant


def samples_of(checkpoints: Mapping[str, Path], texts: Mapping[str, Path]) -> dict[str, Samples]:
    """Variant -> what its figures are measured on, evenly spread over it: at most `MAX_WINDOWS` windows, or at most
    `MAX_PAIRS` pairs of an encoder–decoder family.

    Args:
        checkpoints: all variants of the family -> folder.
        texts: variant -> UTF-8 file, plain or JSON lines as `read_tokens` takes; of an encoder–decoder family with
            `{"input": …, "target": …}` on every line.

    Raises as `encode_texts`; for pairs naming file and line. `CheckpointError` or `UnsupportedModelError` for a config
    that cannot be read.
    """
    _check_known(checkpoints, texts)
    configs = {name: read_config(path) for name, path in checkpoints.items()}
    window = min(WINDOW, *(max_model_len(config) for config in configs.values()))
    found = {}
    for name, path in texts.items():
        if kind_of(configs[name]).reads_pairs:
            found[name] = _pair_samples(f"--text {name}", path, checkpoints[name], configs[name])
        else:
            ids = encode_texts(checkpoints, {name: path})[name]
            found[name] = Samples(spread_windows(ids, window, MAX_WINDOWS))
    return found


def _pair_samples(option: str, path: Path, checkpoint: Path, config: Any) -> Samples:
    pairs = spread(read_pairs(option, path), MAX_PAIRS)
    samples = encode_pairs(option, pairs, checkpoint, config, max_model_len(config) // kind_of(config).parts)
    count = sum(len(window) - 1 for window in samples.windows)
    if count < MIN_TOKENS:
        raise PolymoeError(f"{option}: the targets of {path} have {count} tokens; at least {MIN_TOKENS} are needed.")
    return samples


def encode_texts(
    checkpoints: Mapping[str, Path], texts: Mapping[str, Path], option: str = "--text"
) -> dict[str, list[int]]:
    """Variant -> token ids of its text.

    Args:
        checkpoints: variant -> folder with its tokenizer.
        texts: variant -> UTF-8 file, plain or JSON lines as `read_tokens` takes.

    Raises `UnknownVariantError` for a variant that has no checkpoint, `PolymoeError` for a text that cannot be read or
    has fewer than `MIN_TOKENS` tokens.
    """
    _check_known(checkpoints, texts)
    found = {}
    for name, path in texts.items():
        if kind_of(read_config(checkpoints[name])).reads_pairs:
            raise PolymoeError(
                f"{option} {name}: plain text measures decoder-only models; {checkpoints[name]} is an encoder–decoder, "
                "which polymoe eval measures on pairs of input and target."
            )
        found[name] = read_tokens(f"--text {name}", [path], TextTokenizer(checkpoints[name], name))
        if len(found[name]) < MIN_TOKENS:
            raise PolymoeError(
                f"{option} {name}: {path} has {len(found[name])} tokens; at least {MIN_TOKENS} are needed, and some "
                "10,000 are good."
            )
    return found


def spread_windows(token_ids: list[int], length: int, limit: int | None) -> list[list[int]]:
    """At most `limit` whole windows of `length` tokens, evenly spread over the text, without overlap.

    |==|    |==|    |==|    |==|  rest      a text shorter than one window is one window
    """
    count = len(token_ids) // length
    if count == 0:
        return [token_ids]
    starts = spread(range(0, count * length, length), count if limit is None else limit)
    return [token_ids[start : start + length] for start in starts]


def _check_known(checkpoints: Mapping[str, Path], texts: Mapping[str, Path]) -> None:
    for name in texts:
        if name not in checkpoints:
            raise UnknownVariantError(name, list(checkpoints))
