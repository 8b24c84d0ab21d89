"""How long a revocation waits for its receipt `replicated`, by the region that takes it, on the default topology.

    python -m benchmarks.receipts [--revocations 100] [--json]

Milliseconds from the request to the answer, the caller being in the same region. Goal, in the primary's region: p50 at
most the round trip to the nearest other region + 30 ms. `nearest_rtt_ms` is that of the configured links.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from benchmarks.tools import Rows, distribution, options, run_cluster, show
from regions.access import Caller, Callers, expect
from regions.cluster import Cluster


async def _latencies(caller: Caller, revocations: int) -> list[float]:
    expect("keys", await caller.admin("GET", "/admin/keys"), 200)
    found = []
    for _ in range(revocations):
        body = {"kind": "jti", "value": str(uuid.uuid4())}
        started = time.perf_counter()
        receipt = expect("revoke", await caller.admin("POST", "/admin/revocations", body), 200, 202)
        found.append((time.perf_counter() - started) * 1000)
        if receipt["durability"] != "replicated":
            raise RuntimeError("a receipt was pending")
    return found


async def measure(cluster: Cluster, revocations: int) -> Rows:
    topology, home = cluster.topology, cluster.topology.primary.name
    others = [region.name for region in topology.regions if region.name != home]
    rtts = [topology.one_way_ms(home, other) + topology.one_way_ms(other, home) for other in others]
    async with Callers(cluster.file) as callers:
        await _latencies(callers.home, 5)
        return {
            caller.region: {**distribution(await _latencies(caller, revocations)), "nearest_rtt_ms": min(rtts)}
            for caller in callers.all
        }


def main() -> None:
    arguments = options(__doc__, revocations=100)
    with run_cluster() as cluster:
        rows = asyncio.run(measure(cluster, arguments.revocations))
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
