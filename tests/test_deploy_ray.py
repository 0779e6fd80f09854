"""Pools on a real local Ray, which the tests start themselves: `make test-ray`, skipped where Ray is not installed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymoe import LLM, SamplingParams
from polymoe.deploy.build import build_app
from polymoe.deploy.config import DeployConfig, Pool
from polymoe.deploy.installed import VARIABLES
from polymoe.offline.api import make_plan
from polymoe.server.settings import ServerSettings
from servers import LIMIT, events, free_port, make_bundle, wait_for

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'polymoe[ray]'")
from ray import serve  # noqa: E402

pytestmark = pytest.mark.ray
APPLICATION = "test"
LONG = 300  # tokens of an answer that is surely not at its end when a test interferes


class Deployment:
    """A running deployment of one bundle."""

    def __init__(self, bundle: Path, port: int) -> None:
        self.bundle, self.url = bundle, f"http://127.0.0.1:{port}"
        self.port = port

    def deploy(self, bundle: Path, **pool: Any) -> None:
        """Anew, or in place of what runs: then a rolling update."""
        options = {"num_threads": 1, "kv_cache_bytes": 1 << 24, "device": "cpu"}
        config = DeployConfig(
            server=ServerSettings(port=self.port, grace=60.0),
            pools=(Pool(name="two", sources=[str(bundle)], cpus=0.5, replicas=2, engine=options, **pool),),
        )
        serve.run(build_app(config), name=APPLICATION)

    def handle(self) -> Any:
        return serve.get_deployment_handle("two", APPLICATION)

    def replicas(self) -> list[tuple[int, str]]:
        """(pid of the engine, bundle) of each replica."""
        return [tuple(answer) for answer in self.handle().broadcast("pid").results(timeout_s=LIMIT)]

    def complete(self, variant: str, tokens: int = 8, prompt: Any = "One two three", **more: Any) -> httpx.Response:
        body = {"model": variant, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(self.url + "/v1/completions", json=body | more, timeout=LIMIT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("deploy"))


@pytest.fixture(scope="module")
def deployment(bundle: Path) -> Iterator[Deployment]:
    port = free_port()
    # For Ray's processes; this one has imported it without, as handles are used here outside of an event loop.
    os.environ.update(VARIABLES)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
             namespace="polymoe")  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        running = Deployment(bundle, port)
        running.deploy(bundle)
        yield running
        serve.shutdown()
    finally:
        ray.shutdown()


def test_the_command_serves_until_it_is_stopped(bundle: Path, tmp_path: Path) -> None:
    """`polymoe deploy` with a Ray of its own: before the other tests start theirs."""
    port = free_port()
    file = tmp_path / "deploy.toml"
    file.write_text(
        f'[server]\nport = {port}\n[[pool]]\nname = "one"\nsources = ["{bundle}"]\ncpus = 0.5\n'
        '[pool.engine]\nkv_cache = "16MiB"\ndevice = "cpu"\n'
    )
    command = [sys.executable, "-c", "from polymoe.cli.main import main; main()", "deploy", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def is_served() -> bool:
                assert process.poll() is None, "the command ended"
                try:
                    return httpx.get(url + "/v1/models", timeout=5).status_code == 200
                except httpx.HTTPError:
                    return False

            wait_for(is_served)
            body = {"model": "v1", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
            answer = httpx.post(url + "/v1/completions", json=body, timeout=LIMIT)
            assert answer.json()["usage"]["completion_tokens"] == 3, answer.text
        finally:
            process.terminate()
        printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, printed
    assert f"{url} serves 1 pools with 1 replicas" in printed


def test_the_same_api_and_the_same_tokens(deployment: Deployment, bundle: Path) -> None:
    """Answers are those of the bundle on one engine; errors and streams have the server's own forms."""
    names = [card["id"] for card in httpx.get(deployment.url + "/v1/models", timeout=LIMIT).json()["data"]]
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
        with httpx.stream("POST", deployment.url + "/v1/completions", json=body, timeout=LIMIT) as response:
            received = list(events(response))
        assert received[-1] == "[DONE]"
        assert "".join(e["choices"][0]["text"] for e in received[:-1]) == expected[0].outputs[0].text
    unknown = deployment.complete("nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    wrong = deployment.complete("base", prompt=[10**6])
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")
    chat = {"model": "v1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert httpx.post(deployment.url + "/v1/chat/completions", json=chat, timeout=LIMIT).status_code == 200


def test_metrics_are_of_all_replicas(deployment: Deployment) -> None:
    for _ in range(4):
        deployment.complete("base")
    text = httpx.get(deployment.url + "/metrics", timeout=LIMIT).text
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
        with httpx.stream("POST", deployment.url + "/v1/completions", json=body, timeout=LIMIT) as response:
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

    def is_back() -> bool:
        try:
            now = deployment.replicas()
        except Exception:
            return False
        return len(now) == 2 and before[0] not in now

    wait_for(is_back)
    assert {served for _, served in deployment.replicas()} == {str(deployment.bundle)}


def test_rolling_update(deployment: Deployment, bundle: Path, tmp_path: Path) -> None:
    """Another bundle replaces the first one under load, and no request fails."""
    checkpoints = bundle.parent / "checkpoints"
    paths = {name: checkpoints / name for name in ("base", "v1")}
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
