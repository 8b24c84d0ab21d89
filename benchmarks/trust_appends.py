"""Bulk appends to the trust log, beside the bare server in the same run: the same entries by a script without checks.

    python -m benchmarks.trust_appends [--entries 100000] [--rounds 7] [--json]

Goal: at least 0.6 of the bare script's rate. Interleaved, medians. `append.lua` alone is shown too, because the rest is
what Python takes to turn entries into arguments and positions. And what one live entry costs in the server's memory:
at most 140 bytes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks.tools import Rows, client_of, options, run_server, show
from keyservice.core.evidence import key_of
from keyservice.core.keepers import Bump
from keyservice.limits import APPEND_ENTRIES_MAX
from keyservice.store import Node
from keyservice.trust import TrustLog
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, Entry

BARE = """
for i = 1, #ARGV, 9 do
  redis.call('XADD', KEYS[1], '*', 'v', '1', 'id', ARGV[i], 'kind', ARGV[i + 1], 'issuer', ARGV[i + 2],
    'value', ARGV[i + 3], 'before', ARGV[i + 4], 'expires_at', ARGV[i + 5], 'reason', ARGV[i + 6], 'at', ARGV[i + 7],
    'region', ARGV[i + 8])
end
"""

Batch = Sequence[Entry]


def entries(count: int) -> list[Entry]:
    """Revoked tokens as they are in production: a UUID as the id, another as the `jti`."""
    issuer, expires_at = "https://id.example.com", int(time.time()) + 900
    return [
        Entry(str(uuid.uuid4()), "jti", issuer, str(uuid.uuid4()), None, expires_at, "", 0, "eu-west-1")
        for _ in range(count)
    ]


def fields(batch: Batch) -> list[str]:
    return [value for entry in batch for name, value in entry.encode().items() if name != "v"]


async def measure(uds: Path, count: int, rounds: int) -> Rows:
    node = Node(f"unix://{uds}")
    trust = TrustLog(node, region="eu-west-1", max_token_lifetime_s=86_400)
    await trust.bump(Bump(0, None, {"eu-west-1": "keeper"}))
    epoch = key_of(await trust.ensure_epoch())
    wanted = entries(count)
    batches = [wanted[at : at + APPEND_ENTRIES_MAX] for at in range(0, count, APPEND_ENTRIES_MAX)]
    ready = [fields(batch) for batch in batches]
    head: list[str] = [str(epoch.number), epoch.nonce, ""]
    keys = (LOG_KEY, EPOCH_KEY, BEAT_KEY)

    async def bare(place: int) -> None:
        await node.write("EVAL", BARE, 1, "bare", *ready[place])

    async def script(place: int) -> None:
        await node.run("append.lua", keys, [*head, *ready[place]])

    async def product(place: int) -> None:
        await trust.append(batches[place])

    ways: dict[str, Callable[[int], Awaitable[None]]] = {"bare Lua": bare, "append.lua": script, "product": product}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for place in range(len(batches)):
                await way(place)
            rates[name].append(count / (time.perf_counter() - started))
    await node.close()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {name: {"entries/s": rate, "of bare Lua": rate / medians["bare Lua"]} for name, rate in medians.items()}


def memory(uds: Path, count: int) -> Rows:
    """Bytes that the server uses for one more live entry."""

    async def fill() -> None:
        node = Node(f"unix://{uds}")
        trust = TrustLog(node, region="eu-west-1", max_token_lifetime_s=86_400)
        await trust.bump(Bump(0, None, {"eu-west-1": "keeper"}))
        wanted = entries(count)
        for at in range(0, count, APPEND_ENTRIES_MAX):
            await trust.append(wanted[at : at + APPEND_ENTRIES_MAX])
        await node.close()

    with client_of(uds) as client:
        client.execute_command("FLUSHALL", "SYNC")
        before = int(client.info("memory")["used_memory"])
        asyncio.run(fill())
        used = int(client.info("memory")["used_memory"]) - before
    return {"memory": {"bytes/entry": used / count}}


def main() -> None:
    arguments = options(__doc__, entries=100_000, rounds=7)
    with run_server() as uds:
        rows = asyncio.run(measure(uds, arguments.entries, arguments.rounds))
        rows |= memory(uds, arguments.entries)
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
