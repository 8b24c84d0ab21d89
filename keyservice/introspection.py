"""Token introspection (RFC 7662) from memory: the instance's own key ring and its own mirror of the revocations.

Nothing is read from Redis. A token that is known to be bad is inactive, whatever else is the matter. One that seems
good is called active only while the mirror is fresh; past ``max_staleness_s`` the answer is 503 with the name
``revocations_stale``, or, where stale data are allowed, what is known. Refresh tokens are not introspected: they are
nobody's business but the token endpoint's, and inactive like anything else that is no access token of this system.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from verifier.decision import check_revoked
from verifier.errors import RevokedToken
from verifier.mirroring import View

from .errors import CannotVouch
from .own_tokens import OwnTokens
from .telemetry import Metrics

__all__ = ["Introspector"]

_TOLD: Final[tuple[str, ...]] = ("scope", "client_id", "sub", "aud", "iss", "exp", "iat", "nbf", "jti", "sid")
INACTIVE: Final[dict[str, Any]] = {"active": False}


class Introspector:
    """``gate()`` raises while nothing can be said, by name: a clock that is off, revocations that were never read."""

    def __init__(
        self,
        tokens: OwnTokens,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        view: Callable[[], View],
        gate: Callable[[], None],
        is_fresh: Callable[[View], bool],
        allow_stale: bool,
    ) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._clock = clock
        self._view = view
        self._gate = gate
        self._is_fresh = is_fresh
        self._allow_stale = allow_stale

    def introspect(self, token: str) -> dict[str, Any]:
        """RFC 7662 section 2.2; raises :class:`KeyserviceError` where nothing can be said (503)."""
        self._gate()
        answer = self._decide(token, self._view())
        self._metrics.introspections.labels("active" if answer["active"] else "inactive").inc()
        return answer

    def _decide(self, token: str, view: View) -> dict[str, Any]:
        verified = self._tokens.check(token, view)
        if verified is None or self._clock() >= verified.members["exp"]:
            return INACTIVE
        try:
            check_revoked(verified, view.snapshot)
        except RevokedToken:
            return INACTIVE
        if not self._allow_stale and not self._is_fresh(view):
            raise CannotVouch("revocations_stale", "this instance has not heard of revocations for too long")
        told = {name: verified.members[name] for name in _TOLD if name in verified.members}
        return {"active": True, "token_type": "Bearer", **told}
