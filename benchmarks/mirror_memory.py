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
import gc
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from benchmarks.tools import Rows, distribution, options, run_server, show
from benchmarks.trust_appends import entries
from keyservice.core.keepers import Bump
from keyservice.limits import APPEND_ENTRIES_MAX
from keyservice.store import Node
from keyservice.trust import TrustLog
from verifier import Verifier
from verifier.limits import READ_BATCH_ENTRIES
from verifier.log import Entry
from verifier.mirroring import DROP_BUCKETS
from verifier.revocations import Mirror, Snapshot
from verifier.testing import StaticKeys, make_key, sign

ISSUER = "https://id.example.com"
LIFE_S = 900
TICK_S = 1 / 200
IDLE_S = 5.0


def batches(count: int, now: int) -> Iterator[list[Entry]]:
    """Tokens that end within the next 15 minutes, as many at any time."""
    for at in range(0, count, READ_BATCH_ENTRIES):
        yield [
            Entry(str(uuid.uuid4()), "jti", ISSUER, str(uuid.uuid4()), None, now + n % LIFE_S + 1, "", now * 1000, "r")
            for n in range(at, min(at + READ_BATCH_ENTRIES, count))
        ]


def filled(count: int, now: int) -> tuple[Mirror, float]:
    """A mirror that holds so many, and the seconds of a core that applying took."""
    mirror, taken = Mirror(), 0.0
    for batch in batches(count, now):
        started = time.thread_time()
        mirror.apply(batch)
        taken += time.thread_time() - started
    return mirror, taken


def status(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# -- what runs in a process of its own ---------------------------------------------------------------------------------


def memory(count: int) -> dict[str, float]:
    now = int(time.time())
    filled(5_000, now)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    mirror, taken = filled(count, now)
    steady, peak = status("VmRSS"), status("VmHWM")
    one_by_one = [seconds_of(mirror, batch) for entry in next(batches(500, now)) for batch in ([entry],)]
    half = now + LIFE_S / 2
    started = time.perf_counter()
    while mirror.drop_expired(half, half, 0, DROP_BUCKETS):  # as a mirror's thread does it
        pass
    sweep_s, left, after_half = time.perf_counter() - started, mirror.snapshot.entries, status("VmRSS")
    mirror.drop_expired(now + 2 * LIFE_S, now + 2 * LIFE_S, 0)
    assert not mirror.snapshot.entries
    return {
        "bytes each": (steady - before) / count,
        "peak": (peak - before) / count,
        "process MB": steady / 1e6,
        "apply µs each": taken / count * 1e6,
        "single mean µs": statistics.mean(one_by_one) * 1e6,
        "single max ms": max(one_by_one) * 1e3,
        "sweep s": sweep_s,
        "left": left,
        "bytes a left one": (after_half - before) / max(left, 1),
        "MB after all": (status("VmRSS") - before) / 1e6,
    }


def seconds_of(mirror: Mirror, batch: list[Entry]) -> float:
    started = time.perf_counter()
    mirror.apply(batch)
    return time.perf_counter() - started


def lookups(count: int) -> dict[str, float]:
    now = int(time.time())
    mirror = Mirror()
    known: list[str] = []
    for batch in batches(count, now):
        mirror.apply(batch)
        known += [entry.value for entry in batch[:2]]
    snapshot = mirror.snapshot
    others = [str(uuid.uuid4()) for _ in known]
    for kind in ("sid", "sub", "client", "kid"):
        before, ends = (now if kind in ("sub", "client") else None), (0 if kind == "kid" else now + LIFE_S)
        mirror.apply(
            [Entry(f"{kind}-{n}", kind, ISSUER, f"{kind}-{n}", before, ends, "", now * 1000, "r") for n in range(1_000)]
        )
    full = mirror.snapshot

    def ask(held: Snapshot) -> Callable[[str], object]:
        return lambda value: held.find_at(ISSUER, "a kid", value, None, "a sid", "a sub", "a client", 1.0, ())

    ways = {"nothing": (lambda _: None, others), "empty": (ask(Snapshot()), others), "miss": (ask(snapshot), others)}
    ways |= {"hit": (ask(snapshot), known), "miss, 5 kinds held": (ask(full), others)}
    found = {name: quickest(way, values) for name, (way, values) in ways.items()}
    return {f"{name} ns": taken - found["nothing"] for name, taken in found.items() if name != "nothing"}


def quickest(way: Callable[[str], object], values: list[str]) -> float:
    """Nanoseconds a call, best of several rounds, each over fresh strings: a token's are fresh too."""
    rounds = []
    for _ in range(15):
        fresh = ["".join(value) for value in values[:2_000]]
        started = time.thread_time()
        for value in fresh:
            way(value)
        rounds.append((time.thread_time() - started) / len(fresh) * 1e9)
    return min(rounds)


def first_read(url: str, count: int) -> dict[str, float]:
    key = make_key()
    verifier = Verifier(
        issuer=ISSUER,
        audience="orders",
        jwks_urls=None,
        jwks=StaticKeys(key).jwks,
        redis_url=url,
        on_unsynced="allow",
        token_cache_size=0,
    )
    token = sign(key, {"iss": ISSUER, "aud": "orders", "sub": "ada", "jti": str(uuid.uuid4()), "sid": "s"})
    read, ended = threading.Event(), threading.Event()
    samples: dict[bool, list[float]] = {True: [], False: []}

    def verify() -> None:
        due = time.perf_counter()
        while not ended.is_set():
            due += TICK_S
            time.sleep(max(0.0, due - time.perf_counter()))
            idle = read.is_set()
            verifier.verify(token)
            samples[idle].append((time.perf_counter() - due) * 1e3)

    thread = threading.Thread(target=verify)
    started = time.perf_counter()
    with verifier:
        thread.start()
        until_synced(verifier, count)
        taken = time.perf_counter() - started
        read.set()
        time.sleep(IDLE_S)
        ended.set()
        thread.join()
        held = verifier.status().mirror_entries
    assert held == count, held
    during, idle = distribution(samples[False]), distribution(samples[True])
    return {
        "first read s": taken,
        **{f"{name} ms": during[name] for name in ("p50", "p99", "max")},
        **{f"idle {name} ms": idle[name] for name in ("p50", "p99", "max")},
        "verifications": during["count"],
    }


def until_synced(verifier: Verifier, count: int) -> None:
    while verifier.status().mirror_entries < count or verifier.status().position is None:
        time.sleep(0.01)


CHILDREN: dict[str, Callable[[int], dict[str, float]]] = {"memory": memory, "lookups": lookups}


def child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.mirror_memory", "child", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=dict[str, float])


def run_child(name: str, count: str, url: str = "") -> None:
    row = first_read(url, int(count)) if name == "first_read" else CHILDREN[name](int(count))
    sys.stdout.write(msgspec.json.encode(row).decode())


async def fill(uds: Path, count: int) -> None:
    node = Node(f"unix://{uds}")
    trust = TrustLog(node, region="eu-west-1", max_token_lifetime_s=86_400)
    await trust.bump(Bump(0, None, {"eu-west-1": "keeper"}))
    for _ in range(0, count, APPEND_ENTRIES_MAX):
        await trust.append(entries(min(APPEND_ENTRIES_MAX, count)))
    await node.close()


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        run_child(*sys.argv[2:])
        return
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
