"""`make compare`: polymoe beside vLLM (CPU), llama.cpp and transformers' `generate`; same load and machine, one table.

    one variant    `single`, one vLLM or llama.cpp process with all cores, `generate` in one batch
    all variants   `mixed:auto`, `mixed`, `per-variant` and `paper` as `polymoe bench` has them; a vLLM or llama.cpp
                   process a variant (1/N of the cores and of the load each, started together); `generate` variant
                   after variant

Systems are interleaved (A B C A B C …), so that all meet the same noise. They would not fit a computer's memory
together: each is loaded when its turn comes, runs once to warm up and once to be measured, and ends.

All get the same prompts of token ids, greedy, exactly as many tokens out, in processes of their own. vLLM and
transformers are called through their offline classes, llama.cpp through its library (`worker_llama.cpp`). polymoe is
“served”, with the load crossing from a client's process to the engine's as it does in a server, which is what a user
gets; and where it is compared with the others' offline classes a second time through its own, `LLM`.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from llama import TYPES, environment, gguf_copy, install_llama
from polymoe.bench.build import Builder
from polymoe.bench.family import SHAPES, cached_family
from polymoe.bench.load import run_closed
from polymoe.bench.report import machine_line
from polymoe.bench.systems import System
from polymoe.bench.workload import Arrival, Lengths, check_context, random_prompts, saturating_arrivals
from polymoe.cache_folder import cache_root
from polymoe.console import Console, print_error
from polymoe.errors import PolymoeError
from polymoe.machine import available_cores, describe_machine, split_cores
from polymoe.offline.checkpoint.family import parse_variant_specs
from workers import HERE, WorkerError, Workers, install_vllm

ROOT = Path(__file__).resolve().parents[2]
console = Console(width=None if sys.stdout.isatty() else 160)
OFFLINE, SERVED = "polymoe, {}", "polymoe, {}, served"
REFERENCE = SERVED.format("single")
ONE_VARIANT = ("single",)
ALL_VARIANTS = ("mixed:auto", "mixed:auto@0.55x", "mixed", "per-variant", "paper")
ALSO_OFFLINE = ("single", "mixed:auto", "mixed")


def _python(script: str) -> list[str]:
    """A worker in polymoe's own environment."""
    return [sys.executable, str(HERE / script)]


class Contestant(Protocol):
    """A system that is loaded and ended once a round. Errors are `WorkerError` or `PolymoeError`."""

    async def start(self) -> None: ...
    async def run(self, seed: int) -> float:
        """Output tokens a second of one load with prompts of `seed`."""

    async def stop(self) -> None: ...


