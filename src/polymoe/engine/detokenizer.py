"""Ids to text while they are generated."""

from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# A character is at most 4 bytes and so at most 4 tokens; more than this many undecodable tokens are simply bad bytes.
_MAX_HELD = 16


class Detokenizer(Protocol):
    """Gives out text as soon as it is certain. The pieces join to the text of all ids."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty, may cover earlier tokens."""
        ...

    def flush(self) -> str:
        """The text still held, for when no more tokens come."""
        ...


class IncrementalDetokenizer:
    """For any tokenizer: half a character is held until its other bytes come.

    Text is found by decoding a short window of ids twice, with and without the new ones. That makes no assumption
    about the tokenizer (a token's text may depend on its neighbours: spaces of sentencepiece, merged bytes).

        window  |--- prefix: already given out ---|--- pending ---|
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """`decode` gives the text of ids; `context` are the last ids before the first one pushed."""
        self._decode = decode
        self._window = list(context)
        self._prefix_len = len(self._window)
        # A prompt may end within a character: what completes it belongs to the completion.
        self._prefix_text = decode(self._window).rstrip(REPLACEMENT) if self._window else ""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty, may cover earlier tokens."""
        self._window.append(token_id)
        text = self._decode(self._window)
        too_long = len(self._window) - self._prefix_len > _MAX_HELD
        if text.endswith(REPLACEMENT) and not too_long:
            return ""
        new = text[len(self._prefix_text) :]
        if new:
            self._advance()
        elif too_long:  # a run of special tokens without text; it need not be decoded again and again
            del self._window[self._prefix_len :]
        return new

    def flush(self) -> str:
        """The text still held, for when no more tokens come: incomplete characters become U+FFFD."""
        new = self._decode(self._window)[len(self._prefix_text) :]
        self._advance()
        return new

    def _advance(self) -> None:
        """What was pending becomes the prefix; older ids cannot change anything any more."""
        self._window = self._window[self._prefix_len :]
        self._prefix_len = len(self._window)
        self._prefix_text = self._decode(self._window) if self._window else ""
