"""Are the public addresses of the regions free on this machine, and which ports could be used instead?"""

from __future__ import annotations

import errno
import random
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence

from regions.errors import AddressMissing, PortInUse
from regions.topology import Topology

__all__ = ["check_ports_free", "pick_free_ports", "probe"]

PICK_FROM, PICK_BELOW = 20_000, 32_000
"""Below the ephemeral range of Linux (32768) and macOS (49152), where an outgoing connection could take the port."""


def probe(address: str, port: int) -> None:
    """Listen on `address:port` and stop again.

    Raises `AddressMissing` if this machine has no such address, and the plain `OSError` of any other refusal.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # Without it, a port whose last connection is still in TIME_WAIT looks taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise AddressMissing(_missing_hint(address)) from error
            raise


def _missing_hint(address: str, platform: str = sys.platform) -> str:
    """macOS configures 127.0.0.1 only; Linux all of 127.0.0.0/8."""
    command = f"sudo ifconfig lo0 alias {address} up"
    if platform != "darwin":
        command = f"sudo ip address add {address}/8 dev lo"
    return f"this machine has no address {address}; add it with: {command}"


def check_ports_free(topology: Topology, services: Iterable[str] | None = None) -> None:
    """Check that nobody listens on a public address of `topology` (all services, or those named).

    Raises `PortInUse` naming the address, the port and the setting, or `AddressMissing`.
    """
    for region in topology.regions:
        for service in topology.ports if services is None else services:
            port = topology.ports[service]
            try:
                probe(region.address, port)
            except OSError as error:
                raise PortInUse(
                    f"{region.address}:{port} ({service} of {region.name}) cannot be used: {error.strerror}; "
                    f"stop what listens there, or set another `[ports] {service}` in the topology ({topology.source})"
                ) from error


def pick_free_ports(
    addresses: Sequence[str], names: Sequence[str], *, rng: random.Random | None = None
) -> Mapping[str, int]:
    """A port for each name that is free on all of `addresses` at this moment.

    Nothing is reserved: parallel processes stay apart by chance (each starts at a random port of 12,000).
    Raises `PortInUse` if too few are free, `AddressMissing` if an address is not configured.
    """
    generator = random.SystemRandom() if rng is None else rng
    span = PICK_BELOW - PICK_FROM
    start = generator.randrange(span)
    candidates = (PICK_FROM + (start + step) % span for step in range(span))
    free = (port for port in candidates if all(_is_free(address, port) for address in addresses))
    picked = dict(zip(names, free, strict=False))
    if len(picked) < len(names):
        raise PortInUse(
            f"fewer than {len(names)} ports from {PICK_FROM} to {PICK_BELOW - 1} are free on all of {addresses}"
        )
    return picked


def _is_free(address: str, port: int) -> bool:
    try:
        probe(address, port)
    except OSError:
        return False
    return True
