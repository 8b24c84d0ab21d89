"""``/admin/regions``: what every region's keeper reports. ``/admin/keepers/*``: who has a seat."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
import structlog
from fastapi import APIRouter, Request, Response

from keyservice.bearer import AdminBearer
from keyservice.core.evidence import Protocol, key_of, majority
from keyservice.core.keepers import Bump
from keyservice.core.membership import Verb, change_voters
from keyservice.errors import PrimaryUnreachable, RequestRefused
from keyservice.evidence import Evidence
from keyservice.settings import REGION
from keyservice.trust import TrustLog
from verifier.log import Epoch

from .body import read_json
from .problems import json_response

__all__ = ["router"]

READ_SCOPE: Final = "keyservice:regions:read"
WRITE_SCOPE: Final = "keyservice:regions:write"
_PROTOCOL: Final = Protocol()
_log: Final = structlog.get_logger(__name__)

Read = Callable[[], Awaitable[Evidence]]


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    """Of ``add``, ``remove`` and ``replace``: the region, and the keeper if it is not the one that reports there."""

    region: str | None = None
    keeper_id: str | None = None
    accept_loss: bool = False


def _described(evidence: Evidence, now_ms: float) -> dict[str, Any]:
    epoch = evidence.epoch
    if epoch is None:
        return {"epoch": None, "regions": {}}
    voters, merged = _PROTOCOL.voters(epoch), _PROTOCOL.merged_ids(epoch, evidence.reports.values())
    held = _PROTOCOL.replicated_to(epoch, evidence.reports.values())
    regions = {
        region: _region(region, evidence, epoch, voters, now_ms)
        for region in dict.fromkeys([*voters, *evidence.reports])
    }
    return {
        "epoch": {"number": epoch.number, "nonce": epoch.nonce, "open": epoch.open},
        "voters": dict(voters),
        "majority": majority(voters),
        "missing_to_open": [] if epoch.open else [voters.missing(merged) for voters in _PROTOCOL.electorates(epoch)],
        "replicated_to": None if held is None else f"{held[0]}-{held[1]}.{epoch.nonce}",
        "regions": regions,
    }


def _region(region: str, evidence: Evidence, epoch: Epoch, voters: Mapping[str, str], now_ms: float) -> dict[str, Any]:
    report = evidence.reports.get(region)
    if report is None:
        return {"seat": voters.get(region), "keeper_id": None, "merged": False}
    return {
        "seat": voters.get(region),
        "keeper_id": report.keeper_id,
        "voter": voters.get(region) == report.keeper_id,
        "merged": report.epoch == key_of(epoch),
        "held": f"{report.held}.{report.nonce}",
        "beat_n": report.beat_n if report.beat_n >= 0 else None,
        "commit": report.commit,
        "age_ms": round(now_ms - evidence.at_ms[region]),
        "version": evidence.versions[region],
    }


def router(bearer: AdminBearer, trust: TrustLog, own: Read, primary: Read) -> APIRouter:
    """``own()`` reads the evidence of the region's own server, ``primary()`` that of the primary."""
    routes = APIRouter(prefix="/admin")

    @routes.get("/regions")
    async def regions(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), READ_SCOPE)
        return json_response(_described(await own(), time.time() * 1000))

    @routes.post("/keepers/{verb}")
    async def change(verb: Verb, request: Request) -> Response:
        """202: the new epoch has begun; it opens once enough keepers have merged."""
        caller = bearer.check(request.headers.get("authorization"), WRITE_SCOPE)
        wanted = await read_json(request, _Change)
        if wanted.region is not None and not REGION.match(wanted.region):
            raise RequestRefused("region_invalid", "a region's name is of a-z, 0-9 and -")
        evidence = await primary()
        if evidence.epoch is None:
            raise PrimaryUnreachable("the primary holds no trust log", code="no_trust_log")
        decided = change_voters(
            verb,
            evidence.epoch,
            evidence.reports,
            region=wanted.region,
            keeper_id=wanted.keeper_id,
            accept_loss=wanted.accept_loss,
        )
        bump = Bump(0, key_of(evidence.epoch), decided.voters)
        if not await trust.bump(bump, forgotten=decided.forgotten):
            raise RequestRefused("epoch_changed", "another epoch began meanwhile: look again", status=409)
        who = {"by": caller.client_id, "verb": verb, "voters": decided.voters, "forgotten": decided.forgotten}
        _log.warning("voters changed", audit=True, **who)
        return json_response({"voters": decided.voters, "at_risk": decided.at_risk}, 202)

    return routes
