"""What verifications are judged against, as one object, and what the token cache remembers of a judgement.

Identity is the version: a :class:`World` stands for the key sets and the revocations of one moment, and a
:class:`Hit` counts only while the world it was judged in is the current one. Deadlines fold time into comparisons, so
that nothing is judged stale or fresh ahead of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .claims import Claims
from .decision import Trust, Verified
from .mirroring import View
from .revocations import Snapshot

__all__ = ["Hit", "World"]

_NO_REVOCATIONS: Final = Snapshot()


class World:
    """``trust`` is one issuer's, or several by name. Identity is the version of it and of ``revocations``.

    ``freshness`` and the deadlines move while both stay the same; they vouch for these revocations and no others. Every
    hit counts while wall time is before ``deadline_wall`` and monotonic time before ``deadline_mono``.
    ``is_vouched_for``: policy lets it decide, whatever the time.
    """

    __slots__ = ("deadline_mono", "deadline_wall", "freshness", "is_vouched_for", "revocations", "trust")

    def __init__(self, trust: Trust | Mapping[str, Trust], view: View | None) -> None:
        self.trust = trust
        self.revocations = _NO_REVOCATIONS if view is None else view.snapshot
        self.freshness = None if view is None else view.freshness
        self.deadline_wall = 0.0
        self.deadline_mono = 0.0
        self.is_vouched_for = False

    def trust_of(self, issuer: str) -> Trust:
        """The trust that a token of this issuer is judged by."""
        return self.trust if isinstance(self.trust, Trust) else self.trust[issuer]


class Hit:
    """A verified token: good in ``world`` by ``trust``, for ``valid_from <= now < valid_until`` (Unix seconds).

    ``trust`` and ``world`` are replaced, one after the other, when the token was judged again; each alone is true.
    """

    __slots__ = ("claims", "trust", "valid_from", "valid_until", "verified", "world")

    def __init__(self, world: World, trust: Trust, claims: Claims, verified: Verified, valid_until: float) -> None:
        self.world = world
        self.trust = trust
        self.claims = claims
        self.verified = verified
        self.valid_from = verified.facts.valid_from
        self.valid_until = valid_until
