"""What surrounds the endpoints: the key, the size and speed of a body, and an answer whatever happens.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect from the endpoints.
"""

import asyncio
import hmac
import logging

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymoe.errors import OverloadedError
from polymoe.server.errors import AuthenticationError, UnavailableError, error_response
from polymoe.server.state import ServerState
from polymoe.server.tenants import Keyring, tenant_of

logger = logging.getLogger(__name__)
# Everything else needs the key, including what does not exist: probes of a supervisor carry none.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
# The dashboard's page and its files: there the key is asked for, with which it gets the data.
_OPEN_PAGES = frozenset({"/", "/ui"})
_OPEN_FOLDER = "/ui/assets/"
# Of all tenants' requests: the server's own key or the administrator's opens it, no tenant's.
_DASHBOARD = "/ui/"
_WATCHING = OPEN_PATHS | _OPEN_PAGES | {"/metrics"}  # goes on while the server drains, as the dashboard does
# Of a body, bytes that count nothing together with others: ordinary requests go on beside a flood of large ones.
_SMALL_BODY = 64 << 10
ADMIN_PATH = "/v1/variants"  # and what is below it needs the admin's key, and no other opens it


def is_admin_path(path: str) -> bool:
    return path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/")


class ApiKeyMiddleware:
    """401 without a right `Authorization: Bearer …`. What is under `/admin` needs the admin's key, and no other opens
    it."""

    def __init__(self, app: ASGIApp, keys: Keyring, admin_key: str | None = None, open_metrics: bool = False) -> None:
        self._app, self._keys = app, keys
        self._admin_key = None if admin_key is None else admin_key.encode()
        self._open_metrics = open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path comes from the scope: what a URL object makes of a request also depends on its Host header.
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> AuthenticationError | None:
        path = scope["path"]
        if is_admin_path(path):
            if self._admin_key is None or self._is_admin(given_key(scope) or b""):
                return None  # without a key there is no such API, which is the endpoints' to say
            return AuthenticationError("The admin's key is needed.", code="invalid_admin_key")
        if self._is_open(path) or self._allowed(scope):
            return None
        return AuthenticationError("A valid API key is needed.", code="invalid_api_key")

    def _is_open(self, path: str) -> bool:
        return _is_open(path) or (self._open_metrics and path == "/metrics")

    def _allowed(self, scope: Scope) -> bool:
        key = given_key(scope)
        if key is None:
            return False
        path = scope["path"]
        if path == "/admin" or path.startswith("/admin/"):
            return self._is_admin(key)
        if scope["path"].startswith(_DASHBOARD):
            return self._is_admin(key) or (self._keys.admits(scope, key) and tenant_of(scope) is None)
        return self._keys.admits(scope, key)

    def _is_admin(self, key: bytes) -> bool:
        return self._admin_key is not None and hmac.compare_digest(key, self._admin_key)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path in _OPEN_PAGES or path.startswith(_OPEN_FOLDER)


def given_key(scope: Scope) -> bytes | None:
    """`Authorization: Bearer …`, or `x-api-key`, which clients of the Messages API send. Several are none."""
    given = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
    if len(given) != 1:
        return None
    (name, value), *_ = given
    if name == b"x-api-key":
        return bytes(value)
    scheme, _, key = value.partition(b" ")
    # RFC 9110: the scheme in any case, and any number of spaces after it.
    return bytes(key.lstrip(b" ")) if scheme.lower() == b"bearer" else None


class BodyLimitMiddleware:
    """413 for a body of more than `max_bytes`, announced or not; 408 for one that takes longer than `timeout`; 429 for
    what is large while the bodies that are arriving or being read hold `max_together` bytes already."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float, max_together: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_together = max_together
        self._together = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await error_response(self._too_large(), scope["path"])(scope, receive, send)
            return
        received = held = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def limited() -> Message:
            nonlocal received, complete, held
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
                more = max(0, received - _SMALL_BODY) - held
                if self._together + more > self._max_together:
                    raise OverloadedError("Too many large request bodies arrive at once.", 1.0)
                self._together += more
                held += more
            return message

        async def releasing(message: Message) -> None:
            nonlocal held
            self._together -= held  # what is answered has been read
            held = 0
            await send(message)

        try:
            await self._app(scope, limited, releasing)
        finally:
            self._together -= held

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request body is larger than {self._max_bytes} bytes.")


class LastResortMiddleware:
    """Counts what is in flight, and answers as all errors are answered where not even an `Exception` was raised: the
    server gives a request up while it stops (`CancelledError`), or code in Rust panics."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        counts = scope["path"] not in _WATCHING and not scope["path"].startswith(_DASHBOARD)
        self._state.in_flight += counts
        try:
            await self._app(scope, receive, watched)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if started:
                raise
            if isinstance(error, asyncio.CancelledError):
                answer: Exception = UnavailableError("The server is shutting down.", code="draining")
            else:
                logger.exception("A request failed.")
                answer = RuntimeError()
            await error_response(answer, scope["path"])(scope, receive, send)
        finally:
            self._state.in_flight -= counts
