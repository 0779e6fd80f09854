"""`make compare`: polymoe beside vLLM (CPU) and transformers' `generate`, same load, same machine, one run.

Two groups, each loaded together and interleaved (A B C A B C …), so that a ratio is of systems that met the same noise:

    one model      polymoe `single`, one vLLM process with all cores, `generate` in one batch
    all variants   polymoe `mixed`, a vLLM process a variant (1/N of the cores and of the load each, started together),
                   `generate` variant after variant

All get the same prompts of token ids, greedy, exactly as many tokens out, through their offline calls, in processes
of their own. polymoe comes a second time as `bench throughput` measures it, through its load generator and its engine's
process: what a server adds.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.table import Table

from polymoe.bench.build import Builder
from polymoe.bench.family import SHAPES, cached_family
from polymoe.bench.load import run_closed
from polymoe.bench.workload import Arrival, Lengths, check_context, random_prompts, saturating_arrivals
from polymoe.cache_folder import cache_root
from polymoe.console import Console, print_error
from polymoe.errors import PolymoeError
from polymoe.machine import available_cores, describe_machine, split_cores
from polymoe.offline.family import parse_variant_specs
from workers import WorkerError, Workers, install_vllm

ROOT = Path(__file__).resolve().parents[2]
console = Console(width=None if sys.stdout.isatty() else 160)
Measure = Callable[[int], Awaitable[float]]  # repeat -> output tokens a second


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
        self.bundle = bundle = self.builder.shared_bundle()
        self.vocab_size = min(v.vocab_size for v in bundle.variants)
        check_context(self.arrivals(), min(v.max_model_len for v in bundle.variants))
        self.venv: Path = arguments.venv
        self.log: Path = arguments.out / "compare.log"
        self.missing: dict[str, str] = {}  # system -> why it is not there

    def arrivals(self) -> list[Arrival]:
        return saturating_arrivals(self.names, self.in_flight, self.lengths)

    def offline(self, ours: str, per_variant: bool) -> dict[str, Workers]:
        """polymoe first, then the others; not started yet."""
        paths = list(self.checkpoints.values())
        options = {
            "max_model_len": self.lengths.input_tokens + self.lengths.output_tokens,
            "max_num_seqs": self.in_flight,
        }
        models = [[self.bundle.path]]
        found = {ours: Workers(Path(sys.executable), "worker_polymoe.py", models, [{}], options, self.log)}
        try:
            with console.status(f"installing vLLM in {self.venv.name} (some minutes, once)"):
                python = install_vllm(self.venv, ROOT)
            parts = split_cores(available_cores(), len(paths)) if per_variant else [available_cores()]
            environments = [
                {
                    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                    # Else torch keeps a thread for every core of the machine on the few that are bound, where they
                    # wait for each other: twelve times slower on one core of four.
                    "OMP_NUM_THREADS": str(len(cores)),
                    "VLLM_CPU_KVCACHE_SPACE": "1" if per_variant else "2",  # GiB, far more than the load needs
                }
                for cores in parts
            ]
            models = [[path] for path in paths[: len(parts)]]
            found[f"vLLM, {len(parts)} processes" if per_variant else "vLLM, one process"] = Workers(
                python, "worker_vllm.py", models, environments, options, self.log
            )
        except WorkerError as error:
            self.missing["vLLM"] = str(error)
        models = [paths] if per_variant else [paths[:1]]
        name = "transformers, variant after variant" if per_variant else "transformers, one batch"
        found[name] = Workers(Path(sys.executable), "worker_transformers.py", models, [{}], options, self.log)
        return found

    async def group(self, name: str, per_variant: bool) -> dict[str, list[float]]:
        """Output tokens a second of each system of a group, a figure a repeat; polymoe's first."""
        system, ours = self.builder.system(name), f"polymoe, {name}"
        offline = self.offline(ours, per_variant)
        measures: dict[str, Measure] = {}
        try:
            for name, workers in offline.items():
                with console.status(f"loading {name}"):
                    try:
                        seconds = workers.start()
                    except WorkerError as error:
                        self.missing[name] = str(error)
                        workers.stop()
                    else:
                        console.print(f"{name}: loaded in {seconds:.0f} s", highlight=False)
                        measures[name] = lambda repeat, workers=workers: self._offline(workers, repeat, per_variant)
            with console.status(f"loading {ours}, served"):
                await system.start()
            measures[f"{ours}, served"] = lambda repeat: self._served(system, repeat)
            speeds = await self._interleave(measures)
            if ours not in speeds:
                raise PolymoeError(f"{ours}: {self.missing[ours]}")
            return speeds
        finally:
            await system.stop()
            for workers in offline.values():
                workers.stop()

    async def _interleave(self, measures: dict[str, Measure]) -> dict[str, list[float]]:
        speeds: dict[str, list[float]] = {}
        for repeat in range(-1, self.repeats):  # the first is a warm-up: others compile at first use
            for name, measure in measures.items():
                if name in self.missing:
                    continue
                with console.status(f"{name}, {'warm-up' if repeat < 0 else f'run {repeat + 1}'}"):
                    try:
                        speed = await measure(repeat)
                    except WorkerError as error:
                        self.missing[name] = str(error)
                        speeds.pop(name, None)
                        continue
                what = "warm-up" if repeat < 0 else f"run {repeat + 1}"
                console.print(f"{name}, {what}: {speed:.1f} tok/s", highlight=False)
                if repeat >= 0:
                    speeds.setdefault(name, []).append(speed)
        return speeds

    async def _served(self, system, repeat: int) -> float:
        arrivals = self.arrivals()
        prompts = random_prompts(arrivals, self.vocab_size, repeat)
        run = await run_closed(system, arrivals, prompts, self.in_flight, lambda: None)
        return sum(len(record.token_times) for record in run.records) / run.seconds

    async def _offline(self, workers: Workers, repeat: int, per_variant: bool) -> float:
        arrivals = self.arrivals()
        prompts = random_prompts(arrivals, self.vocab_size, repeat)
        variants = [self.names.index(a.variant) if per_variant else 0 for a in arrivals]
        return await asyncio.to_thread(
            workers.run, list(zip(variants, prompts, strict=True)), self.lengths.output_tokens
        )


