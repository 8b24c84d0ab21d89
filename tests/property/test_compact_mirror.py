"""The compact mirror refuses what a plain set of entries refuses, whatever comes in what order, and forgets late."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.verifier.support import ISSUER, NOW
from verifier import fingerprints, revocations
from verifier.entries import Fields, read_entry
from verifier.fingerprints import CODES_MAX, WIDTH_BITS_MAX, Table, coarse_end, fingerprint
from verifier.log import NEVER_EXPIRES, Entry, FormatError
from verifier.revocations import Hit, Mirror, Snapshot

DAY = 86_400
COARSE_S = 1 << WIDTH_BITS_MAX
NAMED = ("jti", "tok", "sid", "kid")
things = st.tuples(st.sampled_from(NAMED), st.sampled_from([ISSUER, "https://other.test"]), st.integers(0, 60))
Thing = tuple[str, str, str]


def find(snapshot: Snapshot, thing: Thing) -> Hit | None:
    kind, issuer, value = thing
    return snapshot.find(issuer=issuer, **{kind: value})  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Few entries already fold, split, merge and run out of codes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revocations, "RECENT_MAX", 5)
        patch.setattr(revocations, "FOLD_MIN", 7)
        patch.setattr(fingerprints, "LOAD", 2)
        yield


class CompactMirror(RuleBasedStateMachine):
    """Beside a dictionary of when each thing that was ever named ends."""

    @initialize(codes=st.sampled_from([2, 3, CODES_MAX]))
    def begin(self, codes: int) -> None:
        fingerprints.CODES_MAX = codes  # type: ignore[misc]  # put back in teardown
        self.mirror, self.ends, self.limit = Mirror(), {}, 0.0  # type: ignore[var-annotated]
        self.snapshots: list[tuple[Snapshot, set[Thing]]] = []

    def teardown(self) -> None:
        fingerprints.CODES_MAX = CODES_MAX  # type: ignore[misc]

    @rule(named=st.lists(st.tuples(things, st.integers(0, 20)), max_size=12), unknown=st.booleans())
    def apply(self, named: list[tuple[tuple[str, str, int], int]], unknown: bool) -> None:
        entries: list[Entry] = []
        for (kind, issuer, number), days in named:
            thing = (kind, issuer, f"{number}")
            ends = NEVER_EXPIRES if kind == "kid" else NOW + days * DAY // 2
            entries.append(
                Entry(f"e-{len(entries)}", *thing, None, ends, "", 0 if unknown else NOW * 1000, "r").check()
            )
            self.ends[thing] = max(self.ends.get(thing, 0), float("inf") if kind == "kid" else ends)
        before = self.mirror.snapshot
        assert self.mirror.apply(entries) is (self.mirror.snapshot is not before)
        assert not self.mirror.apply(entries)

    @rule(days=st.integers(0, 24), most=st.sampled_from([1, 3, revocations.SWEEP_ALL]))
    def drop(self, days: int, most: int) -> None:
        self.limit = max(self.limit, NOW + days * DAY / 2)
        before = self.mirror.snapshot
        assert self.mirror.drop_expired(self.limit, self.limit, 0, most) is (self.mirror.snapshot is not before)
        if most == revocations.SWEEP_ALL:
            assert not self.mirror.unswept
            kept = {thing for thing in self.ends if find(self.mirror.snapshot, thing)}
            # 20 half days and no more: past the widest rounding of the last of few codes, everything must be gone.
            assert (
                all(end > self.limit for thing, end in self.ends.items() if thing in kept)
                or self.limit < NOW + 11 * DAY
            )

    @rule()
    def remember(self) -> None:
        held = {thing for thing in self.ends if find(self.mirror.snapshot, thing)}
        self.snapshots = [*self.snapshots[-3:], (self.mirror.snapshot, held)]

    @invariant()
    def everything_that_may_still_matter_is_held(self) -> None:
        if hasattr(self, "ends"):
            assert all(find(self.mirror.snapshot, thing) for thing, end in self.ends.items() if end > self.limit)

    @invariant()
    def what_is_counted_is_what_is_found(self) -> None:
        if hasattr(self, "ends"):
            every = [
                (kind, issuer, f"{n}") for kind in NAMED for issuer in (ISSUER, "https://other.test") for n in range(61)
            ]
            held = {thing for thing in every if find(self.mirror.snapshot, thing)}
            assert held <= set(self.ends)
            assert self.mirror.snapshot.entries == len(held)

    @invariant()
    def no_snapshot_ever_changes(self) -> None:
        for snapshot, held in getattr(self, "snapshots", []):
            assert {thing for thing in self.ends if find(snapshot, thing)} == held


TestCompactMirror = CompactMirror.TestCase
TestCompactMirror.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.integers(1, 2**40), st.integers(0, 2**43))
def test_an_end_is_rounded_up_by_a_32nd_of_the_life_and_18_hours_at_most(expires_at: int, at_ms: int) -> None:
    end = coarse_end(expires_at, at_ms)
    life_s = expires_at - at_ms // 1000 if at_ms else 0
    assert 0 <= end - expires_at < min(max(256, life_s / 32 + 1), COARSE_S)


def test_a_fingerprint_across_two_records_is_not_held() -> None:
    table, _ = Table().with_records([(7, NOW), (1 << 40, NOW)])
    (bucket,) = table.buckets
    assert len(bucket) == 18
    across = [int.from_bytes(bucket[at : at + 8], "little", signed=True) for at in range(1, 9)]
    assert [table.end_of(mark) for mark in across] == [None] * 8
    more, _ = table.with_records([(across[0], NOW + 1)])
    assert (more.size, more.end_of(across[0]), more.end_of(7)) == (3, NOW + 1, NOW)


def test_past_the_last_code_ends_are_rounded_up_and_never_down() -> None:
    table, _ = Table().with_records([(n, 256 * n) for n in range(1, 1_000)])
    assert all((table.end_of(n) or 0) >= 256 * n for n in range(1, 1_000))
    assert table.swept(256 * 999, 1 << 30).size == 0


def test_a_known_revocation_is_never_missing_while_others_are_folded_and_swept() -> None:
    mirror, known, ended = Mirror(), ["t-0"], threading.Event()
    missing: list[str] = []
    mirror.apply([token("t-0")])

    def look(seed: int) -> None:
        rng = Random(seed)
        while not ended.is_set():
            count = len(known)
            snapshot = mirror.snapshot
            asked = [known[rng.randrange(count)] for _ in range(20)] + known[max(0, count - 5) : count]
            missing.extend(value for value in asked if not snapshot.find(issuer=ISSUER, jti=value))

    readers = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    rng = Random(1)
    for _ in range(400):
        batch = [token(f"t-{len(known) + n}") for n in range(rng.choice([1, 3, 20]))]
        mirror.apply([*batch, *(token(f"old-{rng.random()}", NOW - 9 * DAY) for _ in range(5))])
        known.extend(entry.value for entry in batch)
        mirror.drop_expired(NOW, NOW, 0, 4)
    ended.set()
    for reader in readers:
        reader.join()
    assert not missing
    while mirror.drop_expired(NOW, NOW, 0):
        pass
    assert mirror.snapshot.entries == len(known)


def token(value: str, expires_at: int = NOW + DAY) -> Entry:
    return Entry("e", "jti", ISSUER, value, None, expires_at, "", NOW * 1000, "r")


def test_with_a_known_hash_seed_fingerprints_are_keyed_by_another_secret() -> None:
    code = "from verifier.fingerprints import fingerprint as f; print(f is hash, f('a'))"
    known = {"PYTHONHASHSEED": "0", "PATH": ""}
    said = [subprocess.check_output([sys.executable, "-c", code], env=known, text=True).split() for _ in range(2)]
    assert [own for own, _ in said] == ["False", "False"]
    assert said[0][1] != said[1][1]
    own = subprocess.check_output([sys.executable, "-c", code], env={"PATH": ""}, text=True).split()[0]
    assert own == str(sys.hash_info.width == 64 and sys.hash_info.algorithm.startswith("siphash"))
    assert isinstance(fingerprint("a"), int)


# -- reading entries quickly -------------------------------------------------------------------------------------------

GOOD = {
    "v": "1", "id": "~AZXwoPhldKuBzQb1r9eQ3A", "kind": "jti", "issuer": ISSUER, "value": "t-1", "before": "",
    "expires_at": str(NOW), "reason": "", "at": str(NOW * 1000), "region": "r",
}  # fmt: skip
ODD = {
    "v": ["2", "", "01"],
    "id": ["a", "~", "~AZXwoPhldKuBzQb1r9eQ3B", "~AZXwoPhldKuBzQb1r9eQ3Aa", "~AZXwoPhldKuBzQb1r9eQ3", "x" * 64,
           "x" * 65, "~AZXwoPhldKuBzQb1r9e+3A", "~AZXwoPhldKuBzQb1r9e_-A", "~AZXwoPhldKuBzQb1r9e=3A", ""],
    "kind": ["tok", "sid", "kid", "sub", "epoch", "all", "new"],
    "issuer": ["", "é" * 128, "é" * 128 + "x", "i"],
    "value": ["", "é" * 128, "é" * 128 + "x", "\x00", "a\r\nb"],
    "before": ["1", "x"],
    "expires_at": ["0", "01", "-1", "9" * 16, "9" * 17, "", "1\n", "\u0661"],
    "reason": ["why", "r" * 256, "r" * 257],
    "at": ["0", "x", ""],
    "region": ["", "r" * 300],
}  # fmt: skip


def outcome(read: object, fields: Fields) -> object:
    try:
        return read(fields)  # type: ignore[operator]
    except FormatError as error:
        return error.code


@given(st.data())
@settings(max_examples=500)
def test_an_entry_that_is_read_quickly_is_the_one_that_the_rule_gives(data: st.DataObject) -> None:
    changed = data.draw(st.lists(st.sampled_from(sorted(ODD)), max_size=2))
    text = {**GOOD, **{name: data.draw(st.sampled_from(ODD[name])) for name in changed}}
    raw = {name.encode(): value.encode() for name, value in text.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(raw)), max_size=1)) if data.draw(st.booleans()) else []:
        if data.draw(st.booleans()):
            del raw[name]
        else:
            raw[name] += data.draw(st.sampled_from([b"\xff", b"\n", b" ", b"\xed\xa0\x80"]))
    if data.draw(st.booleans()):
        raw[b"later"] = b"1"
    expected = outcome(Entry.decode, raw)
    assert outcome(read_entry, raw) == expected
    assert outcome(read_entry, [part for pair in raw.items() for part in pair]) == expected
