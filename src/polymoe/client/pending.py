"""What the engine was asked for and has not answered yet."""

import asyncio
import itertools
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Pending(Generic[Answer]):
    """Questions of one kind, each with a number that the answer names, and a future for whoever waits.

    An answer to a question that nobody waits for any more is dropped.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}  # in the order of the questions

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def new(self) -> tuple[int, "asyncio.Future[Answer]"]:
        """A question's number and what its answer will be in."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        return number, self._waiting[number]

    def done(self, number: int, answer: Answer) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def first_done(self, answer: Answer) -> None:
        """Of a kind whose answers come in the order of the questions, without numbers."""
        if self._waiting:
            self.done(next(iter(self._waiting)), answer)

    def fail(self, number: int, error: Exception) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
            waiting.exception()  # taken note of, even if nobody awaits it

    def fail_all(self, error: Exception) -> None:
        for number in list(self._waiting):
            self.fail(number, error)
