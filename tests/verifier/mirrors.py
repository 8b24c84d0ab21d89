"""What the tests of mirrors share: a real server, the hand that writes its log, and what to ask of a mirror."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.verifier.feed_server import GOOD, FeedServer, feeding
from tests.verifier.support import ISSUER, until
from tests.verifier.valkey import Primary, Server, running
from verifier.feed import FeedMirror
from verifier.feed_tokens import GivenToken
from verifier.freshness import Staleness
from verifier.log import Entry, Position
from verifier.mirroring import LogListener, MirrorThread, Round
from verifier.replica import ReplicaMirror

Mirroring = Callable[..., AbstractContextManager[MirrorThread]]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.replica.TAIL_BLOCK_MS", 20)
    monkeypatch.setattr("keyservice.feed.FEED_TAIL_BLOCK_MS", 20)
    # Who says nothing for longer is a dead connection: but a slow machine is not, and tests count the connections lost.
    monkeypatch.setattr("verifier.feed.FEED_CONNECT_TIMEOUT_S", 60.0)
    monkeypatch.setattr("verifier.feed.FEED_READ_TIMEOUT_S", 60.0)


@pytest.fixture(scope="module")
def module_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def shared_server(module_dir: Path) -> Iterator[Server]:
    with running(module_dir) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    with shared_server.client() as client:
        client.flushall()
    return shared_server


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def primary(client: redis.Redis) -> Primary:
    return Primary(client)


class OnEntries(LogListener):
    def __init__(self, call: Callable[[list[tuple[Position, Entry]]], None]) -> None:
        self.call = call

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        self.call(accepted)


class Heard(LogListener):
    """Every call, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.last: Round | None = None

    def begin(self) -> None:
        self.calls.append("begin")

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        self.calls += [str(position) for position, _ in accepted]

    def round(self, state: Round) -> None:
        self.last = state
        if self.calls[-1] != "round":
            self.calls.append("round")

    def absent(self) -> None:
        if self.calls[-1:] != ["absent"]:
            self.calls.append("absent")


@contextmanager
def started(mirror: MirrorThread, *listeners: LogListener) -> Iterator[MirrorThread]:
    for listener in listeners:
        mirror.listen(listener)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.close()


@contextmanager
def over_redis(server: Server | str, *listeners: LogListener, **settings: Any) -> Iterator[MirrorThread]:
    mirror = ReplicaMirror(server if isinstance(server, str) else server.url, **settings)
    with started(mirror, *listeners):
        yield mirror


@contextmanager
def over_feed(server: Server | FeedServer, *listeners: LogListener, **settings: Any) -> Iterator[MirrorThread]:
    if isinstance(server, FeedServer):
        with started(FeedMirror([server.url], GivenToken(GOOD), **settings), *listeners) as mirror:
            yield mirror
    else:
        with feeding(server) as feed, over_feed(feed, *listeners, **settings) as mirror:
            yield mirror


@pytest.fixture(params=[over_redis, over_feed], ids=["redis", "feed"])
def mirroring(request: pytest.FixtureRequest) -> Mirroring:
    """Opens a mirror of a server, over Redis and over the key service's feed."""
    opened: Mirroring = request.param
    return opened


def holds(mirror: MirrorThread, jti: str) -> bool:
    return mirror.view.snapshot.find(issuer=ISSUER, jti=jti) is not None


def reaches(mirror: MirrorThread, position: str) -> None:
    until(lambda: str(mirror.view.position) == position and mirror.view.connection == "tailing", f"at {position}")


def staleness(mirror: MirrorThread, bound: float = 600.0) -> Staleness:
    """By a bound that no slow machine reaches: a test's beat is written once."""
    return mirror.view.freshness.staleness(now=time.time(), mono=time.monotonic(), max_staleness_s=bound)
