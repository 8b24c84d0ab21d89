"""Public addresses: free, taken, or not there at all."""

from __future__ import annotations

import random
import socket

import pytest

from regions.errors import AddressMissing, PortInUse
from regions.ports import PICK_BELOW, PICK_FROM, _missing_hint, check_ports_free, pick_free_ports, probe
from regions.topology import Topology, load_topology

ADDRESSES = ["127.0.1.1", "127.0.2.1", "127.0.3.1"]


@pytest.fixture
def topology() -> Topology:
    topology = load_topology()
    return topology.with_ports(pick_free_ports(ADDRESSES, list(topology.ports)))


def test_picked_ports_differ_and_can_be_listened_on_at_every_address() -> None:
    ports = pick_free_ports(ADDRESSES, ["redis", "keyservice"])
    assert list(ports) == ["redis", "keyservice"]
    assert len(set(ports.values())) == 2
    for port in ports.values():
        assert PICK_FROM <= port < PICK_BELOW
        for address in ADDRESSES:
            probe(address, port)


def test_a_port_taken_on_one_address_alone_is_not_picked() -> None:
    first = pick_free_ports(ADDRESSES, ["x"], rng=random.Random(7))["x"]
    with socket.create_server(("127.0.3.1", first)):
        assert pick_free_ports(ADDRESSES, ["x"], rng=random.Random(7))["x"] != first


def test_free_ports_pass_the_check(topology: Topology) -> None:
    check_ports_free(topology)


def test_a_taken_port_is_refused_with_its_address_service_and_setting(topology: Topology) -> None:
    port = topology.ports["orders"]
    with socket.create_server(("127.0.2.1", port)), pytest.raises(PortInUse) as caught:
        check_ports_free(topology)
    for part in (f"127.0.2.1:{port}", "orders of eu-west-1", "[ports] orders", topology.source):
        assert part in str(caught.value)


def test_only_the_named_services_are_checked(topology: Topology) -> None:
    with socket.create_server(("127.0.2.1", topology.ports["orders"])):
        check_ports_free(topology, ["redis"])


def test_an_address_that_this_machine_lacks_is_refused_by_name() -> None:
    documentation_address = "192.0.2.1"  # RFC 5737: never assigned
    with pytest.raises(AddressMissing, match=r"192\.0\.2\.1"):
        probe(documentation_address, 20_000)


def test_on_macos_the_command_that_adds_the_address_is_named() -> None:
    assert "sudo ifconfig lo0 alias 127.0.2.1 up" in _missing_hint("127.0.2.1", platform="darwin")
