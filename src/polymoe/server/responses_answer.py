"""What clients get from `/v1/responses`: items, and the events in which they come."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from polymoe.client.interface import Prompt
from polymoe.protocol.request import RequestOutput
from polymoe.server.answers import AnswerFormat
from polymoe.server.format import Json
from polymoe.server.protocol import ChatCompletionRequest
from polymoe.server.responses_request import ResponsesRequest
from polymoe.server.turn_answer import Block, TurnFormat
from polymoe.text.tokenizer import VariantTokenizer

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponsesFormat(TurnFormat):
    """Args: given: the request, much of which the answer repeats. defaults: the variant's own sampling parameters."""

    def __init__(
        self,
        request_id: str,
        body: ChatCompletionRequest,
        prompts: Sequence[Prompt],
        tokenizer: VariantTokenizer | None,
        answers: AnswerFormat,
        *,
        given: ResponsesRequest,
        defaults: Mapping[str, Any],
    ) -> None:
        super().__init__(request_id, body, prompts, tokenizer, answers)
        self._created = int(time.time())
        self._number = -1  # of the last event
        self._echo = _echo(given, defaults)

    # --- events

    def opening(self) -> list[Json]:
        response = self._response("in_progress")
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def opened(self, block: Block) -> list[Json]:
        item = self._item(block, "in_progress")
        events = [self._event("response.output_item.added", output_index=block.index, item=item)]
        if block.kind != "call":
            events.append(self._part_event("added", block, ""))
        return events

    def grown(self, block: Block, text: str) -> list[Json]:
        return [self._text_event("delta", block, delta=text)]

    def closed(self, block: Block) -> list[Json]:
        text = block.text
        named = {"arguments": text} if block.kind == "call" else {"text": text}
        events = [self._text_event("done", block, **named)]
        if block.kind != "call":
            events.append(self._part_event("done", block, text))
        item = self._item(block, self._item_status(block))
        return [*events, self._event("response.output_item.done", output_index=block.index, item=item)]

    def closing(self) -> list[Json]:
        response = self._response(self._status)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: Json) -> list[Json]:
        fields = error["error"]
        response = self._response("failed") | {"error": {"code": "server_error", "message": fields["message"]}}
        told = {name: fields[name] for name in ("code", "message", "param")}
        return [self._event("error", **told), self._event("response.failed", response=response)]

    def whole(self, results: Mapping[int, RequestOutput]) -> Json:
        del results  # they have been read
        return self._response(self._status)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _part_event(self, what: str, block: Block, text: str) -> Json:
        return self._event(
            f"response.content_part.{what}", item_id=_id(block), output_index=block.index, content_index=0,
            part=_part(block, text),
        )  # fmt: skip

    def _text_event(self, what: str, block: Block, **fields: Any) -> Json:
        kinds = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
        if block.kind != "call":
            fields["content_index"] = 0
        elif what == "done":
            fields["name"] = block.name
        if block.kind == "text":
            fields["logprobs"] = []
        return self._event(
            f"response.{kinds[block.kind]}.{what}", item_id=_id(block), output_index=block.index, **fields
        )

    # --- objects

    @property
    def _status(self) -> str:
        return "incomplete" if self.finish_reason in ("length", "abort") else "completed"

    def _item_status(self, block: Block) -> str:
        """What the answer's end cut off is not complete."""
        last = self.finish_reason is not None and block.index == len(self.blocks) - 1
        return self._status if last else "completed"

    def _item(self, block: Block, status: str) -> Json:
        item: Json = {"id": _id(block), "status": status}
        begun = status == "in_progress"
        parts = [] if begun else [_part(block, block.text)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": parts, "encrypted_content": None}
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": parts}
        arguments = "" if begun else block.text
        return {
            **item, "type": "function_call", "call_id": block.call_id, "name": block.name, "arguments": arguments
        }  # fmt: skip

    def _response(self, status: str) -> Json:
        ended = status in ("completed", "incomplete")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "model": self.model,
            "output": [self._item(block, self._item_status(block)) for block in self.blocks if block.closed],
            "usage": self._usage() if ended else None,
            **self._echo,
        }

    def _usage(self) -> Json:
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.num_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }


def _id(block: Block) -> str:
    return f"{_PREFIXES[block.kind]}_{block.id}"


def _part(block: Block, text: str) -> Json:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _echo(given: ResponsesRequest, defaults: Mapping[str, Any]) -> Json:
    """What the answer repeats of the request, with the values that held where it left them out."""

    def chosen(name: str) -> Any:
        value = getattr(given, name)
        return defaults.get(name, 1.0) if value is None else value

    text = None if given.text is None or given.text.format is None else given.text.format
    return {
        "background": False,
        "instructions": given.instructions,
        "max_output_tokens": given.max_output_tokens,
        "max_tool_calls": None,
        "metadata": given.metadata or {},
        "parallel_tool_calls": given.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if given.reasoning is None else given.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": chosen("temperature"),
        "text": {"format": {"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": "auto" if given.tool_choice is None else _plain(given.tool_choice),
        "tools": [{"parameters": None, "strict": None, **_plain(tool)} for tool in given.tools or ()],
        "top_logprobs": 0,
        "top_p": chosen("top_p"),
        "truncation": "disabled",
        "user": given.user,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_none=True)
