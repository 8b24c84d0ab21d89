"""The model's server and the real one with the real scripts do the same: P2 and P3 are shown of what runs."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keyservice.core.evidence import EpochKey, Protocol, Report, chosen_in, key_of
from keyservice.core.keepers import Add, Bump
from keyservice.errors import StoreError, WaitingForBootstrap
from keyservice.evidence import read_evidence
from keyservice.store import Node
from keyservice.trust import TrustLog
from regions.model.server import EMPTY, NewEpoch, StoredEntry
from regions.model.server import Refused as ModelRefused
from regions.model.server import Server as ModelServer
from tests.keyservice.support import Server
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Beat, Entry, Epoch, EpochLink, Meta, Position
from verifier.reader import Reader

OPERATIONS = 60
HOLE = (Position(1, 1, "0" * 16), Position(1, 3, "0" * 16))
REGIONS = ("a", "b", "c")


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="ks-") as path:
        made = Server(Path(path), "redis")
        made.start()
        yield made
        made.kill()


def said(entry: Entry) -> tuple[object, ...]:
    """What an entry says; the id of one that begins an epoch is each server's own."""
    return (entry.value,) if entry.kind == "epoch" else (entry.digest(), entry.at)


async def refusal_of(call: Awaitable[object]) -> str | None:
    """The word with which the real server refused."""
    try:
        await call
    except StoreError as error:
        return error.code
    return None


def model_refusal_of(call: Callable[[], object]) -> str | None:
    """The word with which the model's server refused."""
    try:
        call()
    except ModelRefused as refused:
        return str(refused)
    return None


