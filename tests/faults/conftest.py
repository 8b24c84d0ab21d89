"""A cluster of three regions close together, started once a module for the tests that leave it whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regions.cluster import SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import Topology, parse_topology
from tests.faults.operating import Root, operated


def _topology(names: str = "abc", one_way_ms: float = 10.0) -> Topology:
    """Regions with one-letter names, the first of them the primary, all as far apart."""
    regions = "".join(f'[[regions]]\nname = "{name}"\nprimary = {str(name == names[0]).lower()}\n' for name in names)
    links = "".join(
        f'[[links]]\nbetween = ["{x}", "{y}"]\none_way_ms = {one_way_ms}\n' for x in names for y in names if x < y
    )
    topology = parse_topology(regions + links, source="test", default_name="faults")
    return topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))


@pytest.fixture(scope="session")
def topology_of() -> Callable[..., Topology]:
    """`topology_of("abc", 10.0)`: for tests that start a cluster of their own, because they destroy it."""
    return _topology


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Short enough for unix sockets, as pytest's is not everywhere."""
    with tempfile.TemporaryDirectory(prefix="ft-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    """Three regions that a module's tests share: they must leave it as it was."""
    with Cluster(_topology(), directory) as running:
        yield running


@pytest.fixture(scope="module")
def small_cluster(directory: Path) -> Iterator[Cluster]:
    """One region: the least that is real."""
    with Cluster(_topology("a"), directory / "small") as running:
        yield running


@pytest.fixture(scope="module")
def root(directory: Path) -> Iterator[Root]:
    """An operator with every right in a cluster of three regions (`root.cluster`), which a module's tests share."""
    with operated(_topology(), directory / "operated") as running:
        yield Root(running)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"
