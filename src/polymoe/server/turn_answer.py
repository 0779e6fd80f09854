"""An answer as a row of blocks (reasoning, text, calls), which is how the Responses and the Messages API see it."""

import secrets
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from polymoe.client.interface import Prompt
from polymoe.client.output_sequence import CompletionChunk
from polymoe.server.answers import AnswerFormat
from polymoe.server.format import Json, NamedEvents
from polymoe.server.protocol import ChatCompletionRequest
from polymoe.text.tokenizer import VariantTokenizer
from polymoe.text.tools.base import Arguments, Call, Text, Thought

BlockKind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """One of an answer; `text` is that of the reasoning, the answer, or the call's arguments (JSON)."""

    kind: BlockKind
    index: int
    name: str = ""  # of the function that is called
    call_id: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    pieces: list[str] = field(default_factory=list)
    closed: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class TurnFormat(NamedEvents):
    """One answer to a chat. Whole answers are read chunk by chunk too, so that both ways give the same blocks."""

    def __init__(
        self,
        request_id: str,
        body: ChatCompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
        answers: AnswerFormat,
    ) -> None:
        del tokenizer  # as the formats of other doors are made; no log-probabilities are written here
        self.stream, self.model, self.id = bool(body.stream), body.model, request_id
        self.blocks: list[Block] = []
        self.num_prompt_tokens = sum(len(token_ids) for _, token_ids in prompts)
        self.num_cached_tokens = 0
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # to within a token or two: a mark may lie within one
        self.finish_reason: str | None = None  # as chats have it
        self.stop_reason: int | str | None = None
        self._reader = answers.reader()

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    @abstractmethod
    def opened(self, block: Block) -> list[Json]:
        """The events for a block that begins."""

    @abstractmethod
    def grown(self, block: Block, text: str) -> list[Json]:
        """Those for its next piece."""

    @abstractmethod
    def closed(self, block: Block) -> list[Json]:
        """Those for its end."""

    def read(self, chunk: CompletionChunk) -> None:
        self.chunks(chunk)

    def chunks(self, chunk: CompletionChunk) -> list[Json]:
        self.num_tokens += len(chunk.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        events: list[Json] = []
        found = self._reader.read(chunk.text, last=chunk.finish_reason is not None)
        if any(isinstance(event, Thought) for event in found):
            self.num_reasoning_tokens += len(chunk.token_ids)
        for event in found:
            match event:
                case Call(name=name):
                    events += self._open("call", name)
                case Arguments(text=text):
                    events += self._grow(text)
                case Thought(text=text) | Text(text=text):
                    kind: BlockKind = "text" if isinstance(event, Text) else "reasoning"
                    if self._current is None or self._current.kind != kind:
                        events += self._open(kind)
                    events += self._grow(text)
        if chunk.finish_reason is not None:
            self.finish_reason = self._reader.finish_reason(chunk.finish_reason)
            self.stop_reason = chunk.stop_reason
            events += self._close()
        return events

    @property
    def _current(self) -> Block | None:
        return self.blocks[-1] if self.blocks and not self.blocks[-1].closed else None

    def _open(self, kind: BlockKind, name: str = "") -> list[Json]:
        events = self._close()
        call_id = self._reader.call_id() if kind == "call" else ""
        self.blocks.append(Block(kind, len(self.blocks), name, call_id))
        return events + self.opened(self.blocks[-1])

    def _grow(self, text: str) -> list[Json]:
        if not text:
            return []
        self.blocks[-1].pieces.append(text)
        return self.grown(self.blocks[-1], text)

    def _close(self) -> list[Json]:
        if self._current is None:
            return []
        self.blocks[-1].closed = True
        return self.closed(self.blocks[-1])
