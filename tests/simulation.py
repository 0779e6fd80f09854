"""The real scheduler on a simulated machine: time passes only as the cost model of a step says.

    step = fixed + prefill · prompt tokens + decode · decoding sequences (+ load · reconfigurations)

Traces are generators with seeds. A run of thousands of requests takes a second or two.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from polymoe.engine.policies.policies import Policies
from polymoe.engine.policies.slot_policy import SlotPolicy, VariantWork
from polymoe.engine.scheduling.block_manager import BlockManager
from polymoe.engine.scheduling.scheduler import Scheduler
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_record import SampledToken, ScheduledSequence, StepResult
from polymoe.errors import OverloadedError
from polymoe.protocol.request import EngineRequest, QoS, SamplingParams, SequenceId

BLOCK = 16


@dataclass(frozen=True)
class Arrival:
    """A request of a trace; `time` in seconds, prompt and output in tokens."""

    time: float
    variant: int
    prompt: int = 64
    output: int = 32
    tenant: str = ""
    priority: int = 0
    ttft_target: float | None = None


@dataclass(frozen=True)
class Machine:
    """Seconds; about a 430M model on four cores."""

    fixed: float = 0.03
    prefill: float = 0.0004
    decode: float = 0.0005
    load: float = 0.0

    def step(self, scheduled: list[ScheduledSequence]) -> float:
        decodes = sum(item.samples and item.num_tokens == 1 for item in scheduled)
        tokens = sum(item.num_tokens for item in scheduled) - decodes
        return self.fixed + self.prefill * tokens + self.decode * decodes


@dataclass
class Result:
    """What one request saw. Seconds; `waits` are the times without a step of its variant, while it had work."""

    arrival: Arrival
    first_token: float = float("inf")
    last_token: float = float("inf")
    longest_gap: float = 0.0  # between two tokens

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival.time


@dataclass
class Report:
    results: list[Result] = field(default_factory=list)
    refused: list[tuple[Arrival, float]] = field(default_factory=list)  # with the seconds of Retry-After
    reconfigurations: int = 0
    longest_wait: float = 0.0  # of a variant with work for its next step
    longest_step: float = 0.0
    duration: float = 0.0
    steps: int = 0
    served: list[int] = field(default_factory=list)  # tokens of each variant

    def ttfts(self, may: Callable[[Arrival], bool] = lambda _: True) -> list[float]:
        return [r.ttft for r in self.results if may(r.arrival)]


def percentile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


class OldestFirst(SlotPolicy):
    """The rule to beat: the variants of the oldest requests, whatever is loaded."""

    def choose(self, now: float, work: dict[int, VariantWork]) -> frozenset[int]:  # type: ignore[override]
        oldest = sorted(work, key=lambda v: (work[v].since, v))
        return self.force(now, oldest[: self._num_slots])


class Simulation:
    """One run of a trace."""

    def __init__(
        self,
        arrivals: Iterable[Arrival],
        *,
        weights: list[float],
        machine: Machine | None = None,
        num_slots: int | None = None,
        mix: int | None = None,
        slot_policy: type[SlotPolicy] = SlotPolicy,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_waiting: int = 10**6,
        num_blocks: int = 4096,
        target_itl: float | None = None,
        admission_factor: float | None = None,
    ) -> None:
        self.now = 1.0
        self.machine = machine or Machine()
        self.arrivals = sorted(arrivals, key=lambda a: a.time)
        self.num_slots = num_slots or len(weights)
        policies = Policies.of(
            weights,
            num_slots=self.num_slots,
            max_variants_per_step=mix,
            max_num_batched_tokens=max_num_batched_tokens,
            target_itl=target_itl,
            admission_factor=admission_factor,
            clock=lambda: self.now,
        )
        if policies.slots is not None:
            policies.slots.__class__ = slot_policy
        self.scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK),
            policies,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            max_model_len=[num_blocks * BLOCK] * len(weights),
            clock=lambda: self.now,
            reconfigurations=lambda: (self.report.reconfigurations, self.report.reconfigurations * self.machine.load),
        )
        self.report = Report(served=[0] * len(weights))
        self._loaded = dict.fromkeys(range(self.num_slots), 0.0)  # variant -> when it was last used
        self._served_at: dict[int, float] = {}
        self._results: dict[SequenceId, Result] = {}

    def run(self, until: float = float("inf")) -> Report:
        """Until everything has finished, or until a time."""
        pending = iter(enumerate(self.arrivals))
        upcoming = next(pending, None)
        while (upcoming is not None or self.scheduler.has_work()) and self.now < until:
            if not self.scheduler.has_work() and upcoming is not None:
                self.now = max(self.now, upcoming[1].time)
            while upcoming is not None and upcoming[1].time <= self.now:
                self._add(*upcoming)
                upcoming = next(pending, None)
            if self.scheduler.has_work():
                self._step()
        self.report.duration = self.now
        self.report.served = list(self.scheduler.tokens_served)
        self.report.results = list(self._results.values())
        return self.report

    def _add(self, number: int, arrival: Arrival) -> None:
        request = EngineRequest(
            request_id=SequenceId(str(number)),
            variant=arrival.variant,
            prompt_token_ids=list(range(number * 100_000, number * 100_000 + arrival.prompt)),
            sampling=SamplingParams(temperature=0, max_tokens=arrival.output),
            qos=QoS(tenant=arrival.tenant, priority=arrival.priority),
            arrival_time=arrival.time,
        )
        sequence = Sequence(request, b"", arrival.ttft_target, added_time=self.now)
        try:
            self.scheduler.add(sequence)
        except OverloadedError as error:
            self.report.refused.append((arrival, error.retry_after))
        else:
            self._results[request.request_id] = Result(arrival)

    def _step(self) -> None:
        started = self.now
        scheduled = self.scheduler.schedule()
        assert scheduled, "there is work, but nothing runs"
        variants = {item.variant for item in scheduled}
        self._note_waits(variants)
        for variant in variants - self._loaded.keys():
            del self._loaded[min((v for v in self._loaded if v not in variants), key=lambda v: self._loaded[v])]
            self._loaded[variant] = self.now
            self.report.reconfigurations += 1
            self.now += self.machine.load
        self._loaded.update(dict.fromkeys(variants, self.now))
        self.now += self.machine.step(scheduled)
        sampled = {item.key: SampledToken(7) for item in scheduled if item.samples}
        for output in self.scheduler.update(self.scheduler.launched(scheduled), StepResult(sampled)):
            result = self._results[output.request_id]
            if result.first_token == float("inf"):
                result.first_token = self.now
            else:
                result.longest_gap = max(result.longest_gap, self.now - result.last_token)
            result.last_token = self.now
        self.scheduler.check_integrity()
        self.report.steps += 1
        self.report.longest_step = max(self.report.longest_step, self.now - started)

    def _note_waits(self, variants: set[int]) -> None:
        since: dict[int, float] = {}
        for sequence in self.scheduler.sequences:
            arrived = sequence.arrival[0]
            since[sequence.variant] = min(since.get(sequence.variant, arrived), arrived)
        for variant, arrived in since.items():
            waited = self.now - max(arrived, self._served_at.get(variant, 0.0))
            self.report.longest_wait = max(self.report.longest_wait, waited)
        self._served_at.update(dict.fromkeys(variants, self.now))


# --- traces


def poisson(rate: float, seconds: float, seed: int, **fields: object) -> Iterator[Arrival]:
    """Independent arrivals of one kind, `rate` a second."""
    rng = random.Random(seed)
    now = 1.0
    while (now := now + rng.expovariate(rate)) < 1.0 + seconds:
        yield Arrival(now, **fields)  # type: ignore[arg-type]


def zipf(rate: float, seconds: float, num_variants: int, seed: int, exponent: float = 1.0) -> Iterator[Arrival]:
    """Variant k gets 1 / (k + 1)^exponent of the requests; lengths vary by a factor of 16."""
    rng = random.Random(seed)
    shares = [(k + 1) ** -exponent for k in range(num_variants)]
    for arrival in poisson(rate, seconds, seed, variant=0):
        variant = rng.choices(range(num_variants), shares)[0]
        yield Arrival(arrival.time, variant, prompt=rng.randrange(16, 256), output=rng.randrange(4, 64))


def bursts(rate: float, seconds: float, burst: int, num_variants: int, seed: int) -> Iterator[Arrival]:
    """`burst` requests of one variant at once, at random moments."""
    rng = random.Random(seed)
    for arrival in poisson(rate / burst, seconds, seed, variant=0):
        variant = rng.randrange(num_variants)
        for _ in range(burst):
            yield Arrival(arrival.time + rng.random() * 0.2, variant)


def alternating(gap: float, seconds: float, num_variants: int = 2) -> Iterator[Arrival]:
    """Single requests of the variants in turn: each tempts to load its variant at once."""
    for number in itertools.count():
        if number * gap >= seconds:
            return
        yield Arrival(1.0 + number * gap, number % num_variants)
