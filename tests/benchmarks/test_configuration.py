"""The verifier that the benchmarks measure refuses what the strict one refuses: no check is off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from benchmarks.configuration import AUDIENCE, ISSUER, benchmarked_verifier, make_tokens
from tests.verifier import support, test_strict_parsing
from verifier import InvalidToken, RevokedToken, Undecidable, Verifier
from verifier.testing import ManualClock, SigningKey, StaticKeys, StaticRevocations, make_key


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return make_key()


@pytest.fixture
def verifier(key: SigningKey) -> Iterator[Verifier]:
    with benchmarked_verifier(StaticKeys(key), 0, clock=ManualClock(support.NOW)) as made:
        yield made


def _strict_tests() -> dict[str, Any]:
    """Every test of strict parsing that is about the verifier it is given."""
    members = inspect.getmembers(test_strict_parsing, inspect.isfunction)
    return {name: test for name, test in members if "verifier" in inspect.signature(test).parameters}


STRICT = {name: test for name, test in _strict_tests().items() if name.startswith("test_")}
globals().update(STRICT)


def test_the_vectors_are_for_this_configuration() -> None:
    assert (ISSUER, AUDIENCE) == (support.ISSUER, support.AUDIENCE)
    assert len(STRICT) > 15


@pytest.mark.parametrize("cache_size", [0, 10_000])
def test_every_claim_is_checked(key: SigningKey, cache_size: int) -> None:
    now = support.NOW
    with benchmarked_verifier(StaticKeys(key), cache_size, clock=ManualClock(now)) as verifier:
        for wrong in (
            {"iss": "https://other.test"},
            {"aud": "invoices"},
            {"exp": now - 3_600, "iat": now - 7_200},
            {"iat": now + 3_600, "exp": now + 7_200},
            {"nbf": now + 3_600},
            {"exp": now + 30 * 86_400},
            {"exp": True},
        ):
            with pytest.raises(InvalidToken):
                verifier.verify(support.token_of(key, **wrong))
        with pytest.raises(InvalidToken):
            verifier.verify(support.raw_token(key, payload=msgspec.json.encode(support.members(iat=None))))
        assert verifier.verify(support.token_of(key))["sub"] == "ada"


@pytest.mark.parametrize("cache_size", [0, 10_000])
def test_a_revocation_is_obeyed_also_by_a_warm_token(key: SigningKey, cache_size: int) -> None:
    revocations = StaticRevocations()
    with benchmarked_verifier(StaticKeys(key), cache_size, revocations=revocations) as verifier:
        (token,) = make_tokens(key, 1)
        claims = verifier.verify(token)
        revocations.revoke("jti", claims["jti"], issuer=ISSUER)
        with pytest.raises(RevokedToken):
            verifier.verify(token)


def test_one_that_never_read_the_revocations_decides_nothing(key: SigningKey) -> None:
    unsynced = StaticRevocations(synced=False)
    with (
        benchmarked_verifier(StaticKeys(key), 0, revocations=unsynced) as verifier,
        pytest.raises(Undecidable),
    ):
        verifier.verify(make_tokens(key, 1)[0])


def test_the_tokens_measured_are_all_different_and_good(key: SigningKey) -> None:
    tokens = make_tokens(key, 5)
    assert len(set(tokens)) == 5
    with benchmarked_verifier(StaticKeys(key), 0) as verifier:
        assert {verifier.verify(token)["aud"] for token in tokens} == {AUDIENCE}
