"""Any log, trimmed at any time: readers that start, follow or sleep hold everything that lives, and memory is bounded.

The log is the real one but for the server: entries and ids as they stand in the stream, cut as ``trim.lua`` cuts it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from keyservice.core.trimming import EPOCH_WEIGHT, Cut, Quiet, Survey, death_line, kept_links, plan
from tests.keyservice.trimming_support import GRACE_S, jti, raw
from tests.verifier.support import NOW, entry
from verifier.log import Entry, Epoch, EpochLink, Generation, Meta, parse_stream_id
from verifier.reader import Raw, Reader, Reread

DEAD_MIN = 5
PIECE = 4


class Model:
    """One primary's log, its trimmer, and one reader that reads only now and then."""

    def __init__(self) -> None:
        self.now = NOW
        self.log: list[Raw] = []
        self.entries: dict[bytes, Entry] = {}
        self.trimmed_to: tuple[int, int] | None = None
        self.links: list[EpochLink] = []
        self.last: tuple[int, int] = (0, -1)
        self.quiet: Quiet | None = None
        self.gained = self.copied = self.names = 0
        self.open_epoch()
        self.sleeper: Reader | None = None
        self.slept: set[bytes] = set()

    # -- the log --------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        last = self.links[-1]
        return Epoch(last.number, last.nonce, "r", True, Generation(last.number, 0), tuple(self.links))

    @property
    def meta(self) -> Meta:
        return Meta("i", self.trimmed_to, 1, 1, 86_400)

    def open_epoch(self) -> None:
        nonce_of = {link.number: link.nonce for link in self.links}
        previous = f"{self.last[0]}-{self.last[1]}.{nonce_of[self.last[0]]}" if self.links else "-"
        number = self.last[0] + 1
        nonce = f"{number:016x}"
        self.links.append(EpochLink(number, nonce, None if previous == "-" else previous, {"eu": "k"}, True))
        self.last = (number, 0)
        made = entry("epoch", f"{nonce} {previous}", id=f"e-{number}", issuer="", expires_at=0)
        self.log.append(raw(f"{number}-0", made))

    def put(self, fields: Any) -> None:
        self.last = (self.last[0], self.last[1] + 1)
        self.log.append((f"{self.last[0]}-{self.last[1]}".encode(), fields))

    def append(self, lasts_s: int | None) -> None:
        self.names += 1
        name = f"v-{self.names}"
        made = entry("kid", name) if lasts_s is None else jti(name, self.now - GRACE_S + lasts_s)
        self.entries[made.digest()] = made
        self.put(raw("", made)[1])

    def alive(self) -> set[bytes]:
        line = death_line(self.now, self.now, GRACE_S)
        return {digest for digest, one in self.entries.items() if one.kind == "kid" or one.expires_at > line}

    # -- the trimmer, as keyservice.trimming has it -----------------------------------------------------------------

    def trim(self) -> None:
        line = death_line(self.now, self.now, GRACE_S)
        survey = Survey(line, DEAD_MIN)
        survey.add(self.log[: PIECE + 1])
        if not survey.length and self.quiet is not None and not self.quiet.over(line, len(self.log)):
            return
        survey.add(self.log[PIECE + 1 :])
        self.quiet = None if survey.length else survey.quiet()
        left = survey.length
        while left:
            cut = plan(
                self.log[: PIECE + 1],
                epoch=self.epoch,
                trimmed_to=self.trimmed_to,
                line_s=line,
                most=min(left, PIECE),
            )
            assert cut is not None
            self.carry_out(cut)
            left -= cut.length
        self.links = kept_links(self.links, self.epoch, self.trimmed_to)

    def carry_out(self, cut: Cut) -> None:
        gone, self.log = self.log[: cut.length], self.log[cut.length :]
        assert parse_stream_id(self.log[0][0]) == cut.survivor
        for place in cut.carried:
            self.put(gone[place][1])
        self.trimmed_to = cut.trimmed_to
        self.copied += len(cut.carried)
        epochs = sum(fields[b"kind"] == b"epoch" for _, fields in gone)
        self.gained += len(gone) - len(cut.carried) - epochs + EPOCH_WEIGHT * epochs

    # -- readers --------------------------------------------------------------------------------------------------

    def fresh_reader(self) -> set[bytes]:
        reader = Reader(self.meta, self.epoch)
        read = reader.accept(self.log)  # raises if a position does not follow the one before
        assert reader.position is not None
        reader.check(self.meta, self.epoch, self.last)
        assert reader.position[:2] == self.last
        return {one.digest() for _, one in read if one.kind != "epoch"}

    def wake(self) -> None:
        """The sleeper reads on, or again from the first entry."""
        try:
            if self.sleeper is None:
                raise Reread("start")
            assert self.sleeper.position is not None
            after = self.sleeper.position[:2]
            read = self.sleeper.accept([one for one in self.log if parse_stream_id(one[0]) > after])
            self.sleeper.check(self.meta, self.epoch, self.last)
        except Reread:
            self.sleeper = Reader(self.meta, self.epoch)
            read = self.sleeper.accept(self.log)
        self.slept |= {one.digest() for _, one in read}


steps = st.one_of(
    st.tuples(st.just("append"), st.lists(st.sampled_from([1, 1, 10, 10, 100, 1_000, None]), min_size=1, max_size=12)),
    st.tuples(st.just("wait"), st.integers(1, 300)),
    st.tuples(st.just("trim"), st.none()),
    st.tuples(st.just("epoch"), st.none()),
    st.tuples(st.just("wake"), st.none()),
)


def take(model: Model, step: tuple[str, Any]) -> None:
    name, detail = step
    if name == "append":
        for lasts_s in detail:
            model.append(lasts_s)
    elif name == "wait":
        model.now += detail
    elif name == "trim":
        model.trim()
    elif name == "epoch":
        model.open_epoch()
    else:
        model.wake()


@given(st.lists(steps, max_size=60))
@settings(max_examples=300)
def test_whatever_is_trimmed_when_every_reader_holds_all_that_lives_and_memory_is_bounded(
    taken: list[tuple[str, Any]],
) -> None:
    model = Model()
    for step in taken:
        take(model, step)
        alive = model.alive()
        assert alive <= model.fresh_reader()
        other = replace_sleeper(model)
        assert alive <= other
        if step[0] == "trim":
            assert len(model.log) <= 2.5 * len(alive) + 3 * DEAD_MIN
            assert len(model.links) <= 3 + len(model.log)
        assert model.copied <= model.gained


def replace_sleeper(model: Model) -> set[bytes]:
    """What the sleeper would hold if it woke up now; it sleeps on."""
    kept, slept = model.sleeper, set(model.slept)
    model.sleeper = None if kept is None else replace(kept, skipped=[], gaps=set(kept.gaps))
    model.wake()
    held = model.slept
    model.sleeper, model.slept = kept, slept
    return held


@given(st.lists(st.sampled_from([1, 10, 100, None]), min_size=1, max_size=40), st.integers(1, 40))
def test_a_log_in_which_nothing_dies_any_more_comes_to_rest(lasts: list[int | None], rounds: int) -> None:
    model = Model()
    for lasts_s in lasts:
        model.append(lasts_s)
    model.now += 50
    for _ in range(3):
        model.quiet = None
        model.trim()
    before = model.last
    for _ in range(rounds):
        model.quiet = None
        model.trim()
    assert model.last == before
