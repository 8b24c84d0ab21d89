"""Confirmed staleness of verifiers in an idle, healthy cluster, and what an idle verifier costs.

    python -m benchmarks.staleness [--seconds 60] [--json]

`status()` of one verifier a region, each in a process of its own, asked every 20 ms. Goals: p99 at most three times the
largest one-way lag + three beats (870 ms on the default topology); an idle verifier takes at most 0.7 % of a core
(asked for its status once a second meanwhile).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import msgspec

from benchmarks.tools import Rows, distribution, options, run_cluster, show
from regions.cluster import AUDIENCE, Cluster
from verifier import Verifier

BEAT_MS = 200.0
SAMPLE_S = 0.02
FRESH_WITHIN_S = 20.0


def watch() -> None:
    """One verifier's process: settings and seconds on stdin; staleness in ms, None where not fresh, and CPU seconds."""
    job = msgspec.json.decode(sys.stdin.readline())
    with Verifier(**job["settings"]) as verifier:
        deadline = time.monotonic() + FRESH_WITHIN_S
        while not verifier.status().fresh and time.monotonic() < deadline:
            time.sleep(0.05)
        print("ready", flush=True)
        sys.stdin.readline()
        cpu, started = time.process_time(), time.monotonic()
        while time.monotonic() < started + job["idle_s"]:
            time.sleep(1.0)
            verifier.status()
        cpu_share = (time.process_time() - cpu) / (time.monotonic() - started)
        samples = []
        ends = time.monotonic() + job["seconds"]
        while time.monotonic() < ends:
            status = verifier.status()
            samples.append(status.staleness_s * 1000 if status.fresh and status.staleness_s is not None else None)
            time.sleep(SAMPLE_S)
    print(msgspec.json.encode({"samples": samples, "cpu_share": cpu_share}).decode(), flush=True)


def _start(cluster: Cluster, region: str, seconds: int) -> subprocess.Popen[str]:
    urls = cluster.file.regions[region]
    settings = {
        "issuer": cluster.file.issuer,
        "audience": AUDIENCE,
        "jwks_urls": [f"{urls.keyservice_url}/.well-known/jwks.json"],
        "redis_url": urls.verifier_redis_url,
        "source_address": urls.bind_address,
        "region": region,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "from benchmarks.staleness import watch; watch()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    job = {"settings": settings, "seconds": seconds, "idle_s": seconds / 3}
    process.stdin.write(msgspec.json.encode(job).decode() + "\n")
    process.stdin.flush()
    return process


def measure(cluster: Cluster, seconds: int) -> Rows:
    regions = [region.name for region in cluster.topology.regions]
    processes = {region: _start(cluster, region, seconds) for region in regions}
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdin is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("a verifier did not start")
        process.stdin.write("go\n")
        process.stdin.flush()
    rows: Rows = {}
    largest_ms = max(cluster.topology.links.values())
    for region, process in processes.items():
        out, _ = process.communicate(timeout=4 * seconds + 60)
        found = msgspec.json.decode(out)
        fresh = [sample for sample in found["samples"] if sample is not None]
        rows[region] = {
            **distribution(fresh),
            "not fresh": len(found["samples"]) - len(fresh),
            "goal p99": 3 * largest_ms + 3 * BEAT_MS,
            "idle % of core": found["cpu_share"] * 100,
        }
    return rows


def main() -> None:
    arguments = options(__doc__, seconds=60)
    with run_cluster() as cluster:
        rows = measure(cluster, arguments.seconds)
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
