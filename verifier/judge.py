"""Judges tokens by what is held in memory: the verified-token cache, the world it counts in, and policy.

Steps 1-6 about the token are in :mod:`verifier.decision`. What this file adds:

* A hit in the token cache skips steps 1-5, never the rest. It counts only while the :class:`~verifier.world.World` it
  was judged in is still the current one, and before its deadlines. A new world re-does step 3 (is the key still in the
  set?) and step 6. So a removed key and a new revocation work at once, and a verification that was overtaken by a
  revocation cannot bring the token back.
* Deadlines fold time into comparisons: an entry's (``exp``, the cache's ttl, the HS256 cut-off) and the world's (key
  age; the staleness bound under ``on_stale="deny"``).
* Policy: ``allow`` goes on with what is held, ``deny`` raises :class:`Undecidable`.

Threads: the mirror's and the key clients' threads make new worlds; verifications only read ``self._world``, once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .cache import TokenCache
from .check import Explanation, explain
from .claims import Claims
from .decision import Trust, UnknownKid, check_revoked, check_static, find_revoked_kid
from .errors import ConfigurationError, InvalidToken, RevokedToken, Undecidable
from .freshness import Staleness
from .issuers import IssuerKeys
from .jwk import PublicKey
from .sources import RevocationSource
from .world import Hit, World

__all__ = ["Judge", "Policy"]

_FAR: Final = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to do about stale data, and for how long a verified token may be remembered. Times in seconds."""

    on_stale: Literal["allow", "deny"]
    on_unsynced: Literal["allow", "deny"]
    max_staleness_s: float
    token_cache_ttl_s: float


