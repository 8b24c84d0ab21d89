"""Access tokens of this system shown to the key service itself, to be introspected or revoked.

Any audience, RS256 or a legacy HS256 one: the one place where an HS256 token counts here, and never as a bearer.
"""

from __future__ import annotations

from collections.abc import Callable

from verifier.decision import Rules, Trust, UnknownKid, Verified, check_static, find_revoked_kid
from verifier.errors import InvalidToken
from verifier.jwk import HmacKey, KeySet
from verifier.mirroring import View

from .errors import CannotVouch

__all__ = ["OwnTokens"]


class OwnTokens:
    """``keys`` and ``view`` are what this instance knows now; ``is_fresh(view)`` whether that is recent."""

    def __init__(
        self,
        *,
        issuer: str,
        leeway_s: float,
        max_token_lifetime_s: float,
        hs256_keys: tuple[HmacKey, ...],
        clock: Callable[[], float],
        keys: Callable[[], KeySet | None],
        is_fresh: Callable[[View], bool],
    ) -> None:
        self._rules = Rules(
            issuer=issuer,
            audiences=None,
            algorithms=frozenset({"RS256", "ES256"}),
            leeway_s=leeway_s,
            max_token_lifetime_s=max_token_lifetime_s,
            hs256_keys=hs256_keys,
        )
        self._trust = Trust(self._rules, None)
        self._clock = clock
        self._keys = keys
        self._is_fresh = is_fresh

    def check(self, token: str, view: View) -> Verified | None:
        """Steps 1 to 5 of verification; None for what no verifier would accept. Raises :class:`CannotVouch`.

        A key that is unknown here may be new, unless this instance is fresh: keys are published long before they sign.
        """
        keys = self._keys()
        if keys is None:
            raise CannotVouch("keys_unavailable", "no keys to check the token with yet")
        if self._trust.keys is not keys:
            self._trust = Trust(self._rules, keys)
        try:
            return check_static(token, self._trust, self._clock())
        except UnknownKid as unknown:
            if find_revoked_kid(unknown, view.snapshot) is None and not self._is_fresh(view):
                raise CannotVouch("keys_behind", "the token's key is not known here, and may be new") from None
            return None
        except InvalidToken:
            return None
