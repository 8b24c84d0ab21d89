"""The main job on real servers, line by line: log in, accepted everywhere, log out, refused everywhere, and how fast.

Every line is a check; the demo has succeeded only if all of them held.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio

from regions.access import Caller, Callers, Unexpected, expect
from regions.cluster import Cluster
from regions.console import Reporter
from regions.demo_loss import RegionLoss
from regions.errors import NotReady
from regions.topology import Topology
from verifier.netbind import bound_connection_kwargs

__all__ = ["run_demo"]

REFUSED_WITHIN_S = 60.0
REPLICATED_WITHIN_S = 60.0
VERIFICATIONS = 10_000
WORKERS = 8
ROTATION_WITHIN_S = 120.0
SAME_WITHIN_S = 60.0
FRESH_WITHIN_S = 60.0
IDLE_S = 3.0
MEASURED_MAX = 3
"""The background is uneven, most of all on a busy machine: what verifying causes would show in every measurement."""


class Demo:
    """The steps, over a running cluster."""

    def __init__(self, cluster: Cluster, callers: Callers, reporter: Reporter) -> None:
        self.topology: Topology = cluster.topology
        self.callers = callers
        self.report = reporter
        remote = [caller for caller in callers.all if caller is not callers.home]
        self.far = remote[0] if remote else callers.home

    async def run(self) -> None:
        await self.log_in_and_out()
        await self.subject()
        await self.no_calls()
        await self.rotation()
        await self.old_tokens()

    # -- steps ----------------------------------------------------------------------------------------------------

    async def log_in_and_out(self) -> None:
        self.report.title("1  Log in, accepted everywhere")
        with self.report.step("password checked by the login service, session opened by the key service"):
            tokens = await self.callers.home.log_in()
        await self.accepted("the token", tokens.access_token)
        await self.same_key_set()
        await self.ages()
        self.report.title(f"2  Log out in {self.far.region}, refused everywhere")
        await self.revoke("the session", tokens.access_token, "DELETE", f"/admin/sessions/{tokens.sid}")

    async def subject(self) -> None:
        self.report.title(f"3  Revoke a whole subject in {self.far.region}, then sign in again")
        tokens = [await self.callers.home.log_in() for _ in range(2)]
        body = {"kind": "sub", "value": self.callers.cluster.demo_user.sub, "reason": "stolen laptop"}
        await self.revoke("the subject's session", tokens[0].access_token, "POST", "/admin/revocations", body)
        statuses = [await caller.order_status(tokens[1].access_token) for caller in self.callers.all]
        self.report.check(set(statuses) == {401}, "the subject's other session is refused in every region too")
        again = await self.callers.home.log_in()
        await self.accepted("a log-in right after it", again.access_token)

    async def no_calls(self) -> None:
        self.report.title(f"4  What {VERIFICATIONS:,} verifications ask of the key service and the primary")
        tokens = [(await self.callers.home.log_in()).access_token for _ in range(WORKERS)]
        await asyncio.sleep(1.0)  # let the log-ins' own traffic pass
        rounds = [await self.idle_and_verifying(tokens)]
        while rounds[-1].grew and len(rounds) < MEASURED_MAX:
            rounds.append(await self.idle_and_verifying(tokens))
        measured, asked = rounds[-1], VERIFICATIONS * len(rounds)
        self.report.check(not any(each.refused for each in rounds), f"{asked:,} of {asked:,} accepted")
        self.report.check(
            measured.busy.requests == 0 and not measured.grew,
            f"requests to key services: {measured.busy.requests * measured.took_s:.0f}; the background did not grow"
            f" ({measured.grew_s:+.1f} a second, tolerated {measured.tolerated_s:.0f})",
        )

    async def idle_and_verifying(self, tokens: list[str]) -> Measured:
        """One measurement, shown as a table."""
        before, started = await self.traffic(), time.monotonic()
        await asyncio.sleep(IDLE_S)
        between, verifying = await self.traffic(), time.monotonic()
        with self.report.step(f"{VERIFICATIONS:,} requests to the order services of every region"):
            refused = await self.verifications(tokens)
        after, took_s = await self.traffic(), time.monotonic() - verifying
        idle, busy = (between - before).per_second(verifying - started), (after - between).per_second(took_s)
        rows = [
            [name, f"{quiet:.1f}", f"{loud:.1f}"]
            for name, quiet, loud in (
                ("key services: requests", idle.requests, busy.requests),
                ("key services: scheduled key refreshes", idle.refreshes, busy.refreshes),
                ("primary: commands (beats, tails, replicas)", idle.commands, busy.commands),
            )
        ]
        self.report.table(f"{took_s:.1f} s of verifying; per second", ["", "idle", "verifying"], rows)
        return Measured(idle, busy, took_s, refused)

    async def rotation(self) -> None:
        home = self.callers.home
        self.report.title(f"5  Rotate the signing key of {home.region}, then revoke the retired one")
        old = (await home.log_in()).access_token
        old_kid = await self.active_kid(home)
        expect("rotate", await home.admin("POST", "/admin/keys/rotate", {}), 200, 202)
        with self.report.step("the next key is published first, and signs only when every cache knows it"):
            new_kid = await self.wait_for_new_key(home, old_kid)
        new = (await home.log_in()).access_token
        self.report.check(True, f"{old_kid[:8]}… retired, {new_kid[:8]}… signs")
        await self.accepted("a token of the old key", old)
        await self.accepted("a token of the new key", new)
        body = {"kind": "kid", "value": old_kid, "reason": "retired key leaked"}
        await self.revoke("the revoked key's token", old, "POST", "/admin/revocations", body)
        await self.accepted("the new key's token, still", new)
        await self.accepted("a log-in after it", (await home.log_in()).access_token)

    async def old_tokens(self) -> None:
        self.report.title("6  Tokens from before: HS256 under JWT_SECRET")
        token = await self.callers.home.client_token("legacy", scope="orders:read")
        await self.accepted("an HS256 token of a client that has not moved yet", token)
        await self.revoke("the HS256 token", token, "POST", "/admin/revocations", {"token": token})

    # -- parts ----------------------------------------------------------------------------------------------------

    async def accepted(self, what: str, token: str) -> None:
        statuses = await asyncio.gather(*(caller.order_status(token) for caller in self.callers.all))
        bad = [caller.region for caller, status in zip(self.callers.all, statuses, strict=True) if status != 200]
        where = ", ".join(caller.region for caller in self.callers.all)
        self.report.check(not bad, f"{what}: accepted in {where}" if not bad else f"{what}: not accepted in {bad}")

    async def same_key_set(self) -> None:
        """Every region's JWKS, once the keys made at the start have reached all of them."""
        deadline = time.monotonic() + SAME_WITHIN_S
        while len({(reply := await caller.jwks()).content for caller in self.callers.all}) > 1:
            if time.monotonic() > deadline:
                self.report.check(False, f"the key sets of the regions still differ after {SAME_WITHIN_S:.0f} s")
                return
            await asyncio.sleep(0.1)
        keys = len(reply.json()["keys"])
        self.report.check(True, f"the key set of every region is the same document: {keys} keys")

    async def ages(self) -> None:
        """What each region's verifier says of the age of its revocations, and who vouches for it."""
        deadline = time.monotonic() + FRESH_WITHIN_S
        while True:
            statuses = [await caller.verifier_status() for caller in self.callers.all]
            fresh = all(status["fresh"] and status["confirmed"] for status in statuses)
            if fresh or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        rows = [
            [caller.region, _age(status["staleness_s"]), "yes" if status["fresh"] else f"no: {status['reason']}"]
            for caller, status in zip(self.callers.all, statuses, strict=True)
        ]
        self.report.table("every verifier knows how stale it is", ["region", "confirmed staleness", "fresh"], rows)
        self.report.check(fresh, "each is fresh: a majority of regions vouches for a state no older than that")

    async def revoke(self, what: str, token: str, method: str, path: str, body: object = None) -> None:
        """Revoke in the far region while every region's order service is asked again and again for the token."""
        watching = [asyncio.create_task(c.first_refusal(token, REFUSED_WITHIN_S)) for c in self.callers.all]
        before = await asyncio.gather(*(caller.order_status(token) for caller in self.callers.all))
        await self.far.admin("GET", "/admin/keys")  # an admin token is at hand, as in a service that runs
        sent_at = time.time()
        receipt = expect("revoke", await self.far.admin(method, path, body), 200, 202)
        refused_at, entry = await asyncio.gather(asyncio.gather(*watching), self.replicated(receipt["id"]))
        appended_at = entry["at_ms"] / 1000
        rows = [
            self._row(caller, at, appended_at, sent_at) for caller, at in zip(self.callers.all, refused_at, strict=True)
        ]
        columns = ["region", "link", "lag", "path link", "path lag = until refused"]
        self.report.table(f"{what}: receipt {receipt['durability']}", columns, rows)
        replicated = entry["durability"] == "replicated"
        self.report.check(replicated, f"{what}: on the disks of {_named(entry['regions'])} before it was acknowledged")
        held = set(before) == {200} and None not in refused_at
        self.report.check(held, f"{what}: accepted before, refused in every region")

    async def replicated(self, entry_id: str) -> Any:
        """The receipt: the first that says replicated, for one that is pending acknowledges nothing yet."""
        deadline = time.monotonic() + REPLICATED_WITHIN_S
        while True:
            receipt = expect("receipt", await self.far.admin("GET", f"/admin/revocations/{entry_id}"), 200)
            if receipt["durability"] == "replicated" or time.monotonic() > deadline:
                return receipt
            await asyncio.sleep(0.1)

    def _row(self, caller: Caller, refused_at: float | None, appended_at: float, sent_at: float) -> list[str]:
        home = self.topology.primary.name
        link_ms = self.topology.one_way_ms(home, caller.region)
        path_ms = self.topology.one_way_ms(self.far.region, home) + link_ms
        if refused_at is None:
            return [caller.region, f"{link_ms:.0f} ms", "—", f"{path_ms:.0f} ms", "—"]
        lag_ms, path_lag_ms = (refused_at - appended_at) * 1000, (refused_at - sent_at) * 1000
        return [caller.region, f"{link_ms:.0f} ms", f"{lag_ms:.0f} ms", f"{path_ms:.0f} ms", f"{path_lag_ms:.0f} ms"]

    async def active_kid(self, caller: Caller) -> str:
        body = expect("keys", await caller.admin("GET", "/admin/keys"), 200)
        return next(
            str(key["kid"]) for key in body["keys"] if key["region"] == caller.region and key["state"] == "active"
        )

    async def wait_for_new_key(self, caller: Caller, old_kid: str) -> str:
        deadline = time.monotonic() + ROTATION_WITHIN_S
        while time.monotonic() < deadline:
            if (kid := await self.active_kid(caller)) != old_kid:
                return kid
            await asyncio.sleep(0.25)
        raise NotReady(f"no new key signs in {caller.region} after {ROTATION_WITHIN_S:.0f} s")

    async def verifications(self, tokens: list[str]) -> int:
        """Spread the requests over regions and connections; how many were not answered 200."""
        share = VERIFICATIONS // len(tokens)

        async def worker(number: int) -> int:
            caller = self.callers.all[number % len(self.callers.all)]
            statuses = [await caller.order_status(tokens[number]) for _ in range(share)]
            return sum(status != 200 for status in statuses)

        return sum(await asyncio.gather(*(worker(number) for number in range(len(tokens)))))

    async def traffic(self) -> Traffic:
        """Requests counted by every key service, and commands counted by the primary server, so far."""
        metrics = [(await caller.http.get(f"{caller.urls.admin_url}/metrics")).text for caller in self.callers.all]
        primary = self.callers.home
        client = redis.asyncio.Redis.from_url(
            primary.urls.observer_redis_url,
            driver_info=None,
            **bound_connection_kwargs(primary.urls.bind_address, asynchronous=True),
        )
        async with client:
            commands = int((await client.info("stats"))["total_commands_processed"])
        return Traffic(
            sum(_count(text, refreshes=False) for text in metrics),
            sum(_count(text, refreshes=True) for text in metrics),
            commands,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts since the servers started, or the difference of two such, or that per second."""

    requests: float
    """To any key service, but for key refreshes and for what this demo asks of /metrics."""
    refreshes: float
    """Of the key set: every verifier does so by schedule, whether or not it verifies anything."""
    commands: float
    """At the primary server."""

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests - other.requests, self.refreshes - other.refreshes, self.commands - other.commands)

    def per_second(self, seconds: float) -> Traffic:
        return Traffic(self.requests / seconds, self.refreshes / seconds, self.commands / seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """Traffic a second without and with verifications, of which ``refused`` were not accepted."""

    idle: Traffic
    busy: Traffic
    took_s: float
    refused: int

    @property
    def grew_s(self) -> float:
        """How many more commands or key refreshes a second there were, whichever grew more."""
        caused = self.busy - self.idle
        return max(caused.refreshes, caused.commands)

    @property
    def tolerated_s(self) -> float:
        """A quarter of one for each verification."""
        return VERIFICATIONS / self.took_s / 4

    @property
    def grew(self) -> bool:
        return self.grew_s >= self.tolerated_s


def _count(metrics: str, *, refreshes: bool) -> float:
    """Requests that a key service has answered: key refreshes, or all others but those to metrics and health."""
    total = 0.0
    for line in metrics.splitlines():
        if line.startswith("keyservice_http_requests_total{"):
            own = any(path in line for path in ("/metrics", "/livez", "/readyz"))
            if not own and ("/jwks.json" in line) == refreshes:
                total += float(line.rpartition(" ")[2])
    return total


def _age(seconds: float | None) -> str:
    return "—" if seconds is None else f"{seconds * 1000:.0f} ms"


def _named(regions: dict[str, bool]) -> str:
    return ", ".join(region for region, holds in regions.items() if holds) or "nobody"


async def _run(cluster: Cluster, reporter: Reporter) -> None:
    async with Callers(cluster.file) as callers:
        await Demo(cluster, callers, reporter).run()
        if cluster.sentinels.regions:
            await RegionLoss(cluster, callers, reporter).run()


def run_demo(topology: Topology, directory: Path, reporter: Reporter) -> bool:
    """Start a cluster, run every step, stop it; True if every line held."""
    reporter.title(f"Starting {len(topology.regions)} regions on this machine")
    with Cluster(topology, directory, progress=reporter.note) as cluster:
        try:
            asyncio.run(_run(cluster, reporter))
        except (Unexpected, httpx.HTTPError, redis.RedisError) as error:
            cluster.check()  # a process that ended is the better explanation
            reporter.check(False, f"{type(error).__name__}: {error}")
        cluster.check()
        unbound = sum(cluster.link.counters().unbound.values())
        reporter.check(unbound == 0, "every connection came from a region's own address")
    return not reporter.failed
