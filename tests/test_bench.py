"""The benchmarks: their arithmetic, their errors, and whole runs on a tiny random family through real engines."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from polymoe.bench.build import check_systems
from polymoe.bench.ceiling import expected_bytes
from polymoe.bench.load import Record, Run, run_closed, run_open
from polymoe.bench.metrics import SLO, Distribution, is_good, median_of, spread_of, summarise
from polymoe.bench.swap import SwapSystem
from polymoe.bench.systems import Counters
from polymoe.bench.workload import (
    Arrival,
    Lengths,
    check_context,
    poisson_arrivals,
    random_prompts,
    read_trace,
    saturating_arrivals,
    zipf_arrivals,
)
from polymoe.cli.main import app
from polymoe.config import EngineConfig
from polymoe.errors import PolymoeError
from polymoe.machine import split_cores

LENGTHS = Lengths(20, 25)


# --- workloads


def test_poisson_arrivals_have_their_rate_and_independent_gaps() -> None:
    arrivals = poisson_arrivals({"a": 5.0, "b": 1.0}, 2000.0, LENGTHS, seed=1)
    assert [x.at for x in arrivals] == sorted(x.at for x in arrivals)
    for variant, rate in (("a", 5.0), ("b", 1.0)):
        times = np.array([x.at for x in arrivals if x.variant == variant])
        gaps = np.diff(times)
        assert len(times) == pytest.approx(rate * 2000, rel=0.08)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential: as wide as its mean
    assert arrivals == poisson_arrivals({"a": 5.0, "b": 1.0}, 2000.0, LENGTHS, seed=1)
    assert arrivals != poisson_arrivals({"a": 5.0, "b": 1.0}, 2000.0, LENGTHS, seed=2)


def test_a_flood_leaves_the_other_variants_arrivals_as_they_were() -> None:
    rates = {"a": 1.0, "b": 1.0}
    calm = poisson_arrivals(rates, 200.0, LENGTHS, seed=0)
    flood = poisson_arrivals(rates, 200.0, LENGTHS, seed=0, burst={"a": 10.0})
    assert [x for x in calm if x.variant == "b"] == [x for x in flood if x.variant == "b"]
    assert sum(x.variant == "a" for x in flood) > 7 * sum(x.variant == "a" for x in calm)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_factors_and_durations_must_be_positive(bad: float) -> None:
    for rates, duration, burst in (({"a": bad}, 1.0, None), ({"a": 1.0}, bad, None), ({"a": 1.0}, 1.0, {"a": bad})):
        if duration == float("inf"):
            continue
        with pytest.raises(PolymoeError):
            poisson_arrivals(rates, duration, LENGTHS, 0, burst)


def test_saturating_load_takes_the_variants_in_turn() -> None:
    assert [x.variant for x in saturating_arrivals(["a", "b"], 5, LENGTHS)] == ["a", "b", "a", "b", "a"]


def test_prompts_differ_between_seeds_and_requests() -> None:
    arrivals = saturating_arrivals(["a"], 3, LENGTHS)
    prompts = random_prompts(arrivals, 512, seed=0)
    assert [len(p) for p in prompts] == [20, 20, 20]
    assert len({tuple(p) for p in prompts + random_prompts(arrivals, 512, seed=1)}) == 6
    assert prompts == random_prompts(arrivals, 512, seed=0)


def line(**fields: Any) -> str:
    return json.dumps({"at": 0.5, "variant": "a", "input_tokens": 3, "output_tokens": 2} | fields)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line(at=2) + "\n\n" + line(at=0.25, variant="b") + "\n")
    assert read_trace(path, ["a", "b"]) == [Arrival(0.25, "b", 3, 2), Arrival(2.0, "a", 3, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "\n{oops", "line 2"),
        (line() + "\n" + line(weight=1), "line 2.*weight"),
        (line(input_tokens="3"), "line 1.*input_tokens"),
        (line(output_tokens=0), "line 1.*at least one"),
        (line(at=-1), "line 1.*at"),
        (line(variant="c"), "line 1.*no variant 'c'"),
        ("\n\n", "empty"),
    ],
)
def test_a_trace_that_cannot_be_used_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(PolymoeError, match=message):
        read_trace(path, ["a", "b"])


def test_what_does_not_fit_the_context_is_refused() -> None:
    check_context([Arrival(0, "a", 30, 34)], 64)
    with pytest.raises(PolymoeError, match="context of 64"):
        check_context([Arrival(0, "a", 30, 35)], 64)


# --- figures


def test_percentiles() -> None:
    values = [float(x) for x in range(101)]
    assert Distribution.of(values[::-1]) == Distribution(50.0, 50.0, 95.0, 99.0)
    assert Distribution.of([2.0]) == Distribution(2.0, 2.0, 2.0, 2.0)
    assert Distribution.of([]) == Distribution(None, None, None, None)


def test_latencies_count_from_when_a_request_was_due() -> None:
    """A generator that falls behind must not make a system look better (coordinated omission)."""
    late = Record("a", due=1.0, sent=3.0, token_times=[4.0, 5.0, 7.0], finished=True)
    given_up = Record("a", due=2.0, sent=2.0)
    summary = summarise(Run([late, given_up], seconds=6.0, ended=9.0), Counters(), SLO(ttft=3.0, itl=1.5))
    assert summary.ttft_s.mean == (3.0 + 7.0) / 2
    assert summary.turnaround_s.mean == (6.0 + 7.0) / 2
    assert summary.itl_s.mean == 1.5
    assert (summary.late_sends, summary.max_late_s, summary.unfinished) == (1, 2.0, 1)
    assert summary.output_tokens_per_s == 2 / 6.0  # the third came after the window
    assert summary.requests_per_min == 0.0
    assert summary.good_share == 0.5


def test_goodput_needs_both_limits_and_the_end() -> None:
    record = Record("a", due=0.0, token_times=[1.0, 1.5, 3.0], finished=True)
    assert is_good(record, SLO(ttft=1.0, itl=1.0))
    assert not is_good(record, SLO(ttft=0.9, itl=1.0))
    assert not is_good(record, SLO(ttft=1.0, itl=0.9))
    assert is_good(Record("a", due=0.0, token_times=[1.0], finished=True), SLO(ttft=1.0, itl=0.1))
    assert not is_good(Record("a", due=0.0, token_times=[1.0, 1.5]), SLO(ttft=1.0, itl=1.0))


def test_medians_of_runs_with_their_spread() -> None:
    def run_of(speed: int) -> Run:
        return Run([Record("a", 0.0, 0.0, [1.0] * speed, True)], seconds=1.0, ended=1.0)

    result = spread_of([summarise(run_of(s), Counters(), SLO(1.0, 1.0)) for s in (3, 1, 2)])
    assert (result["output_tokens_per_s"], result["output_tokens_per_s_min"], result["output_tokens_per_s_max"]) == (
        2.0,
        1.0,
        3.0,
    )
    assert result["peak_rss_bytes"] is None
    assert median_of([{"a": {"b": None}}, {"a": {"b": 4.0}}]) == {"a": {"b": 4.0}}


def test_counters_are_of_one_run_but_the_peak_stays() -> None:
    before, after = Counters(expert_hits=3, peak_rss_bytes=10), Counters(expert_hits=5, peak_rss_bytes=20)
    assert after.since(before) == Counters(expert_hits=2, peak_rss_bytes=20)
    assert before + after == Counters(expert_hits=8, peak_rss_bytes=30)


def test_expected_bytes_of_experts_that_a_step_touches() -> None:
    shared = [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]  # two variants share the four experts of one layer
    separate = [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    alike = [[1.0] * 8]
    assert expected_bytes(shared, alike, {0: 1}, 0.5) == 2.0
    assert expected_bytes(shared, alike, {0: 1, 1: 1}, 0.5) == 3.0
    assert expected_bytes(separate, alike, {0: 1, 1: 1}, 0.5) == 4.0
    assert expected_bytes(shared, alike, {0: 500, 1: 500}, 0.5) == pytest.approx(4.0)
    packed, absent = [2.0, 0.5, 0.5, 0.5], 10.0
    assert expected_bytes([[[0, 1, -1, -2]]], [[*packed, absent]], {0: 500}, 0.5) == pytest.approx(22.5)


def test_cores_are_split_into_equal_parts() -> None:
    assert split_cores([0, 1, 2, 3, 4, 5, 6, 7], 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert split_cores([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert split_cores([4, 5], 3) == [[4], [5], [4]]


# --- the load generator and time sharing, on systems without engines


class Steady:
    """A system that needs `step` seconds a token, and knows how many requests it had at once."""

    def __init__(self, step: float) -> None:
        self.step, self.now, self.most, self.ended = step, 0, 0, 0

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.ended += 1

    async def generate(self, _variant: str, _prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(output_tokens):
                await asyncio.sleep(self.step)
                yield 1
        finally:
            self.now -= 1

    async def counters(self) -> Counters:
        return Counters()


def test_a_closed_loop_keeps_its_number_in_flight() -> None:
    system = Steady(0.001)
    arrivals = saturating_arrivals(["a"], 12, Lengths(1, 3))
    run = asyncio.run(run_closed(system, arrivals, [[1]] * 12, 4, lambda: None))
    assert (system.most, system.now) == (4, 0)
    assert all(r.finished and len(r.token_times) == 3 for r in run.records)
    assert run.records[-1].due > run.records[0].due


def test_an_open_loop_sends_on_time_and_gives_up_at_the_end() -> None:
    system = Steady(0.05)
    arrivals = [Arrival(0.0, "a", 1, 2), Arrival(0.1, "a", 1, 1000)]
    run = asyncio.run(run_open(system, arrivals, [[1], [1]], 0.2, 0.2, lambda: None))
    assert run.records[0].finished
    assert not run.records[1].finished
    assert run.records[1].sent == pytest.approx(0.1, abs=0.05)
    assert run.ended == pytest.approx(0.4, abs=0.1)
    assert system.now == 0  # nothing goes on in the system afterwards


def test_swap_drains_and_turns_to_the_oldest_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    class Engine(Steady):
        def __init__(self, config: EngineConfig, module: str) -> None:
            del module
            super().__init__(0.001)
            loads.append(config.bundle)

    monkeypatch.setattr("polymoe.bench.swap.EngineSystem", Engine)
    configs = {name: EngineConfig(bundle=name) for name in "abc"}
    swap = SwapSystem(configs, dict.fromkeys("abc", 7))
    order: list[str] = []

    async def one(variant: str) -> None:
        async for _ in swap.generate(variant, [1], 3):
            pass
        order.append(variant)

    async def main() -> Counters:
        await swap.start()
        await asyncio.gather(*(one(v) for v in "aacbab"))
        gone = asyncio.create_task(one("c"))
        await asyncio.sleep(0)
        gone.cancel()  # given up while it waits for its turn
        await asyncio.gather(gone, return_exceptions=True)
        await asyncio.wait_for(one("b"), 5)
        counters = await swap.counters()
        await swap.stop()
        return counters

    counters = asyncio.run(main())
    assert order[:6] == ["a", "a", "c", "b", "b", "a"]  # the third a waited: others were there before it
    assert loads[:4] == ["a", "c", "b", "a"]
    assert counters.model_loads == len(loads) - 1
    assert counters.host_bytes == 7 * counters.model_loads


# --- the commands


def bench(*arguments: str, cache: Path, out: Path) -> Result:
    options = ["--shape", "tiny", "--threads", "1", "--cache", str(cache), "--out", str(out)]
    return CliRunner().invoke(app, ["bench", *arguments, *options])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


FIGURES = {"output_tokens_per_s", "requests_per_min", "ttft_s", "itl_s", "turnaround_s", "good_share", "host_bytes"}


def test_throughput_of_three_systems(cache: Path, tmp_path: Path) -> None:
    result = bench(
        "throughput", "--systems", "single,mixed,paper", "--repeats", "1", "--requests", "8", "--output-tokens", "8",
        cache=cache, out=tmp_path,
    )  # fmt: skip
    assert result.exception is None, result.exception
    answer = json.loads(result.stdout.splitlines()[-1])
    assert list(answer["systems"]) == ["single", "mixed", "paper"]
    for system in answer["systems"].values():
        assert set(system) >= FIGURES
        assert set(system["ttft_s"]) == {"mean", "p50", "p95", "p99"}
        assert system["output_tokens_per_s"] > 0
        assert system["unfinished"] == 0
    assert answer["systems"]["mixed"]["reconfigurations"] == 0
    assert answer["systems"]["paper"]["reconfigurations"] >= 3  # one slot, four variants
    assert 0 < answer["ceiling"]["systems"]["mixed"]["share_reached"] < 1
    share = answer["ceiling"]["systems"]["mixed"]["bandwidth_share"]
    # On busy cores a client reads several of such short steps at once: then the median time between tokens is 0.
    assert 0 < share < 1 if answer["systems"]["mixed"]["itl_s"]["p50"] else share is None
    assert answer["ceiling"]["systems"]["single"]["ttft_over_matmul"] > 0
    assert answer["ceiling"]["memory_bandwidth_bytes_per_s"] > 1e9
    assert answer["ceiling"]["matmul_products_per_s"] > 1e9
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "throughput.json").read_text()) == answer
    assert "| mixed |" in (tmp_path / "throughput.md").read_text()


def test_throughput_as_variants_grow(cache: Path, tmp_path: Path) -> None:
    result = bench(
        "throughput", "--variants", "1,3", "--repeats", "1", "--requests", "6", "--input-tokens", "8",
        "--output-tokens", "4", cache=cache, out=tmp_path,
    )  # fmt: skip
    assert result.exception is None, result.exception
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [(point["variants"], point["system"]) for point in answer["points"]] == [
        (1, "mixed:auto"), (3, "mixed:auto"),
    ]  # fmt: skip
    for point in answer["points"]:
        assert point["start_s"] > 0
        for load in ("even", "zipf"):
            assert point[load]["output_tokens_per_s"] > 0
            assert point[load]["unfinished"] == 0
    one, three = answer["points"]
    assert three["device_bytes"] > one["device_bytes"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| 3, mixed:auto |" in (tmp_path / "growth.md").read_text()


def test_zipf_gives_the_first_variants_most() -> None:
    arrivals = zipf_arrivals(["a", "b", "c"], 6000, Lengths(1, 1), seed=0)
    counts = Counter(arrival.variant for arrival in arrivals)
    assert [round(counts[v] / 6000 * 11 / 6, 1) for v in "abc"] == [1.0, 0.5, 0.3]


def test_qos_at_two_rates(cache: Path, tmp_path: Path) -> None:
    result = bench(
        "qos", "--systems", "mixed,reconfigure", "--rates", "4,8", "--duration", "1", "--repeats", "1",
        "--requests", "4", "--lengths", "20:5", "--flood", "v1=4", cache=cache, out=tmp_path,
    )  # fmt: skip
    assert result.exception is None, result.exception
    assert "Late sends" in result.stdout
    answer = json.loads(result.stdout.splitlines()[-1])
    assert [point["rate_per_variant"] for point in answer["rates"]] == [4.0, 8.0]
    for point in answer["rates"]:
        assert set(point["systems"]) == {"mixed", "reconfigure"}
        assert all(set(system) >= FIGURES and system["requests"] > 0 for system in point["systems"].values())
        assert point["flood"]["others_ttft_s"]["mixed"]["p95_ratio"] > 0
    assert answer["rates"][1]["systems"]["reconfigure"]["reconfigurations"] > 0
    for name in ("qos-throughput.png", "qos-latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--systems", "mixed,magic"], "unknown system magic"),
        (["throughput", "--systems", "mixed:magic"], "unknown policy 'magic'"),
        (["throughput", "--systems", "mixed:auto@little"], "not a memory budget"),
        (["throughput", "--systems", "swap:auto"], "bundles of its own"),
        (["throughput", "--requests", "0"], "--requests"),
        (["throughput", "--variants", "1,no"], "write a positive number"),
        (["throughput", "--variants", "1,2", "v0=somewhere"], "leave out NAME=PATH"),
        (["throughput", "--input-tokens", "500", "--output-tokens", "20"], "context of 512"),
        (["qos", "--rates", "1,0"], "positive"),
        (["qos", "--flood", "v0=0"], "positive"),
        (["qos", "--trace", "nowhere"], "cannot be read"),
    ],
)
def test_wrong_options_are_one_message(arguments: list[str], message: str, cache: Path, tmp_path: Path) -> None:
    result = bench(*arguments, cache=cache, out=tmp_path)
    assert isinstance(result.exception, PolymoeError)
    assert message in str(result.exception)


def test_systems_are_named_once() -> None:
    assert check_systems(["mixed", "single", "mixed"]) == ["mixed", "single"]
    assert check_systems(["mixed:auto@0.55x", "single:delta"]) == ["mixed:auto@0.55x", "single:delta"]
