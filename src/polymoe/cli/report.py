"""`--report FILE.html`: one self-contained page with the dashboard's parts, for mailing."""

import base64
import hashlib
import html
import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polymoe.console import Console
from polymoe.errors import PolymoeError

if TYPE_CHECKING:
    from polymoe.offline.similarity.scan import FamilyScan

Section = Mapping[str, Any]  # see `Section` of ui/src/report.tsx
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="also write a page with pictures, for mailing")
]

_MARK = "<!doctype html>\n<!-- a report of polymoe -->\n"


def check_report(path: Path | None) -> None:
    """Raise `PolymoeError` for a report that could not be written: asked before anything slow."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise PolymoeError(f"--report {path}: give a file that ends in .html.")
    if not path.absolute().parent.is_dir():
        raise PolymoeError(f"--report {path}: the folder {path.absolute().parent} does not exist.")
    if path.is_dir():
        raise PolymoeError(f"--report {path} is a folder; give the name of a file.")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.read(len(_MARK)) not in ("", _MARK):
                raise PolymoeError(f"--report {path} is not a report, so it is not overwritten; give another name.")


def bundle_section(folder: str | Path) -> Section:
    """Expert map, memory, fidelity and variants of a bundle. Raises `BundleError`."""
    from polymoe.bundle.describe import describe_bundle

    return {"kind": "bundle", "bundle": describe_bundle(folder)}


def table_section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Section:
    return {"kind": "table", "title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def distance_section(scan: "FamilyScan") -> Section:
    """The heat map of `polymoe inspect`."""
    return {"kind": "distances", "layers": scan.layer_names, "values": scan.relative_distance.tolist()}


def eval_sections(found: Mapping[str, Any]) -> list[Section]:
    """What `run_eval` returned."""
    columns = (
        "variant",
        "perplexity, original",
        "perplexity, served",
        "KL, nats a token",
        "same first token",
        "tokens",
    )
    rows = [
        (name, f"{r['ppl_original']:.2f}", f"{r['ppl_served']:.2f}", f"{r['kl']:.5f}", f"{r['top1_agreement']:.2%}",
         f"{r['tokens']:,}")
        for name, r in found["variants"].items()
    ]  # fmt: skip
    return [table_section("Served against original", columns, rows)]


def write_report(path: Path, title: str, sections: Sequence[Section], console: Console) -> None:
    """Write the page and say where it is."""
    path.write_text(report_page(title, sections), encoding="utf-8")
    console.print(f"Report: {path}", soft_wrap=True)


def report_page(title: str, sections: Sequence[Section]) -> str:
    """One HTML page that loads nothing: script, style and data are in it, and its own policy forbids the rest."""
    files = resources.files("polymoe.server").joinpath("ui")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    made = time.strftime("%Y-%m-%d %H:%M")
    # "<" could end the element that the data stands in; names of variants and paths are anybody's.
    data = json.dumps({"title": title, "made": made, "sections": sections}).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'{_MARK}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        '<body><div id="app"></div><noscript>This report needs JavaScript.</noscript>'
        f'<script id="report" type="application/json">{data}</script><script>{script}</script></body></html>\n'
    )
