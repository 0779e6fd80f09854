"""What every benchmark shares: all systems loaded side by side, warmed up, and counted run by run."""

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from polymoe.bench.load import Run, run_closed
from polymoe.bench.metrics import SLO, Summary, summarise
from polymoe.bench.systems import EngineSystem, System
from polymoe.bench.workload import Lengths, random_prompts, saturating_arrivals
from polymoe.bundle.atomic import check_can_write
from polymoe.console import Console, DescriptionColumn

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Session:
    """Systems that run, and how their runs are judged."""

    systems: Mapping[str, System]
    variants: list[str]
    vocab_size: int
    slo: SLO
    console: Console

    async def measure(self, name: str, run: Callable[[System], Coroutine[Any, Any, Run]]) -> tuple[Run, Summary]:
        """One run of one system and its figures."""
        system = self.systems[name]
        before = await system.counters()
        done = await run(system)
        return done, summarise(done, (await system.counters()).since(before), self.slo)

    async def warm_up(self, name: str, in_flight: int, lengths: Lengths) -> None:
        """Some tokens at the batch size to come, so that no run pays for first uses."""
        short = Lengths(lengths.input_tokens, min(lengths.output_tokens, _WARM_UP_TOKENS))
        variants = self.variants[:1] if name == "swap" else self.variants  # else it would load them all
        count = len(variants) if name == "paper" else in_flight  # its batches have one size only
        arrivals = saturating_arrivals(variants, count, short)
        prompts = random_prompts(arrivals, self.vocab_size, seed=-1)
        await run_closed(self.systems[name], arrivals, prompts, in_flight, lambda: None)

    async def kv_bytes_per_token(self) -> float | None:
        """Of an engine that serves all variants; None when none of them runs."""
        for system in self.systems.values():
            if isinstance(system, EngineSystem):
                return await system.kv_bytes_per_token()
        return None


@contextlib.asynccontextmanager
async def started(systems: Mapping[str, System], console: Console) -> AsyncIterator[None]:
    """Start all systems; end all their processes whatever happens."""
    try:
        for name, system in systems.items():
            with console.status(f"loading {name}"):
                await system.start()
        yield
    finally:
        for system in systems.values():
            await system.stop()


def run_progress(console: Console) -> Progress:
    """One bar over the requests of a run, one over the runs."""
    return Progress(
        DescriptionColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip


def output_folder(out: Path) -> Path:
    """`out`, made if it is missing. Raises `PlanError` now rather than after hours where it cannot be written."""
    check_can_write(out / "results.json")
    out.mkdir(parents=True, exist_ok=True)
    return out


def ratios_to(base: str, figures: Mapping[str, float]) -> dict[str, float]:
    """System -> its figure over the base's, where the base was measured."""
    return {name: value / figures[base] for name, value in figures.items()} if figures.get(base) else {}


def interleaved(names: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """A B C A B C …: the noise of the machine hits all systems alike."""
    return [(repeat, name) for repeat in range(repeats) for name in names]
