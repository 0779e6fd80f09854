"""The server is killed at any moment of a change: on disk is the state before or the one after, and the next start
serves it. `make test-slow`."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from families import make_family
from polymoe.bundle.live import ADDITIONS
from polymoe.bundle.manifest import read_manifest
from polymoe.bundle.reader import Bundle
from polymoe.offline.api import make_plan
from process_server import ProcessServer
from servers import LIMIT
from test_live_server import PROMPT, alone

KEYS = {"POLYMOE_API_KEY": "client", "POLYMOE_ADMIN_KEY": "admin"}
KILLS = 6
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def served(bundle: Path, root: Path, folder: Path) -> Iterator[ProcessServer]:
    """A server that is ready; it is killed in the end."""
    flags = ["--dtype", "float32", "--max-variants", "5", "--variants-root", str(root), "--plan-threads", "1"]
    server = ProcessServer(bundle, folder, 1.0, *flags, env={**os.environ, **KEYS})
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None, key: str = "admin") -> Any:
    response = httpx.request(method, url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=LIMIT)
    assert response.is_success, response.text
    return response.json()


def tokens(url: str, model: str) -> list[int]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    found: list[int] = ask(url, "POST", "/v1/completions", body, "client")["choices"][0]["token_ids"]
    return found


def meant(url: str) -> dict[str, str]:
    """Name -> where what it means comes from."""
    cards = ask(url, "GET", "/v1/variants")["data"]
    return {name: Path(card["source"]).name for card in cards for name in card["names"]}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "root", num_variants=4, tokenizer=True, changed=0.1)
    expected = {name: alone(paths, name, PROMPT) for name in paths}
    bundle = make_plan({n: paths[n] for n in ("base", "v1")}, "separate", None, tmp_path / "bundle").path
    changes: list[tuple[str, str, dict[str, Any] | None, dict[str, str]]] = [
        ("POST", "/v1/variants", {"name": "x", "source": "v2"}, {"base": "base", "v1": "v1", "x": "v2"}),
        ("PUT", "/v1/variants/x", {"source": "v3"}, {"base": "base", "v1": "v1", "x": "v3"}),
        ("POST", "/v1/variants/-/replan", {}, {"base": "base", "v1": "v1", "x": "v3"}),
        ("DELETE", "/v1/variants/x", None, {"base": "base", "v1": "v1"}),
    ]
    rng = random.Random(0)
    before, step, killed = {"base": "base", "v1": "v1"}, 0, 0
    while killed < KILLS:
        method, path, body, after = changes[step % len(changes)]
        with served(bundle, paths["base"].parent, tmp_path) as server:
            url, process = server.url, psutil.Process(server.process.pid)
            # what the last server left
            found = meant(url)
            assert found == before
            assert {name: tokens(url, name) for name in found} == {n: expected[source] for n, source in found.items()}
            listed = {addition.folder for addition in read_manifest(bundle).live_state.additions}
            assert {f"{ADDITIONS}/{place.name}" for place in (bundle / ADDITIONS).glob("*")} == listed
            assert not list(bundle.parent.glob(f".{bundle.name}*"))
            others = process.children(recursive=True)
            ask(url, method, path, body)
            time.sleep(rng.uniform(0, 3.0 if method == "POST" else 1.0))
            others += process.children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
        killed += 1
        psutil.wait_procs(others, LIMIT)
        assert not [other for other in others if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
        state = Bundle.open(bundle, verify=True).manifest.live_state
        source = {v.version: Path(v.source).name for v in read_manifest(bundle).variants}
        source |= {addition.version: Path(addition.source).name for addition in state.additions}
        found = {name: source[version] for name, version in state.names.items()}
        assert found in (before, after)
        step += found == after
        before = found
