"""Errors as HTTP: every one has the body `{"error": {"message", "type", "param", "code"}}`, `code` a string."""

import reprlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from polymoe.errors import EngineDeadError, OverloadedError, RequestError
from polymoe.server.json_body import InvalidJsonError

MESSAGES_PATH = "/v1/messages"
_MAX_ECHO = 200  # characters of the client's input that a message repeats
_MAX_MESSAGE = 1000
_repr = reprlib.Repr()  # looks only at the first items of a list of millions
_repr.maxstring = _repr.maxother = _MAX_ECHO


class UnavailableError(RequestError):
    """503: the server is loading, draining, or its engine is dead."""

    status = 503
    type = "service_unavailable_error"


class AuthenticationError(RequestError):
    """401: no key, or a wrong one."""

    status = 401
    type = "authentication_error"


_STATUS_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_MESSAGES_TYPES: dict[int | str | None, str] = {
    404: "not_found_error", 413: "request_too_large",
    "service_unavailable_error": "overloaded_error", "internal_server_error": "api_error",
}  # fmt: skip


def error_body(message: str, type: str, param: str | None, code: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": printable(message), "type": type, "param": param, "code": code}}


def messages_error(body: dict[str, Any], status: int | None = None) -> dict[str, Any]:
    """The same in the words of the Messages API, whose clients look for these types. status: None within a stream."""
    error = body["error"]
    kind = _MESSAGES_TYPES.get(status) or _MESSAGES_TYPES.get(error["type"], error["type"])
    return {"type": "error", "error": {**error, "type": kind}}


def printable(text: str) -> str:
    """`text` without lone surrogates: JSON may hold them, UTF-8 may not, and messages repeat what clients sent."""
    return text.encode("utf-8", "replace").decode()


def error_response(error: Exception, path: str = "") -> JSONResponse:
    """The HTTP response for an exception. What is not deliberate says nothing about the inside of the server.

    Args: path: of the URL, which tells whose words the client understands.
    """
    headers: dict[str, str] = {}
    match error:
        case RequestError():
            status, body = error.status, error_body(str(error)[:_MAX_MESSAGE], error.type, error.param, error.code)
            if isinstance(error, OverloadedError):
                headers["Retry-After"] = str(max(1, round(error.retry_after)))
            elif isinstance(error, AuthenticationError):
                headers["WWW-Authenticate"] = "Bearer"
        case EngineDeadError():
            status = 503
            message = "The engine has stopped; the request cannot finish."
            body = error_body(message, UnavailableError.type, None, "engine_dead")
        case RequestValidationError():
            status, body = 400, _validation_body(error.errors())
        case InvalidJsonError():
            status, body = 400, error_body(error.detail, "invalid_request_error", error.param, error.code)
        case HTTPException():
            status, body = error.status_code, _http_body(error)
            headers.update(error.headers or {})
        case _:
            status = 500
            body = error_body("The server had an internal error.", "internal_server_error", None, "internal_error")
    if path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/"):
        body = messages_error(body, status)
    return JSONResponse(body, status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error, request.scope["path"])
        if response.status_code == 405:
            response.headers["Allow"] = ", ".join(_methods(request))
        return response

    for kind in (RequestError, EngineDeadError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _methods(request: Request) -> list[str]:
    """That this URL knows. A route of its own for each of them makes Starlette name only those of the first."""
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})


def _http_body(error: HTTPException) -> dict[str, dict[str, str | None]]:
    phrase = HTTPStatus(error.status_code).phrase
    messages = {404: "There is nothing at this URL.", 405: "This URL does not support this HTTP method."}
    message = messages.get(error.status_code, str(error.detail))
    kind = _STATUS_TYPES.get(error.status_code, "invalid_request_error")
    return error_body(message, kind, None, phrase.lower().replace(" ", "_"))


def _validation_body(errors: Sequence[Any]) -> dict[str, dict[str, str | None]]:
    """The first of pydantic's errors, in the words of this API."""
    first = _most_telling([error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]])
    kind, loc, context = str(first["type"]), tuple(first["loc"]), first.get("ctx", {})
    path = [str(part) for part in loc[1:] if not _is_union_tag(part)]
    # Ours, see protocol.py; they sit at the parent of what they name.
    if kind in ("unknown_parameter", "unsupported_parameter", "invalid_value"):
        path.append(context["name"])
        return error_body(first["msg"], "invalid_request_error", ".".join(path), kind)
    if not path:
        message = "The request body must be a JSON object, sent with the header Content-Type: application/json."
        return error_body(message, "invalid_request_error", None, "invalid_type")
    param = ".".join(path)
    if kind == "missing":
        message = f"Missing required parameter: {param}."
        return error_body(message, "invalid_request_error", param, "missing_required_parameter")
    message = f"Invalid value for {param}: {first['msg']}. Got {_repr.repr(first['input'])[:_MAX_ECHO]}."
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return error_body(message, "invalid_request_error", param, code)


def _most_telling(errors: Sequence[Any]) -> Any:
    """Of a field that may be several things pydantic reports what is wrong with each. The one that was meant is one
    whose type is right, or else the one that fits deepest and farthest."""

    def fit(error: Any) -> tuple[bool, int, list[int]]:
        indices = [part for part in error["loc"] if isinstance(part, int)]
        return not error["type"].endswith("_type"), len(error["loc"]), indices

    return max(errors, key=fit)


def _is_union_tag(part: object) -> bool:
    """Pydantic names the member of a union in the path (`list[int]`, `str`, `TextPart`); clients do not know those."""
    return isinstance(part, str) and (
        part in ("str", "int", "float") or part[:1].isupper() or not part.replace("_", "a").isalnum()
    )
