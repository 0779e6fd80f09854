"""What clients get from `/v1/messages`: content blocks, and the events in which they come."""

import json
from collections.abc import Mapping
from typing import Any

from polymoe.protocol.request import RequestOutput
from polymoe.server.errors import messages_error
from polymoe.server.format import Json
from polymoe.server.turn_answer import Block, TurnFormat


class MessagesFormat(TurnFormat):
    def opening(self) -> list[Json]:
        return [{"type": "message_start", "message": self._message([], None)}]

    def opened(self, block: Block) -> list[Json]:
        return [{"type": "content_block_start", "index": block.index, "content_block": _content(block, begun=True)}]

    def grown(self, block: Block, text: str) -> list[Json]:
        kind, name = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]
        return [self._delta(block, {"type": kind, name: text})]

    def closed(self, block: Block) -> list[Json]:
        # Nothing is signed, and clients wait for a signature.
        signed = [self._delta(block, {"type": "signature_delta", "signature": ""})] if block.kind == "reasoning" else []
        return [*signed, {"type": "content_block_stop", "index": block.index}]

    def closing(self) -> list[Json]:
        return [
            {"type": "message_delta", "delta": self._stop(), "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def failed(self, error: Json) -> list[Json]:
        return [messages_error(error)]

    def whole(self, results: Mapping[int, RequestOutput]) -> Json:
        del results  # they have been read
        return self._message([_content(block) for block in self.blocks], self._stop())

    @staticmethod
    def _delta(block: Block, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": block.index, "delta": delta}

    def _message(self, content: list[Json], stop: Json | None) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **(stop or {"stop_reason": None, "stop_sequence": None}),
            "usage": self._usage(),
        }

    def _stop(self) -> Json:
        named = self.stop_reason if isinstance(self.stop_reason, str) else None
        if self.finish_reason in ("length", "abort"):
            reason = "max_tokens"
        elif self.num_calls:
            reason = "tool_use"
        else:
            reason = "end_turn" if named is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": named}

    def _usage(self) -> Json:
        """Anthropic counts the cached part of a prompt by itself."""
        return {
            "input_tokens": self.num_prompt_tokens - self.num_cached_tokens,
            "cache_read_input_tokens": self.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.num_tokens,
        }


def _content(block: Block, begun: bool = False) -> Json:
    """A block as it ended, or as it begins."""
    text = "" if begun else block.text
    if block.kind == "text":
        return {"type": "text", "text": text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {} if begun else _object(text)}


def _object(arguments: str) -> dict[str, Any]:
    """What was cut off, or is no object, is none: a client must not call with half of the arguments."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
