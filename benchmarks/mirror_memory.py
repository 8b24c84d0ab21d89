"""What a verifier's mirror of many revoked tokens costs: memory, look-ups, applying, forgetting, and the first read.

    python -m benchmarks.mirror_memory [--entries 1000000] [--large 10000000] [--json]

Each row is measured in a process of its own. Goals for a million `jti`s of 36 characters: at most 16 bytes each when
steady and 32 at the peak; a look-up of one token's five identifiers at most 1 µs; a first read from a real server at
most 5 s, while another thread verifies 200 tokens a second with a p99 of at most 10 ms. For ten million: at most 200 MB
for the whole process. `--large 0` leaves that row out.

A verification counts from the moment at which it was due, so waiting for Python's lock is part of it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks.tools import Rows, options, run_server, show
from benchmarks.trust_appends import entries
from keyservice.core.keepers import Bump
from keyservice.limits import APPEND_ENTRIES_MAX
from keyservice.store import Node
from keyservice.trust import TrustLog


def child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.mirror_child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=dict[str, float])


async def fill(uds: Path, count: int) -> None:
    node = Node(f"unix://{uds}")
    trust = TrustLog(node, region="eu-west-1", max_token_lifetime_s=86_400)
    await trust.bump(Bump(0, None, {"eu-west-1": "keeper"}))
    for _ in range(0, count, APPEND_ENTRIES_MAX):
        await trust.append(entries(min(APPEND_ENTRIES_MAX, count)))
    await node.close()


def main() -> None:
    arguments = options(__doc__, entries=1_000_000, large=10_000_000)
    count = str(arguments.entries)
    rows: Rows = {f"memory, {count}": child("memory", count), f"look-ups, {count}": child("lookups", count)}
    with run_server() as uds:
        asyncio.run(fill(uds, arguments.entries))
        rows[f"first read, {count}"] = child("first_read", count, f"unix://{uds}")
    if arguments.large:
        rows[f"memory, {arguments.large}"] = child("memory", str(arguments.large))
    if arguments.json:
        show(rows, as_json=True)
        return
    for name, row in rows.items():
        print(f"{name}:")
        for what, value in row.items():
            print(f"  {what:24}{value:16,.2f}")


if __name__ == "__main__":
    main()
