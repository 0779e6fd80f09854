"""One engine for several threads. There is no thread of its own: of those that wait, one runs the steps for all.

    submit ──► pending of its ticket ──► engine ──► processor ──► news of the ticket ──► news()
               |---------- under the lock ---------|  step: without  |-- under the lock --|

Who waits for news and finds nobody stepping becomes the leader, steps until there is news for itself, and passes the
lead on. So a program with one thread computes in that thread, and one with many has all its requests in one batch.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from polymoe.client.output import OutputProcessor, StepOutput
from polymoe.client.output_sequence import CompletionChunk
from polymoe.engine.core import EngineCore
from polymoe.errors import EngineDeadError, RequestError
from polymoe.protocol.request import EngineRequest, RequestOutput, SamplingParams, SequenceId


@dataclass(frozen=True)
class Submission:
    """One request. `text`: its prompt as it was given, if it was text."""

    request_id: str
    variant: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    text: str | None
    arrival_time: float  # seconds, time.monotonic()
    fit: bool = False  # whether `max_tokens` is cut to the room that the prompt leaves


@dataclass(frozen=True)
class News:
    """What became known of a ticket's requests since the last look; nothing at all: they have all ended."""

    chunks: list[CompletionChunk] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)


class Ticket:
    """The requests of one call, for the thread that made it. Its fields belong to `SharedEngine`."""

    def __init__(self, lock: threading.Lock, chunks: bool) -> None:
        self.chunks = chunks
        self.changed = threading.Condition(lock)
        self.waiting = False
        self.pending: deque[EngineRequest] = deque()
        self.open: set[str] = set()  # ids of requests that have not ended
        self.news = News()
        self.error: Exception | None = None

    @property
    def has_news(self) -> bool:
        return bool(self.news.chunks or self.news.finished or self.error or not self.open)


class SharedEngine:
    """All methods may be called from any thread. `core` and `processor` are used by nobody else meanwhile."""

    def __init__(self, core: EngineCore, processor: OutputProcessor) -> None:
        self._core, self._processor = core, processor
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._leading = False  # whether a thread is in a step, and so the core is not to be touched
        self._tickets: dict[str, Ticket] = {}  # request id -> who waits for it
        self._aborts: list[SequenceId] = []  # sequences to drop before the next step
        self._closed = False

    def submit(self, requests: Sequence[Submission], chunks: bool = False) -> Ticket:
        """All or none. With `chunks` each token is news, without only the end of a request.

        Raises `RequestError`, and `EngineDeadError` after `close`.
        """
        ticket = Ticket(self._lock, chunks)
        with self._lock:
            self._check_open()
            try:
                for one in requests:
                    ticket.pending += self._processor.add_request(
                        one.request_id, one.variant, one.token_ids, one.sampling, text=one.text,
                        arrival_time=one.arrival_time, fit=one.fit,
                    )  # fmt: skip
                    ticket.open.add(one.request_id)
            except BaseException:
                self._processor.abort(list(ticket.open))
                raise
            self._tickets |= dict.fromkeys(ticket.open, ticket)
        return ticket

    def news(self, ticket: Ticket) -> News:
        """Wait until there is some; empty when all requests of the ticket have ended.

        Raises what the engine raised: `RequestError` for a request that it refuses, `EngineDeadError` after `close`.
        """
        with self._lock:
            try:
                while not ticket.has_news:
                    if self._leading:
                        ticket.waiting = True
                        ticket.changed.wait()
                        ticket.waiting = False
                    else:
                        self._lead_one_step()
            finally:
                ticket.waiting = False
                self._pass_the_lead_on()
            if ticket.error is not None:
                raise ticket.error
            found, ticket.news = ticket.news, News()
            return found

    def cancel(self, ticket: Ticket) -> None:
        """Nothing of the ticket's requests is left afterwards; those that ended are no matter."""
        with self._lock:
            if ticket.open:
                self._forget(ticket)
                self._pass_the_lead_on()

    def close(self) -> None:
        """Wait for the step that runs; whoever waits gets `EngineDeadError`. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._fail_all(EngineDeadError("This LLM was closed."))
            while self._leading:
                self._idle.wait()
            del self._core, self._processor

    # --- under the lock

    def _lead_one_step(self) -> None:
        try:
            self._feed()
            with self._stepping():
                outputs = self._core.step()
            self._deliver(self._processor.process(outputs))
        except BaseException as error:  # an interrupt too: what the step computed for the others may be lost
            self._fail_all(EngineDeadError(f"A step of the engine failed ({type(error).__name__}: {error})."))
            raise

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Without the lock, and with the core for this thread alone."""
        self._leading = True
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._leading = False
            self._idle.notify_all()

    def _feed(self) -> None:
        """Give the engine what its waiting queue has room for, one request of each ticket in turn."""
        self._core.abort(self._aborts)
        self._aborts = []
        limit = self._core.config.max_waiting
        queued = [ticket for ticket in dict.fromkeys(self._tickets.values()) if ticket.pending]
        while queued and len(self._core.scheduler.waiting) < limit:
            ticket = queued.pop(0)
            try:
                self._core.add_request(ticket.pending.popleft())
            except RequestError as error:
                self._fail(ticket, error)
                continue
            if ticket.pending:
                queued.append(ticket)

    def _deliver(self, step: StepOutput) -> None:
        self._abort(step.aborts)
        for chunk in step.chunks:
            ticket = self._tickets[chunk.request_id]
            if ticket.chunks:
                ticket.news.chunks.append(chunk)
                ticket.changed.notify_all()
        for result in step.finished:
            ticket = self._tickets.pop(result.request_id)
            ticket.open.discard(result.request_id)
            ticket.news.finished.append(result)
            ticket.changed.notify_all()

    def _abort(self, sequences: list[SequenceId]) -> None:
        if self._leading:
            self._aborts += sequences
        else:
            self._core.abort(sequences)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """The ticket's requests end with an error."""
        ticket.error = error
        self._forget(ticket)
        ticket.changed.notify_all()

    def _forget(self, ticket: Ticket) -> None:
        ticket.pending.clear()
        self._abort(self._processor.abort(list(ticket.open)).aborts)
        for request_id in ticket.open:
            del self._tickets[request_id]
        ticket.open.clear()

    def _fail_all(self, error: Exception) -> None:
        for ticket in dict.fromkeys(self._tickets.values()):
            self._fail(ticket, error)

    def _pass_the_lead_on(self) -> None:
        """If nobody steps, one of those that wait goes on."""
        if not self._leading:
            waiting = (ticket for ticket in self._tickets.values() if ticket.waiting and not ticket.has_news)
            if (ticket := next(waiting, None)) is not None:
                ticket.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("This LLM was closed.")
