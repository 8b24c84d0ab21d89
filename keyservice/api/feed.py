"""``GET /revocations/feed``: the trust log as server-sent events, for verifiers of services that have no Redis.

Needs a token of the admin audience with scope ``keyservice:revocations:read``. ``Last-Event-ID`` is a position,
``<epoch>-<seq>.<nonce>``. :mod:`verifier.feed` lists the events.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from keyservice.bearer import AdminBearer
from keyservice.feed import Feed

__all__ = ["FEED_PATH", "router"]

FEED_PATH: Final = "/revocations/feed"
READ_SCOPE: Final = "keyservice:revocations:read"
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx and its kin would hold beats back
}


def router(bearer: AdminBearer, feed: Feed) -> APIRouter:
    """The token is looked at again while the stream lasts: it ends when the token does, or is revoked."""
    routes = APIRouter()

    @routes.get(FEED_PATH)
    async def revocations_feed(request: Request) -> Response:
        authorization = request.headers.get("authorization")
        bearer.check(authorization, READ_SCOPE)
        events = await feed.open(request.headers.get("last-event-id"), lambda: bearer.check(authorization, READ_SCOPE))
        return StreamingResponse(events, headers=_HEADERS, media_type="text/event-stream")

    return routes
