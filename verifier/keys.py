"""The cache of a remote JWK set: when to fetch, from where, and what a reply means. Pure; the shell is jwks_client.

Rules:

* the own region's source first, the others after it, in one pass;
* a document is parsed completely before it replaces anything, and a bad one never does;
* an older generation than the one held is a failed attempt, so a lagging region cannot take a key back;
* so is a reply to a request that began before the one whose reply is held;
* refreshed ahead of ``max-age``, with jitter, so that a fleet does not fetch at once; and soon after the trust log has
  told of a newer generation;
* at most two attempts per source and :data:`~verifier.limits.JWKS_COOLDOWN_S`, whatever asks for them and however
  they end: one, and one fast retry.

Whoever forges a new ``kid`` for each token can use that budget up, and nothing tells a forged one from a fresh one
before a fetch does. So that a fresh key never waits for the whole cooldown, what unknown ``kid`` s ask for is spread
evenly over it: the first attempt at once, however recent the scheduled one before it; each further one
:data:`UNKNOWN_KID_SPACING` of the cooldown after the last, and then unasked, because one was asked for meanwhile.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from .jwk import JwksError, KeySet
from .limits import JWKS_COOLDOWN_S, JWKS_MAX_AGE_CEILING_S, JWKS_MAX_AGE_DEFAULT_S, PUBLICATION_LAG_S
from .log import Generation

__all__ = ["Fetched", "JwksCache", "KeysView"]

JWKS_MAX_AGE_FLOOR_S = 1.0
ATTEMPTS_PER_COOLDOWN = 2
UNKNOWN_KID_SPACING = 1 / ATTEMPTS_PER_COOLDOWN
"""The share of the cooldown between two attempts that unknown ``kid`` s asked for: the budget, spread evenly."""

EXPECTED_SPREAD_S = 1.0
"""A key is published long before it signs, so that a whole fleet need not fetch it in one instant."""

REFRESH_AT_SHARE = 0.8
"""The share of ``max-age`` after which a set is refreshed, so that a failed fetch leaves time for others."""


@dataclass(frozen=True, slots=True)
class KeysView:
    """The key set held now; immutable. Times: ``*_mono`` monotonic seconds, ``started_at`` Unix seconds.

    ``started_at`` is when the newest successful fetch began: what was published before it is in ``keys``.
    """

    keys: KeySet | None = None
    generation: Generation | None = None
    fetched_mono: float | None = None
    started_at: float | None = None

    def knows_tokens_of(self, iat: float) -> bool:
        """True if a key that signed at ``iat`` (Unix seconds) must be in this set, were it published at all."""
        return self.started_at is not None and self.started_at > iat + PUBLICATION_LAG_S


@dataclass(frozen=True, slots=True)
class Fetched:
    """A reply: ``body`` is None for 304. ``max_age_s`` and ``generation`` are None where the source sent none."""

    body: bytes | None
    etag: str | None = None
    max_age_s: float | None = None
    generation: Generation | None = None


@dataclass(slots=True)
class _Source:
    etag: str | None = None
    attempts: deque[float] = field(default_factory=lambda: deque(maxlen=ATTEMPTS_PER_COOLDOWN))
    wanted_mono: float = float("-inf")
    """When it was last asked because of an unknown ``kid``."""

    def ready_mono(self, *, wanted: bool) -> float:
        """From when on it may be asked."""
        full = len(self.attempts) == ATTEMPTS_PER_COOLDOWN
        ready = self.attempts[0] + JWKS_COOLDOWN_S if full else float("-inf")
        return max(ready, self.wanted_mono + UNKNOWN_KID_SPACING * JWKS_COOLDOWN_S) if wanted else ready


class JwksCache:
    """Decides for a fixed list of sources. One thread calls it; ``view`` may be read from any."""

    def __init__(
        self, sources: int, initial: KeySet | None = None, *, mono: float = 0.0, rng: random.Random | None = None
    ) -> None:
        self.view = KeysView(initial, fetched_mono=None if initial is None else mono)
        self._sources = [_Source() for _ in range(sources)]
        self._rng = rng or random.Random()
        self._refresh_mono = float("-inf")
        self._expected = Generation(0, 0)
        self._expected_mono = float("inf")

    def ready_after_s(self, mono: float, *, wanted: bool) -> float:
        """Seconds until any source may be asked, 0 if one may be now; ``wanted``: because of an unknown ``kid``."""
        return max(0.0, min(source.ready_mono(wanted=wanted) for source in self._sources) - mono)

    def expect(self, generation: Generation, mono: float) -> bool:
        """The trust log says that there is a newer set; True if that brings the next fetch forward.

        Nobody can forge that, so a fresh key is here before it signs, whatever unknown kids are doing. A fleet spreads
        over :data:`EXPECTED_SPREAD_S`. A source that tells no generation is none of that log's.
        """
        held = self.view.generation
        if held is None or generation <= held or generation <= self._expected:
            return False
        self._expected_mono = mono + self._rng.uniform(0.0, EXPECTED_SPREAD_S)
        self._expected = generation
        return True

    @property
    def _due_mono(self) -> float:
        held = self.view.generation
        behind = held is not None and held < self._expected
        return min(self._refresh_mono, self._expected_mono) if behind else self._refresh_mono

    def is_due(self, mono: float) -> bool:
        """True if the set wants refreshing, whether or not it may be fetched."""
        return mono >= self._due_mono

    def next_source(self, mono: float, tried: set[int], *, wanted: bool = False) -> int | None:
        """The next source of this pass that may be asked, or None."""
        candidates = (index for index in range(len(self._sources)) if index not in tried)
        return next((index for index in candidates if self._sources[index].ready_mono(wanted=wanted) <= mono), None)

    def etag(self, index: int) -> str | None:
        """What to send as If-None-Match to this source."""
        return self._sources[index].etag

    def attempted(self, index: int, mono: float, *, wanted: bool = False) -> None:
        """Count an attempt, before it is made."""
        self._sources[index].attempts.append(mono)
        if wanted:
            self._sources[index].wanted_mono = mono

    def succeeded(self, index: int, reply: Fetched, *, started_at: float, started_mono: float) -> bool:
        """Take a reply; True if the keys changed. Raises :class:`JwksError`, and then holds what it held."""
        held = self.view
        if held.fetched_mono is not None and started_mono < held.fetched_mono:
            raise JwksError("reply_older")
        if reply.generation is not None and held.generation is not None and reply.generation < held.generation:
            raise JwksError("generation_older")
        keys, changed = held.keys, False
        if reply.body is not None:
            keys = KeySet.from_document(reply.body)
            changed = True
            for source in self._sources:  # an ETag is only good while its document is the one held
                source.etag = None
            self._sources[index].etag = reply.etag
        elif keys is None or self._sources[index].etag is None:
            raise JwksError("not_modified_without_document")
        max_age_s = JWKS_MAX_AGE_DEFAULT_S if reply.max_age_s is None else reply.max_age_s
        ahead_s = (
            min(max(max_age_s, JWKS_MAX_AGE_FLOOR_S), JWKS_MAX_AGE_CEILING_S)
            * REFRESH_AT_SHARE
            * self._rng.uniform(0.9, 1.0)
        )
        self._refresh_mono = started_mono + ahead_s
        self._expected_mono = started_mono + self._retry_after_s()
        self.view = KeysView(keys, reply.generation or held.generation, started_mono, started_at)
        return changed

    def failed(self, mono: float) -> None:
        """A whole pass failed: try again soon, within what the sources' cooldowns allow."""
        self._refresh_mono = max(self._refresh_mono, mono + self._retry_after_s())
        self._expected_mono = max(self._expected_mono, self._refresh_mono)

    def _retry_after_s(self) -> float:
        return self._rng.uniform(0.3, 0.6) * JWKS_COOLDOWN_S

    def wake_after_s(self, mono: float) -> float:
        """Seconds until the next scheduled pass."""
        return max(0.0, self._due_mono - mono)
