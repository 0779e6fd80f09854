"""Variants come and go over HTTP while others are served, on disk as well as in the engine."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from families import make_family
from polymoe.bundle.live import ADDED_VARIANT, ADDITIONS
from polymoe.bundle.manifest import read_manifest
from polymoe.bundle.reader import Bundle
from polymoe.cli.main import app
from polymoe.errors import EngineDeadError
from polymoe.offline.api import make_plan
from servers import LIMIT, ThreadServer, engine_config

ADMIN, KEY = "admin-key", "client-key"
CONTEXT = 256


class Admin:
    """A client of one server with both keys."""

    def __init__(self, server: ThreadServer, root: Path) -> None:
        self.server, self.root = server, root
        self.http = httpx.Client(base_url=server.url, timeout=LIMIT)

    def call(self, method: str, path: str = "", body: dict[str, Any] | None = None, key: str = ADMIN) -> httpx.Response:
        return self.http.request(method, f"/v1/variants{path}", json=body, headers={"Authorization": f"Bearer {key}"})

    def ok(self, method: str, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self.call(method, path, body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def refused(self, status: int, method: str, path: str = "", body: dict[str, Any] | None = None) -> str:
        before = self.state()
        response = self.call(method, path, body)
        assert response.status_code == status, response.text
        assert self.state() == before
        message: str = response.json()["error"]["message"]
        return message

    def state(self) -> dict[str, str]:
        """Name -> version."""
        return {name: card["version"] for card in self.ok("GET")["data"] for name in card["names"]}

    def tokens(self, model: str, prompt: list[int], count: int = 6) -> list[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        response = self.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert response.status_code == 200, response.text
        found: list[int] = response.json()["choices"][0]["token_ids"]
        return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    return make_family("mixtral", folder, num_variants=4, tokenizer=True, changed=0.1, max_position_embeddings=CONTEXT)


@pytest.fixture
def bundle(paths: dict[str, Path], tmp_path: Path) -> Path:
    return make_plan({n: paths[n] for n in ("base", "v1")}, "separate", None, tmp_path / "bundle").path


def serve(bundle: Path, root: Path, **options: Any) -> ThreadServer:
    config = engine_config(bundle, max_variants=4, dtype="float32", **options)
    return ThreadServer(config, api_key=KEY, admin_key=ADMIN, variants_root=root, plan_threads=1)


@pytest.fixture
def admin(bundle: Path, paths: dict[str, Path]) -> Iterator[Admin]:
    with serve(bundle, paths["base"].parent) as server:
        yield Admin(server, paths["base"].parent)


def alone(paths: dict[str, Path], name: str, prompt: list[int], count: int = 6) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


PROMPT = [5, 9, 33, 7]
PAUSE = float(os.environ.get("SOAK_PAUSE", "0"))  # seconds between two changes, and two requests, on a busy machine


def test_a_life(admin: Admin, bundle: Path, paths: dict[str, Path]) -> None:
    """Add, serve, replace, ask for a version, roll back, alias, pin, remove; the next start serves the same set."""
    expected = {name: alone(paths, name, PROMPT) for name in paths}
    assert admin.tokens("base", PROMPT) == expected["base"]
    added = admin.ok("POST", body={"name": "math", "source": "v2", "wait": True})
    assert added["state"] == "done"
    first = added["version"]
    assert admin.tokens("math", PROMPT) == expected["v2"]
    assert "math" in [
        m["id"] for m in admin.http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
    ]
    second = admin.ok("PUT", "/math", {"source": str(paths["v3"]), "wait": True})["version"]
    assert first != second
    assert admin.tokens("math", PROMPT) == expected["v3"]
    assert admin.tokens(f"math@{first[:8]}", PROMPT) == expected["v2"]
    assert admin.ok("POST", "/math/rollback")["version"] == first
    assert admin.tokens("math", PROMPT) == expected["v2"]
    assert admin.ok("POST", "/prod/alias", {"to": f"math@{second[:8]}"})["version"] == second
    assert admin.tokens("prod", PROMPT) == expected["v3"]
    assert admin.ok("POST", f"/math@{second[:8]}/pin", {})["pinned"]
    admin.ok("DELETE", "/prod?wait=true")
    admin.ok("DELETE", "/base?wait=true")
    assert admin.tokens("v1", PROMPT) == expected["v1"]
    text = admin.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert f'polymoe:variant_version{{model_name="math",version="{first}"}} 1.0' in text
    state = admin.state()
    assert state.keys() == {"v1", "math"}
    Bundle.open(bundle, verify=True)
    with serve(bundle, admin.root) as server:
        again = Admin(server, admin.root)
        assert again.state() == state
        assert again.tokens("math", PROMPT) == expected["v2"]
        assert again.tokens(f"math@{second[:8]}", PROMPT) == expected["v3"]
        assert again.tokens("v1", PROMPT) == expected["v1"]


def test_bad_input(admin: Admin, paths: dict[str, Path], tmp_path: Path) -> None:
    olmoe = make_family("olmoe", admin.root / "other", num_variants=1)["base"]
    assert "model_type" in admin.refused(422, "POST", body={"name": "x", "source": str(olmoe), "wait": True})
    assert "neither a variant" in admin.refused(404, "POST", body={"name": "x", "source": "nowhere"})
    outside = shutil.copytree(paths["v2"], tmp_path / "outside")
    (admin.root / "link").unlink(missing_ok=True)
    (admin.root / "link").symlink_to(outside)
    for source in (str(outside), "../outside", "link"):
        assert "--variants-root" in admin.refused(404, "POST", body={"name": "x", "source": source})
    assert "There is a variant v1" in admin.refused(409, "POST", body={"name": "V1", "source": "v2"})
    admin.refused(422, "POST", body={"name": "no name", "source": "v2"})
    admin.refused(404, "PUT", "/nobody", {"source": "v2"})
    admin.refused(404, "DELETE", "/nobody")
    admin.refused(404, "POST", "/v1/rollback")
    admin.refused(404, "POST", "/x/alias", {"to": "v1@12345678"})
    for key in (KEY, "wrong"):
        assert admin.call("GET", key=key).status_code == 401
    assert admin.http.post("/v1/completions", json={}, headers={"Authorization": f"Bearer {ADMIN}"}).status_code == 401
    busy = admin.call("POST", body={"name": "two", "source": "v2"})
    assert busy.status_code == 202
    again = admin.call("POST", body={"name": "two", "source": "v3"})
    assert again.status_code == 409, again.text
    wait_for(admin, "two")
    assert admin.tokens("two", PROMPT) == alone(paths, "v2", PROMPT)


def wait_for(admin: Admin, name: str, limit: float = LIMIT) -> dict[str, Any]:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        change = admin.ok("GET", f"/{name}")
        if change["state"] in ("done", "failed"):
            return change
        time.sleep(0.02)
    raise AssertionError(f"{name} is still being changed: {change}")


def test_without_an_admin_key_there_is_no_admin_api(bundle: Path) -> None:
    with ThreadServer(engine_config(bundle)) as server:
        response = httpx.get(f"{server.url}/v1/variants")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "admin_api_off"


def files(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def test_what_fails_leaves_nothing(
    admin: Admin, bundle: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at each step of an add: the state before, on the device, on disk and for clients."""
    expected = {name: alone(paths, name, PROMPT) for name in ("base", "v1", "v2")}
    before, held = files(bundle), admin.server.stats().resident_bytes
    variants = admin.server.state.variants

    def unchanged() -> None:
        assert files(bundle) == before
        assert admin.server.stats().resident_bytes == held
        assert admin.state().keys() == {"base", "v1"}
        assert admin.tokens("base", PROMPT) == expected["base"]

    # the planner is killed while it plans
    admin.server.call(variants.planner.start())
    assert variants.planner.pid is not None
    os.kill(variants.planner.pid, signal.SIGSTOP)
    admin.call("POST", body={"name": "x", "source": "v2"})
    admin.server.wait_for(lambda: len(list((bundle / ADDITIONS).glob(".*"))) == 1)
    os.kill(variants.planner.pid, signal.SIGKILL)
    assert "ended unexpectedly" in wait_for(admin, "x")["error"]["message"]
    unchanged()
    # a file of the checkpoint is truncated
    broken = shutil.copytree(paths["v2"], admin.root / "broken", dirs_exist_ok=True)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in admin.refused(422, "POST", body={"name": "x", "source": "broken", "wait": True})
    unchanged()

    # the disk is full when the state is written
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("polymoe.server.variant_set.rewrite_manifests", full)
        assert "No space left" in admin.refused(507, "POST", body={"name": "x", "source": "v2", "wait": True})
    unchanged()
    # the engine refuses it: what the planner wrote was damaged on the way
    from polymoe.server import variant_change

    rename = variant_change.rename_addition

    def damage(folder: Path, final: Path) -> None:
        file = folder / "layer-000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        rename(folder, final)

    with monkeypatch.context() as patch:
        patch.setattr("polymoe.server.arrival.rename_addition", damage)
        assert "layer-000" in admin.refused(422, "POST", body={"name": "x", "source": "v2", "wait": True})
    unchanged()
    # its tokenizer cannot be read any more when the engine has it

    def spoil(folder: Path, final: Path) -> None:
        (folder / ADDED_VARIANT / "tokenizer.json").write_text("{")
        rename(folder, final)

    with monkeypatch.context() as patch:
        patch.setattr("polymoe.server.arrival.rename_addition", spoil)
        assert "tokenizer" in admin.refused(422, "POST", body={"name": "x", "source": "v2", "wait": True})
    unchanged()
    admin.ok("POST", body={"name": "x", "source": "v2", "wait": True})
    assert admin.tokens("x", PROMPT) == expected["v2"]


