"""No token and no secret in the text of anything that might be logged."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from tests.verifier.support import ISSUER, NOW, SECRET, Mirrored, make_verifier, refusal, token_of
from verifier import Undecidable, Verifier
from verifier.bearer import Challenge, challenge_for
from verifier.errors import VerifierError
from verifier.jwk import HmacKey
from verifier.replica import ReplicaMirror
from verifier.settings import build_rules
from verifier.testing import SigningKey, StaticKeys
from verifier.token import parse

REDIS_PASSWORD = "swordfish-and-chips"


def texts_of(thing: Any) -> str:
    return f"{thing!r} {thing!s} {getattr(thing, '__dict__', {})!r}"


def assert_says_nothing(text: str, *secrets: str) -> None:
    for secret in secrets:
        for part in secret.split("."):
            assert not part or part not in text


def test_what_holds_a_token_does_not_print_it(key: SigningKey) -> None:
    verifier = make_verifier(key, hs256_secrets=[SECRET])
    for token in (token_of(key), token_of(SECRET)):
        claims = verifier.verify(token)
        hit = verifier._judge.decide(token, None)
        for thing in (
            claims,
            hit,
            hit.verified,
            hit.verified.header,
            parse(token),
            verifier,
            verifier.status(),
            verifier._judge,
            verifier._judge._cache,
        ):
            assert_says_nothing(texts_of(thing), token)


BAD: dict[str, Callable[[SigningKey], str]] = {
    "malformed": lambda key: token_of(key) + ".",
    "not canonical": lambda key: token_of(key) + "=",
    "bad signature": lambda key: token_of(key)[:-8] + "AAAAAAAA",
    "expired": lambda key: token_of(key, exp=NOW - 1000, iat=NOW - 2000),
    "not ASCII": lambda key: token_of(key) + "é",
    "audience": lambda key: token_of(key, aud="elsewhere-entirely"),
    "issuer": lambda key: token_of(key, iss="https://elsewhere-entirely"),
    "unknown kid": lambda key: token_of(key, header={"kid": "elsewhere-entirely"}),
    "crit": lambda key: token_of(key, header={"crit": ["elsewhere-entirely"]}),
    "alg": lambda key: token_of(key, header={"alg": "elsewhere-entirely"}),
    "a claim's value": lambda key: token_of(key, sub=["elsewhere-entirely"]),
    "revoked": lambda key: token_of(key, sub="elsewhere-entirely"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_refusal_quotes_neither_the_token_nor_what_its_bearer_chose(
    key: SigningKey, bad: Callable[[SigningKey], str], caplog: pytest.LogCaptureFixture
) -> None:
    mirrored = Mirrored(key)
    mirrored.revoke("sub", "elsewhere-entirely")
    token = bad(key)
    with caplog.at_level(logging.DEBUG):
        error = refusal(mirrored.verifier, token)
    challenge = challenge_for(error)
    text = texts_of(error) + "".join(traceback.format_exception(error)) + caplog.text
    text += texts_of(challenge.headers()) + challenge.body().decode() + texts_of(challenge)
    assert_says_nothing(text, token)
    assert "elsewhere-entirely" not in text


def test_what_holds_a_secret_does_not_print_it(key: SigningKey) -> None:
    verifier = Verifier(
        issuer=ISSUER,
        audience=None,
        jwks_urls=None,
        redis_url=f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/",
        hs256_secrets=[SECRET, ("kid", SECRET)],
    )
    mirror = ReplicaMirror("redis://127.0.0.1:1/", password=REDIS_PASSWORD)
    rules = verifier._settings[0].rules
    for thing in (verifier, rules, rules.hs256_keys, HmacKey.from_secret(SECRET.encode()), mirror, mirror.view, key):
        assert_says_nothing(texts_of(thing), SECRET, REDIS_PASSWORD)
    private = key.private.private_numbers().d
    assert str(private) not in texts_of(key) + texts_of(StaticKeys(key))


@pytest.mark.parametrize(
    "settings",
    [
        {"hs256_secrets": [SECRET[:20]]},
        {"hs256_secrets": ["-----BEGIN PUBLIC KEY----- " + SECRET]},
        {"hs256_secrets": SECRET},
        {"hs256_secrets": [SECRET + "\ud800"]},
        {"hs256_secrets": [("kid", SECRET, 1)]},
        {"jwks_urls": [f"https://user:{REDIS_PASSWORD}@id.test/"]},
        {"redis_url": f"nonsense://:{REDIS_PASSWORD}@cache"},
        {"redis_url": f"redis://:{REDIS_PASSWORD}@cache:port"},
        {"jwks": {"keys": [{"kty": "oct", "k": SECRET}]}},
    ],
)
def test_an_error_about_a_setting_does_not_repeat_it(settings: dict[str, Any]) -> None:
    with pytest.raises(VerifierError) as caught:
        make_verifier(**settings)
    assert_says_nothing(
        texts_of(caught.value) + "".join(traceback.format_exception_only(caught.value)),
        SECRET,
        SECRET[:20],
        REDIS_PASSWORD,
    )


def test_errors_say_what_they_are() -> None:
    error = Undecidable("keys_behind", reason="why")
    assert repr(error) == "Undecidable(code='keys_behind')"
    assert "why" in str(error)
    assert str(Challenge(401)) == "no credentials"


def test_rules_can_be_printed() -> None:
    rules = build_rules(
        issuer=ISSUER, audience="a", algorithms=["RS256"], leeway_s=30, max_skew_s=5, drop_grace_s=300,
        max_token_lifetime_s=86_400, require_iat=True, hs256_secrets=[SECRET], hs256_until=None,
    )  # fmt: skip
    assert ISSUER in repr(rules)
    assert SECRET not in repr(rules)
