"""The last requests, as the dashboard lists them."""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from polymoe.client.output_sequence import CompletionChunk

_KEPT = 1_000
_MOST_TEXT = 2_000  # characters of a prompt


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request; times are seconds. Changed until it has ended."""

    number: int  # of all since the start
    revision: int = 0  # of the log, when it was changed last
    id: str
    time: float  # since the epoch, when it arrived
    variant: str
    version: str
    tenant: str
    kind: str  # chat or completion
    prompt_tokens: int
    tokens: int = 0
    first_token: float | None = None
    duration: float | None = None  # None: it runs
    finish: str | None = None
    error: str | None = None
    prompt: str | None = None  # only where the server was told to log prompts


class RequestLog:
    """A ring of records, those that changed last can be asked for."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=_KEPT)
        self._numbers, self._revisions = itertools.count(1), itertools.count(1)
        self.revision = 0

    def open(self, **known: Any) -> RequestRecord:
        """A record of a request that has just arrived."""
        text = known.pop("prompt", None)
        prompt = None if text is None else text[:_MOST_TEXT]
        record = RequestRecord(number=next(self._numbers), time=time.time(), prompt=prompt, **known)
        self._records.append(record)
        self.touch(record)
        return record

    def touch(self, record: RequestRecord) -> None:
        """Note that it has changed."""
        self.revision = record.revision = next(self._revisions)

    def since(self, revision: int) -> list[RequestRecord]:
        """What has changed after that revision, oldest first; 0: all that is kept."""
        return [record for record in self._records if record.revision > revision]


class RecordedRequest:
    """Follows one request into its record."""

    def __init__(self, log: RequestLog, record: RequestRecord, arrival: float) -> None:
        self._log, self._record, self._arrival = log, record, arrival  # time.monotonic()

    def observe(self, chunks: Sequence[CompletionChunk], now: float) -> None:
        """now: time.monotonic()."""
        record = self._record
        for chunk in chunks:
            if chunk.token_ids and record.first_token is None:
                record.first_token = round(now - self._arrival, 6)
                self._log.touch(record)
            record.tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                record.finish = chunk.finish_reason

    def close(self, error: str | None = None) -> None:
        """It has ended, or was given up. Idempotent."""
        record = self._record
        if record.duration is None:
            record.duration = round(time.monotonic() - self._arrival, 6)
            record.finish = record.finish or ("error" if error else "abort")
            record.error = error
            self._log.touch(record)
