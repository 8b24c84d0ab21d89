"""Cluster mode: what one script touches is in one slot, and every script runs on a node of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from keyservice.trust import private_key_name
from tests.conformance.scenarios import NONCE, SCENARIOS, Bench, refusal
from tests.conformance.target import Names, OwnServer, Target, free_port, own_server, until
from verifier.log import BEAT_KEY, EPOCH_KEY, KEYS_KEY, LOG_KEY, META_KEY, region_key

TRUST_KEYS = [BEAT_KEY, EPOCH_KEY, KEYS_KEY, LOG_KEY, META_KEY, region_key("eu-west-1"), region_key("us-east-1")]


@pytest.fixture(scope="module")
def node(directory: Path, own: OwnServer | None, target: Target) -> Iterator[Target]:
    """A cluster of one node, which owns every slot; or the server at the URL, if it is in cluster mode."""
    if own is None:
        if not target.info.get("cluster_enabled"):
            target.not_checked("the server is not in cluster mode")
        yield target
        return
    settings = {
        "cluster-enabled": "yes",
        "cluster-config-file": "nodes.conf",
        "bind": "127.0.0.1",
        "port": str(free_port()),
        "cluster-port": str(free_port()),
    }
    with own_server(directory, "cluster", *settings.items()) as server:
        made = server.target()
        with made.admin() as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            until(lambda: b"cluster_state:ok" in _raw(admin, "CLUSTER", "INFO"))
        yield made


def _raw(client: redis.Redis, *words: str) -> bytes:
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command(*words)  # type: ignore[no-untyped-call]
        reply = connection.read_response()
    finally:
        client.connection_pool.release(connection)
    return reply if isinstance(reply, bytes) else str(reply).encode()


@pytest.fixture
def there(node: Target) -> Iterator[Bench]:
    names = Names()
    with node.writer() as client:
        yield Bench(client, names)
        for key in names.given:
            client.unlink(key)


def test_every_key_of_the_trust_log_is_in_one_slot() -> None:
    assert {key_slot(key.encode()) for key in TRUST_KEYS} == {key_slot(b"trust")}
    assert key_slot(private_key_name("eu-west-1").encode()) == key_slot(b"ks")


def test_the_server_computes_the_same_slots(node: Target) -> None:
    with node.admin() as admin:
        slots = {admin.execute_command("CLUSTER", "KEYSLOT", key) for key in TRUST_KEYS}
    assert slots == {key_slot(b"trust")}


@pytest.mark.parametrize("script", SCENARIOS)
def test_a_script_runs_on_a_node_of_a_cluster(there: Bench, script: str) -> None:
    there.start()
    SCENARIOS[script].check(there)


def test_a_script_over_two_slots_would_be_refused(there: Bench) -> None:
    there.start()
    args = [there.number, NONCE]
    assert refusal(lambda: there.run("append.lua", ("log", "ks:epoch", "beat", "meta"), args)) in ("CROSSSLOT", "Keys")
    assert len(there.log()) == 1


def test_a_verifier_reads_several_keys_at_one_moment_there_too(node: Target, there: Bench) -> None:
    there.start()
    with node.reader() as reader, reader.pipeline(transaction=True) as pipe:
        pipe.hgetall(there.key("epoch"))
        pipe.hgetall(there.key("meta"))
        pipe.xrevrange(there.key("log"), count=1)
        epoch, meta, last = pipe.execute()
    assert (epoch[b"nonce"], meta[b"writer_format"], len(last)) == (NONCE.encode(), b"1", 1)