def test_a_killed_engine_leaves_the_old_state(bundle: Path, paths: dict[str, Path]) -> None:
    before = files(bundle)
    with serve(bundle, paths["base"].parent) as server:
        admin = Admin(server, paths["base"].parent)
        assert server.client.pid is not None
        admin.call("POST", body={"name": "x", "source": "v2"})
        os.kill(server.client.pid, signal.SIGKILL)
        server.wait_for(lambda: not server.state.variants.changes.last["x"].is_open)
    assert files(bundle) == before
    assert read_manifest(bundle).live is None


def test_what_was_not_used_makes_room(admin: Admin, paths: dict[str, Path]) -> None:
    """Of four places two are planned. Pinned and planned versions stay, and who was asked last goes last."""
    admin.ok("POST", body={"name": "old", "source": "v2", "wait": True})
    admin.ok("POST", body={"name": "new", "source": "v3", "wait": True})
    body = {"name": "x", "source": "v1", "wait": True}
    assert "--max-variants 4" in admin.refused(422, "POST", body=body)
    assert "--max-variants 4" in admin.refused(422, "POST", body={**body, "evict": "previous"})
    admin.tokens("old", PROMPT)
    done = admin.ok("POST", body={**body, "evict": "unused"})
    assert any(note.startswith("new@") and note.endswith("made room") for note in done["notes"])
    assert admin.state().keys() == {"base", "v1", "old", "x"}
    assert admin.tokens("x", PROMPT) == alone(paths, "v1", PROMPT)
    admin.ok("POST", "/old/pin", {})
    # its own version is kept until the next one is there
    assert "--max-variants 4" in admin.refused(422, "PUT", "/x", {"source": "v3", "wait": True, "evict": "unused"})