class Comparison:
    """The load, and the systems that can take it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        root = arguments.cache or cache_root()
        if arguments.specs:
            self.checkpoints = {name: Path(path) for name, path in parse_variant_specs(arguments.specs).items()}
        else:
            with console.status("making the random family"):
                self.checkpoints = cached_family(root / "families", arguments.variants, arguments.shape)
        self.names = list(self.checkpoints)
        self.in_flight, self.repeats = arguments.requests, arguments.repeats
        if min(self.in_flight, self.repeats) < 1:
            raise PolymoeError("--requests and --repeats must be at least 1.")
        self.lengths = Lengths(arguments.input_tokens, arguments.output_tokens)
        self.builder = Builder(self.checkpoints, root / "bundles")
        bundle = self.builder.shared_bundle()
        self.vocab_size = min(v.vocab_size for v in bundle.variants)
        check_context(self.arrivals(), min(v.max_model_len for v in bundle.variants))
        self.venv: Path = arguments.venv
        self.torch_index: str | None = arguments.torch_index
        self.log: Path = arguments.out / "compare.log"
        self.llama: Path = arguments.llama
        self.only: list[str] = arguments.only or [""]
        self.missing: dict[str, str] = {}  # system -> why it is not there

    def arrivals(self) -> list[Arrival]:
        return saturating_arrivals(self.names, self.in_flight, self.lengths)

    def prompts(self, seed: int) -> list[list[int]]:
        return random_prompts(self.arrivals(), self.vocab_size, seed)

    def contestants(self) -> dict[str, Contestant]:
        """Of one variant first, then of all. Nothing is started; what is missing is planned and installed."""
        found: dict[str, Contestant] = {}
        for names, several in ((ONE_VARIANT, False), (ALL_VARIANTS, True)):
            for name in names:
                if not (self._wanted(SERVED.format(name)) or self._wanted(OFFLINE.format(name))):
                    continue
                plan = name.partition(":")[2]
                with console.status(f"planning {name}"):
                    bundle = self.builder.shared_bundle(plan)
                found[SERVED.format(name)] = Served(self, name)
                if name in ALSO_OFFLINE:
                    how = self._workers(_python("worker_polymoe.py"), [[bundle.path]], [{}])
                    found[OFFLINE.format(name)] = Offline(self, how, several)
            if self._wanted("vLLM"):
                found |= self._vllm(several)
            found |= self._llama(several)
            name = "transformers, variant after variant" if several else "transformers, one batch"
            models = [list(self.checkpoints.values())[: None if several else 1]]
            found[name] = Offline(self, self._workers(_python("worker_transformers.py"), models, [{}]), several)
        return {name: contestant for name, contestant in found.items() if self._wanted(name)}

    def _wanted(self, name: str) -> bool:
        return any(part in name for part in self.only)

    def _without(self, name: str, error: Exception) -> None:
        """Said at once: rounds take minutes."""
        self.missing[name] = str(error)
        console.print(f"{name} is missing: {error}", highlight=False)

    def _shares(self, several: bool) -> tuple[list[list[int]], str]:
        """The cores of each process of a rival that serves one model, and how the table calls them."""
        if not several:
            return [available_cores()], "one process"
        parts = split_cores(available_cores(), len(self.checkpoints))
        return parts, f"{len(parts)} processes"

    def _vllm(self, several: bool) -> dict[str, Contestant]:
        try:
            with console.status(f"installing vLLM in {self.venv.name} (some minutes, once)"):
                python = install_vllm(self.venv, ROOT, self.torch_index)
        except WorkerError as error:
            self._without("vLLM", error)
            return {}
        parts, processes = self._shares(several)
        environments = [
            {
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                # Else torch keeps a thread for every core of the machine on the few that are bound, where they
                # wait for each other: twelve times slower on one core of four.
                "OMP_NUM_THREADS": str(len(cores)),
                "VLLM_CPU_KVCACHE_SPACE": "1" if several else "2",  # GiB, far more than the load needs
            }
            for cores in parts
        ]
        models = [[path] for path in list(self.checkpoints.values())[: len(parts)]]
        workers = self._workers([str(python), str(HERE / "worker_vllm.py")], models, environments)
        return {f"vLLM, {processes}": Offline(self, workers, several)}

    def _llama(self, several: bool) -> dict[str, Contestant]:
        parts, processes = self._shares(several)
        names = {kind: f"llama.cpp {kind}, {processes}" for kind in TYPES}
        names = {kind: name for kind, name in names.items() if self._wanted(name)}
        found: dict[str, Contestant] = {}
        if not names:
            return found
        try:
            with console.status(f"installing llama.cpp in {self.llama.name} (a minute, once)"):
                worker = install_llama(self.llama)
            for kind, name in names.items():
                with console.status(f"writing {kind} copies for llama.cpp"):
                    checkpoints = list(self.checkpoints.values())[: len(parts)]
                    models = [[gguf_copy(path, kind, worker)] for path in checkpoints]
                environments = [environment(worker, cores) for cores in parts]
                workers = self._workers([str(worker)], models, environments)
                found[name] = Offline(self, workers, several)
        except WorkerError as error:
            self._without("llama.cpp", error)
        return found

    def _workers(
        self, command: Sequence[str], models: Sequence[Sequence[Path]], environments: Sequence[Mapping[str, str]]
    ) -> Workers:
        options = {
            "max_model_len": self.lengths.input_tokens + self.lengths.output_tokens,
            "max_num_seqs": self.in_flight,
        }
        return Workers(command, models, environments, options, self.log)

    async def measure(self) -> dict[str, list[float]]:
        """Output tokens a second of each system, a figure a round."""
        speeds: dict[str, list[float]] = {}
        contestants = self.contestants()
        for repeat in range(self.repeats):
            for name, contestant in contestants.items():
                if name in self.missing:
                    continue
                with console.status(f"round {repeat + 1} of {self.repeats}: {name}"):
                    try:
                        speed = await self._once(contestant, repeat)
                    except (WorkerError, PolymoeError) as error:
                        self._without(name, error)
                        speeds.pop(name, None)
                        continue
                console.print(f"round {repeat + 1}, {name}: {speed:.1f} tok/s", highlight=False)
                speeds.setdefault(name, []).append(speed)
        return speeds

    async def _once(self, contestant: Contestant, repeat: int) -> float:
        try:
            await contestant.start()
            await contestant.run(seed=self.repeats + repeat)  # the warm-up: vLLM compiles in it
            return await contestant.run(seed=repeat)
        finally:
            await contestant.stop()


class Served:
    """A system of `polymoe bench`, through its load generator."""

    def __init__(self, comparison: Comparison, name: str) -> None:
        self._comparison, self._name = comparison, name
        self._system: System | None = None

    async def start(self) -> None:
        self._system = self._comparison.builder.system(self._name)
        await self._system.start()

    async def run(self, seed: int) -> float:
        assert self._system is not None
        load = self._comparison
        run = await run_closed(self._system, load.arrivals(), load.prompts(seed), load.in_flight, lambda: None)
        return sum(len(record.token_times) for record in run.records) / run.seconds

    async def stop(self) -> None:
        if self._system is not None:
            await self._system.stop()


class Offline:
    """Processes that call an offline class. Without `several` the first model gets every prompt."""

    def __init__(self, comparison: Comparison, workers: Workers, several: bool) -> None:
        self._comparison, self._workers, self._several = comparison, workers, several

    async def start(self) -> None:
        await asyncio.to_thread(self._workers.start)

    async def run(self, seed: int) -> float:
        load = self._comparison
        variants = [load.names.index(arrival.variant) if self._several else 0 for arrival in load.arrivals()]
        prompts = list(zip(variants, load.prompts(seed), strict=True))
        return await asyncio.to_thread(self._workers.run, prompts, load.lengths.output_tokens)

    async def stop(self) -> None:
        await asyncio.to_thread(self._workers.stop)


def report(speeds: dict[str, list[float]], comparison: Comparison) -> dict[str, Any]:
    """Print a table, return what the JSON line says."""
    machine = describe_machine()
    results: dict[str, Any] = {"systems": {}, "ratios": {}, "missing": comparison.missing, "machine": machine}
    title = (
        f"{len(comparison.names)} variants, {comparison.in_flight} requests of {comparison.lengths.input_tokens} "
        f"tokens in and {comparison.lengths.output_tokens} out, medians of {comparison.repeats}"
    )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    columns = ["system", "output tok/s (min–max)"]
    if REFERENCE in medians:
        columns.append("÷ single, served")
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    markdown = [f"**{title}**", "", machine_line(machine), ""]
    markdown += [f"| {' | '.join(columns)} |", f"| --- |{' --: |' * (len(columns) - 1)}"]
    for name, values in speeds.items():
        results["systems"][name] = {
            "output_tokens_per_s": medians[name],
            "output_tokens_per_s_min": min(values),
            "output_tokens_per_s_max": max(values),
        }
        row = [name, f"{medians[name]:.1f} ({min(values):.1f}–{max(values):.1f})"]
        if REFERENCE in medians:
            row.append(f"{medians[name] / medians[REFERENCE]:.2f}")
        table.add_row(*row)
        markdown.append(f"| {' | '.join(row)} |")
    for ours, theirs in itertools.product(medians, medians):
        if ours.startswith("polymoe") and ours != theirs:
            results["ratios"][f"{ours} / {theirs}"] = medians[ours] / medians[theirs]
    console.print(table)
    for name, reason in comparison.missing.items():
        console.print(f"{name} is missing: {reason}", highlight=False)
        markdown += ["", f"{name} is missing: {reason}"]
    results["markdown"] = "\n".join(markdown) + "\n"
    return results


async def compare(comparison: Comparison) -> dict[str, Any]:
    return report(await comparison.measure(), comparison)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="NAME=PATH", help="checkpoints; default: the random family")
    parser.add_argument("--shape", choices=list(SHAPES), default="430m")
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="where families and bundles are kept; default ~/.cache/polymoe")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="vLLM's environment")
    parser.add_argument("--llama", type=Path, default=ROOT / ".llama.cpp", help="llama.cpp's folder")
    parser.add_argument("--only", action="append", metavar="TEXT", help="systems with TEXT in their names; repeatable")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for compare.json, compare.md, compare.log")
    parser.add_argument("--torch-index", help="index of vLLM's build of torch; default PyPI")
    parser.add_argument("--install", action="store_true", help="install vLLM, measure nothing")
    arguments = parser.parse_args()
    if arguments.install:
        try:
            print(install_vllm(arguments.venv, ROOT, arguments.torch_index))
        except WorkerError as error:
            print_error(Console(stderr=True), error)
            return 1
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out = arguments.out.resolve()
    (arguments.out / "compare.log").write_text("")
    try:
        results = asyncio.run(compare(Comparison(arguments)))
    except PolymoeError as error:
        print_error(Console(stderr=True), error)
        return 1
    (arguments.out / "compare.md").write_text(results.pop("markdown"), encoding="utf-8")
    (arguments.out / "compare.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return 1 if any(name.startswith("polymoe") for name in results["missing"]) else 0


if __name__ == "__main__":
    sys.exit(main())
