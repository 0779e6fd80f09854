"""The command line: inspect, plan, generate, serve, demo, eval, bench. Heavy imports wait until they are needed."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from polymoe.bench.cli import app as bench
from polymoe.cli_options import (
    AdmissionFactor,
    ApiKey,
    Base,
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
    Weight,
    file_lists,
    pairs,
)
from polymoe.config import DEFAULT_KV_BYTES, EngineConfig, parse_bytes, parse_numbers
from polymoe.errors import PolymoeError

if TYPE_CHECKING:
    from polymoe.evaluate.fidelity import Samples

app = typer.Typer(
    name="polymoe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench)
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
    if options.get("dtype") not in (None, "auto", "float32", "bfloat16", "float16"):
        raise PolymoeError(f"--dtype {options['dtype']} is unknown; use auto, float32, bfloat16 or float16.")
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
    png: Annotated[Path, typer.Option(help="where to write the heat map")] = Path("distances.png"),
) -> None:
    """Show a bundle (bytes, formats, fidelity), or compare checkpoints expert by expert, with a heat map."""
    from polymoe.offline import api

    if len(sources) == 1 and "=" not in sources[0]:
        api.inspect_bundle(sources[0], console)
    else:
        api.inspect(sources, png, console)


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

    llm = LLM(bundle, dtype=dtype, device=device, slots=slots, num_threads=threads)
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
) -> None:
    """Serve a bundle through the OpenAI API; `model` in a request names the variant."""
    from polymoe.server.serve import check_address, run_server

    options = engine_options(
        dtype=dtype, device=device, slots=slots, kv_cache=kv_cache, expert_cache=expert_cache,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_waiting=max_waiting, weights=parse_numbers(weight or [], "--weight", "WEIGHT"),
        slo=parse_numbers(slo or [], "--slo", "SECONDS"), admission_factor=admission_factor or None,
        target_itl=target_itl, num_threads=threads,
    )  # fmt: skip
    EngineConfig(bundle="", **options)  # what is wrong is said before minutes are spent on planning
    check_address(host, port, api_key)
    if policy == "auto" and memory is None and "=" in sources[0]:
        from polymoe.offline.device_memory import device_budget

        kv_bytes = DEFAULT_KV_BYTES if options["kv_cache_bytes"] is None else options["kv_cache_bytes"]
        memory = device_budget(device, reserved=kv_bytes + options["expert_cache_bytes"])
    config = EngineConfig(bundle=str(_bundle_for(sources, policy, memory)), **options)
    raise typer.Exit(run_server(config, host=host, port=port, api_key=api_key, grace=grace, console=console))


@app.command()
def demo(host: Host = "127.0.0.1", port: Port = 8000, policy: Policy = "auto", threads: Threads = None) -> None:
    """Serve the four small models that come with the package: base, math, drama and code."""
    from polymoe.demo import family_paths

    specs = [f"{name}={path}" for name, path in family_paths().items()]
    if policy == "auto":
        console.print("Policy auto; the paper's own sharing: polymoe demo --policy paper", soft_wrap=True)
    # One model's experts for all four, as `paper` takes by itself: that they fit a computer whole would show nothing.
    serve(specs, host=host, port=port, policy=policy, memory="1.0x" if policy == "auto" else None, threads=threads)


@app.command(name="eval")
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")],
    text: Annotated[
        list[str],
        typer.Option(metavar="VARIANT=FILE", help="held-out text of a variant, or JSONL of pairs; may be repeated"),
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


def _bundle_for(sources: list[str], policy: str, memory: str | None) -> Path:
    """A bundle as given, or one planned from `NAME=PATH…` and kept for the next start."""
    if len(sources) == 1 and "=" not in sources[0]:
        return Path(sources[0])
    from polymoe.offline.cache import default_root, plan_cached

    return plan_cached(sources, policy=policy, memory=memory, root=default_root(), console=console)


def main() -> None:
    """Console entry point: deliberate errors are one line on stderr and exit status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except PolymoeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, markup=True)
        sys.exit(1)
