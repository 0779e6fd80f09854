"""A server seen from outside: request ids, the log, aliases, a proxy's path, metrics and traces."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from polymoe.client.output_sequence import CompletionChunk
from polymoe.errors import ConfigError
from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo
from polymoe.protocol.request import SamplingParams
from polymoe.server.http_request import HttpRequest
from polymoe.server.logs import HumanFormatter, JsonFormatter
from polymoe.server.metrics import Metrics
from polymoe.server.request_log import RecordedRequest, RequestLog
from polymoe.server.request_timer import RequestTimer
from polymoe.server.settings import ServerSettings
from polymoe.server.traces import Tracer, tracer_from_environment
from servers import ThreadServer, engine_config, make_bundle

BODY: Any = {"model": "base", "prompt": "the fox", "max_tokens": 3, "ignore_eos": True}
SECRET = "quick brown"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    bundle: Path = make_bundle(tmp_path_factory.mktemp("seen"))
    options: Any = {"aliases": ("gpt-4o=base",), "root_path": "/llm", "log_requests": True, "api_key": "key"}
    with ThreadServer(engine_config(bundle), **options) as server:
        yield server


def post(server: ThreadServer, path: str, body: Any, **headers: str) -> httpx.Response:
    return server.post(path, body, headers={"Authorization": "Bearer key", **headers})


def get(server: ThreadServer, path: str) -> httpx.Response:
    return httpx.get(server.url + path, headers={"Authorization": "Bearer key"})


# --- ids and the log


def test_every_answer_has_a_request_id(server: ThreadServer) -> None:
    """The client's own where it is one; answers that no endpoint gave have one too."""
    given = post(server, "/v1/completions", BODY, **{"x-request-id": "mine-7"})
    assert given.headers["x-request-id"] == "mine-7"
    assert given.json()["id"].startswith("cmpl-mine-7-")
    assert post(server, "/v1/completions", BODY, **{"x-request-id": "mine-7"}).status_code == 200
    for answer in (
        post(server, "/v1/completions", BODY, **{"x-request-id": "a b"}),
        post(server, "/v1/completions", {}),
        httpx.get(server.url + "/v1/models"),
        get(server, "/nowhere"),
        httpx.get(server.url + "/health"),
    ):
        assert len(answer.headers["x-request-id"]) == 32
    made = post(server, "/v1/completions", BODY)
    assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"
    message = {"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "the fox"}]}
    answer = server.post("/v1/messages", message, headers={"x-api-key": "key"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_the_engine_knows_the_id(server: ThreadServer) -> None:
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**BODY, "max_tokens": 1000, "n": 16, "stream": True},
        headers={"Authorization": "Bearer key", "x-request-id": "watch-me"},
    ) as answer:  # fmt: skip
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()  # kept, or the connection would be closed with it
        next(lines)
        assert get(server, "/load").json() == {"server_load": 1}
        assert any(name.startswith("cmpl-watch-me-") for name in server.client.open_streams)
    server.wait_for(server.is_idle)
    assert get(server, "/load").json() == {"server_load": 0}


def test_a_line_for_each_request_without_its_text(server: ThreadServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polymoe.server.http_request"):
        post(server, "/v1/completions", {**BODY, "prompt": SECRET, "n": 2}, **{"x-request-id": "seen"})
        server.wait_for(lambda: len(caplog.records) == 1)
    (record,) = caplog.records
    fields: Any = record.fields  # type: ignore[attr-defined]
    assert fields["request_id"] == "seen"
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/v1/completions", 200)
    assert (fields["model"], fields["completion_tokens"], fields["finish_reason"]) == ("base", 6, "length")
    assert fields["prompt_tokens"] > 0
    assert fields["seconds"] >= fields["first_token_seconds"] > 0
    for formatter in (JsonFormatter(), HumanFormatter()):
        assert SECRET not in formatter.format(record)
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["message"], line["request_id"]) == ("info", "request", "seen")


def test_nobody_writes_a_line_of_the_log_but_the_server() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(HumanFormatter())
    fields = {"path": "/v1/x\n2026 INFO request status=200"}
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": fields})
    handler.emit(record)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(JsonFormatter().format(record))["path"] == fields["path"]


# --- other names


def test_an_alias_is_the_variant(server: ThreadServer) -> None:
    cards = {card["id"]: card for card in get(server, "/v1/models").json()["data"]}
    assert list(cards) == ["base", "v1", "gpt-4o"]
    assert cards["gpt-4o"]["parent"] == "base"
    assert cards["gpt-4o"]["version"] == cards["base"]["version"]
    assert get(server, "/v1/models/gpt-4o").json() == cards["gpt-4o"]
    ask = {**BODY, "temperature": 0, "max_tokens": 8}
    same, aliased = (post(server, "/v1/completions", {**ask, "model": name}).json() for name in ("base", "gpt-4o"))
    assert aliased["choices"][0]["text"] == same["choices"][0]["text"]
    assert aliased["model"] == "base"
    assert "gpt-4o" not in get(server, "/metrics").text
    message = {"model": "gpt-4o", "max_tokens": 2, "messages": [{"role": "user", "content": "the fox"}]}
    assert post(server, "/v1/messages", message).json()["model"] == "base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aliases": ("a",)}, "NAME=VARIANT"),
        ({"aliases": ("a=b", "a=c")}, "twice"),
        ({"root_path": "llm"}, "--root-path"),
        ({"root_path": "/llm/"}, "--root-path"),
        ({"log_format": "xml"}, "human, json"),
        ({"log_level": "loud"}, "debug, info"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**options)


