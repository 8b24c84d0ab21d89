"""``/keeper/*``: what API instances ask of their region's keeper. Everybody shows ``KEYSERVICE_KEEPER_SECRET``."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Request, Response

from keyservice.bearer import BearerRefused
from keyservice.core.evidence import EpochKey
from keyservice.errors import RequestRefused
from keyservice.intents import BeforeBody, EntriesBody, Intents, OutcomeBody, decode_entries, encode_entries
from keyservice.limits import BULK_REVOCATIONS_MAX, KEEPER_BODY_BYTES_MAX
from verifier.log import EPOCH_KIND, Entry, FormatError

from .body import read_json
from .problems import json_response

__all__ = ["router"]


def _entries(bodies: list[dict[str, str]]) -> list[Entry]:
    if len(bodies) > BULK_REVOCATIONS_MAX:
        raise RequestRefused("revocations_too_many", f"at most {BULK_REVOCATIONS_MAX} entries")
    try:
        entries = decode_entries(bodies)
    except FormatError as error:
        raise RequestRefused(error.code, "an entry cannot be read") from None
    if any(entry.kind == EPOCH_KIND for entry in entries):
        raise RequestRefused("kind_unknown", "an epoch is no revocation")
    return entries


def router(intents: Intents, secret: str) -> APIRouter:
    """``intents`` is the keeper in this process."""
    routes = APIRouter(prefix="/keeper")
    expected = f"Bearer {secret}".encode()

    def check(request: Request) -> None:
        shown = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(shown, expected):
            raise BearerRefused("keeper_secret_wrong", "this is not the keeper's secret", status=401)

    @routes.post("/intents")
    async def intend(request: Request) -> Response:
        """Each is on disk when this is answered, unless something was stored under its id before: that is told."""
        check(request)
        body = await read_json(request, EntriesBody, KEEPER_BODY_BYTES_MAX)
        before = await intents.intend(_entries(body.entries))
        return json_response(BeforeBody([None if entry is None else entry.encode() for entry in before]))

    @routes.post("/outcomes")
    async def outcome(request: Request) -> Response:
        """What became of intents."""
        check(request)
        body = await read_json(request, OutcomeBody, KEEPER_BODY_BYTES_MAX)
        entries = _entries(body.entries)
        if body.number is None:
            await intents.given_up(entries)
        else:
            await intents.appended(EpochKey(body.number, body.nonce), entries)
        return json_response({})

    @routes.get("/entries/{entry_id}")
    async def one(entry_id: str, request: Request) -> Response:
        """What is stored under an id."""
        check(request)
        entry = await intents.find(entry_id)
        if entry is None:
            raise RequestRefused("revocation_unknown", "nothing is stored under this id", status=404)
        return json_response({"entries": encode_entries([entry])})

    return routes