def report(one: dict[str, list[float]], all_variants: dict[str, list[float]], comparison: Comparison) -> dict:
    """Print a table, return what the JSON line says."""
    results: dict = {"systems": {}, "ratios": {}, "missing": comparison.missing, "machine": describe_machine()}
    title = (
        f"{len(comparison.names)} variants, {comparison.in_flight} requests of {comparison.lengths.input_tokens} "
        f"tokens in and {comparison.lengths.output_tokens} out, medians of {comparison.repeats}"
    )
    table = Table("system", title=title, title_justify="left")
    table.add_column("output tok/s (min–max)", justify="right")
    table.add_column("polymoe ÷ it", justify="right")
    markdown = [f"**{title}**", "", "| system | output tok/s (min–max) | polymoe ÷ it |", "| --- | --: | --: |"]
    for speeds in (one, all_variants):
        ours = next(iter(speeds))
        for name, values in speeds.items():
            median = statistics.median(values)
            ratio = statistics.median(speeds[ours]) / median
            results["systems"][name] = {
                "output_tokens_per_s": median,
                "output_tokens_per_s_min": min(values),
                "output_tokens_per_s_max": max(values),
            }
            if name != ours:
                results["ratios"][f"{ours} / {name}"] = ratio
            row = [name, f"{median:.1f} ({min(values):.1f}–{max(values):.1f})", "" if name == ours else f"{ratio:.2f}"]
            table.add_row(*row)
            markdown.append(f"| {' | '.join(row)} |")
        table.add_section()
    console.print(table)
    for name, reason in comparison.missing.items():
        console.print(f"{name} is missing: {reason}", highlight=False)
        markdown += ["", f"{name} is missing: {reason}"]
    results["markdown"] = "\n".join(markdown) + "\n"
    return results


async def compare(comparison: Comparison) -> dict:
    one = await comparison.group("single", per_variant=False)
    all_variants = await comparison.group("mixed", per_variant=True)
    return report(one, all_variants, comparison)


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
    parser.add_argument("--out", type=Path, default=Path(), help="folder for compare.json, compare.md, compare.log")
    arguments = parser.parse_args()
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
