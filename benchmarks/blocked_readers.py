"""One revocation and 1,500 readers that wait for it at one replica: raw blocked sockets, not verifiers.

    python -m benchmarks.blocked_readers [--readers 1500] [--rounds 20] [--json]

Milliseconds from the append on the primary until the last of the sockets had its answer. Goal: 100 ms.
"""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

from benchmarks.tools import Rows, client_of, distribution, options, run_server, show
from regions.ports import pick_free_ports

XREAD = b"*6\r\n$5\r\nXREAD\r\n$5\r\nBLOCK\r\n$5\r\n10000\r\n$7\r\nSTREAMS\r\n$11\r\n{trust}:log\r\n$1\r\n$\r\n"


async def _round(uds: Path, primary: Path, readers: int) -> list[float]:
    opened = [await asyncio.open_unix_connection(str(uds)) for _ in range(readers)]
    for _, writer in opened:
        writer.write(XREAD)
    with client_of(uds) as replica, client_of(primary) as client:
        while int(replica.info("clients")["blocked_clients"]) < readers:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)
        arrived: list[float] = []

        async def wait(reader: asyncio.StreamReader) -> None:
            await reader.readline()
            arrived.append(time.perf_counter())

        waiting = [asyncio.create_task(wait(reader)) for reader, _ in opened]
        await asyncio.sleep(0)
        started = time.perf_counter()
        client.xadd("{trust}:log", {"v": "1"})
        await asyncio.gather(*waiting)
    for _, writer in opened:
        writer.close()
    return [(at - started) * 1000 for at in arrived]


async def measure(replica: Path, primary: Path, readers: int, rounds: int) -> Rows:
    firsts, lasts = [], []
    for _ in range(rounds):
        found = await _round(replica, primary, readers)
        firsts.append(min(found))
        lasts.append(max(found))
    return {"first of them, ms": distribution(firsts), "last of them, ms": distribution(lasts)}


def main() -> None:
    arguments = options(__doc__, readers=1_500, rounds=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = arguments.readers + 200
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    port = str(pick_free_ports(["127.0.0.1"], ["redis"])["redis"])
    quick = ("--repl-diskless-sync-delay", "0")
    with (
        run_server("--bind", "127.0.0.1", "--port", port, *quick) as primary,
        run_server("--replicaof", "127.0.0.1", port) as replica,
    ):
        rows = asyncio.run(measure(replica, primary, arguments.readers, arguments.rounds))
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
