"""The load generator: sends a workload to a system and notes when each token came. The same for every system.

Open loop: a request is due at its arrival time whatever happened before, and its latencies count from then, so that a
generator that falls behind makes the system look worse, never better. How often it did is in every report.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polymoe.bench.systems import System
from polymoe.bench.workload import Arrival


@dataclass(slots=True)
class Record:
    """One request as its client saw it; seconds since the start of the run."""

    variant: str
    due: float
    sent: float | None = None
    token_times: list[float] = field(default_factory=list)  # one entry a token
    finished: bool = False


@dataclass(frozen=True)
class Run:
    """All requests of one run; seconds since its start."""

    records: list[Record]
    seconds: float  # what throughput is counted over
    ended: float  # when the last request was done or given up


OnDone = Callable[[], None]


async def run_closed(
    system: System, arrivals: Sequence[Arrival], prompts: Sequence[list[int]], in_flight: int, on_done: OnDone
) -> Run:
    """Keep `in_flight` requests in the system until all are done; each is due when it is sent.

    Throughput counts from the first request to the last token.
    """
    start = time.monotonic()
    records = [Record(arrival.variant, 0.0) for arrival in arrivals]
    work = iter(range(len(arrivals)))

    async def client() -> None:
        for i in work:
            records[i].due = time.monotonic() - start
            await _send(system, arrivals[i], prompts[i], records[i], start)
            on_done()

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(client())
    last = max(r.token_times[-1] for r in records)
    return Run(records, last, last)


async def run_open(
    system: System,
    arrivals: Sequence[Arrival],
    prompts: Sequence[list[int]],
    duration: float | None,
    drain: float,
    on_done: OnDone,
) -> Run:
    """Send each request at its time, then wait at most `drain` seconds more; what is not done by then is given up.

    Throughput counts over the first `duration` seconds; None: until the last token.
    """
    start = time.monotonic()
    records = [Record(arrival.variant, arrival.at) for arrival in arrivals]

    async def client(i: int) -> None:
        await _send(system, arrivals[i], prompts[i], records[i], start)
        on_done()

    tasks = []
    for i, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start + arrival.at - time.monotonic()))
        tasks.append(asyncio.create_task(client(i)))
    end = max(duration or 0.0, arrivals[-1].at) + drain
    done, late = await asyncio.wait(tasks, timeout=max(0.0, start + end - time.monotonic()))
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()  # an error of the system ends the benchmark
    ended = time.monotonic() - start
    return Run(records, duration or ended, ended)


async def _send(system: System, arrival: Arrival, prompt: list[int], record: Record, start: float) -> None:
    record.sent = time.monotonic() - start
    async for count in system.generate(arrival.variant, prompt, arrival.output_tokens):
        record.token_times += [time.monotonic() - start] * count
    record.finished = True
