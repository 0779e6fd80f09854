"""Results as tables for people: on the console and as Markdown."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from polymoe.config import format_bytes
from polymoe.console import Console

Result = Mapping[str, Any]
Column = tuple[str, Callable[[Result], str]]


def seconds(value: float | None) -> str:
    """0.01234 -> '12.3 ms', 2.5 -> '2.50 s', None -> '–'."""
    if value is None:
        return "–"
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.2f} s"


def _bytes(value: float | None) -> str:
    return "–" if value is None else format_bytes(value)


def _speed(result: Result) -> str:
    least, most = result["output_tokens_per_s_min"], result["output_tokens_per_s_max"]
    return f"{result['output_tokens_per_s']:.1f} ({least:.1f}–{most:.1f})"


def _of(kind: str, *figures: str) -> Callable[[Result], str]:
    return lambda result: " / ".join(seconds(result[kind][figure]) for figure in figures)


_SPEED: list[Column] = [
    ("output tok/s (min–max)", _speed),
    ("requests/min", lambda r: f"{r['requests_per_min']:.1f}"),
]
_LATENCY: list[Column] = [
    ("TTFT mean / p50 / p95 / p99", _of("ttft_s", "mean", "p50", "p95", "p99")),
    ("between tokens p50 / p95 / p99", _of("itl_s", "p50", "p95", "p99")),
    ("turnaround mean / p95", _of("turnaround_s", "mean", "p95")),
]
_GOOD: list[Column] = [("in SLO", lambda r: f"{100 * r['good_share']:.0f} %")]
_WORK: list[Column] = [
    ("reconfigurations", lambda r: f"{r['reconfigurations']:.0f}"),
    ("expert hits / misses", lambda r: f"{r['expert_hits']:.0f} / {r['expert_misses']:.0f}"),
    ("model loads", lambda r: f"{r['model_loads']:.0f} ({r['model_load_s']:.1f} s)" if r["model_loads"] else "0"),
    ("host bytes", lambda r: _bytes(r["host_bytes"])),
    ("peak RSS", lambda r: _bytes(r["peak_rss_bytes"])),
]
_OPEN: list[Column] = [
    ("given up", lambda r: f"{r['unfinished']:.0f} of {r['requests']:.0f}"),
    ("late sends", lambda r: f"{r['late_sends']:.0f} (≤ {seconds(r['max_late_s'])})"),
]


class Document:
    """Tables that go to the console and, the same, to a Markdown file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str | Table] = []
        self._markdown = [f"# {title}", ""]
        self.sections: list[dict[str, Any]] = []  # the same, as a page has it

    def table(
        self, title: str, columns: Sequence[Column], results: Mapping[str, Result], first: str = "system"
    ) -> None:
        self.rows(title, [first, *(name for name, _ in columns)],
                  [[name, *(show(r) for _, show in columns)] for name, r in results.items()])  # fmt: skip

    def rows(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.parts.append(table)
        self.sections.append({"kind": "table", "title": title, "columns": [*header], "rows": [[*row] for row in rows]})
        lines = [" | ".join(cells) for cells in (header, ["---", *["--:"] * (len(header) - 1)], *rows)]
        self._markdown += [f"**{title}**", "", *(f"| {line} |" for line in lines), ""]

    def say(self, text: str) -> None:
        self.parts.append(text)
        self.sections.append({"kind": "text", "text": text})
        self._markdown += [text, ""]

    def bars(self, title: str, systems: Mapping[str, Result]) -> None:
        """Tokens a second as a picture; on the console the tables say it."""
        bars = [
            {
                "name": name,
                "value": r["output_tokens_per_s"],
                "low": r["output_tokens_per_s_min"],
                "high": r["output_tokens_per_s_max"],
            }
            for name, r in systems.items()
        ]
        self.sections.append({"kind": "bars", "title": title, "unit": "tok/s", "bars": bars})

    def print(self, console: Console) -> None:
        for part in self.parts:
            console.print(part, soft_wrap=isinstance(part, str), highlight=False)

    def markdown(self) -> str:
        return "\n".join(self._markdown)


def finish(document: Document, results: dict[str, Any], stem: Path, console: Console) -> None:
    """Print tables and the JSON line, and keep both as files `stem`.md and `stem`.json."""
    document.print(console)
    stem.with_suffix(".md").write_text(document.markdown(), encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


def throughput_report(results: dict[str, Any]) -> Document:
    """What `run_throughput` returned, for people."""
    document = Document("Throughput, saturated")
    document.say(machine_line(results["machine"]))
    settings = results["settings"]
    document.say(
        f"{settings['variants']} variants, {settings['in_flight']} requests in flight, "
        f"{settings['input_tokens']} tokens in and {settings['output_tokens']} out, "
        f"medians of {settings['repeats']} interleaved runs, CPU threads: {settings['threads']}. "
        "Random weights: routing is near uniform."
    )
    ratios = results["ratios"]
    columns = [*_SPEED]
    if ratios:
        named = {id(r): ratios.get(f"{name}/single", 1.0) for name, r in results["systems"].items()}
        columns.insert(1, ("÷ single", lambda r: f"{named[id(r)]:.3f}"))
    document.bars("Output tokens a second", results["systems"])
    document.table("Throughput", columns, results["systems"])
    document.table("Latency", _LATENCY + _GOOD, results["systems"])
    document.table("Work beside computing", _WORK, results["systems"])
    _say_ceiling(document, results["ceiling"])
    return document


def growth_report(results: dict[str, Any]) -> Document:
    """What `run_growth` returned, for people."""
    document = Document("Throughput as variants grow")
    document.say(machine_line(results["machine"]))
    settings = results["settings"]
    document.say(
        f"{settings['in_flight']} requests in flight, {settings['input_tokens']} tokens in and "
        f"{settings['output_tokens']} out, experts of {settings['memory']} for all variants together, medians of "
        f"{settings['repeats']} runs. Random weights: routing is near uniform."
    )
    columns: list[Column] = [
        ("even: tok/s (min–max)", lambda p: _speed(p["even"])),
        ("TTFT p50 / p95", lambda p: _of("ttft_s", "p50", "p95")(p["even"])),
        ("zipf: tok/s (min–max)", lambda p: _speed(p["zipf"])),
        ("TTFT p50 / p95", lambda p: _of("ttft_s", "p50", "p95")(p["zipf"])),
        ("weights", lambda p: _bytes(p["device_bytes"])),
        ("peak RSS", lambda p: _bytes(p["zipf"]["peak_rss_bytes"])),
        ("start", lambda p: seconds(p["start_s"])),
        ("planning", lambda p: seconds(p["planning_s"])),
    ]
    points = {f"{point['variants']}, {point['system']}": point for point in results["points"]}
    document.table("Growth", columns, points, first="variants, system")
    return document


def qos_report(results: dict[str, Any]) -> Document:
    """What `run_qos` returned, for people."""
    document = Document("Quality of service, open loop")
    document.say(machine_line(results["machine"]))
    settings = results["settings"]
    arrivals = (
        f"the trace {settings['trace']}" if settings["trace"] else f"Poisson arrivals for {settings['duration_s']:g} s"
    )
    document.say(
        f"{settings['variants']} variants, {arrivals}, medians of {settings['repeats']} runs; SLO: first token within "
        f"{settings['slo']['ttft_s']:g} s, the others {settings['slo']['itl_s']:g} s apart. Requests given up after "
        f"{settings['drain_s']:g} s more count with the time they had waited. Random weights: routing is near uniform."
    )
    for name, rate in (settings["single_saturated_requests_per_s"] or {}).items():
        document.say(f"At {name} tokens `single` saturates at {rate:.3g} requests a second.")
    for point in results["rates"]:
        where = _point_name(point)
        document.bars(where, point["systems"])
        document.table(where, _SPEED + _LATENCY, point["systems"])
        document.table(f"{where}: the rest", _GOOD + _OPEN + _WORK, point["systems"])
        if "flood" in point:
            flood = point["flood"]
            document.rows(
                f"{where}: {flood['variant']} floods with {flood['factor']:g} times its rate, TTFT p95 of the others",
                ["system", "calm", "flooded", "ratio"],
                [
                    [name, seconds(o["calm"]["p95"]), seconds(o["flooded"]["p95"]), _ratio(o["p95_ratio"])]
                    for name, o in flood["others_ttft_s"].items()
                ],
            )
    late = sum(result["late_sends"] for point in results["rates"] for result in point["systems"].values())
    document.say(
        f"Late sends (more than 10 ms after they were due; latencies count from when they were due): {late:g}."
    )
    return document


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _point_name(point: Result) -> str:
    if point["rate_per_variant"] is None:
        return "Trace"
    return f"{point['rate_per_variant']:.3g} requests/s a variant, {point['lengths']} tokens"


def _say_ceiling(document: Document, ceiling: dict[str, Any]) -> None:
    matmul = ceiling["matmul_products_per_s"]
    also = "" if matmul is None else f" torch's bfloat16 matmul: {matmul / 1e9:.0f} G multiplications a second."
    document.say(f"Memory bandwidth, measured: {ceiling['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s.{also}")
    rows = []
    for name, c in ceiling["systems"].items():
        read = c["bytes_per_step"]
        shares = ["–" if c[kind] is None else f"{100 * c[kind]:.0f} %" for kind in ("share_reached", "bandwidth_share")]
        parts = " + ".join(format_bytes(read[kind]) for kind in ("experts", "nonexperts", "kv"))
        rows.append([name, parts, f"{c['output_tokens_per_s']:.0f}", *shares, _ratio(c["ttft_over_matmul"])])
    document.rows(
        f"Physical ceiling of decoding, {ceiling['rows']} sequences a step; of prompts, torch's own matmul",
        [
            "system",
            "read a step: experts + non-experts + KV",
            "ceiling tok/s",
            "reached",
            "bandwidth in a decode step",
            "TTFT p50 ÷ matmul of the prompts",
        ],
        rows,
    )


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    memory = "" if machine["memory_bytes"] is None else f", {format_bytes(machine['memory_bytes'])}"
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return f"{machine['cpu']}, {machine['cores']} cores{memory}{gpu}; torch {machine['torch']}."
