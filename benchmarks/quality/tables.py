"""`python -m benchmarks.quality.tables`: the tables of docs/quality.md out of the reports in docs/quality.

A table stands between `<!-- fidelity of family -->` and `<!-- end -->`; `family` is docs/quality/family.json, or, where
that is not kept, the report family.md that was made of it. `fidelity`: rows with and without text side by side.
`as good`: what it takes to be as good as `auto`. `verdict`: what the rows show, in a sentence each.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.baselines.methods import ON_TEXT
from benchmarks.quality.report import AS_GOOD, FIDELITY, NOTHING, quality_report
from polymoe.errors import PolymoeError

DOCS = Path(__file__).parents[2] / "docs"
_PLACE = re.compile(r"(<!-- (fidelity|as good|verdict) of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PREDICTED = re.compile(r"^Predicted and measured mean KL, predictions from (\w+): (.*)\.$", re.MULTILINE)

Rows = list[list[str]]


def with_tables(page: str, reports: Path) -> str:
    """`page` with all its tables written anew. Raises `PolymoeError` for a report that is missing or has no table."""

    def table(place: re.Match[str]) -> str:
        start, kind, name, end = place.groups()
        return f"{start}{_KINDS[kind](_report(reports, name))}\n{end}"

    return _PLACE.sub(table, page)


def _report(reports: Path, name: str) -> str:
    """Markdown, as `quality_report` wrote it or writes it now."""
    figures, report = reports / f"{name}.json", reports / f"{name}.md"
    if figures.exists():
        return quality_report(json.loads(figures.read_text(encoding="utf-8"))).markdown()
    if not report.exists():
        raise PolymoeError(f"neither {figures} nor {report} is there; make them with python -m benchmarks.quality.")
    return report.read_text(encoding="utf-8")


def _rows(report: str, title: str) -> Rows:
    """The cells of the table under `**title**`, without its header."""
    _, found, rest = report.partition(f"**{title}**\n\n")
    if not found:
        raise PolymoeError(f"a report has no table {title!r}; make it with python -m benchmarks.quality.")
    lines = rest.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _table(header: str, rows: Rows) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, f"|{'---|' + '--:|' * (columns - 1)}", *(f"| {' | '.join(row)} |" for row in rows)])


def _fidelity(report: str) -> str:
    plain: dict[str, list[str]] = {}
    fitted: dict[str, list[str]] = {}
    names: dict[str, None] = {}  # in order
    for system, *figures in _rows(report, FIDELITY):
        name = system.removesuffix(ON_TEXT)
        names[name] = None
        (plain if system == name else fitted)[name] = figures
    missing = [""] * 5
    rows = []
    for name in names:
        experts, memory, *_ = plain.get(name) or fitted[name]
        without, on_text = plain.get(name, missing), fitted.get(name, missing)
        shown = f"**{name}**" if name.startswith("auto ") else name
        rows.append([shown, experts, memory, *without[2:5], *on_text[2:5]])
    return _table("| | experts | in memory | KL mean | worst | top-1 | on text: KL mean | worst | top-1 |", rows)


def _as_good(report: str) -> str:
    rows = [row[:4] for row in _rows(report, AS_GOOD)]
    return _table("| | experts | KL mean | the smallest row that is as good |", rows)


def _verdict(report: str) -> str:
    systems = {row[0] for row in _rows(report, FIDELITY)}
    both = sum(f"{name}{ON_TEXT}" in systems for name in systems)
    beaten = [f"{row[0]} by {row[4]}" for row in _rows(report, AS_GOOD) if row[4] != NOTHING]
    sources = {"weights": "the weights alone", "text": "text"}
    worse = re.search(r"^Worse on text than without: (.*)\.$", report, re.MULTILINE)
    return " ".join(
        [
            f"Better than `auto` in the same memory or less: {'; '.join(beaten)}." if beaten else
            "No row is better than `auto` in the same memory or less (without text: among rows without text).",
            *(f"Predicted against measured mean KL, predictions from {sources[kind]}: {found}."
              for kind, found in _PREDICTED.findall(report)),
            f"Worse with text than without, of {both} rows measured both ways: {worse[1] if worse else 'none'}.",
        ]
    )  # fmt: skip


_KINDS: dict[str, Callable[[str], str]] = {"fidelity": _fidelity, "as good": _as_good, "verdict": _verdict}


def main() -> int:
    page = DOCS / "quality.md"
    try:
        text = with_tables(page.read_text(encoding="utf-8"), DOCS / "quality")
    except PolymoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
