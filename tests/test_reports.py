"""`--report` and `polymoe top`: what is mailed, and what a terminal or a pipe sees of a running server."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymoe.bench.report import Document
from polymoe.cli.main import main
from polymoe.cli.report import bundle_section, check_report, report_page
from polymoe.cli.top import run_top, snapshot_line, snapshot_table
from polymoe.console import Console
from polymoe.errors import PolymoeError
from servers import ThreadServer, engine_config, free_port, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(bundle), api_key="secret") as server:
        yield server


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="report" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["polymoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_report_of_a_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    for _ in range(2):  # an own report is replaced
        assert run(monkeypatch, "inspect", str(bundle), "--report", str(target)) == 0
    page = target.read_text()
    (section,) = data_of(page)["sections"]
    assert [v["name"] for v in section["bundle"]["variants"]] == ["base", "v1"]
    assert not re.search(r'(src|href)="', page.split("<body>")[0]), "nothing is loaded"


def test_report_of_checkpoints(trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    specs = [f"{name}={path}" for name, path in trio.items()]
    assert run(monkeypatch, "inspect", *specs, "--report", "far.html") == 0
    (section,) = data_of(Path("far.html").read_text())["sections"]
    assert [row[2] for row in section["values"]] == [0, 0], "expert 2 is identical in all"
    assert section["values"][0][0] > 0


def test_policy_of_a_page_allows_its_own_script_only(bundle: Path) -> None:
    page = report_page("</title><script>alert(1)</script>", [{"kind": "text", "text": "</script><script>alert(2)"}])
    assert "<script>alert" not in page
    script = page.rsplit("<script>", 1)[1].rsplit("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert data_of(page)["sections"][0]["text"] == "</script><script>alert(2)"
    assert "bundle" in bundle_section(bundle)


def test_files_that_are_no_reports_are_kept(tmp_path: Path) -> None:
    other = tmp_path / "page.html"
    other.write_text("<html>mine</html>")
    for path, said in (
        (other, "is not a report"),
        (tmp_path / "a.txt", "ends in .html"),
        (tmp_path / "none" / "a.html", "does not exist"),
    ):
        with pytest.raises(PolymoeError, match=said):
            check_report(path)


def test_benchmarks_have_tables_and_bars() -> None:
    document = Document("Throughput")
    document.say("a machine")
    document.rows("Speed", ["system", "tok/s"], [["mixed", "10"]])
    speed = {"output_tokens_per_s": 10.0, "output_tokens_per_s_min": 9.0, "output_tokens_per_s_max": 11.0}
    document.bars("Tokens a second", {"mixed": speed})
    assert [section["kind"] for section in document.sections] == ["text", "table", "bars"]
    assert data_of(report_page(document.title, document.sections))["sections"][2]["bars"][0]["high"] == 11.0


def test_top_in_a_pipe_writes_plain_lines(server: ThreadServer) -> None:
    pipe = io.StringIO()
    run_top(server.url, "secret", True, Console(file=pipe))
    (line,) = pipe.getvalue().splitlines()
    assert re.fullmatch(r"[\d:]{8}  ready  running 0  waiting 0  tok/s 0  TTFT p95 \S.*  KV 0%", line), line


@pytest.mark.parametrize("no_color", [False, True])
def test_top_fits_eighty_columns(server: ThreadServer, no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    body = {"model": "base", "prompt": "hi", "max_tokens": 4, "ignore_eos": True}
    httpx.post(server.url + "/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
    screen = io.StringIO()
    run_top(server.url, "secret", True, Console(file=screen, force_terminal=True, width=80))
    text = screen.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(len(line) <= 80 for line in plain.splitlines())
    assert "base" in plain
    assert "v1" in plain
    assert "…" not in plain, "nothing is cut off"
    if no_color:
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)


def test_top_says_what_is_wrong(server: ThreadServer) -> None:
    with pytest.raises(PolymoeError, match="wants a key"):
        run_top(server.url, None, True, Console(file=io.StringIO()))
    with pytest.raises(PolymoeError, match="there is no server"):
        run_top(f"http://127.0.0.1:{free_port()}", None, True, Console(file=io.StringIO()))


def test_top_while_loading() -> None:
    loading = {"time": 0.0, "status": "loading", "stage": "weights", "fraction": 0.4, "variants": []}
    assert snapshot_line(loading).endswith("loading weights 40%")
    more = {"kv_usage": 0.0, "prefix_queries": 0.0, "reconfigurations": 0.0, "host_bytes": 0.0}
    assert snapshot_table({**loading, **more}).row_count == 0
