"""The command line: plan, serve and what belongs to them. Heavy imports wait until due."""

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table

from polymoe.bundle.manifest import read_manifest
from polymoe.cli.bench import app as bench
from polymoe.cli.cache import app as cache_app
from polymoe.cli.deploy import deploy
from polymoe.cli.keys import app as keys_app
from polymoe.cli.options import PLAN, SERVE, Specs, Text, some, takes
from polymoe.cli.place import place
from polymoe.cli.report import Report, bundle_section, check_report, distance_section, eval_sections, write_report
from polymoe.cli.top import top
from polymoe.cli.variants import app as variants_app
from polymoe.config import EngineConfig
from polymoe.console import Console, print_error, warn
from polymoe.errors import PolymoeError, explain
from polymoe.native.installed import say_if_missing
from polymoe.offline.plan.options import PlanOptions, pairs
from polymoe.options import Settings
from polymoe.server.settings import ServerSettings

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
app.add_typer(keys_app)
app.command()(top)
app.command()(place)
app.command()(deploy)
app.add_typer(variants_app)
console = Console()


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
    report: Report = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="write the distances of checkpoints there, for `polymoe place`")
    ] = None,
) -> None:
    """Show a bundle (bytes, formats, fidelity), or compare checkpoints expert by expert, with a heat map."""
    from polymoe.offline import api

    check_report(report)
    if len(sources) == 1 and "=" not in sources[0]:
        if png is not None:
            raise PolymoeError("--png draws the distances of checkpoints; give them as NAME=PATH….")
        if json is not None:
            raise PolymoeError("--json writes the distances of checkpoints; give them as NAME=PATH….")
        api.inspect_bundle(sources[0], console)
        if report is not None:
            write_report(report, f"Bundle {Path(sources[0]).resolve().name}", [bundle_section(sources[0])], console)
        return
    picture = Path("distances.png") if png is None else png
    try:
        api.check_picture(picture)
    except PolymoeError as error:
        if png is not None:
            raise
        warn(console, f"{error} There will be no heat map; name a file for it with --png.")
        scan = api.inspect(sources, None, console, json)
    else:
        scan = api.inspect(sources, picture, console, json)
    if report is not None:
        write_report(report, f"Distances of {', '.join(scan.variant_names)}", [distance_section(scan)], console)


@app.command()
@takes(some(PLAN, "policy memory base delta_bits clusters min_top1 host_share calibrate distill"))
def plan(
    specs: Specs,
    out: Annotated[Path, typer.Option(help="folder of the new bundle")],
    settings: Settings,
    text: Text = None,
    report: Report = None,
    force: Annotated[
        bool,
        typer.Option(
            help="replace an existing bundle; share experts of variants without a common ancestor (a warning)"
        ),
    ] = False,
) -> None:
    """Decide which experts are shared, and how they are stored, and write a bundle that is ready to serve."""
    from polymoe.bundle.reader import Bundle
    from polymoe.offline.api import make_plan

    check_report(report)
    options = PlanOptions(**settings.of(PlanOptions), accept_unrelated=force)
    texts = pairs(text or [], "--text")
    checkpoints, samples = _samples(specs, texts)  # what is wrong with a text is said before minutes of planning

    def make(options: PlanOptions, overwrite: bool) -> Bundle:
        return make_plan(specs, settings["policy"], settings["memory"], out, overwrite, console, options)

    if not texts:
        make(options, force)
    else:
        from polymoe.evaluate.record import measure_and_record
        from polymoe.evaluate.target import meet_target

        meet_target(
            make, lambda b: measure_and_record(b, checkpoints, texts, samples, console), options, force, console
        )
    if report is not None:
        write_report(report, f"Plan {out.name}", [bundle_section(out)], console)


