"""Step 5 of verification: the registered claims (RFC 7519 section 4.1), checked for exact types. Pure.

A claim of the wrong type is refused, never coerced: ``exp: true`` is not 1, ``"1"`` is not 1, ``aud`` is a string or a
flat list of strings. The result is the window in which the token is acceptable and the identifiers that a revocation
may name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from .errors import InvalidToken
from .limits import IDENTIFIER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from .decision import Rules

__all__ = ["Claims", "Facts", "check_claims"]

_CONTAINERS: Final = (list, dict)
_NOTHING: Final[frozenset[str]] = frozenset()
_JSON_TYPES: Final = ((str, "string"), (int | float, "number"), (list, "array"), (dict, "object"))
_NUMBER_MAX: Final = 1e15


# A string of as many characters has at most IDENTIFIER_BYTES_MAX bytes.
_ShortText = Annotated[str, msgspec.Meta(min_length=1, max_length=IDENTIFIER_BYTES_MAX // 4)]
_Seconds = Annotated[int, msgspec.Meta(gt=-(10**15), lt=10**15)]


class _Usual(msgspec.Struct, frozen=True, gc=False):
    """What most tokens look like: whatever converts to it passes the exact checks too.

    An identifier may be absent and is then None; one that is null does not convert.
    """

    iss: str
    aud: str
    iat: _Seconds
    exp: _Seconds
    jti: _ShortText = None  # type: ignore[assignment]
    sid: _ShortText = None  # type: ignore[assignment]
    sub: _ShortText = None  # type: ignore[assignment]
    client_id: _ShortText = None  # type: ignore[assignment]


_convert: Final = msgspec.convert


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What step 5 established. Times are Unix seconds; ``valid_from <= now < valid_until`` holds the token good."""

    issuer: str
    valid_from: float
    valid_until: float
    iat: float | None
    jti: str | None
    sid: str | None
    sub: str | None
    client_id: str | None
    after: frozenset[str]


def _invalid(claim: str, reason: str, *, expected: str | None = None, actual: Any = None) -> InvalidToken:
    named = None if actual is None else _type_name(actual)
    return InvalidToken("claim_invalid", step=5, claim=claim, reason=reason, expected=expected, actual=named)


def _type_name(value: Any) -> str:
    """The JSON type of a value (RFC 8259 section 3): what may be said of one that is not to be repeated."""
    if isinstance(value, bool):
        return "boolean"
    return next((name for kind, name in _JSON_TYPES if isinstance(value, kind)), "null")


