"""`/metrics` and `/v1/models` against the model-server protocol of the Gateway API inference extension and llm-d.

The protocol's text, field by field: docs/proposals/003-model-server-protocol of the Gateway API inference extension,
and llm-d's "Plugin Metric Protocol". A picker reads them as `Picker` does (its getLatestMetric, populateLoRAMetrics):
the first sample of a family, whatever its labels, and of lists the names between commas.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from polymoe.bundle.reader import Bundle
from polymoe.engine.core import EngineCore
from polymoe.offline.api import make_plan
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.server.app import create_app
from polymoe.server.endpoint_picker import endpoint_picker_metrics
from polymoe.server.metrics import Metrics
from polymoe.server.settings import ServerSettings
from servers import LIMIT, ThreadServer, engine_config, make_bundle


class Picker:
    """What an endpoint picker knows of a server after a scrape. names: of its five metrics, where not the default."""

    def __init__(self, text: str, **names: str) -> None:
        families = {family.name: family for family in text_string_to_metric_families(text)}
        defaults = {
            "queued": "vllm:num_requests_waiting", "running": "vllm:num_requests_running",
            "kv": "vllm:kv_cache_usage_perc", "lora": "vllm:lora_requests_info", "cache": "vllm:cache_config_info",
        }  # fmt: skip
        chosen = {key: families[name] for key, name in (defaults | names).items()}
        assert all(family.type == "gauge" for family in chosen.values())
        first = {key: family.samples[0] for key, family in chosen.items()}
        self.num_samples = {key: len(family.samples) for key, family in chosen.items()}
        self.waiting_queue_size, self.running = int(first["queued"].value), int(first["running"].value)
        self.kv_usage = first["kv"].value
        lora, cache = first["lora"].labels, first["cache"].labels
        self.updated = first["lora"].value
        self.active = [name.strip() for name in lora["running_lora_adapters"].split(",") if name.strip()]
        self.waiting = [name.strip() for name in lora["waiting_lora_adapters"].split(",") if name.strip()]
        self.max_active = int(lora["max_lora"])
        self.block_size, self.num_blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])


TOTALS = {"queued": "polymoe:requests_waiting", "running": "polymoe:requests_running"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    """Two variants and one slot."""
    bundle = make_bundle(tmp_path_factory.mktemp("picker"))
    with ThreadServer(engine_config(bundle, slots=1, prefetch=False, max_num_seqs=2, max_waiting=4)) as running:
        yield running


def scrape(server: ThreadServer) -> Picker:
    return Picker(httpx.get(server.url + "/metrics", timeout=LIMIT).text, **TOTALS)


def test_a_variant_in_a_slot_is_a_loaded_adapter(server: ThreadServer) -> None:
    for name in ("base", "v1", "base"):
        body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 2}
        assert server.post("/v1/completions", body).status_code == 200
        seen = scrape(server)
        assert (seen.active, seen.waiting, seen.max_active) == ([name], [], 1)
        assert seen.num_samples["lora"] == seen.num_samples["cache"] == 1
        assert abs(seen.updated - time.time()) < LIMIT


def test_load_of_the_whole_server(server: ThreadServer) -> None:
    info = server.client.info
    idle = scrape(server)
    assert (idle.waiting_queue_size, idle.running, idle.kv_usage) == (0, 0, 0.0)
    assert (idle.block_size, idle.num_blocks) == (info.block_size, info.num_kv_blocks)
    with server.full("v1"):
        busy = scrape(server)
        assert (busy.waiting_queue_size, busy.running) == (4, 2)
        assert busy.kv_usage > 0
        assert busy.active == ["v1"]


def test_models_name_their_parent(server: ThreadServer) -> None:
    cards = httpx.get(server.url + "/v1/models", timeout=LIMIT).json()["data"]
    assert {card["id"]: card["parent"] for card in cards} == {"base": None, "v1": "base"}


@pytest.mark.parametrize(("open_metrics", "status"), [(True, 200), (False, 401)])
def test_a_picker_without_a_key(server: ThreadServer, open_metrics: bool, status: int) -> None:
    """`open_metrics` opens /metrics and nothing else."""
    app = create_app(server.client, ServerSettings(api_key="secret", open_metrics=open_metrics))
    assert server.call(_get(app, "/v1/models")) == 401
    assert server.call(_get(app, "/metrics")) == status


async def _get(app: FastAPI, path: str) -> int:
    """In the event loop of the server, whose engine answers."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return (await client.get(path)).status_code


def test_waiting_variants_are_those_without_a_slot(trio_stats: tuple[EngineInfo, EngineStats]) -> None:
    info, stats = trio_stats
    families = {f.name: f for f in endpoint_picker_metrics(info, stats, 12.5)}
    (sample,) = families["vllm:lora_requests_info"].samples
    assert sample.value == 12.5
    assert sample.labels == {"max_lora": str(info.slots), "running_lora_adapters": "base,v1",
                             "waiting_lora_adapters": "v2"}  # fmt: skip
    assert families["polymoe:requests_waiting"].samples[0].value == 5
    assert families["polymoe:requests_running"].samples[0].value == 3
    metrics = Metrics()
    metrics.set_engine(info)
    metrics.set_stats(stats)
    assert Picker(metrics.render().decode(), **TOTALS).waiting == ["v2"]


@pytest.fixture(scope="module")
def trio_stats(trio: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineInfo, EngineStats]:
    """Of three variants; two are in slots, one of those and the third have work that waits."""
    folder = tmp_path_factory.mktemp("picked") / "bundle"
    bundle: Bundle = make_plan(trio, "separate", None, folder)
    core = EngineCore(engine_config(bundle.path))
    stats = msgspec.structs.replace(core.stats(), waiting=[2, 0, 3], running=[1, 2, 0], loaded=[0, 1])
    return core.info, stats
