"""What a door of the server is: how the output of one submission is written for the clients of one API."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.request import RequestOutput

Json = dict[str, Any]
encode_json = msgspec.json.Encoder().encode


class Format(ABC):
    """One instance writes one answer: `opening`, `chunks` …, `closing` as events where `stream` is set; otherwise
    every chunk is `read` and then `whole` is asked for."""

    end: ClassVar[bytes]  # what follows the last event, after an error too
    stream: bool
    model: str

    def opening(self) -> list[Json]:
        """Events that come before any token."""
        return []

    @abstractmethod
    def chunks(self, chunk: CompletionChunk) -> list[Json]:
        """The events for what one step added."""

    def encoded(self, chunk: CompletionChunk) -> bytes:
        """`chunks` as they are sent."""
        return b"".join(map(self.event, self.chunks(chunk)))

    def closing(self) -> list[Json]:
        """The events after the last chunk."""
        return []

    @abstractmethod
    def failed(self, error: Json) -> list[Json]:
        """The events in place of all that would have come. error: the body of an error response."""

    def read(self, chunk: CompletionChunk) -> None:
        """What one step added to an answer that is not streamed."""
        del chunk

    @abstractmethod
    def whole(self, results: Mapping[int, RequestOutput]) -> Json:
        """The answer when nothing is streamed; `results` by the index of their prompts."""

    @staticmethod
    def event(event: Json) -> bytes:
        """As it is sent."""
        return b"data: " + encode_json(event) + b"\n\n"


class NamedEvents(Format):
    """Server-sent events have their type as their name, and the last one is the end."""

    end = b""

    @staticmethod
    def event(event: Json) -> bytes:
        kind: str = event["type"]
        return b"event: " + kind.encode() + b"\ndata: " + encode_json(event) + b"\n\n"
