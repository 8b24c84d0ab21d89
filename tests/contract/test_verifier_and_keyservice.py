"""The verifier and the key service together, over HTTP and a real server: the main job in one region."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.conftest import KeyService
from tests.keyservice.support import HS256_SECRET, ISSUER, Server, until
from verifier import InvalidToken, RevokedToken, Verifier
from verifier.log import LOG_KEY


@pytest.fixture
def verifier(keyservice: KeyService) -> Iterator[Verifier]:
    made = Verifier(
        issuer=ISSUER,
        audience="orders",
        jwks_urls=[keyservice.jwks_url],
        redis_url=keyservice.redis_url,
        hs256_secrets=[HS256_SECRET],
    )
    with made:
        assert made.wait_ready(60)
        yield made


def refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except RevokedToken:
        return True
    return False


def test_log_in_accepted_log_out_refused(keyservice: KeyService, verifier: Verifier) -> None:
    wanted = {"sub": "ada", "client_id": "web", "audience": "orders", "scope": "orders:read"}
    session, other = (keyservice.admin("POST", "/admin/sessions", wanted) for _ in range(2))
    claims = verifier.verify(session["access_token"])
    assert (claims.subject, claims["sid"], claims["scope"]) == ("ada", session["sid"], "orders:read")
    keyservice.admin("DELETE", f"/admin/sessions/{session['sid']}")
    until(lambda: refused(verifier, session["access_token"]))
    verifier.verify(other["access_token"])

    keyservice.admin("POST", "/admin/revocations", {"kind": "sub", "value": "ada"})
    until(lambda: refused(verifier, other["access_token"]))
    fresh = keyservice.admin("POST", "/admin/sessions", wanted)
    verifier.verify(fresh["access_token"])


def test_single_tokens_of_both_kinds_are_revoked_by_themselves(keyservice: KeyService, verifier: Verifier) -> None:
    for client, form in (("orders", {}), ("legacy", {"audience": "orders"})):
        token, other = keyservice.token(client, **form), keyservice.token(client, **form)
        verifier.verify(token)
        keyservice.admin("POST", "/admin/revocations", {"token": token})
        until(lambda token=token: refused(verifier, token))  # type: ignore[misc]
        verifier.verify(other)


def test_a_rotation_and_then_the_retired_key_is_revoked(keyservice: KeyService, verifier: Verifier) -> None:
    retired, old = keyservice.active(), keyservice.token()
    keyservice.rotate()
    new = keyservice.token()
    verifier.verify(old)
    verifier.verify(new)
    keyservice.admin("POST", "/admin/revocations", {"kind": "kid", "value": retired})

    def is_refused() -> bool:
        try:
            verifier.verify(old)
        except InvalidToken:
            return True
        return False

    until(is_refused)
    verifier.verify(new)


def test_an_entry_deleted_behind_everybody_comes_back_and_whoever_starts_later_is_fresh_with_it(
    keyservice: KeyService, verifier: Verifier, server: Server
) -> None:
    token, other = keyservice.token(), keyservice.token()
    until(lambda: verifier.status().fresh)
    receipt = keyservice.admin("POST", "/admin/revocations", {"token": token})
    keyservice.admin("POST", "/admin/revocations", {"token": other})
    until(lambda: refused(verifier, other))
    epoch = verifier.status().epoch
    with server.client() as client:
        assert client.xdel(LOG_KEY, receipt["position"].partition(".")[0]) == 1
    until(lambda: verifier.status().epoch != epoch and verifier.status().fresh)
    assert refused(verifier, token)
    answered = verifier.status().epoch
    later = Verifier(issuer=ISSUER, audience="orders", jwks_urls=[keyservice.jwks_url], redis_url=keyservice.redis_url)
    with later:
        assert later.wait_ready(60)
        until(lambda: later.status().fresh)
        assert refused(later, token)
        assert later.status().epoch == answered  # one new epoch was enough