class Judge:
    """Decides by the newest world. ``several`` says whether issuers are told apart by their names.

    ``wall`` and ``mono`` give Unix and monotonic seconds. ``running`` is False until the parts behind it were started.
    """

    def __init__(
        self,
        issuers: Sequence[IssuerKeys],
        mirror: RevocationSource | None,
        policy: Policy,
        *,
        several: bool,
        cache_size: int,
        counters: Counter[str],
        wall: Callable[[], float],
        mono: Callable[[], float],
    ) -> None:
        self._issuers = issuers
        self._mirror = mirror
        self._policy = policy
        self._several = several
        self._cache: TokenCache[Hit] = TokenCache(cache_size)
        self._caches = cache_size > 0
        self._counters = counters
        self._wall, self._mono = wall, mono
        self._changing = threading.Lock()
        self._has_parts = mirror is not None or any(issuer.client is not None for issuer in issuers)
        self._running = False
        self._world = self._new_world()

    # -- the world ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the threads that keep the world up to date were started."""
        return self._running

    def set_running(self, running: bool) -> None:
        """The threads run, or no longer do: then nothing is decided."""
        self._running = running
        if not running:
            self._cache.clear()
        self.renew()

    def _new_world(self) -> World:
        trusts = [issuer.renew() for issuer in self._issuers]
        trust: Trust | Mapping[str, Trust] = trusts[0]
        if self._several:
            trust = {str(each.rules.issuer): each for each in trusts}
        world = World(trust, self._mirror.view if self._mirror is not None else None)
        self._set_deadlines(world)
        return world

    def _set_deadlines(self, world: World) -> None:
        """Fold key age and, under ``deny``, staleness into two comparisons; a zero sends every hit the long way."""
        wall, mono = _FAR, min(issuer.until_mono for issuer in self._issuers)
        freshness = world.freshness
        if freshness is not None:
            if self._policy.on_stale == "deny":
                stale_wall, stale_mono = freshness.deadlines(self._policy.max_staleness_s)
                wall, mono = min(wall, stale_wall), min(mono, stale_mono)
            if not freshness.synced:
                wall = 0.0
        if not self._running and self._has_parts:
            wall = 0.0
        world.deadline_wall, world.deadline_mono = wall, mono
        world.is_vouched_for = freshness is None or (freshness.synced and self._policy.on_stale == "allow")

    def renew(self) -> None:
        """Judge by the keys and revocations held now."""
        with self._changing:
            self._world = self._new_world()

    def view_changed(self) -> None:
        """The mirror has a newer view."""
        assert self._mirror is not None
        with self._changing:  # the newest view, whichever thread comes here last
            world, view = self._world, self._mirror.view
            if view.snapshot is world.revocations:
                world.freshness = view.freshness
                self._set_deadlines(world)
            else:
                self._world = self._new_world()

    def catch_up(self) -> None:
        """Judge by what is held at this moment: who waits for a part may wake before the part has told us."""
        if any(issuer.is_behind for issuer in self._issuers):
            self.renew()
        if self._mirror is not None:
            self.view_changed()

    # -- judging --------------------------------------------------------------------------------------------------

    def remembered(self, token: str) -> Hit | None:
        """A hit that still holds in every respect, or None. This is the warm path: no I/O, no lock, no allocation."""
        if type(token) is not str:  # what hashes as it likes is none of ours to look up: the parser says so
            return None
        world = self._world
        hit = self._cache.get(token)
        if hit is None or hit.world is not world:
            return None
        now = self._wall()
        if hit.valid_from <= now < hit.valid_until and now < world.deadline_wall and self._mono() < world.deadline_mono:
            return hit
        return None

    def decide(self, token: str, max_staleness_s: float | None) -> Hit:
        """The long way: whatever of steps 1-6 a hit does not spare, then policy, then the cache.

        Raises :class:`~verifier.decision.UnknownKid` where newer keys might know the token's, and whatever
        :meth:`~verifier.Verifier.verify` raises.
        """
        world, now = self._world, self._wall()
        if not self._running and self._has_parts:
            raise ConfigurationError("not_started", "call start(), or use the verifier in a with block")
        hit = self._cache.find(token) if self._caches and type(token) is str else None
        try:
            if hit is not None and hit.valid_from <= now < hit.valid_until and self._still_trusts(hit, world):
                verified = hit.verified
            else:
                hit, verified = None, check_static(token, world.trust, now)
            check_revoked(verified, world.revocations)
        except InvalidToken as error:
            raise self._refusal(error, world) from None
        trust = verified.trust if hit is None else hit.trust
        if self._mono() >= trust.until_mono and isinstance(verified.key, PublicKey):
            raise Undecidable("keys_unavailable", reason="older than keys_max_age_s")
        if not world.is_vouched_for or max_staleness_s is not None:
            self._check_policy(world, max_staleness_s)
        self._counters["decided"] += 1
        if hit is not None:
            hit.world = world
            return hit
        valid_until = min(verified.valid_until, now + self._policy.token_cache_ttl_s)
        hit = Hit(world, trust, Claims(verified.members, token, self.staleness_s), verified, valid_until)
        if self._caches:
            self._cache.put(token, hit)
        return hit

    def explain(self, token: str) -> Explanation:
        """Every step's verdict by what is held now, without cache and policy."""
        world = self._world
        return explain(token, world.trust, None if self._mirror is None else world.revocations, self._wall())

    def _refusal(self, error: InvalidToken, world: World) -> InvalidToken:
        """Counted, unless newer keys may change it; a key that is gone because it was revoked is said so at once."""
        if isinstance(error, UnknownKid):
            revoked = find_revoked_kid(error, world.revocations)
            if revoked is None:
                return error
            error = revoked
        self._counters["revoked" if isinstance(error, RevokedToken) else "invalid"] += 1
        return error

    def _still_trusts(self, hit: Hit, world: World) -> bool:
        """Step 3 again, if the keys changed since."""
        trust = world.trust_of(hit.verified.facts.issuer)
        if trust is not hit.trust:
            if not trust.has(hit.verified):
                return False
            hit.trust = trust
        return True

    def _check_policy(self, world: World, max_staleness_s: float | None) -> None:
        """May the revocations of this world decide? Raises :class:`Undecidable`."""
        freshness = world.freshness
        if freshness is None or self._mirror is None:
            if max_staleness_s is not None:
                raise Undecidable("revocations_stale", reason="no_mirror")
            return
        if not freshness.synced:
            if self._policy.on_unsynced == "deny":
                raise Undecidable("never_synced", reason=self._mirror.view.problem)
            if max_staleness_s is None:
                return
        elif max_staleness_s is None and self._policy.on_stale == "allow":
            return
        bound_s = self._policy.max_staleness_s if max_staleness_s is None else max_staleness_s
        staleness = freshness.staleness(now=self._wall(), mono=self._mono(), max_staleness_s=bound_s)
        if not staleness.fresh:
            raise Undecidable("revocations_stale", reason=staleness.reason, staleness_s=staleness.seconds)

    # -- how stale it is ------------------------------------------------------------------------------------------

    def staleness(self) -> Staleness:
        """Of the revocations that a verification would be judged by now, not of newer ones on their way to it."""
        freshness = self._world.freshness
        if freshness is None:
            return Staleness(None, False, "no_mirror")
        now, mono = self._wall(), self._mono()
        return freshness.staleness(now=now, mono=mono, max_staleness_s=self._policy.max_staleness_s)

    def staleness_s(self) -> float | None:
        """Seconds, or None if nothing was ever read."""
        return self.staleness().seconds

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache, good or not."""
        return len(self._cache)
