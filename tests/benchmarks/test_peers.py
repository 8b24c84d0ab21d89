"""A peer that is compared does its checks: each accepts the good token, and refuses the same bad ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.configuration import AUDIENCE, ISSUER, make_tokens
from benchmarks.peers import Each, python_peers, raw_check, serve_jwks
from verifier.testing import SigningKey, StaticKeys, make_key, sign

NAMES = (
    "PyJWT, key object",
    "PyJWT, JWKS client",
    "python-jose",
    "joserfc, key object",
    "authlib, key object",
    "oxyjwt, key object",
)


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return make_key()


@pytest.fixture(scope="module")
def peers(key: SigningKey) -> Iterator[dict[str, Each]]:
    with serve_jwks(StaticKeys(key)) as url:
        yield python_peers(key, url)


def test_the_peers_are_those_tested_here(peers: dict[str, Each]) -> None:
    assert tuple(peers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_accepts_the_good_token(peers: dict[str, Each], key: SigningKey, name: str) -> None:
    peers[name](make_tokens(key, 1)[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong",
    [{"iss": "https://other.test"}, {"aud": "invoices"}, {"exp": int(time.time()) - 3_600}],
    ids=["issuer", "audience", "expired"],
)
def test_a_peer_refuses_a_wrong_claim(
    peers: dict[str, Each], key: SigningKey, name: str, wrong: dict[str, Any]
) -> None:
    token = sign(key, {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", **wrong})
    with pytest.raises(Exception):  # noqa: B017, PT011 - six libraries, six trees of errors
        peers[name](token)


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_refuses_a_wrong_signature(peers: dict[str, Each], key: SigningKey, name: str) -> None:
    one, other = make_tokens(key, 2)
    with pytest.raises(Exception):  # noqa: B017, PT011
        peers[name](one.rpartition(".")[0] + "." + other.rpartition(".")[2])


def test_the_raw_check_checks(key: SigningKey) -> None:
    one, other = make_tokens(key, 2)
    raw_check(key, [one, other])()
    with pytest.raises(Exception):  # noqa: B017, PT011
        raw_check(key, [one.rpartition(".")[0] + "." + other.rpartition(".")[2]])()
