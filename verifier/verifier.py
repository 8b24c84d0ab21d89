"""Puts the parts together: :class:`Verifier`, its verified-token cache, and its policy about stale data.

Steps 1-6 about the token are in :mod:`verifier.decision`. What this file adds:

* A hit in the token cache skips steps 1-5, never the rest. It counts only while the *world* it was judged in, one
  object that stands for the key set and the revocations, is still the current one, and before its deadlines. A new
  world re-does step 3 (is the key still in the set?) and step 6. So a removed key and a new revocation work at once,
  and a verification that was overtaken by a revocation cannot bring the token back.
* Deadlines fold time into comparisons: an entry's (``exp``, the cache's ttl, the HS256 cut-off) and the world's (key
  age; the staleness bound under ``on_stale="deny"``). Nothing is judged stale or fresh ahead of time.
* Policy: ``allow`` goes on with what is held, ``deny`` raises :class:`Undecidable`.

Threads: the mirror's and the key client's threads make new worlds; verifications only read ``self._world``, once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import msgspec

from .cache import TokenCache
from .claims import Claims
from .decision import UnknownKid, Verified, check_kid_revoked, check_revoked, check_static
from .errors import ConfigurationError, InvalidToken, RevokedToken, Undecidable
from .freshness import Staleness
from .jwk import HmacKey, PublicKey
from .jwks_client import JwksClient
from .keys import KeysView
from .limits import UNKNOWN_KID_WAIT_S
from .log import FormatError, Position
from .mirroring import View
from .revocations import Snapshot
from .settings import (
    Secret,
    build_rules,
    check_jwks_urls,
    check_source_address,
    environment_settings,
    invalid,
    local_keys,
    seconds,
)
from .sources import FeedToken, RevocationSource, mirror_maker

__all__ = ["Clock", "RevocationSource", "Status", "Verifier"]

Policy = Literal["allow", "deny"]
_FAR: Final = float("inf")
_NO_REVOCATIONS: Final = Snapshot()


class Clock(Protocol):
    """Where time comes from."""

    def time(self) -> float:
        """Wall clock, Unix seconds."""

    def monotonic(self) -> float:
        """Monotonic seconds."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A verifier's own account of itself. Times in seconds; ``staleness_s`` None means never synced.

    ``reason`` says why it is not ``fresh``; ``confirmed`` is False while no majority of regions vouches for the age.
    """

    ready: bool
    fresh: bool
    reason: str | None
    staleness_s: float | None
    confirmed: bool
    position: str | None
    epoch: int | None
    nonce: str | None
    epoch_open: bool
    mirror_entries: int
    keys: tuple[str, ...]
    keys_age_s: float | None
    generation: str | None
    connection: str
    problem: str | None
    region: str | None
    token_cache_entries: int
    counters: dict[str, int]


class _World:
    """What a verification is judged against. Identity is the version of ``keys`` and ``revocations``.

    ``freshness`` and the deadlines move while both stay the same; they vouch for these revocations and no others.
    """

    __slots__ = ("deadline_mono", "deadline_wall", "freshness", "keys", "revocations")

    def __init__(self, keys: KeysView, view: View | None) -> None:
        self.keys = keys
        self.revocations = _NO_REVOCATIONS if view is None else view.snapshot
        self.freshness = None if view is None else view.freshness
        self.deadline_wall = 0.0
        self.deadline_mono = 0.0


class _Hit:
    """A cached result: good in ``world``, for ``valid_from <= now < valid_until`` (Unix seconds)."""

    __slots__ = ("claims", "valid_from", "valid_until", "verified", "world")

    def __init__(self, world: _World, claims: Claims, verified: Verified, valid_until: float) -> None:
        self.world = world
        self.claims = claims
        self.verified = verified
        self.valid_from = verified.facts.valid_from
        self.valid_until = valid_until


class Verifier:
    """Checks tokens of one issuer inside a service, with no call to the key service and no I/O per token.

    ``issuer``, ``audience``, ``jwks_urls`` (own region's first) and ``redis_url`` (own region's replica; a list is
    tried in order) must be named; ``None`` said aloud skips one. ``jwks`` is a document to start from, or to use alone.
    Times are in seconds. Raises :class:`ConfigurationError`.

    A service without Redis says ``redis_url=None`` and gives ``feed_url``, its region's key service's
    ``/revocations/feed`` (a list is tried in order), with ``feed_client_id`` and ``feed_client_secret`` of a client
    that may have scope ``keyservice:revocations:read`` (``feed_token_url``: by default ``/oauth2/token`` of the same
    host), or with ``feed_token``, a token or a function that gives one.

        with Verifier(issuer="https://id.example", audience="orders", jwks_urls=[…], redis_url="redis://…") as verifier:
            claims = verifier.verify(token)
    """

    def __init__(  # noqa: PLR0913 - one parameter per setting
        self,
        *,
        issuer: str | None,
        audience: str | Sequence[str] | None,
        jwks_urls: Sequence[str] | None,
        redis_url: str | Sequence[str] | RevocationSource | None,
        hs256_secrets: Sequence[Secret] = (),
        on_stale: Policy = "allow",
        on_unsynced: Policy = "deny",
        max_staleness_s: float = 5.0,
        leeway_s: float = 30.0,
        region: str | None = None,
        jwks: Mapping[str, Any] | bytes | None = None,
        token_cache_size: int = 10_000,
        token_cache_ttl_s: float | None = None,
        algorithms: Sequence[str] = ("RS256",),
        redis_username: str | None = None,
        redis_password: str | None = None,
        feed_url: str | Sequence[str] | None = None,
        feed_token: FeedToken | None = None,
        feed_client_id: str | None = None,
        feed_client_secret: str | None = None,
        feed_token_url: str | None = None,
        source_address: str | None = None,
        require_iat: bool = True,
        allow_insecure_http: bool = False,
        keys_max_age_s: float = 3_600.0,
        min_position_wait_s: float = 0.5,
        max_token_lifetime_s: float = 86_400.0,
        max_skew_s: float = 5.0,
        drop_grace_s: float = 300.0,
        hs256_until: float | None = None,
        clock: Clock = time,
    ) -> None:
        self._rules = build_rules(
            issuer=issuer,
            audience=audience,
            algorithms=algorithms,
            leeway_s=leeway_s,
            max_skew_s=max_skew_s,
            drop_grace_s=drop_grace_s,
            max_token_lifetime_s=max_token_lifetime_s,
            require_iat=require_iat,
            hs256_secrets=hs256_secrets,
            hs256_until=hs256_until,
        )
        for name, policy in (("on_stale", on_stale), ("on_unsynced", on_unsynced)):
            if policy not in ("allow", "deny"):
                raise invalid(name, 'expected "allow" or "deny"')
        if token_cache_size < 0:
            raise invalid("token_cache_size", "expected a number of tokens, 0 to switch the cache off")
        self.region = region
        self._on_stale, self._on_unsynced = on_stale, on_unsynced
        self._max_staleness_s = seconds("max_staleness_s", max_staleness_s)
        self._keys_max_age_s = seconds("keys_max_age_s", keys_max_age_s)
        self._min_position_wait_s = seconds("min_position_wait_s", min_position_wait_s)
        self._token_cache_ttl_s = _FAR if token_cache_ttl_s is None else seconds("token_cache_ttl_s", token_cache_ttl_s)
        self._time, self._mono = clock.time, clock.monotonic
        self._cache: TokenCache[_Hit] = TokenCache(token_cache_size)
        self.counters: Counter[str] = Counter()
        self._running = False
        self._changing = threading.Lock()
        initial = local_keys(jwks)
        urls = check_jwks_urls(jwks_urls, allow_insecure_http)
        check_source_address(source_address)
        if not urls and initial is None and not self._rules.hs256_keys:
            message = "no source of keys: name jwks_urls, jwks or hs256_secrets"
            raise ConfigurationError("setting_missing", message, setting="jwks_urls")
        self._local_keys = KeysView(initial)
        self._make_client: Callable[[], JwksClient | None] = lambda: (
            JwksClient(urls, initial=initial, source_address=source_address, on_change=self._keys_changed)
            if urls
            else None
        )
        self._make_mirror = mirror_maker(
            redis_url,
            feed_url,
            redis={"username": redis_username, "password": redis_password},
            feed={
                "token": feed_token,
                "client_id": feed_client_id,
                "client_secret": feed_client_secret,
                "token_url": feed_token_url,
            },
            allow_insecure_http=allow_insecure_http,
            audience=None if issuer is None else f"{issuer.rstrip('/')}/admin",
            source_address=source_address,
            max_skew_s=max_skew_s,
            drop_grace_s=drop_grace_s,
            max_token_lifetime_s=max_token_lifetime_s,
        )
        self._begin()
        _verifiers.add(self)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Build from ``JWT_SECRET``, ``REDIS_ADDR``, ``REDIS_USERNAME``, ``REDIS_PASSWORD``, ``VERIFIER_<PARAMETER>``.

        Raises :class:`ConfigurationError` naming the variable.
        """
        return cls(**environment_settings(environ))

    # -- life -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Fresh parts, never synced: for the constructor, and for a child process after a fork."""
        self._changing = threading.Lock()
        self._client = self._make_client()
        self._mirror = self._make_mirror()
        if self._mirror is not None:
            self._mirror.subscribe(self._view_changed)
        self._cache.clear()
        self._refreshing: asyncio.Task[None] | None = None
        self._world = self._new_world()

    def start(self) -> Self:
        """Start the background threads; ``verify`` works once :meth:`wait_ready` says so. May be called again."""
        self._running = True
        self._renew_world()
        for part in (self._client, self._mirror):
            if part is not None:
                part.start()
        return self

    def close(self) -> None:
        """Stop the background threads. Afterwards ``verify`` raises :class:`ConfigurationError`."""
        self._running = False
        self._cache.clear()
        self._renew_world()
        for part in (self._client, self._mirror):
            if part is not None:
                part.close()

    def wait_ready(self, timeout_s: float = 10.0) -> bool:
        """Wait until keys are held and the first read of the log is complete; False if not in time."""
        deadline = time.monotonic() + timeout_s
        if self._client is not None and not self._client.wait_ready(timeout_s):
            return False
        if self._mirror is not None and not self._mirror.wait_synced(max(0.0, deadline - time.monotonic())):
            return False
        self._catch_up()
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def restart_after_fork(self) -> None:
        """In a child process: threads and connections are the parent's, so start over, never synced."""
        running = self._running
        self._begin()
        if running:
            self.start()

    # -- the world ------------------------------------------------------------------------------------------------

    def _new_world(self) -> _World:
        keys = self._client.view if self._client is not None else self._local_keys
        world = _World(keys, self._mirror.view if self._mirror is not None else None)
        self._set_deadlines(world)
        return world

    def _set_deadlines(self, world: _World) -> None:
        """Fold key age and, under ``deny``, staleness into two comparisons; a zero sends every hit the long way."""
        wall = mono = _FAR
        if self._client is not None:
            fetched = world.keys.fetched_mono
            mono = 0.0 if fetched is None else fetched + self._keys_max_age_s
        freshness = world.freshness
        if freshness is not None:
            if self._on_stale == "deny":
                stale_wall, stale_mono = freshness.deadlines(self._max_staleness_s)
                wall, mono = min(wall, stale_wall), min(mono, stale_mono)
            if not freshness.synced:
                wall = 0.0
        if not self._running and (self._client is not None or self._mirror is not None):
            wall = 0.0
        world.deadline_wall, world.deadline_mono = wall, mono

    def _renew_world(self) -> None:
        with self._changing:
            self._world = self._new_world()

    def _keys_changed(self, _keys: KeysView) -> None:
        self._renew_world()

    def _view_changed(self, _view: View) -> None:
        assert self._mirror is not None
        with self._changing:  # the newest view, whichever thread comes here last
            world, view = self._world, self._mirror.view
            if view.snapshot is world.revocations:
                world.freshness = view.freshness
                self._set_deadlines(world)
            else:
                self._world = self._new_world()

    def _catch_up(self) -> None:
        """Judge by what is held at this moment: who waits for a part may wake before the part has told us."""
        if self._client is not None and self._client.view is not self._world.keys:
            self._renew_world()
        if self._mirror is not None:
            self._view_changed(self._mirror.view)

    # -- verifying ------------------------------------------------------------------------------------------------

    def verify(self, token: str, *, max_staleness_s: float | None = None, min_position: str | None = None) -> Claims:
        """The token's claims, or why not: the whole decision, from memory.

        ``max_staleness_s`` bounds the age of the revocations for this call, whatever the policy; ``min_position`` (a
        ``Trust-Position``) waits a bounded time until the mirror has reached it. An unknown ``kid`` may wait up to half
        a second for the fetch it started; :meth:`averify` waits without blocking the event loop.

        Raises :class:`InvalidToken` (401), :class:`RevokedToken` (401), :class:`Undecidable` (503) and
        :class:`ConfigurationError` (before ``start``).
        """
        if max_staleness_s is None and min_position is None:
            claims = self._remembered(token)
            if claims is not None:
                return claims
        elif min_position is not None:
            self._await_position(_parse_position(min_position))
        try:
            return self._decide(token, max_staleness_s)
        except UnknownKid as unknown:
            if self._client is None:
                raise self._kid_unknown() from None
            if not self._client.view.knows_tokens_of(unknown.iat):
                self._client.refresh(UNKNOWN_KID_WAIT_S)
            return self._decide_again(token, max_staleness_s, unknown.iat)

    async def averify(
        self, token: str, *, max_staleness_s: float | None = None, min_position: str | None = None
    ) -> Claims:
        """:meth:`verify` for async code: the same answer, and whatever has to wait does so off the event loop."""
        if max_staleness_s is None and min_position is None:
            claims = self._remembered(token)
            if claims is not None:
                return claims
        elif min_position is not None:
            await asyncio.to_thread(self._await_position, _parse_position(min_position))
        try:
            return self._decide(token, max_staleness_s)
        except UnknownKid as unknown:
            if self._client is None:
                raise self._kid_unknown() from None
            if not self._client.view.knows_tokens_of(unknown.iat):
                await self._refresh_off_loop(self._client)
            return self._decide_again(token, max_staleness_s, unknown.iat)

    async def _refresh_off_loop(self, client: JwksClient) -> None:
        """Wait for newer keys together with whoever else on this loop does: forged kids must not use its threads up."""
        loop, waiting = asyncio.get_running_loop(), self._refreshing
        if waiting is None or waiting.done() or waiting.get_loop() is not loop:
            waiting = self._refreshing = loop.create_task(asyncio.to_thread(client.refresh, UNKNOWN_KID_WAIT_S))
        await asyncio.shield(waiting)

    def _remembered(self, token: str) -> Claims | None:
        """A hit that still holds in every respect, or None. This is the warm path: no I/O, no lock, no allocation."""
        world = self._world
        try:
            hit = self._cache.get(token)
        except TypeError:  # unhashable, so not a string: the parser says so
            return None
        if hit is None or hit.world is not world:
            return None
        now = self._time()
        if hit.valid_from <= now < hit.valid_until and now < world.deadline_wall and self._mono() < world.deadline_mono:
            return hit.claims
        return None

    def _decide(self, token: str, max_staleness_s: float | None) -> Claims:
        """The long way: whatever of steps 1-6 a hit does not spare, then policy, then the cache."""
        world, now = self._world, self._time()
        if not self._running and (self._client is not None or self._mirror is not None):
            raise ConfigurationError("not_started", "call start(), or use the verifier in a with block")
        hit = self._cache.find(token) if type(token) is str else None
        try:
            if hit is not None and hit.valid_from <= now < hit.valid_until and self._still_has(hit.verified, world):
                verified = hit.verified
            else:
                hit, verified = None, self._check_static(token, world, now)
            check_revoked(verified, world.revocations)
        except InvalidToken as error:
            self._count_refusal(error)
            raise
        self._check_keys_age(verified, world)
        self._check_policy(world, max_staleness_s)
        claims = Claims(verified.members, token, self._staleness_s) if hit is None else hit.claims
        valid_until = min(verified.valid_until, now + self._token_cache_ttl_s) if hit is None else hit.valid_until
        self._cache.put(token, _Hit(world, claims, verified, valid_until))
        self.counters["decided"] += 1
        return claims

    def _check_static(self, token: str, world: _World, now: float) -> Verified:
        """Steps 1-5; a key that is gone because it was revoked is said so at once, whatever the key set's age."""
        try:
            return check_static(token, self._rules, world.keys.keys, now)
        except UnknownKid as unknown:
            check_kid_revoked(unknown, world.revocations)
            raise

    def _still_has(self, verified: Verified, world: _World) -> bool:
        """Step 3 again: it gives the very key that verified (HS256 secrets do not change)."""
        key: PublicKey | HmacKey = verified.key
        if isinstance(key, HmacKey):
            return True
        keys = world.keys.keys
        if keys is None:
            return False
        if not verified.named:
            return keys.only_fit(verified.alg) == key
        return key.kid is not None and keys.get(key.kid) == key

    def _decide_again(self, token: str, max_staleness_s: float | None, iat: float) -> Claims:
        """After a fetch: the kid is known, or unknown to a set that would have to know it, or undecidable."""
        assert self._client is not None
        keys = self._client.view  # the decision is made on this set or a newer one, and so is what its outcome means
        self._catch_up()
        try:
            return self._decide(token, max_staleness_s)
        except UnknownKid:
            if keys.keys is None or self._keys_too_old(keys):
                raise Undecidable("keys_unavailable") from None
            if keys.knows_tokens_of(iat):
                raise self._kid_unknown() from None
            raise Undecidable("keys_behind") from None

    def _kid_unknown(self) -> InvalidToken:
        """The refusal for callers, which has nothing of the unverified token in its fields."""
        self.counters["invalid"] += 1
        return InvalidToken("kid_unknown", step=3)

    def _keys_too_old(self, keys: KeysView) -> bool:
        return keys.fetched_mono is None or self._mono() >= keys.fetched_mono + self._keys_max_age_s

    def _check_keys_age(self, verified: Verified, world: _World) -> None:
        if self._client is not None and isinstance(verified.key, PublicKey) and self._keys_too_old(world.keys):
            raise Undecidable("keys_unavailable", reason="older than keys_max_age_s")

    def _check_policy(self, world: _World, max_staleness_s: float | None) -> None:
        """May the revocations of this world decide? Raises :class:`Undecidable`."""
        freshness = world.freshness
        if freshness is None or self._mirror is None:
            if max_staleness_s is not None:
                raise Undecidable("revocations_stale", reason="no_mirror")
            return
        if not freshness.synced:
            if self._on_unsynced == "deny":
                raise Undecidable("never_synced", reason=self._mirror.view.problem)
            if max_staleness_s is None:
                return
        elif max_staleness_s is None and self._on_stale == "allow":
            return
        bound_s = self._max_staleness_s if max_staleness_s is None else max_staleness_s
        staleness = freshness.staleness(now=self._time(), mono=self._mono(), max_staleness_s=bound_s)
        if not staleness.fresh:
            raise Undecidable("revocations_stale", reason=staleness.reason, staleness_s=staleness.seconds)

    def _count_refusal(self, error: InvalidToken) -> None:
        if not isinstance(error, UnknownKid):
            self.counters["revoked" if isinstance(error, RevokedToken) else "invalid"] += 1

    def _await_position(self, wanted: Position) -> None:
        """Raises :class:`Undecidable` if the mirror does not reach the position in time."""
        if self._mirror is None:
            raise Undecidable("position_not_reached", reason="no mirror")
        if not self._mirror.wait_position(lambda view: _reached(view, wanted), self._min_position_wait_s):
            raise Undecidable("position_not_reached", retry_after_s=self._min_position_wait_s)
        self._catch_up()

    # -- what it knows of itself ----------------------------------------------------------------------------------

    def _staleness(self) -> Staleness:
        """Of the revocations that a verification would be judged by now, not of newer ones on their way to it."""
        freshness = self._world.freshness
        if freshness is None:
            return Staleness(None, False, "no_mirror")
        now, mono = self._time(), self._mono()
        return freshness.staleness(now=now, mono=mono, max_staleness_s=self._max_staleness_s)

    def _staleness_s(self) -> float | None:
        return self._staleness().seconds

    def status(self) -> Status:
        """A typed account of what is held, how old it is, and what was counted."""
        keys = self._client.view if self._client is not None else self._local_keys
        view = self._mirror.view if self._mirror is not None else None
        staleness = self._staleness()
        position = view.position if view is not None else None
        counters: Counter[str] = Counter()
        for part in (self, self._client, self._mirror):
            if part is not None:
                counters.update(part.counters.copy())  # other threads add to them meanwhile
        return Status(
            ready=self._running
            and (keys.keys is not None or self._client is None)
            and (view is None or view.freshness.synced),
            fresh=staleness.fresh,
            reason=staleness.reason,
            staleness_s=staleness.seconds,
            confirmed=staleness.confirmed,
            position=None if position is None else str(position),
            epoch=None if position is None else position.epoch,
            nonce=None if position is None else position.nonce,
            epoch_open=view is not None and view.freshness.epoch_open,
            mirror_entries=0 if view is None else view.snapshot.entries,
            keys=() if keys.keys is None else keys.keys.kids,
            keys_age_s=None if keys.fetched_mono is None else self._mono() - keys.fetched_mono,
            generation=None if keys.generation is None else str(keys.generation),
            connection="none" if view is None else view.connection,
            problem=None if view is None else view.problem,
            region=self.region,
            token_cache_entries=len(self._cache),
            counters=dict(counters),
        )


_verifiers: weakref.WeakSet[Verifier] = weakref.WeakSet()


def _restart_after_fork() -> None:
    for verifier in list(_verifiers):
        verifier.restart_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_restart_after_fork)


def _parse_position(text: str) -> Position:
    try:
        return Position.parse(text)
    except (FormatError, TypeError):
        raise invalid("min_position", "expected <epoch>-<seq>.<nonce>, as in a Trust-Position header") from None


def _reached(view: View, wanted: Position) -> bool:
    """The same history at or past the position, or a later one that holds whatever was acknowledged before it.

    A later epoch is known to hold that only once a beat of it was confirmed and applied: an epoch may open while this
    mirror has yet to read what the regions added to it.
    """
    at, vouched = view.position, view.freshness.confirmed
    if at is None or at.nonce == view.freshness.holed_nonce:
        return False
    if at.nonce == wanted.nonce:
        return at[:2] >= wanted[:2]
    return vouched is not None and vouched.nonce == at.nonce and at.epoch > wanted.epoch
