"""Logging out everywhere catches what came before, also from a clock that is ahead, and nothing that comes after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import httpx
import jwt
import pytest
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt

from tests.contract.conftest import KeyService
from tests.keyservice.support import HS256_SECRET, ISSUER, until
from verifier import RevokedToken, Verifier

SKEW_S = 5
LOG_IN = {"sub": "ada", "client_id": "web", "audience": "orders", "scope": "orders:read"}


@pytest.fixture
def keyservice_settings() -> dict[str, str]:
    return {"KEYSERVICE_MAX_SKEW_S": str(SKEW_S), "KEYSERVICE_PUBLISH_LEAD_S": "7"}


@pytest.fixture
def verifier(keyservice: KeyService) -> Iterator[Verifier]:
    with Verifier(
        issuer=ISSUER,
        audience="orders",
        jwks_urls=[keyservice.jwks_url],
        redis_url=keyservice.redis_url,
        hs256_secrets=[HS256_SECRET],
    ) as made:
        assert made.wait_ready(60)
        yield made


def of_a_clock(ahead_s: float, sub: str = "ada") -> str:
    """A token that another issuer of the same secret makes now, by a clock that is ahead."""
    iat = math.floor(time.time() + ahead_s)
    claims = {"iss": ISSUER, "aud": "orders", "sub": sub, "iat": iat, "exp": iat + 600, "jti": f"{sub}-{ahead_s}"}
    return jwt.encode(claims, HS256_SECRET, "HS256")


def log_out_everywhere(keyservice: KeyService, sub: str = "ada") -> None:
    receipt = keyservice.admin("POST", "/admin/revocations", {"kind": "sub", "value": sub})
    assert receipt["durability"] == "replicated"


def is_refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except RevokedToken:
        return True
    return False


def test_whoever_signs_in_again_within_the_same_second_is_not_locked_out(
    keyservice: KeyService, verifier: Verifier
) -> None:
    before = keyservice.admin("POST", "/admin/sessions", LOG_IN)["access_token"]
    verifier.verify(before)
    log_out_everywhere(keyservice)
    again = keyservice.admin("POST", "/admin/sessions", LOG_IN)["access_token"]
    until(lambda: is_refused(verifier, before))
    claims = verifier.verify(again)
    cut_off_at = keyservice.admin("GET", "/admin/revocations?kind=sub")["revocations"][0]["before"]
    assert claims["iat"] <= cut_off_at, "the cut-off reaches beyond the new token, which names it"
    assert claims["after"]


def test_a_token_from_before_it_is_refused_though_its_clock_was_ahead_by_less_than_the_skew(
    keyservice: KeyService, verifier: Verifier
) -> None:
    inside, outside = [of_a_clock(ahead_s) for ahead_s in (0.0, 3.0, SKEW_S - 1.0)], of_a_clock(SKEW_S + 5.0)
    for token in (*inside, outside):
        verifier.verify(token)
    log_out_everywhere(keyservice)
    until(lambda: is_refused(verifier, inside[0]))
    assert all(is_refused(verifier, token) for token in inside)
    assert not is_refused(verifier, outside)


def test_nobody_elses_tokens_are_hit(keyservice: KeyService, verifier: Verifier) -> None:
    hers, his = of_a_clock(0.0), of_a_clock(0.0, "bob")
    log_out_everywhere(keyservice)
    until(lambda: is_refused(verifier, hers))
    assert verifier.verify(his).subject == "bob"


def test_other_peoples_strict_libraries_accept_the_token_of_a_log_in_right_after_it(keyservice: KeyService) -> None:
    log_out_everywhere(keyservice)
    token = keyservice.admin("POST", "/admin/sessions", LOG_IN)["access_token"]
    document = httpx.get(keyservice.jwks_url, trust_env=False, timeout=60).json()
    key = jwt.PyJWKSet.from_dict(document)[jwt.get_unverified_header(token)["kid"]]
    claims = jwt.decode(token, key, ["RS256"], audience="orders", issuer=ISSUER, leeway=0)  # refuses a future iat
    assert claims["after"]
    decoded = joserfc_jwt.decode(token, joserfc_jwk.KeySet.import_key_set(document), algorithms=["RS256"])
    joserfc_jwt.JWTClaimsRegistry(now=math.ceil(time.time()), leeway=0, iat={"essential": True}).validate(
        decoded.claims
    )
