"""``/admin/keys``: every region's keys as they stand, rotation of this region's, and taking any out of use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import APIRouter, Request, Response

from keyservice.bearer import AdminBearer
from keyservice.compromising import Compromiser
from keyservice.core.rotation import FINAL_STATES, KeyRecord
from keyservice.errors import Refused, RequestRefused, SigningUnavailable
from keyservice.keyring import Keyring
from keyservice.rotator import RotationRequest, Rotator
from keyservice.settings import Settings

from .body import read_json
from .problems import json_response

__all__ = ["router"]

READ_SCOPE = "keyservice:keys:read"
ROTATE_SCOPE = "keyservice:keys:rotate"
COMPROMISE_SCOPE = "keyservice:keys:compromise"


class _Why(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str = "compromised"


class _Which(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``all`` keys of this region: for a breached store, or its key-encryption key."""

    all: bool
    reason: str = "compromised"


def _described(record: KeyRecord) -> dict[str, str | int | None]:
    return {
        "kid": record.kid,
        "region": record.region,
        "alg": record.alg,
        "state": record.state,
        "rev": record.rev,
        "prepared_at": record.prepared_at,
        "published_at": record.published_at,
        "active_at": record.active_at,
        "retiring_at": record.retiring_at,
        "removed_at": record.removed_at,
    }


def router(
    bearer: AdminBearer,
    ring: Keyring,
    rotator: Rotator,
    compromiser: Compromiser,
    settings: Settings,
    *,
    refresh: Callable[[], None],
) -> APIRouter:
    """``refresh()`` asks for the new keys to be read soon."""
    routes = APIRouter(prefix="/admin/keys")

    @routes.get("")
    async def listing(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), READ_SCOPE)
        records = sorted(ring.records.values(), key=lambda r: (r.region, r.published_at or r.prepared_at or 0, r.kid))
        generation = str(ring.document.generation) if ring.document is not None else None
        return json_response({"generation": generation, "keys": [_described(record) for record in records]})

    @routes.post("/rotate")
    async def rotate(request: Request) -> Response:
        """200 if the successor signs already, 202 with the time at which it will."""
        bearer.check(request.headers.get("authorization"), ROTATE_SCOPE)
        outcome = await _asked(rotator.request())
        refresh()
        return json_response(_outcome(outcome), 200 if outcome.active != outcome.replaced else 202)

    @routes.post("/activate")
    async def activate(request: Request) -> Response:
        """The successor signs now, or 409 with what it waits for."""
        bearer.check(request.headers.get("authorization"), ROTATE_SCOPE)
        outcome = await _asked(rotator.activate())
        refresh()
        return json_response(_outcome(outcome))

    async def compromise(records: list[KeyRecord], reason: str) -> Response:
        """200 if every region was seen to refuse them, 202 while that is not known."""
        done = await compromiser.compromise(records, reason)
        body = done.document(
            partition_budget_s=settings.partition_budget_s,
            jwks_max_age_s=settings.jwks_max_age_s,
            client_cache_max_s=settings.jwks_client_cache_max_s,
        )
        return json_response(body, 200 if done.complete else 202)

    @routes.post("/compromise")
    async def compromise_all(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), COMPROMISE_SCOPE)
        body = await read_json(request, _Which)
        if not body.all:
            raise RequestRefused("kid_missing", "say all: true, or POST /admin/keys/{kid}/compromise")
        mine = [r for r in ring.records.values() if r.region == settings.region and r.state not in FINAL_STATES]
        return await compromise(mine, body.reason)

    @routes.post("/{kid}/compromise")
    async def compromise_one(kid: str, request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), COMPROMISE_SCOPE)
        body = await read_json(request, _Why)
        record = ring.records.get(kid)
        if record is None:
            raise RequestRefused("key_unknown", "no key of any region has this kid", status=404)
        return await compromise([record], body.reason)

    return routes


async def _asked(work: Awaitable[RotationRequest]) -> RotationRequest:
    try:
        return await work
    except Refused as refused:
        if refused.code != "NO_ACTIVE_KEY":
            raise
        raise SigningUnavailable("no_signing_key", "this region has no active key yet") from None


def _outcome(outcome: RotationRequest) -> dict[str, object]:
    return {
        "region": outcome.region,
        "replaced": outcome.replaced,
        "active": outcome.active,
        "activates_at": outcome.activates_at,
        "waiting_for": list(outcome.waiting_for),
        "excused": list(outcome.excused),
    }
