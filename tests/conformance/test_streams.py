"""Streams as the trust log needs them: explicit dense ids, reads that block on an explicit id, one moment for several
keys."""

from __future__ import annotations

import threading

import pytest
import redis

from tests.conformance.scenarios import ENTRY, NONCE, Bench
from tests.conformance.target import Target


def append(bench: Bench, count: int = 1) -> None:
    bench.run("append.lua", ("log", "epoch", "beat", "meta"), [bench.number, NONCE, "", *ENTRY * count])


def test_ids_are_dense_from_0_and_only_go_forward(bench: Bench) -> None:
    log = bench.key("log")
    assert [bench.client.xadd(log, {"v": "1"}, id="7-*") for _ in range(3)] == [b"7-0", b"7-1", b"7-2"]
    assert bench.client.xadd(log, {"v": "1"}, id="8-0") == b"8-0"
    for behind in ("8-0", "7-3", "7-*"):
        with pytest.raises(redis.ResponseError, match="equal or smaller"):
            bench.client.xadd(log, {"v": "1"}, id=behind)
    assert bench.client.xlen(log) == 4


def test_a_removed_entry_leaves_a_hole_that_arithmetic_finds(bench: Bench) -> None:
    bench.start()
    append(bench, 3)
    bench.client.xdel(bench.key("log"), f"{bench.number}-2")
    assert [stream_id.decode() for stream_id, _ in bench.log()] == [f"{bench.number}-{seq}" for seq in (0, 1, 3)]


def test_trimming_takes_a_prefix_exactly(bench: Bench) -> None:
    bench.start()
    append(bench, 5)
    assert bench.client.xtrim(bench.key("log"), minid=f"{bench.number}-4", approximate=False) == 4
    assert [stream_id.decode() for stream_id, _ in bench.log()] == [f"{bench.number}-{seq}" for seq in (4, 5)]


def test_a_verifier_reads_on_from_an_id_and_is_woken_by_the_next_entry(target: Target, bench: Bench) -> None:
    bench.start()
    append(bench)
    log = bench.key("log")
    with target.reader() as reader:
        ((_, entries),) = reader.xread({log: f"{bench.number}-0"}, 10, 1)
        assert [stream_id.decode() for stream_id, _ in entries] == [f"{bench.number}-1"]
        assert not reader.xread({log: f"{bench.number}-1"}, 10, 20)
        with target.writer() as other:
            writing = threading.Timer(0.1, append, (bench.over(other),))
            writing.start()
            ((_, entries),) = reader.xread({log: f"{bench.number}-1"}, 10, 8000)
            writing.join()
        assert [stream_id.decode() for stream_id, _ in entries] == [f"{bench.number}-2"]


def test_a_verifier_sees_several_keys_at_one_moment(target: Target, bench: Bench) -> None:
    bench.start()
    bench.call("beat.lua")
    append(bench)
    with target.reader() as reader, reader.pipeline(transaction=True) as pipe:
        for name in ("beat", "epoch", "meta"):
            pipe.hgetall(bench.key(name))
        pipe.xrevrange(bench.key("log"), count=1)
        beat, epoch, meta, last = pipe.execute()
    assert (beat[b"nonce"], epoch[b"nonce"], meta[b"writer_format"]) == (NONCE.encode(), NONCE.encode(), b"1")
    assert last[0][0].decode() == f"{bench.number}-1"


def test_nothing_is_evicted(target: Target) -> None:
    assert target.info["maxmemory_policy"] == "noeviction"
