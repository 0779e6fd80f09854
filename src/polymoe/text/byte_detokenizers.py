"""Ids to text while they are generated, for the two ways in which tokens spell out bytes. Both give exactly the text
that decoding all ids at once gives, whatever the ids are, in time that grows with their number."""

import codecs
from collections.abc import Callable, Sequence

from polymoe.text.detokenizer import REPLACEMENT

_MOST_PIECES = 65536  # remembered
_incremental = codecs.getincrementaldecoder("utf-8")


class ByteLevelDetokenizer:
    """Every token is bytes (GPT-2 and most models since): text is their UTF-8, with U+FFFD for what is none."""

    def __init__(self, bytes_of: Callable[[int], bytes], context: Sequence[int] = ()) -> None:
        """`bytes_of` gives a token's bytes; `context` are the last ids before the first one pushed."""
        self._bytes_of = bytes_of
        self._decoder = _incremental(errors="replace")
        for token_id in context:  # a prompt may end within a character: what completes it belongs to the completion
            self._decoder.decode(bytes_of(token_id))

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """The text still held: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


class ByteFallbackDetokenizer:
    """Pieces of text, and a token for each byte as a last resort (sentencepiece).

    A run of byte tokens becomes text only as a whole: if it is not valid UTF-8, each of its bytes is one U+FFFD. So
    what is valid is held until the run ends, and what cannot become valid any more is given out at once.

        |-- given out -- anchor |-- run of bytes: held --|
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        byte_of: Callable[[int], int | None],
        has_text: Callable[[int], bool],
        context: Sequence[int] = (),
        pieces: dict[int, str] | None = None,
    ) -> None:
        """`decode` gives the text of ids; `byte_of` the byte that a token stands for, None for any other token;
        `has_text` says which tokens `decode` does not leave out. `context` are the last of those before the first one
        pushed. `pieces`: the text of tokens that are not the first, which many sequences may share."""
        self._decode, self._byte_of, self._has_text = decode, byte_of, has_text
        self._pieces = {} if pieces is None else pieces
        # The last token given out: whether a piece's first space is kept depends on whether it is the first.
        self._anchor: int | None = None
        self._run: list[int] = []
        self._validator = _incremental(errors="strict")
        self._broken = False  # the run is not valid UTF-8
        given = len(context) - self._num_incomplete(context)
        self._anchor = context[given - 1] if given else None
        for token_id in context[given:]:  # what completes a prompt's last character belongs to the completion
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty, may cover earlier tokens."""
        if not self._has_text(token_id):
            return ""
        byte = self._byte_of(token_id)
        if byte is None:
            return self._end_run() + self._piece(token_id)
        self._run.append(token_id)
        if not self._broken:
            try:
                self._validator.decode(bytes([byte]))
                return ""
            except UnicodeDecodeError:
                self._broken = True
        text = REPLACEMENT * len(self._run)
        self._anchor, self._run = token_id, []
        return text

    def flush(self) -> str:
        """The text still held."""
        return self._end_run()

    def _end_run(self) -> str:
        run, self._run = self._run, []
        self._validator.reset()
        self._broken = False
        if not run:
            return ""
        if self._anchor is None:
            text = self._decode(run)
        else:
            try:
                text = bytes(byte for token_id in run if (byte := self._byte_of(token_id)) is not None).decode()
            except UnicodeDecodeError:  # the last character is incomplete
                text = REPLACEMENT * len(run)
        self._anchor = run[-1]
        return text

    def _piece(self, token_id: int) -> str:
        anchor, self._anchor = self._anchor, token_id
        if anchor is None:
            return self._decode([token_id])
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._decode([anchor, token_id])[len(self._decode([anchor])) :]
            if len(self._pieces) < _MOST_PIECES:
                self._pieces[token_id] = piece
        return piece

    def _num_incomplete(self, context: Sequence[int]) -> int:
        """How many of the last tokens are the bytes of an incomplete character."""
        for count in range(min(3, len(context)), 0, -1):
            tail = [self._byte_of(token_id) for token_id in context[len(context) - count :]]
            raw = bytes(byte for byte in tail if byte is not None)
            if len(raw) == count and _is_incomplete(raw):
                return count
        return 0


def _is_incomplete(raw: bytes) -> bool:
    """Whether more bytes could make a character of these."""
    validator = _incremental(errors="strict")
    try:
        return not validator.decode(raw)
    except UnicodeDecodeError:
        return False
