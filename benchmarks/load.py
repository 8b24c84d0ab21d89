"""The order service under load: 10,000 requests over 100 connections, with one worker and with two, in a real region.

The region is its key service, keeper and server; the token comes from the key service, and the order service is
`examples/orders_service.py`. Beside it the same endpoint without a token, and the generator against a server that only
answers: whatever is near that ceiling says more about the generator than about the service. On a machine with few cores
generator and service share them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from benchmarks.form import Figure, Measurement, Result, figure, measured, ratio
from benchmarks.generator import Load
from benchmarks.region import verifier_environment
from benchmarks.serving import Generator, generator, serve, serve_trivial
from benchmarks.tools import run_cluster
from regions.access import Callers
from regions.cluster import Cluster

__all__ = ["measure"]

REQUESTS, CONNECTIONS = 10_000, 100
ROUNDS = 7
WORKERS = (1, 2)
WANTED_PER_S = 10_000.0
CEILING = "generator alone, against a trivial server"

Loads = dict[str, list[Load]]


def measure(*, quick: bool = False) -> Result:
    requests, rounds = (REQUESTS // 20, 3) if quick else (REQUESTS, ROUNDS)
    with run_cluster("one-region") as cluster:
        authorization = f"Bearer {asyncio.run(_token(cluster))}"
        loads = _drive(verifier_environment(cluster.file), authorization, requests, rounds)
    per_second = {name: [load.per_second for load in found] for name, found in loads.items()}
    return Result(
        title=f"Load: the order service, {requests:,} requests at concurrency {CONNECTIONS}",
        measurements=measured(per_second, "1/s") + _latencies(loads),
        figures=_figures(per_second),
        notes=("Latencies are medians over the rounds of each round's percentile.",),
    )


async def _token(cluster: Cluster) -> str:
    async with Callers(cluster.file) as callers:
        return await callers.home.client_token("web")


def _named(workers: int) -> tuple[str, str]:
    suffix = f"{workers} worker{'s' if workers > 1 else ''}"
    return f"order service, {suffix}", f"no auth, {suffix}"


def _drive(environment: Mapping[str, str], authorization: str, requests: int, rounds: int) -> Loads:
    """One worker's rounds, then two workers': with all of them at once idle ones would be in the way."""
    loads: Loads = {}
    with generator() as driver:
        with serve_trivial() as port:
            loads[CEILING] = [_load(driver, port, authorization, requests) for _ in range(rounds)]
        for workers in WORKERS:
            with _pair(environment, authorization, workers) as ports:
                for port in ports.values():
                    _load(driver, port, authorization, requests)
                for _ in range(rounds):
                    for name, port in ports.items():
                        loads.setdefault(name, []).append(_load(driver, port, authorization, requests))
    return loads


def _load(driver: Generator, port: int, authorization: str, requests: int) -> Load:
    return driver.load(port, authorization, requests=requests, connections=CONNECTIONS)


@contextmanager
def _pair(environment: Mapping[str, str], authorization: str, workers: int) -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        apps = zip(_named(workers), ("orders", "orders_no_auth"), strict=True)
        yield {name: stack.enter_context(serve(app, authorization, environment, workers=workers)) for name, app in apps}


def _latencies(loads: Loads) -> tuple[Measurement, ...]:
    found: tuple[Measurement, ...] = ()
    for name, runs in loads.items():
        percentiles = {
            f"{name}, p50": [run.p50_ms for run in runs],
            f"{name}, p95": [run.p95_ms for run in runs],
            f"{name}, p99": [run.p99_ms for run in runs],
        }
        found += measured(percentiles, "ms")
    return found


def _figures(per_second: dict[str, list[float]]) -> tuple[Figure, ...]:
    figures: list[Figure] = []
    for workers in WORKERS:
        service, bare = _named(workers)
        figures.append(figure(service, per_second[service], "1/s", "higher", WANTED_PER_S))
        figures.append(ratio(f"{service} ÷ no auth", per_second[service], per_second[bare], "higher"))
    return tuple(figures)
