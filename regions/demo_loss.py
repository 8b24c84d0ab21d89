"""The demo's second half: the primary's region dies with everything in it, and nothing that was acknowledged is lost.

Under steady load in the other regions: the region's links are cut and its processes killed in the same moment; another
region is promoted; revocations go on; the region comes back as a replica.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from regions.access import Caller, Callers, Unexpected, expect
from regions.cluster import Cluster
from regions.console import Reporter
from regions.errors import NotReady

__all__ = ["RegionLoss"]

BEFORE = 30
"""Revocations that are acknowledged before the death, a third in each region."""

LOAD_PAUSE_S = 0.02
WRITES_WITHIN_S = 180.0
SETTLED_WITHIN_S = 60.0
POLL_S = 0.1


@dataclass
class Load:
    """Requests with valid tokens, again and again, in the regions that stay."""

    callers: list[Caller]
    token: str
    answers: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        await asyncio.gather(*(self._ask(caller) for caller in self.callers))

    async def _ask(self, caller: Caller) -> None:
        while True:
            try:
                self.answers[str(await caller.order_status(self.token))] += 1
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
            await asyncio.sleep(LOAD_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Revoked:
    """A token that was revoked, and the id that its receipt names."""

    token: str
    entry_id: str


class RegionLoss:
    """The steps, over a running cluster with Sentinels."""

    def __init__(self, cluster: Cluster, callers: Callers, reporter: Reporter) -> None:
        self.cluster = cluster
        self.callers = callers
        self.report = reporter
        self.dying = callers.home
        self.staying = [caller for caller in callers.all if caller is not callers.home]
        self.died_at = 0.0

    async def run(self) -> None:
        self.report.title(f"7  {self.dying.region}, the primary's region, dies under load")
        acknowledged = await self.acknowledge()
        valid = await self.staying[0].client_token("worker", scope="orders:read")
        load = Load(self.staying, valid)
        loading = asyncio.create_task(load.run())
        try:
            await asyncio.sleep(1.0)
            pending = await self.die()
            leader = await self.writes_back()
            await self.reaches_survivors(leader)
            await self.still_enforced(acknowledged, leader)
            await self.settled(pending, "pending receipts of the outage turned replicated")
            await self.back(acknowledged)
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        total, bad = load.answers.total(), {what: n for what, n in load.answers.items() if what != "200"}
        where = " and ".join(caller.region for caller in self.staying)
        named = f"; not accepted: {bad}" if bad else ""
        self.report.check(not bad, f"{total:,} requests with a valid token meanwhile in {where}: none refused{named}")

    # -- steps ----------------------------------------------------------------------------------------------------

    async def acknowledge(self) -> list[Revoked]:
        """Revoke in every region, and keep those that were acknowledged `replicated`."""
        with self.report.step(f"{BEFORE} revocations in every region, acknowledged before it"):
            revoked = []
            for number in range(BEFORE):
                caller = self.callers.all[number % len(self.callers.all)]
                token = await caller.client_token("worker", scope="orders:read")
                receipt = expect("revoke", await caller.admin("POST", "/admin/revocations", {"token": token}), 200, 202)
                if receipt["durability"] == "replicated":
                    revoked.append(Revoked(token, receipt["id"]))
        self.report.check(len(revoked) > 0, f"{len(revoked)} of {BEFORE} receipts say replicated")
        return revoked

    async def die(self) -> list[Revoked]:
        """Cut the links and kill everything; a revocation in each region that stays is stored all the same."""
        tokens = [await caller.client_token("worker", scope="orders:read") for caller in self.staying]
        await asyncio.to_thread(self.cluster.kill_region, self.dying.region)
        self.died_at = time.monotonic()
        self.report.check(True, f"{self.dying.region}: links cut and every process killed")
        stored = []
        for caller, token in zip(self.staying, tokens, strict=True):
            receipt = expect("revoke", await caller.admin("POST", "/admin/revocations", {"token": token}), 200, 202)
            stored.append(Revoked(token, receipt["id"]))
        self.report.check(True, f"{len(stored)} revocations without a primary: stored, receipts pending")
        return stored

    async def writes_back(self) -> str:
        """Revoke until a receipt says replicated; the new primary's region."""
        caller = self.staying[0]
        with self.report.step("the Sentinels promote another region, the keepers bring its log up to date"):
            while True:
                body = {"kind": "jti", "value": f"probe-{time.monotonic_ns()}"}
                receipt = await self._tried(caller, body)
                if receipt is not None and receipt["durability"] == "replicated":
                    break
                if time.monotonic() > self.died_at + WRITES_WITHIN_S:
                    raise NotReady(f"no revocation is acknowledged {WRITES_WITHIN_S:.0f} s after the death")
        took_s = time.monotonic() - self.died_at
        leader = None
        while leader is None:
            leader = await asyncio.to_thread(self.cluster.sentinels.primary)
        self.report.check(True, f"{leader.name} promoted; revocations are acknowledged {took_s:.1f} s after the death")
        return leader.name

    async def _tried(self, caller: Caller, body: dict[str, Any]) -> Any:
        try:
            return expect("revoke", await caller.admin("POST", "/admin/revocations", body), 200, 202)
        except (Unexpected, httpx.HTTPError):
            await asyncio.sleep(POLL_S)
            return None

    async def reaches_survivors(self, leader: str) -> None:
        """A revocation in the new primary's region, and when it is enforced."""
        caller = self.callers[leader]
        token = await caller.client_token("worker", scope="orders:read")
        watching = [asyncio.create_task(c.first_refusal(token, SETTLED_WITHIN_S)) for c in self.staying]
        await asyncio.gather(*(c.order_status(token) for c in self.staying))
        sent_at = time.time()
        receipt = expect("revoke", await caller.admin("POST", "/admin/revocations", {"token": token}), 200, 202)
        refused = await asyncio.gather(*watching)
        rows = [
            [c.region, f"{self.cluster.topology.one_way_ms(leader, c.region):.0f} ms", _ms(at, sent_at)]
            for c, at in zip(self.staying, refused, strict=True)
        ]
        title = f"a revocation in {leader}: receipt {receipt['durability']}"
        self.report.table(title, ["region", "link", "until refused"], rows)
        self.report.check(None not in refused, "it reaches every region that is left")

    async def still_enforced(self, acknowledged: list[Revoked], leader: str) -> None:
        """Nothing that was acknowledged before the death is lost."""
        lost = 0
        for revoked in acknowledged:
            statuses = await asyncio.gather(*(caller.order_status(revoked.token) for caller in self.staying))
            lost += set(statuses) != {401}
        await self.settled(acknowledged, f"and all of them are in the log of {leader}, held by a majority")
        self.report.check(lost == 0, f"{len(acknowledged)} acknowledged before the death: {lost} lost")

    async def settled(self, revoked: list[Revoked], text: str) -> None:
        """Wait until the receipts of all of these say replicated."""
        caller, left = self.staying[0], list(revoked)
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while left and time.monotonic() < deadline:
            left = [one for one in left if not await self._is_replicated(caller, one)]
            if left:
                await asyncio.sleep(POLL_S)
        self.report.check(not left, text if not left else f"{text}: {len(left)} of {len(revoked)} are still pending")

    async def _is_replicated(self, caller: Caller, revoked: Revoked) -> bool:
        reply = await caller.admin("GET", f"/admin/revocations/{revoked.entry_id}")
        return reply.status_code == 200 and reply.json()["durability"] == "replicated"

    async def back(self, acknowledged: list[Revoked]) -> None:
        """The region returns on new machines, with its keeper's disk, as a replica."""
        with self.report.step(f"{self.dying.region} returns behind a closed address, as a replica"):
            await asyncio.to_thread(self.cluster.return_region, self.dying.region)
            fresh = await self._gets_fresh()
        self.report.check(fresh, f"{self.dying.region} follows, and its verifier is fresh")
        statuses = [await self.dying.order_status(revoked.token) for revoked in acknowledged]
        self.report.check(set(statuses) == {401}, f"it refuses all {len(acknowledged)} too")

    async def _gets_fresh(self) -> bool:
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while time.monotonic() < deadline:
            if (await self.dying.verifier_status())["fresh"]:
                return True
            await asyncio.sleep(POLL_S)
        return False


def _ms(at: float | None, since: float) -> str:
    return "—" if at is None else f"{(at - since) * 1000:.0f} ms"
