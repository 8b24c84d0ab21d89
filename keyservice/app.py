"""The one place where the parts are put together.

:func:`build` makes a :class:`Service` from settings, by its role: *api* signs, publishes and takes revocations; a
*keeper* remembers them for its region; *all* is both in one process. Nothing is opened before :meth:`Service.start`,
but for the keeper's disk, which is locked.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from verifier.log import Entry, Position
from verifier.mirroring import LogListener, View
from verifier.replica import ReplicaMirror
from verifier.revocations import Snapshot

from .api import health, keeper, problems
from .api.counting import Counting
from .api.health import Readiness
from .clients import Clients, load_clients
from .core.revocation import EntryIndex
from .envelope import Kek
from .errors import PrimaryUnreachable, SettingError, SigningUnavailable, StartError
from .frontend import Frontend
from .intents import Intents, KeeperClient
from .jobs import Beats, KeyPoll, TrimJob, end, repeat
from .keeper import KeeperRunner
from .keeper_disk import SqliteDisk
from .keeper_keys import KeyKeeper
from .limits import CLIENTS_POLL_S, KEEPER_TAIL_BLOCK_MS, KEEPER_TICK_S, KEYS_POLL_S
from .primary import primary_node
from .receipts import Receipts
from .settings import Settings
from .store import Node
from .telemetry import Metrics
from .trimming import Trimmer
from .trust import TrustLog, read_keys

__all__ = ["Service", "build"]

_log = structlog.get_logger(__name__)

START_RETRY_S = 0.2
EXPIRE_EVERY_S = 60.0
TRIM_EVERY_S = 10.0
SERVING_EVERY_S = 30.0


def build(settings: Settings, *, clock: Callable[[], float] = time.time) -> Service:
    """Read the files that settings name and put everything together; raises :class:`SettingError`, StartError."""
    if settings.role == "keeper" or settings.clients_file is None:
        return Service(settings, None, {}, clock)
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
    """A key service that can be started once. ``apps`` are its ASGI applications: public, admin, keeper."""

    def __init__(self, settings: Settings, kek: Kek | None, clients: Clients, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.region)
        self.clock = clock
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._build_store(settings)
        self.keeper, self.intents = self._build_keeper(settings)
        self.frontend = None if kek is None else Frontend(self, kek, clients)
        # The keeper writes to the primary, which may be mute: nothing that is served waits for that.
        takers = (self.frontend.ring.take if self.frontend else None, self._key_keeper.take if self.keeper else None)
        self._polls = [
            KeyPoll(self.own, self.primary, [take], self.metrics, region=settings.region)
            for take in takers
            if take is not None
        ]
        self.poll = self._polls[0]
        self.apps = self._build_apps(settings)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _build_store(self, settings: Settings) -> None:
        password = settings.redis_password.get_secret_value() if settings.redis_password is not None else None
        self.own = Node(
            settings.redis_url,
            username=settings.redis_username,
            password=password,
            source_address=settings.source_address,
            tls=settings.redis_tls,
        )
        self.primary = primary_node(settings)
        self.trust = TrustLog(self.primary, region=settings.region, max_token_lifetime_s=settings.max_token_lifetime_s)
        self.index = EntryIndex()
        self.mirror = ReplicaMirror(
            settings.redis_url,
            username=settings.redis_username,
            password=password,
            source_address=settings.source_address,
            tls=settings.redis_tls,
            max_skew_s=settings.max_skew_s,
            drop_grace_s=settings.drop_grace_s,
            tail_block_ms=KEEPER_TAIL_BLOCK_MS,
        )
        self.mirror.listen(_Entries(self))
        self.receipts = Receipts(self.own, self.index, settings.all_regions, epoch=lambda: self.mirror.view.epoch)
        self.beats = Beats(
            self.trust,
            self.metrics,
            regions=self.receipts.regions,
            interval_ms=settings.beat_interval_ms,
            max_skew_s=settings.max_skew_s,
            clock=self.clock,
        )

    def _build_keeper(self, settings: Settings) -> tuple[KeeperRunner | None, Intents]:
        if settings.role == "api" or settings.keeper_dir is None:
            assert settings.keeper_url is not None
            assert settings.keeper_secret is not None
            secret = settings.keeper_secret.get_secret_value()
            return None, KeeperClient(settings.keeper_url, secret, source_address=settings.source_address)
        disk = SqliteDisk(settings.keeper_dir, region=settings.region)
        runner = KeeperRunner(
            disk,
            self.trust,
            self.own,
            self.primary,
            self.metrics,
            region=settings.region,
            regions=settings.all_regions,
            bootstrap_region=settings.bootstrap_region,
            drop_grace_s=settings.drop_grace_s,
            clock=self.clock,
        )
        self.mirror.listen(runner)
        self._key_keeper = KeyKeeper(runner, disk, self.trust, self.primary, region=settings.region)
        trimmer = Trimmer(
            self.primary,
            drop_grace_s=math.ceil(settings.drop_grace_s),
            answered=lambda: self.mirror.answered_gaps,
            clock=self.clock,
        )
        self._trimming = TrimJob(runner, trimmer, self.beats, self.metrics)
        return runner, runner

    def _build_apps(self, settings: Settings) -> dict[str, ASGIApp]:
        apps: dict[str, ASGIApp] = {}
        watched = health.router(self.readiness, self.exposition)
        if self.frontend is not None:
            apps["public"] = self.frontend.in_front(fastapi_app(*self.frontend.public_routers(), watched))
            apps["admin"] = fastapi_app(*self.frontend.admin_routers(), watched)
        if settings.keeper_listens and settings.keeper_secret is not None:
            own = keeper.router(self.intents, settings.keeper_secret.get_secret_value())
            apps["keeper"] = fastapi_app(own, watched)
        return {name: Counting(app, self.metrics, name) for name, app in apps.items()}

    @property
    def public(self) -> ASGIApp:
        """What anybody may call."""
        return self.apps["public"]

    @property
    def admin(self) -> ASGIApp:
        """What administers."""
        return self.apps["admin"]

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reach Redis, check the KEK, and start everything; raises :class:`StartError`."""
        self._loop = asyncio.get_running_loop()
        await self._reach_redis()
        if self.keeper is not None:
            await self.keeper.start()
        if self.frontend is not None:
            await self.frontend.check_kek()
        self.mirror.start()
        await self.poll.once()
        rounds: list[tuple[Callable[[], Awaitable[None]], Callable[[], float]]] = [
            (self.beats.once, self.beats.pause_s),
            *((poll.once, lambda: KEYS_POLL_S) for poll in self._polls),
            (self._expire, lambda: EXPIRE_EVERY_S),
        ]
        if self.keeper is not None:
            rounds.append((self.keeper.once, lambda: KEEPER_TICK_S))
            rounds.append((self._trimming.once, lambda: TRIM_EVERY_S))
            rounds.append((self._key_keeper.repeat, lambda: SERVING_EVERY_S))
        if self.frontend is not None:
            await self.frontend.registry.once()
            rounds.append((self.frontend.registry.once, lambda: CLIENTS_POLL_S))
            self.frontend.start()
        self._tasks = [asyncio.create_task(repeat(once, pause_s, self._stopping)) for once, pause_s in rounds]

    async def end_streams(self) -> None:
        """End the answers that would go on for ever, before the servers wait for those under way."""
        if self.frontend is not None:
            await self.frontend.feed.close()

    async def stop(self) -> None:
        """Stop everything and close every connection."""
        self._stopping.set()
        if self.frontend is not None:
            await self.frontend.stop()
        await end(self._tasks)
        await self.receipts.stop()
        await asyncio.to_thread(self.mirror.close)
        if self.keeper is not None:
            await self.keeper.stop()
        await self.intents.close()
        self.executor.shutdown(wait=False, cancel_futures=True)
        await self.own.close()
        await self.primary.close()

    async def _reach_redis(self) -> None:
        """Wait for both servers. Where the own one holds keys already, an unreachable primary is an outage, no more."""
        deadline_mono = time.monotonic() + self.settings.start_timeout_s
        await self._reach(self.own, "KEYSERVICE_REDIS_URL", deadline_mono)
        try:
            await self._reach(self.primary, "KEYSERVICE_PRIMARY_URL", deadline_mono)
        except StartError as error:
            if error.code != "redis_unreachable" or not (await read_keys(self.own, self.settings.region)).records:
                raise
            _log.warning("started without the primary: what needs it waits or answers 503")

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

    async def _expire(self) -> None:
        """Forget entries that cannot matter any more, by the same rule as the mirror."""
        self.index.drop_expired(self.clock() - self.settings.drop_grace_s)
        if self.keeper is not None:
            await self.keeper.drop_expired()

    # -- what the parts ask each other ----------------------------------------------------------------------------

    def revocations(self) -> Snapshot:
        """What is revoked; raises :class:`SigningUnavailable` while that is not known at all."""
        view = self.mirror.view
        if not view.freshness.synced:
            raise SigningUnavailable("mirror_not_synced", "the revocations have not been read yet")
        return view.snapshot

    def is_fresh(self, view: View) -> bool:
        """Whether what this view shows of the revocations is recent, and a majority of regions vouches for it."""
        bound_s = self.settings.max_staleness_s
        return view.freshness.staleness(now=self.clock(), mono=time.monotonic(), max_staleness_s=bound_s).fresh

    def enforce(self, entries: list[Entry]) -> None:
        """Put entries in force here, before they come back from the log."""
        self.mirror.apply_local(entries)
        if self.frontend is not None:
            self.frontend.look_for_kids(entries)

    def on_entries(self, entries: list[tuple[Position, Entry]]) -> None:
        """From the mirror's thread."""
        self.index.add(entries)
        if self.frontend is None or self._loop is None:
            return
        if any(entry.kind == "kid" for _, entry in entries):
            with suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self.frontend.look_for_kids, [entry for _, entry in entries])

    def exposition(self) -> bytes:
        """The metrics, those that are states read now."""
        view = self.mirror.view
        self.metrics.entries.set(view.snapshot.entries)
        if view.epoch is not None:
            self.metrics.epoch.set(view.epoch.number)
            self.metrics.epoch_open.set(view.epoch.open)
        if self.keeper is not None:
            self.keeper.show()
        self.metrics.bumps.set(self.trust.bumps)
        self.metrics.ready.set(self.readiness().ready)
        return self.metrics.render()

    def readiness(self) -> Readiness:
        """What can be done now, and what keeps the rest from being done."""
        view = self.mirror.view
        reasons = {
            "waiting_for_bootstrap": self.beats.problem == "waiting_for_bootstrap",
            "mirror_not_synced": not view.freshness.synced,
            "clock_skew": self.beats.clock_skewed,
        }
        if self.frontend is not None:
            reasons |= self.frontend.reasons()
        return Readiness(tuple(name for name, holds in reasons.items() if holds), self._warnings(view), self._details())

    def _warnings(self, view: View) -> tuple[str, ...]:
        found = {
            "epoch_closed": view.epoch is not None and not view.epoch.open,
            "primary_clock": self.beats.primary_off,
            "primary_unreachable": self.beats.problem in ("primary_unreachable", "outcome_unknown", "timeout"),
            "replica_unreachable": self.poll.problem is not None,
        }
        if self.keeper is not None:
            found |= {self.keeper.problem or "": self.keeper.problem is not None}
            found |= {"keeper_not_seated": self.keeper.seated is False}
        if self.frontend is not None:
            found |= self.frontend.warnings()
        return tuple(name for name, holds in found.items() if holds)

    def _details(self) -> dict[str, Any]:
        view = self.mirror.view
        document = self.frontend.ring.document if self.frontend is not None else None
        return {
            "region": self.settings.region,
            "role": self.settings.role,
            "epoch": view.epoch.number if view.epoch is not None else None,
            "position": str(view.position) if view.position is not None else None,
            "generation": str(document.generation) if document is not None else None,
            "beat": self.beats.problem or "ok",
            "clock_skew_s": self.beats.skew_s,
            "keeper_id": self.keeper.disk.keeper_id if self.keeper is not None else None,
        }


class _Entries(LogListener):
    """Hands on what the mirror reads."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def begin(self) -> None:
        self._service.index.begin()

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        self._service.on_entries(accepted)


def fastapi_app(*routers: APIRouter) -> FastAPI:
    """An application of ours: errors in one form, and no pages of FastAPI's own."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    problems.install(app)
    for router in routers:
        app.include_router(router)
    return app
