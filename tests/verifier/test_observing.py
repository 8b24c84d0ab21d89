"""An observer hears of every verification, once, and nothing of it reaches the caller."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.verifier.support import ISSUER, SECRET, Mirrored, code_of, make_verifier, token_of
from verifier import Claims, ConfigurationError, Verifier
from verifier.observing import Decision
from verifier.testing import SigningKey

Ask = Callable[[Verifier, str], Any]


class Heard(list[Decision]):
    def decided(self, decision: Decision) -> None:
        self.append(decision)


async def ask(call: Ask, verifier: Verifier, token: str) -> Claims:
    answer = call(verifier, token)
    claims: Claims = await answer if inspect.isawaitable(answer) else answer
    return claims


CALLS: dict[str, Ask] = {"verify": lambda v, t: v.verify(t), "averify": lambda v, t: v.averify(t)}


@pytest.mark.anyio
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_each_verification_is_told_once_with_what_it_was(key: SigningKey, call: Ask) -> None:
    heard = Heard()
    verifier = make_verifier(key, hs256_secrets=[SECRET], observer=heard)
    token = token_of(key, client_id="web", header={"typ": "at+jwt"})
    assert (await ask(call, verifier, token)).token == token
    await ask(call, verifier, token)
    await ask(call, verifier, token_of(SECRET))
    assert [(d.outcome, d.code, d.remembered, d.alg, d.typ, d.issuer, d.client_id) for d in heard] == [
        ("accepted", "accepted", False, "RS256", "at+jwt", ISSUER, "web"),
        ("accepted", "accepted", True, "RS256", "at+jwt", ISSUER, "web"),
        ("accepted", "accepted", False, "HS256", "JWT", ISSUER, None),
    ]
    assert all(0 <= decision.duration_s < 3600 and decision.started_s > 1.7e9 for decision in heard)


@pytest.mark.anyio
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_refusals_are_told_by_code_and_with_nothing_of_the_token(
    key: SigningKey, other_key: SigningKey, call: Ask
) -> None:
    heard = Heard()
    mirrored = Mirrored(key, observer=heard, on_stale="deny")
    good = token_of(key)
    mirrored.revoke("jti", "t-1")
    for token in (good, good + "x", token_of(other_key), token_of(key, aud="elsewhere", jti="t-2")):
        with pytest.raises(Exception, match=r"."):
            await ask(call, mirrored.verifier, token)
    mirrored.clock.advance(600)
    with pytest.raises(Exception, match=r"."):
        await ask(call, mirrored.verifier, token_of(key, jti="t-3"))
    assert [(decision.outcome, decision.code) for decision in heard] == [
        ("revoked", "token_revoked"),
        ("invalid", "token_not_canonical"),
        ("invalid", "kid_unknown"),
        ("invalid", "claim_invalid"),
        ("undecidable", "revocations_stale"),
    ]
    assert {(d.alg, d.typ, d.issuer, d.client_id) for d in heard} == {(None, None, None, None)}


def test_a_hit_that_middleware_asks_for_is_told_and_a_miss_is_not(key: SigningKey) -> None:
    heard = Heard()
    verifier = make_verifier(key, observer=heard)
    token = token_of(key)
    assert verifier.remembered(token) is None
    assert heard == []
    claims = verifier.verify(token)
    assert verifier.remembered(token) is claims
    assert [decision.remembered for decision in heard] == [False, True]


def test_an_observer_that_fails_refuses_nobody_and_is_counted(
    key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def decided(self, decision: Decision) -> None:
            raise RuntimeError("no disk")

    verifier = make_verifier(key, observer=Broken())
    token = token_of(key)
    with caplog.at_level(logging.ERROR, "verifier"):
        for _ in range(3):
            assert verifier.verify(token)
        assert code_of(verifier, token + "x") == "token_not_canonical"
    assert verifier.status().counters["observer_failures"] == 4
    assert len(caplog.records) == 1
    assert token not in caplog.text


def test_misuse_is_nobodys_verification(key: SigningKey) -> None:
    heard = Heard()
    verifier = make_verifier(key, observer=heard, jwks_urls=["https://id.example/jwks"])
    with pytest.raises(ConfigurationError):
        verifier.verify(token_of(key))
    assert heard == []


def test_a_verifier_without_an_observer_answers_the_same(key: SigningKey) -> None:
    verifier = make_verifier(key)
    token = token_of(key)
    assert verifier.remembered(token) is None
    assert verifier.remembered(token + "x") is None
    assert verifier.verify(token) is verifier.remembered(token)