@app.command()
@takes(some(SERVE, "dtype activations device slots threads"))
def generate(
    settings: Settings,
    bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")],
    prompt: Annotated[list[str], typer.Option(help="a prompt; may be repeated")],
    variant: Annotated[list[str] | None, typer.Option(help="which variants answer; default all")] = None,
    max_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Complete prompts with several variants in one batch, without a server."""
    say_if_missing()
    read_manifest(bundle.expanduser())  # what is no bundle is said before seconds are spent on loading torch
    from polymoe import LLM, SamplingParams

    llm = LLM(bundle, **settings.of(EngineConfig))
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
@takes(SERVE, file="config")
def serve(
    settings: Settings,
    sources: Annotated[  # noqa: ARG001  (`takes` reads it, and the file)
        list[str] | None,
        typer.Argument(metavar="BUNDLE | NAME=PATH…", help="a bundle, or checkpoints to plan now"),
    ] = None,
    config: Annotated[  # noqa: ARG001
        Path | None, typer.Option(envvar="POLYMOE_CONFIG", help="TOML file of options: docs/configuration.md")
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="print what would be used and where it comes from, and exit")
    ] = False,
) -> None:
    """Serve a bundle through the OpenAI API; `model` in a request names the variant."""
    if not settings["sources"]:
        raise typer.BadParameter("name a bundle, or checkpoints as NAME=PATH…")
    if check_config:
        ServerSettings(**settings.of(ServerSettings))
        EngineConfig(bundle="", **settings.of(EngineConfig))
        for line in settings.lines():
            console.print(line, soft_wrap=True)
    else:
        _serve(settings["sources"], settings, settings["policy"], settings["memory"])


@app.command()
@takes(some(SERVE, "host port policy threads cache"))
def demo(settings: Settings) -> None:
    """Serve the four small models that come with the package: base, math, drama and code."""
    from polymoe.demo import family_paths

    specs = [f"{name}={path}" for name, path in family_paths().items()]
    policy = settings["policy"]
    if policy == "auto":
        console.print("Policy auto; the paper's own sharing: polymoe demo --policy paper", soft_wrap=True)
    # One model's experts for all four, as `paper` takes by itself: that they fit a computer whole would show nothing.
    _serve(specs, settings, policy, "1.0x" if policy == "auto" else None)


def _serve(sources: Sequence[str], settings: Settings, policy: str, memory: str | None) -> None:
    """Until the server is stopped. `settings`: of the server, the engine and the cache."""
    from polymoe.server.serve import check_address, run_server

    config = EngineConfig(bundle="", **settings.of(EngineConfig))  # before minutes are spent on planning
    server = ServerSettings(**settings.of(ServerSettings))
    check_address(server)
    say_if_missing()
    if len(sources) == 1 and "=" not in sources[0]:
        bundle = Path(sources[0])
        read_manifest(bundle.expanduser())
    else:
        from polymoe.offline.cache import planned_bundle

        bundle = planned_bundle(
            sources, policy, memory, device=config.device, reserved=config.cache_bytes, cache=settings["cache"],
            console=console,
        )  # fmt: skip
    raise typer.Exit(run_server(msgspec.structs.replace(config, bundle=str(bundle)), server, console=console))


@app.command(name="eval")
@takes(some(SERVE, "dtype activations device slots threads", dtype="float32"))
def evaluate(
    settings: Settings,
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
    window: Annotated[int | None, typer.Option(min=2, help="tokens a window of text; default 256")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="windows or pairs a variant; default all")] = None,
    batch: Annotated[int, typer.Option(min=1, help="windows or pairs a pass")] = 8,
    report: Report = None,
) -> None:
    """Measure how close each served variant is to its original: KL, top-1 agreement, perplexities, bytes."""
    say_if_missing()
    read_manifest(bundle.expanduser())
    from polymoe.evaluate.report import run_eval

    check_report(report)
    config = EngineConfig(
        bundle=str(bundle), **settings.of(EngineConfig), enable_prefix_caching=False, max_num_seqs=batch
    )
    found = run_eval(config, pairs(text, "--text"), pairs(original or [], "--original"), window, limit, batch, console)
    if report is not None:
        write_report(report, f"Fidelity of {bundle.name}", [*eval_sections(found), bundle_section(bundle)], console)
    print(json.dumps(found))


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="folder that `polymoe plan` wrote")]) -> None:
    """Compare every file of a bundle with the hash that was recorded when it was planned; name those that differ."""
    from polymoe.bundle.verify import verify_bundle

    verify_bundle(bundle, console)


@app.command()
def version() -> None:
    """Print the version."""

    from polymoe.version import __version__

    print(__version__)


def _samples(specs: list[str], texts: dict[str, Path]) -> "tuple[dict[str, str], dict[str, Samples]]":
    """(variant -> checkpoint, variant -> what it is measured on); nothing is read without texts."""
    if not texts:
        return {}, {}
    from polymoe.evaluate.texts import samples_of
    from polymoe.offline.checkpoint.family import parse_variant_specs
    from polymoe.offline.checkpoint.place import Place

    places = {name: Place.find(spec) for name, spec in parse_variant_specs(specs).items()}
    samples = samples_of({name: place.folder for name, place in places.items()}, texts)
    return {name: str(place) for name, place in places.items()}, samples


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
