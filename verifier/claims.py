"""Step 5 of verification: the registered claims (RFC 7519 section 4.1), checked for exact types. Pure.

A claim of the wrong type is refused, never coerced: ``exp: true`` is not 1, ``"1"`` is not 1, ``aud`` is a string or a
flat list of strings. The result is the window in which the token is acceptable and the identifiers that a revocation
may name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .errors import InvalidToken
from .limits import IDENTIFIER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from .decision import Rules

__all__ = ["Claims", "Facts", "check_claims"]

_CONTAINERS: Final = (list, dict)
_NOTHING: Final[frozenset[str]] = frozenset()


class Facts(NamedTuple):
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


def _number(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15:
        return value
    raise InvalidToken("claim_invalid", step=5, claim=name, reason="not a NumericDate")


def _identifier(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) is not str or not value:
        raise InvalidToken("claim_invalid", step=5, claim=name, reason="not a non-empty string")
    if len(value) > IDENTIFIER_BYTES_MAX // 4 and len(value.encode()) > IDENTIFIER_BYTES_MAX:
        raise InvalidToken("claim_invalid", step=5, claim=name, reason="too long to be revocable")
    return value


def _check_audience(value: Any, accepted: frozenset[str]) -> None:
    if type(value) is str:
        if value in accepted:
            return
    elif type(value) is list and all(type(item) is str for item in value):
        if not accepted.isdisjoint(value):
            return
    else:
        reason = "absent" if value is None else "not a string or a list of strings"
        raise InvalidToken("claim_missing" if value is None else "claim_invalid", step=5, claim="aud", reason=reason)
    raise InvalidToken("claim_invalid", step=5, claim="aud", reason="not for this audience")


def _after(value: Any) -> frozenset[str]:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise InvalidToken("claim_invalid", step=5, claim="after", reason="not a list of strings")
    return frozenset(value)


def _check_issuer(claims: Mapping[str, Any], rules: Rules) -> str:
    issuer = claims.get("iss")
    if issuer is None:
        if rules.issuer is None and "iss" not in claims:
            return ""
        raise InvalidToken("claim_missing", step=5, claim="iss")
    if type(issuer) is not str:
        raise InvalidToken("claim_invalid", step=5, claim="iss", reason="not a string")
    if rules.issuer is not None and issuer != rules.issuer:
        raise InvalidToken("claim_invalid", step=5, claim="iss", reason="another issuer")
    return issuer


def _window(claims: Mapping[str, Any], rules: Rules) -> tuple[float, float, float | None]:
    """(valid_from, valid_until, iat) in Unix seconds; raises :class:`InvalidToken`."""
    exp, iat, nbf = _number(claims, "exp"), _number(claims, "iat"), _number(claims, "nbf")
    if exp is None:
        raise InvalidToken("claim_missing", step=5, claim="exp")
    if iat is None and rules.require_iat:
        raise InvalidToken("claim_missing", step=5, claim="iat")
    if iat is not None and exp - iat > rules.max_token_lifetime_s:
        raise InvalidToken("token_lifetime_too_long", step=5, claim="exp")
    starts = max(-math.inf if iat is None else iat, -math.inf if nbf is None else nbf)
    return starts - rules.leeway_s, exp + rules.leeway_s, iat


def check_claims(claims: Mapping[str, Any], rules: Rules, now: float) -> Facts:
    """Every check of step 5 at wall time ``now`` (Unix seconds); raises :class:`InvalidToken`."""
    issuer = _check_issuer(claims, rules)
    if rules.audiences is not None:
        _check_audience(claims.get("aud"), rules.audiences)
    valid_from, valid_until, iat = _window(claims, rules)
    if now >= valid_until:
        raise InvalidToken("token_expired", step=5, claim="exp")
    if now < valid_from:
        late = "nbf" if now < claims.get("nbf", -math.inf) - rules.leeway_s else "iat"
        raise InvalidToken("token_not_yet_valid", step=5, claim=late)
    if iat is None and valid_until - now > rules.max_token_lifetime_s + rules.leeway_s:
        raise InvalidToken("token_lifetime_too_long", step=5, claim="exp")
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
    def scopes(self) -> frozenset[str]:
        """Claim ``scope`` split at spaces (RFC 8693 section 4.2); empty if absent or not a string."""
        scope = self._members.get("scope")
        return frozenset(scope.split(" ")) - {""} if isinstance(scope, str) else frozenset()

    @property
    def staleness_s(self) -> float | None:
        """Age in seconds of the revocations that would judge this token now; None if none were ever read."""
        return self._staleness()
