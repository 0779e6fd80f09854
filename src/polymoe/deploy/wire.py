"""What the ingress and a replica say to each other: msgpack, as between a server and its engine, so that reading it
never runs code."""

from typing import Any

import msgspec

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.protocol.messages import Accepted, Message, Rejected
from polymoe.protocol.request import QoS, RequestOutput, SamplingParams


class Generate(Message, frozen=True, kw_only=True):
    """A client's request, whole; answered by `Accepted` and `Progressed` messages, or by `Rejected`."""

    request_id: str
    variant: str
    prompts: list[tuple[str | None, list[int]]]
    sampling: SamplingParams
    cache_salt: str
    qos: QoS


class Progressed(Message, frozen=True):
    """What came since the last one: chunks of text, and the whole output of prompts that ended."""

    chunks: list[CompletionChunk]
    results: list[RequestOutput]


_encode = msgspec.msgpack.Encoder().encode
_generate: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Generate)
_answer: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Accepted | Rejected | Progressed)


def encode(message: Message | EngineInfo | EngineStats) -> bytes:
    return _encode(message)


def decode_generate(data: bytes) -> Generate:
    asked: Generate = _generate.decode(data)
    return asked


def decode_answer(data: bytes) -> Accepted | Rejected | Progressed:
    answer: Accepted | Rejected | Progressed = _answer.decode(data)
    return answer
