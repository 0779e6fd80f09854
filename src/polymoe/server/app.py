"""The HTTP application: which URL does what."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from polymoe.client.interface import EngineClient
from polymoe.errors import EngineDeadError, RequestError
from polymoe.protocol.info import EngineInfo, VariantInfo
from polymoe.server.cors import CorsMiddleware
from polymoe.server.errors import MESSAGES_PATH, install_error_handlers
from polymoe.server.generate import create_chat_completion, create_completion
from polymoe.server.http_request import HttpRequestMiddleware
from polymoe.server.json_body import JsonRoute
from polymoe.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware, LastResortMiddleware
from polymoe.server.openapi import METRICS_TYPE, answers, document, text_answer
from polymoe.server.root_path import RootPathMiddleware
from polymoe.server.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Detokenized,
    Health,
    Load,
    ModelCard,
    ModelList,
    Readiness,
    Tokenized,
    Version,
)
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState
from polymoe.server.stream import JsonResponse, unless_gone
from polymoe.server.tenants import Keyring, tenant_of
from polymoe.server.tokenize_request import DetokenizeRequest, TokenizeRequest
from polymoe.server.turn_schemas import (
    MessageObject,
    MessagesErrorResponse,
    MessagesEvent,
    ResponsesEvent,
    ResponsesObject,
    TokenCount,
)
from polymoe.server.turns import count_tokens, create_message, create_response
from polymoe.server.ui_routes import add_ui
from polymoe.server.variants_api import add_variant_routes

# A scrape waits this long for a busy engine, in seconds, and then shows its previous statistics.
_STATS_TIMEOUT = 2.0


def create_app(client: EngineClient, settings: ServerSettings) -> FastAPI:
    """The app serves from the start; what needs the engine answers 503 until `client.start()` has returned.

    `app.state.server` is its `ServerState`, `app.state.keys` its `Keyring`.
    """
    # The interactive pages load scripts from other servers; /openapi.json is all that tools need. A redirect would be
    # built from the Host header, which anybody can set.
    app = FastAPI(
        title="polymoe",
        version=version("polymoe"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.router.route_class = JsonRoute
    app.state.server = ServerState(client, settings)
    client.heartbeat_every = min(client.heartbeat_every, settings.heartbeat_timeout / 4)
    install_error_handlers(app)
    # The last added is the first to see a request: a preflight needs no key.
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=settings.max_body_bytes,
        timeout=settings.body_timeout,
        max_together=settings.max_body_bytes_together,
    )
    keys = app.state.keys = Keyring(settings.api_key, settings.keys)
    if keys.is_needed:
        app.add_middleware(
            ApiKeyMiddleware, keys=keys, admin_key=settings.admin_key, open_metrics=settings.open_metrics
        )
    if settings.allowed_origins:
        app.add_middleware(
            CorsMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients for JavaScript send many of their own
            expose_headers=["Retry-After", "WWW-Authenticate", "x-request-id"],
        )
    app.add_middleware(LastResortMiddleware, state=app.state.server)
    app.add_middleware(HttpRequestMiddleware, log_requests=settings.log_requests)
    if settings.root_path:
        app.add_middleware(RootPathMiddleware, root_path=settings.root_path)
    _add_routes(app)
    add_variant_routes(app)
    add_ui(app)
    schema = document(app, keys.is_needed, settings.root_path)
    app.openapi = lambda: schema  # type: ignore[method-assign]
    for route in app.routes:
        methods = route.methods if isinstance(route, JsonRoute) else None
        if methods is not None and "GET" in methods:
            methods.add("HEAD")  # now, so that the document does not have everything twice
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    snapshots = app.state.server.snapshots
    snapshots.start()
    yield
    await snapshots.stop()


def _add_routes(app: FastAPI) -> None:
    posted = (400, 401, 404, 408, 503)
    for path, endpoint, method, responses in (
        ("/v1/completions", create_completion, "POST", answers(Completion, *posted, 429, stream=CompletionChunk)),
        (
            "/v1/chat/completions",
            create_chat_completion,
            "POST",
            answers(ChatCompletion, *posted, 429, stream=ChatCompletionChunk),
        ),
        ("/v1/responses", create_response, "POST", answers(ResponsesObject, *posted, 429, stream=ResponsesEvent)),
        (
            MESSAGES_PATH,
            create_message,
            "POST",
            answers(MessageObject, *posted, 429, stream=MessagesEvent, error=MessagesErrorResponse),
        ),
        (
            MESSAGES_PATH + "/count_tokens",
            count_tokens,
            "POST",
            answers(TokenCount, *posted, error=MessagesErrorResponse),
        ),
        ("/v1/models", list_models, "GET", answers(ModelList, 401, 503)),
        ("/v1/models/{model:path}", get_model, "GET", answers(ModelCard, 401, 404, 503)),
        ("/tokenize", tokenize, "POST", answers(Tokenized, *posted)),
        ("/detokenize", detokenize, "POST", answers(Detokenized, *posted)),
        ("/health", health, "GET", answers(Health, 503)),
        ("/ping", health, "GET", answers(Health, 503)),
        ("/load", load, "GET", answers(Load, 401)),
        ("/ready", ready, "GET", answers(Readiness, 503)),
        ("/version", get_version, "GET", answers(Version, 401)),
        ("/metrics", metrics, "GET", text_answer(401)),
    ):
        # The plain class has no media type of its own, which the document would show beside the text of /metrics.
        kind = Response if endpoint is metrics else JSONResponse
        app.add_api_route(
            path, endpoint, methods=[method], response_model=None, response_class=kind, responses=responses
        )


async def list_models(request: Request) -> Response:
    """The variants that are served."""
    state: ServerState = request.app.state.server
    state.require_ready()
    info, served, tenant = state.client.info, state.client.processor.served, tenant_of(request.scope)
    seen = {variant.name: variant for variant in served if tenant is None or tenant.allows(variant.name)}
    cards = [_card(info, variant) for variant in seen.values()]
    cards += [_card(info, seen[name], alias) for alias, name in state.settings.targets.items() if name in seen]
    return JsonResponse({"object": "list", "data": cards})


async def get_model(request: Request, model: str) -> Response:
    """One variant."""
    state: ServerState = request.app.state.server
    state.require_ready()
    name = state.settings.variant_of(model)
    if (tenant := tenant_of(request.scope)) is not None:
        tenant.require(name)
    return JsonResponse(
        _card(state.client.info, state.client.processor.variant(name), None if name == model else model)
    )


async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Text or a chat to token ids."""
    state: ServerState = request.app.state.server
    state.require_ready()
    processor = state.client.processor
    variant = processor.variant(body.model)
    tokenizer = processor.require_tokenizer(variant.key, "tokenizing")
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        encoding = state.encoder.encode_chat(tokenizer, messages, body.template_variables())
        token_ids = await unless_gone(request, encoding)
    else:
        add = body.add_special_tokens is not False
        (token_ids,) = await unless_gone(request, state.encoder.encode(tokenizer, [body.prompt or ""], add))
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": variant.max_model_len,
        "tokens": token_ids,
        "token_strs": await state.encoder.token_texts(tokenizer, token_ids) if body.return_token_strs else None,
    }
    return JsonResponse(answer)


