"""The dashboard: a page with its files, which need no key, and the data that it shows, which does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import PurePath
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from polymoe.bundle.describe import describe_bundle
from polymoe.server.errors import UnavailableError
from polymoe.server.state import ServerState
from polymoe.server.stream import JsonResponse, disconnected

ASSETS = "/ui/assets/"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    # Nothing from elsewhere, nothing inline; the page may not be shown inside another.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the package brings new files under the same names
}


def add_ui(app: FastAPI) -> None:
    """`/`, `/ui` and what is below it."""
    for path, endpoint in (
        ("/", root),
        ("/ui", page),
        (ASSETS + "{name}", asset),
        ("/ui/events", events),
        ("/ui/about", about),
        ("/ui/bundle", bundle),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)


async def root(request: Request) -> Response:
    """A browser is sent to the dashboard; to programs there is nothing here."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    return RedirectResponse("/ui")


async def page() -> Response:
    return _file("index.html")


async def asset(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    known = {entry.name: entry for entry in resources.files("polymoe.server").joinpath("ui").iterdir()}
    kind = _TYPES.get(PurePath(name).suffix)
    if name not in known or kind is None:
        raise HTTPException(404)
    return Response(known[name].read_bytes(), media_type=kind, headers=_HEADERS)


async def about(request: Request) -> Response:
    """What the page needs before anything is loaded, and what this server can do."""
    state: ServerState = request.app.state.server
    stage, fraction = state.progress
    return JsonResponse({
        "version": request.app.version,
        "ready": state.client.is_ready,
        "stage": stage,
        "fraction": fraction,
        "log_prompts": state.settings.log_prompts,
        "admin": state.settings.admin_key is not None and state.settings.variants_root is not None,
    })  # fmt: skip


async def bundle(request: Request) -> Response:
    """What does not change while the engine runs: who shares what, fidelity, memory, variants."""
    state: ServerState = request.app.state.server
    state.require_ready()
    info = state.client.info
    described: dict[str, Any] = await asyncio.to_thread(describe_bundle, state.client.config.bundle)
    planned = {v["version"] for v in described["variants"]}  # of a set that changes, what it began with
    if not info.max_variants and not planned <= {variant.version for variant in info.variants}:
        raise UnavailableError("The bundle's folder has been replaced since it was loaded.", code="bundle_replaced")
    faults = state.client.processor.faults
    chat = {variant.name: _chats(state, variant.name) for variant in info.variants}
    return JsonResponse({
        **described,
        "engine": {
            **{name: getattr(info, name) for name in (
                "device", "dtype", "slots", "num_kv_blocks", "block_size", "max_concurrency", "device_bytes",
                "workspace_bytes", "resident_bytes", "experts_resident", "experts_absent",
            )},
            "fast_paths": [msgspec.to_builtins(path) for path in info.fast_paths],
            "max_model_len": [variant.max_model_len for variant in info.variants],
            "faults": {name: fault.reason for name, fault in faults.items()},
            "chat": chat,
        },
    })  # fmt: skip


def _chats(state: ServerState, variant: str) -> bool:
    processor = state.client.processor
    if variant in processor.faults:
        return False
    tokenizer = processor.tokenizer(variant)
    return tokenizer is not None and tokenizer.has_chat_template


async def events(request: Request) -> Response:
    """Server-sent events: `history`, then one `snapshot` a second; `requests` that changed; `routing`."""
    state: ServerState = request.app.state.server
    return _Watch(state.snapshots.frames)


class _Watch(Response):
    """Events until the client leaves or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, frames: Callable[[], AsyncIterator[bytes]]) -> None:
        self.status_code, self.background = 200, None
        self._frames = frames
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self._frames():
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
