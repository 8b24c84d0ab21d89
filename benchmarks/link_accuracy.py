"""How exactly does the link proxy keep its lag?

    python -m benchmarks.link_accuracy [--seconds 10] [--rate 1000] [--json]

For each lag of the default topology, one caller sends messages through a proxy process at random moments (so that no
message's arrival helps another's timer), and a receiver behind it notes when each arrives. The error is the time from
send to arrival less the lag: what a reader of a replica would see, with the receiver's own wake-up in it.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from regions.link_rules import link_config
from regions.nursery import Nursery
from regions.ports import pick_free_ports
from regions.topology import Topology, load_topology

STAMP = struct.Struct(">q")
WARM_UP_MESSAGES = 50


@dataclass(frozen=True)
class Result:
    """Errors in milliseconds over the lag `one_way_ms`; negative would be early."""

    one_way_ms: float
    messages: int
    rate_per_s: float
    error_min_ms: float
    error_p50_ms: float
    error_p99_ms: float
    error_max_ms: float


def send(caller: socket.socket, count: int, rate_per_s: float, seed: int) -> None:
    """Send `count` time stamps at exponentially distributed intervals."""
    rng = random.Random(seed)
    due_s = time.monotonic()
    for _ in range(count):
        due_s += rng.expovariate(rate_per_s)
        time.sleep(max(0.0, due_s - time.monotonic()))
        caller.sendall(STAMP.pack(time.monotonic_ns()))


def receive(server: socket.socket, count: int) -> list[float]:
    """How long each of `count` messages was under way, in milliseconds."""
    under_way_ms: list[float] = []
    received = b""
    while len(under_way_ms) < count:
        received += server.recv(65_536)
        now_ns = time.monotonic_ns()
        whole = len(received) - len(received) % STAMP.size
        under_way_ms += [(now_ns - sent_ns) / 1e6 for (sent_ns,) in STAMP.iter_unpack(received[:whole])]
        received = received[whole:]
    return under_way_ms


def measure(topology: Topology, listener: socket.socket, source: str, count: int, rate_per_s: float) -> Result:
    """Send from region `source` to the primary."""
    target, port = topology.primary, topology.ports["redis"]
    one_way_ms = topology.one_way_ms(source, target.name)
    bound_to = (topology.region(source).address, 0)
    with socket.create_connection((target.address, port), source_address=bound_to) as caller:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _ = listener.accept()
        with server:
            total = WARM_UP_MESSAGES + count
            sender = threading.Thread(target=send, args=(caller, total, rate_per_s, 1))
            time.sleep(3 * one_way_ms / 1000)  # past the handshake
            sender.start()
            errors = sorted(ms - one_way_ms for ms in receive(server, total)[WARM_UP_MESSAGES:])
            sender.join()
    p50, p99 = errors[count // 2], errors[int(count * 0.99)]
    return Result(one_way_ms, count, rate_per_s, errors[0], p50, p99, errors[-1])


def run(seconds: float, rate_per_s: float) -> list[Result]:
    """One result for each different lag to the primary."""
    topology = load_topology()
    ports = pick_free_ports([region.address for region in topology.regions], list(topology.ports))
    topology = topology.with_ports(ports)
    sources = {topology.one_way_ms(r.name, topology.primary.name): r.name for r in topology.regions[1:]}
    with tempfile.TemporaryDirectory(prefix="rb-") as name, Nursery(Path(name)) as nursery:
        uds = Path(name, "server.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(uds))
            listener.listen()
            config = link_config(topology, {(topology.primary.name, "redis"): uds}, Path(name, "control.sock"))
            path = Path(name, "link.json")
            path.write_bytes(config.to_json())
            nursery.spawn("link", [sys.executable, "-m", "regions.link", str(path)]).wait_for_line("ready", 20)
            count = int(seconds * rate_per_s)
            return [measure(topology, listener, source, count, rate_per_s) for _, source in sorted(sources.items())]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to send over each link")
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    results = run(options.seconds, options.rate)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    print(f"error over the lag in ms, {results[0].messages} messages at {results[0].rate_per_s:g}/s")
    print(f"{'lag':>6} {'min':>8} {'p50':>8} {'p99':>8} {'max':>8}")
    for r in results:
        errors = (r.error_min_ms, r.error_p50_ms, r.error_p99_ms, r.error_max_ms)
        print(f"{r.one_way_ms:>6g} " + " ".join(f"{error:>8.2f}" for error in errors))


if __name__ == "__main__":
    main()