async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Token ids to text, special tokens included."""
    state: ServerState = request.app.state.server
    state.require_ready()
    processor = state.client.processor
    variant = processor.variant(body.model)
    if body.tokens and max(body.tokens) >= variant.vocab_size:
        raise RequestError(
            f"Token id {max(body.tokens)} is outside the vocabulary of `{variant.name}`.", param="tokens"
        )
    tokenizer = processor.require_tokenizer(variant.key, "detokenizing")
    return JsonResponse({"prompt": await state.encoder.decode(tokenizer, body.tokens)})


async def health(request: Request) -> Response:
    """503 when the engine is dead or hangs, so that a supervisor restarts the server; loading is healthy."""
    state: ServerState = request.app.state.server
    state.require_alive()
    return JsonResponse({"status": "draining" if state.draining else "ok" if state.client.is_ready else "loading"})


async def ready(request: Request) -> Response:
    """503 while requests would be refused; while loading the message tells how far it is."""
    state: ServerState = request.app.state.server
    state.require_ready()
    return JsonResponse({"status": "ready"})


async def load(request: Request) -> Response:
    """How many requests are being answered, for balancers."""
    state: ServerState = request.app.state.server
    return JsonResponse({"server_load": len(state.client.open_streams)})


async def get_version() -> Response:
    return JsonResponse({"version": version("polymoe")})


async def metrics(request: Request) -> Response:
    """Prometheus text format. Scraping goes on while the server loads or drains."""
    state: ServerState = request.app.state.server
    if state.client.is_ready:
        state.metrics.set_engine(state.client.info)
        with contextlib.suppress(TimeoutError, EngineDeadError):
            state.metrics.set_stats(await asyncio.wait_for(state.client.stats(), _STATS_TIMEOUT))
    return Response(state.metrics.render(), media_type=METRICS_TYPE)


def _card(info: EngineInfo, variant: VariantInfo, alias: str | None = None) -> dict[str, Any]:
    """Of a variant, or of another name of it."""
    base = info.variants[0].name
    return {
        "id": variant.name if alias is None else alias,
        "object": "model",
        "created": variant.created or int(time.time()),
        "owned_by": "polymoe",
        "root": variant.root,
        # Another name has its variant; of a family the first is the base that the others are told to descend from.
        "parent": variant.name if alias is not None else None if variant.name == base else base,
        "max_model_len": variant.max_model_len,
        "version": variant.version,
        "residency": {
            # With a slot for every variant none is ever loaded at run time.
            "non_experts": "resident" if info.max_variants or info.slots >= len(info.variants) else "on_demand",
            "experts_resident": info.experts_resident,
            "experts_absent": info.experts_absent,
        },
        # What the model's operations run on, and why not on something faster.
        "fast_paths": [msgspec.to_builtins(path) for path in info.fast_paths],
        # How close it is to its original, as predicted and as measured when it was planned; null where it was not.
        "predicted_damage": variant.predicted_error,
        "fidelity": None if variant.fidelity is None else msgspec.to_builtins(variant.fidelity),
    }
