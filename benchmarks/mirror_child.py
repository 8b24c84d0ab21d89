"""What `benchmarks.mirror_memory` measures in processes of their own, which import the verifier and nothing else."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

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


def distribution(samples: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {"count": len(samples), "p50": cuts[49], "p99": cuts[98], "max": max(samples)}


def main(name: str, count: str, url: str = "") -> None:
    row = first_read(url, int(count)) if name == "first_read" else CHILDREN[name](int(count))
    sys.stdout.write(msgspec.json.encode(row).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