def test_an_alias_of_nothing() -> None:
    for alias, message in (("a=none", "no variant none"), ("base=v1", "variant itself")):
        with pytest.raises(ConfigError, match=message):
            ServerSettings(aliases=(alias,)).check_variants(["base", "v1"])


def test_behind_a_proxy(server: ThreadServer) -> None:
    """Whether the proxy takes its path off or not; the key is asked for either way."""
    for path in ("/llm/v1/models", "/v1/models"):
        assert get(server, path).status_code == 200
        assert httpx.get(server.url + path).status_code == 401
    for path in ("/llm/health", "/health", "/llm/ping", "/ping"):
        assert httpx.get(server.url + path).status_code == 200
    assert get(server, "/llm/llm/v1/models").status_code == 404
    assert httpx.get(server.url + "/llmx/health").status_code == 401
    assert get(server, "/openapi.json").json()["servers"] == [{"url": "/llm"}]


# --- metrics


def engine_of(count: int) -> tuple[EngineInfo, EngineStats]:
    names = [f"variant-of-a-long-name-{v:02}" for v in range(count)]
    variants = [
        VariantInfo(
            name=name, version="0" * 64, max_model_len=4096, vocab_size=1000, root="/models", created=0,
            tokenizer_dir=None, eos_token_ids=[0], generation={},
        )
        for name in names
    ]  # fmt: skip
    info = EngineInfo(
        variants=variants, policy="separate", resident_bytes={}, slots=4, num_kv_blocks=100, block_size=16,
        experts_resident=1, experts_absent=0, max_concurrency=1.0, device="cpu", dtype="float32",
    )  # fmt: skip
    many = [0] * count
    stats = EngineStats(
        names=names, in_flight={}, added_bytes=0, running=many, waiting=many, kv_usage=0.5, preemptions=many,
        prefix_cache_queries=many, prefix_cache_hits=many,
        tokens_served=many, deadline_misses=many, reconfigurations=0, reconfiguration_seconds=0.0,
        reconfiguration_bytes=0, expert_hits=0, expert_misses=0, expert_host_bytes=0, expert_fetch_seconds=0.0,
        resident_bytes={}, step_tokens=(*range(14),), step_tokens_sum=1000,
    )  # fmt: skip
    return info, stats


