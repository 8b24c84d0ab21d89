"""Fixtures of the tests that touch sockets and processes: each test has its own ports and its own short directory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regions.ports import pick_free_ports
from regions.topology import Topology, parse_topology
from tests.regions.link_lab import LabFactory

THREE_REGIONS = """
[[regions]]
name = "a"
primary = true
[[regions]]
name = "b"
[[regions]]
name = "c"
"""


def _topology_with(lags_ms: dict[tuple[str, str], float], *, default_ms: float = 0) -> Topology:
    links = "".join(
        f'[[links]]\nfrom = "{x}"\nto = "{y}"\none_way_ms = {lags_ms.get((x, y), default_ms)}\n'
        for x in "abc"
        for y in "abc"
        if x != y
    )
    topology = parse_topology(THREE_REGIONS + links, source="test")
    return topology.with_ports(pick_free_ports([r.address for r in topology.regions], list(topology.ports)))


@pytest.fixture(scope="session")
def topology_with() -> Callable[..., Topology]:
    """`topology_with({("a", "b"): 40}, default_ms=0)`: regions a (primary), b and c with these lags, on free ports."""
    return _topology_with


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private directory whose path leaves room for unix sockets; that of `tmp_path` does not everywhere."""
    with tempfile.TemporaryDirectory(prefix="rt-") as path:
        yield Path(path)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def lab(run_dir: Path, topology_with: Callable[..., Topology]) -> LabFactory:
    """`async with lab(server, {("b", "a"): 40}) as links`: a link proxy before `server` in region a."""
    return LabFactory(run_dir, topology_with)
