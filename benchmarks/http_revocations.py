"""Single revocations over HTTP at one worker, beside the same route with an empty body in the same run.

    python -m benchmarks.http_revocations [--requests 3000] [--concurrency 32] [--rounds 7] [--json]

A region of its own, with its keeper in the same process: every 200 is on the keeper's disk, appended, and confirmed.
Goal: at least 0.4 of the route's rate with an empty body, which is refused before anything is done.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx

from benchmarks.tools import Rows, options, run_cluster, show
from regions.access import Callers, expect
from regions.cluster import Cluster


async def _rate(http: httpx.AsyncClient, url: str, body: Callable[[], Any], requests: int, concurrency: int) -> float:
    left = requests
    statuses: set[int] = set()

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            statuses.add((await http.post(url, json=body())).status_code)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    if len(statuses) != 1:
        raise RuntimeError(f"not one answer but {sorted(statuses)}")
    return requests / (time.perf_counter() - started)


async def measure(cluster: Cluster, requests: int, concurrency: int, rounds: int) -> Rows:
    async with Callers(cluster.file) as callers:
        home = callers.home
        expect("keys", await home.admin("GET", "/admin/keys"), 200)
        token = await home.client_token("admin", scope="keyservice:admin")
        url = f"{home.urls.admin_url}/admin/revocations"
        headers = {"Authorization": f"Bearer {token}"}
        transport = httpx.AsyncHTTPTransport(local_address=home.urls.bind_address)
        ways: dict[str, Callable[[], Any]] = {
            "empty body": dict,
            "revocation": lambda: {"kind": "jti", "value": str(uuid.uuid4())},
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        async with httpx.AsyncClient(transport=transport, headers=headers, trust_env=False, timeout=30) as http:
            for _ in range(rounds):
                for name, body in ways.items():
                    rates[name].append(await _rate(http, url, body, requests // rounds, concurrency))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {name: {"requests/s": rate, "of empty": rate / medians["empty body"]} for name, rate in medians.items()}


def main() -> None:
    arguments = options(__doc__, requests=3_000, concurrency=32, rounds=7)
    with run_cluster("one-region") as cluster:
        rows = asyncio.run(measure(cluster, arguments.requests, arguments.concurrency, arguments.rounds))
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
