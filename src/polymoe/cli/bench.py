"""`polymoe bench …`: options of the benchmarks. Heavy imports wait until a command runs."""

import asyncio
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polymoe.cache_folder import VARIABLE, writable_cache
from polymoe.cli.report import Report, check_report, write_report
from polymoe.config import parse_bytes
from polymoe.console import Console
from polymoe.errors import PolymoeError

if TYPE_CHECKING:
    from polymoe.bench.build import Builder
    from polymoe.bench.report import Document

app = typer.Typer(
    name="bench", help="Measure throughput and quality of service against what one could do instead.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for the tables

Repeats = Annotated[int, typer.Option(help="runs of each system, interleaved; figures are medians")]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Common:
    """Options of every benchmark."""

    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: a random family, made once and kept"),
    ] = None
    systems: Annotated[
        str | None,
        typer.Option(
            help="comma-separated, of: mixed, single, per-variant, reconfigure, paper, swap, partition (default: all "
            "these), transformers; mixed:auto or mixed:auto@0.55x has a bundle with that policy (and --memory)"
        ),
    ] = None
    requests: Annotated[int, typer.Option(help="requests in flight when saturated")] = 32
    shape: Annotated[
        str,
        typer.Option(
            help="the random family: 430m or 110m (Mixtral), granite-1b-a400m, qwen3-128e (491M) or switch-base-8; "
            "tiny, granite-tiny, qwen3-tiny, hybrid-tiny and switch-tiny: to try the command"
        ),
    ] = "430m"
    memory: Annotated[str, typer.Option(help="expert bytes of the bundle of all variants, as for `polymoe plan`")] = (
        "1.0x"
    )
    slo_ttft: Annotated[float, typer.Option(help="a good request has its first token within this many seconds …")] = 2.0
    slo_itl: Annotated[float, typer.Option(help="… and the others this many seconds apart on average")] = 0.25
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[DTypeName, typer.Option(help="what is computed in")] = "auto"
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (`partition` splits them); default torch's")
    ] = None
    kv_cache: Annotated[str, typer.Option(help="memory for keys and values of an engine (`partition` splits it)")] = (
        "256MiB"
    )
    cache: Annotated[
        Path | None, typer.Option(envvar=VARIABLE, help="where families and bundles are kept; default ~/.cache/polymoe")
    ] = None
    out: Annotated[Path, typer.Option(help="folder for the JSON, Markdown and PNG files")] = Path()

    def chosen_systems(self) -> list[str]:
        from polymoe.bench.build import check_systems
        from polymoe.bench.systems import DEFAULT_SYSTEMS

        if self.systems is None:
            return list(DEFAULT_SYSTEMS)
        return check_systems([name.strip() for name in self.systems.split(",")])

    def slo(self) -> Any:
        from polymoe.bench.metrics import SLO

        if not (self.slo_ttft > 0 and self.slo_itl > 0):
            raise PolymoeError(
                f"--slo-ttft and --slo-itl must be positive, got {self.slo_ttft:g} and {self.slo_itl:g}."
            )
        return SLO(ttft=self.slo_ttft, itl=self.slo_itl)

    def builder(self, variants: int) -> "Builder":
        """`variants`: how many the random family has."""
        from polymoe.bench.build import Builder
        from polymoe.bench.family import SHAPES, cached_family
        from polymoe.offline.checkpoint.family import parse_variant_specs
        from polymoe.offline.checkpoint.source import resolve

        root = writable_cache(self.cache, console)
        if self.specs:
            checkpoints = {name: resolve(spec) for name, spec in parse_variant_specs(self.specs).items()}
        else:
            if self.shape not in SHAPES:
                raise PolymoeError(f"unknown shape {self.shape!r}; there are {', '.join(SHAPES)}.")
            with console.status(f"making {variants} random variants of the shape {self.shape}"):
                checkpoints = cached_family(root / "families", variants, self.shape)
        return Builder(
            checkpoints, root / "bundles", memory=self.memory, device=self.device, dtype=self.dtype,
            threads=self.threads, kv_cache_bytes=parse_bytes(self.kv_cache),
        )  # fmt: skip


def _benchmark(run: Callable[..., None]) -> None:
    """Make a command of `run`, which has options of its own and is given the `Common` ones in one record."""
    own = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.name != "common"]
    shared = list(inspect.signature(Common, eval_str=True).parameters.values())

    def command(**given: Any) -> None:
        run(Common(**{p.name: given.pop(p.name) for p in shared}), **given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared[:2], *own, *shared[2:])]
    command.__name__, command.__doc__, command.__annotations__ = run.__name__, run.__doc__, {}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command()(command)


