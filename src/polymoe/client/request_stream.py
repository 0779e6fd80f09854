"""The chunks of one submission, as they arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.request import RequestOutput


class RequestStream(AsyncIterator[list[CompletionChunk]]):
    """What arrives for one submission: all chunks since the last look, until every prompt's answer has ended.

    Leaving it before the end (`close`, or the end of a `with` block) aborts in the engine what still runs.

    Args: `n`: answers to each prompt.
    """

    def __init__(self, request_id: str, num_prompts: int, abort: Callable[[list[str]], None], n: int = 1) -> None:
        self.request_id, self.num_prompts, self.num_sequences = request_id, num_prompts, num_prompts * n
        self.place: int | None = None  # of the version that it began with, when it has been submitted
        self.results: dict[int, RequestOutput] = {}  # index of the prompt -> its complete output, filled as they end
        self.restartable = False  # nobody has seen a chunk, nor will before the end: the answer may begin again
        # Takes a chunk at once while the reader waits for one, without waking it; False: it is the reader's.
        self.sink: Callable[[CompletionChunk], bool] | None = None
        self._abort = abort
        self._chunks: list[CompletionChunk] = []
        self._delivered = self._waiting = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    async def __anext__(self) -> list[CompletionChunk]:
        """Raises `EngineDeadError` (or whatever ended the stream) once the chunks before it are delivered."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.is_complete:
                raise StopAsyncIteration
            self._wake.clear()
            self._waiting = True
            try:
                await self._wake.wait()
            finally:
                self._waiting = False
        chunks, self._chunks = self._chunks, []
        self._delivered = True
        return chunks

    @property
    def is_complete(self) -> bool:
        return len(self.results) == self.num_prompts

    def close(self) -> None:
        """Idempotent. Nothing of the submission is left in the client or the engine afterwards."""
        if not self.is_complete:
            self._abort([self.request_id])

    def __enter__(self) -> "RequestStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def push_chunk(self, chunk: CompletionChunk) -> None:
        if self._error is not None:  # after an error the chunks are only those of the abort that follows it
            return
        if self.sink is not None and self._waiting and not self._chunks:
            try:
                if self.sink(chunk):
                    self._delivered = True
                    return
            except Exception as error:
                self.fail(error)
                return
        self._chunks.append(chunk)
        self._wake.set()

    def push_result(self, result: RequestOutput) -> None:
        self.results[result.prompt_index] = result
        self._wake.set()

    def restart(self) -> bool:
        """Forget what came, as the answer comes anew from elsewhere; False where a client has seen a part of it."""
        if self._delivered and not self.restartable:
            return False
        self._chunks.clear()
        self.results.clear()
        return True

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake.set()
