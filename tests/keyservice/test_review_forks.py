"""A region's replica that takes over another history: what stood beyond the fork is never taken for read."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from keyservice.core.keepers import Bump
from keyservice.store import Node
from keyservice.trust import TrustLog
from tests.keyservice.support import Server, until
from verifier.log import Entry, Epoch, Position
from verifier.mirroring import LogListener, Round
from verifier.replica import ReplicaMirror


def entry(value: str) -> Entry:
    return Entry(value, "jti", "https://id.test", value, None, 4_102_444_800, "", 0, "eu")


class Heard(LogListener):
    def __init__(self) -> None:
        self.rounds: list[Round] = []

    def round(self, state: Round) -> None:
        self.rounds.append(state)


def holds(epoch: Epoch, position: Position) -> bool:
    """Whether the position is part of this epoch's history, by its chain."""
    later = [link for link in epoch.chain if link.number > position.epoch]
    previous = Position.parse(later[0].previous) if later and later[0].previous else position
    return epoch.nonce_of(position.epoch) == position.nonce and previous[:2] >= position[:2]


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def follow(server: Server, port: str) -> None:
    with server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", port)
        until(lambda: client.info("replication")["master_link_status"] == "up")


async def test_no_round_vouches_for_what_the_new_history_lacks(start_server: Callable[..., Server]) -> None:
    ports = {name: free_port() for name in "abc"}
    a, b, c = (start_server(name, "--port", ports[name], "--bind", "127.0.0.1") for name in "abc")
    first, second = Node(a.url), Node(b.url)
    old, new = (TrustLog(node, region="eu", max_token_lifetime_s=86_400) for node in (first, second))
    heard = Heard()
    mirror = ReplicaMirror(c.url, tail_block_ms=50)
    mirror.listen(heard)
    try:
        await old.bump(Bump(0, None, {"eu": "k"}))
        follow(b, ports["a"])
        follow(c, ports["a"])
        (common,) = await old.append([entry("both-have-it")])
        assert common.position is not None
        stream_id = common.position.stream_id
        for server in (b, c):
            with server.client() as client:
                until(partial(client.xrange, "{trust}:log", stream_id, stream_id))
        with b.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        (lost,) = await old.append([entry("only-c-reads-it")])
        mirror.start()
        until(lambda: any(one.position == lost.position for one in heard.rounds))
        epoch = await new.ensure_epoch()
        await new.beat(200)  # the promoted server has another replication id: this begins an epoch
        epoch = await new.ensure_epoch()
        follow(c, ports["b"])
        until(lambda: any(one.position.nonce == epoch.nonce for one in heard.rounds))
        assert [one for one in heard.rounds if not holds(one.epoch, one.position)] == []
    finally:
        mirror.close()
        await first.close()
        await second.close()
