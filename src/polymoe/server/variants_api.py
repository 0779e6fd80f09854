"""`/v1/variants`: the set of variants, for its administrator."""

import hmac
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from polymoe.errors import RequestError
from polymoe.protocol.info import VariantInfo
from polymoe.server.errors import AuthenticationError, error_body
from polymoe.server.middleware import ADMIN_PATH, given_key
from polymoe.server.openapi import answers
from polymoe.server.replan import REPLAN
from polymoe.server.state import ServerState
from polymoe.server.stream import JsonResponse
from polymoe.server.variant_change import Change
from polymoe.server.variant_fields import (
    AddVariantRequest,
    AliasRequest,
    PinRequest,
    ReplaceVariantRequest,
    ReplanRequest,
    VariantCard,
    VariantChange,
    VariantList,
)
from polymoe.server.variants import Variants


class AdminApiOffError(RequestError):
    """404: this server has no such URLs."""

    status = 404
    type = "not_found_error"


def add_variant_routes(app: FastAPI) -> None:
    refused = (400, 401, 404, 408, 409, 422, 503, 507)
    changed, pointed = answers(VariantChange, *refused), answers(VariantCard, *refused)
    one = ADMIN_PATH + "/{name}"
    for path, endpoint, method, responses in (
        (ADMIN_PATH, list_variants, "GET", answers(VariantList, 401, 404, 503)),
        (ADMIN_PATH, add_variant, "POST", changed),
        (one, get_change, "GET", changed),
        (one, replace_variant, "PUT", changed),
        (one, remove_variant, "DELETE", changed),
        (f"{one}/alias", alias_variant, "POST", pointed),
        (f"{one}/rollback", roll_back, "POST", pointed),
        (f"{one}/pin", pin_variant, "POST", pointed),
        (f"{ADMIN_PATH}/{REPLAN}/replan", replan, "POST", changed),
    ):
        app.add_api_route(
            path, endpoint, methods=[method], response_model=None, response_class=JSONResponse, responses=responses
        )


def _admin(request: Request) -> Variants:
    """The variants, for who has the admin's key. Raises `AuthenticationError`, and `UnavailableError` while loading."""
    state: ServerState = request.app.state.server
    wanted = state.settings.admin_key
    if wanted is None:
        raise AdminApiOffError(
            "The admin API is off; start the server with --admin-key-file or POLYMOE_ADMIN_KEY.", code="admin_api_off"
        )
    given = given_key(request.scope)
    if given is None or not hmac.compare_digest(given, wanted.encode()):
        raise AuthenticationError("The admin's key is needed.", code="invalid_admin_key")
    state.require_ready()
    return state.variants


async def list_variants(request: Request) -> Response:
    """Every version that is held, what names mean, and what is being changed."""
    variants = _admin(request)
    await variants.start()
    state: ServerState = request.app.state.server
    stats = await state.client.stats()
    info = state.client.info
    held = [*state.client.processor.versions.held.values(), *variants.draining.values()]
    cards = [_card(variants, version, stats.in_flight.get(version.version, 0)) for version in held]
    changes = [_change(change) for change in variants.changes.last.values()]
    room = {"max_variants": info.max_variants, "headroom": info.headroom, "added_bytes": stats.added_bytes}
    return JsonResponse({"object": "list", "data": cards, "changes": changes, **room})


async def get_change(request: Request, name: str) -> Response:
    """The last change of a name."""
    variants = _admin(request)
    change = variants.changes.last.get(name)
    if change is None:
        error = RequestError(f"Nothing was changed about {name[:80]} since the start.", param="name")
        error.status = 404
        raise error
    return JsonResponse(_change(change))


async def add_variant(request: Request, body: AddVariantRequest) -> Response:
    """Add a variant: 202 when it has begun, or with `wait` 200 when it is served."""
    variants = _admin(request)
    change = await variants.add(body.name, body.source, fit=body.fit, evict=body.evict or "none")
    return await _answer(variants, change, bool(body.wait))


async def replace_variant(request: Request, name: str, body: ReplaceVariantRequest) -> Response:
    """Let a name mean a new version, in one step, once that is there."""
    variants = _admin(request)
    change = await variants.add(name, body.source, fit=body.fit, evict=body.evict or "none", replaces=True)
    return await _answer(variants, change, bool(body.wait))


async def remove_variant(request: Request, name: str, force: bool = False, wait: bool = False) -> Response:
    """Take a name away. What runs on it ends first; with `force` it is ended."""
    variants = _admin(request)
    return await _answer(variants, await variants.remove(name, force), wait)


async def alias_variant(request: Request, name: str, body: AliasRequest) -> Response:
    """Let a name mean what another one, or name@version, means."""
    variants = _admin(request)
    return JsonResponse(_card(variants, await variants.point(name, body.to)))


async def roll_back(request: Request, name: str) -> Response:
    """Let a name mean the version before, which is still held."""
    variants = _admin(request)
    return JsonResponse(_card(variants, await variants.rollback(name)))


async def pin_variant(request: Request, name: str, body: PinRequest) -> Response:
    """Keep a version whatever names mean, or no longer."""
    variants = _admin(request)
    return JsonResponse(_card(variants, await variants.pin(name, body.pinned is not False)))


async def replan(request: Request, body: ReplanRequest) -> Response:
    """Plan a new bundle from the sources of what names mean, and switch to it."""
    variants = _admin(request)
    return await _answer(variants, await variants.replan(body.policy, body.memory), bool(body.wait))


async def _answer(variants: Variants, change: Change, wait: bool) -> Response:
    if wait:
        await variants.changes.wait(change)
        if change.error is not None:
            raise change.error
    return JsonResponse(_change(change), status_code=202 if change.is_open else 200)


def _change(change: Change) -> dict[str, Any]:
    error = change.error
    return {
        "object": "variant.change",
        "name": change.name,
        "kind": change.kind,
        "state": change.state,
        "stage": change.stage,
        "fraction": change.fraction,
        "version": change.version,
        "notes": change.notes,
        "error": None if error is None else error_body(str(error), error.type, error.param, error.code)["error"],
    }


def _card(variants: Variants, info: VariantInfo, in_flight: int | None = None) -> dict[str, Any]:
    names = variants.names_of(info)
    state = "draining" if info.place in variants.draining else "serving" if names else "held"
    return {
        "object": "variant",
        "name": info.name,
        "version": info.version,
        "names": names,
        "state": state,
        "pinned": variants.is_pinned(info),
        "previous_of": variants.previous_of(info),
        "source": info.root,
        "bytes": info.device_bytes,
        "in_flight": in_flight,
        "created": info.created,
        "max_model_len": info.max_model_len,
        "fidelity": None if info.fidelity is None else msgspec.to_builtins(info.fidelity),
    }
