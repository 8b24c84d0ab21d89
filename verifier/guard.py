"""From a request's headers to claims or a refusal, for every framework: what they all do alike is done here.

* One glance first: a token that was verified before, has every scope and came with nothing unusual is answered by one
  look-up. Whatever else it is goes the long way, which decides anew and says why.
* The token comes before the position. ``Trust-Position`` may make a service wait, ``min_position_wait_s`` at most; who
  has no good token is refused before, so a stranger can make nobody wait. Then the token is judged again, by what was
  known at that position. Anonymous requests do not wait: there is nothing to judge.
* Only the ``Authorization`` header is read: never a query string, a form, a cookie or a subprotocol.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from .bearer import Challenge, bearer_token, challenge_for, check_scopes, checked_realm, checked_scopes, trust_position
from .claims import Claims
from .errors import InvalidToken, Undecidable
from .verifier import Verifier

__all__ = ["Guard", "below", "odd", "path_prefixes"]

Headers = Iterable[tuple[bytes, bytes]]

_AUTHORIZATION: Final = b"authorization"
_TRUST_POSITION: Final = b"trust-position"
_SCHEME: Final = b"Bearer "
_ODD: Final = re.compile(r"//|/\.\.|/\.(?:/|\Z)|[\\%;?#\x00-\x1f\x7f]")
"""What another program may read as another path: segments that it leaves out, an escape that it decodes once more, and
where it takes a path to end, as a servlet does at ``;``. Such a path is below no prefix, the safe side."""


class Guard:
    """One verifier's gate. ``headers`` are pairs of lower-case name and value, as ASGI has them.

    ``scopes``: every one is needed (403). ``trust_position=False`` ignores the ``Trust-Position`` header. ``realm``
    stands in every challenge. Raises :class:`~verifier.ConfigurationError`.
    """

    __slots__ = ("_remembered", "_scopes", "_trust_position", "realm", "verifier")

    def __init__(
        self,
        verifier: Verifier,
        *,
        scopes: Collection[str] = (),
        trust_position: bool = True,
        realm: str | None = None,
    ) -> None:
        self.verifier = verifier
        self._remembered = verifier.remembered
        self.realm = checked_realm(realm)
        self._scopes = checked_scopes(scopes)
        self._trust_position = trust_position

    def glance(self, headers: Headers) -> Claims | None:
        """The claims, if that takes one look-up; None says nothing but: go the long way."""
        found = None
        for name, value in headers:
            if name == _AUTHORIZATION:
                if found is not None:
                    return None
                found = value
            elif name == _TRUST_POSITION and self._trust_position:
                return None
        if found is None or found[:7] != _SCHEME:
            return None
        claims = self._remembered(found[7:].decode("latin-1"))  # no token has what is not ASCII: not found
        if claims is not None and self._scopes and not claims.scopes.issuperset(self._scopes):
            return None
        return claims

    async def admit(self, headers: Headers, *, required: bool = True, scopes: Collection[str] = ()) -> Claims | None:
        """The claims; None if there is no token and none is ``required``. Raises :class:`Challenge`.

        ``scopes`` are needed besides the guard's own. What has to wait does so off the event loop.
        """
        token, position = self._read(headers)
        if token is None:
            return self._anonymous(required)
        try:
            claims = await self.verifier.averify(token)
            if position is not None:
                claims = await self.verifier.averify(token, min_position=position)
        except (InvalidToken, Undecidable) as error:
            raise challenge_for(error) from error
        check_scopes(claims, self._scopes.union(scopes))
        return claims

    def admit_blocking(self, headers: Headers, *, required: bool = True, scopes: Collection[str] = ()) -> Claims | None:
        """:meth:`admit` for threads."""
        token, position = self._read(headers)
        if token is None:
            return self._anonymous(required)
        try:
            claims = self.verifier.verify(token)
            if position is not None:
                claims = self.verifier.verify(token, min_position=position)
        except (InvalidToken, Undecidable) as error:
            raise challenge_for(error) from error
        check_scopes(claims, self._scopes.union(scopes))
        return claims

    def recheck(self, claims: Claims | None, *, required: bool, scopes: Collection[str] = ()) -> Claims | None:
        """Claims that the same verifier gave for the same request: is that enough here? Raises :class:`Challenge`."""
        if claims is None:
            return self._anonymous(required)
        check_scopes(claims, self._scopes.union(scopes))
        return claims

    def _read(self, headers: Headers) -> tuple[str | None, str | None]:
        headers = list(headers)
        token = bearer_token(value for name, value in headers if name == _AUTHORIZATION)
        if token is None or not self._trust_position:
            return token, None
        return token, trust_position(value for name, value in headers if name == _TRUST_POSITION)

    @staticmethod
    def _anonymous(required: bool) -> None:
        if required:
            raise Challenge(401)


def path_prefixes(paths: Collection[str]) -> tuple[str, ...]:
    """Prefixes of whole segments, for :func:`below`."""
    return tuple(path.rstrip("/") for path in paths)


def below(path: str, prefixes: Sequence[str]) -> bool:
    """Is it at or below a prefix, whoever reads the path? ``/catalog/../orders`` is not below ``/catalog``."""
    for prefix in prefixes:
        if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/"):
            return not odd(path)
    return False


def odd(path: str) -> bool:
    """May another program read this path as another one?"""
    return _ODD.search(path) is not None
