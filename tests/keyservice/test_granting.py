"""One grant sees the revocations of one moment, and a revoked session stays ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest

from keyservice.clients import Client
from keyservice.core.sessions import RefreshToken, Session
from keyservice.ending import SessionEnd
from keyservice.errors import OAuthError, PrimaryUnreachable
from keyservice.granting import Granting
from keyservice.issuing import Issuer
from keyservice.sessions import Redemption
from keyservice.telemetry import Metrics
from verifier.log import Entry
from verifier.revocations import Mirror, Snapshot

ISSUER = "https://id.test"
NOW = 1_000_000.0
WEB = Client(client_id="web", secret_hash="", scopes=("read",), audiences=("orders",))


class Sessions:
    """The session store, in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Session] = {}
        self.reachable = True

    async def start(self, session: Session, token: RefreshToken) -> None:
        self.held[session.sid] = session

    async def get(self, sid: str) -> Session | None:
        return self.held.get(sid)

    async def redeem(self, old: RefreshToken) -> Redemption:
        return Redemption("fresh", old.successor())

    async def end(self, sid: str) -> None:
        if not self.reachable:
            raise PrimaryUnreachable
        self.held.pop(sid, None)


class Key:
    """Signs nothing, and remembers what it was asked to sign."""

    def __init__(self) -> None:
        self.claims: list[dict[str, Any]] = []

    def sign(self, claims: dict[str, Any]) -> str:
        self.claims.append(claims)
        return "token"


def with_cut_off(*before: int) -> Snapshot:
    mirror = Mirror()
    mirror.apply(Entry(f"cut{at}", "sub", ISSUER, "ada", at, at + 100_000, "", 0, "eu") for at in before)
    return mirror.snapshot


def granting(sessions: Sessions, key: Key, snapshots: Iterable[Snapshot], *, lifetime_max_s: float = 900) -> Granting:
    """Every look at the revocations gives the next snapshot."""
    following = iter(snapshots)
    issuer = Issuer(
        ISSUER,
        900,
        clock=lambda: NOW,
        signing_key=cast(Any, lambda: key),
        gate=lambda: None,
        lifetime_max_s=lambda: lifetime_max_s,
        shared_secret=None,
    )
    end = SessionEnd(cast(Any, None), cast(Any, sessions), cast(Any, None), session_life_s=4500, clock=lambda: NOW)
    return Granting(
        issuer,
        sessions,  # type: ignore[arg-type]
        end,
        Metrics("eu"),
        issuer_name=ISSUER,
        session_ttl_s=3600,
        clock=lambda: NOW,
        snapshot=lambda: next(following),
    )


async def started(sessions: Sessions, key: Key) -> RefreshToken:
    granted = await granting(sessions, key, [Snapshot()] * 9).start_session(WEB, "ada", ("orders",), None)
    assert granted.refresh_token is not None
    return granted.refresh_token


async def test_a_cut_off_that_arrives_during_a_refresh_hits_the_new_token() -> None:
    sessions, key = Sessions(), Key()
    token = await started(sessions, key)
    late = with_cut_off(int(NOW) + 5)
    await granting(sessions, key, [Snapshot(), late, late]).refresh(WEB, token.reveal(), None)
    claims = key.claims[-1]
    hit = late.find(issuer=ISSUER, sub="ada", iat=claims["iat"], after=claims.get("after", ()))
    assert hit is not None


async def test_a_session_and_its_first_token_come_after_the_same_cut_offs() -> None:
    sessions, key = Sessions(), Key()
    late = with_cut_off(int(NOW) + 5)
    await granting(sessions, key, [Snapshot(), late, late]).start_session(WEB, "ada", ("orders",), None)
    (session,) = sessions.held.values()
    assert tuple(key.claims[-1].get("after", ())) == session.after == ()


@pytest.mark.parametrize("reachable", [True, False])
async def test_a_refresh_refused_for_a_revocation_ends_the_session(reachable: bool) -> None:
    sessions, key = Sessions(), Key()
    token = await started(sessions, key)
    sessions.reachable = reachable
    with pytest.raises(OAuthError) as refused:
        await granting(sessions, key, [with_cut_off(int(NOW) + 5)]).refresh(WEB, token.reveal(), None)
    assert refused.value.code == "invalid_grant"
    assert bool(sessions.held) is not reachable


async def test_another_client_ends_nothing() -> None:
    sessions, key = Sessions(), Key()
    token = await started(sessions, key)
    other = Client(client_id="other", secret_hash="", scopes=("read",), audiences=("orders",))
    with pytest.raises(OAuthError):
        await granting(sessions, key, [with_cut_off(int(NOW) + 5)]).refresh(other, token.reveal(), None)
    assert sessions.held


@pytest.mark.parametrize(("left_s", "lasts_s"), [(901, 900), (900, 900), (899.9, 899)])
async def test_a_token_that_its_key_cuts_short_says_so(left_s: float, lasts_s: int) -> None:
    sessions, key = Sessions(), Key()
    grants = granting(sessions, key, [Snapshot()] * 9, lifetime_max_s=left_s)
    granted = grants.client_credentials(WEB, None, None)
    claims = key.claims[-1]
    assert granted.expires_in == claims["exp"] - claims["iat"] == lasts_s
    assert granted.response()["expires_in"] == lasts_s
