"""What is checked before a request reaches an endpoint: the key, and the size and speed of its body.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect from the endpoints.
"""

import asyncio
import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymoe.server.errors import AuthenticationError, error_response

# Everything else needs the key, including what does not exist: probes of a supervisor carry none.
OPEN_PATHS = frozenset({"/health", "/ready"})
# The dashboard's page and its files: there the key is asked for, with which it gets the data.
_OPEN_PAGES = frozenset({"/", "/ui"})
_OPEN_FOLDER = "/ui/assets/"


class ApiKeyMiddleware:
    """401 without the right `Authorization: Bearer …`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path comes from the scope: what a URL object makes of a request also depends on its Host header.
        if scope["type"] == "http" and not _is_open(scope["path"]) and not self._allowed(scope):
            error = AuthenticationError("A valid API key is needed.", code="invalid_api_key")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        # RFC 9110: the scheme in any case, and any number of spaces after it.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.lstrip(b" "), self._expected)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path in _OPEN_PAGES or path.startswith(_OPEN_FOLDER)


class BodyLimitMiddleware:
    """413 for a body of more than `max_bytes`, announced or not; 408 for one that takes longer than `timeout`."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        received = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # from now on only a disconnect can come, whenever it likes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "The request body took too long to arrive.") from error
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request body is larger than {self._max_bytes} bytes.")
