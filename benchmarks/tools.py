"""What the benchmarks share: a cluster or a server of their own, distributions, and one way to print."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import redis

from regions.cluster import SERVICES, Cluster
from regions.embedded import find_server, wait_ready
from regions.ports import pick_free_ports
from regions.topology import load_topology

__all__ = ["Rows", "distribution", "options", "run_cluster", "run_server", "show"]

Rows = dict[str, dict[str, float]]


@contextmanager
def run_cluster(name: str = "default") -> Iterator[Cluster]:
    """A cluster on free ports, gone afterwards."""
    topology = load_topology(name)
    topology = topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    with tempfile.TemporaryDirectory() as directory, Cluster(topology, Path(directory)) as cluster:
        yield cluster


@contextmanager
def run_server(*arguments: str) -> Iterator[Path]:
    """The embedded server alone, without persistence; gives its unix socket."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        uds = Path(directory) / "redis.sock"
        command = [str(find_server().path), "--port", "0", "--unixsocket", str(uds), "--save", "", *arguments]
        process = subprocess.Popen([*command, "--dir", directory], stdout=subprocess.DEVNULL)
        try:
            wait_ready(uds, "default", "", 10)
            yield uds
        finally:
            process.terminate()
            process.wait(10)


def client_of(uds: Path) -> redis.Redis:
    """A client of :func:`run_server`'s server."""
    return redis.Redis(unix_socket_path=str(uds), driver_info=None)


def distribution(samples: Sequence[float]) -> dict[str, float]:
    """Count, p50, p95, p99 and the largest."""
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {"count": len(samples), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(samples)}


def options(doc: str | None, **numbers: int) -> argparse.Namespace:
    """`--json`, and an option for each number with its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def show(rows: Rows, *, as_json: bool) -> None:
    """A table with one row a name, or one JSON object."""
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"{'':34}" + "".join(f"{column:>22}" for column in columns))
    for name, row in rows.items():
        cells = "".join(f"{row[column]:22,.2f}" if column in row else " " * 22 for column in columns)
        print(f"{name:34}{cells}")
