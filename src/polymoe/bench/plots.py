"""The figures of a benchmark as PNG: throughput against arrival rate, bars of TTFT and turnaround."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from polymoe.bench.report import seconds

_COLOURS = {
    "mixed": "#0f766e",
    "single": "#64748b",
    "per-variant": "#4f86c6",
    "reconfigure": "#7c5cbf",
    "paper": "#d97706",
    "swap": "#b45373",
    "partition": "#b91c1c",
    "transformers": "#a16207",
}
_MARKERS = dict(zip(_COLOURS, "osD^vPX*", strict=True))


def _colour(system: str) -> str:
    """Of its kind, whatever its bundle."""
    return _COLOURS[system.partition(":")[0]]


STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "axes.labelcolor": "0.25",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "legend.frameon": False,
    "figure.dpi": 150,
}


def throughput_plot(results: dict[str, Any], path: Path) -> None:
    """Bars of output tokens a second with their range, and of TTFT and turnaround."""
    systems = results["systems"]
    with plt.rc_context(STYLE):
        figure, (speed, first, whole) = plt.subplots(
            1, 3, figsize=(13, 1.6 + 0.42 * len(systems)), layout="constrained", width_ratios=(1.5, 1, 1)
        )
        medians = [s["output_tokens_per_s"] for s in systems.values()]
        spread = [
            [m - s["output_tokens_per_s_min"] for m, s in zip(medians, systems.values(), strict=True)],
            [s["output_tokens_per_s_max"] - m for m, s in zip(medians, systems.values(), strict=True)],
        ]
        labels = [
            f"{m:.4g}"
            if f"{n}/single" not in results["ratios"]
            else f"{m:.4g}  ({results['ratios'][f'{n}/single']:.2f}×)"
            for n, m in zip(systems, medians, strict=True)
        ]
        _bars(speed, list(systems), medians, labels, spread)
        speed.set_title("output tokens per second")
        for axes, kind, title in (
            (first, "ttft_s", "mean time to first token"),
            (whole, "turnaround_s", "mean turnaround"),
        ):
            means = [s[kind]["mean"] or 0.0 for s in systems.values()]
            _bars(axes, list(systems), means, [seconds(m) for m in means])
            axes.set_title(title)
            axes.set_yticklabels([])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))
        settings = results["settings"]
        figure.suptitle(
            f"{settings['variants']} variants, {settings['in_flight']} requests in flight, "
            f"{settings['input_tokens']} tokens in, {settings['output_tokens']} out",
            x=0.01, ha="left", color="0.35", fontsize=10,
        )  # fmt: skip
        figure.savefig(path)
        plt.close(figure)


def growth_plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Output tokens a second and bytes against the number of variants."""
    with plt.rc_context(STYLE):
        figure, (speed, size) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for name in dict.fromkeys(point["system"] for point in points):
            mine = [point for point in points if point["system"] == name]
            counts = [point["variants"] for point in mine]
            for load, line in (("even", "-"), ("zipf", "--")):
                speeds = [point[load]["output_tokens_per_s"] for point in mine]
                speed.plot(counts, speeds, line, color=_colour(name), marker="o", markersize=5, label=f"{name}, {load}")
            gigabytes = [point["device_bytes"] / 2**30 for point in mine]
            size.plot(counts, gigabytes, color=_colour(name), marker="o", markersize=5, label=f"{name}, weights")
            if all(point["zipf"]["peak_rss_bytes"] for point in mine):
                resident = [point["zipf"]["peak_rss_bytes"] / 2**30 for point in mine]
                size.plot(counts, resident, "--", color=_colour(name), marker="o", markersize=5, label=f"{name}, RSS")
        for axes, title in ((speed, "output tokens per second"), (size, "GiB")):
            axes.set_title(title)
            axes.set_xlabel("variants")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_ylim(bottom=0)
            axes.legend()
        figure.savefig(path)
        plt.close(figure)


def rate_plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput against arrival rate, one panel for each pair of lengths."""
    panels = _by_lengths(points)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(6.4 * len(panels), 4.2), layout="constrained", squeeze=False
        )
        for axes, (lengths, group) in zip(grid[0], panels.items(), strict=True):
            rates = [p["rate_per_variant"] for p in group]
            for name in group[0]["systems"]:
                found = [p["systems"][name] for p in group]
                axes.plot(
                    rates, [f["output_tokens_per_s"] for f in found], label=name, color=_colour(name),
                    marker=_MARKERS[name.partition(":")[0]], markersize=5, linewidth=2.4 if name == "mixed" else 1.5,
                    linestyle="--" if name == "single" else ":" if ":" in name else "-",
                    zorder={"mixed": 3, "single": 4}.get(name, 2),
                    markerfacecolor="white" if name == "single" else _colour(name),
                )  # fmt: skip
                axes.fill_between(
                    rates, [f["output_tokens_per_s_min"] for f in found], [f["output_tokens_per_s_max"] for f in found],
                    color=_colour(name), alpha=0.12, linewidth=0,
                )  # fmt: skip
            axes.set_title(f"{lengths.replace(':', ' tokens in, ')} out")
            axes.set_xlabel("arrival rate, requests per second and variant")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        grid[0][0].set_ylabel("output tokens per second")
        grid[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path)
        plt.close(figure)


def latency_plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """TTFT and turnaround of every system at every rate: bars of the mean, ticks at the 95th percentile."""
    panels = _by_lengths(points)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(panels), 2, figsize=(13, 3.8 * len(panels)), layout="constrained", squeeze=False
        )
        for row, (lengths, group) in zip(grid, panels.items(), strict=True):
            for axes, kind, title in zip(
                row, ("ttft_s", "turnaround_s"), ("time to first token", "turnaround"), strict=True
            ):
                _grouped_bars(axes, group, kind)
                about = "" if lengths == "trace" else f", {lengths.replace(':', ' tokens in, ')} out"
                axes.set_title(f"{title}{about}")
        grid[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="bar: mean\ntick: 95th percentile")
        figure.savefig(path)
        plt.close(figure)


def _by_lengths(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        panels.setdefault(point["lengths"] or "trace", []).append(point)
    return panels


def _bars(
    axes: Any, names: list[str], values: list[float], labels: list[str], spread: list[list[float]] | None = None
) -> None:
    """Horizontal bars, the first on top, each with its figure beside it."""
    places = range(len(names))
    axes.barh(
        places, values, color=[_colour(n) for n in names], height=0.68,
        xerr=spread, error_kw={"ecolor": "0.35", "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)
    ends = [v + (spread[1][i] if spread else 0.0) for i, v in enumerate(values)]
    for place, end, label in zip(places, ends, labels, strict=True):
        axes.annotate(label, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9, color="0.25")
    axes.set_xlim(0, max([*ends, 1e-9]) * 1.3)


def _grouped_bars(axes: Any, group: Sequence[Mapping[str, Any]], kind: str) -> None:
    """A group of bars for each rate, logarithmic: systems differ by orders of magnitude."""
    names = list(group[0]["systems"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [p["systems"][name][kind] for p in group]
        places = [g + (index - (len(names) - 1) / 2) * width for g in range(len(group))]
        axes.bar(places, [f["mean"] or 0.0 for f in found], width * 0.9, color=_colour(name), label=name)
        axes.plot(places, [f["p95"] for f in found], linestyle="", marker="_", markersize=7, color="0.25", zorder=3)
    rates = ["trace" if p["rate_per_variant"] is None else f"{p['rate_per_variant']:.3g}" for p in group]
    axes.set_xticks(range(len(group)), rates)
    axes.set_xlabel("arrival rate, requests per second and variant")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: seconds(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0, which="both")
