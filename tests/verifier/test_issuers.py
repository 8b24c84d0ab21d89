"""Several issuers in one verifier: each with its own keys and rules, none of which counts for another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.verifier.http_server import JwksServer, patient
from tests.verifier.support import AUDIENCE, ISSUER, NOW, SECRET, code_of, live_token, refusal, token_of, until
from verifier import ConfigurationError, Issuer, Undecidable, Verifier
from verifier.testing import ManualClock, SigningKey, StaticKeys, StaticRevocations

__all__ = ["patient"]

pytestmark = pytest.mark.usefixtures("patient")

OTHER = "https://other.example"
OTHER_SECRET = SECRET[::-1]


@pytest.fixture
def serve() -> Iterator[Callable[..., JwksServer]]:
    with contextlib.ExitStack() as stack:

        def make(*keys: SigningKey) -> JwksServer:
            server = JwksServer(*keys)
            stack.callback(server.close)
            return server

        yield make


def renamed(key: SigningKey, kid: str) -> SigningKey:
    return SigningKey({**key.jwk, "kid": kid}, key.private)


def issuer_of(name: str, *keys: SigningKey, **settings: Any) -> Issuer:
    jwks = StaticKeys(*keys).jwks if keys else None
    return Issuer(**{"issuer": name, "audience": AUDIENCE, "jwks_urls": None, "jwks": jwks, **settings})


def verifier_of(*issuers: Issuer, **settings: Any) -> Verifier:
    return Verifier(**{"issuers": issuers, "redis_url": None, "clock": ManualClock(NOW), **settings})


@pytest.mark.parametrize("cache_size", [0, 100])
def test_each_issuers_tokens_verify_by_its_own_keys_and_no_others(
    key: SigningKey, other_key: SigningKey, cache_size: int
) -> None:
    verifier = verifier_of(issuer_of(ISSUER, key), issuer_of(OTHER, other_key), token_cache_size=cache_size)
    for _ in range(2):
        assert verifier.verify(token_of(key)).issuer == ISSUER
        assert verifier.verify(token_of(other_key, iss=OTHER)).issuer == OTHER
        assert code_of(verifier, token_of(key, iss=OTHER)) == "kid_unknown"
        assert code_of(verifier, token_of(other_key)) == "kid_unknown"


def test_one_kid_at_two_issuers_is_two_keys(key: SigningKey, other_key: SigningKey) -> None:
    verifier = verifier_of(issuer_of(ISSUER, renamed(key, "k")), issuer_of(OTHER, renamed(other_key, "k")))
    assert verifier.verify(token_of(renamed(key, "k")))
    assert verifier.verify(token_of(renamed(other_key, "k"), iss=OTHER))
    assert code_of(verifier, token_of(renamed(other_key, "k"))) == "signature_invalid"
    assert code_of(verifier, token_of(renamed(key, "k"), iss=OTHER)) == "signature_invalid"


@pytest.mark.parametrize(
    "iss", ["https://third.example", ISSUER + "/", ISSUER.upper(), "", 5, [ISSUER], {"a": 1}, True]
)
def test_an_issuer_that_is_none_of_them_is_refused_before_any_key_is_looked_at(key: SigningKey, iss: Any) -> None:
    error = refusal(verifier_of(issuer_of(ISSUER, key)), token_of(key, iss=iss))
    assert (error.code, error.step, error.claim) == ("claim_invalid", 3, "iss")


def test_no_issuer_is_missing(key: SigningKey) -> None:
    assert code_of(verifier_of(issuer_of(ISSUER, key)), token_of(key, iss=None)) == "claim_missing"


def test_audiences_algorithms_and_secrets_are_each_issuers_own(key: SigningKey) -> None:
    verifier = verifier_of(
        issuer_of(ISSUER, key, audience="a", hs256_secrets=[SECRET]),
        issuer_of(OTHER, audience=None, algorithms=["ES256"], hs256_secrets=[OTHER_SECRET], hs256_until=NOW + 100.0),
    )
    assert verifier.verify(token_of(key, aud="a"))
    assert verifier.verify(token_of(SECRET, aud="a"))
    assert code_of(verifier, token_of(key)) == "claim_invalid"
    assert verifier.verify(token_of(OTHER_SECRET, iss=OTHER, aud="whatever"))
    assert code_of(verifier, token_of(SECRET, iss=OTHER)) == "signature_invalid"
    assert code_of(verifier, token_of(OTHER_SECRET, aud="a")) == "signature_invalid"
    assert code_of(verifier, token_of(key, iss=OTHER)) == "alg_not_allowed"
    late = verifier_of(issuer_of(OTHER, hs256_secrets=[OTHER_SECRET], hs256_until=NOW - 1.0))
    assert code_of(late, token_of(OTHER_SECRET, iss=OTHER)) == "hs256_cutoff"


def test_a_revocation_is_one_issuers_alone(key: SigningKey, other_key: SigningKey) -> None:
    clock = ManualClock(NOW)
    revocations = StaticRevocations(clock=clock)
    issuers = issuer_of(ISSUER, key), issuer_of(OTHER, other_key)
    with verifier_of(*issuers, redis_url=revocations, clock=clock) as verifier:
        mine, other = token_of(key, jti="t"), token_of(other_key, iss=OTHER, jti="t")
        assert verifier.verify(mine)
        assert verifier.verify(other)
        revocations.revoke("jti", "t", issuer=OTHER)
        assert verifier.verify(mine)
        assert code_of(verifier, other) == "token_revoked"


def test_one_issuers_outage_is_not_the_others(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    up, down = serve(key), serve(other_key)
    down.status = 503
    here = Issuer(issuer=ISSUER, audience=AUDIENCE, jwks_urls=[up.url])
    there = Issuer(issuer=OTHER, audience=AUDIENCE, jwks_urls=[down.url])
    with Verifier(issuers=[here, there], redis_url=None) as verifier:
        until(lambda: verifier.status().issuers[0].keys == (key.kid,), "the first issuer's keys")
        until(lambda: len(down.requests) > 0, "the other was asked")
        assert verifier.verify(live_token(key))
        with pytest.raises(Undecidable, match="no key set"):
            verifier.verify(live_token(other_key, iss=OTHER))
        assert verifier.verify(live_token(key))
        assert not verifier.status().ready
        assert [(each.issuer, each.keys) for each in verifier.status().issuers] == [(ISSUER, (key.kid,)), (OTHER, ())]
        asked = len(up.requests)
        assert asked == 1  # an unknown kid of one issuer asks nothing of the other


def test_a_rotated_key_of_the_second_issuer_is_fetched_from_it(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    one, two = serve(key), serve(key)
    issuers = [Issuer(issuer=iss, audience=AUDIENCE, jwks_urls=[at.url]) for iss, at in ((ISSUER, one), (OTHER, two))]
    with Verifier(issuers=issuers, redis_url=None) as verifier:
        assert verifier.wait_ready(60)
        two.serve_keys(key, other_key)
        token = live_token(other_key, iss=OTHER)
        assert verifier.verify(token)
        assert verifier.verify(token)
        old = int(time.time()) - 60  # so old that the first issuer's set would have to know its key
        assert code_of(verifier, live_token(other_key, iat=old)) == "kid_unknown"
        assert len(one.requests) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"issuers": []}, "issuers"),
        ({"issuers": ["https://id.example"]}, "issuers"),
        ({"issuers": [issuer_of("", hs256_secrets=[SECRET])]}, "issuers"),
        ({"issuers": [issuer_of(ISSUER, hs256_secrets=[SECRET])] * 2}, "issuers"),
        ({"issuers": [issuer_of(ISSUER)]}, "jwks_urls"),
        ({"issuers": [issuer_of(ISSUER, jwks_urls=["http://id.example/jwks"])]}, "jwks_urls"),
        ({"issuers": [issuer_of(ISSUER, hs256_secrets=["short"])]}, "hs256_secrets"),
        ({"issuers": [issuer_of(ISSUER, hs256_secrets=[SECRET])], "issuer": ISSUER}, "issuer"),
        ({"issuers": [issuer_of(ISSUER, hs256_secrets=[SECRET])], "hs256_secrets": [SECRET]}, "hs256_secrets"),
        ({"issuers": [issuer_of(ISSUER, hs256_secrets=[SECRET])], "algorithms": ["ES256"]}, "algorithms"),
    ],
)
def test_misuse_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Verifier(redis_url=None, **settings)
    assert caught.value.setting == named
    assert SECRET not in str(caught.value)


def test_an_issuer_does_not_print_its_secrets() -> None:
    assert SECRET not in repr(issuer_of(ISSUER, hs256_secrets=[SECRET]))
