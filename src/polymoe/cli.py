"""The command line: inspect, plan, generate, serve, demo, eval, verify, cache, bench. Heavy imports wait until due."""

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table

from polymoe.bench.cli import app as bench
from polymoe.cli_cache import app as cache_app
from polymoe.cli_options import (
    AdmissionFactor,
    AllowedOrigin,
    ApiKey,
    Base,
    CacheFolder,
    Calibrate,
    Clusters,
    DeltaBits,
    Device,
    Distill,
    DType,
    ExpertCache,
    Grace,
    Host,
    HostShare,
    KVCache,
    MaxBatched,
    MaxLen,
    MaxSeqs,
    Memory,
    MinTop1,
    Policy,
    Port,
    Slo,
    SlotsOption,
    Specs,
    TargetItl,
    Text,
    Threads,
    Verify,
    Weight,
    file_lists,
    pairs,
)
from polymoe.config import EngineConfig, parse_bytes, parse_numbers
from polymoe.console import Console, print_error, warn
from polymoe.errors import PolymoeError, explain

if TYPE_CHECKING:
    from polymoe.evaluate.fidelity import Samples

app = typer.Typer(
    name="polymoe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help are brackets
)
app.add_typer(bench)
app.add_typer(cache_app)
console = Console()


def engine_config(bundle: str | Path, **options: Any) -> EngineConfig:
    """Options as typed on the command line -> `EngineConfig`."""
    return EngineConfig(bundle=str(bundle), **engine_options(**options))


