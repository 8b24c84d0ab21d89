"""A real cluster with a recording verifier in every region, a ledger of what a test did, and all checkers at the end.

    async with FaultCluster(cluster, directory) as faults:
        names = await faults.mint(50)
        with faults.fault("cut", "a to b"):             # breaks something; the ledger knows when
            await faults.revoke(names[0], via="b")
        await faults.assert_promises()

It begins when every verifier is fresh. A fault is any context manager that enters `fault` around what it does, so
faults nest and combine. What is promised only of `replicated` receipts is checked for those; where nothing fails, or
all is healed, `counted=EITHER` demands it of every receipt.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import redis

from regions.access import Callers, Unexpected
from regions.checkers import (
    AcknowledgedNotLost,
    Checker,
    FreshNotFooled,
    NeverUnrevoked,
    NoValidRequestFailed,
    Violation,
    Witness,
    tally,
)
from regions.cluster import Cluster
from regions.ledger import Durability, Fault, Ledger, Request, Revocation, Token
from regions.recorder import Recorder, recorder_environment
from regions.recorder.client import PROGRAM
from verifier.log import LOG_KEY, Entry, FormatError
from verifier.netbind import bound_connection_kwargs
from verifier.testing import sign
from verifier.token import parse, read_payload

REPLICATED: frozenset[Durability] = frozenset({"replicated"})
EITHER: frozenset[Durability] = frozenset({"pending", "replicated"})

ENFORCED_WITHIN_S = 60.0
REPLICATED_WITHIN_S = 60.0
FRESH_WITHIN_S = 60.0
AT_ONCE = 16
"""Requests under way together while tokens are made or revoked."""


class FaultCluster:
    """See the module. `recorders` are the ones that run, by region; `settings` are parameters of their `Verifier`."""

    def __init__(
        self, cluster: Cluster, directory: Path, *, program: Sequence[str] = PROGRAM, **settings: float | str
    ) -> None:
        self.cluster = cluster
        self.regions = [region.name for region in cluster.topology.regions]
        self.ledger = Ledger()
        self.recorders: dict[str, Recorder] = {}
        self.retired: list[Recorder] = []
        self.cut_off: set[str] = set()
        """Regions that are not connected at the end: nothing is demanded of their verifiers then."""
        self.tokens: dict[str, str] = {}
        self._directory = directory
        self._program = program
        self._settings = settings
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        self.callers = Callers(self.cluster.file)
        try:
            for region in self.regions:
                self.recorders[region] = self._start_recorder(region)
            for recorder in self.recorders.values():
                await asyncio.to_thread(recorder.wait_ready)
            await self.fresh_everywhere()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for recorder in self.recorders.values():
            await asyncio.to_thread(recorder.close)
        await self.callers.__aexit__(None, None, None)

    # -- recorders ------------------------------------------------------------------------------------------------

    def _start_recorder(self, region: str, program: Sequence[str] | None = None) -> Recorder:
        env = recorder_environment(self.cluster.file, region, **self._settings)
        id = f"{region}#{next(self._numbers)}"
        return Recorder(
            id, region, env, self._directory / f"recorder-{id}.log", program=program or self._program
        ).start()

    async def restart_recorder(
        self, region: str, *, wait_ready: bool = True, program: Sequence[str] | None = None
    ) -> Recorder:
        """Kill a region's verifier and start another, which knows nothing of what the first one held."""
        self.retired.append(self.recorders[region])
        await asyncio.to_thread(self.recorders[region].report)
        self.recorders[region].kill()
        recorder = self.recorders[region] = self._start_recorder(region, program)
        for name, token in self.tokens.items():
            recorder.watch(name, token)
        if wait_ready:
            await asyncio.to_thread(recorder.wait_ready)
        return recorder

    async def fresh_everywhere(self, within_s: float = FRESH_WITHIN_S) -> None:
        """Until every recorder in a connected region calls itself fresh."""
        for region, recorder in self.recorders.items():
            if region not in self.cut_off:
                await asyncio.to_thread(recorder.wait_sample, lambda sample: sample.fresh, within_s)

    # -- tokens ---------------------------------------------------------------------------------------------------

    async def mint(self, count: int, *, via: str | None = None) -> list[str]:
        """New RS256 tokens, signed in a region (default: each in turn) and watched everywhere; returns their names."""
        signers = [self.callers[via]] if via is not None else self.callers.all
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> str:
            async with gate:
                signer = signers[number % len(signers)]
                return await signer.client_token("worker", scope="orders:read")

        return [self._watch(token) for token in await asyncio.gather(*map(one, range(count)))]

    def mint_offline(self, count: int) -> list[str]:
        """As `mint`, but legacy HS256 ones that no key service is asked for."""
        file = self.cluster.file
        claims = {"iss": file.issuer, "aud": file.audience, "sub": "worker", "client_id": "worker"}
        return [
            self._watch(sign(file.hs256_secret, {**claims, "jti": uuid.uuid4().hex}, lifetime_s=900))
            for _ in range(count)
        ]

    def _watch(self, token: str) -> str:
        name = f"token-{len(self.tokens)}"
        self.ledger.add_token(Token(name, float(read_payload(parse(token).payload)["exp"])))
        self.tokens[name] = token
        for recorder in self.recorders.values():
            recorder.watch(name, token)
        return name

    async def accepted_everywhere(self, names: Sequence[str], within_s: float = ENFORCED_WITHIN_S) -> None:
        """Until every recorder accepts these tokens: a revocation of one that nobody knew would prove nothing."""
        for recorder in self.recorders.values():
            for name in names:
                await asyncio.to_thread(recorder.wait_for, name, "accepted", within_s)

    # -- revocations ----------------------------------------------------------------------------------------------

    async def revoke(self, name: str, *, via: str | None = None) -> Revocation:
        """Revoke a token by a region's admin API (default: the primary's). Raises nothing: `problem` says why not."""
        region = self.cluster.file.primary if via is None else via
        body = {"token": self.tokens[name], "id": f"{name}-{uuid.uuid4().hex[:12]}", "reason": "fault test"}
        noted = Revocation(
            id=body["id"], tokens=(name,), region=region, sent_mono=time.monotonic(), sent_wall=time.time()
        )
        self.ledger.revocations.append(noted)
        try:
            reply = await self.callers[region].admin("POST", "/admin/revocations", body)
        except (httpx.HTTPError, Unexpected) as error:
            noted.problem = str(error) if isinstance(error, Unexpected) else type(error).__name__
            return noted
        if reply.status_code in (200, 202):
            receipt = reply.json()
            noted.acknowledge(receipt["durability"], receipt["position"], time.monotonic())
        else:
            noted.problem = f"HTTP {reply.status_code}"
        return noted

    async def revoke_all(self, names: Sequence[str], *, via: str | None = None) -> list[Revocation]:
        """Revoke many, some of them at once."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> Revocation:
            async with gate:
                return await self.revoke(name, via=via)

        return list(await asyncio.gather(*map(one, names)))

    async def read_receipts(self, *, via: str | None = None) -> list[Revocation]:
        """Ask again for what is not yet known to be replicated; returns what still is not."""
        caller = self.callers[self.cluster.file.primary if via is None else via]
        for noted in self.ledger.revocations:
            if noted.acknowledged_mono is not None and (noted.replicated_mono is None or noted.appended_wall is None):
                reply = await caller.admin("GET", f"/admin/revocations/{noted.id}")
                if reply.status_code == 200:
                    receipt = reply.json()
                    noted.acknowledge(receipt["durability"], receipt["position"], time.monotonic())
                    noted.appended_wall = receipt["at_ms"] / 1000
        return [each for each in self.ledger.revocations if each.acknowledged_mono and not each.replicated_mono]

    async def replicated_everywhere(self, within_s: float = REPLICATED_WITHIN_S) -> None:
        """Until every receipt says *replicated*: what was pending through a fault, too, once it is healed."""
        deadline = time.monotonic() + within_s
        while pending := await self.read_receipts():
            assert time.monotonic() < deadline, f"still pending: {pending[:3]}"
            await asyncio.sleep(0.2)

    def log_ids(self, region: str | None = None) -> set[str]:
        """The ids in the log of a region's server (default: the primary's)."""
        return set(self.log_list(region))

    def log_list(self, region: str | None = None) -> list[str]:
        """The same in the log's order, each as often as it stands there."""
        urls = self.cluster.file.regions[self.cluster.file.primary if region is None else region]
        bound = bound_connection_kwargs(urls.bind_address)
        with redis.Redis.from_url(urls.verifier_redis_url, driver_info=None, **bound) as client:
            return [_id_of(fields) for _, fields in client.xrange(LOG_KEY)]

    # -- faults and load ------------------------------------------------------------------------------------------

    @contextmanager
    def fault(self, kind: str, target: str) -> Iterator[None]:
        """Notes in the ledger how long something was broken; what is broken, the caller does inside."""
        noted = Fault(kind=kind, target=target, began_mono=time.monotonic())
        self.ledger.faults.append(noted)
        try:
            yield
        finally:
            noted.ended_mono = time.monotonic()

    @contextmanager
    def stopped(self, child: str) -> Iterator[None]:
        """A process of the cluster stands still (SIGSTOP), its sockets open."""
        with self.fault("stopped", child):
            process = self.cluster.child(child)
            process.send_signal(signal.SIGSTOP)
            try:
                yield
            finally:
                process.send_signal(signal.SIGCONT)

    @contextmanager
    def asleep(self, region: str) -> Iterator[Recorder]:
        """A region's verifier stands still (SIGSTOP); of tokens that are new it hears when it wakes up."""
        recorder, known = self.recorders.pop(region), set(self.tokens)
        with self.fault("stopped", recorder.id):
            recorder.send_signal(signal.SIGSTOP)
            try:
                yield recorder
            finally:
                recorder.send_signal(signal.SIGCONT)
                self.recorders[region] = recorder
                for name in self.tokens.keys() - known:
                    recorder.watch(name, self.tokens[name])

    @asynccontextmanager
    async def load(
        self, names: Sequence[str], *, every_s: float = 0.05, regions: Sequence[str] | None = None
    ) -> AsyncIterator[None]:
        """Order services are asked for these tokens in turn, and the ledger keeps their answers.

        By default every region's. One that is started again denies until it has read the log, so a region that dies and
        returns is left out, as a balancer would that asks for readiness.
        """
        tasks = [asyncio.create_task(self._load(region, names, every_s)) for region in regions or self.regions]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _load(self, region: str, names: Sequence[str], every_s: float) -> None:
        for name in itertools.cycle(names):
            sent = time.monotonic()
            try:
                status = await self.callers[region].order_status(self.tokens[name])
            except httpx.HTTPError:
                status = None
            self.ledger.requests.append(
                Request(
                    token=name,
                    region=region,
                    sent_mono=sent,
                    answered_mono=time.monotonic(),
                    answered_wall=time.time(),
                    status=status,
                )
            )
            await asyncio.sleep(every_s)

    # -- the end --------------------------------------------------------------------------------------------------

    def witnesses(self) -> list[Witness]:
        """What every recorder has told, also those that were killed."""
        running = self.recorders.values()
        return [
            Witness(
                id=each.id,
                region=each.region,
                started_mono=0.0 if each.started is None else each.started.mono,
                runs=each.runs,
                at_end=each in running and each.region not in self.cut_off,
            )
            for each in (*self.retired, *running)
        ]

    async def settle(self, counted: Collection[Durability] = REPLICATED, within_s: float = ENFORCED_WITHIN_S) -> None:
        """Wait until what counts is enforced, then until all of it was looked at once more. Decides nothing."""
        names = {name for revocation, _ in self.ledger.counted(counted) for name in revocation.tokens}
        connected = [each for region, each in self.recorders.items() if region not in self.cut_off]
        await self._until(lambda: all(_refused(each, name) for each in connected for name in names), within_s)
        settled = self.ledger.settled_mono = time.monotonic()
        await self._until(lambda: all(_seen(each, name, settled) for each in connected for name in names), within_s)

    async def _until(self, done: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not done() and time.monotonic() < deadline:
            for recorder in self.recorders.values():
                await asyncio.to_thread(recorder.report)
            await asyncio.sleep(0.05)

    async def violations(
        self,
        counted: Collection[Durability] = REPLICATED,
        *,
        log_region: str | None = None,
        within_s: float = ENFORCED_WITHIN_S,
    ) -> list[Violation]:
        """What every checker finds, after `settle`; `log_region` is where the primary is at the end."""
        await self.settle(counted, within_s)
        for recorder in self.recorders.values():
            await asyncio.to_thread(recorder.report)
        log_ids = await asyncio.to_thread(self.log_ids, log_region)
        witnesses, ledger = self.witnesses(), self.ledger
        bounds = {name: float(self._settings.get(name, 5.0)) for name in ("max_staleness_s", "max_skew_s")}
        checkers: list[Checker] = [
            AcknowledgedNotLost(witnesses, ledger, log_ids, counted),
            NeverUnrevoked(witnesses, ledger, counted),
            FreshNotFooled(witnesses, ledger, counted=counted, **bounds),
            NoValidRequestFailed(witnesses, ledger),
        ]
        return [violation for checker in checkers for violation in checker.check()]

    async def assert_promises(
        self, counted: Collection[Durability] = REPLICATED, *, log_region: str | None = None
    ) -> None:
        """Acknowledged and lost 0, fresh and fooled 0, un-revoked 0, valid and refused 0; and all was looked at."""
        found = await self.violations(counted, log_region=log_region)
        shown = "\n".join(map(str, found[:10]))
        assert set(tally(found).values()) == {0}, f"{tally(found)}\n{shown}"
        self.cluster.check()


def _id_of(fields: Mapping[bytes, bytes]) -> str:
    """An entry's id, and something of it where it is unreadable."""
    try:
        return Entry.decode(fields).id
    except FormatError:
        return fields.get(b"id", b"").decode("utf-8", "replace")


def _refused(recorder: Recorder, name: str) -> bool:
    run = recorder.latest(name)
    return run is not None and run.verdict in ("revoked", "invalid")


def _seen(recorder: Recorder, name: str, since_mono: float) -> bool:
    run = recorder.latest(name)
    return run is not None and run.last_mono >= since_mono
