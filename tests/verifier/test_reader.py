"""Following the log: only the successor is accepted, and a gap is arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.verifier.support import NONCE, NONCE_2, entry
from verifier.log import Epoch, EpochLink, Generation, Meta, Position
from verifier.reader import Raw, Reader, Reread

META = Meta("i", None, 1, 1, 86_400)


def epoch_of(*links: tuple[int, str], opened: bool = False, previous: str | None = None) -> Epoch:
    """Where the chain has two links or more, the last one follows ``previous``."""
    chain = tuple(EpochLink(number, nonce, None, {}, opened) for number, nonce in links)
    chain = (*chain[:-1], msgspec.structs.replace(chain[-1], previous=previous))
    number, nonce = links[-1]
    return Epoch(number, nonce, "r", opened, Generation(number, 0), chain)


ONE = epoch_of((1, NONCE))
TWO = epoch_of((1, NONCE), (2, NONCE_2), previous=f"1-5.{NONCE}")


def raw(stream_id: str, kind: str = "jti", value: str | None = None, **fields: Any) -> Raw:
    made = entry(kind, stream_id if value is None else value, **fields).encode()
    return stream_id.encode(), {name.encode(): text.encode() for name, text in made.items()}


def opening(stream_id: str, nonce: str, previous: str = "-") -> Raw:
    return raw(stream_id, "epoch", f"{nonce} {previous}", id="e", issuer="", expires_at=0)


def run(number: int, seqs: Iterable[int]) -> list[Raw]:
    return [raw(f"{number}-{seq}") for seq in seqs]


def reader(meta: Meta = META, epoch: Epoch = ONE, **state: Any) -> Reader:
    return Reader(meta, epoch, **state)


def reason_of(read: Reader, batch: list[Raw]) -> str:
    with pytest.raises(Reread) as caught:
        read.accept(batch)
    return caught.value.reason


START = opening("1-0", NONCE)


def test_a_log_without_a_gap_is_read_in_any_batches() -> None:
    log = [START, *run(1, range(1, 6)), opening("2-0", NONCE_2, f"1-5.{NONCE}"), *run(2, range(1, 4))]
    for size in (1, 2, 5, 100):
        read = reader(epoch=TWO)
        seen = []
        for first in range(0, len(log), size):
            seen += read.accept(log[first : first + size])
        assert [str(position) for position, _ in seen] == [
            *(f"1-{n}.{NONCE}" for n in range(6)),
            *(f"2-{n}.{NONCE_2}" for n in range(4)),
        ]
        assert read.position == Position(2, 3, NONCE_2)
        assert (read.skipped, read.holed_nonce) == ([], None)


@pytest.mark.parametrize("seq", [0, 1, 2, 4, 9])
def test_anything_but_the_successor_is_a_hole_and_the_position_stays_before_it(seq: int) -> None:
    read = reader()
    read.accept([START, *run(1, [1, 2])])
    assert reason_of(read, run(1, [seq])) == "hole"
    assert read.position == Position(1, 2, NONCE)
    read.accept(run(1, [3]))
    assert read.position == Position(1, 3, NONCE)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (opening("2-0", NONCE_2, f"1-3.{NONCE}"), "fork"),  # the epoch before went further than what was read
        (opening("2-0", NONCE_2, f"1-1.{NONCE}"), "fork"),  # what was read is not in the new epoch's history
        (opening("2-0", NONCE_2, f"1-2.{NONCE_2}"), "fork"),  # the same number, another history
        (opening("2-0", NONCE_2, "-"), "fork"),
        (raw("2-0"), "hole"),  # no epoch entry
        (raw("2-1"), "hole"),
        (opening("2-1", NONCE_2, f"1-2.{NONCE}"), "hole"),
        (opening("0-0", NONCE_2, f"1-2.{NONCE}"), "hole"),
    ],
)
def test_a_new_epoch_must_name_what_was_read_as_its_predecessor(after: Raw, reason: str) -> None:
    read = reader(epoch=TWO)
    read.accept([START, *run(1, [1, 2])])
    assert reason_of(read, [after]) == reason
    assert read.position == Position(1, 2, NONCE)


@pytest.mark.parametrize("first", [raw("1-0"), raw("1-1"), opening("1-1", NONCE), raw("5-5")])
def test_a_log_that_was_not_trimmed_begins_with_an_epoch_entry_0(first: Raw) -> None:
    assert reason_of(reader(), [first]) == "hole"


@pytest.mark.parametrize(
    ("first", "good"),
    [("1-5", True), ("1-4", False), ("1-6", False), ("1-3", False), ("2-1", False)],
)
def test_the_first_entry_of_a_trimmed_log_follows_what_was_trimmed(first: str, good: bool) -> None:
    read = reader(meta=Meta("i", (1, 4), 1, 1, 86_400), epoch=TWO)
    if good:
        read.accept([raw(first)])
        assert read.position == Position(1, 5, NONCE)
    else:
        assert reason_of(read, [raw(first)]) == "hole"


def test_a_log_may_be_trimmed_to_the_end_of_an_epoch() -> None:
    read = reader(meta=Meta("i", (1, 4), 1, 1, 86_400), epoch=TWO)
    read.accept([opening("2-0", NONCE_2, f"1-4.{NONCE}")])
    assert read.position == Position(2, 0, NONCE_2)


@pytest.mark.parametrize("trimmed_to", [None, (1, 3), (1, 5), (0, 4)])
def test_a_log_that_begins_with_a_later_epoch_than_it_was_trimmed_to_has_a_hole(
    trimmed_to: tuple[int, int] | None,
) -> None:
    read = reader(meta=Meta("i", trimmed_to, 1, 1, 86_400), epoch=TWO)
    assert reason_of(read, [opening("2-0", NONCE_2, f"1-4.{NONCE}")]) == "hole"


@pytest.mark.parametrize("trimmed_to", [None, (1, 4)])
def test_an_epoch_that_was_opened_on_an_empty_log_begins_one(trimmed_to: tuple[int, int] | None) -> None:
    read = reader(meta=Meta("i", trimmed_to, 1, 1, 86_400), epoch=TWO)
    read.accept([opening("2-0", NONCE_2)])
    assert read.position == Position(2, 0, NONCE_2)


def test_an_epoch_that_is_not_in_the_chain_is_a_fork() -> None:
    assert reason_of(reader(meta=Meta("i", (5, 4), 1, 1, 86_400)), [raw("5-5")]) == "fork"


# -- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {b"v": b"9"}, {b"v": b"1", b"id": b"\xff"}, {b"\xff": b"\xff"}])
def test_a_poison_entry_takes_its_place_is_counted_and_stops_nobody(fields: dict[bytes, bytes]) -> None:
    read = reader()
    seen = read.accept([START, raw("1-1"), (b"1-2", fields), raw("1-3")])
    assert [position.seq for position, _ in seen] == [0, 1, 3]
    assert len(read.skipped) == 1
    assert read.position == Position(1, 3, NONCE)


def test_a_poison_entry_at_the_end_moves_the_position_too() -> None:
    read = reader()
    read.accept([START, (b"1-1", {})])
    assert read.position == Position(1, 1, NONCE)


# -- holes that are in the log itself --------------------------------------------------------------------------------


def test_a_tolerant_reader_goes_over_a_hole_and_says_so() -> None:
    read = reader(tolerant=True)
    seen = read.accept([START, *run(1, [1, 3, 4])])
    assert [position.seq for position, _ in seen] == [0, 1, 3, 4]
    assert read.holed_nonce == NONCE


def test_a_tolerant_reader_of_a_log_without_a_hole_finds_none() -> None:
    read = reader(tolerant=True)
    read.accept([START, *run(1, range(1, 9))])
    assert read.holed_nonce is None


@pytest.mark.parametrize(
    "log",
    [
        run(1, [3, 4]),
        [START, *run(1, [1]), opening("2-0", NONCE_2, f"1-3.{NONCE}"), *run(2, [1])],
        [START, *run(1, [1]), *run(2, [2, 3])],
        [START, *run(2, [5])],
    ],
)
def test_a_tolerant_reader_takes_any_log_whole(log: list[Raw]) -> None:
    read = reader(epoch=TWO, tolerant=True)
    assert len(read.accept(log)) == len(log)
    assert read.holed_nonce == NONCE_2


# -- between rounds ---------------------------------------------------------------------------------------------------


def at(seq: int = 5, **state: Any) -> Reader:
    return reader(position=Position(1, seq, NONCE), **state)


def check(read: Reader, *, meta: Meta = META, epoch: Epoch = ONE, last: tuple[int, int] | None = (1, 5)) -> str | None:
    try:
        read.check(meta, epoch, last)
    except Reread as reread:
        return reread.reason
    return None


@pytest.mark.parametrize(
    ("previous", "reason"), [(f"1-6.{NONCE}", None), (f"1-5.{NONCE}", None), (f"1-4.{NONCE}", "fork"), (None, "fork")]
)
def test_an_epoch_that_began_before_the_position_has_not_what_was_read_since(
    previous: str | None, reason: str | None
) -> None:
    later = epoch_of((1, NONCE), (2, NONCE_2), previous=previous)
    assert check(at(), epoch=later, last=(2, 0)) == reason


@pytest.mark.parametrize("last", [(1, 5), (1, 6), (2, 0)])
def test_a_log_that_goes_on_is_no_contradiction(last: tuple[int, int]) -> None:
    read = at()
    assert check(read, epoch=TWO, last=last) is None
    assert read.epoch is TWO


@pytest.mark.parametrize("last", [(1, 4), (0, 9), None])
def test_a_log_that_ends_before_the_position_was_rewound(last: tuple[int, int] | None) -> None:
    assert check(at(), last=last) == "rewind"


def test_another_incarnation_is_another_log() -> None:
    assert check(at(), meta=Meta("j", None, 1, 1, 86_400)) == "incarnation"


def test_another_nonce_for_a_number_that_is_held_is_another_history() -> None:
    assert check(at(), epoch=epoch_of((1, NONCE_2))) == "nonce"
    assert check(at(), epoch=epoch_of((1, NONCE_2), (2, NONCE))) == "nonce"
    assert check(at(), epoch=epoch_of((2, NONCE_2))) == "nonce"


@pytest.mark.parametrize(
    ("trimmed_to", "reason"), [((1, 4), None), ((1, 5), None), ((1, 6), "trimmed"), ((2, 0), "trimmed")]
)
def test_a_log_trimmed_past_the_position_is_read_again(trimmed_to: tuple[int, int], reason: str | None) -> None:
    assert check(at(), meta=Meta("i", trimmed_to, 1, 1, 86_400), last=(2, 3)) == reason


def test_the_next_epoch_after_a_hole_is_read_from_the_start() -> None:
    assert check(at(holed_nonce=NONCE)) is None
    assert check(at(holed_nonce=NONCE), epoch=TWO) == "next_epoch"


HOLED = [START, *run(1, [1, 3, 4])]
THE_GAP = (Position(1, 1, NONCE), Position(1, 3, NONCE))
NEXT = [*HOLED, opening("2-0", NONCE_2, f"1-4.{NONCE}"), *run(2, [1])]


def test_a_gap_met_in_an_earlier_epoch_does_not_stain_the_next_one() -> None:
    first = reader(tolerant=True)
    first.accept(HOLED)
    assert check(first, last=(1, 4)) is None  # after the gap, the log is still in this epoch
    again = reader(epoch=TWO, known=first.known_after())
    again.accept(NEXT)
    assert (again.position, again.holed_nonce) == (Position(2, 1, NONCE_2), None)


def test_a_gap_that_may_be_younger_than_the_next_epoch_stains_that_too() -> None:
    first = reader(tolerant=True)
    first.accept(HOLED)
    assert check(first, epoch=TWO, last=(2, 1)) == "next_epoch"  # it may have been opened before the gap was made
    assert first.known_after() == frozenset()
    assert reason_of(reader(epoch=TWO, known=first.known_after()), NEXT) == "hole"


def test_a_gap_that_does_not_stain_is_open_until_an_epoch_that_began_later_or_names_it() -> None:
    third = EpochLink(3, "3" * 16, f"2-0.{NONCE_2}", {}, False)
    for later in (TWO, replace(TWO, number=3, nonce=third.nonce, chain=(*TWO.chain, third))):
        read = reader(held=Position(1, 4, NONCE))
        read.accept(HOLED)
        assert (read.holed_nonce, read.open_gaps) == (None, {THE_GAP})
        read.check(META, ONE if later is TWO else TWO, (2, 1))
        assert read.open_gaps == {THE_GAP}  # that epoch may have begun before the gap was made
        read.check(META, later, (2, 1))
        assert (read.open_gaps, read.known) == (set(), frozenset({THE_GAP}))
    read = reader(held=Position(1, 4, NONCE))
    read.accept(HOLED)
    read.check(META, replace(TWO, holes=frozenset({THE_GAP})), (2, 1))
    assert read.open_gaps == set()


@pytest.mark.parametrize("nonce", [NONCE, NONCE_2])
def test_a_gap_of_another_history_is_not_known(nonce: str) -> None:
    known = frozenset({(THE_GAP[0]._replace(nonce=nonce), THE_GAP[1])})
    read = reader(known=known)
    if nonce == NONCE:
        read.accept(HOLED)
        assert read.holed_nonce is None
    else:
        assert reason_of(read, HOLED) == "hole"


@pytest.mark.parametrize(("held", "stained"), [((1, 3), False), ((1, 4), False), ((1, 2), True), ((0, 9), True)])
def test_a_gap_before_what_is_held_does_not_stain(held: tuple[int, int], stained: bool) -> None:
    read = reader(tolerant=True, held=Position(*held, NONCE))
    read.accept(HOLED)
    assert (read.holed_nonce is not None) is stained
    assert read.gaps == {THE_GAP}


def test_what_is_held_of_another_history_vouches_for_no_gap() -> None:
    assert reason_of(reader(held=Position(1, 4, NONCE_2)), HOLED) == "hole"


@pytest.mark.parametrize("holes", [{THE_GAP}, {THE_GAP, (None, Position(7, 7, NONCE))}, set()])
def test_a_gap_that_the_epoch_names_does_not_stain_it(holes: set[Any]) -> None:
    read = reader(epoch=replace(TWO, holes=frozenset(holes)), tolerant=True)
    read.accept(NEXT)
    assert (read.holed_nonce is None) is bool(holes)


@pytest.mark.parametrize(("trimmed_to", "reason"), [((1, 1), None), ((1, 2), "trimmed"), ((1, 3), "trimmed")])
def test_a_stain_is_gone_once_the_log_is_trimmed_past_the_gap(trimmed_to: tuple[int, int], reason: str | None) -> None:
    read = reader(tolerant=True)
    read.accept(HOLED)
    assert check(read, meta=Meta("i", trimmed_to, 1, 1, 86_400), last=(1, 4)) == reason


@pytest.mark.parametrize(
    ("length", "trimmed_to", "reason"),
    [
        (5, None, None),
        (4, None, "deleted"),
        (3, (1, 1), None),
        (2, (1, 1), "deleted"),
        (2, (1, 2), None),
        (6, None, "deleted"),
    ],
)
def test_a_log_that_is_not_as_long_as_what_was_read_of_it_is_read_again(
    length: int, trimmed_to: tuple[int, int] | None, reason: str | None
) -> None:
    read = reader()
    read.accept([START, *run(1, range(1, 5))])
    meta = Meta("i", trimmed_to, 1, 1, 86_400)
    if reason is None:
        read.check(meta, ONE, (1, 4), length)
    else:
        with pytest.raises(Reread, match=reason):
            read.check(meta, ONE, (1, 4), length)


def test_a_log_that_goes_on_past_the_position_is_counted_later() -> None:
    read = reader()
    read.accept([START, *run(1, range(1, 5))])
    read.check(META, ONE, (1, 5), 3)


def test_epochs_and_gaps_are_counted_too() -> None:
    read = reader(epoch=TWO, tolerant=True)
    read.accept(NEXT)
    read.check(META, TWO, (2, 1), 6)
    with pytest.raises(Reread, match="deleted"):
        read.check(META, TWO, (2, 1), 5)


@pytest.mark.parametrize("seqs", [[1, 4], [3, 4], [1, 3, 5]])
def test_a_gap_that_has_grown_or_is_another_one_is_not_known(seqs: list[int]) -> None:
    assert reason_of(reader(known=frozenset({THE_GAP})), [START, *run(1, seqs)]) == "hole"


def test_nothing_is_passed_over_before_an_id_that_cannot_be_read() -> None:
    read = reader()
    read.accept([START])
    assert reason_of(read, [raw("1-1"), (b"99999999999999999-0", {})]) == "stream_id"


def test_a_log_whose_hole_others_have_found_is_read_again_by_those_who_saw_none() -> None:
    gap = (Position(1, 1, NONCE), Position(1, 3, NONCE))
    named = replace(ONE, holes=frozenset({gap}))
    assert check(at(), epoch=named) == "answered", "what was in it may stand nowhere but on this keeper's disk"
    assert check(replace(at(), gaps={gap}), epoch=named) is None
    assert check(replace(at(), epoch=named), epoch=named) is None