def engine_options(**options: Any) -> dict[str, Any]:
    """Options as typed on the command line -> fields of `EngineConfig`."""
    for name in ("kv_cache", "expert_cache"):
        if name in options:
            text = options.pop(name)
            options[f"{name}_bytes"] = None if name == "kv_cache" and text == "auto" else parse_bytes(text)
    return options


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _all_commands(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Serve several fully fine-tuned Mixture-of-Experts variants from one device."""


@app.command()
def inspect(
    sources: Annotated[
        list[str], typer.Argument(metavar="BUNDLE | NAME=PATH…", help="a bundle, or checkpoints to compare")
    ],
    png: Annotated[Path | None, typer.Option(help="where to write the heat map; default distances.png")] = None,
) -> None:
    """Show a bundle (bytes, formats, fidelity), or compare checkpoints expert by expert, with a heat map."""
    from polymoe.offline import api

    if len(sources) == 1 and "=" not in sources[0]:
        if png is not None:
            raise PolymoeError("--png draws the distances of checkpoints; give them as NAME=PATH….")
        api.inspect_bundle(sources[0], console)
        return
    picture = Path("distances.png") if png is None else png
    try:
        api.check_picture(picture)
    except PolymoeError as error:
        if png is not None:
            raise
        warn(console, f"{error} There will be no heat map; name a file for it with --png.")
        api.inspect(sources, None, console)
    else:
        api.inspect(sources, picture, console)


@app.command()
def plan(
    specs: Specs,
    out: Annotated[Path, typer.Option(help="folder of the new bundle")],
    policy: Policy = "auto",
    memory: Memory = None,
    base: Base = "stored",
    delta_bits: DeltaBits = None,
    clusters: Clusters = None,
    min_top1: MinTop1 = None,
    host_share: HostShare = None,
    calibrate: Calibrate = None,
    distill: Distill = None,
    text: Text = None,
    force: Annotated[
        bool,
        typer.Option(
            help="replace an existing bundle; share experts of variants without a common ancestor (a warning)"
        ),
    ] = False,
) -> None:
    """Decide which experts are shared, and how they are stored, and write a bundle that is ready to serve."""
    from polymoe.offline.api import make_plan
    from polymoe.offline.bundle import Bundle
    from polymoe.offline.options import PlanOptions

    options = PlanOptions(
        base=base, delta_bits=delta_bits, clusters=clusters, min_top1=min_top1, host_share=host_share,
        calibrate=file_lists(calibrate or [], "--calibrate"), distill=distill, accept_unrelated=force,
    )  # fmt: skip
    texts = pairs(text or [], "--text")
    checkpoints, samples = _samples(specs, texts)  # what is wrong with a text is said before minutes of planning

    def make(options: PlanOptions, overwrite: bool) -> Bundle:
        return make_plan(specs, policy, memory, out, overwrite, console, options)

    if not texts:
        make(options, force)
        return
    from polymoe.evaluate.promise import keep_promise
    from polymoe.evaluate.record import measure_and_record

    keep_promise(make, lambda b: measure_and_record(b, checkpoints, texts, samples, console), options, force, console)


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")],
    prompt: Annotated[list[str], typer.Option(help="a prompt; may be repeated")],
    variant: Annotated[list[str] | None, typer.Option(help="which variants answer; default all")] = None,
    max_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    slots: SlotsOption = None,
    threads: Threads = None,
) -> None:
    """Complete prompts with several variants in one batch, without a server."""
    from polymoe import LLM, SamplingParams

    llm = LLM(bundle, **engine_options(dtype=dtype, device=device, slots=slots, num_threads=threads))
    names = variant or llm.variants
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    prompts = [text for text in prompt for _ in names]
    outputs = llm.generate(prompts, params, variants=names * len(prompt))
    table = Table("variant", "prompt", "completion", "tokens", "ended", show_lines=True)
    for output in outputs:
        first = output.outputs[0]
        table.add_row(output.variant, output.prompt, first.text, str(len(first.token_ids)), first.finish_reason)
    console.print(table)


@app.command()
def serve(
    sources: Annotated[
        list[str], typer.Argument(metavar="BUNDLE | NAME=PATH…", help="a bundle, or checkpoints to plan now")
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    allowed_origin: AllowedOrigin = None,
    policy: Policy = "auto",
    memory: Memory = None,
    dtype: DType = "auto",
    device: Device = "auto",
    slots: SlotsOption = None,
    kv_cache: KVCache = "auto",
    expert_cache: ExpertCache = "256MiB",
    max_model_len: MaxLen = None,
    max_num_seqs: MaxSeqs = 64,
    max_num_batched_tokens: MaxBatched = 2048,
    max_waiting: Annotated[int, typer.Option(help="requests waiting beyond this are refused with 429")] = 1024,
    weight: Weight = None,
    slo: Slo = None,
    admission_factor: AdmissionFactor = 1.5,
    target_itl: TargetItl = None,
    threads: Threads = None,
    grace: Grace = 30.0,
    verify: Verify = False,
    cache: CacheFolder = None,
) -> None:
    """Serve a bundle through the OpenAI API; `model` in a request names the variant."""
    from polymoe.server.serve import check_address, run_server

    options = engine_options(
        dtype=dtype, device=device, slots=slots, kv_cache=kv_cache, expert_cache=expert_cache,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_waiting=max_waiting, weights=parse_numbers(weight or [], "--weight", "WEIGHT"),
        slo=parse_numbers(slo or [], "--slo", "SECONDS"), admission_factor=admission_factor or None,
        target_itl=target_itl, num_threads=threads, verify=verify,
    )  # fmt: skip
    config = EngineConfig(bundle="", **options)  # what is wrong is said before minutes are spent on planning
    origins = tuple(allowed_origin or ())
    check_address(host, port, api_key, origins)
    if len(sources) == 1 and "=" not in sources[0]:
        bundle = Path(sources[0])
    else:
        from polymoe.offline.cache import planned_bundle

        bundle = planned_bundle(
            sources, policy, memory, device=device, reserved=config.cache_bytes, cache=cache, console=console
        )
    config = msgspec.structs.replace(config, bundle=str(bundle))
    raise typer.Exit(
        run_server(config, host=host, port=port, api_key=api_key, allowed_origins=origins, grace=grace, console=console)
    )


@app.command()
def demo(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    policy: Policy = "auto",
    threads: Threads = None,
    cache: CacheFolder = None,
) -> None:
    """Serve the four small models that come with the package: base, math, drama and code."""
    from polymoe.demo import family_paths

    specs = [f"{name}={path}" for name, path in family_paths().items()]
    if policy == "auto":
        console.print("Policy auto; the paper's own sharing: polymoe demo --policy paper", soft_wrap=True)
    # One model's experts for all four, as `paper` takes by itself: that they fit a computer whole would show nothing.
    memory = "1.0x" if policy == "auto" else None
    serve(specs, host=host, port=port, policy=policy, memory=memory, threads=threads, cache=cache)


@app.command(name="eval")
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")],
    text: Annotated[
        list[str],
        typer.Option(
            metavar="VARIANT=FILE",
            help="held-out text of a variant: plain, or .jsonl of {text}, {messages} or pairs; may be repeated",
        ),
    ],
    original: Annotated[
        list[str] | None, typer.Option(metavar="VARIANT=PATH", help="its checkpoint, if it moved since the plan")
    ] = None,
    dtype: DType = "float32",
    device: Device = "auto",
    window: Annotated[int | None, typer.Option(min=2, help="tokens a window of text; default 256")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="windows or pairs a variant; default all")] = None,
    batch: Annotated[int, typer.Option(min=1, help="windows or pairs a pass")] = 8,
    slots: SlotsOption = None,
    threads: Threads = None,
) -> None:
    """Measure how close each served variant is to its original: KL, top-1 agreement, perplexities, bytes."""
    from polymoe.evaluate.report import run_eval

    config = engine_config(bundle, dtype=dtype, device=device, slots=slots, num_threads=threads,
                           enable_prefix_caching=False, max_num_seqs=batch)  # fmt: skip
    report = run_eval(config, pairs(text, "--text"), pairs(original or [], "--original"), window, limit, batch, console)
    print(json.dumps(report))


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")]) -> None:
    """Compare every file of a bundle with the hash that was recorded when it was planned; name those that differ."""
    from polymoe.offline.verify import verify_bundle

    verify_bundle(bundle, console)


@app.command()
def version() -> None:
    """Print the version."""
    import polymoe

    print(polymoe.__version__)


def _samples(specs: list[str], texts: dict[str, Path]) -> "tuple[dict[str, Path], dict[str, Samples]]":
    """(variant -> checkpoint folder, variant -> what it is measured on); nothing is read without texts."""
    if not texts:
        return {}, {}
    from polymoe.evaluate.texts import samples_of
    from polymoe.offline.family import parse_variant_specs
    from polymoe.offline.source import resolve

    checkpoints = {name: resolve(spec) for name, spec in parse_variant_specs(specs).items()}
    return checkpoints, samples_of(checkpoints, texts)


def main(commands: typer.Typer = app) -> None:
    """Console entry point: deliberate errors, and those of files and disks, are a line on stderr and exit status 1.

    commands: other programs have their own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows few letters
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        commands()
    except (PolymoeError, OSError) as error:
        print_error(Console(stderr=True), explain(error) if isinstance(error, OSError) else error)
        sys.exit(1)
