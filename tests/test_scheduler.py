"""The scheduler alone, with tokens drawn by the test instead of a model."""

import random
import time
from typing import Any

import pytest

from polymoe.engine.policies.policies import Policies
from polymoe.engine.scheduling.block_manager import BlockManager
from polymoe.engine.scheduling.scheduler import Scheduler
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_record import SampledToken, ScheduledSequence, StepResult
from polymoe.errors import OverloadedError
from polymoe.protocol.request import EngineRequest, SamplingParams, SequenceId, TokenOutput


def make(num_blocks: int = 64, *, slots: int = 3, **limits: int) -> Scheduler:
    settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_waiting": 100} | limits
    policies = Policies.of(
        [1.0] * 3,
        num_slots=slots,
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        clock=time.monotonic,
    )
    return Scheduler(BlockManager(num_blocks, 4), policies, max_model_len=[64] * 3, **settings)


def sequence(name: str, variant: int = 0, prompt: int = 6, stop: tuple[int, ...] = (), **sampling: object) -> Sequence:
    params = SamplingParams(temperature=0, **({"max_tokens": 5} | sampling))  # type: ignore[arg-type]
    ids = [hash((name, i)) % 1000 for i in range(prompt)]
    request = EngineRequest(
        request_id=SequenceId(name), variant=variant, prompt_token_ids=ids, sampling=params, stop_token_ids=list(stop)
    )
    return Sequence(request, f"{variant}".encode())


def step(scheduler: Scheduler, token: int = 7) -> tuple[list[ScheduledSequence], list[TokenOutput]]:
    scheduled = scheduler.schedule()
    assert sum(s.num_tokens for s in scheduled) <= scheduler.max_num_batched_tokens
    slots = scheduler.policies.slots
    assert slots is None or {s.variant for s in scheduled} <= slots.active
    assert all(s.num_tokens > 0 for s in scheduled)
    sampled = {s.key: SampledToken(token) for s in scheduled if s.samples}
    outputs = scheduler.update(scheduler.launched(scheduled), StepResult(sampled))
    scheduler.check_integrity()
    return scheduled, outputs


def run_dry(scheduler: Scheduler, limit: int = 500) -> dict[str, int]:
    """Step until nothing is left; tokens given to each request."""
    counts: dict[str, int] = {}
    for _ in range(limit):
        if not scheduler.has_work():
            return counts
        for output in step(scheduler)[1]:
            name = output.request_id.request
            counts[name] = counts.get(name, 0) + len(output.new_token_ids)
    raise AssertionError("the scheduler makes no progress")


def test_a_long_prompt_is_split_over_steps_and_decodes_go_on_beside_it() -> None:
    scheduler = make()
    scheduler.add(sequence("short", prompt=3, max_tokens=9))
    step(scheduler)
    scheduler.add(sequence("long", prompt=40))
    sizes = []
    for _ in range(3):
        scheduled, outputs = step(scheduler)
        sizes.append({s.request.request_id.request: s.num_tokens for s in scheduled})
        assert any(o.request_id.request == "short" for o in outputs)
    assert sizes == [{"short": 1, "long": 15}, {"short": 1, "long": 15}, {"short": 1, "long": 10}]


def test_finish_reasons() -> None:
    scheduler = make()
    scheduler.add(sequence("length", max_tokens=2))
    stop = sequence("stop", max_tokens=9, min_tokens=3, stop=(7,))
    scheduler.add(stop)
    ends = {}
    while scheduler.has_work():
        for o in step(scheduler)[1]:
            if o.finish_reason:
                ends[o.request_id.request] = (o.finish_reason, o.stop_reason)
    assert ends == {"length": ("length", None), "stop": ("stop", 7)}
    assert stop.num_output_tokens == 3  # not before min_tokens


def test_under_pressure_the_youngest_gives_way_and_all_finish() -> None:
    scheduler = make(num_blocks=6)
    for name in "abc":
        scheduler.add(sequence(name, prompt=6, max_tokens=12))
    counts = run_dry(scheduler)
    assert counts == {"a": 12, "b": 12, "c": 12}
    assert sum(scheduler.batch.preemptions) > 0
    assert scheduler.batch.blocks.num_free == 6


def test_abort_frees_everything_and_unknown_ids_are_fine() -> None:
    scheduler = make()
    for name in "abc":
        scheduler.add(sequence(name))
    step(scheduler)
    scheduler.abort({SequenceId(name) for name in ("a", "c", "gone")})
    scheduler.check_integrity()
    assert [s.request_id for s in scheduler.sequences] == [SequenceId("b")]
    scheduler.abort({SequenceId("b")})
    assert not scheduler.has_work()
    assert scheduler.batch.blocks.usage == 0


def test_a_full_queue_refuses() -> None:
    scheduler = make(max_waiting=2)
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    with pytest.raises(OverloadedError):
        scheduler.add(sequence("c"))


@pytest.mark.parametrize("slots", [1, 2])
def test_with_few_slots_no_variant_is_starved(slots: int) -> None:
    """Newer requests of a loaded variant must not keep an older one of another out. Loads cost nothing here, so every
    variant with work has its turn within a few steps."""
    scheduler = make(slots=slots, num_blocks=200, max_num_seqs=100)
    rng = random.Random(slots)
    unserved = [0, 0, 0]
    for tick in range(300):
        if tick < 200:
            variant = 0 if rng.random() < 0.8 else rng.randrange(1, 3)
            scheduler.add(sequence(f"{tick}", variant=variant, max_tokens=4))
        waiting = {s.variant for s in scheduler.sequences}
        served = {s.variant for s in step(scheduler)[0]}
        unserved = [unserved[v] + 1 if v in waiting - served else 0 for v in range(3)]
        assert max(unserved) <= 2 * (3 - slots)
    run_dry(scheduler)
    assert not scheduler.has_work()


def test_a_paused_variant_gives_its_blocks_to_the_one_whose_turn_it_is() -> None:
    """With one slot, sequences of another variant may hold every block while their turn is over: no hang."""
    scheduler = make(num_blocks=8, slots=1, max_num_seqs=4)
    old = sequence("old", variant=1, prompt=20, max_tokens=8)
    young = sequence("young", variant=0, prompt=24, max_tokens=8)
    scheduler.add(young)
    step(scheduler)  # the prompt takes two steps and 6 of the 8 blocks
    step(scheduler)
    old.added_time = young.added_time - 1  # preempted earlier, say: it is older although it waits
    scheduler.add(old)
    assert run_dry(scheduler) == {"old": 8, "young": 7}  # one token of the young one was drawn above
    assert scheduler.batch.preemptions == [1, 0, 0]


def test_random_traffic_finishes_and_loses_nothing() -> None:
    rng = random.Random(1)
    scheduler = make(num_blocks=12, slots=2)
    wanted = {}
    for i in range(60):
        tokens = rng.randrange(1, 12)
        scheduler.add(sequence(str(i), variant=rng.randrange(3), prompt=rng.randrange(1, 30), max_tokens=tokens))
        wanted[str(i)] = tokens
    assert run_dry(scheduler, 3000) == wanted
