"""What `run_quality` returned, for people: tables and the plot of quality against memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from polymoe.bench.plots import STYLE
from polymoe.bench.report import Column, Document, machine_line
from polymoe.config import format_bytes

FIDELITY, AS_GOOD = "Fidelity", "What it takes to be as good as auto"  # titles of tables
NOTHING = "nothing"
_COLOURS = {
    "average": "#64748b",
    "merge": "#4f86c6",
    "paper": "#d97706",
    "copies": "#b91c1c",
    "delta": "#7c5cbf",
    "auto": "#0f766e",
}
_MARKERS = dict(zip(_COLOURS, "sDv^oP", strict=True))
_FIGURES: list[Column] = [
    ("experts", lambda r: f"{r['expert_multiple']:.3f}x"),
    ("in memory", lambda r: format_bytes(r["resident_bytes"])),
    ("KL mean", lambda r: nats(r["kl_mean"])),
    ("KL worst", lambda r: nats(r["kl_worst"])),
    ("top-1", lambda r: f"{r['top1_mean']:.4f}"),
    ("predicted KL", lambda r: "–" if r["predicted_kl_mean"] is None else nats(r["predicted_kl_mean"])),
]


def nats(value: float) -> str:
    """0.1234 -> '0.123', 0.01234 -> '0.01234'."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.5f}"


def files_of(calibrate: Mapping[str, Sequence[str]]) -> str:
    """What plans are fitted to, in a line."""
    return ", ".join(f"{name} {' + '.join(files)}" for name, files in calibrate.items())


def quality_report(results: dict[str, Any]) -> Document:
    """Rows, perplexities, and what they say about `auto`."""
    document = Document("Quality against memory")
    settings, systems = results["settings"], results["systems"]
    document.say(machine_line(results["machine"]))
    tokens = ", ".join(f"{name} {count:,}" for name, count in settings["tokens"].items())
    document.say(
        f"{len(settings['variants'])} variants of {settings['architecture']}, experts "
        f"{settings['relative_distance']:.1%} apart; tokens measured: {tokens}, in windows of {settings['window']}; "
        "float32 on both sides. KL(original ‖ served) in nats a token, worst: of the variants. Experts: bases and "
        f"deltas in multiples of one model's ({format_bytes(settings['one_model_expert_bytes'])}); in memory: those, "
        "non-experts and tables."
    )
    if settings["calibrate"]:
        document.say(f"Rows “on text” are fitted to other text: {files_of(settings['calibrate'])}.")
    if systems:
        document.table(FIDELITY, _FIGURES, systems)
        names = list(next(iter(systems.values()))["variants"])
        document.rows(
            "Perplexity, served (original)",
            ["system", *names],
            [[name, *(_perplexity(row["variants"][v]) for v in names)] for name, row in systems.items()],
        )
    _say_auto(document, results)
    for name, reason in results["skipped"].items():
        document.say(f"Not measured: {name}: {reason}")
    return document


def _perplexity(figures: dict[str, float]) -> str:
    return f"{figures['perplexity_served']:.2f} ({figures['perplexity_original']:.2f})"


def _say_auto(document: Document, results: dict[str, Any]) -> None:
    rows = []
    for name, found in results["cheapest_as_good"].items():
        auto = results["systems"][name]
        beaten = ", ".join(results["beaten_by"][name]) or NOTHING
        best = "nothing in the table" if found is None else f"{found['name']}, {found['expert_multiple']:.2f}x"
        rows.append([name, f"{auto['expert_multiple']:.3f}x", nats(auto["kl_mean"]), best, beaten])
    if rows:
        document.rows(
            AS_GOOD,
            ["auto", "experts", "KL mean", "the smallest that is as good", "better in the same memory or less"],
            rows,
        )
    for kind, found in results["rank_correlation"].items():
        if found is not None:
            document.say(
                f"Predicted and measured mean KL, predictions from {kind}: Spearman {found['spearman']:.3f} over "
                f"{found['rows']} rows."
            )
    if results["worse_on_text"]:
        document.say(f"Worse on text than without: {', '.join(results['worse_on_text'])}.")


def quality_plot(results: dict[str, Any], path: Path) -> None:
    """Mean KL (logarithmic) against everything in memory; `auto` as lines, its worst variant dotted."""
    systems = list(results["systems"].values())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
        for group in _COLOURS:
            for on_text in (False, True):
                rows = [r for r in systems if r["group"] == group and r["on_text"] == on_text]
                if rows:
                    _series(axes, group, on_text, sorted(rows, key=lambda r: r["resident_bytes"]))
        axes.set_yscale("log")
        axes.set_ylabel("KL(original ‖ served), nats a token, mean of the variants")
        axes.set_xlabel("in memory, everything counted, MiB")
        _expert_axis(axes, results["settings"])
        axes.margins(x=0.12)
        axes.legend(loc="lower left", fontsize=8.5)
        figure.savefig(path)
        plt.close(figure)


def _series(axes: Any, group: str, on_text: bool, rows: list[dict[str, Any]]) -> None:
    colour = _COLOURS[group]
    x = [row["resident_bytes"] / 2**20 for row in rows]
    label = f"{group}, on text" if on_text else group
    line = ("-" if on_text else "--") if group == "auto" else ""
    axes.plot(
        x, [row["kl_mean"] for row in rows], linestyle=line, marker=_MARKERS[group], markersize=6, color=colour,
        markerfacecolor=colour if on_text else "white", linewidth=2, label=label, zorder=4 if group == "auto" else 3,
    )  # fmt: skip
    if group == "auto":
        axes.plot(x, [row["kl_worst"] for row in rows], linestyle=":", color=colour, linewidth=1.2, zorder=2)
    for place, row in zip(x, rows, strict=True):
        if group not in ("auto", "delta") and not on_text:
            axes.annotate(
                row["name"], (place, row["kl_mean"]), (6, -11 if group == "average" else 3),
                textcoords="offset points", fontsize=7, color=colour,
            )  # fmt: skip


def _expert_axis(axes: Any, settings: dict[str, Any]) -> None:
    """On top: bases and deltas in multiples of one model's experts, where every variant has its own non-experts."""
    rest, one = settings["nonexpert_bytes"] / 2**20, settings["one_model_expert_bytes"] / 2**20
    top = axes.secondary_xaxis("top", functions=(lambda x: (x - rest) / one, lambda m: rest + m * one))
    top.set_xlabel("bases and deltas in multiples of one model's experts (with own non-experts)", fontsize=9)
