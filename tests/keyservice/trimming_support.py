"""Logs to trim: made by hand for the pure core, and written to a real server."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from tests.verifier.support import NONCE, entry
from tests.verifier.valkey import Primary
from verifier.log import (
    EPOCH_KEY,
    LOG_KEY,
    META_KEY,
    Entry,
    Epoch,
    EpochLink,
    Generation,
    Meta,
    Position,
    parse_stream_id,
)
from verifier.reader import Raw, Reader

GRACE_S = 300


def raw(stream_id: str, made: Entry) -> Raw:
    return stream_id.encode(), {name.encode(): text.encode() for name, text in made.encode().items()}


def jti(value: str, expires_at: int) -> Entry:
    return entry("jti", value, id=f"jti-{value}"[:64], expires_at=expires_at)


def epoch_of(*links: EpochLink, known: tuple[EpochLink, ...] = (), opened: bool = True) -> Epoch:
    last = links[-1]
    return Epoch(last.number, last.nonce, "r", opened, Generation(last.number, 0), links, known)


def link(number: int, *, opened: bool = True, voters: dict[str, str] | None = None, **more: Any) -> EpochLink:
    return EpochLink(number, f"{number:016x}", None, voters or {}, opened, **more)


def hash_of(client: redis.Redis, key: str) -> dict[bytes, bytes]:
    reply: Any = client.hgetall(key)
    fields: dict[bytes, bytes] = reply
    return fields


def stream(client: redis.Redis) -> list[Raw]:
    reply: Any = client.xrange(LOG_KEY)
    entries: list[Raw] = reply
    return entries


def last_id(client: redis.Redis) -> tuple[int, int]:
    return parse_stream_id(stream(client)[-1][0])


class Log(Primary):
    """A log on a real server, in an open epoch that the scripts accept."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client)
        self.accept()

    def open_epoch(
        self, number: int, nonce: str, *, opened: bool = True, holes: Sequence[tuple[str | None, str]] = ()
    ) -> None:
        super().open_epoch(number, nonce, opened=opened, holes=holes)
        self.accept()

    def accept(self) -> None:
        self.client.hset(EPOCH_KEY, "replid", self.client.info("replication")["master_replid"])

    def catch_up(self) -> None:
        """Others have appended meanwhile."""
        self.seq = last_id(self.client)[1]

    def dead(self, count: int, name: str = "dead") -> None:
        past = int(time.time()) - GRACE_S - 60
        self.append(*(jti(f"{name}-{n}", past) for n in range(count)))

    def living(self, values: Iterable[str], for_s: int = 86_400) -> None:
        self.append(*(jti(value, int(time.time()) + for_s) for value in values))

    @property
    def meta(self) -> Meta:
        return Meta.decode(hash_of(self.client, META_KEY))

    @property
    def epoch(self) -> Epoch:
        return Epoch.decode(hash_of(self.client, EPOCH_KEY))

    def read(self) -> list[tuple[Position, Entry]]:
        """As a verifier that starts now: raises if there is a hole."""
        return Reader(self.meta, self.epoch).accept(stream(self.client))

    def values(self) -> list[str]:
        return [made.value for _, made in self.read() if made.kind != "epoch"]


__all__ = ["GRACE_S", "NONCE", "Log", "epoch_of", "hash_of", "jti", "last_id", "link", "raw", "stream"]
