"""A key record that cannot be read keeps no other from being put back, and every change raises the generation."""

from __future__ import annotations

import json

from keyservice.core.keepers import Bump
from keyservice.store import Node
from keyservice.trust import TrustLog
from tests.keyservice.support import Server


def record(kid: str, state: str, rev: int = 1) -> str:
    return json.dumps({"kid": kid, "state": state, "rev": rev})


async def test_a_record_that_cannot_be_read_stays_alone(server: Server) -> None:
    node = Node(server.url)
    trust = TrustLog(node, region="eu", max_token_lifetime_s=86_400)
    try:
        await trust.bump(Bump(0, None, {"eu": "k"}))
        epoch = await trust.ensure_epoch()
        foreign = {"bad": "not JSON", "newer": record("newer", "dormant"), "older": record("older", "published")}
        with server.client() as client:
            client.hset("{trust}:keys", mapping=dict(foreign))
            mine = [part for kid in ("lost", "bad", "newer", "older") for part in (kid, record(kid, "active"))]
            keys = ("{trust}:keys", "{trust}:epoch", "{ks}:private:eu")
            (changed,) = await node.run("keys_merge.lua", keys, [str(epoch.number), epoch.nonce, "4", *mine])
            held = {kid.decode(): text.decode() for kid, text in client.hgetall("{trust}:keys").items()}
            generation = client.hget("{trust}:epoch", "keys_n")
        assert changed == 2
        assert held == {**foreign, "lost": record("lost", "active"), "older": record("older", "active")}
        assert generation == b"1"
    finally:
        await node.close()