def _number(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if -_NUMBER_MAX < value < _NUMBER_MAX:
            return value
        raise _invalid(name, "not a NumericDate", expected="Unix seconds")
    raise _invalid(name, "not a NumericDate", expected="a finite number", actual=value)


def _identifier(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) is not str:
        raise _invalid(name, "not a non-empty string", expected="string", actual=value)
    if not value:
        raise _invalid(name, "not a non-empty string", expected="string")
    if len(value) > IDENTIFIER_BYTES_MAX // 4 and len(value.encode()) > IDENTIFIER_BYTES_MAX:
        raise _invalid(name, "too long to be revocable", expected=f"at most {IDENTIFIER_BYTES_MAX} bytes")
    return value


def _check_audience(value: Any, accepted: frozenset[str]) -> None:
    if type(value) is str:
        if value in accepted:
            return
    elif type(value) is list and all(type(item) is str for item in value):
        if not accepted.isdisjoint(value):
            return
    elif value is None:
        raise InvalidToken("claim_missing", step=5, claim="aud", reason="absent")
    else:
        raise _invalid("aud", "not a string or a list of strings", expected="string or array of strings", actual=value)
    raise _invalid("aud", "not for this audience", expected=" or ".join(sorted(accepted)))


def _after(value: Any) -> frozenset[str]:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise _invalid("after", "not a list of strings", expected="array of strings", actual=value)
    return frozenset(value)


def _check_issuer(claims: Mapping[str, Any], rules: Rules) -> str:
    issuer = claims.get("iss")
    if issuer is None:
        if rules.issuer is None and "iss" not in claims:
            return ""
        raise InvalidToken("claim_missing", step=5, claim="iss", expected=rules.issuer)
    if type(issuer) is not str:
        raise _invalid("iss", "not a string", expected="string", actual=issuer)
    if rules.issuer is not None and issuer != rules.issuer:
        raise _invalid("iss", "another issuer", expected=rules.issuer)
    return issuer


def _window(claims: Mapping[str, Any], rules: Rules) -> tuple[float, float, float | None]:
    """(valid_from, valid_until, iat) in Unix seconds; raises :class:`InvalidToken`."""
    exp, iat, nbf = _number(claims, "exp"), _number(claims, "iat"), _number(claims, "nbf")
    if exp is None:
        raise InvalidToken("claim_missing", step=5, claim="exp")
    if iat is None and rules.require_iat:
        raise InvalidToken("claim_missing", step=5, claim="iat")
    if iat is not None and exp - iat > rules.max_token_lifetime_s:
        raise _too_long(rules, exp - iat)
    starts = max(-math.inf if iat is None else iat, -math.inf if nbf is None else nbf)
    return starts - rules.leeway_s, exp + rules.leeway_s, iat


def _too_long(rules: Rules, lifetime_s: float) -> InvalidToken:
    expected, actual = f"at most {rules.max_token_lifetime_s:g} s", f"{lifetime_s:g} s"
    return InvalidToken("token_lifetime_too_long", step=5, claim="exp", expected=expected, actual=actual)


def _check_window(claims: Mapping[str, Any], valid_from: float, valid_until: float, rules: Rules, now: float) -> None:
    """Raises :class:`InvalidToken` unless ``valid_from <= now < valid_until`` and the end is not too far away."""
    if now >= valid_until:
        expected, actual = f"after {now - rules.leeway_s:.0f}", f"{valid_until - rules.leeway_s:.0f}"
        raise InvalidToken("token_expired", step=5, claim="exp", expected=expected, actual=actual)
    if now < valid_from:
        late = "nbf" if now < claims.get("nbf", -math.inf) - rules.leeway_s else "iat"
        expected, actual = f"at most {now + rules.leeway_s:.0f}", f"{claims[late]:.0f}"
        raise InvalidToken("token_not_yet_valid", step=5, claim=late, expected=expected, actual=actual)
    if claims.get("iat") is None and valid_until - now > rules.max_token_lifetime_s + rules.leeway_s:
        raise _too_long(rules, valid_until - rules.leeway_s - now)


def check_claims(claims: Mapping[str, Any], rules: Rules, now: float) -> Facts:
    """Every check of step 5 at wall time ``now`` (Unix seconds); raises :class:`InvalidToken`.

    A token that looks as nearly every one does is known by one conversion to :class:`_Usual`, which checks types in
    one call; everything else is told apart exactly.
    """
    try:
        usual = _convert(claims, _Usual)
    except msgspec.ValidationError:
        return _check_exactly(claims, rules, now)
    iat, exp = usual.iat, usual.exp
    valid_from, valid_until = iat - rules.leeway_s, exp + rules.leeway_s
    if (
        usual.iss != rules.issuer
        or (rules.audiences is not None and usual.aud not in rules.audiences)
        or not iat <= exp <= iat + rules.max_token_lifetime_s
        or not valid_from <= now < valid_until
        or "nbf" in claims
        or "after" in claims
    ):
        return _check_exactly(claims, rules, now)
    return Facts(usual.iss, valid_from, valid_until, iat, usual.jti, usual.sid, usual.sub, usual.client_id, _NOTHING)


def _check_exactly(claims: Mapping[str, Any], rules: Rules, now: float) -> Facts:
    issuer = _check_issuer(claims, rules)
    if rules.audiences is not None:
        _check_audience(claims.get("aud"), rules.audiences)
    valid_from, valid_until, iat = _window(claims, rules)
    _check_window(claims, valid_from, valid_until, rules, now)
    after = claims.get("after")
    return Facts(
        issuer,
        valid_from,
        valid_until,
        iat,
        _identifier(claims, "jti"),
        _identifier(claims, "sid"),
        _identifier(claims, "sub"),
        _identifier(claims, "client_id"),
        _NOTHING if after is None else _after(after),
    )


class Claims(Mapping[str, Any]):
    """The verified claims: a read-only mapping.

    One object may answer for many calls with the same token, so nothing in it can be changed: lists and objects are
    handed out as copies. ``staleness_s`` is computed when it is read, never remembered.
    """

    __slots__ = ("_members", "_staleness", "_token")

    def __init__(self, members: dict[str, Any], token: str, staleness: Callable[[], float | None]) -> None:
        self._members = members
        self._staleness = staleness
        self._token = token

    def __getitem__(self, name: str) -> Any:
        value = self._members[name]
        return deepcopy(value) if type(value) in _CONTAINERS else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Claims({', '.join(sorted(self._members))})"

    @property
    def token(self) -> str:
        """The encoded token, to be forwarded to the next service. It is a credential: do not log it."""
        return self._token

    @property
    def subject(self) -> str | None:
        """Claim ``sub``, or None."""
        return self._members.get("sub")

    @property
    def issuer(self) -> str | None:
        """Claim ``iss``, or None."""
        return self._members.get("iss")

    @property
    def scopes(self) -> frozenset[str]:
        """Claim ``scope`` split at spaces (RFC 8693 section 4.2); empty if absent or not a string."""
        scope = self._members.get("scope")
        return frozenset(scope.split(" ")) - {""} if isinstance(scope, str) else frozenset()

    @property
    def staleness_s(self) -> float | None:
        """Age in seconds of the revocations that would judge this token now; None if none were ever read."""
        return self._staleness()
