"""``/admin/revocations``: revoke one thing or ten thousand, and look them up."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from keyservice.bearer import AdminBearer
from keyservice.core.revocation import Draft, RevocationRequest
from keyservice.errors import KeyserviceError, RequestRefused
from keyservice.limits import BULK_BODY_BYTES_MAX, BULK_REVOCATIONS_MAX, LIST_PAGE_MAX
from keyservice.receipts import Receipt
from keyservice.revoking import Outcome, Revoker

from .body import read_json
from .problems import RETRY_AFTER_S, json_response, problem, problem_of

__all__ = ["receipt_response", "router"]

READ_SCOPE = "keyservice:revocations:read"
WRITE_SCOPE = "keyservice:revocations:write"


class _Body(RevocationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One revocation, or a list of them."""

    revocations: list[RevocationRequest] | None = None


def _single(body: _Body, key: str | None) -> RevocationRequest:
    """The request with the id of the ``Idempotency-Key`` header."""
    if key is not None and body.id not in (None, key):
        raise RequestRefused("id_conflict", "id and Idempotency-Key differ")
    return msgspec.structs.replace(body, id=key or body.id)


def _check_bulk(body: _Body, key: str | None, requests: list[RevocationRequest]) -> None:
    if key is not None or body != _Body(revocations=requests):
        raise RequestRefused("request_ambiguous", "a list of revocations takes nothing beside it; give each its id")
    if not 0 < len(requests) <= BULK_REVOCATIONS_MAX:
        raise RequestRefused("revocations_too_many", f"a list has 1 to {BULK_REVOCATIONS_MAX} revocations")


def _draft(revoker: Revoker, request: RevocationRequest) -> Draft | RequestRefused:
    try:
        return revoker.draft(request)
    except RequestRefused as refused:
        return refused


def receipt_response(receipt: Receipt) -> Response:
    """200 with the position to wait for elsewhere, or 202: stored, and its outcome open."""
    if receipt.replicated:
        return json_response(receipt.document(), 200, {"Trust-Position": str(receipt.position)})
    return json_response(receipt.document(), 202, {"Retry-After": str(RETRY_AFTER_S)})


def _described(receipt: Receipt) -> dict[str, Any]:
    entry = receipt.stored.entry
    return {
        **receipt.document(),
        "kind": entry.kind,
        "issuer": entry.issuer,
        "value": entry.value,
        "before": entry.before,
        "expires_at": entry.expires_at,
        "reason": entry.reason,
        "at_ms": entry.at,
        "region": entry.region,
    }


def _result(index: int, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, KeyserviceError):
        return {"index": index, "code": problem_of(outcome)[1], "detail": str(outcome)}
    return {"index": index, **outcome.document()}


async def _revoke_many(revoker: Revoker, requests: list[RevocationRequest]) -> Response:
    """A result per item. If nothing at all was stored: raises the first outage, or else says that all is refused."""
    drafts = [_draft(revoker, request) for request in requests]
    sound = [draft for draft in drafts if isinstance(draft, Draft)]
    outcomes = await revoker.revoke_all(sound)
    outages = [error for error in outcomes if isinstance(error, KeyserviceError) and problem_of(error)[0] == 503]
    stored = any(isinstance(outcome, Receipt) for outcome in outcomes)
    if outages and not stored:
        raise outages[0]
    following = iter(outcomes)
    merged: list[Outcome] = [next(following) if isinstance(draft, Draft) else draft for draft in drafts]
    results = [_result(index, outcome) for index, outcome in enumerate(merged)]
    if not stored:
        return problem(422, "revocations_refused", "none of the revocations can be stored", results=results)
    if all(isinstance(outcome, Receipt) and outcome.replicated for outcome in merged):
        furthest = max(outcome.position for outcome in merged if isinstance(outcome, Receipt) and outcome.position)
        return json_response({"results": results}, 200, {"Trust-Position": str(furthest)})
    return json_response({"results": results}, 202, {"Retry-After": str(RETRY_AFTER_S)})


def _page(request: Request) -> tuple[int, tuple[int, int] | None]:
    """``limit`` and ``before`` (the ``next`` of the page before)."""
    limit, before = request.query_params.get("limit", "100"), request.query_params.get("before")
    try:
        number, _, seq = before.partition("-") if before else ("0", "", "0")
        if not 0 < int(limit) <= LIST_PAGE_MAX:
            raise ValueError("out of range")
        return int(limit), (int(number), int(seq)) if before else None
    except ValueError:
        raise RequestRefused(
            "page_invalid", f"limit is 1 to {LIST_PAGE_MAX}, before the next of another page"
        ) from None


def router(bearer: AdminBearer, revoker: Revoker) -> APIRouter:
    """Writing and reading revocations."""
    routes = APIRouter(prefix="/admin/revocations")

    @routes.post("")
    async def revoke(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), WRITE_SCOPE)
        body = await read_json(request, _Body, BULK_BODY_BYTES_MAX)
        key = request.headers.get("idempotency-key")
        if body.revocations is not None:
            _check_bulk(body, key, body.revocations)
            return await _revoke_many(revoker, body.revocations)
        return receipt_response(await revoker.revoke(revoker.draft(_single(body, key))))

    @routes.get("")
    async def listing(request: Request) -> Response:
        bearer.check(request.headers.get("authorization"), READ_SCOPE)
        limit, before = _page(request)
        page = revoker.newest(request.query_params.get("kind"), before, limit)
        last = page[-1].position if len(page) == limit else None
        described = [_described(receipt) for receipt in await revoker.receipts(page)]
        return json_response({"revocations": described, "next": None if last is None else last.stream_id})

    @routes.get("/{entry_id}")
    async def one(entry_id: str, request: Request) -> Response:
        """The receipt as it stands now, in any region."""
        bearer.check(request.headers.get("authorization"), READ_SCOPE)
        stored = await revoker.find(entry_id)
        if stored is None:
            raise RequestRefused("revocation_unknown", "no revocation with this id is known here", status=404)
        (receipt,) = await revoker.receipts([stored])
        headers = {"Trust-Position": str(receipt.position)} if receipt.replicated else None
        return json_response(_described(receipt), 200, headers)

    return routes
