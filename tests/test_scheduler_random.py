"""The scheduler under random options and traffic, on the simulated machine."""

import random
from dataclasses import replace

import pytest

from simulation import Machine, Simulation, poisson


@pytest.mark.parametrize("seed", range(16))
def test_whatever_comes_everything_finishes(seed: int) -> None:
    """Random limits, weights, priorities and deadlines, with too little memory: no step without progress (the
    simulation insists), no block lost, nobody left behind."""
    rng = random.Random(seed)
    variants = rng.randrange(1, 5)
    trace = [
        replace(
            a,
            variant=rng.randrange(variants),
            tenant=rng.choice(["", "x", "y"]),
            prompt=rng.choice([1, 16, 40, rng.randrange(1, 400)]),
            output=rng.randrange(1, 60),
            priority=rng.choice([0, 0, -5, 7]),
            ttft_target=rng.choice([None, 0.1, 1.0]),
        )
        for a in poisson(rng.choice([3, 15]), 6, seed=seed, variant=0)
    ]
    slots = rng.randrange(1, variants + 1)
    sim = Simulation(
        trace,
        weights=[rng.choice([0.1, 1.0, 5.0]) for _ in range(variants)],
        num_slots=slots,
        mix=rng.choice([None, 1]),
        machine=Machine(load=rng.choice([0.0, 0.01, 0.5])),
        max_num_seqs=rng.choice([1, 2, 8, 32]),
        max_num_batched_tokens=rng.choice([4, 64, 512]),
        num_blocks=rng.choice([30, 40, 100]),
        target_itl=rng.choice([None, 0.05]),
    )
    report = sim.run(until=2000)
    assert not sim.scheduler.has_work()
    assert all(result.last_token < float("inf") for result in report.results)
    assert sim.scheduler.batch.blocks.usage == 0
