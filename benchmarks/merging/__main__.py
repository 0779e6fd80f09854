"""`python -m benchmarks.merging`: ever more variants in the memory of one. Heavy imports wait for the command."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Out, Specs, checkpoints_of, console, program
from polymoe.cli.main import main
from polymoe.demo import text_paths
from polymoe.offline.plan.options import file_lists, pairs

app = program()


@app.command()
def merging(
    specs: Specs = None,
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
    from benchmarks.merging.report import merging_plot, merging_report
    from benchmarks.merging.run import MergingPlan, run_merging
    from polymoe.bench.report import finish
    from polymoe.bench.session import output_folder

    tasks, texts = pairs(task or [], "--task"), pairs(text or [], "--text")
    if not specs and not tasks and not texts:
        texts = text_paths()
    plan = MergingPlan(
        checkpoints_of(specs), tasks, texts, variant or (), samples=samples or (200 if tasks else 64),
        max_new_tokens=max_new_tokens, seed=seed, calibrate=file_lists(calibrate or [], "--calibrate"),
    )  # fmt: skip
    folder = output_folder(out)
    results = run_merging(plan, console)
    merging_plot(results, folder / "merging.png")
    finish(merging_report(results), results, folder / "merging", console)


if __name__ == "__main__":
    main(app)
