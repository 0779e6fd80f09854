"""Pools on a real local Ray, which the tests start themselves: `make test-ray`, skipped where Ray is not installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.bundle.manifest import read_manifest
from polymoe.deploy.build import build_app
from polymoe.deploy.config import Autoscaling, DeployConfig, Pool
from polymoe.deploy.installed import VARIABLES
from polymoe.deploy.run import start_serve, why_not
from polymoe.offline.api import make_plan
from polymoe.offline.plan.options import PlanOptions
from polymoe.protocol.info import EngineStats
from polymoe.server.keys import Key, add_key
from polymoe.server.settings import ServerSettings
from servers import CONTEXT, LIMIT, events, free_port, wait_for

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'polymoe[ray]'")
from ray import serve  # noqa: E402

pytestmark = pytest.mark.ray
APPLICATION = "test"
CLIENT, ADMIN = ({"Authorization": f"Bearer {who}-key"} for who in ("client", "admin"))
LONG = 300  # tokens of an answer that is surely not at its end when a test interferes


class Deployment:
    """A running deployment of one bundle, two replicas on the ingress's own port."""

    def __init__(self, bundle: Path, port: int) -> None:
        self.bundle, self.url = bundle, f"http://127.0.0.1:{port}"
        self.port = port
        self.checkpoints = bundle.parent / "checkpoints"

    def config(self, bundle: Path, ingresses: int = 1, keys: Path | None = None, **pool: Any) -> DeployConfig:
        options = {"num_threads": 1, "kv_cache_bytes": 1 << 24, "device": "cpu", "max_variants": 4}
        admin: dict[str, Any] = {"admin_key": "admin-key", "variants_root": self.checkpoints}
        pool = {"name": "two", "replicas": 2, "engine": options, **pool}
        return DeployConfig(
            server=ServerSettings(
                port=self.port, grace=60.0, api_key="client-key", keys=keys, **(admin if ingresses == 1 else {})
            ),
            pools=(Pool(sources=[str(bundle)], cpus=0.5, **pool),),
            ingresses=ingresses,
        )

    def deploy(self, bundle: Path, **more: Any) -> None:
        """Anew, or in place of what runs: then a rolling update."""
        serve.run(build_app(self.config(bundle, **more)), name=APPLICATION, route_prefix=None)

    def handle(self) -> Any:
        return serve.get_deployment_handle("two", APPLICATION)

    def replicas(self) -> list[tuple[int, str]]:
        """(pid of the engine, bundle) of each replica."""
        return [tuple(answer) for answer in self.handle().broadcast("pid").results(timeout_s=LIMIT)]

    def replicas_or_none(self) -> list[tuple[int, str]]:
        """None while one of them is gone."""
        try:
            return self.replicas()
        except Exception:
            return []

    def complete(self, variant: str, tokens: int = 8, prompt: Any = "One two three", **more: Any) -> httpx.Response:
        body = {"model": variant, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(self.url + "/v1/completions", json=body | more, headers=CLIENT, timeout=LIMIT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `base` and `v1`; `v2` is a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("deploy")
    paths = make_family("mixtral", folder / "checkpoints", num_variants=3, perturb=None, tokenizer=True,
                        max_position_embeddings=CONTEXT)  # fmt: skip
    make_plan({name: paths[name] for name in ("base", "v1")}, "separate", None, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def deployment(bundle: Path) -> Iterator[Deployment]:
    # For Ray's processes; this one has imported it without, as handles are used here outside of an event loop.
    os.environ.update(VARIABLES)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
             namespace="polymoe")  # fmt: skip
    try:
        running = Deployment(bundle, free_port())
        start_serve(running.config(bundle))
        running.deploy(bundle)
        yield running
        serve.shutdown()
    finally:
        ray.shutdown()


@contextmanager
def command(bundle: Path, folder: Path, http: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`polymoe deploy` with a Ray of its own; (the process, URL) once it serves. Before other tests start their Ray."""
    port = free_port()
    file = folder / "deploy.toml"
    file.write_text(
        f'http = "{http}"\n[server]\nport = {port}\n[[pool]]\nname = "one"\nsources = ["{bundle}"]\ncpus = 0.5\n'
        '[pool.engine]\nkv_cache = "16MiB"\ndevice = "cpu"\n'
    )
    line = [sys.executable, "-c", "from polymoe.cli.main import main; main()", "deploy", str(file)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:

        def is_served() -> bool:
            assert process.poll() is None, "the command ended"
            try:
                return httpx.get(url + "/v1/models", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        try:
            wait_for(is_served)
            yield process, url
        finally:
            process.kill()


def three_tokens(url: str) -> int:
    body = {"model": "v1", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=LIMIT)
    found: int = answer.json()["usage"]["completion_tokens"]
    return found


def test_the_command_serves_until_it_is_stopped(bundle: Path, tmp_path: Path) -> None:
    """Behind Ray's proxy."""
    with command(bundle, tmp_path, "proxy") as (process, url):
        assert three_tokens(url) == 3  # before Ray has told the command that all is ready
        assert process.stdout is not None
        assert any(f"{url} serves 1 pools with 1 replicas" in line for line in process.stdout)
        process.terminate()
        printed, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, printed


def test_a_lost_head_node(bundle: Path, tmp_path: Path) -> None:
    """What runs goes on without the head's state: nothing that a request needs is asked of it."""
    with command(bundle, tmp_path, "ingress") as (process, url):
        head = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "gcs_server"]
        assert len(head) == 1
        head[0].kill()
        until = time.monotonic() + 10.0
        while time.monotonic() < until:
            assert three_tokens(url) == 3
            time.sleep(0.2)


def test_the_same_api_and_the_same_tokens(deployment: Deployment, bundle: Path) -> None:
    """Answers are those of the bundle on one engine; errors and streams have the server's own forms."""
    names = [
        card["id"] for card in httpx.get(deployment.url + "/v1/models", headers=CLIENT, timeout=LIMIT).json()["data"]
    ]
    assert names == ["base", "v1"]
    alone = LLM(bundle, device="cpu", num_threads=1, kv_cache_bytes=1 << 24)
    for name in names:
        expected = alone.generate(
            ["One two three"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), variants=[name]
        )
        answer = deployment.complete(name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected[0].outputs[0].text
        assert answer.json()["usage"]["completion_tokens"] == 8
        body = {"model": name, "prompt": "One two three", "max_tokens": 8, "temperature": 0, "stream": True,
                "ignore_eos": True}  # fmt: skip
        with httpx.stream(
            "POST", deployment.url + "/v1/completions", json=body, headers=CLIENT, timeout=LIMIT
        ) as response:
            received = list(events(response))
        assert received[-1] == "[DONE]"
        assert "".join(e["choices"][0]["text"] for e in received[:-1]) == expected[0].outputs[0].text
    unknown = deployment.complete("nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    wrong = deployment.complete("base", prompt=[10**6])
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")
    chat = {"model": "v1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert (
        httpx.post(deployment.url + "/v1/chat/completions", json=chat, headers=CLIENT, timeout=LIMIT).status_code == 200
    )


def test_metrics_are_of_all_replicas(deployment: Deployment) -> None:
    for _ in range(4):
        deployment.complete("base")
    text = httpx.get(deployment.url + "/metrics", headers=CLIENT, timeout=LIMIT).text
    served = [float(line.split()[1]) for line in text.splitlines() if line.startswith("polymoe:tokens_served_total")]
    assert sum(served) >= 4 * 8
    assert 'vllm:num_requests_running{model_name="v1"} 0.0' in text


def test_a_killed_replica(deployment: Deployment) -> None:
    """Non-streaming requests are answered by the other one, streams that had begun end with the error form, and the
    replica comes back with what it served."""
    before = deployment.replicas()
    answers: list[httpx.Response] = []
    streams: list[list[Any]] = []

    def ask(variant: str) -> None:
        answers.append(deployment.complete(variant, LONG))

    def stream(variant: str) -> None:
        body = {"model": variant, "prompt": "a", "max_tokens": LONG, "stream": True, "ignore_eos": True}
        with httpx.stream(
            "POST", deployment.url + "/v1/completions", json=body, headers=CLIENT, timeout=LIMIT
        ) as response:
            streams.append([])
            mine = streams[-1]
            for event in events(response):
                mine.append(event)

    threads = [threading.Thread(target=kind, args=(name,)) for name in ("base", "v1") * 3 for kind in (ask, stream)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(len(events_) > 2 for events_ in streams) >= 5)
    os.kill(before[0][0], signal.SIGKILL)
    for thread in threads:
        thread.join(LIMIT)
    assert [answer.status_code for answer in answers] == [200] * 6
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {LONG}
    assert all(received[-1] == "[DONE]" for received in streams)
    broken = [received for received in streams if "error" in received[-2]]
    assert broken, "no stream was on the killed replica"
    assert {received[-2]["error"]["code"] for received in broken} == {"engine_dead"}

    wait_for(lambda: len(now := deployment.replicas_or_none()) == 2 and before[0] not in now)
    assert {served for _, served in deployment.replicas()} == {str(deployment.bundle)}


def test_rolling_update(deployment: Deployment, tmp_path: Path) -> None:
    """Another bundle replaces the first one under load, and no request fails."""
    paths = {name: deployment.checkpoints / name for name in ("base", "v1")}
    new = tmp_path / "bundle"
    make_plan(paths, "separate", None, new)
    stop = threading.Event()
    codes: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            codes.append(deployment.complete("base", 16).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        deployment.deploy(new)
        time.sleep(1.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    assert set(codes) == {200}, json.dumps(codes)
    assert len(codes) > 4
    assert {served for _, served in deployment.replicas()} == {str(new)}
    before = deployment.replicas()
    deployment.deploy(new)
    assert deployment.replicas() == before, "nothing has changed, and replicas were replaced"


def test_variants_come_and_go_on_all_replicas(deployment: Deployment, bundle: Path, tmp_path: Path) -> None:
    """One call of the admin API changes every replica or none, and one that comes later has the present set."""
    deployment.deploy(bundle)
    body = {"name": "math", "source": "v2", "wait": True}
    added = httpx.post(deployment.url + "/v1/variants", json=body, headers=ADMIN, timeout=LIMIT)
    assert added.status_code == 200, added.text
    paths = {name: deployment.checkpoints / name for name in ("base", "v2")}
    alone = LLM(make_plan(paths, "separate", None, tmp_path / "two").path, device="cpu", kv_cache_bytes=1 << 24)
    expected = alone.generate(
        ["One two three"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), variants=["v2"]
    )[0].outputs[0].text  # fmt: skip

    def texts() -> set[str]:
        """Of as many requests at once as both replicas are needed for."""
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: deployment.complete("math"), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        return {answer.json()["choices"][0]["text"] for answer in answers}

    assert texts() == {expected}
    before = deployment.replicas()
    os.kill(before[0][0], signal.SIGKILL)
    wait_for(lambda: len(now := deployment.replicas_or_none()) == 2 and before[0] not in now)
    assert texts() == {expected}
    held = httpx.get(deployment.url + "/v1/variants", headers=ADMIN, timeout=LIMIT).json()
    assert {card["name"] for card in held["data"]} == {"base", "v1", "math"}
    wrong = httpx.put(
        deployment.url + "/v1/variants/math", json={"source": "nowhere", "wait": True}, headers=ADMIN, timeout=LIMIT
    )
    assert wrong.status_code == 404
    assert texts() == {expected}
    removed = httpx.delete(deployment.url + "/v1/variants/math?wait=true", headers=ADMIN, timeout=LIMIT)
    assert removed.status_code == 200, removed.text
    assert deployment.complete("math").status_code == 404


def close_to(checkpoint: Path, folder: Path) -> None:
    """Every value of its weights a little different."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        weights[name] = weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=noise)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_variants_of_several_pools(deployment: Deployment, tmp_path: Path) -> None:
    """A new variant goes to the pool that it is nearest to, or where its base is. What a name of two pools means
    changes in both in one step, or in none: `v1` has two versions, as `right` merges its experts with those of `v2`."""
    paths = {name: deployment.checkpoints / name for name in ("base", "v1", "v2")}
    close_to(paths["v2"], deployment.checkpoints / "near-v2")
    left = make_plan({name: paths[name] for name in ("base", "v1")}, "separate", None, tmp_path / "left")
    options = PlanOptions(accept_unrelated=True)
    right = make_plan({name: paths[name] for name in ("v1", "v2")}, "mean", None, tmp_path / "right", options=options)
    config = deployment.config(left.path, name="left", replicas=1)
    pool = config.pools[0]
    other = msgspec.structs.replace(pool, name="right", sources=[str(right.path)])
    config = msgspec.structs.replace(config, pools=(pool, other))
    serve.run(build_app(config), name=APPLICATION, route_prefix=None)

    def admin(method: str, path: str = "", **body: Any) -> httpx.Response:
        url = deployment.url + "/v1/variants" + path
        return httpx.request(method, url, json=body or None, headers=ADMIN, timeout=LIMIT)

    def tokens_served(pool: str) -> int:
        answers = serve.get_deployment_handle(pool, APPLICATION).broadcast("stats").results(timeout_s=LIMIT)
        return sum(sum(msgspec.msgpack.decode(answer, type=EngineStats).tokens_served) for answer in answers)

    def texts(variant: str) -> set[str]:
        """Of as many requests at once as surely go to every pool that has it."""
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: deployment.complete(variant), range(24)))
        assert {answer.status_code for answer in answers} == {200}, answers[0].text
        return {answer.json()["choices"][0]["text"] for answer in answers}

    def alone(source: str) -> str:
        found = LLM(make_plan({"x": deployment.checkpoints / source}, "separate", None, tmp_path / source).path,
                    device="cpu", kv_cache_bytes=1 << 24)  # fmt: skip
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return found.generate(["One two three"], sampling, variants=["x"])[0].outputs[0].text

    expected = {source: alone(source) for source in ("base", "v2", "near-v2")}
    before = {pool: tokens_served(pool) for pool in ("left", "right")}
    texts("v1")
    assert all(tokens_served(pool) > count for pool, count in before.items())

    added = admin("POST", name="math", source="near-v2", wait=True)
    assert added.status_code == 200, added.text
    assert any(note.startswith("pool right;") for note in added.json()["notes"]), added.json()
    assert [Path(a.source_path).name for a in read_manifest(right.path).live_state.additions] == ["near-v2"]
    assert read_manifest(left.path).live is None
    assert texts("math") == {expected["near-v2"]}
    assert admin("POST", name="again", source="base", wait=True).status_code == 200
    assert set(read_manifest(left.path).live_state.names) == {"base", "v1", "again"}

    replaced = admin("PUT", "/v1", source="v2", wait=True)
    assert replaced.status_code == 200, replaced.text
    assert texts("v1") == {expected["v2"]}
    meant = [read_manifest(bundle.path).live_state.names["v1"] for bundle in (left, right)]
    refused = admin("PUT", "/v1", source="base", wait=True)  # `right` is full by now, `left` has room
    assert refused.status_code == 422, refused.text
    assert [read_manifest(bundle.path).live_state.names["v1"] for bundle in (left, right)] == meant
    assert texts("v1") == {expected["v2"]}
    elsewhere = admin("POST", "/v1/alias", to="base")
    assert elsewhere.status_code == 409
    assert "pool right" in elsewhere.json()["error"]["message"]
    assert admin("POST", "/v1/rollback").status_code == 200
    assert expected["v2"] not in texts("v1")
    assert admin("DELETE", "/v1?wait=true").status_code == 200
    assert deployment.complete("v1").status_code == 404
    assert all("v1" not in read_manifest(bundle.path).live_state.names for bundle in (left, right))
    assert texts("base") == {expected["base"]}


def test_two_ingresses(deployment: Deployment, tmp_path: Path) -> None:
    """Limits of keys are counted together. Where one is killed, clients that try again as OpenAI's do lose nothing, and
    the port is never without a listener."""
    keys = tmp_path / "keys.json"
    limited = {"Authorization": "Bearer " + add_key(keys, Key(name="k", sha256="0" * 64, requests_per_minute=4))}
    deployment.deploy(deployment.bundle, ingresses=2, keys=keys)
    body = {"model": "base", "prompt": [5], "max_tokens": 1}
    answers = []
    for _ in range(16):  # each on a connection of its own, which the system gives to either
        answers.append(httpx.post(deployment.url + "/v1/completions", json=body, headers=limited, timeout=LIMIT))
        time.sleep(0.5)
    assert {answer.status_code for answer in answers} == {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) <= 6, "as if each ingress had a limit of its own"
    handle = serve.get_deployment_handle("ingress", APPLICATION)
    pids = handle.broadcast("pid").results(timeout_s=LIMIT)
    assert len(set(pids)) == 2
    stop = threading.Event()
    codes: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            for attempt in range(3):
                try:
                    codes.append(deployment.complete("base", 16).status_code)
                    break
                except httpx.TransportError:
                    time.sleep(0.5 * 2**attempt)
            else:
                codes.append(0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1.0)
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(4.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
    assert set(codes) == {200}
    wait_for(lambda: len(handle.broadcast("pid").results(timeout_s=LIMIT)) == 2)


def test_a_device_that_cannot_hold_its_plan(deployment: Deployment) -> None:
    """The update fails with the engine's own message, and what ran before goes on."""
    deployment.deploy(deployment.bundle)
    before = set(deployment.replicas())
    with pytest.raises(RuntimeError):
        deployment.deploy(deployment.bundle, engine={"device": "cpu", "kv_cache_bytes": 4096})
    assert "KV cache holds" in why_not("test")
    assert set(deployment.replicas()) & before
    assert deployment.complete("base").status_code == 200


def test_replicas_come_and_go_with_the_work(deployment: Deployment) -> None:
    """Also where the pool ran without autoscaling before: Ray's replicas report nothing unless they were started for
    it, so that the one of two that was left was asked for its work in vain, for ever."""
    scaling = Autoscaling(max_replicas=2, ongoing_requests=2.0, upscale_delay=1.0, downscale_delay=2.0)
    deployment.deploy(deployment.bundle, replicas=1, autoscaling=scaling)
    wait_for(lambda: len(deployment.replicas_or_none()) == 1)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert deployment.complete("base", LONG).status_code == 200

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask) for _ in range(8)]
        try:
            wait_for(lambda: len(deployment.replicas_or_none()) == 2)
        finally:
            stop.set()
        for each in asked:
            each.result(LIMIT)
    wait_for(lambda: len(deployment.replicas_or_none()) == 1)
    assert deployment.complete("base").status_code == 200
