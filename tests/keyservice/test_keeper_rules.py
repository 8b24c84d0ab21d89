"""The keeper rules, row by row of the table in ``keyservice.core.keepers``, with time that is moved by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from keyservice.core.evidence import EpochKey, LogHead, key_of, opened
from keyservice.core.keepers import Add, Bump, Keeper, MemoryDisk, Register, Send
from keyservice.limits import ADDED_GRACE_S, APPEND_ENTRIES_MAX
from verifier.log import Beat, Entry, Epoch, EpochLink, Generation, Position

VOTERS = {"eu": "k-eu", "us": "k-us", "ap": "k-ap"}
LATER = 100.0
"""Monotonic seconds at which no intent of these tests is left to its writer any more."""


def entry(name: str, **changes: Any) -> Entry:
    return msgspec.structs.replace(
        Entry(name, "jti", "https://id.test", name, None, 2_000_000_000, "", 0, "eu"), **changes
    )


def link(
    number: int, *, was_open: bool = False, voters: dict[str, str] | None = None, chosen: int | None = None
) -> EpochLink:
    """An epoch; ``chosen`` is the one whose voters it took over, None if its voters were chosen for it."""
    taken_over = None if chosen is None else key(chosen)
    return EpochLink(number, f"{number:016x}", None, VOTERS if voters is None else voters, was_open, (), taken_over)


def key(number: int) -> EpochKey:
    return EpochKey(number, f"{number:016x}")


def bump(above: int, seen: EpochKey | None, voters: dict[str, str], chosen: int) -> Bump:
    return Bump(above, seen, voters, frozenset(), key(chosen))


def epoch(*chain: EpochLink, known: tuple[EpochLink, ...] = (), is_open: bool = False) -> Epoch:
    last = chain[-1]
    made = Epoch(last.number, last.nonce, "r" * 40, False, Generation(last.number, 0), chain, known)
    return opened(made) if is_open else made


def beat(of: Epoch, n: int, seq: int = 0) -> Beat:
    return Beat(of.nonce, n, 1_000 + n, Position(of.number, seq, of.nonce), of.generation)


def head(of: Epoch, seq: int = 0, *, at: Beat | None = None, holed: bool = False) -> LogHead:
    return LogHead(of, at, Position(of.number, seq, of.nonce), holed)


def shown(of: Epoch, *entries: Entry) -> list[tuple[Position, Entry]]:
    return [(Position(of.number, seq, of.nonce), e) for seq, e in enumerate(entries, 1)]


E5 = epoch(link(5))


def keeper(*entries: Entry, links: tuple[EpochLink, ...] = (), promise: EpochKey | None = None) -> Keeper:
    """One that was just started, with this on its disk."""
    disk = MemoryDisk("k-eu")
    disk.store(entries, links)
    if promise is not None:
        disk.make_promise(promise)
    return Keeper("eu", disk)


def reads(one: Keeper, of: Epoch, *entries: Entry) -> None:
    """A whole pass over a log that holds these."""
    one.begin()
    one.read(shown(of, *entries), (*of.chain, *of.known))


def merged(*entries: Entry, beat_n: int = -1) -> Keeper:
    """One that is merged into epoch 5, whose log holds these."""
    one = keeper()
    reads(one, E5, *entries)
    step = one.next_step(head(E5, len(entries)), 0.0)
    assert step == Add(key_of(E5), (), ())
    one.added(step, beat_n, 0.0)
    assert one.merged == one.disk.promise == key_of(E5)
    return one


# -- there is no log --------------------------------------------------------------------------------------------------


def test_on_an_empty_server_a_keeper_that_holds_nothing_claims_its_seat() -> None:
    assert keeper().next_step(None, 0.0) == Register("k-eu")


def test_a_keeper_that_holds_anything_never_takes_an_empty_server_for_the_first_start() -> None:
    one = keeper(
        entry("a"), links=(link(3), link(5, voters={"eu": "k-eu", "us": "new"})), promise=EpochKey(9, "9" * 16)
    )
    assert one.next_step(None, 0.0) == bump(9, None, {"eu": "k-eu", "us": "new"}, 5)


def test_an_intent_alone_does_not_stand_in_the_way_of_the_first_start() -> None:
    one = keeper()
    one.intend([entry("a")], 5.0)
    assert one.next_step(None, 0.0) == Register("k-eu")
    reads(one, E5)
    step = one.next_step(head(E5), LATER)
    assert isinstance(step, Add)
    assert step.entries == (entry("a"),), "it gets into the log that others began"


# -- a log that knows nothing of this keeper's epochs ----------------------------------------------------------------


def test_the_voters_of_another_system_s_log_are_not_kept() -> None:
    one = merged(entry("a"))
    foreign = epoch(link(7, voters={"zz": "k-zz"}), is_open=True)
    reads(one, foreign, entry("theirs"))
    assert isinstance(one.next_step(head(foreign, 1), LATER), Bump | Add), "which the own primary refuses"
    reads(one, E5, entry("a"))
    later = epoch(link(5, was_open=True), link(9))
    reads(one, later, entry("a"))
    assert set(one.disk.links) == {key_of(link(5)), key_of(link(9))}
    assert isinstance(one.next_step(head(later, 1), LATER), Add), "and no epoch is begun with their voters"


def test_the_epochs_of_a_log_that_was_made_anew_are_kept_before_it_is_merged_into() -> None:
    one = merged(entry("a"))
    anew = epoch(link(7))
    reads(one, anew)
    assert key_of(anew) not in one.disk.links
    step = one.next_step(head(anew), LATER)
    assert isinstance(step, Add)
    one.added(step, -1, LATER)
    assert one.merged == key_of(anew)
    assert one.disk.links[key_of(anew)] == link(7)


# -- an epoch older than the promise ----------------------------------------------------------------------------------


def test_a_log_that_fell_back_behind_the_promise_gets_a_new_epoch_above_it() -> None:
    one = keeper(links=(link(5), link(8, chosen=5)), promise=key(8))
    reads(one, E5, entry("shown"))
    assert one.next_step(head(E5, 1), 0.0) == bump(8, key_of(E5), VOTERS, 5)
    assert list(one.disk.get([entry("shown").digest()])), "what it shows is stored all the same"


def test_nothing_is_reported_in_an_epoch_older_than_the_promise() -> None:
    one = keeper(promise=EpochKey(8, "8" * 16))
    reads(one, E5)
    one.added(Add(key_of(E5), (), ()), 3, 0.0)
    assert one.merged is None
    assert one.disk.promise == EpochKey(8, "8" * 16)


# -- an epoch that it has not merged into -----------------------------------------------------------------------------


def test_a_keeper_adds_what_it_holds_and_the_log_lacks_before_it_promises() -> None:
    one = keeper(entry("held"), entry("both"), links=(link(4, was_open=True),))
    reads(one, E5, entry("both"), entry("new"))
    step = one.next_step(head(E5, 2), 0.0)
    assert step == Add(key_of(E5), (entry("held"),), (link(4, was_open=True),))
    promises = [one.disk.promise]
    one.added(step, 4, 0.0)
    promises.append(one.disk.promise)
    assert promises == [None, key_of(E5)]
    assert one.merged == key_of(E5)
    assert one.disk.get([entry("new").digest()]) == [entry("new")]


def test_more_than_one_script_takes_is_added_in_several_and_promised_after_the_last() -> None:
    many = [entry(f"e{n}") for n in range(APPEND_ENTRIES_MAX + 1)]
    one = keeper(*many)
    reads(one, E5)
    first = one.next_step(head(E5), 0.0)
    assert isinstance(first, Add)
    assert (len(first.entries), first.complete) == (APPEND_ENTRIES_MAX, False)
    one.added(first, -1, 0.0)
    assert one.merged is None
    last = one.next_step(head(E5), 0.0)
    assert isinstance(last, Add)
    assert (last.entries, last.complete) == ((many[-1],), True)
    one.added(last, -1, 0.0)
    assert one.merged == key_of(E5)


def test_an_epoch_that_another_took_the_place_of_meanwhile_is_not_promised() -> None:
    one = keeper(entry("held"))
    reads(one, E5)
    step = one.next_step(head(E5), 0.0)
    assert isinstance(step, Add)
    later = epoch(link(5), link(6))
    one.begin()  # the mirror reads another history
    one.read(shown(later), later.chain)
    one.added(step, -1, 0.0)
    assert one.merged is None
    one.next_step(head(later), 0.0)
    one.added(step, -1, 0.0)
    assert (one.merged, one.disk.promise) == (None, None)


def test_an_entry_that_came_from_elsewhere_while_adding_is_added_before_the_promise() -> None:
    one = keeper(entry("held"))
    reads(one, E5)
    step = one.next_step(head(E5), 0.0)
    assert isinstance(step, Add)
    one.intend([entry("late")], 0.0)
    one.added(step, -1, 1.0)
    assert one.merged is None, "its writer has left it to the keeper, and it is in no log"
    step = one.next_step(head(E5), 1.0)
    assert isinstance(step, Add)
    assert step.entries == (entry("late"),)
    one.added(step, -1, 1.0)
    assert one.merged == key_of(E5)


def test_what_was_dropped_since_is_not_waited_for() -> None:
    one = keeper(entry("held"), entry("expired"))
    reads(one, E5)
    assert isinstance(one.disk, MemoryDisk)
    del one.disk.entries[entry("expired").digest()]
    step = one.next_step(head(E5), 0.0)
    assert isinstance(step, Add)
    assert step.entries == (entry("held"),)
    one.added(step, -1, 0.0)
    assert one.merged == key_of(E5)


def test_the_epochs_that_a_log_knows_as_never_opened_are_put_right() -> None:
    one = keeper(links=(link(4, was_open=True), link(3)))
    shown_epoch = epoch(link(4), link(5), known=(link(3),))
    reads(one, shown_epoch)
    step = one.next_step(head(shown_epoch), 0.0)
    assert isinstance(step, Add)
    assert step.links == (link(4, was_open=True),)


@pytest.mark.parametrize(
    ("newer", "bumps"),
    [
        (link(4, voters={"eu": "k-eu"}), True),
        (link(4, chosen=3), False),
        (link(2, voters={"eu": "k-eu"}), False),
        (link(7, voters={"eu": "k-eu"}, chosen=2), False),
    ],
)
def test_a_laggard_log_never_brings_old_voters_back(newer: EpochLink, bumps: bool) -> None:
    one = keeper(links=(newer,))
    laggard = epoch(link(3), link(5, chosen=3), link(6, chosen=3))
    reads(one, laggard)
    step = one.next_step(head(laggard), 0.0)
    if bumps:
        assert step == bump(6, key_of(laggard), {"eu": "k-eu"}, 4)
    else:
        assert isinstance(step, Add)


# -- the epoch that it has merged into --------------------------------------------------------------------------------


def test_a_report_says_how_far_everything_shown_is_on_disk() -> None:
    one = merged()
    one.read(shown(E5, entry("a"), entry("b")))
    step = one.next_step(head(E5, 2), 0.0)
    assert isinstance(step, Send)
    report = step.report
    assert (report.keeper_id, report.region, report.epoch, report.held) == ("k-eu", "eu", key_of(E5), "5-2")
    assert (report.beat_n, report.commit) == (-1, one.disk.commit)


@pytest.mark.parametrize(
    ("is_open", "n", "seq", "confirmed"),
    [(True, 8, 2, True), (True, 7, 2, False), (True, 8, 3, False), (False, 8, 2, False)],
)
def test_a_beat_is_confirmed_if_issued_in_an_open_epoch_after_the_merge_and_everything_before_it_is_held(
    is_open: bool, n: int, seq: int, confirmed: bool
) -> None:
    one = merged(beat_n=7)
    one.read(shown(E5, entry("a"), entry("b")))
    now = epoch(link(5), is_open=is_open)
    step = one.next_step(head(now, 2, at=beat(now, n, seq)), 0.0)
    assert isinstance(step, Send)
    told = (step.report.beat_n, step.report.beat_at_ms, step.report.beat_position)
    assert told == ((n, 1_000 + n, f"5-{seq}") if confirmed else (-1, 0, ""))


def test_a_beat_of_another_epoch_is_not_confirmed() -> None:
    one = merged()
    now = epoch(link(5), is_open=True)
    step = one.next_step(head(now, at=beat(epoch(link(4)), 9)), 0.0)
    assert isinstance(step, Send)
    assert step.report.beat_n == -1


def test_after_a_restart_a_keeper_merges_again_before_it_reports() -> None:
    before = merged(entry("a"))
    one = Keeper("eu", before.disk)
    reads(one, E5, entry("a"))
    step = one.next_step(head(E5, 1), 0.0)
    assert step == Add(key_of(E5), (), ())
    one.added(step, 12, 0.0)
    now = epoch(link(5), is_open=True)
    for n, told in ((12, -1), (13, 13)):
        sent = one.next_step(head(now, 1, at=beat(now, n)), 0.0)
        assert isinstance(sent, Send)
        assert sent.report.beat_n == told


def test_what_was_added_and_is_on_its_way_back_is_not_added_twice() -> None:
    one = keeper(entry("held"))
    reads(one, E5)
    step = one.next_step(head(E5), 0.0)
    assert isinstance(step, Add)
    one.added(step, -1, 0.0)
    assert isinstance(one.next_step(head(E5), 0.0), Send)
    later = epoch(link(5), link(6))
    reads(one, later)
    again = one.next_step(head(later), 0.0)
    assert isinstance(again, Add)
    assert again.entries == (entry("held"),), "another history does not have it"


def test_what_was_added_and_never_comes_back_was_deleted_and_is_added_again() -> None:
    one = keeper(entry("held"))
    reads(one, E5)
    step = one.next_step(head(E5), 0.0)
    assert isinstance(step, Add)
    one.added(step, -1, 0.0)
    assert isinstance(one.next_step(head(E5), ADDED_GRACE_S - 0.1), Send)
    again = one.next_step(head(E5), ADDED_GRACE_S)
    assert isinstance(again, Add)
    assert again.entries == (entry("held"),)


# -- a hole -----------------------------------------------------------------------------------------------------------


def test_a_log_with_a_hole_gets_a_new_epoch_with_the_same_voters() -> None:
    one = merged()
    assert one.next_step(head(E5, 3, holed=True), 0.0) == bump(5, key_of(E5), VOTERS, 5)


def test_a_log_that_ends_before_its_epochs_first_entry_has_a_hole() -> None:
    one = merged()
    now = epoch(link(5), link(6, chosen=5))
    behind = head(E5, 3)._replace(epoch=now)
    assert one.next_step(behind._replace(at_end=False), 0.0) is None, "that entry is still to be read"
    assert one.next_step(behind, 0.0) == bump(6, key_of(now), VOTERS, 5)


# -- what was read is another epoch's history ------------------------------------------------------------------------


def test_nothing_is_merged_into_an_epoch_whose_history_was_not_read() -> None:
    one = merged(entry("a"), entry("tail"))
    laggards = epoch(link(5), link(6, chosen=5))  # without "tail", in the place of the log that was read
    assert one.next_step(head(E5, 2)._replace(epoch=laggards, at_end=False), 0.0) is None
    one.added(Add(key_of(laggards), (), ()), -1, 0.0)
    assert one.merged == key_of(E5), "an answer that comes late merges it no more than that"
    reads(one, laggards, entry("a"))
    step = one.next_step(head(laggards), 0.0)
    assert isinstance(step, Add)
    assert step.entries == (entry("tail"),)


@pytest.mark.parametrize(
    ("at_end", "holed", "learnt"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_only_a_whole_log_that_was_read_to_its_end_teaches_that_an_epoch_has_opened(
    at_end: bool, holed: bool, learnt: bool
) -> None:
    now = epoch(link(4, was_open=True), link(5, chosen=4), known=(link(3, was_open=True),))
    links = head(now, holed=holed)._replace(at_end=at_end).links
    assert [(one.number, one.opened) for one in links] == [(4, learnt), (5, False), (3, learnt)]


def test_epochs_are_named_with_the_last_of_the_entries() -> None:
    disk = MemoryDisk("k-eu")
    disk.store([entry("a"), entry("b"), entry("c")], (link(4, was_open=True),))
    one = Keeper("eu", disk, add_entries_max=2)
    reads(one, E5)
    first = one.next_step(head(E5), 0.0)
    assert isinstance(first, Add)
    assert (len(first.entries), first.links, first.complete) == (2, (), False)
    one.added(first, -1, 0.0)
    last = one.next_step(head(E5), 0.0)
    assert last == Add(key_of(E5), (entry("c"),), (link(4, was_open=True),))


# -- intents ----------------------------------------------------------------------------------------------------------


def added_now(one: Keeper, mono: float, seq: int = 0) -> tuple[Entry, ...]:
    step = one.next_step(head(E5, seq), mono)
    return step.entries if isinstance(step, Add) else ()


def test_an_intent_is_on_disk_at_once_and_left_to_its_writer_for_a_while() -> None:
    one = merged()
    one.intend([entry("a")], 5.0)
    assert one.disk.get([entry("a").digest()]) == [entry("a")]
    assert one.pending == 1
    assert added_now(one, 4.9) == ()
    assert added_now(one, 5.0) == (entry("a"),)


def test_an_intent_that_its_writer_gave_up_is_added_at_once() -> None:
    one = merged()
    one.intend([entry("a")], 5.0)
    one.given_up([entry("a")])
    assert added_now(one, 0.0) == (entry("a"),)


def test_an_intent_that_was_appended_in_this_epoch_is_not_appended_again() -> None:
    one = merged()
    one.intend([entry("a"), entry("b")], 5.0)
    one.appended(key_of(E5), [entry("a")])
    one.appended(EpochKey(4, "4" * 16), [entry("b")])
    assert added_now(one, LATER) == (entry("b"),)
    one.read(shown(E5, entry("a", at=7), entry("b", at=7)))
    assert added_now(one, LATER, 2) == ()
    assert one.pending == 0


def test_an_intent_that_the_log_shows_is_nobodys_any_more() -> None:
    one = merged()
    one.intend([entry("a")], 5.0)
    one.read(shown(E5, entry("a", at=7)))
    assert added_now(one, LATER, 1) == ()
    assert one.disk.get([entry("a").digest()]) == [entry("a", at=7)]


def test_an_intent_keeps_no_promise_waiting() -> None:
    one = keeper()
    one.intend([entry("a")], 5.0)
    reads(one, E5)
    step = one.next_step(head(E5), 1.0)
    assert step == Add(key_of(E5), (), ())
    one.added(step, -1, 1.0)
    assert one.merged == key_of(E5)


def test_an_intent_of_what_is_held_already_changes_nothing() -> None:
    one = keeper(entry("a"))
    one.intend([entry("a")], LATER)
    reads(one, E5)
    assert added_now(one, 0.0) == (entry("a"),)


def test_after_a_restart_an_intent_is_added_at_once() -> None:
    before = merged()
    before.intend([entry("a")], LATER)
    one = Keeper("eu", before.disk)
    reads(one, E5)
    assert added_now(one, 0.0) == (entry("a"),)
