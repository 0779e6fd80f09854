"""What the dashboard is served: pages without a key, data with it, one snapshot a second for everybody."""

import base64
import gzip
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import polymoe
from polymoe.bundle.describe import describe_bundle
from polymoe.bundle.reader import Bundle
from polymoe.offline.api import make_plan
from polymoe.server.snapshots import Snapshot, in_order
from servers import ThreadServer, engine_config, make_bundle

BUILT = Path(polymoe.__file__).parent / "server" / "ui"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("dashboard"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(bundle), api_key="secret", log_prompts=True) as server:
        yield server


def frames(server: ThreadServer, wanted: set[str], timeout: float = 15.0) -> dict[str, list[Any]]:
    """Events by name, until each of `wanted` has come twice."""
    found: dict[str, list[Any]] = {}
    deadline = time.monotonic() + timeout
    with httpx.stream("GET", server.url + "/ui/events", headers=KEY, timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.setdefault(name, []).append(json.loads(line.removeprefix("data: ")))
            if all(len(found.get(event, [])) > 1 for event in wanted) or time.monotonic() > deadline:
                break
    return found


def ask(server: ThreadServer, variant: str = "v1", tokens: int = 8) -> dict[str, Any]:
    body = {"model": variant, "prompt": "hello there", "max_tokens": tokens, "ignore_eos": True, "user": "ann"}
    answer: dict[str, Any] = server.post("/v1/completions", body, headers=KEY).json()
    return answer


def test_pages_are_open_and_data_is_not(server: ThreadServer) -> None:
    page = httpx.get(server.url + "/ui")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for name in ("app.js", "app.css"):
        assert f'"/ui/assets/{name}"' in page.text
        assert httpx.get(f"{server.url}/ui/assets/{name}").status_code == 200
    for path in ("/ui/events", "/ui/bundle", "/ui/about"):
        assert httpx.get(server.url + path).status_code == 401, path
    for path in ("/ui/assets/../../app.py", "/ui/assets/%2e%2e/app.py", "/ui/assets/nothing.js"):
        assert httpx.get(server.url + path).status_code in (401, 404), path


def test_head_ends(server: ThreadServer) -> None:
    for path in ("/ui", "/ui/events", "/ui/bundle"):
        assert httpx.head(server.url + path, headers=KEY, timeout=5).status_code == 200, path


def test_browsers_are_sent_from_the_root(server: ThreadServer) -> None:
    browser = httpx.get(server.url + "/", headers={"Accept": "text/html,*/*"})
    assert (browser.status_code, browser.headers["location"]) == (307, "/ui")
    assert httpx.get(server.url + "/").status_code == 404


def test_bundle_says_who_shares_what(server: ThreadServer, bundle: Path) -> None:
    found = httpx.get(server.url + "/ui/bundle", headers=KEY).json()
    opened = Bundle.open(bundle)
    table = np.frombuffer(base64.b64decode(found["table"]), dtype="<i4").reshape(opened.table.shape)
    assert np.array_equal(table, opened.table.numpy())
    assert [v["name"] for v in found["variants"]] == ["base", "v1"]
    assert found["engine"]["chat"] == {"base": True, "v1": True}
    # Two unrelated models share nothing: the second costs what it takes by itself, the bundle what both do.
    assert found["added_bytes"] == found["separate_bytes"]
    weights = sum(count for kind, count in opened.resident_bytes.by_kind.items() if kind != "tables")
    assert sum(found["added_bytes"]) == weights


def test_what_is_kept_has_the_order_of_the_variants_now() -> None:
    """Charts index by name: a list from before a change would be somebody else's."""
    before = Snapshot(
        time=1.0, status="ready", variants=["a", "b"], running=[1, 2], tokens=[3.0, 4.0], ttft=[None, (1.0, 2.0, 3.0)],
    )  # fmt: skip
    now = in_order(before, ["b", "new", "a"])
    assert now.variants == ["b", "new", "a"]
    assert (now.running, now.tokens, now.waiting) == ([2, 0, 1], [4.0, 0, 3.0], [])
    assert now.ttft == [(1.0, 2.0, 3.0), None, None]
    assert in_order(now, now.variants) is now
    loading = Snapshot(time=0.0, status="loading")
    assert in_order(loading, ["b"]) is loading


def test_snapshots_follow_a_request(server: ThreadServer) -> None:
    before = frames(server, {"snapshot"})
    assert before["history"], "the first event is what was kept"
    answer = ask(server)
    after = frames(server, {"snapshot"})
    assert max(sum(s["tokens"]) for s in [*after["history"][0], *after["snapshot"]]) > 0
    record = next(r for batch in after["requests"] for r in batch if r["id"] == answer["id"])
    assert (record["variant"], record["tokens"], record["finish"]) == ("v1", 8, "length")
    assert record["tenant"] == "ann"
    assert record["prompt"] == "hello there"
    assert record["duration"] >= record["first_token"] > 0
    assert record["version"] == server.client.info.variants[1].version


def test_routing_is_counted_while_somebody_looks(server: ThreadServer) -> None:
    with httpx.stream("GET", server.url + "/ui/events", headers=KEY, timeout=20) as response:
        lines, total, name = response.iter_lines(), 0.0, ""
        deadline = time.monotonic() + 15
        for line in lines:
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: ") and name == "snapshot":
                ask(server, tokens=40)
            if line.startswith("data: ") and name == "routing":
                data = json.loads(line.removeprefix("data: "))
                counts = np.frombuffer(base64.b64decode(data["counts"]), dtype="<u2").reshape(2, 2, 4) * data["scale"]
                assert counts[0].sum() == 0, "nobody asked `base`"
                total += counts[1].sum()
                if total:  # two experts a token in both layers
                    assert counts[1, 0].sum() == counts[1, 1].sum()
                    break
            assert time.monotonic() < deadline, "nothing was counted"
    assert total > 0


def test_twenty_pages_take_one_look(server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    stats = server.client.stats

    async def counted(routing: bool = False) -> Any:
        nonlocal asked
        asked += 1
        return await stats(routing)

    monkeypatch.setattr(server.client, "stats", counted)
    with httpx.Client(timeout=20, limits=httpx.Limits(max_connections=20)) as client:
        responses = [client.send(client.build_request("GET", server.url + "/ui/events", headers=KEY), stream=True)
                     for _ in range(20)]  # fmt: skip
        first, asked = time.monotonic(), 0
        time.sleep(3.2)
        seconds = time.monotonic() - first
        for response in responses:
            response.close()
    assert 1 <= asked <= seconds + 1.5


def test_a_replaced_bundle_is_not_shown_as_the_one_that_runs(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch, trio: dict[str, Path], tmp_path: Path
) -> None:
    other = make_plan(trio, "separate", None, tmp_path / "bundle")
    monkeypatch.setattr(server.client, "config", engine_config(other.path))
    answer = httpx.get(server.url + "/ui/bundle", headers=KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bundle_replaced")


def test_refused_requests_are_listed(server: ThreadServer) -> None:
    refused = server.post(
        "/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 1, "slo_class": "none"}, headers=KEY
    )
    assert refused.status_code == 400, refused.text
    listed = [r for batch in frames(server, {"snapshot"})["requests"] for r in batch]
    assert any("SLO class" in (r["error"] or "") for r in listed), refused.text


def test_added_bytes_count_what_is_shared_once(trio: dict[str, Path], tmp_path: Path) -> None:
    """Expert 2 of every layer and a tensor are identical in all three; the first variant pays for them."""
    opened = make_plan(trio, "auto", "1.5x", tmp_path / "bundle")
    found = describe_bundle(opened.path)
    weights = sum(count for kind, count in opened.resident_bytes.by_kind.items() if kind != "tables")
    assert sum(found["added_bytes"]) == pytest.approx(weights, abs=64)  # exact deltas: averages
    assert found["added_bytes"][1] < found["added_bytes"][0] < found["separate_bytes"][0] * 1.6
    points = found["dial"]
    assert len(points) > 2
    assert all(a["expert_bytes"] < b["expert_bytes"] and a["kl"] > b["kl"] for a, b in itertools.pairwise(points))
    assert points[-1]["kl"] == 0
    errors = np.array(found["position_errors"])
    predicted = np.mean([v["predicted_damage"] for v in found["variants"]])
    assert errors.sum() == pytest.approx(predicted, rel=0.01)
    assert (errors[:, 2] == 0).all(), "identical experts lose nothing"


def test_a_budget_of_all_weights_has_a_curve_of_all_weights(trio: dict[str, Path], tmp_path: Path) -> None:
    opened = make_plan(trio, "auto", "1.2x-all", tmp_path / "bundle")
    found = describe_bundle(opened.path)
    assert opened.manifest.packed_nonexperts, "some are in few bits"
    weights = sum(count for kind, count in opened.resident_bytes.by_kind.items() if kind != "tables")
    assert sum(found["added_bytes"]) == pytest.approx(weights, abs=64)
    whole = describe_bundle(make_plan(trio, "separate", None, tmp_path / "separate").path)
    assert found["separate_bytes"] == whole["separate_bytes"]
    assert found["dial_of"] == "all"
    points, total = found["dial"], opened.resident_bytes.total
    assert len(points) > 2
    assert all(a["expert_bytes"] < b["expert_bytes"] and a["kl"] > b["kl"] for a, b in itertools.pairwise(points))
    assert points[0]["expert_bytes"] < total < points[-1]["expert_bytes"]
    predicted = np.mean([v["predicted_damage"] for v in found["variants"]])
    around = [point["kl"] for point in points]
    assert min(around) <= predicted <= max(around)


def test_built_page_is_of_these_sources() -> None:
    """Users need no Node: what Vite made is committed. `make ui` makes it again."""
    ui = Path(__file__).parents[1] / "ui"
    names = [
        "index.html",
        "package.json",
        "package-lock.json",
        "tsconfig.json",
        "vite.config.ts",
        "vite.report.config.ts",
    ]
    names += [
        p.relative_to(ui).as_posix() for p in ui.joinpath("src").rglob("*") if p.is_file() and ".test." not in p.name
    ]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0".encode() + ui.joinpath(name).read_bytes() + b"\0")
    assert BUILT.joinpath("sources.sha256").read_text().strip() == digest.hexdigest(), "run: make ui"


def test_pages_are_small_and_ask_nobody_else() -> None:
    shown = [BUILT / name for name in ("index.html", "app.js", "app.css")]
    assert sum(len(gzip.compress(path.read_bytes())) for path in shown) < 300_000
    page = BUILT.joinpath("index.html").read_text()
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert attribute.startswith(("/ui/assets/", "data:,")), attribute
    assert "<script>" not in page
    assert "style=" not in page
