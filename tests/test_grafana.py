"""Every query of the Grafana dashboard, asked of a real Prometheus that scrapes a real server."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from families import make_family
from polymoe.bundle.fidelity import record_fidelity
from polymoe.bundle.manifest import Fidelity
from polymoe.offline.api import make_plan
from servers import ThreadServer, engine_config, free_port, wait_for

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD: dict[str, Any] = json.loads(DEPLOY.joinpath("grafana/polymoe.json").read_text())
PROMETHEUS = shutil.which("prometheus")
# Without absent experts, fewer slots than variants, or prompts that begin alike there is nothing to divide.
EMPTY = ("prefix_cache",)


def queries() -> Iterator[tuple[str, str]]:
    """(title of its panel, expression) as Grafana would send it for the first variant alone."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s").replace("$variant", "base")
            assert "$" not in expression
            yield panel["title"], expression


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that asks Prometheus for the value of an expression now."""
    if PROMETHEUS is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("grafana")
    paths = make_family("mixtral", folder / "family", tokenizer=True)
    bundle = make_plan(paths, "auto", "1.2x", folder / "bundle").path
    measured = Fidelity(text="a.txt", tokens=9, kl=0.1, top1=0.9, perplexity_original=2.0, perplexity_served=2.1)
    record_fidelity(bundle, {"base": measured})
    with ThreadServer(engine_config(bundle)) as server:
        config = DEPLOY.joinpath("prometheus.yml").read_text()
        config = config.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("5s", "1s")
        folder.joinpath("prometheus.yml").write_text(config)
        port = free_port()
        url = f"http://127.0.0.1:{port}/api/v1/query"
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdout=log, stderr=log,
            )  # fmt: skip

        def ask(expression: str) -> list[Any]:
            answer = httpx.get(url, params={"query": expression}, timeout=10).json()
            assert answer["status"] == "success", answer
            result: list[Any] = answer["data"]["result"]
            return result

        def has_served() -> bool:
            """Requests before and after a scrape, so that there are rates."""
            body = {"model": "base", "prompt": "one two three", "max_tokens": 5, "ignore_eos": True}
            server.post("/v1/completions", body)
            try:
                rates = ask('rate(vllm:generation_tokens_total{model_name="base"}[10s]) > 0')
                return bool(rates and ask("rate(polymoe:reconfigurations_total[10s]) >= 0"))
            except (httpx.TransportError, json.JSONDecodeError):
                return False  # it starts: nobody listens, or the answer is "Service Unavailable"

        try:
            wait_for(has_served, 60)
            yield ask
        finally:
            process.terminate()
            process.wait(20)


def test_every_query_has_an_answer(ask: Any) -> None:
    for title, expression in queries():
        result = ask(expression)
        assert result or any(name in expression for name in EMPTY), f"{title}: {expression} finds nothing"


def test_variants_are_selected(ask: Any) -> None:
    """What the selector offers, and that panels of variants follow it."""
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "variant")
    metric = re.fullmatch(r"label_values\((\S+), model_name\)", variable["query"]["query"])
    assert metric is not None
    assert {r["metric"]["model_name"] for r in ask(metric[1])} == {"base", "v1", "v2"}
    for _, expression in queries():
        names = {r["metric"].get("model_name", "base") for r in ask(expression)}
        assert names <= {"base"}, expression


def test_every_metric_is_one_that_the_server_has(ask: Any) -> None:
    for _, expression in queries():
        for name in re.findall(r"(?:vllm|polymoe):\w+", expression):
            assert ask(name), name


def test_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 10
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in DASHBOARD["panels"])
