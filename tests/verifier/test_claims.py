"""Step 5: exact types, a closed window, and claims that nobody can change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from tests.verifier.support import (
    AUDIENCE,
    ISSUER,
    NOW,
    Mirrored,
    code_of,
    make_verifier,
    members,
    raw_token,
    refusal,
    token_of,
)
from verifier import Claims, InvalidToken, Verifier
from verifier.claims import Facts, _check_exactly, check_claims
from verifier.decision import Rules
from verifier.testing import ManualClock, SigningKey


@pytest.fixture
def verifier(key: SigningKey) -> Verifier:
    return make_verifier(key)


def at(key: SigningKey, now: float, **settings: Any) -> Verifier:
    return make_verifier(key, clock=ManualClock(now), **settings)


@pytest.mark.parametrize("claim", ["iss", "aud", "exp", "iat"])
def test_a_required_claim_that_is_absent_is_named(verifier: Verifier, key: SigningKey, claim: str) -> None:
    error = refusal(verifier, token_of_without(key, claim))
    assert (error.code, error.step, error.claim) == ("claim_missing", 5, claim)


def token_of_without(key: SigningKey, claim: str) -> str:
    return raw_token(key, payload=msgspec.json.encode(members(**{claim: None})))


NOT_NUMBERS = [True, False, "1800000000", "", [], {}, [NOW], 1e300, -1e300]


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_time_is_a_finite_number_of_sane_size_and_nothing_else(
    verifier: Verifier, key: SigningKey, claim: str, value: Any
) -> None:
    error = refusal(verifier, token_of(key, **{claim: value}))
    assert (error.code, error.claim) == ("claim_invalid", claim)


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf", "sub", "jti", "sid", "client_id", "iss", "aud"])
def test_a_null_claim_is_refused(verifier: Verifier, key: SigningKey, claim: str) -> None:
    payload = msgspec.json.encode({**members(), claim: None})
    assert refusal(verifier, raw_token(key, payload=payload)).claim == claim


def test_a_time_may_have_a_fraction(verifier: Verifier, key: SigningKey) -> None:
    assert verifier.verify(token_of(key, iat=NOW - 0.5, exp=NOW + 899.5, nbf=NOW + 0.25))["iat"] == NOW - 0.5


def test_exp_ends_a_token_at_the_leeway_exactly(key: SigningKey) -> None:
    token = token_of(key, exp=NOW + 60)
    assert at(key, NOW + 89.999).verify(token)
    assert code_of(at(key, NOW + 90), token) == "token_expired"


def test_a_cached_token_expires_at_the_same_moment(key: SigningKey) -> None:
    clock = ManualClock(NOW)
    verifier = make_verifier(key, clock=clock)
    token = token_of(key, exp=NOW + 60)
    verifier.verify(token)
    clock.advance(89.999)
    assert verifier.verify(token)
    clock.advance(0.001)
    assert code_of(verifier, token) == "token_expired"


def test_a_cached_token_is_not_valid_before_its_time_if_the_clock_steps_back(key: SigningKey) -> None:
    clock = ManualClock(NOW)
    verifier = make_verifier(key, clock=clock)
    token = token_of(key)
    verifier.verify(token)
    clock.advance(-30)
    assert verifier.verify(token)
    clock.advance(-0.001)
    assert code_of(verifier, token) == "token_not_yet_valid"


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_a_token_from_the_future_is_refused_just_outside_the_leeway(key: SigningKey, claim: str) -> None:
    verifier = at(key, NOW)
    inside: dict[str, Any] = {"nbf": NOW, "iat": NOW, claim: NOW + 30}
    outside: dict[str, Any] = {**inside, claim: NOW + 31}
    assert verifier.verify(token_of(key, **inside))
    error = refusal(verifier, token_of(key, **outside))
    assert (error.code, error.claim) == ("token_not_yet_valid", claim)


def test_the_longest_lifetime_is_accepted_and_a_second_more_is_not(verifier: Verifier, key: SigningKey) -> None:
    assert verifier.verify(token_of(key, exp=NOW + 86_400))
    assert code_of(verifier, token_of(key, exp=NOW + 86_401)) == "token_lifetime_too_long"


def test_without_iat_the_lifetime_is_counted_from_now(key: SigningKey) -> None:
    verifier = make_verifier(key, require_iat=False)
    assert verifier.verify(raw_without_iat(key, NOW + 86_400))
    assert code_of(verifier, raw_without_iat(key, NOW + 86_401)) == "token_lifetime_too_long"


def raw_without_iat(key: SigningKey, exp: int) -> str:
    return raw_token(key, payload=msgspec.json.encode(members(iat=None, exp=exp)))


def test_the_issuer_is_compared_exactly(key: SigningKey) -> None:
    verifier = make_verifier(key)
    assert verifier.verify(token_of(key))["iss"] == ISSUER
    for issuer in (ISSUER + "/", ISSUER.upper(), "", " " + ISSUER, [ISSUER], {"a": ISSUER}, 1, True):
        error = refusal(verifier, token_of(key, iss=issuer))
        assert (error.code, error.claim) == ("claim_invalid", "iss")


def test_an_issuer_of_none_said_aloud_accepts_any_issuer_of_the_right_type(key: SigningKey) -> None:
    verifier = make_verifier(key, issuer=None)
    assert verifier.verify(token_of(key, iss="https://elsewhere.test"))
    assert code_of(verifier, token_of(key, iss=["https://elsewhere.test"])) == "claim_invalid"


@pytest.mark.parametrize("aud", [AUDIENCE, [AUDIENCE], ["x", AUDIENCE], ["x", "y", AUDIENCE]])
def test_an_audience_that_names_us_is_accepted(verifier: Verifier, key: SigningKey, aud: Any) -> None:
    assert verifier.verify(token_of(key, aud=aud))["aud"] == aud


@pytest.mark.parametrize(
    "aud",
    ["", "x", [], ["x"], AUDIENCE + " ", f"x {AUDIENCE}", [[AUDIENCE]], [AUDIENCE, ["x"]], [AUDIENCE, 1],
     [AUDIENCE, None], {AUDIENCE: 1}, 1, True],
)  # fmt: skip
def test_an_audience_that_does_not_name_us_in_a_flat_form_is_refused(
    verifier: Verifier, key: SigningKey, aud: Any
) -> None:
    error = refusal(verifier, token_of(key, aud=aud))
    assert (error.code, error.claim) == ("claim_invalid", "aud")


def test_any_of_several_audiences_is_enough(key: SigningKey) -> None:
    verifier = make_verifier(key, audience=["billing", "orders"])
    assert verifier.verify(token_of(key, aud="orders"))
    assert verifier.verify(token_of(key, aud=["billing", "x"]))
    assert code_of(verifier, token_of(key, aud="x")) == "claim_invalid"


@pytest.mark.parametrize("claim", ["jti", "sid", "sub", "client_id"])
@pytest.mark.parametrize("value", [1, True, "", [], ["a"], {}, 1.5, "x" * 257, "é" * 129, "𝄞" * 65])
def test_an_identifier_that_no_revocation_could_name_is_refused(
    verifier: Verifier, key: SigningKey, claim: str, value: Any
) -> None:
    error = refusal(verifier, token_of(key, **{claim: value}))
    assert (error.code, error.claim) == ("claim_invalid", claim)


@pytest.mark.parametrize("value", ["x" * 256, "é" * 128, "𝄞" * 64])
def test_an_identifier_of_the_greatest_length_is_accepted_and_revocable(key: SigningKey, value: str) -> None:
    mirrored = Mirrored(key)
    token = token_of(key, jti=value)
    assert mirrored.verifier.verify(token)
    mirrored.revoke("jti", value)
    assert code_of(mirrored.verifier, token) == "token_revoked"


@pytest.mark.parametrize("after", ["cut-1", [1], [["a"]], {}, 1, True])
def test_after_is_a_list_of_strings(verifier: Verifier, key: SigningKey, after: Any) -> None:
    assert refusal(verifier, token_of(key, after=after)).claim == "after"


# -- the result ------------------------------------------------------------------------------------------------------


def test_claims_are_a_read_only_mapping(verifier: Verifier, key: SigningKey) -> None:
    claims = verifier.verify(token_of(key, scope="read write"))
    assert isinstance(claims, Mapping)
    assert isinstance(claims, Claims)
    assert claims["sub"] == claims.get("sub") == claims.subject == "ada"
    assert "nope" not in claims
    assert set(claims) == {"iss", "aud", "sub", "jti", "iat", "exp", "scope"}
    assert len(claims) == 7
    assert claims.scopes == {"read", "write"}
    with pytest.raises(KeyError):
        claims["nope"]
    with pytest.raises(TypeError):
        claims["sub"] = "eve"  # type: ignore[index]
    with pytest.raises(AttributeError):
        claims.other = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [{"roles": ["user"]}, ["user"], [{"a": [1]}]])
def test_changing_what_was_handed_out_changes_nothing_for_the_next_caller(key: SigningKey, value: Any) -> None:
    verifier = make_verifier(key)
    token = token_of(key, grants=value)
    first = verifier.verify(token)
    handed_out: Any
    for handed_out in (first["grants"], first.get("grants"), dict(first)["grants"], list(first.values())[-1]):
        if isinstance(handed_out, dict):
            handed_out["roles"].append("admin")
        else:
            handed_out.append("admin")
    assert verifier.verify(token)["grants"] == value


def test_the_token_of_a_cached_result_cannot_be_exchanged(verifier: Verifier, key: SigningKey) -> None:
    token = token_of(key)
    claims = verifier.verify(token)
    assert claims.token == token
    with pytest.raises(AttributeError):
        claims.token = "another"  # type: ignore[misc]
    assert verifier.verify(token).token == token


@pytest.mark.parametrize(("scope", "scopes"), [("", set()), ("a", {"a"}), ("a  b a", {"a", "b"}), (["a"], set())])
def test_scopes_are_split_at_spaces(verifier: Verifier, key: SigningKey, scope: Any, scopes: set[str]) -> None:
    assert verifier.verify(token_of(key, scope=scope)).scopes == scopes


def test_staleness_is_computed_when_it_is_read(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    claims = mirrored.verifier.verify(token_of(key))
    assert claims.staleness_s == 0
    mirrored.clock.advance(3)
    assert claims.staleness_s == 3
    mirrored.revocations.beat()
    assert claims.staleness_s == 0


def test_claims_can_be_copied_and_compared(verifier: Verifier, key: SigningKey) -> None:
    claims = verifier.verify(token_of(key))
    assert copy.copy(claims) == claims == dict(claims)


def test_the_quick_way_and_the_exact_way_agree() -> None:
    """Whatever the conversion of a usual token accepts, the exact checks accept with the same result."""
    rules = Rules(issuer=ISSUER, audiences=frozenset({AUDIENCE}))
    values: list[Any] = [None, "x", "", "é" * 65, "y" * 300, 5, 1.5, True, [], ["x"], {}]
    names = ["jti", "sid", "sub", "client_id", "after", "nbf", "iss", "aud"]
    odd = [{**members(), name: value} for name in names for value in values]
    odd += [
        {**members(), name: NOW + by} for name in ("iat", "exp", "nbf") for by in (-90_000, -31, 0, 0.5, 31, 90_000)
    ]
    odd += [{name: value for name, value in members().items() if name != left_out} for left_out in members()]
    accepted = 0
    for claims in (members(), *odd):
        outcomes = [_outcome(check, claims, rules) for check in (check_claims, _check_exactly)]
        assert outcomes[0] == outcomes[1], claims
        accepted += isinstance(outcomes[0], Facts)
    assert accepted > 20


def _outcome(check: Callable[..., Facts], claims: dict[str, Any], rules: Rules) -> Any:
    try:
        return check(claims, rules, NOW)
    except InvalidToken as error:
        return error.code, error.claim, error.reason, error.expected, error.actual
