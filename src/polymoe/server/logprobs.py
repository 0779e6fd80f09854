"""Log-probabilities in OpenAI's two JSON forms."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polymoe.protocol.request import Logprob
from polymoe.text.tokenizer import VariantTokenizer

_LOWEST = -9999.0  # JSON has no infinity

Alternatives = Mapping[int, Logprob] | None  # token id -> logprob, the token itself first; None: nothing is known


class LegacyLogprobs:
    """The parallel arrays of `/v1/completions`, with text offsets that go on from chunk to chunk."""

    def __init__(self, tokenizer: VariantTokenizer | None, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0  # characters before the next token
        # A character of several tokens counts for the last of them.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def json(self, token_ids: Sequence[int], alternatives: Iterable[Alternatives]) -> dict[str, list[Any]]:
        """Four arrays with one entry a token. Entry i of `top_logprobs` holds the token itself and the most probable
        ones; a client finds out whether the token was greedy by comparing its logprob with their maximum."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, found in zip(token_ids, alternatives, strict=True):
            tokens.append(token_text(self._tokenizer, token_id))
            offsets.append(self._offset)
            self._advance(token_id)
            if found is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
                continue
            token_logprobs.append(_finite(found[token_id].logprob))
            top: dict[str, float] = {}
            for alternative, logprob in found.items():
                text = token_text(self._tokenizer, alternative)
                # Ids without text share a key; the larger value must survive, or a token would pass for greedy.
                top[text] = max(_finite(logprob.logprob), top.get(text, _LOWEST))
            top_logprobs.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _advance(self, token_id: int) -> None:
        if self._tokenizer is None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            return
        self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))


def chat_logprobs(
    tokenizer: VariantTokenizer | None,
    token_ids: Sequence[int],
    alternatives: Sequence[Mapping[int, Logprob]],
    top: int,
) -> dict[str, list[Any]]:
    """The `logprobs` of a chat choice; `bytes` are the token's own, so that they can be joined to valid UTF-8."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id) if tokenizer else None
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": _finite(logprob.logprob),
            "bytes": None if raw is None else list(raw),
        }

    content = []
    for token_id, found in zip(token_ids, alternatives, strict=True):
        ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)
        best = [entry(other, logprob) for other, logprob in ranked if logprob.rank is not None and logprob.rank <= top]
        content.append({**entry(token_id, found[token_id]), "top_logprobs": best[:top]})
    return {"content": content}


def prompt_logprobs_json(found: Sequence[Mapping[int, Logprob] | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: an object for each token of the prompt, from ids to what is known of them; the first is null."""
    if found is None:
        return None

    def entry(logprob: Logprob) -> dict[str, Any]:
        value = _finite(logprob.logprob)
        return {"logprob": value, "rank": logprob.rank, "decoded_token": logprob.decoded_token}

    return [None if one is None else {str(token): entry(known) for token, known in one.items()} for one in found]


def token_text(tokenizer: VariantTokenizer | None, token_id: int) -> str:
    return tokenizer.token_text(token_id) if tokenizer is not None else f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