class Traffic:
    """Greedy requests for some variants, all the time. `wrong`: answers that are not those of the variant alone."""

    def __init__(self, admin: Admin, expected: dict[str, list[int]]) -> None:
        self.admin, self.expected, self.wrong, self.answers = admin, expected, list[Any](), 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in expected]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str) -> None:
        client = Admin(self.admin.server, self.admin.root)
        while not self._stop.is_set():
            try:
                if (found := client.tokens(name, PROMPT)) != self.expected[name]:
                    self.wrong.append((name, found))
            except AssertionError as error:
                self.wrong.append((name, str(error)))
            self.answers += 1


def test_replan_switches_without_a_dropped_request(
    admin: Admin, bundle: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: alone(paths, source, PROMPT) for name, source in
                (("base", "base"), ("v1", "v1"), ("math", "v3"), ("prod", "v3"))}  # fmt: skip
    admin.ok("POST", body={"name": "math", "source": "v2", "wait": True})
    admin.ok("PUT", "/math", {"source": "v3", "wait": True})
    admin.ok("POST", "/prod/alias", {"to": "math"})
    first = admin.server.client.pid
    before = files(bundle)
    with monkeypatch.context() as patch:
        patch.setattr("polymoe.server.replan.available_memory", lambda: 1000)
        assert "beside the one that is served" in admin.refused(422, "POST", "/-/replan", {"wait": True})
    assert files(bundle) == before
    with Traffic(admin, expected) as traffic:
        admin.server.wait_for(lambda: traffic.answers > 4)
        typed = {"POLYMOE_URL": admin.server.url, "POLYMOE_ADMIN_KEY": ADMIN}
        said = CliRunner().invoke(app, ["variants", "replan"], env=typed, catch_exceptions=False)
        answered = traffic.answers
        admin.server.wait_for(lambda: traffic.answers > answered + 4)
    assert said.output.endswith("the bundle is planned anew and served.\n")
    assert not traffic.wrong
    assert first != admin.server.state.client.pid  # type: ignore[attr-defined]
    admin.server.wait_for(lambda: admin.server.client.pid is None or not Path(f"/proc/{first}").exists())
    manifest = read_manifest(bundle)
    assert [variant.name for variant in manifest.variants] == ["base", "v1", "math"]
    assert not manifest.live_state.additions
    assert admin.state().keys() == expected.keys()
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(f".{bundle.name}")] == []
    # what is served is live: changes go on
    admin.ok("PUT", "/math", {"source": "v2", "wait": True})
    assert admin.tokens("math", PROMPT) == alone(paths, "v2", PROMPT)
    state = Bundle.open(bundle, verify=True).manifest.live_state
    assert state.names == admin.state()


