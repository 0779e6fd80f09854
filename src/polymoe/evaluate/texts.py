"""Texts to measure on: read, tokenised with a variant's own tokenizer and cut into windows."""

from collections.abc import Mapping
from pathlib import Path

from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import PolymoeError, UnknownVariantError

MIN_TOKENS = 256  # of a text whose figures are kept; fewer say nothing
WINDOW = 256  # tokens
MAX_WINDOWS = 64  # a variant


def encode_texts(
    checkpoints: Mapping[str, Path], texts: Mapping[str, Path], option: str = "--text"
) -> dict[str, list[int]]:
    """Variant -> token ids of its text.

    Args:
        checkpoints: variant -> folder with its tokenizer.
        texts: variant -> UTF-8 file.
        option: where `texts` were given, for messages.

    Raises `UnknownVariantError` for a variant that has no checkpoint, `PolymoeError` for a text that cannot be read or
    has fewer than `MIN_TOKENS` tokens.
    """
    for name in texts:
        if name not in checkpoints:
            raise UnknownVariantError(name, list(checkpoints))
    found = {}
    for name, path in texts.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolymoeError(f"{option} {name}: {path} cannot be read as UTF-8 text ({error}).") from error
        found[name] = VariantTokenizer(checkpoints[name]).encode(text, add_special_tokens=False)
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
    chosen = count if limit is None else min(limit, count)
    starts = [round(i * (count - 1) / max(1, chosen - 1)) * length for i in range(chosen)]
    return [token_ids[start : start + length] for start in starts]
