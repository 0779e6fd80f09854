"""`polymoe bench …`: options of the benchmarks. Heavy imports wait until a command runs."""

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polymoe.cache_folder import VARIABLE, writable_cache
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

Specs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: a random family, made once and kept"),
]
Shape = Annotated[
    str,
    typer.Option(help="the random family: 430m (Mixtral) or switch-base-8; tiny and switch-tiny: to try the command"),
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
) -> None:
    """Saturated: as many requests in flight as told, all systems in turn, tokens a second and latencies."""
    from polymoe.bench.plots import throughput_plot
    from polymoe.bench.report import throughput_report
    from polymoe.bench.session import output_folder
    from polymoe.bench.throughput import ThroughputPlan, run_throughput
    from polymoe.bench.workload import Lengths

    plan = ThroughputPlan(
        systems=_systems(systems), lengths=Lengths(input_tokens, output_tokens), in_flight=requests,
        total=requests if total is None else total, repeats=repeats, seed=seed, slo=_slo(slo_ttft, slo_itl),
    )  # fmt: skip
    builder = _builder(specs, shape, variants, cache, memory, device, dtype, threads, kv_cache)
    folder = output_folder(out)
    results = asyncio.run(run_throughput(plan, builder, console))
    throughput_plot(results, folder / "throughput.png")
    _finish(throughput_report(results), results, folder / "throughput")


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
) -> None:
    """Open loop: Poisson arrivals for each variant, or a trace; latencies and goodput at each rate."""
    from polymoe.bench.plots import latency_plot, rate_plot
    from polymoe.bench.qos import QosPlan, run_qos
    from polymoe.bench.report import qos_report
    from polymoe.bench.session import output_folder

    plan = QosPlan(
        systems=_systems(systems), lengths=[_lengths(text) for text in lengths.split(",")],
        rates=None if rates is None else [_number(text, "--rates") for text in rates.split(",")],
        duration=duration, drain=drain, repeats=repeats, in_flight=requests, seed=seed, slo=_slo(slo_ttft, slo_itl),
        trace=trace, flood=None if flood is None else _flood(flood),
    )  # fmt: skip
    builder = _builder(specs, shape, variants, cache, memory, device, dtype, threads, kv_cache)
    folder = output_folder(out)
    results = asyncio.run(run_qos(plan, builder, console))
    if trace is None:
        rate_plot(results["rates"], folder / "qos-throughput.png")
    latency_plot(results["rates"], folder / "qos-latency.png")
    _finish(qos_report(results), results, folder / "qos")


@app.command()
def quality(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: the family that comes with the package"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIANT=FILE", help="held-out text; may be repeated; the demo family has its own"),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIANT=FILE", help="other text, to fit plans to; may be repeated, also for one variant"),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="of policy auto, comma-separated; default 0.55x to 1.5x")] = None,
    systems: Annotated[
        str | None, typer.Option(help="comma-separated, of: average, merge, paper, copies, delta, auto")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="of each text at most, evenly spread")] = 64,
    window: Annotated[int, typer.Option(min=2, help="tokens a window")] = 256,
    fresh: Annotated[bool, typer.Option(help="measure again what an earlier run has measured")] = False,
    cache: Cache = None,
    out: Out = Path(),
) -> None:
    """Fidelity against memory: every policy and what one could do instead, on the same texts, in float32."""
    from polymoe.bench.contenders import BUDGETS, GROUPS
    from polymoe.bench.quality import QualityPlan, run_quality
    from polymoe.bench.quality_report import quality_plot, quality_report
    from polymoe.bench.session import output_folder
    from polymoe.cli_options import file_lists, pairs
    from polymoe.demo import family_paths, text_paths
    from polymoe.offline.family import parse_variant_specs
    from polymoe.offline.source import resolve

    checkpoints = {n: resolve(s) for n, s in parse_variant_specs(specs).items()} if specs else family_paths()
    texts = pairs(text or [], "--text") or ({} if specs else text_paths())
    if not texts:
        raise PolymoeError("fidelity needs text: --text VARIANT=FILE, once for each variant that is to be measured.")
    plan = QualityPlan(
        checkpoints, texts, writable_cache(cache, console) / "quality",
        calibrate=file_lists(calibrate or [], "--calibrate"), windows=windows, window=window, fresh=fresh,
        groups=list(GROUPS) if systems is None else [name.strip() for name in systems.split(",")],
        budgets=BUDGETS if budgets is None else [name.strip() for name in budgets.split(",")],
    )  # fmt: skip
    folder = output_folder(out)
    results = run_quality(plan, console)
    quality_plot(results, folder / "quality.png")
    _finish(quality_report(results), results, folder / "quality")


@app.command()
def merging(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=PATH…]", help="checkpoints; default: the family that comes with the package"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIANT=FILE.jsonl", help="encoder–decoder: held-out pairs; may be repeated"),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="VARIANT=FILE", help="decoder-only: held-out text; may be repeated")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="who is asked; may be repeated; default: the first that has a task or text"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="pairs (default 200) or windows of 256 tokens (default 64) at most")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 64,
    seed: Annotated[int, typer.Option(help="which pairs are drawn")] = 0,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(metavar="VARIANT=FILE", help="other text or pairs, to fit a further plan to; may be repeated"),
    ] = None,
    out: Out = Path(),
) -> None:
    """A variant on its own task alone, then with 2, 3, … variants in the memory of one: every policy side by side."""
    from polymoe.bench.merging import MergingPlan, run_merging
    from polymoe.bench.merging_report import merging_plot, merging_report
    from polymoe.bench.session import output_folder
    from polymoe.cli_options import file_lists, pairs
    from polymoe.demo import family_paths, text_paths
    from polymoe.offline.family import parse_variant_specs
    from polymoe.offline.source import resolve

    checkpoints = {n: resolve(s) for n, s in parse_variant_specs(specs).items()} if specs else family_paths()
    tasks, texts = pairs(task or [], "--task"), pairs(text or [], "--text")
    if not specs and not tasks and not texts:
        texts = text_paths()
    plan = MergingPlan(
        checkpoints, tasks, texts, variant or (), samples=samples or (200 if tasks else 64),
        max_new_tokens=max_new_tokens, seed=seed, calibrate=file_lists(calibrate or [], "--calibrate"),
    )  # fmt: skip
    folder = output_folder(out)
    results = run_merging(plan, console)
    merging_plot(results, folder / "merging.png")
    _finish(merging_report(results), results, folder / "merging")


def _builder(
    specs: list[str] | None, shape: str, variants: int, cache: Path | None, memory: str,
    device: str, dtype: DTypeName, threads: int | None, kv_cache: str,
) -> "Builder":  # fmt: skip
    from polymoe.bench.build import Builder
    from polymoe.bench.family import SHAPES, cached_family
    from polymoe.offline.family import parse_variant_specs
    from polymoe.offline.source import resolve

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


def _finish(document: "Document", results: dict[str, Any], stem: Path) -> None:
    """Print tables and the JSON line, and keep both as files."""
    document.print(console)
    stem.with_suffix(".md").write_text(document.markdown(), encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


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
