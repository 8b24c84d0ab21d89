"""How long a revoked token lives: from the append on the primary to the first refusal in each region.

    python -m benchmarks.revocation_lag [--revocations 200] [--json]

Starts the default topology, and one recording verifier a region in a process of its own, which asks `verify` for the
token under test about every half millisecond. Lag = the first refusal - the append (the primary's clock; one machine,
one clock). The append's time has whole milliseconds, rounded down, so the lag is overstated by half of one on average.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from regions.access import Callers, expect
from regions.cluster import AUDIENCE, SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import load_topology
from verifier import RevokedToken, Verifier

POLL_S = 0.0005
GIVE_UP_S = 10.0


def watch() -> None:
    """One region's recording verifier: settings on the first line of stdin, then a token a line."""
    settings = msgspec.json.decode(sys.stdin.readline())
    with Verifier(**settings) as verifier:
        if not verifier.wait_ready(10):
            sys.exit(f"the verifier did not become ready: {verifier.status().problem}")
        print("ready", flush=True)
        for line in sys.stdin:
            print(_first_refusal(verifier, line.strip()), flush=True)


def _first_refusal(verifier: Verifier, token: str) -> float:
    verifier.verify(token)
    print("accepted", flush=True)
    deadline = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        try:
            verifier.verify(token)
        except RevokedToken:
            return time.time()
        time.sleep(POLL_S)
    return float("nan")


class Watcher:
    """A recording verifier's process."""

    def __init__(self, cluster: Cluster, region: str) -> None:
        urls = cluster.file.regions[region]
        settings = {
            "issuer": cluster.file.issuer,
            "audience": AUDIENCE,
            "jwks_urls": [f"{urls.keyservice_url}/.well-known/jwks.json"],
            "redis_url": urls.verifier_redis_url,
            "source_address": urls.bind_address,
            "region": region,
        }
        self.region = region
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.revocation_lag import watch; watch()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.send(msgspec.json.encode(settings))
        self.expect("ready")

    def send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def receive(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def expect(self, word: str) -> None:
        if (line := self.receive()) != word:
            raise RuntimeError(f"{self.region}: expected {word!r}, got {line!r}")

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(5)


async def _revoke_all(cluster: Cluster, watchers: list[Watcher], revocations: int) -> dict[str, list[float]]:
    lags: dict[str, list[float]] = {watcher.region: [] for watcher in watchers}
    async with Callers(cluster.file) as callers:
        for number in range(revocations):
            token = await callers.home.client_token("worker", scope="orders:read")
            for watcher in watchers:
                watcher.send(token.encode())
            for watcher in watchers:
                watcher.expect("accepted")
            receipt = expect(
                "revoke", await callers.home.admin("POST", "/admin/revocations", {"token": token}), 200, 202
            )
            refused = [float(await asyncio.to_thread(watcher.receive)) for watcher in watchers]
            entry = expect("receipt", await callers.home.admin("GET", f"/admin/revocations/{receipt['id']}"), 200)
            for watcher, at in zip(watchers, refused, strict=True):
                lags[watcher.region].append(at * 1000 - entry["at_ms"])
            if number % 50 == 49:
                print(f"  {number + 1} of {revocations}", file=sys.stderr)
    return lags


def measure(revocations: int) -> dict[str, dict[str, float]]:
    """Region to its link's one-way lag and the distribution of revocation lag over it, in milliseconds."""
    topology = load_topology("default")
    topology = topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    with tempfile.TemporaryDirectory() as directory, Cluster(topology, Path(directory)) as cluster:
        watchers = [Watcher(cluster, region.name) for region in topology.regions]
        try:
            lags = asyncio.run(_revoke_all(cluster, watchers, revocations))
        finally:
            for watcher in watchers:
                watcher.close()
    return {region: _summary(topology.one_way_ms(topology.primary.name, region), lags[region]) for region in lags}


def _summary(link_ms: float, lags_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(lags_ms, n=100, method="inclusive")
    over = {"p50": cuts[49] - link_ms, "p95": cuts[94] - link_ms, "p99": cuts[98] - link_ms}
    return {
        "link_ms": link_ms,
        "count": len(lags_ms),
        **{f"{name}_over_link_ms": value for name, value in over.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revocations", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.revocations)
    if arguments.json:
        print(msgspec.json.encode(result).decode())
        return
    print(f"{'region':16} {'link ms':>8} {'revocations':>12} {'p50 over':>9} {'p95 over':>9} {'p99 over':>9}")
    for region, row in result.items():
        overs = " ".join(f"{row[f'{name}_over_link_ms']:9.1f}" for name in ("p50", "p95", "p99"))
        print(f"{region:16} {row['link_ms']:8.0f} {row['count']:12.0f} {overs}")


if __name__ == "__main__":
    main()
