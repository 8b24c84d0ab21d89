"""How long writes are away after the primary's region dies: from the death to a revocation stored in the other regions.

    python -m benchmarks.failover_time [--deaths 20] [--results FILE] [--json]

Starts the default topology. In every region somebody revokes something every few milliseconds through the region's own
key service, which is not restarted. Then, again and again: the links of the primary's region are cut and all its
processes killed; the Sentinels promote another; the region comes back as a replica. A write counts as stored if it was
sent after the death and its receipt has a position, which only the primary gives.

Each death is a line of FILE; started again with the same one, those that it has are not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import msgspec

from regions.access import Caller, Callers, Unexpected
from regions.cluster import SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import load_topology

GIVE_UP_S = 60.0
STEADY_WRITES = 5
WRITE_EVERY_S = 0.01


class Death(msgspec.Struct):
    """One death: who died, who was promoted, and when each other region's writes were back, in seconds."""

    died: str
    promoted: str
    back_s: dict[str, float]

    @property
    def first_s(self) -> float:
        return min(self.back_s.values())

    @property
    def all_s(self) -> float:
        return max(self.back_s.values())


async def _store(caller: Caller, name: str) -> bool:
    """Revoke something; whether the primary stored it."""
    body = {"kind": "jti", "value": name, "reason": "benchmark"}
    try:
        reply = await caller.admin("POST", "/admin/revocations", body)
    except (httpx.HTTPError, Unexpected):  # nothing is known to be stored
        return False
    return reply.status_code in (200, 202) and reply.json().get("position") is not None


async def _first_stored(caller: Caller, name: str, since: float) -> float:
    """Seconds from `since` (monotonic) to the first write sent after it that was stored."""
    number = 0
    while time.monotonic() - since < GIVE_UP_S:
        if await _store(caller, f"{name}-{number}"):
            return time.monotonic() - since
        number += 1
        await asyncio.sleep(WRITE_EVERY_S)
    return float("inf")


async def _one_death(cluster: Cluster, callers: Callers, name: str) -> Death:
    primary = await asyncio.to_thread(cluster.sentinels.primary)
    if primary is None:
        raise RuntimeError("the Sentinels are not settled on a primary")
    others = [caller for caller in callers.all if caller.region != primary.name]
    for caller in others:  # connections are open, scripts are loaded
        await asyncio.gather(
            *(_first_stored(caller, f"{name}-warm-{n}", time.monotonic()) for n in range(STEADY_WRITES))
        )
    killing = asyncio.create_task(asyncio.to_thread(cluster.kill_region, primary.name))
    since = time.monotonic()
    await killing
    took = await asyncio.gather(*(_first_stored(caller, f"{name}-{caller.region}", since) for caller in others))
    now = await asyncio.to_thread(_settled, cluster, primary.name)
    await asyncio.to_thread(cluster.return_region, primary.name)
    return Death(primary.name, now, dict(zip((caller.region for caller in others), took, strict=True)))


def _settled(cluster: Cluster, died: str) -> str:
    deadline = time.monotonic() + GIVE_UP_S
    while (found := cluster.sentinels.primary()) is None or found.name == died:
        if time.monotonic() > deadline:
            return "nobody"
        time.sleep(0.05)
    return found.name


async def _measure(deaths: int, results: Path) -> None:
    done = len(_read(results))
    topology = load_topology("default")
    topology = topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    with tempfile.TemporaryDirectory() as directory, Cluster(topology, Path(directory)) as cluster:
        async with Callers(cluster.file) as callers:
            for number in range(done, deaths):
                death = await _one_death(cluster, callers, f"{number}")
                with results.open("ab") as file:
                    file.write(msgspec.json.encode(death) + b"\n")
                took = ", ".join(f"{region} {back_s:.2f} s" for region, back_s in death.back_s.items())
                print(f"  {number + 1} of {deaths}: {death.died} died, {death.promoted}; {took}", file=sys.stderr)


def _read(results: Path) -> list[Death]:
    if not results.exists():
        return []
    return [msgspec.json.decode(line, type=Death) for line in results.read_bytes().splitlines()]


def _summary(deaths: list[Death]) -> dict[str, dict[str, float]]:
    def spread(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        p90 = ordered[min(len(ordered) - 1, round(0.9 * len(ordered)))]
        return {"min_s": ordered[0], "p50_s": statistics.median(ordered), "p90_s": p90, "max_s": ordered[-1]}

    return {
        "first other region": spread([death.first_s for death in deaths]),
        "every other region": spread([death.all_s for death in deaths]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--results", type=Path, help="keep the measured deaths here, and go on from those it has")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = arguments.results or Path(directory) / "deaths.jsonl"
        if len(_read(results)) < arguments.deaths:
            asyncio.run(_measure(arguments.deaths, results))
        deaths = _read(results)[: arguments.deaths]
    summary = _summary(deaths)
    if arguments.json:
        print(msgspec.json.encode({"deaths": len(deaths), **summary}).decode())
        return
    print(f"{'writes back in the':20} {'deaths':>6} {'min s':>7} {'p50 s':>7} {'p90 s':>7} {'max s':>7}")
    for name, row in summary.items():
        print(f"{name:20} {len(deaths):6} " + " ".join(f"{row[column]:7.2f}" for column in row))


if __name__ == "__main__":
    main()