def used(count: int) -> str:
    """The scrape of a server on which every variant has answered."""
    info, stats = engine_of(count)
    metrics = Metrics()
    metrics.set_engine(info)
    metrics.set_stats(stats)
    for variant in info.variants:
        http = HttpRequest("id", True, "POST", "/v1/completions", variant=variant.name)
        log = RequestLog()
        entry = log.open(id="id", variant=variant.name, version="", tenant="", kind="chat", prompt_tokens=5)
        recorded = RecordedRequest(log, entry, http.started)
        timer = RequestTimer(metrics, http, [5], SamplingParams(max_tokens=9), recorded)
        timer.observe([CompletionChunk("id", 0, 0, "a", [1, 2])])
        timer.observe([CompletionChunk("id", 0, 0, "a", [1, 2], finish_reason="stop", timing=(0.1, 0.2, 0.9))])
        timer.close()
    return metrics.render().decode()


def test_many_variants_make_a_small_scrape() -> None:
    text = used(64)
    assert len(text) < 200_000
    assert 'vllm:request_generation_tokens_count{model_name="all"} 64.0' in text
    assert 'vllm:generation_tokens_total{model_name="variant-of-a-long-name-63"} 4.0' in text


def test_what_dashboards_ask_for() -> None:
    text = used(2)
    name = 'model_name="variant-of-a-long-name-00"'
    for line in (
        f"vllm:request_prompt_tokens_sum{{{name}}} 5.0",
        f"vllm:request_generation_tokens_sum{{{name}}} 4.0",
        f"vllm:request_max_num_generation_tokens_sum{{{name}}} 4.0",
        f"vllm:request_params_n_sum{{{name}}} 1.0",
        f"vllm:request_params_max_tokens_sum{{{name}}} 9.0",
        f'vllm:request_success_total{{finished_reason="stop",{name}}} 1.0',
        'vllm:iteration_tokens_total_sum{model_name="all"} 1000.0',
        'vllm:iteration_tokens_total_count{model_name="all"} 91.0',
        'vllm:cache_config_info{block_size="16",cache_dtype="float32",enable_prefix_caching="True",'
        'num_gpu_blocks="100"} 1.0',
    ):
        assert line in text, line
    assert "_created" not in text
    series = f"vllm:request_inference_time_seconds_sum{{{name}"
    (inference,) = [line for line in text.splitlines() if line.startswith(series)]
    assert float(inference.split()[-1]) == pytest.approx(1.1)
    assert f"vllm:request_time_per_output_token_seconds_sum{{{name}}} 0.3" in text


def test_a_scrape_of_a_server(server: ThreadServer) -> None:
    before = get(server, "/metrics").text
    post(server, "/v1/completions", {**BODY, "max_tokens": 4})
    post(server, "/v1/completions", {**BODY, "model": "nobody"})
    after = get(server, "/metrics").text
    assert "nobody" not in after

    def value(text: str, series: str) -> float:
        return float(next(line for line in text.splitlines() if line.startswith(series)).split()[-1])

    for series in ("vllm:iteration_tokens_total_count", 'vllm:request_generation_tokens_count{model_name="base"}'):
        assert value(after, series) > value(before, series)


# --- traces


def test_spans_of_a_request(server: ThreadServer) -> None:
    """Real spans of a real request: the client's trace goes on, and the parts follow each other within the whole."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server.state.tracer = Tracer(provider)
    try:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = post(server, "/v1/completions", BODY, traceparent=parent)
    finally:
        server.state.tracer = None
    spans: dict[str, ReadableSpan] = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    root = spans["llm_request"]
    assert f"{root.context.trace_id:032x}" == parent.split("-")[1]
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == parent.split("-")[2]
    assert root.attributes is not None
    assert root.attributes["gen_ai.response.id"] == answer.json()["id"]
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    times: list[int] = []
    for name in ("queue", "prefill", "decode"):
        span = spans[name]
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        times += [span.start_time or 0, span.end_time or 0]
    assert times == sorted(times)
    assert (root.start_time or 0) <= times[0]


def test_the_variables_that_ask_for_traces() -> None:
    assert tracer_from_environment({}) is None
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert tracer_from_environment({**endpoint, "OTEL_SDK_DISABLED": "true"}) is None
    assert tracer_from_environment({**endpoint, "OTEL_TRACES_EXPORTER": "none"}) is None
    tracer = tracer_from_environment(endpoint)
    assert tracer is not None
    tracer.close()