@_benchmark
def throughput(
    common: Common,
    total: Annotated[int | None, typer.Option(help="requests of a run; default: as many as are in flight")] = None,
    input_tokens: Annotated[int, typer.Option()] = 64,
    output_tokens: Annotated[int, typer.Option()] = 64,
    repeats: Repeats = 5,
    variants: Annotated[
        str, typer.Option(help="variants of the random family; several numbers (1,4,16,64) measure how speed grows")
    ] = "4",
    report: Report = None,
) -> None:
    """Saturated: as many requests in flight as told, all systems in turn, tokens a second and latencies."""
    from polymoe.bench.growth import Growth, run_growth
    from polymoe.bench.plots import growth_plot, throughput_plot
    from polymoe.bench.report import growth_report, throughput_report
    from polymoe.bench.session import output_folder
    from polymoe.bench.throughput import ThroughputPlan, run_throughput
    from polymoe.bench.workload import Lengths

    counts = _counts(variants)
    if len(counts) > 1 and common.specs:
        raise PolymoeError("--variants with several numbers makes random families; leave out NAME=PATH.")
    if len(counts) > 1 and common.systems is None:
        common = replace(common, systems="mixed:auto")
    plan = ThroughputPlan(
        systems=common.chosen_systems(), lengths=Lengths(input_tokens, output_tokens), in_flight=common.requests,
        total=common.requests if total is None else total, repeats=repeats, seed=common.seed, slo=common.slo(),
    )  # fmt: skip
    check_report(report)
    folder = output_folder(common.out)  # before hours of work
    builders = {count: common.builder(count) for count in counts}
    if len(counts) > 1:
        results = asyncio.run(run_growth(Growth(plan, builders), console))
        growth_plot(results["points"], folder / "growth.png")
        _finish(growth_report(results), results, folder / "growth", report)
        return
    builder = builders[counts[0]]
    results = asyncio.run(run_throughput(plan, builder, console))
    throughput_plot(results, folder / "throughput.png")
    _finish(throughput_report(results), results, folder / "throughput", report)


@_benchmark
def qos(
    common: Common,
    rates: Annotated[
        str | None,
        typer.Option(help="requests a second of each variant, comma-separated; default: 1/4 to 1 of what single can"),
    ] = None,
    lengths: Annotated[str, typer.Option(help="tokens IN:OUT, comma-separated")] = "20:25",
    duration: Annotated[float, typer.Option(help="seconds in which requests arrive")] = 30.0,
    drain: Annotated[float, typer.Option(help="seconds to wait after that; what is not done is given up")] = 60.0,
    trace: Annotated[
        Path | None, typer.Option(help='JSON lines {"at", "variant", "input_tokens", "output_tokens"} to replay')
    ] = None,
    flood: Annotated[
        str | None, typer.Option(metavar="VARIANT=FACTOR", help="again with one variant's rate times FACTOR")
    ] = None,
    repeats: Repeats = 3,
    variants: Annotated[int, typer.Option(min=1, help="variants of the random family")] = 4,
    report: Report = None,
) -> None:
    """Open loop: Poisson arrivals for each variant, or a trace; latencies and goodput at each rate."""
    from polymoe.bench.plots import latency_plot, rate_plot
    from polymoe.bench.qos import QosPlan, run_qos
    from polymoe.bench.report import qos_report
    from polymoe.bench.session import output_folder

    plan = QosPlan(
        systems=common.chosen_systems(), lengths=[_lengths(text) for text in lengths.split(",")],
        rates=None if rates is None else [_number(text, "--rates") for text in rates.split(",")],
        duration=duration, drain=drain, repeats=repeats, in_flight=common.requests, seed=common.seed, slo=common.slo(),
        trace=trace, flood=None if flood is None else _flood(flood),
    )  # fmt: skip
    check_report(report)
    folder = output_folder(common.out)  # before hours of work
    builder = common.builder(variants)
    results = asyncio.run(run_qos(plan, builder, console))
    if trace is None:
        rate_plot(results["rates"], folder / "qos-throughput.png")
    latency_plot(results["rates"], folder / "qos-latency.png")
    _finish(qos_report(results), results, folder / "qos", report)


def _finish(document: "Document", results: dict[str, Any], stem: Path, report: Path | None) -> None:
    """Write the page that was asked for, then print the results and keep them as files `stem`.*."""
    from polymoe.bench.report import finish

    if report is not None:
        write_report(report, document.title, document.sections, console)
    finish(document, results, stem, console)


def _counts(text: str) -> list[int]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in counts):
        raise PolymoeError(f"--variants {text!r}: write a positive number, or several: 1,4,16,64.")
    return list(dict.fromkeys(int(part) for part in counts))


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PolymoeError(f"{option} {text!r} is not a number.") from error


def _lengths(text: str) -> Any:
    from polymoe.bench.workload import Lengths

    first, colon, second = text.strip().partition(":")
    if not (colon and first.isdecimal() and second.isdecimal()):
        raise PolymoeError(f"--lengths {text!r}: write IN:OUT in tokens, for example 20:25.")
    return Lengths(int(first), int(second))


def _flood(text: str) -> tuple[str, float]:
    variant, equals, factor = text.partition("=")
    if not equals or not variant:
        raise PolymoeError(f"--flood {text!r}: write VARIANT=FACTOR.")
    return variant, _number(factor, "--flood")
