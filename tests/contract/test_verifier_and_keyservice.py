"""The verifier and the key service together, over HTTP and a real server: the main job in one region."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.conftest import KeyService
from tests.keyservice.support import HS256_SECRET, ISSUER, until
from verifier import InvalidToken, RevokedToken, Verifier


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
        assert made.wait_ready(10)
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
    until(lambda: refused(verifier, session["access_token"]), 5)
    verifier.verify(other["access_token"])

    keyservice.admin("POST", "/admin/revocations", {"kind": "sub", "value": "ada"})
    until(lambda: refused(verifier, other["access_token"]), 5)
    fresh = keyservice.admin("POST", "/admin/sessions", wanted)
    verifier.verify(fresh["access_token"])


def test_single_tokens_of_both_kinds_are_revoked_by_themselves(keyservice: KeyService, verifier: Verifier) -> None:
    for client, form in (("orders", {}), ("legacy", {"audience": "orders"})):
        token, other = keyservice.token(client, **form), keyservice.token(client, **form)
        verifier.verify(token)
        keyservice.admin("POST", "/admin/revocations", {"token": token})
        until(lambda token=token: refused(verifier, token), 5)  # type: ignore[misc]
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

    until(is_refused, 5)
    verifier.verify(new)
