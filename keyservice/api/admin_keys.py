"""``/admin/keys``: every region's keys as they stand, and rotation of this region's."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from keyservice.bearer import AdminBearer
from keyservice.core.rotation import KeyRecord
from keyservice.errors import Refused, SigningUnavailable
from keyservice.keyring import Keyring
from keyservice.rotator import Rotator

from .problems import json_response

__all__ = ["router"]

READ_SCOPE = "keyservice:keys:read"
ROTATE_SCOPE = "keyservice:keys:rotate"


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


def router(bearer: AdminBearer, ring: Keyring, rotator: Rotator, refresh: Callable[[], None]) -> APIRouter:
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
        try:
            outcome = await rotator.request()
        except Refused as refused:
            if refused.code != "NO_ACTIVE_KEY":
                raise
            raise SigningUnavailable("no_signing_key", "this region has no active key yet") from None
        refresh()
        body = {
            "region": outcome.region,
            "replaced": outcome.replaced,
            "active": outcome.active,
            "activates_at": outcome.activates_at,
            "waiting_for": list(outcome.waiting_for),
            "excused": list(outcome.excused),
        }
        return json_response(body, 200 if outcome.active != outcome.replaced else 202)

    return routes
