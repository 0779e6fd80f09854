"""`polymoe bench …`: options of the benchmarks. Heavy imports wait until a command runs."""

import asyncio
import sys
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

app = typer.Typer(
    name="bench", help="Measure throughput and quality of service against what one could do instead.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room for the tables

Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: a random family, made once and kept"),
]
Shape = Annotated[
    str,
    typer.Option(
        help="the random family: 430m or 110m (Mixtral), granite-1b-a400m, qwen3-128e (491M) or switch-base-8; tiny, "
        "granite-tiny, qwen3-tiny and switch-tiny: to try the command"
    ),
]
Variants = Annotated[int, typer.Option(min=1, help="variants of the random family")]
Systems = Annotated[
    str | None,
    typer.Option(
        help="comma-separated, of: mixed, single, per-variant, reconfigure, paper, swap, partition (default: all "
        "these), transformers; mixed:auto or mixed:auto@0.55x has a bundle with that policy (and --memory)"
    ),
]
Memory = Annotated[str, typer.Option(help="expert bytes of the bundle of all variants, as for `polymoe plan`")]
Repeats = Annotated[int, typer.Option(help="runs of each system, interleaved; figures are medians")]
InFlight = Annotated[int, typer.Option("--requests", help="requests in flight when saturated")]
Seed = Annotated[int, typer.Option(help="of prompts and arrivals")]
SloTtft = Annotated[float, typer.Option(help="a good request has its first token within this many seconds …")]
SloItl = Annotated[float, typer.Option(help="… and the others this many seconds apart on average")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DType = Annotated[DTypeName, typer.Option(help="what is computed in")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (`partition` splits them); default torch's")]
KVCache = Annotated[str, typer.Option(help="memory for keys and values of an engine (`partition` splits it)")]
Cache = Annotated[
    Path | None, typer.Option(envvar=VARIABLE, help="where families and bundles are kept; default ~/.cache/polymoe")
]
Out = Annotated[Path, typer.Option(help="folder for the JSON, Markdown and PNG files")]


@app.command()
def throughput(
    specs: Specs = None,
    systems: Systems = None,
    requests: InFlight = 32,
    total: Annotated[int | None, typer.Option(help="requests of a run; default: as many as are in flight")] = None,
    input_tokens: Annotated[int, typer.Option()] = 64,
    output_tokens: Annotated[int, typer.Option()] = 64,
    repeats: Repeats = 5,
    shape: Shape = "430m",
    variants: Annotated[
        str, typer.Option(help="variants of the random family; several numbers (1,4,16,64) measure how speed grows")
    ] = "4",
    memory: Memory = "1.0x",
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.25,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = None,
    kv_cache: KVCache = "256MiB",
    cache: Cache = None,
    out: Out = Path(),
    report: Report = None,
) -> None:
    """Saturated: as many requests in flight as told, all systems in turn, tokens a second and latencies."""
    from polymoe.bench.growth import Growth, run_growth
    from polymoe.bench.plots import growth_plot, throughput_plot
    from polymoe.bench.report import finish, growth_report, throughput_report
    from polymoe.bench.session import output_folder
    from polymoe.bench.throughput import ThroughputPlan, run_throughput
    from polymoe.bench.workload import Lengths

    counts = _counts(variants)
    if len(counts) > 1 and specs:
        raise PolymoeError("--variants with several numbers makes random families; leave out NAME=PATH.")
    if len(counts) > 1 and systems is None:
        systems = "mixed:auto"
    plan = ThroughputPlan(
        systems=_systems(systems), lengths=Lengths(input_tokens, output_tokens), in_flight=requests,
        total=requests if total is None else total, repeats=repeats, seed=seed, slo=_slo(slo_ttft, slo_itl),
    )  # fmt: skip
    check_report(report)
    folder = output_folder(out)  # before hours of work
    builders = {
        count: _builder(specs, shape, count, cache, memory, device, dtype, threads, kv_cache) for count in counts
    }
    if len(counts) > 1:
        results = asyncio.run(run_growth(Growth(plan, builders), console))
        growth_plot(results["points"], folder / "growth.png")
        finish(growth_report(results), results, folder / "growth", console)
        return
    builder = builders[counts[0]]
    results = asyncio.run(run_throughput(plan, builder, console))
    throughput_plot(results, folder / "throughput.png")
    document = throughput_report(results)
    if report is not None:
        write_report(report, document.title, document.sections, console)
    finish(document, results, folder / "throughput", console)


@app.command()
def qos(
    specs: Specs = None,
    systems: Systems = None,
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
    requests: InFlight = 32,
    repeats: Repeats = 3,
    shape: Shape = "430m",
    variants: Variants = 4,
    memory: Memory = "1.0x",
    slo_ttft: SloTtft = 2.0,
    slo_itl: SloItl = 0.25,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = None,
    kv_cache: KVCache = "256MiB",
    cache: Cache = None,
    out: Out = Path(),
    report: Report = None,
) -> None:
    """Open loop: Poisson arrivals for each variant, or a trace; latencies and goodput at each rate."""
    from polymoe.bench.plots import latency_plot, rate_plot
    from polymoe.bench.qos import QosPlan, run_qos
    from polymoe.bench.report import finish, qos_report
    from polymoe.bench.session import output_folder

    plan = QosPlan(
        systems=_systems(systems), lengths=[_lengths(text) for text in lengths.split(",")],
        rates=None if rates is None else [_number(text, "--rates") for text in rates.split(",")],
        duration=duration, drain=drain, repeats=repeats, in_flight=requests, seed=seed, slo=_slo(slo_ttft, slo_itl),
        trace=trace, flood=None if flood is None else _flood(flood),
    )  # fmt: skip
    check_report(report)
    folder = output_folder(out)  # before hours of work
    builder = _builder(specs, shape, variants, cache, memory, device, dtype, threads, kv_cache)
    results = asyncio.run(run_qos(plan, builder, console))
    if trace is None:
        rate_plot(results["rates"], folder / "qos-throughput.png")
    latency_plot(results["rates"], folder / "qos-latency.png")
    document = qos_report(results)
    if report is not None:
        write_report(report, document.title, document.sections, console)
    finish(document, results, folder / "qos", console)


def _builder(
    specs: list[str] | None, shape: str, variants: int, cache: Path | None, memory: str,
    device: str, dtype: DTypeName, threads: int | None, kv_cache: str,
) -> "Builder":  # fmt: skip
    from polymoe.bench.build import Builder
    from polymoe.bench.family import SHAPES, cached_family
    from polymoe.offline.checkpoint.family import parse_variant_specs
    from polymoe.offline.checkpoint.source import resolve

    root = writable_cache(cache, console)
    if specs:
        checkpoints = {name: resolve(spec) for name, spec in parse_variant_specs(specs).items()}
    else:
        if shape not in SHAPES:
            raise PolymoeError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}.")
        with console.status(f"making {variants} random variants of the shape {shape}"):
            checkpoints = cached_family(root / "families", variants, shape)
    return Builder(
        checkpoints, root / "bundles", memory=memory, device=device, dtype=dtype, threads=threads,
        kv_cache_bytes=parse_bytes(kv_cache),
    )  # fmt: skip


def _counts(text: str) -> list[int]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in counts):
        raise PolymoeError(f"--variants {text!r}: write a positive number, or several: 1,4,16,64.")
    return list(dict.fromkeys(int(part) for part in counts))


def _systems(text: str | None) -> list[str]:
    from polymoe.bench.build import check_systems
    from polymoe.bench.systems import DEFAULT_SYSTEMS

    return list(DEFAULT_SYSTEMS) if text is None else check_systems([name.strip() for name in text.split(",")])


def _slo(ttft: float, itl: float) -> Any:
    from polymoe.bench.metrics import SLO

    if not (ttft > 0 and itl > 0):
        raise PolymoeError(f"--slo-ttft and --slo-itl must be positive, got {ttft:g} and {itl:g}.")
    return SLO(ttft=ttft, itl=itl)


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
