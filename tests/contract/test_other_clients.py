"""Our tokens and key sets as other people's clients read them, before, during and after a rotation."""

from __future__ import annotations

from typing import Any

import httpx
import jwt
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt

from tests.contract.conftest import KeyService
from tests.keyservice.support import HS256_SECRET, ISSUER


def by_pyjwt(client: jwt.PyJWKClient, token: str) -> dict[str, Any]:
    key = client.get_signing_key_from_jwt(token)
    claims: dict[str, Any] = jwt.decode(token, key, ["RS256"], audience="orders", issuer=ISSUER)
    return claims


def by_joserfc(keyservice: KeyService, token: str) -> dict[str, Any]:
    keys = joserfc_jwk.KeySet.import_key_set(httpx.get(keyservice.jwks_url, trust_env=False, timeout=60).json())
    decoded = joserfc_jwt.decode(token, keys, algorithms=["RS256"])
    joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": "orders"}, exp={"essential": True}
    ).validate(decoded.claims)
    return dict(decoded.claims)


def test_other_clients_verify_over_a_rotation(keyservice: KeyService) -> None:
    started_before = jwt.PyJWKClient(keyservice.jwks_url)  # its cache lives for 300 s
    old = keyservice.token()
    assert by_pyjwt(started_before, old)["client_id"] == "orders"
    assert by_joserfc(keyservice, old)["sub"] == "orders"
    fetched = {key.key_id for key in started_before.get_jwk_set().keys}

    new_kid = keyservice.rotate()
    assert new_kid in fetched, "the successor was published before it signed: the old cache has it"
    new = keyservice.token()
    assert jwt.get_unverified_header(new)["kid"] == new_kid != jwt.get_unverified_header(old)["kid"]
    for client in (started_before, jwt.PyJWKClient(keyservice.jwks_url)):
        assert by_pyjwt(client, old)["jti"] != by_pyjwt(client, new)["jti"]
    assert by_joserfc(keyservice, old)["jti"] != by_joserfc(keyservice, new)["jti"]


def test_an_old_client_still_reads_its_hs256_token(keyservice: KeyService) -> None:
    token = keyservice.token("legacy", audience="orders")
    claims = jwt.decode(token, HS256_SECRET, ["HS256"], audience="orders", issuer=ISSUER)
    assert claims["client_id"] == "legacy"
