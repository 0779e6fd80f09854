"""/openapi.json says what the server really answers, and every JSON reader can read it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from polymoe.bundle.manifest import Fidelity
from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.server.app import create_app
from polymoe.server.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Detokenized,
    ErrorResponse,
    Health,
    MeasuredFidelity,
    ModelCard,
    ModelList,
    Readiness,
    Tokenized,
    Version,
)
from polymoe.server.settings import ServerSettings
from servers import ThreadServer, engine_config, events, make_bundle

LARGEST = 2**53 - 1
GENERATE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
POSTED = (*GENERATE, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
OPEN = ("/health", "/ready", "/ping")


def document(**settings: Any) -> Any:
    app = create_app(AsyncEngineClient(EngineConfig(bundle="none")), ServerSettings(**settings))
    return json.loads(json.dumps(app.openapi(), allow_nan=False))


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, part in items:
        yield from nodes(part, f"{path}/{name}")


def operations(found: Any) -> dict[str, Any]:
    return {path: operation for path, item in found["paths"].items() for operation in item.values()}


def test_every_answer_is_documented() -> None:
    """It knew only "4XX" and "5XX", and of the answers nothing but that they are JSON."""
    found = operations(document())
    for path in [path for path in found if path.startswith("/v1/variants")]:
        assert {"200", "401", "404", "503"} <= set(found.pop(path)["responses"])
    assert set(found) == {*POSTED, *OPEN, "/v1/models", "/v1/models/{model}", "/version", "/metrics", "/load"}
    for path, operation in found.items():
        statuses = {"200", "413", "500"}
        statuses |= {"400", "404", "408", "503"} if path in POSTED else set()
        statuses |= {"429"} if path in GENERATE else set()
        statuses |= set() if path in OPEN else {"401"}
        statuses |= {"503"} if path in OPEN or path.startswith("/v1") else set()
        statuses |= {"404"} if path == "/v1/models/{model}" else set()
        assert set(operation["responses"]) == statuses, path
        for status, response in operation["responses"].items():
            assert response["description"]
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                error = "MessagesErrorResponse" if path.startswith("/v1/messages") else "ErrorResponse"
                assert schema == {"$ref": f"#/components/schemas/{error}"}
            elif path != "/metrics":
                assert "$ref" in response["content"]["application/json"]["schema"]
    for path in GENERATE:
        assert set(found[path]["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "Retry-After" in found[path]["responses"]["429"]["headers"]
    (kind,) = found["/metrics"]["responses"]["200"]["content"]
    assert kind.startswith("text/plain")
    assert len({operation["operationId"] for operation in found.values()}) == len(found)


def test_the_key_is_a_security_scheme() -> None:
    keyed, free = document(api_key="sesame"), document()
    ((name, scheme),) = keyed["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert keyed["security"] == [{name: []}]
    assert {} in free["security"], "without a key none is needed"
    for path, operation in operations(keyed).items():
        assert operation.get("security") == ([] if path in OPEN else None), path


def test_numbers_are_those_that_json_can_hold() -> None:
    """The bounds of `seed` were 9.223372036854776e+18: no 64-bit integer, and not what the server checks."""
    found = document()
    bounds = []
    for path, node in nodes(found):
        if isinstance(node, float):
            assert not node.is_integer(), path
        if isinstance(node, int | float) and not isinstance(node, bool):
            assert abs(node) <= LARGEST, path
            bounds.append(path)
    assert len(bounds) > 50
    seed = found["components"]["schemas"]["CompletionRequest"]["properties"]["seed"]["anyOf"][0]
    assert seed == {"type": "integer", "format": "int64"}


def test_references_lead_somewhere() -> None:
    found = document()
    places = {f"#{path}" for path, _ in nodes(found)}
    used = {node["$ref"] for _, node in nodes(found) if isinstance(node, dict) and "$ref" in node}
    assert used <= places
    schemas = {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}
    assert schemas <= used, "and none is left over"


def test_accepted_values_of_unsupported_fields_are_listed() -> None:
    schemas = document()["components"]["schemas"]
    chat, completion = schemas["ChatCompletionRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    assert chat["use_beam_search"]["enum"] == [None, False]
    assert chat["echo"]["enum"] == [None, False]
    assert "enum" not in completion["echo"], "implemented"
    assert schemas["StreamOptions"]["properties"]["include_obfuscation"]["enum"] == [None, False]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(make_bundle(tmp_path_factory.mktemp("openapi")))) as server:
        yield server


def is_all_of(answer: Any, model: type[BaseModel]) -> None:
    """`answer` has the fields of `model`, of their types, and no others."""
    assert model.model_validate(answer, strict=True).model_dump(exclude_unset=True) == answer


def test_answers_are_as_documented(server: ThreadServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for path, model, chunk, body in (
        ("/v1/completions", Completion, CompletionChunk, {"prompt": "fox", "logprobs": 2, "echo": True}),
        (
            "/v1/chat/completions",
            ChatCompletion,
            ChatCompletionChunk,
            {"messages": messages, "logprobs": True, "top_logprobs": 2},
        ),
    ):
        options = {"model": "base", "max_tokens": 3, "n": 2, "ignore_eos": True}
        is_all_of(server.post(path, {**body, **options}).json(), model)
        is_all_of(server.post(path, {**body, **options, "n": 0}).json(), ErrorResponse)
        for usage in ({}, {"include_usage": True, "continuous_usage_stats": True}):
            asked = {**body, **options, "n": 1, "max_tokens": 6, "stream": True, "stream_options": usage}
            with httpx.stream("POST", server.url + path, json=asked, timeout=60) as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                *chunks, done = events(response)
            assert done == "[DONE]"
            assert len(chunks) >= 6
            for event in chunks:
                is_all_of(event, chunk)
    is_all_of(server.post("/tokenize", {"model": "base", "prompt": "fox", "return_token_strs": True}).json(), Tokenized)
    is_all_of(server.post("/tokenize", {"model": "base", "messages": messages}).json(), Tokenized)
    is_all_of(server.post("/detokenize", {"model": "base", "tokens": [5, 6]}).json(), Detokenized)
    answers: list[tuple[str, type[BaseModel]]] = [
        ("/v1/models", ModelList),
        ("/v1/models/base", ModelCard),
        ("/health", Health),
        ("/ready", Readiness),
        ("/version", Version),
        ("/v1/models/none", ErrorResponse),
        ("/nothing", ErrorResponse),
    ]
    for path, answer in answers:
        is_all_of(httpx.get(server.url + path).json(), answer)


def test_the_card_of_a_measured_variant() -> None:
    assert set(MeasuredFidelity.model_fields) == set(Fidelity.__struct_encode_fields__)


def test_types_of_content(server: ThreadServer) -> None:
    found = httpx.get(f"{server.url}/openapi.json").json()
    (documented,) = operations(found)["/metrics"]["responses"]["200"]["content"]
    assert httpx.get(f"{server.url}/metrics").headers["Content-Type"] == documented
    head = httpx.head(f"{server.url}/metrics")
    assert (head.status_code, head.content, head.headers["Content-Type"]) == (200, b"", documented)
