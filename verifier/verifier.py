"""The front door: :class:`Verifier` owns the parts and their life, and waits where something may be waited for.

It puts together an issuer's keys (:mod:`verifier.issuers`), the mirror of revocations (:mod:`verifier.sources`) and the
:class:`~verifier.judge.Judge` that decides by both. Decisions are not made here; what is here is what has to wait (for
newer keys, for a position), what outlives a fork, and what tells others about itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from .check import Explanation
from .claims import Claims
from .decision import UnknownKid
from .errors import InvalidToken, Undecidable, VerifierError
from .issuers import Issuer, IssuerKeys, check_issuer, named_issuers
from .judge import Judge, Policy
from .jwks_client import JwksClient
from .limits import BREAKER_OPEN_S, UNKNOWN_KID_WAIT_S
from .log import FormatError, Position
from .mirroring import MirrorThread, View
from .observing import Observation, Observer
from .reconnecting import Breaker
from .redis_tls import RedisTls
from .settings import Secret, check_source_address, environment_settings, invalid, seconds
from .sources import FeedToken, RevocationSource, mirror_maker
from .status import FirstRead, Status
from .world import Hit

__all__ = ["Clock", "RevocationSource", "Verifier"]


class _Required:
    def __repr__(self) -> str:
        return "<required>"


_REQUIRED: Final[Any] = _Required()  # unless issuers are given


class Clock(Protocol):
    """Where time comes from."""

    def time(self) -> float:
        """Wall clock, Unix seconds."""

    def monotonic(self) -> float:
        """Monotonic seconds."""


class Verifier:
    """Checks tokens inside a service, with no call to the key service and no I/O per token.

    ``issuer``, ``audience``, ``jwks_urls`` (own region's first) and ``redis_url`` (own region's replica; a list is
    tried in order) must be named; ``None`` said aloud skips one. ``jwks`` is a document to start from, or to use alone.
    Times are in seconds. Raises :class:`ConfigurationError`.

    A service without Redis says ``redis_url=None`` and gives ``feed_url``, its region's key service's
    ``/revocations/feed`` (a list is tried in order), with ``feed_client_id`` and ``feed_client_secret`` of a client
    that may have scope ``keyservice:revocations:read`` (``feed_token_url``: by default ``/oauth2/token`` of the same
    host), or with ``feed_token``, a token or a function that gives one.

    A service that takes tokens of several issuers gives ``issuers=[Issuer(…), …]`` instead of the settings of one; they
    share the revocations and nothing else. ``observer`` hears of every verification (:mod:`verifier.observing`).

        with Verifier(issuer="https://id.example", audience="orders", jwks_urls=[…], redis_url="redis://…") as verifier:
            claims = verifier.verify(token)
    """

    def __init__(  # noqa: PLR0913 - one parameter per setting
        self,
        *,
        issuer: str | None = _REQUIRED,
        audience: str | Sequence[str] | None = _REQUIRED,
        jwks_urls: Sequence[str] | None = _REQUIRED,
        redis_url: str | Sequence[str] | RevocationSource | None,
        issuers: Sequence[Issuer] | None = None,
        hs256_secrets: Sequence[Secret] = (),
        on_stale: Literal["allow", "deny"] = "allow",
        on_unsynced: Literal["allow", "deny"] = "deny",
        max_staleness_s: float = 5.0,
        leeway_s: float = 30.0,
        region: str | None = None,
        jwks: Mapping[str, Any] | bytes | None = None,
        token_cache_size: int = 10_000,
        token_cache_ttl_s: float | None = None,
        algorithms: Sequence[str] = ("RS256",),
        redis_username: str | None = None,
        redis_password: str | None = None,
        redis_tls_ca: str | None = None,
        redis_tls_cert: str | None = None,
        redis_tls_key: str | None = None,
        redis_breaker_failures: int | None = None,
        redis_breaker_open_s: float = BREAKER_OPEN_S,
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
        observer: Observer | None = None,
        clock: Clock = time,
    ) -> None:
        alone = {
            "issuer": issuer,
            "audience": audience,
            "jwks_urls": jwks_urls,
            "jwks": jwks,
            "algorithms": algorithms,
            "hs256_secrets": hs256_secrets,
            "hs256_until": hs256_until,
        }
        given = {name: value for name, value in alone.items() if value is not _REQUIRED}
        self._several = issuers is not None
        self._settings = [
            check_issuer(
                each,
                leeway_s=leeway_s,
                max_skew_s=max_skew_s,
                drop_grace_s=drop_grace_s,
                max_token_lifetime_s=max_token_lifetime_s,
                require_iat=require_iat,
                allow_insecure_http=allow_insecure_http,
                source_address=check_source_address(source_address),
                keys_max_age_s=keys_max_age_s,
            )
            for each in named_issuers(issuers, given)
        ]
        for name, policy in (("on_stale", on_stale), ("on_unsynced", on_unsynced)):
            if policy not in ("allow", "deny"):
                raise invalid(name, 'expected "allow" or "deny"')
        if type(token_cache_size) is not int or token_cache_size < 0:
            raise invalid("token_cache_size", "expected a number of tokens, 0 to switch the cache off")
        self.region = region
        self._policy = Policy(
            on_stale=on_stale,
            on_unsynced=on_unsynced,
            max_staleness_s=seconds("max_staleness_s", max_staleness_s),
            token_cache_ttl_s=math.inf
            if token_cache_ttl_s is None
            else seconds("token_cache_ttl_s", token_cache_ttl_s),
        )
        self._min_position_wait_s = seconds("min_position_wait_s", min_position_wait_s)
        self._cache_size = token_cache_size
        self._clock = clock
        self._observer = observer
        self.counters: Counter[str] = Counter()
        self._make_mirror = mirror_maker(
            redis_url,
            feed_url,
            redis={
                "username": redis_username,
                "password": redis_password,
                "tls": RedisTls(redis_tls_ca, redis_tls_cert, redis_tls_key),
                "breaker": Breaker.checked(redis_breaker_failures, redis_breaker_open_s),
            },
            feed={
                "token": feed_token,
                "client_id": feed_client_id,
                "client_secret": feed_client_secret,
                "token_url": feed_token_url,
            },
            allow_insecure_http=allow_insecure_http,
            audience=_admin_audience(self._settings[0].rules.issuer),
            source_address=source_address,
            max_skew_s=max_skew_s,
            drop_grace_s=drop_grace_s,
            max_token_lifetime_s=max_token_lifetime_s,
        )
        self._begin()
        _verifiers.add(self)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, observer: Observer | None = None) -> Self:
        """Build from ``JWT_SECRET``, ``REDIS_ADDR``, ``REDIS_USERNAME``, ``REDIS_PASSWORD``, ``VERIFIER_<PARAMETER>``.

        Raises :class:`ConfigurationError` naming the variable.
        """
        return cls(**environment_settings(environ), observer=observer)

    # -- life -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Fresh parts, never synced: for the constructor, and for a child process after a fork."""
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._waiting_lock = threading.Lock()
        self._mirror = self._make_mirror()
        self._issuers = [IssuerKeys(settings, self._keys_changed) for settings in self._settings]
        self._by_rules = {id(issuer.rules): issuer for issuer in self._issuers}
        self._judge = Judge(
            self._issuers,
            self._mirror,
            self._policy,
            several=self._several,
            cache_size=self._cache_size,
            counters=self.counters,
            wall=self._clock.time,
            mono=self._clock.monotonic,
        )
        if self._mirror is not None:
            self._mirror.subscribe(self._view_changed)

    @property
    def _parts(self) -> list[JwksClient | RevocationSource]:
        clients = [issuer.client for issuer in self._issuers]
        return [part for part in (*clients, self._mirror) if part is not None]

    def start(self) -> Self:
        """Start the background threads; ``verify`` works once :meth:`wait_ready` says so. May be called again."""
        self._judge.set_running(True)
        for part in self._parts:
            part.start()
        return self

    def close(self) -> None:
        """Stop the background threads. Afterwards ``verify`` raises :class:`ConfigurationError`."""
        self._judge.set_running(False)
        for part in self._parts:
            part.close()

    def wait_ready(self, timeout_s: float = 10.0) -> bool:
        """Wait until keys are held and the first read of the log is complete; False if not in time."""
        deadline = time.monotonic() + timeout_s
        for issuer in self._issuers:
            if issuer.client is not None and not issuer.client.wait_ready(max(0.0, deadline - time.monotonic())):
                return False
        if self._mirror is not None and not self._mirror.wait_synced(max(0.0, deadline - time.monotonic())):
            return False
        self._judge.catch_up()
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
        running = self._judge.running
        if isinstance(self._mirror, MirrorThread):
            self._mirror.abandon()
        self._begin()
        if running:
            self.start()

    def _keys_changed(self) -> None:
        self._judge.renew()

    def _view_changed(self, view: View) -> None:
        self._judge.view_changed()
        self._wake_waiting()
        if view.epoch is not None:
            for issuer in self._issuers:
                if issuer.client is not None:
                    issuer.client.expect(view.epoch.generation)

    # -- verifying ------------------------------------------------------------------------------------------------

    def verify(self, token: str, *, max_staleness_s: float | None = None, min_position: str | None = None) -> Claims:
        """The token's claims, or why not: the whole decision, from memory.

        ``max_staleness_s`` bounds the age of the revocations for this call, whatever the policy; ``min_position`` (a
        ``Trust-Position``) waits a bounded time until the mirror has reached it. An unknown ``kid`` may wait up to half
        a second for the fetch it started; :meth:`averify` waits without blocking the event loop.

        Raises :class:`InvalidToken` (401), :class:`RevokedToken` (401), :class:`Undecidable` (503) and
        :class:`ConfigurationError` (before ``start``).
        """
        if self._observer is not None:
            return self._observed(self._observer, token, max_staleness_s, min_position)
        if max_staleness_s is None and min_position is None:
            hit = self._judge.remembered(token)
            if hit is not None:
                return hit.claims
        return self._decide(token, max_staleness_s, min_position).claims

    async def averify(
        self, token: str, *, max_staleness_s: float | None = None, min_position: str | None = None
    ) -> Claims:
        """:meth:`verify` for async code: the same answer, and whatever has to wait does so off the event loop."""
        if self._observer is not None:
            return await self._observed_off_loop(self._observer, token, max_staleness_s, min_position)
        if max_staleness_s is None and min_position is None:
            hit = self._judge.remembered(token)
            if hit is not None:
                return hit.claims
        return (await self._decide_off_loop(token, max_staleness_s, min_position)).claims

    def remembered(self, token: str) -> Claims | None:
        """The claims of a token that was verified before and still holds in every respect; None says nothing.

        It is the part of :meth:`verify` that neither computes nor waits, for middleware to try first.
        """
        if self._observer is not None:
            observation = Observation(self._observer, self.counters)
            hit = self._judge.remembered(token)
            if hit is not None:
                observation.accepted(hit, remembered=True)
        else:
            hit = self._judge.remembered(token)
        return None if hit is None else hit.claims

    def explain(self, token: str) -> Explanation:
        """The answer of :meth:`verify`, step by step: for people, not for requests.

        It waits as long as :meth:`verify` may; no observer hears of it. Raises :class:`ConfigurationError`.
        """
        try:
            self._decide(token, None, None)
        except Undecidable as error:
            return self._judge.explain(token).undecided(error)
        except InvalidToken:
            pass  # told with its steps
        return self._judge.explain(token)

    def _observed(
        self, observer: Observer, token: str, max_staleness_s: float | None, min_position: str | None
    ) -> Claims:
        observation = Observation(observer, self.counters)
        try:
            plain = max_staleness_s is None and min_position is None
            hit = known = self._judge.remembered(token) if plain else None
            if hit is None:
                hit = self._decide(token, max_staleness_s, min_position)
        except VerifierError as error:
            observation.refused(error)
            raise
        observation.accepted(hit, remembered=known is not None)
        return hit.claims

    async def _observed_off_loop(
        self, observer: Observer, token: str, max_staleness_s: float | None, min_position: str | None
    ) -> Claims:
        observation = Observation(observer, self.counters)
        try:
            plain = max_staleness_s is None and min_position is None
            hit = known = self._judge.remembered(token) if plain else None
            if hit is None:
                hit = await self._decide_off_loop(token, max_staleness_s, min_position)
        except VerifierError as error:
            observation.refused(error)
            raise
        observation.accepted(hit, remembered=known is not None)
        return hit.claims

    def _decide(self, token: str, max_staleness_s: float | None, min_position: str | None) -> Hit:
        if min_position is not None:
            self._await_position(_parse_position(min_position))
        try:
            return self._judge.decide(token, max_staleness_s)
        except UnknownKid as unknown:
            issuer, client = self._issuer_of(unknown)
            if not client.view.knows_tokens_of(unknown.iat):
                client.refresh(UNKNOWN_KID_WAIT_S)
            return self._decide_again(token, max_staleness_s, unknown, issuer)

    async def _decide_off_loop(self, token: str, max_staleness_s: float | None, min_position: str | None) -> Hit:
        if min_position is not None:
            await self._await_position_off_loop(_parse_position(min_position))
        try:
            return self._judge.decide(token, max_staleness_s)
        except UnknownKid as unknown:
            issuer, client = self._issuer_of(unknown)
            if not client.view.knows_tokens_of(unknown.iat):
                await issuer.refresh_off_loop(UNKNOWN_KID_WAIT_S)
            return self._decide_again(token, max_staleness_s, unknown, issuer)

    def _issuer_of(self, unknown: UnknownKid) -> tuple[IssuerKeys, JwksClient]:
        """Whose keys to ask for; raises :class:`InvalidToken` where there is nobody to ask."""
        issuer = self._by_rules[id(unknown.rules)]
        if issuer.client is None:
            raise self._kid_unknown() from None
        return issuer, issuer.client

    def _decide_again(self, token: str, max_staleness_s: float | None, unknown: UnknownKid, issuer: IssuerKeys) -> Hit:
        """After a fetch: the kid is known, or unknown to a set that would have to know it, or undecidable."""
        keys = issuer.view  # the decision is made on this set or a newer one, and so is what its outcome means
        self._judge.catch_up()
        try:
            return self._judge.decide(token, max_staleness_s)
        except UnknownKid:
            if keys.keys is None or issuer.too_old(keys, self._clock.monotonic()):
                raise Undecidable("keys_unavailable") from None
            if keys.knows_tokens_of(unknown.iat):
                raise self._kid_unknown() from None
            raise Undecidable("keys_behind") from None

    def _kid_unknown(self) -> InvalidToken:
        """The refusal for callers, which has nothing of the unverified token in its fields."""
        self.counters["invalid"] += 1
        return InvalidToken("kid_unknown", step=3)

    def _await_position(self, wanted: Position) -> None:
        """Raises :class:`Undecidable` if the mirror does not reach the position in time."""
        if self._mirror is None:
            raise Undecidable("position_not_reached", reason="no mirror")
        if not self._mirror.wait_position(lambda view: _reached(view, wanted), self._min_position_wait_s):
            raise Undecidable("position_not_reached", retry_after_s=self._min_position_wait_s)
        self._judge.catch_up()

    async def _await_position_off_loop(self, wanted: Position) -> None:
        """The same without a thread: whoever waits must not use the loop's up."""
        if self._mirror is None:
            raise Undecidable("position_not_reached", reason="no mirror")
        waiter = asyncio.get_running_loop(), asyncio.Event()
        with self._waiting_lock:
            self._waiting.add(waiter)
        try:
            async with asyncio.timeout(self._min_position_wait_s):
                while not _reached(self._mirror.view, wanted):
                    waiter[1].clear()
                    await waiter[1].wait()
        except TimeoutError:
            raise Undecidable("position_not_reached", retry_after_s=self._min_position_wait_s) from None
        finally:
            with self._waiting_lock:
                self._waiting.discard(waiter)
        self._judge.catch_up()

    def _wake_waiting(self) -> None:
        with self._waiting_lock:
            waiting = list(self._waiting)
        for loop, news in waiting:
            with contextlib.suppress(RuntimeError):  # its loop was closed
                loop.call_soon_threadsafe(news.set)

    # -- what it tells --------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """A typed account of what is held, how old it is, and what was counted."""
        view = self._mirror.view if self._mirror is not None else None
        staleness = self._judge.staleness()
        position = view.position if view is not None else None
        issuers = tuple(issuer.status(self._clock.monotonic()) for issuer in self._issuers)
        counters: Counter[str] = Counter()
        for part in (self, *self._parts):
            counters.update(part.counters.copy())  # other threads add to them meanwhile
        return Status(
            ready=self._judge.running
            and all(issuer.view.keys is not None or issuer.client is None for issuer in self._issuers)
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
            first_read=FirstRead.of(view),
            keys=issuers[0].keys,
            keys_age_s=issuers[0].age_s,
            generation=issuers[0].generation,
            issuers=issuers,
            connection="none" if view is None else view.connection,
            problem=None if view is None else view.problem,
            region=self.region,
            token_cache_entries=self._judge.cached_tokens,
            counters=dict(counters),
        )


_verifiers: weakref.WeakSet[Verifier] = weakref.WeakSet()


def _restart_after_fork() -> None:
    for verifier in list(_verifiers):
        verifier.restart_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_restart_after_fork)


def _admin_audience(issuer: str | None) -> str | None:
    """Of the key service's own API, for a token to read its feed."""
    return None if issuer is None else f"{issuer.rstrip('/')}/admin"


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