@pytest.mark.slow  # each starts a planner, which imports for seconds
def test_a_replan_that_fails_changes_nothing(
    admin: Admin, bundle: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, its engine does not start, folders cannot be exchanged, or the set changes meanwhile."""
    before, client = files(bundle), admin.server.state.client
    expected = alone(paths, "base", PROMPT)

    def unchanged() -> None:
        assert files(bundle) == before
        assert admin.server.state.client is client
        assert not list(bundle.parent.glob(f".{bundle.name}*"))
        assert admin.tokens("base", PROMPT) == expected

    assert "unknown policy" in admin.refused(422, "POST", "/-/replan", {"policy": "magic", "wait": True})
    unchanged()
    assert "below the minimum" in admin.refused(422, "POST", "/-/replan",
                                                {"policy": "auto", "memory": "1KiB", "wait": True})  # fmt: skip
    unchanged()
    with monkeypatch.context() as patch:

        async def no_start(*_: object) -> None:
            raise EngineDeadError("no memory")

        patch.setattr("polymoe.client.client.AsyncEngineClient.start", no_start)
        admin.refused(503, "POST", "/-/replan", {"wait": True})
    unchanged()
    with monkeypatch.context() as patch:
        patch.setattr("polymoe.server.replan.exchange", lambda *_: False)
        assert "cannot exchange" in admin.refused(422, "POST", "/-/replan", {"wait": True})
    unchanged()
    assert admin.call("POST", "/-/replan", {}).status_code == 202
    assert admin.call("POST", "/-/replan", {}).status_code == 409
    admin.ok("POST", "/other/alias", {"to": "v1"})
    assert "were changed while" in wait_for(admin, "-")["error"]["message"]
    admin.ok("DELETE", "/other?wait=true")
    assert files(bundle) == before
    assert admin.server.state.client is client


def test_cycles_under_traffic(admin: Admin, bundle: Path, paths: dict[str, Path]) -> None:
    """Add, serve, replace, remove, again and again, while others are served: nothing is left, nobody notices."""
    cycles(admin, bundle, paths, 5)


@pytest.mark.soak
def test_two_hundred_cycles(admin: Admin, bundle: Path, paths: dict[str, Path]) -> None:
    cycles(admin, bundle, paths, 200)


def test_random_changes(admin: Admin, paths: dict[str, Path]) -> None:
    """A short one of what `make soak` does for half an hour."""
    random_changes(admin, paths, seconds=4)


@pytest.mark.soak
def test_random_changes_for_long(admin: Admin, paths: dict[str, Path]) -> None:
    random_changes(admin, paths, seconds=60 * float(os.environ.get("SOAK_MINUTES", "30")))


def random_changes(admin: Admin, paths: dict[str, Path], seconds: float) -> None:
    """Any change at any time, allowed or not: every answer is that of a variant which the name meant meanwhile."""
    expected = {name: alone(paths, name, PROMPT) for name in paths}
    rng, stop, wrong = random.Random(0), threading.Event(), []
    allowed = list(expected.values())

    def traffic() -> None:
        client = Admin(admin.server, admin.root)
        while not stop.wait(PAUSE):
            if client.tokens("base", PROMPT) != expected["base"]:
                wrong.append("base")

    thread = threading.Thread(target=traffic)
    thread.start()
    deadline, done = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < deadline or done < 5:
            time.sleep(PAUSE)
            name, source = rng.choice(["x", "y"]), rng.choice(["v1", "v2", "v3"])
            method, path, body = rng.choice([
                ("POST", "", {"name": name, "source": source, "wait": True}),
                ("PUT", f"/{name}", {"source": source, "wait": True, "evict": "previous"}),
                ("DELETE", f"/{name}?wait=true&force={rng.choice(['true', 'false'])}", None),
                ("POST", f"/{name}/rollback", None),
                ("POST", f"/{name}/alias", {"to": rng.choice(["x", "y", "v1"])}),
                ("POST", f"/{name}/pin", {"pinned": rng.random() < 0.3}),
            ])  # fmt: skip
            response = admin.call(method, path, body)
            assert response.status_code in (200, 404, 409, 422), response.text
            done += response.status_code == 200
            for served in admin.state():
                assert admin.tokens(served, PROMPT) in allowed
    finally:
        stop.set()
        thread.join()
    assert not wrong
    admin.server.wait_for(lambda: not admin.server.state.variants.draining)
    held = admin.ok("GET")["data"]
    assert len(held) <= 4
    assert {card["state"] for card in held} <= {"serving", "held"}


def cycles(admin: Admin, bundle: Path, paths: dict[str, Path], count: int) -> None:
    expected = {name: alone(paths, name, PROMPT, 12) for name in paths}
    stop, wrong, answers = threading.Event(), [], [0]

    def traffic(name: str) -> None:
        client = Admin(admin.server, admin.root)
        while not stop.wait(PAUSE):
            found = client.tokens(name, PROMPT, 12)
            answers[0] += 1
            if found != expected[name]:
                wrong.append((name, found))

    threads = [threading.Thread(target=traffic, args=(name,)) for name in ("base", "v1")]
    before, held = files(bundle), admin.server.stats().resident_bytes
    memory: list[int] = []
    for thread in threads:
        thread.start()
    try:
        for cycle in range(count):
            time.sleep(PAUSE)
            first, second = ("v2", "v3") if cycle % 2 else ("v3", "v2")
            admin.ok("POST", body={"name": "x", "source": first, "wait": True})
            assert admin.tokens("x", PROMPT, 12) == expected[first]
            admin.ok("PUT", "/x", {"source": second, "wait": True})
            assert admin.tokens("x", PROMPT, 12) == expected[second]
            admin.ok("DELETE", "/x?wait=true")
            memory.append(resident(admin.server.client.pid))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert answers[0] > count
    admin.server.wait_for(admin.server.is_idle)
    assert admin.server.stats().resident_bytes == held
    assert files(bundle) - {"manifest.json"} == before - {"manifest.json"}
    assert not list((bundle / ADDITIONS).iterdir())
    warm = memory[count // 4 :]
    assert max(warm) < 1.03 * warm[0], memory


def resident(pid: int | None) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024
