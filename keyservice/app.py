"""The one place where the parts are put together.

:func:`build` makes a :class:`Service` from settings: two ASGI applications (public and admin) and what runs
beside them. Nothing is opened before :meth:`Service.start`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from verifier.log import Entry, Position
from verifier.mirroring import LogListener, View
from verifier.replica import ReplicaMirror
from verifier.revocations import Snapshot

from .api import admin_keys, admin_revocations, admin_sessions, health, oauth, problems
from .api.counting import Counting
from .api.health import Readiness
from .api.jwks import JwksFirst
from .bearer import AdminBearer
from .clients import Authenticator, Clients, load_clients
from .core.epochs import bootstraps
from .core.revocation import EntryIndex
from .envelope import Kek
from .errors import PrimaryUnreachable, SettingError, SigningUnavailable, StartError
from .granting import Granting
from .issuing import Issuer, SharedSecret
from .jobs import Beats, KeyPoll, RotationJob, end, repeat
from .keyring import Keyring
from .limits import KEYS_POLL_S
from .revoking import Revoker
from .rotator import Rotator
from .sessions import SessionStore
from .settings import Settings
from .store import Node
from .telemetry import Metrics
from .trust import TrustLog, read_keys

__all__ = ["Service", "build"]

_log = structlog.get_logger(__name__)

START_RETRY_S = 0.2
EXPIRE_EVERY_S = 60.0


def build(settings: Settings, *, clock: Callable[[], float] = time.time) -> Service:
    """Read the files that settings name and put everything together; raises :class:`SettingError`."""
    kek = settings.read_kek()
    clients = load_clients(settings.clients_file)
    _check_shared_secret(settings, clients)
    return Service(settings, kek, clients, clock)


def _check_shared_secret(settings: Settings, clients: Clients) -> None:
    pinned = next((client.client_id for client in clients.values() if client.token_alg == "HS256"), None)
    if pinned is not None and settings.jwt_secret is None:
        message = f"JWT_SECRET is not set, and client {pinned[:64]} in KEYSERVICE_CLIENTS_FILE has token_alg HS256"
        raise SettingError("setting_missing", message)


class Service:
    """A key service that can be started once. ``public`` and ``admin`` are its ASGI applications."""

    def __init__(self, settings: Settings, kek: Kek, clients: Clients, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.region)
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._build_store(settings)
        self._build_keys(settings, kek)
        self._build_revocations(settings)
        self._build_tokens(settings, clients)
        self.public, self.admin = self._build_apps(settings)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _build_store(self, settings: Settings) -> None:
        password = settings.redis_password.get_secret_value() if settings.redis_password is not None else None
        node = partial(
            Node, username=settings.redis_username, password=password, source_address=settings.source_address
        )
        self._replica = node(settings.redis_url)
        self._primary = node(settings.primary)
        self.trust = TrustLog(
            self._primary,
            region=settings.region,
            bootstraps=bootstraps(settings.region, settings.all_regions, settings.bootstrap_region),
            max_token_lifetime_s=settings.max_token_lifetime_s,
        )
        self.index = EntryIndex()
        self.mirror = ReplicaMirror(
            settings.redis_url,
            username=settings.redis_username,
            password=password,
            source_address=settings.source_address,
            max_skew_s=settings.max_skew_s,
            drop_grace_s=settings.drop_grace_s,
        )
        self.mirror.listen(_Entries(self._on_entries))

    def _build_keys(self, settings: Settings, kek: Kek) -> None:
        self.ring = Keyring(kek, settings.region, is_revoked=self._kid_revoked, executor=self._executor)
        self._poll = KeyPoll(self._replica, self.ring, self.metrics, region=settings.region)
        self.rotator = Rotator(
            self._primary,
            self.trust,
            self.ring,
            kek,
            settings.rotation_policy,
            region=settings.region,
            clock=self._clock,
            is_revoked=self._kid_revoked,
            executor=self._executor,
        )
        self._rotation = RotationJob(self.rotator, self.metrics, tick_s=settings.rotator_tick_s)
        self.beats = Beats(
            self.trust,
            self.metrics,
            interval_ms=settings.beat_interval_ms,
            max_skew_s=settings.max_skew_s,
            clock=self._clock,
        )

    def _build_revocations(self, settings: Settings) -> None:
        self.revoker = Revoker(
            self.trust,
            self.index,
            settings.revocation_policy,
            regions=settings.all_regions,
            clock=self._clock,
            check_clock=self.beats.check_clock,
            enforce=self._enforce,
            count=self.metrics.count_append,
        )

    def _build_tokens(self, settings: Settings, clients: Clients) -> None:
        secret = settings.jwt_secret
        issuer = Issuer(
            settings.issuer,
            settings.access_token_ttl_s,
            clock=self._clock,
            signing_key=self.ring.signing_key,
            gate=self._may_sign,
            shared_secret=SharedSecret(secret.get_secret_value()) if secret is not None else None,
        )
        self._sessions = SessionStore(self._primary)
        self._authenticator = Authenticator(clients)
        self._granting = Granting(
            issuer,
            self._sessions,
            self.metrics,
            issuer_name=settings.issuer,
            session_ttl_s=settings.session_ttl_s,
            clock=self._clock,
            snapshot=self._revocations,
        )

    def _build_apps(self, settings: Settings) -> tuple[ASGIApp, ASGIApp]:
        bearer = AdminBearer(
            issuer=settings.issuer,
            audience=settings.admin_audience,
            leeway_s=settings.leeway_s,
            max_token_lifetime_s=settings.max_token_lifetime_s,
            clock=self._clock,
            keys=lambda: self.ring.document.keys if self.ring.document is not None else None,
            snapshot=self._revocations,
        )
        public = _fastapi(
            oauth.router(self._authenticator, self._granting, self.metrics),
            health.router(self.readiness, self.exposition),
        )
        admin = _fastapi(
            admin_sessions.router(
                bearer,
                self._authenticator,
                self._granting,
                self._sessions,
                self.revoker,
                settings.revocation_policy,
                session_life_s=settings.session_life_s,
                clock=self._clock,
            ),
            admin_revocations.router(bearer, self.revoker),
            admin_keys.router(bearer, self.ring, self.rotator, self._rotation.wake),
            health.router(self.readiness, self.exposition),
        )
        with_keys = JwksFirst(public, lambda: self.ring.document, settings.jwks_max_age_s)
        return Counting(with_keys, self.metrics, "public"), Counting(admin, self.metrics, "admin")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reach Redis, check the KEK, and start everything; raises :class:`StartError`."""
        self._loop = asyncio.get_running_loop()
        await self._reach_redis()
        await self._check_kek()
        self.mirror.start()
        await self._poll.once()
        self._rotation.start()
        rounds = (
            (self.beats.once, self.beats.pause_s),
            (self._poll.once, lambda: KEYS_POLL_S),
            (self._expire, lambda: EXPIRE_EVERY_S),
        )
        self._tasks = [asyncio.create_task(repeat(once, pause_s, self._stopping)) for once, pause_s in rounds]

    async def stop(self) -> None:
        """Stop everything and close every connection."""
        self._stopping.set()
        await self._rotation.stop()
        await end(self._tasks)
        await asyncio.to_thread(self.mirror.close)
        self._authenticator.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        await self._replica.close()
        await self._primary.close()

    async def _reach_redis(self) -> None:
        """Wait for both servers. Where the own one holds keys already, an unreachable primary is an outage, no more."""
        deadline_mono = time.monotonic() + self.settings.start_timeout_s
        await self._reach(self._replica, "KEYSERVICE_REDIS_URL", deadline_mono)
        try:
            await self._reach(self._primary, "KEYSERVICE_PRIMARY_URL", deadline_mono)
        except StartError as error:
            if error.code != "redis_unreachable" or not (await read_keys(self._replica, self.settings.region)).records:
                raise
            _log.warning("started without the primary: what needs it answers 503")

    async def _reach(self, node: Node, setting: str, deadline_mono: float) -> None:
        while True:
            try:
                await node.check(setting)
            except PrimaryUnreachable:
                if time.monotonic() >= deadline_mono:
                    message = f"no Redis answers at {setting} within {self.settings.start_timeout_s:g} s"
                    raise StartError("redis_unreachable", message) from None
                await asyncio.sleep(START_RETRY_S)
            else:
                return

    async def _check_kek(self) -> None:
        view = await read_keys(self._replica, self.settings.region)
        foreign = self.ring.foreign_kek(view)
        if foreign is not None:
            message = (
                f"KEYSERVICE_KEK is not the one (kek id {foreign}) that this region's private keys are wrapped under"
            )
            raise StartError("kek_mismatch", message)

    async def _expire(self) -> None:
        """Forget ids of entries that cannot matter any more, by the same rule as the mirror."""
        self.index.drop_expired(self._clock() - self.settings.drop_grace_s)

    # -- what the parts ask each other ----------------------------------------------------------------------------

    def _revocations(self) -> Snapshot:
        """What is revoked; raises :class:`SigningUnavailable` while that is not known at all."""
        view = self.mirror.view
        if not view.freshness.synced:
            raise SigningUnavailable("mirror_not_synced", "the revocations have not been read yet")
        return view.snapshot

    def _may_sign(self) -> None:
        self._revocations()
        self.beats.check_clock()

    def _kid_revoked(self, kid: str) -> bool:
        return self.mirror.snapshot.find(issuer=self.settings.issuer, kid=kid) is not None

    def _enforce(self, entries: list[Entry]) -> None:
        self.mirror.apply_local(entries)
        self._look_for_kids(entries)

    def _on_entries(self, entries: list[tuple[Position, Entry]]) -> None:
        """From the mirror's thread."""
        self.index.add(entries)
        if self._loop is not None and any(entry.kind == "kid" for _, entry in entries):
            with suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self._look_for_kids, [entry for _, entry in entries])

    def _look_for_kids(self, entries: list[Entry]) -> None:
        """A revoked key of this region is replaced at once, not at the next tick."""
        mine = {kid for kid, record in self.ring.records.items() if record.region == self.settings.region}
        if any(entry.kind == "kid" and entry.value in mine for entry in entries):
            self._rotation.wake()

    def exposition(self) -> bytes:
        """The metrics, those that are states read now."""
        view = self.mirror.view
        self.metrics.entries.set(view.snapshot.entries)
        if view.epoch is not None:
            self.metrics.epoch.set(view.epoch.number)
            self.metrics.epoch_open.set(view.epoch.open)
        self.metrics.bumps.set(self.trust.bumps)
        self.metrics.ready.set(self.readiness().ready)
        return self.metrics.render()

    def readiness(self) -> Readiness:
        """What can be done now, and what keeps the rest from being done."""
        view = self.mirror.view
        reasons = []
        if self.beats.problem == "waiting_for_bootstrap":
            reasons.append("waiting_for_bootstrap")
        if self.ring.document is None:
            reasons.append("keys_unavailable")
        if not view.freshness.synced:
            reasons.append("mirror_not_synced")
        if self.beats.clock_skewed:
            reasons.append("clock_skew")
        try:
            self.ring.signing_key()
        except SigningUnavailable as error:
            reasons.append(error.code)
        return Readiness(tuple(reasons), self._warnings(view), self._details(view))

    def _warnings(self, view: View) -> tuple[str, ...]:
        found = {
            "epoch_closed": view.epoch is not None and not view.epoch.open,
            "primary_unreachable": self.beats.problem in ("primary_unreachable", "outcome_unknown", "timeout"),
            "replica_unreachable": self._poll.problem is not None,
            "private_key_missing": bool(self.ring.missing_private),
            "key_set_not_taken": self.ring.refused is not None,
            self.rotator.problem or "": self.rotator.problem is not None,
        }
        return tuple(name for name, holds in found.items() if holds)

    def _details(self, view: View) -> dict[str, Any]:
        document = self.ring.document
        return {
            "region": self.settings.region,
            "epoch": view.epoch.number if view.epoch is not None else None,
            "position": str(view.position) if view.position is not None else None,
            "generation": str(document.generation) if document is not None else None,
            "beat": self.beats.problem or "ok",
            "clock_skew_s": self.beats.skew_s,
        }


class _Entries(LogListener):
    """Hands on the entries that the mirror reads."""

    def __init__(self, on_entries: Callable[[list[tuple[Position, Entry]]], None]) -> None:
        self._on_entries = on_entries

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        self._on_entries(accepted)


def _fastapi(*routers: APIRouter) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    problems.install(app)
    for router in routers:
        app.include_router(router)
    return app
