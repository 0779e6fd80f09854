"""/openapi.json: what FastAPI derives from the classes of requests, and what it cannot know: answers, streams, the
key."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from polymoe.server.middleware import OPEN_PATHS
from polymoe.server.schemas import ChatCompletionChunk, CompletionChunk, ErrorResponse
from polymoe.server.turn_schemas import NAMED_EVENTS

Json = dict[str, Any]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REFERENCE = "#/components/schemas/{model}"
_LARGEST = 2**53 - 1  # what every reader of JSON keeps exactly
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SECURITY = "api_key"
_VALIDATION_ERROR = "HTTPValidationError"

_ERRORS = {
    400: "The body or a field is wrong; `param` names the field.",
    401: "No key, or a wrong one, where the server was started with one.",
    404: "No variant has this name.",
    408: "The body took too long to arrive.",
    409: "Another change of this name goes on, or its state does not allow this one.",
    413: "The body is too large.",
    422: "The variant cannot be served beside the others; the message says why.",
    429: "The server is busy; try again after `Retry-After` seconds.",
    500: "An error of the server.",
    503: "The server is loading or shutting down, or its engine is dead.",
    507: "There is no room for it.",
}
_RETRY_AFTER = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
_CHALLENGE = {"description": "The scheme of the key.", "schema": {"type": "string"}}


def answers(
    ok: type[BaseModel] | None,
    *errors: int,
    stream: type[BaseModel] | None = None,
    error: type[BaseModel] = ErrorResponse,
) -> dict[int | str, Json]:
    """The `responses` of a route: `ok` is its 200 as JSON, `stream` what the events of its event stream hold, `error`
    the body of its errors."""
    found: dict[int | str, Json] = {}
    if ok is not None:
        found[200] = {"model": ok, "description": "The answer."}
    if stream is not None:
        found[200]["content"] = {"text/event-stream": {"schema": _event(stream)}}
    for status in sorted({*errors, 413, 500}):
        found[status] = {"model": error, "description": _ERRORS[status]}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": _RETRY_AFTER}
    if 401 in found:
        found[401]["headers"] = {"WWW-Authenticate": _CHALLENGE}
    return found


def _event(chunk: type[BaseModel]) -> Json:
    """One server-sent event: its data is JSON in a string."""
    if chunk in NAMED_EVENTS:
        reference = {"$ref": _REFERENCE.format(model=chunk.__name__)}
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": reference}
        return {
            "type": "object",
            "description": "One of the events that `stream: true` asks for, named by the type of its data.",
            "properties": {"event": {"type": "string"}, "data": data},
            "required": ["event", "data"],
        }
    held = [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorResponse)]
    json_data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": held}}
    return {
        "type": "object",
        "description": "One of the events that `stream: true` asks for; the last one is `[DONE]`.",
        "properties": {"data": {"anyOf": [json_data, {"const": "[DONE]"}]}},
        "required": ["data"],
    }


def text_answer(*errors: int) -> dict[int | str, Json]:
    """Those of /metrics."""
    text = {"schema": {"type": "string"}}
    return {200: {"description": "Prometheus text format.", "content": {METRICS_TYPE: text}}, **answers(None, *errors)}


def document(app: FastAPI, key_needed: bool, root_path: str = "") -> Json:
    """The OpenAPI document of `app`. root_path: where a proxy shows it."""
    found = get_openapi(
        title=app.title,
        version=app.version,
        description="Several fine-tuned variants of one model behind OpenAI's API; `model` names the variant.",
        routes=app.routes,
        servers=[{"url": root_path}] if root_path else None,
    )
    components = found["components"]
    events: list[type[BaseModel]] = [CompletionChunk, ChatCompletionChunk, *NAMED_EVENTS]
    _, chunks = models_json_schema(
        [(event, "serialization") for event in events],
        ref_template=_REFERENCE,
    )
    components["schemas"] |= chunks["$defs"]
    for name in (_VALIDATION_ERROR, "ValidationError"):
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {
        _SECURITY: {"type": "http", "scheme": "bearer", "description": "The key that the server was started with."}
    }
    # {}: without. A server without a key takes no notice of one.
    found["security"] = [{_SECURITY: []}] if key_needed else [{}, {_SECURITY: []}]
    for path, operations in found["paths"].items():
        for operation in operations.values():
            if _VALIDATION_ERROR in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's own error, which this server never sends
            if path in OPEN_PATHS:
                operation["security"] = []
    _tidy_bounds(found)
    return found


def _tidy_bounds(node: Any) -> None:
    """Whole numbers as such, and none that a reader of JSON would round: FastAPI writes 2**63 - 1 as 9.2e18."""
    if isinstance(node, list):
        for item in node:
            _tidy_bounds(item)
        return
    if not isinstance(node, dict):
        return
    for name in _BOUNDS:
        bound = node.get(name)
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            continue
        if abs(bound) > _LARGEST:
            del node[name]
            node["format"] = "int64"
        elif bound == int(bound):
            node[name] = int(bound)
    for item in node.values():
        _tidy_bounds(item)
