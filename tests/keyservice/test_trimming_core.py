"""What is cut off the log, and what is carried forward: decided without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from keyservice.core.trimming import (
    EPOCH_WEIGHT,
    TRIM_DEAD_MIN,
    TRIM_ENTRIES_MAX,
    Cut,
    Quiet,
    Survey,
    death_line,
    kept_links,
    plan,
)
from tests.keyservice.trimming_support import epoch_of, jti, link, raw
from tests.verifier.support import NONCE, NOW, entry
from verifier.log import Epoch, EpochLink
from verifier.reader import Raw

LINE = NOW - 300
ONE = epoch_of(EpochLink(1, NONCE, None, {}, True))
NONCE_OF_2 = f"{2:016x}"
TWO = epoch_of(EpochLink(1, NONCE, None, {}, True), link(2))


def dead(stream_id: str) -> Raw:
    return raw(stream_id, jti(stream_id, LINE))


def live(stream_id: str, end: int = LINE + 1) -> Raw:
    return raw(stream_id, jti(stream_id, end))


def opening(stream_id: str, nonce: str = NONCE, previous: str = "-") -> Raw:
    return raw(stream_id, entry("epoch", f"{nonce} {previous}", id="e", issuer="", expires_at=0))


START = opening("1-0")


def cut_of(head: Sequence[Raw], epoch: Epoch = ONE, trimmed_to: tuple[int, int] | None = None, **more: Any) -> Cut:
    made = plan(head, epoch=epoch, trimmed_to=trimmed_to, line_s=LINE, **more)
    assert made is not None
    return made


# -- what is dead -----------------------------------------------------------------------------------------------------


def test_an_entry_is_dead_by_the_clock_that_is_behind() -> None:
    assert death_line(1_000.9, 2_000, 300) == death_line(2_000, 1_000.9, 300) == 700


def test_an_entry_at_the_line_goes_and_one_past_it_is_carried_forward() -> None:
    assert cut_of([START, dead("1-1"), live("1-2"), dead("1-3")]).carried == (2,)


@pytest.mark.parametrize(
    "fields",
    [{}, {b"expires_at": b"x"}, {b"expires_at": b"0"}, {b"expires_at": b"-5"}, {b"kind": b"new", b"expires_at": b"1 "},
     {b"expires_at": b"9" * 16}, {b"expires_at": b"1" * 17}],
)  # fmt: skip
def test_what_cannot_be_read_lives(fields: dict[bytes, bytes]) -> None:
    assert cut_of([START, (b"1-1", fields), dead("1-2")]).carried == (1,)


def test_a_kind_of_a_newer_release_ends_like_any_other() -> None:
    assert cut_of([START, (b"1-1", {b"kind": b"new", b"expires_at": b"1"}), dead("1-2")]).carried == ()


def test_kid_entries_are_carried_for_ever_but_copies_of_one_only_once() -> None:
    kid = entry("kid", "k")
    head = [START, raw("1-1", kid), raw("1-2", kid), raw("1-3", entry("kid", "l")), dead("1-4")]
    assert cut_of(head).carried == (1, 3)


# -- where it is cut --------------------------------------------------------------------------------------------------


def test_the_last_entry_stays() -> None:
    cut = cut_of([START, dead("1-1"), dead("1-2")])
    assert cut == Cut((1, 0), (1, 1), (1, 2), (1, 1), 2, ())
    assert plan([START], epoch=ONE, trimmed_to=None, line_s=LINE) is None
    assert plan([], epoch=ONE, trimmed_to=None, line_s=LINE) is None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_is_cut_than_was_asked_for(most: int) -> None:
    assert cut_of([START, *(dead(f"1-{n}") for n in range(1, 9))], most=most).length == most


@pytest.mark.parametrize(
    ("length", "count"), [(TRIM_ENTRIES_MAX, TRIM_ENTRIES_MAX - 1), (TRIM_ENTRIES_MAX + 5, TRIM_ENTRIES_MAX)]
)
def test_one_script_has_a_bounded_number_of_entries(length: int, count: int) -> None:
    assert cut_of([START, *(dead(f"1-{n}") for n in range(1, length))]).length == count


def test_a_log_is_cut_at_the_end_of_an_epoch() -> None:
    head = [START, dead("1-1"), opening("2-0", NONCE_OF_2, f"1-1.{NONCE}"), dead("2-1")]
    cut = cut_of(head, TWO, most=2)
    assert (cut.survivor, cut.trimmed_to) == ((2, 0), (1, 1))


def test_a_log_is_cut_across_epochs_and_inside_one() -> None:
    head = [START, dead("1-1"), opening("2-0", NONCE_OF_2, f"1-1.{NONCE}"), dead("2-1"), dead("2-2")]
    cut = cut_of(head, TWO)
    assert (cut.last, cut.survivor, cut.trimmed_to, cut.length) == ((2, 1), (2, 2), (2, 1), 4)


def test_a_log_that_was_trimmed_is_trimmed_on() -> None:
    assert cut_of([dead("1-6"), dead("1-7")], trimmed_to=(1, 5)).trimmed_to == (1, 6)


def test_no_log_is_cut_to_begin_in_an_epoch_that_the_chain_does_not_name() -> None:
    head = [START, dead("1-1"), opening("2-0", NONCE_OF_2, f"1-1.{NONCE}"), dead("2-1"), dead("2-2")]
    assert cut_of(head, ONE).survivor == (2, 0)


# -- holes ------------------------------------------------------------------------------------------------------------


def test_nothing_is_cut_over_a_hole_and_both_its_sides_stay() -> None:
    head = [START, dead("1-1"), dead("1-2"), dead("1-4"), dead("1-5")]
    cut = cut_of(head)
    assert (cut.survivor, cut.trimmed_to) == ((1, 2), (1, 1))
    assert plan([dead("1-2"), dead("1-4"), dead("1-5")], epoch=ONE, trimmed_to=(1, 1), line_s=LINE) is None


def test_a_hole_that_was_answered_is_cut_off() -> None:
    head = [START, dead("1-1"), dead("1-2"), dead("1-4"), dead("1-5")]
    answered = [((1, 2), (1, 4))]
    assert cut_of(head, answered=answered).length == 4
    assert cut_of(head, answered=answered, most=3).trimmed_to == (1, 3)  # readers begin with 1-4


@pytest.mark.parametrize("first", [dead("1-2"), dead("1-5"), opening("2-0", NONCE_OF_2, f"1-9.{NONCE}")])
@pytest.mark.parametrize("trimmed_to", [None, (1, 3)])
def test_a_log_that_does_not_begin_where_it_was_trimmed_to_is_left_alone(
    first: Raw, trimmed_to: tuple[int, int] | None
) -> None:
    head = [first, dead("9-1"), dead("9-2")]
    assert plan(head, epoch=TWO, trimmed_to=trimmed_to, line_s=LINE) is None


def test_an_epoch_opened_on_an_empty_log_begins_one_whatever_was_trimmed() -> None:
    assert cut_of([START, dead("1-1"), dead("1-2")], trimmed_to=(0, 7)).length == 2


@pytest.mark.parametrize("previous", [f"1-0.{NONCE}", f"1-2.{NONCE}", "-"])
def test_an_epoch_that_names_another_end_of_the_one_before_is_a_hole(previous: str) -> None:
    head = [START, dead("1-1"), opening("2-0", NONCE_OF_2, previous), dead("2-1"), dead("2-2")]
    assert cut_of(head, TWO).survivor == (1, 1)


# -- is it worth it ---------------------------------------------------------------------------------------------------


def survey(*entries: Raw, dead_min: int = 4) -> Survey:
    made = Survey(LINE, dead_min)
    for one in entries:
        made.add([one])
    return made


def many(make: Any, count: int, first: int = 1) -> list[Raw]:
    return [make(f"1-{n}") for n in range(first, first + count)]


@pytest.mark.parametrize(("count", "worth"), [(3, False), (4, True)])
def test_fewer_dead_than_the_minimum_are_not_worth_it(count: int, worth: bool) -> None:
    assert survey(*many(dead, count), live("1-9")).length == (count if worth else 0)


@pytest.mark.parametrize(("count", "worth"), [(5, False), (6, True)])
def test_copies_are_paid_for_by_the_dead(count: int, worth: bool) -> None:
    made = survey(*many(live, 6), *many(dead, count, 7), live("1-99"))
    assert made.length == (6 + count if worth else 0)


@pytest.mark.parametrize(("later", "length"), [(49, 4), (50, 4 + 50 + 50), (60, 4 + 50 + 60)])
def test_what_follows_a_prefix_has_to_be_worth_it_by_itself(later: int, length: int) -> None:
    assert survey(*many(dead, 4), *many(live, 50), *many(dead, later), live("9-9")).length == length


def test_the_living_behind_the_dead_stay_where_they_are() -> None:
    assert survey(*many(dead, 50), *many(live, 40)).length == 50


def test_an_epoch_counts_for_many_as_its_link_is_read_all_the_time() -> None:
    assert survey(START, live("1-1"), dead_min=EPOCH_WEIGHT).length
    assert not survey(START, live("1-1"), dead_min=EPOCH_WEIGHT + 1).length


def test_the_last_entry_is_not_counted() -> None:
    assert not survey(*many(dead, 4)).length


def test_a_log_of_the_living_is_never_copied() -> None:
    assert not survey(*many(live, 5 * TRIM_DEAD_MIN), dead_min=TRIM_DEAD_MIN).length


def test_a_survey_in_vain_says_when_the_next_one_can_succeed() -> None:
    ends = [LINE + 60 * n for n in range(1, 11)]
    made = survey(*(live(f"1-{n}", end) for n, end in enumerate(ends, 1)), live("1-99"))
    quiet = made.quiet()
    assert quiet.until_s in (ends[4], ends[4] + 60 - ends[4] % 60)  # when five of the ten are dead
    assert not quiet.over(int(quiet.until_s) - 1, 11)
    assert quiet.over(int(quiet.until_s), 11)
    again = Survey(int(quiet.until_s), 4)
    again.add([*(live(f"1-{n}", end) for n, end in enumerate(ends, 1)), live("1-99")])
    assert again.length


def test_a_log_that_has_grown_is_surveyed_again() -> None:
    quiet = survey(*many(live, 100), live("1-101")).quiet()
    assert quiet == Quiet(quiet.until_s, 125 + 4)
    assert not quiet.over(LINE, 128)
    assert quiet.over(LINE, 129)


def test_entries_that_never_expire_are_never_waited_for() -> None:
    assert survey(*(raw(f"1-{n}", entry("kid", f"k{n}")) for n in range(1, 9))).quiet().until_s == float("inf")


# -- the chain --------------------------------------------------------------------------------------------------------


def kept(epoch: Epoch, trimmed_to: tuple[int, int] | None) -> list[int]:
    return [one.number for one in kept_links(epoch.chain, epoch, trimmed_to)]


def test_links_older_than_all_that_needs_them_go() -> None:
    assert kept(epoch_of(*map(link, range(1, 7))), (6, 9)) == [5, 6]


@pytest.mark.parametrize("trimmed_to", [(2, 9), (3, 0)])
def test_the_epoch_in_which_the_log_begins_stays(trimmed_to: tuple[int, int]) -> None:
    assert kept(epoch_of(*map(link, range(1, 7))), trimmed_to) == list(range(trimmed_to[0], 7))


def test_every_epoch_since_the_newest_that_opened_stays_with_it() -> None:
    links = [link(1), link(2), link(3, opened=False), link(4, opened=False), link(5)]
    assert kept(epoch_of(*links), (5, 9)) == [2, 3, 4, 5]


def test_nothing_goes_while_the_epoch_is_closed_or_no_older_one_is_known_to_have_opened() -> None:
    links = list(map(link, range(1, 7)))
    assert kept(epoch_of(*links, opened=False), (6, 9)) == [1, 2, 3, 4, 5, 6]
    assert kept(epoch_of(*(link(n, opened=n == 6) for n in range(1, 7))), (6, 9)) == [1, 2, 3, 4, 5, 6]
    assert kept(epoch_of(*links), None) == [1, 2, 3, 4, 5, 6]
    assert kept(epoch_of(link(1)), (1, 9)) == [1]


def test_the_predecessor_stays_though_a_newer_epoch_is_known_to_have_opened_elsewhere() -> None:
    epoch = epoch_of(link(1), link(2), link(4, opened=False), link(9), known=(link(7),))
    assert kept(epoch, (9, 3)) == [4, 9]
    assert [one.number for one in kept_links(epoch.known, epoch, (9, 3))] == [7]


def test_a_link_that_gave_a_keeper_up_stays_while_it_has_a_seat_in_one_that_stays() -> None:
    seated, unseated = {"eu": "gone"}, {"eu": "new"}
    gave_up = link(2, forgotten=("gone",))
    assert kept(epoch_of(link(1), gave_up, link(3), link(4, voters=seated), link(5)), (5, 1)) == [2, 4, 5]
    assert kept(epoch_of(link(1), gave_up, link(3), link(4, voters=unseated), link(5)), (5, 1)) == [4, 5]
