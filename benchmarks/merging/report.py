"""What `run_merging` returned, for people: a table for each number of variants, and the bars of the paper's figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.baselines.methods import ON_TEXT
from benchmarks.quality.report import files_of, nats
from polymoe.bench.plots import STYLE
from polymoe.bench.report import Document, machine_line
from polymoe.config import format_bytes

# bar -> what it is called for every number of variants, and its colour
_BARS = {
    "average": ("average of everything", "#94a3b8"),
    "merge": ("mean experts, own non-experts", "#4f86c6"),
    "one": ("paper, one variant's non-experts", "#f5b971"),
    "paper": ("paper", "#d97706"),
    "copies": ("quantised copies", "#b91c1c"),
    "delta": ("int4 + k-bit deltas", "#7c5cbf"),
    "auto": ("auto", "#0f766e"),
    "merge, on text": ("regmean, on text", "#1e3a8a"),
    "delta, on text": ("int4 + k-bit deltas, on text", "#c084fc"),
    "auto, on text": ("auto, on text", "#65a30d"),
}


def merging_report(results: dict[str, Any]) -> Document:
    """One table a variant and number of variants."""
    document = Document("Variants consolidated in the memory of one")
    settings, answered = results["settings"], results["settings"]["kind"] == "task"
    document.say(machine_line(results["machine"]))
    document.say(
        f"{len(settings['variants'])} variants of {settings['architecture']}; float32 on both sides. Each is asked on "
        f"its own held-out {settings['kind']}, alone and with the others, which join in the order given. Experts: bytes"
        f" of bases and deltas over one model's, the budget is {settings['memory']}; in memory: non-experts too. "
        "KL(original ‖ served) in nats a token."
        + (f" On text: fitted to {files_of(settings['calibrate'])}." if settings["calibrate"] else "")
        + (" ROUGE: mean F ± standard error; kept: share of ROUGE-1 alone, ± of paired samples." if answered else "")
    )
    for name in settings["asked"]:
        mine = [row for row in results["rows"] if row["asked"] == name]
        alone = mine[0]
        for count in sorted({row["count"] for row in mine if row["count"] > 1}):
            rows = [alone, *(row for row in mine if row["count"] == count)]
            header, show = _answered if answered else _continued
            document.rows(f"{name} ({settings['files'][name]}), {count} variants", header, [show(row) for row in rows])
    for name, reason in results["skipped"].items():
        document.say(f"Not measured: {name}: {reason}")
    return document


def _score(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['error']:.4f}"


def _common(row: Mapping[str, Any]) -> list[str]:
    memory = row["resident_bytes"]
    return [row["name"], f"{row['expert_multiple']:.3f}x", "–" if memory is None else format_bytes(memory)]


def _show_answered(row: Mapping[str, Any]) -> list[str]:
    kept = row["rouge1_kept"]
    return [
        *_common(row), _score(row["rouge1"]), "–" if kept is None else f"{kept['mean']:.3f} ± {kept['error']:.3f}",
        f"{row['rouge2']['mean']:.4f}", f"{row['rougeL']['mean']:.4f}", nats(row["kl"]), f"{row['top1']:.4f}",
    ]  # fmt: skip


def _show_continued(row: Mapping[str, Any]) -> list[str]:
    return [*_common(row), f"{row['perplexity']:.3f}", nats(row["kl"]), f"{row['top1']:.4f}"]


_answered = (["policy", "experts", "in memory", "ROUGE-1", "kept", "ROUGE-2", "ROUGE-L", "KL", "top-1"], _show_answered)
_continued = (["policy", "experts", "in memory", "perplexity", "KL", "top-1"], _show_continued)


def merging_plot(results: dict[str, Any], path: Path) -> None:
    """For each variant asked a panel: ROUGE-1 (KL for decoder-only families) against the number of variants."""
    asked, answered = results["settings"]["asked"], results["settings"]["kind"] == "task"
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(asked), 1, figsize=(9.6, 4.2 * len(asked)), layout="constrained", squeeze=False)
        for name, axes in zip(asked, grid[:, 0], strict=True):
            _panel(axes, [row for row in results["rows"] if row["asked"] == name], answered)
            axes.set_title(f"{name} on its own {results['settings']['kind']}")
        grid[0][0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        figure.savefig(path)
        plt.close(figure)


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], answered: bool) -> None:
    alone, counts = rows[0], sorted({row["count"] for row in rows if row["count"] > 1})
    bars = {kind: look for kind, look in _BARS.items() if any(_bar(row) == kind for row in rows)}
    width = 0.86 / len(bars)
    for place, (kind, (label, colour)) in enumerate(bars.items()):
        mine = {row["count"]: row for row in rows if _bar(row) == kind}
        present = [count for count in counts if count in mine]
        x = [count + (place - (len(bars) - 1) / 2) * width for count in present]
        values = [mine[count]["rouge1"]["mean"] if answered else mine[count]["kl"] for count in present]
        errors = [mine[count]["rouge1"]["error"] for count in present] if answered else None
        axes.bar(x, values, width * 0.94, yerr=errors, color=colour, label=label,
                 error_kw={"ecolor": "0.35", "elinewidth": 1, "capsize": 2})  # fmt: skip
        for at, value, error in zip(x, values, errors or [0.0] * len(x), strict=True):
            text = f"{value:.3f}" if answered else f"{value:.2g}"
            axes.annotate(text, (at, value + error), (0, 3), textcoords="offset points", ha="center", fontsize=6.5,
                          rotation=90, color="0.35")  # fmt: skip
    if answered:
        axes.axhline(alone["rouge1"]["mean"], color="0.3", linestyle="--", linewidth=1.2, label="alone")
        axes.set_ylim(0, 1.25 * max(row["rouge1"]["mean"] for row in rows))
        axes.set_ylabel("ROUGE-1 (F, ± standard error)")
    else:
        axes.set_yscale("log")
        axes.set_ylabel("KL(original ‖ served), nats a token")
    axes.set_xticks(counts, [f"{count} variants" for count in counts])
    axes.grid(axis="x", visible=False)


def _bar(row: Mapping[str, Any]) -> str:
    if row["name"].endswith(ON_TEXT):
        return f"{row['group']}{ON_TEXT}"
    return "one" if row["group"] == "paper" and row["name"] != "paper" else str(row["group"])
