"""What all formats of tool calls share: text comes in pieces, and text and calls go out as early as they are known."""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from polymoe.text.tools.lark import Token


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Call:
    """A call begins."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class Thought:
    """Reasoning that is part of the format itself."""

    text: str


Event = Text | Call | Arguments | Thought
# A parser's program: yields what it found, or None when it cannot go on without more text; returns a value.
T = TypeVar("T")
Steps = Generator[Event | None, None, T]


class MalformedCallError(Exception):
    """The model began a call and wrote something else."""


class ToolParser(ABC):
    """Reads the answer of one sequence.

    A format says in `steps` what comes after what, as if all text were there; where it is not, the program waits in the
    middle. What looks like a call and is none is given out as text.

    Args: tools: name -> JSON schema of the arguments, of the tools that may be called.
    """

    name: ClassVar[str]
    # Of these one is in the chat template of a variant that writes this format.
    marks: ClassVar[tuple[str, ...]]
    # Those that may be special tokens, which are left out of the text otherwise.
    special: ClassVar[tuple[str, ...]]

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self.tools = tools
        self._buffer = ""
        self._closed = False
        self._gap: str | None = ""  # white space that is text only if text follows; None: text has begun
        self._raw: str | None = None  # what was read since a call began that has no name yet
        self.num_calls = 0
        self._program = self._whole()

    @abstractmethod
    def steps(self) -> Steps[None]:
        """The program of the format, until the text ends."""

    @classmethod
    @abstractmethod
    def grammar(cls, tools: Mapping[str, Mapping[str, Any]], parallel: bool, token: "Token") -> str:
        """Lark, as llguidance reads it: nothing but calls, one at least, several with `parallel`."""

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """No more text will come."""
        self._closed = True
        return self._run()

    def _run(self) -> list[Event]:
        events: list[Event] = []
        for event in self._program:
            if event is None:
                break
            events.append(event)
        return events

    def _whole(self) -> Steps[None]:
        while self._buffer or not self._closed:
            self._raw = None
            try:
                yield from self.steps()
            except MalformedCallError:
                raw, self._raw = self._raw, None
                if raw is not None:
                    yield from self._text(raw)
            if self._closed and not self._buffer:
                break
        if self._gap and not self.num_calls:
            yield Text(self._gap)

    # --- what formats are made of

    def text_until(self, *markers: str) -> Steps[str | None]:
        """Text, up to one of the markers, which it returns; None at the end. The call begins with the marker."""
        marker = yield from self._until(markers, self._text)
        self._raw = marker
        return marker

    def read_until(self, *markers: str) -> Steps[str]:
        """What comes before the first of the markers. Raises `MalformedCallError` when none comes."""
        found: list[str] = []

        def keep(text: str) -> Steps[None]:
            found.append(text)
            yield from ()

        if (yield from self._until(markers, keep)) is None:
            raise MalformedCallError
        return "".join(found)

    def stream_until(self, index: int, marker: str) -> Steps[None]:
        """What comes before the marker, as the inside of a JSON string."""

        def inside(text: str) -> Steps[None]:
            yield Arguments(index, json.dumps(text, ensure_ascii=False)[1:-1])

        yield from self._until((marker,), inside)

    def begin(self, name: str) -> Steps[int]:
        """A call; returns its index."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        self._raw, self._gap = None, ""
        yield Call(index, name)
        return index

    def accept(self, *options: str) -> Steps[str | None]:
        """Take one of the options, if the text goes on with it, after white space."""
        while True:
            self._skip_space()
            for option in options:
                if self._buffer.startswith(option):
                    self._take(len(option))
                    return option
            if self._closed or not any(option.startswith(self._buffer) for option in options):
                return None
            yield None

    def json_value(self, stream_to: int | None = None) -> Steps[str]:
        """The JSON value that comes next, as it is written; `stream_to`: given out as arguments of that call meanwhile.

        Raises `MalformedCallError` where there is none.
        """
        while not self._buffer.strip():
            if self._closed:
                raise MalformedCallError
            yield None
        self._skip_space()
        found, depth, in_string, escaped = "", 0, False, False
        while True:
            used = len(self._buffer)
            done = False
            for i, char in enumerate(self._buffer):
                if in_string:
                    in_string, escaped = escaped or char != '"', not escaped and char == "\\"
                    done = not in_string and depth == 0
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]" and depth:
                    depth -= 1
                    done = depth == 0
                elif depth == 0 and (char in ",}]" or char.isspace() or char == "<"):
                    used, done = i, True
                    break
                if done:
                    used = i + 1
                    break
            piece = self._buffer[:used]
            self._take(used)
            found += piece
            if stream_to is not None and piece:
                yield Arguments(stream_to, piece)
            if done or self._closed:
                if not found:
                    raise MalformedCallError
                return found
            yield None

    def json_call(self, arguments: Sequence[str] = ("arguments", "parameters")) -> Steps[None]:
        """A call that is an object with `name` and one of `arguments`. Raises `MalformedCallError`."""
        if (yield from self.accept("{")) is None:
            raise MalformedCallError
        index: int | None = None
        early: str | None = None  # arguments that came before the name
        while (yield from self.accept("}")) is None:
            key = yield from self.json_value()
            if (yield from self.accept(":")) is None:
                raise MalformedCallError
            if key == '"name"' and index is None:
                index = yield from self.begin(str(self._decoded((yield from self.json_value()))))
                if early is not None:
                    yield Arguments(index, early)
            elif key.strip('"') in arguments:
                early = yield from self._arguments(index)
            else:
                yield from self.json_value()
            yield from self.accept(",")
            if self._closed and not self._buffer:
                break
        if index is None:
            raise MalformedCallError

    def _arguments(self, index: int | None) -> Steps[str | None]:
        """Given out, if the call has its name; or else returned. Some models write the object as a string."""
        while not self._buffer.strip() and not self._closed:
            yield None
        self._skip_space()
        quoted = self._buffer.startswith('"')
        raw = yield from self.json_value(None if quoted else index)
        text = str(self._decoded(raw)) if quoted else raw
        if index is None:
            return text
        if quoted:
            yield Arguments(index, text)
        return None

    def _decoded(self, raw: str) -> Any:
        try:
            return json.loads(raw)
        except ValueError as error:
            raise MalformedCallError from error

    def _text(self, text: str) -> Steps[None]:
        if self._gap is not None:
            if not text.strip():
                self._gap += text
                return
            text, self._gap = ("" if self.num_calls else self._gap) + text, None
        yield Text(text)

    def _until(self, markers: Sequence[str], emit: Any) -> Steps[str | None]:
        while True:
            places = [(at, marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
            if places:
                at, marker = min(places, key=lambda place: (place[0], -len(place[1])))
                if piece := self._take(at):
                    yield from emit(piece)
                self._take(len(marker))
                return marker
            held = 0 if self._closed else max(_overlap(self._buffer, marker) for marker in markers)
            if piece := self._take(len(self._buffer) - held):
                yield from emit(piece)
            if self._closed:
                return None
            yield None

    def _take(self, count: int) -> str:
        piece, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._raw is not None:
            self._raw += piece
        return piece

    def _skip_space(self) -> None:
        self._take(len(self._buffer) - len(self._buffer.lstrip()))


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of the text that may be the marker's beginning."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
