"""What the server and the engine process say to each other, and how it is framed.

A frame is a 4-byte big-endian length and one msgspec message. The frames go over an inherited socket pair, so there
is no address that others could connect to, and decoding one never runs code (unlike pickle).
"""

import struct
from typing import Any

import msgspec

from polymoe.bundle.live import Addition
from polymoe.config import EngineConfig
from polymoe.errors import EngineDeadError, OverloadedError, RequestError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.request import EngineRequest, SequenceId, TokenOutput

_LENGTH = struct.Struct(">I")
HEADER_BYTES = _LENGTH.size


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="kind"):
    """Base of all messages; the class name is the tag."""


# --- commands, server to engine


class Start(Message, frozen=True):
    """The first frame: load this."""

    config: EngineConfig


class Add(Message, frozen=True):
    """Add all of these requests or none; answered by `Accepted` or `Rejected`."""

    submission: int
    requests: list[EngineRequest]


class Abort(Message, frozen=True):
    """Drop these sequences; those that have ended are no matter."""

    request_ids: list[SequenceId]


class GetStats(Message, frozen=True):
    """`routing`: with the counts of routed tokens, which are taken only while they are asked for."""

    routing: bool = False


class AddVariant(Message, frozen=True):
    """Load a version from `folder`, which a planner wrote; answered by `VariantAdded` or `ChangeFailed`."""

    change: int
    folder: str
    addition: Addition


class DropVariant(Message, frozen=True):
    """No request will name this place any more: free it when its last one has ended; answered by `VariantDropped`."""

    change: int
    place: int


class CancelAdd(Message, frozen=True):
    """Whoever asked for the variant that is being loaded does not want it any more."""

    change: int


class Shutdown(Message, frozen=True):
    pass


Command = Start | Add | Abort | GetStats | AddVariant | DropVariant | CancelAdd | Shutdown

# --- events, engine to server


class Progress(Message, frozen=True):
    """Loading: `fraction` of `stage` is done."""

    stage: str
    fraction: float


class Ready(Message, frozen=True):
    info: EngineInfo


class Accepted(Message, frozen=True):
    submission: int


class Rejected(Message, frozen=True):
    """A `RequestError` that the engine raised, field by field."""

    submission: int
    message: str
    status: int
    type: str
    param: str | None
    code: str
    retry_after: float | None

    @classmethod
    def of(cls, submission: int, error: RequestError) -> "Rejected":
        retry_after = error.retry_after if isinstance(error, OverloadedError) else None
        return cls(submission, str(error), error.status, error.type, error.param, error.code, retry_after)

    def error(self) -> RequestError:
        if self.retry_after is not None:
            return OverloadedError(self.message, self.retry_after)
        error = RequestError(self.message, param=self.param, code=self.code)
        error.status, error.type = self.status, self.type
        return error


class Outputs(Message, frozen=True):
    """Everything one step produced; may be empty, as a sign of life."""

    outputs: list[TokenOutput]


class Stats(Message, frozen=True):
    stats: EngineStats


class VariantAdded(Message, frozen=True):
    """It is served from the next step on."""

    change: int
    info: VariantInfo


class VariantDropped(Message, frozen=True):
    """Nothing of it is left on the device."""

    change: int
    place: int


class ChangeFailed(Message, frozen=True):
    """All is as before."""

    change: int
    message: str


class Fatal(Message, frozen=True):
    """The engine ends. `deliberate`: a `PolymoeError`, whose message is meant for the operator."""

    message: str
    deliberate: bool


Event = Progress | Ready | Accepted | Rejected | Outputs | Stats | VariantAdded | VariantDropped | ChangeFailed | Fatal

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Event)


def frame(message: Message) -> bytes:
    """Header and body of a message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Bytes of the body that follows this header."""
    length: int = _LENGTH.unpack(header)[0]
    return length


def decode_command(body: bytes | memoryview) -> Command:
    command: Command = _command_decoder.decode(body)
    return command


def decode_event(body: bytes) -> Event:
    """Raises `EngineDeadError` for a frame that is no event: the stream cannot be trusted any more."""
    try:
        event: Event = _event_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineDeadError(f"The engine sent a malformed message: {error}") from error
    return event
