"""What is known of one HTTP request: its id, which the answer and the log carry and the engine knows it by, and what
became of it."""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymoe.server.errors import MESSAGES_PATH

logger = logging.getLogger(__name__)
_SCOPE = "polymoe.request"
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass
class HttpRequest:
    """The last fields are those of a request that generates. Times are seconds, time.monotonic()."""

    request_id: str
    is_unique: bool  # made here, and not a client's choice
    method: str
    path: str
    traceparent: str | None = None  # W3C's header: the trace that the client's request belongs to
    started: float = field(default_factory=time.monotonic)
    status: int | None = None  # None: no answer was begun
    engine_id: str | None = None  # what the engine calls it; the answer's id
    variant: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_token: float | None = None

    def name_for_engine(self, prefix: str) -> str:
        """An id for the engine that holds the request's own, and that no other request has."""
        self.engine_id = f"{prefix}-{self.request_id}" + ("" if self.is_unique else f"-{uuid.uuid4().hex[:12]}")
        return self.engine_id

    def fields(self) -> dict[str, object]:
        """For the log: nothing of what was said."""
        now = time.monotonic()
        found: dict[str, object] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(now - self.started, 4),
        }
        if self.variant is not None:
            found |= {
                "id": self.engine_id,
                "model": self.variant,
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_tokens,
                "finish_reason": ",".join(dict.fromkeys(self.finish_reasons)),
            }
        if self.first_token is not None:
            found["first_token_seconds"] = round(self.first_token - self.started, 4)
        return found


def http_request_of(scope: Scope) -> HttpRequest:
    record: HttpRequest = scope[_SCOPE]
    return record


class HttpRequestMiddleware:
    """Gives each request an id (`x-request-id`, the client's own where it sends one) and writes a line when it has
    ended: with `log_requests` for every one, otherwise for what failed on the server's side.

    It has to be the first to see a request.
    """

    def __init__(self, app: ASGIApp, log_requests: bool) -> None:
        self._app, self._log_requests = app, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_SCOPE] = _record(scope)
        headers = [(b"x-request-id", record.request_id.encode())]
        if record.path.startswith(MESSAGES_PATH):
            headers.append((b"request-id", record.request_id.encode()))  # as Anthropic's clients know it

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        finally:
            failed = record.status is None or record.status in (500, 502, 504)
            if failed or self._log_requests:
                level = logging.WARNING if failed else logging.INFO
                logger.log(level, "request", extra={"fields": record.fields()})


def _record(scope: Scope) -> HttpRequest:
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"")
    fits = _ID.fullmatch(given) is not None
    parent = headers.get(b"traceparent")
    return HttpRequest(
        request_id=given.decode() if fits else uuid.uuid4().hex,
        is_unique=not fits,
        method=scope["method"],
        path=scope["path"],
        traceparent=None if parent is None else parent.decode("latin-1"),
    )
