"""Reading the JSON of a request body: what RFC 8259 leaves open is refused, because two readers may differ on it."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from polymoe.server.tenants import tenant_of

# What could be half of a surrogate pair; emoji are written as two halves.
_LONG_BODY = 32 << 10  # bytes; what is shorter is read in less than a millisecond
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidJsonError(HTTPException):
    """400: the body is not JSON, or not in a way that everybody reads alike. (An `HTTPException`, as FastAPI hides
    all others that are raised while it reads a body.)"""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_json") -> None:
        super().__init__(400, message)
        self.param, self.code = param, code


class JsonRoute(APIRoute):
    """A route whose request body is read by `parse_json` and checked, beside the event loop where it is long."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        annotation: Any = None if self.body_field is None else self.body_field.field_info.annotation
        model = None if annotation is None else TypeAdapter(annotation)

        async def handle(request: Request) -> Response:
            if model is None or not _is_json(request):
                return await handler(request)
            body = b"".join([chunk async for chunk in request.stream()])  # `request.body()` would keep it
            if not body:
                value = None
            elif len(body) > _LONG_BODY:
                value = await asyncio.to_thread(_read, body, model)
            else:
                value = _read(body, model)
            del body
            # Here, for every endpoint that there will ever be.
            if value is not None and isinstance(getattr(value, "model", None), str):
                value.model = request.app.state.server.settings.variant_of(value.model)
                if (tenant := tenant_of(request.scope)) is not None:
                    tenant.require(value.model)
            return await handler(_ReadRequest(request.scope, request.receive, value))

        return handle


class _ReadRequest(Request):
    """What FastAPI sees of a request whose body has been read and checked; it leaves an instance of the model alone."""

    def __init__(self, scope: Scope, receive: Receive, value: Any) -> None:
        super().__init__(scope, receive)
        self._value = value

    async def body(self) -> bytes:
        return b"" if self._value is None else b"{}"

    async def json(self) -> Any:
        value, self._value = self._value, None
        return value


def _is_json(request: Request) -> bool:
    """As FastAPI decides it."""
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    kind, _, subtype = header.get_content_type().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _read(body: bytes, model: TypeAdapter[Any]) -> Any:
    try:
        return model.validate_python(parse_json(body))
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


def parse_json(body: bytes) -> Any:
    """The value of a body. Raises `InvalidJsonError`.

    NaN and infinities pass, which are no JSON either: the fields' own checks refuse them, and can name the field.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"The request body is not valid UTF-8 at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise InvalidJsonError(f"The request body is not valid JSON: {error.msg} at character {error.pos}.") from error
    except RecursionError as error:
        raise InvalidJsonError("The request body is nested too deeply.") from error
    except ValueError as error:  # Python refuses to read very long integers
        raise InvalidJsonError("The request body holds a number with too many digits.") from error
    if _SURROGATE.search(body):
        _refuse_lone_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one name Python would take the last, others the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJsonError(f"The request body names {_shown(twice)} twice in one object.", param=_shown(twice))
    return found


def _refuse_lone_surrogates(value: Any) -> None:
    """JSON can hold half of a surrogate pair, but no text can: it has no UTF-8, and so no tokens."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, dict):
            for name, part in item.items():
                _check(name, path)
                todo.append((f"{path}.{name}" if path else name, part))
        elif isinstance(item, list):
            todo += [(f"{path}.{index}" if path else str(index), part) for index, part in enumerate(item)]
        elif isinstance(item, str):
            _check(item, path)


def _check(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidJsonError(
            f"Invalid value for {_shown(path) or 'the request body'}: half of a surrogate pair is no character.",
            param=_shown(path) or None,
            code="invalid_value",
        ) from error


def _shown(text: str) -> str:
    return text[:200].encode("utf-8", "replace").decode()
