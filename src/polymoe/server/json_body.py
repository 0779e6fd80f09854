"""Reading the JSON of a request body: what RFC 8259 leaves open is refused, because two readers may differ on it."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# What could be half of a surrogate pair; emoji are written as two halves.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidJsonError(HTTPException):
    """400: the body is not JSON, or not in a way that everybody reads alike. (An `HTTPException`, as FastAPI hides
    all others that are raised while it reads a body.)"""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_json") -> None:
        super().__init__(400, message)
        self.param, self.code = param, code


class JsonRoute(APIRoute):
    """A route whose request body is read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


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
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
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