class Twins:
    """One real server and one of the model, to which the same happens. Times and nonces are the real one's."""

    def __init__(self, server: Server, node: Node, rng: random.Random) -> None:
        self.node, self.rng = node, rng
        self.client: Any = server.client()
        self.trust = TrustLog(node, region="a", max_token_lifetime_s=86_400)
        self.model = ModelServer("a", Protocol(), 1)
        self.keys: list[EpochKey] = []
        self.links: list[EpochLink] = []
        self.count = 0

    # -- what is compared -----------------------------------------------------------------------------------------

    def epoch(self) -> Epoch | None:
        fields = self.client.hgetall(EPOCH_KEY)
        return Epoch.decode(fields) if fields else None

    def beat(self) -> Beat | None:
        fields = self.client.hgetall(BEAT_KEY)
        return Beat.decode(fields) if fields else None

    def log(self, epoch: Epoch) -> list[tuple[Position, Entry]]:
        """The whole log, as a verifier reads it: raises if there is a hole or a fork."""
        return Reader(Meta.decode(self.client.hgetall(META_KEY)), epoch).accept(self.client.xrange(LOG_KEY))

    async def compare(self) -> None:
        epoch, held = self.epoch(), self.model.data
        if epoch is None or held.epoch is None:
            assert epoch == held.epoch
            return
        assert replace(epoch, replid="") == replace(held.epoch, replid="")
        log = self.log(epoch)
        assert [position for position, _ in log] == [position for position, _ in held.log]
        assert [said(entry) for _, entry in log] == [said(entry) for _, entry in held.log]
        assert self.beat() == held.beat
        evidence = await read_evidence(self.node, REGIONS)
        assert dict(evidence.reports) == dict(held.reports)
        protocol = Protocol()
        assert protocol.may_open(epoch, evidence.reports.values()) == protocol.may_open(
            held.epoch, held.reports.values()
        )

    # -- what happens to both --------------------------------------------------------------------------------------

    def seen(self) -> EpochKey:
        """Mostly the current epoch; sometimes one that it is not."""
        if self.keys and self.rng.random() < 0.15:
            return self.rng.choice(self.keys)
        epoch = self.epoch()
        return EpochKey(1, "0" * 16) if epoch is None else key_of(epoch)

    async def both(self, real: Awaitable[object], model: Callable[[], object]) -> None:
        """One refuses if and only if the other does, and for the same reason; a refusal may have begun an epoch."""
        refusals = (await refusal_of(real), model_refusal_of(model))
        assert refusals[0] == refusals[1]
        before, now = self.model.data.epoch, self.epoch()
        if before is not None and now is not None and key_of(before) != key_of(now):
            assert refusals[1] == "TRUST_REPLID"
            self.follow_bump(before, None)

    def follow_bump(self, before: Epoch | None, new: NewEpoch | None) -> None:
        """The real server has begun an epoch: so does the model's, with the same nonce, at the same time."""
        epoch = self.epoch()
        assert epoch is not None
        if new is None:
            assert before is not None
            new = NewEpoch(before.chain[-1].voters, chosen=chosen_in(before.chain[-1]))
        floor = max(new.above, before.number if before is not None else 0) + 1
        assert epoch.number >= floor
        first = self.log(epoch)[-1][1]
        seen = None if before is None else key_of(before)
        made = self.model.bump(seen, epoch.nonce, new, now_ms=first.at, region="a")
        assert made == key_of(epoch), "the number is the highest of what it must be above, and the server's time"
        self.keys.append(made)
        self.links.append(epoch.chain[-1])

    async def bump(self) -> None:
        before = self.epoch()
        seen = self.seen() if self.rng.random() < (0.1 if before is None else 0.9) else None
        voters = {name: self.rng.choice((f"{name}-1", f"{name}-2", "")) for name in self.rng.sample(REGIONS, 3)}
        above = self.rng.choice((0, 0, 1_700_000_000_000, 4_000_000_000_000 + self.count))
        holes = self.rng.choice((frozenset(), frozenset(), frozenset({HOLE})))
        chosen = self.rng.choice((None, *self.keys)) if seen is not None else None
        forgotten = self.rng.choice(((), (), ("a-1", "b-2")))
        bump = Bump(above, seen, voters, holes, chosen)
        refusal = await refusal_of(self.trust.bump(bump, forgotten=forgotten))
        after, current = self.epoch(), None if before is None else key_of(before)
        assert (refusal == "TRUST_NOT_PRIMARY") == (self.model.upstream is not None)
        bumped = after is not None and key_of(after) != current
        assert bumped == (self.model.upstream is None and seen == current)
        if bumped:
            self.follow_bump(before, NewEpoch(voters, above, forgotten, holes, chosen))

    async def add(self) -> None:
        entries = tuple(self.entry() for _ in range(self.rng.randint(0, 3)))
        links = tuple(self.rng.sample(self.links, self.rng.randint(0, min(2, len(self.links)))))
        links = tuple(msgspec.structs.replace(link, opened=self.rng.random() < 0.5) for link in links)
        links += (self.foreign(),) if self.rng.random() < 0.3 else ()
        seen = self.seen()
        answers: list[int] = []

        async def real() -> None:
            answers.append(await self.trust.add(Add(seen, entries, links)))

        await self.both(real(), lambda: answers.append(self.model.append(seen, entries, links)))
        assert len(answers) in (0, 2)
        assert len(set(answers)) <= 1, "both name the newest beat"

    def entry(self) -> StoredEntry:
        self.count += 1
        name = f"e{self.count}"
        return StoredEntry(name, "jti", "https://id.test", f"é{name}", None, 4_000_000_000, "", 5, "a")

    def foreign(self) -> EpochLink:
        self.count += 1
        voters = {"a": "a-1", "d": ""}
        number, nonce = 1_600_000_000_000 + self.count, f"{self.count:016x}"
        forgotten = ("c-1",) if self.rng.random() < 0.3 else ()
        chosen = (number - 1, nonce) if self.rng.random() < 0.3 else None
        return EpochLink(number, nonce, None, voters, self.rng.random() < 0.5, forgotten, chosen)

    async def report(self) -> None:
        seen, log = self.seen(), self.model.data.log
        held = self.rng.choice([position.stream_id for position, _ in log] or ["1-0"])
        beat_n = self.rng.choice((-1, 0, 1, 2, 3, 5, 12))
        name = self.rng.choice(REGIONS)
        report = Report(
            region=name,
            keeper_id=f"{name}-1",  # a second one has to wait for seconds: that is a matter of the real server alone
            number=seen.number,
            nonce=seen.nonce,
            held=held,
            commit=self.rng.randint(0, 9),
            beat_n=beat_n,
            beat_at_ms=max(beat_n, 0) * 200,
            beat_position=held if beat_n >= 0 else "",
        )
        await self.both(self.trust.report(report, "1"), lambda: self.model.put_report(report))

    async def open(self) -> None:
        seen = self.seen()

        def model() -> None:
            self.model.open_epoch(seen, self.beat_time())

        await self.both(self.trust.open_epoch(seen), model)

    async def issue_beat(self) -> None:
        """As a key service does: it reacts to what refuses it, and beats in the epoch that is then current."""
        self.trust.seen = None
        before, beat_before = self.epoch(), self.beat()
        try:
            await self.trust.beat(0)
        except (StoreError, WaitingForBootstrap):
            assert self.model.upstream is not None or before is None
            return
        assert before is not None
        bumped = key_of(self.must(self.epoch())) != key_of(before)
        assert bumped == (not self.model.same_server(self.must(self.model.data.epoch)))
        if bumped:
            self.follow_bump(before, None)
        assert self.beat() != beat_before
        self.model.issue_beat(key_of(self.must(self.epoch())), self.beat_time())

    def must(self, epoch: Epoch | None) -> Epoch:
        assert epoch is not None
        return epoch

    def beat_time(self) -> int:
        """The real server's, which differs."""
        beat = self.beat()
        return 0 if beat is None else beat.at_ms

    async def promote(self) -> None:
        """It becomes a replica of nobody, or a primary again, which draws another replication id."""
        if self.model.upstream is None:
            self.client.replicaof("127.0.0.1", "1")
            self.model.upstream = self.model
        else:
            self.client.replicaof("NO", "ONE")
            self.model.upstream = None
            self.model.replid += 1

    async def flush(self) -> None:
        if self.model.upstream is None and self.rng.random() < 0.2:
            self.client.flushall()
            self.model.history.append(EMPTY)


@pytest.mark.parametrize("seed", range(12))
async def test_the_models_server_and_the_real_scripts_agree(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    node = Node(server.url)
    twins = Twins(server, node, rng)
    operations = (
        twins.bump,
        twins.add,
        twins.add,
        twins.report,
        twins.report,
        twins.report,
        twins.open,
        twins.issue_beat,
        twins.issue_beat,
        twins.promote,
        twins.promote,
        twins.flush,
    )
    try:
        await twins.bump()
        await twins.compare()
        for _ in range(OPERATIONS):
            await rng.choice(operations)()
            await twins.compare()
        assert len(twins.keys) > 1
    finally:
        await node.close()
        twins.client.close()
