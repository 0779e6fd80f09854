"""`python -m benchmarks.quality`: fidelity against memory. Heavy imports wait until the command runs."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.baselines.methods import BUDGETS, GROUPS
from benchmarks.options import Out, Specs, checkpoints_of, console, program
from polymoe.cli.main import main
from polymoe.demo import text_paths
from polymoe.errors import PolymoeError
from polymoe.offline.plan.options import file_lists, pairs

app = program()


@app.command()
def quality(
    specs: Specs = None,
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
    cache: Annotated[Path | None, typer.Option(help="where rows are kept; default ~/.cache/polymoe")] = None,
    out: Out = Path(),
) -> None:
    """Fidelity against memory: every policy and what one could do instead, on the same texts, in float32."""
    from benchmarks.quality.lab import QualityPlan
    from benchmarks.quality.report import quality_plot, quality_report
    from benchmarks.quality.run import run_quality
    from polymoe.bench.report import finish
    from polymoe.bench.session import output_folder
    from polymoe.cache_folder import writable_cache

    checkpoints = checkpoints_of(specs)
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
    finish(quality_report(results), results, folder / "quality", console)


if __name__ == "__main__":
    main(app)
