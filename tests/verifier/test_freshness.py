"""Staleness (DESIGN 6): only what is applied and confirmed counts, by two clocks, and nothing is subtracted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.verifier.support import NONCE, NONCE_2, NOW, heard
from verifier.freshness import Freshness, Staleness
from verifier.log import Beat, Epoch, EpochLink, Generation, Meta, Position

META = Meta("i", None, 1, 1, 86_400)
SKEW = 5.0
MONO = 1_000.0


def epoch_of(nonce: str = NONCE, number: int = 7, opened: bool = True) -> Epoch:
    return Epoch(number, nonce, "r", opened, Generation(number, 0), ())


def beat_of(
    n: int, seq: int, *, at_s: float = NOW, confirmed: tuple[int, int, float] | None = None, **fields: Any
) -> Beat:
    nonce, number = fields.get("nonce", NONCE), fields.get("number", 7)
    position = Position(number, seq, nonce)
    if confirmed is None:
        return Beat(nonce, n, int(at_s * 1000), position, Generation(number, 0))
    c_n, c_seq, c_at = confirmed
    vouched = (c_n, int(c_at * 1000), Position(number, c_seq, nonce))
    return Beat(nonce, n, int(at_s * 1000), position, Generation(number, 0), *vouched)


def hear(
    state: Freshness, beat: Beat, *, epoch: Epoch | None = None, meta: Meta = META, now: float = NOW, mono: float = MONO
) -> Freshness:
    return state.heard(beat, epoch or epoch_of(), meta, now=now, mono=mono)


def judge(
    state: Freshness, *, after: float = 0.0, now: float | None = None, mono: float | None = None, bound: float = 5.0
) -> Staleness:
    return state.staleness(
        now=NOW + after if now is None else now, mono=MONO + after if mono is None else mono, max_staleness_s=bound
    )


SYNCED = Freshness(SKEW, synced=True)
AT = Position(7, 9, NONCE)


def confirmed_state() -> Freshness:
    return hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW))).reached(AT)


OTHER = replace(META, incarnation="other")


def hear_other(*links: EpochLink, beside: bool, meta: Meta = OTHER) -> Freshness:
    """After a confirmed beat: one from a log whose epoch names these."""
    names: dict[str, Any] = {"chain": () if beside else links, "known": links if beside else ()}
    epoch = replace(epoch_of(NONCE_2, 9), **names)
    beat = beat_of(5, 2, confirmed=(4, 2, NOW + 9), nonce=NONCE_2, number=9)
    state = hear(confirmed_state(), beat, epoch=epoch, meta=meta, now=NOW + 9, mono=MONO + 9)
    return state.reached(Position(9, 2, NONCE_2))


def test_another_log_that_does_not_name_the_epoch_of_the_last_confirmed_beat_vouches_for_nothing() -> None:
    strange = EpochLink(8, "8" * 16, None, {}, True)
    assert judge(hear_other(strange, beside=False), after=9) == (9.0, True, "another_log")


@pytest.mark.parametrize("beside", [True, False])
def test_a_successor_names_the_epoch_of_the_last_confirmed_beat_and_vouches(beside: bool) -> None:
    mine = EpochLink(7, NONCE, None, {}, True)
    assert judge(hear_other(mine, beside=beside), after=9).fresh


def test_the_same_log_vouches_though_it_names_old_epochs_no_more() -> None:
    assert judge(hear_other(beside=False, meta=META), after=9).fresh


def test_never_synced_is_never_fresh() -> None:
    assert judge(Freshness(SKEW)) == (None, False, "never_synced")
    assert judge(replace(confirmed_state(), synced=False)).reason == "never_synced"


def test_a_confirmed_beat_whose_position_is_applied_makes_it_fresh_up_to_the_bound_inclusive() -> None:
    state = confirmed_state()
    assert judge(state) == (0.0, True, None)
    assert judge(state, after=5).fresh
    assert judge(state, after=5.001).reason == "stale"


@pytest.mark.parametrize("seq", [8, 0])
def test_a_beat_does_not_count_before_its_position_is_applied(seq: int) -> None:
    state = hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW)))
    assert judge(state.reached(Position(7, seq, NONCE))) == (None, False, "unconfirmed")
    assert judge(state.reached(AT)).fresh


def test_the_confirmed_beat_counts_with_its_own_time_and_position() -> None:
    state = hear(SYNCED, beat_of(20, 12, at_s=NOW, confirmed=(10, 9, NOW - 3)))
    assert judge(state.reached(AT)) == (3.0, True, None)  # 7-12 is not needed


def test_an_unconfirmed_beat_is_an_age_but_not_freshness() -> None:
    state = hear(SYNCED, beat_of(2, 9), epoch=epoch_of(opened=False)).reached(AT)
    assert judge(state, after=1) == (1.0, False, "epoch_closed")
    assert judge(hear(SYNCED, beat_of(2, 9)).reached(AT), after=1) == (1.0, False, "unconfirmed")


def test_staleness_is_the_greater_of_the_two_clocks() -> None:
    state = confirmed_state()
    assert judge(state, now=NOW + 2, mono=MONO + 3).seconds == 3
    assert judge(state, now=NOW + 3, mono=MONO + 2).seconds == 3
    assert judge(state, now=NOW - 60, mono=MONO + 3).seconds == 3
    assert judge(state, now=NOW - 60, mono=MONO).seconds == 0


def test_a_beat_arrives_once_however_often_it_is_read() -> None:
    state = confirmed_state()
    for step in range(1, 8):
        state = hear(state, beat_of(2, 9, confirmed=(1, 9, NOW)), now=NOW + step, mono=MONO + step).reached(AT)
    assert judge(state, after=7) == (7.0, True, "stale")


def test_an_older_beat_of_the_same_nonce_changes_nothing() -> None:
    state = hear(SYNCED, beat_of(5, 9, confirmed=(4, 9, NOW))).reached(AT)
    older = hear(state, beat_of(3, 8, at_s=NOW - 1, confirmed=(2, 8, NOW - 1)), mono=MONO + 3).reached(AT)
    assert judge(older, after=3) == judge(state, after=3)


def test_while_a_newer_beat_waits_for_its_position_the_last_one_goes_on_ageing() -> None:
    state = hear(
        confirmed_state(), beat_of(9, 50, at_s=NOW + 4, confirmed=(8, 50, NOW + 4)), now=NOW + 4, mono=MONO + 4
    )
    assert judge(state.reached(AT), after=4.5).seconds == 4.5
    assert judge(state.reached(Position(7, 50, NONCE)), after=4.5).seconds == 0.5


def test_a_newer_unconfirmed_beat_does_not_refresh_what_was_confirmed() -> None:
    state = confirmed_state()
    for step in range(1, 10):
        state = hear(state, beat_of(2 + step, 9, at_s=NOW + step), now=NOW + step, mono=MONO + step).reached(AT)
    assert judge(state, after=9) == (9.0, True, "stale")


@pytest.mark.parametrize(("ahead", "counted"), [(SKEW, True), (SKEW + 0.001, False)])
def test_a_beat_from_further_in_the_future_than_the_skew_is_not_counted(ahead: float, counted: bool) -> None:
    state = hear(SYNCED, beat_of(2, 9, at_s=NOW + ahead, confirmed=(1, 9, NOW + ahead))).reached(AT)
    assert judge(state) == ((0.0, True, None) if counted else (None, False, "clock_skew"))


def test_a_beat_of_another_nonce_than_the_epochs_is_not_counted() -> None:
    state = hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW)), epoch=epoch_of(NONCE_2)).reached(AT)
    assert judge(state).seconds is None


def test_a_position_of_another_history_covers_no_beat() -> None:
    state = hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW)))
    assert judge(state.reached(Position(7, 99, NONCE_2))).seconds is None
    assert judge(state.reached(Position(8, 0, NONCE_2))).seconds is None


def test_in_a_closed_epoch_the_last_confirmed_beat_of_the_one_before_goes_on_ageing() -> None:
    closed = epoch_of(NONCE_2, 8, opened=False)
    state = confirmed_state()
    for step in range(1, 8):
        beat = beat_of(step, 0, at_s=NOW + step, nonce=NONCE_2, number=8)
        state = hear(state, beat, epoch=closed, now=NOW + step, mono=MONO + step).reached(Position(8, 0, NONCE_2))
        assert judge(state, after=step) == (step, True, None if step <= 5 else "stale")


def test_nothing_is_confirmed_in_a_closed_epoch() -> None:
    beat = beat_of(2, 9, confirmed=(1, 9, NOW))
    closed = hear(SYNCED, beat, epoch=epoch_of(opened=False)).reached(AT)
    assert judge(closed) == (0.0, False, "epoch_closed")
    assert judge(hear(closed, beat).reached(AT)) == (0.0, True, None)


def test_a_beat_that_confirms_one_from_the_future_is_not_counted() -> None:
    state = hear(SYNCED, beat_of(2, 9, at_s=NOW, confirmed=(1, 9, NOW + SKEW + 1))).reached(AT)
    assert judge(state) == (None, False, "clock_skew")


def test_what_keeps_a_mirror_from_becoming_fresh_again_is_named_once_it_is_stale() -> None:
    ahead = hear(confirmed_state(), beat_of(9, 9, at_s=NOW + 60, confirmed=(8, 9, NOW + 60)))
    assert [judge(ahead, after=after).reason for after in (5, 6)] == [None, "clock_skew"]
    holed = replace(confirmed_state(), holed_nonce=NONCE)
    assert [judge(holed, after=after).reason for after in (5, 6)] == [None, "hole"]


def test_the_first_beat_of_a_new_epoch_counts_although_its_number_is_lower() -> None:
    beat = beat_of(1, 3, at_s=NOW + 4, confirmed=(0, 3, NOW + 4), nonce=NONCE_2, number=8)
    state = hear(confirmed_state(), beat, epoch=epoch_of(NONCE_2, 8), now=NOW + 4, mono=MONO + 4)
    assert judge(state.reached(Position(8, 3, NONCE_2)), after=5) == (1.0, True, None)


def test_beats_of_an_epoch_with_a_hole_are_not_applied_and_it_is_named() -> None:
    state = replace(hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW))), holed_nonce=NONCE).reached(AT)
    assert judge(state) == (None, False, "hole")
    state = replace(hear(confirmed_state(), beat_of(9, 9, at_s=NOW + 4, confirmed=(8, 9, NOW + 4))), holed_nonce=NONCE)
    assert judge(state.reached(AT), after=4.5).seconds == 4.5


@pytest.mark.parametrize(("min_reader_format", "reason"), [(1, None), (2, "log_format_newer")])
def test_a_log_that_needs_a_newer_reader_is_not_fresh_by_name(min_reader_format: int, reason: str | None) -> None:
    meta = replace(META, min_reader_format=min_reader_format)
    state = hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW)), meta=meta).reached(AT)
    assert judge(state).reason == reason


def test_deadlines_agree_with_the_judgement() -> None:
    state = hear(SYNCED, beat_of(2, 9, confirmed=(1, 9, NOW - 1))).reached(AT)
    wall, mono = state.deadlines(5.0)
    assert (wall, mono) == (NOW + 4, MONO + 5)
    for offset in (-0.001, 0.0):
        assert judge(state, now=wall + offset, mono=MONO).fresh
        assert judge(state, now=NOW, mono=mono + offset).fresh
    assert not judge(state, now=wall + 0.001, mono=MONO).fresh
    assert not judge(state, now=NOW, mono=mono + 0.001).fresh


@pytest.mark.parametrize(
    "state",
    [
        Freshness(SKEW),
        SYNCED,
        replace(confirmed_state(), synced=False),
        replace(confirmed_state(), log_format_newer=True),
    ],
)
def test_what_is_not_fresh_has_no_time_left(state: Freshness) -> None:
    assert state.deadlines(5.0) == (0.0, 0.0)


@pytest.mark.parametrize("bound", [float("nan"), -1.0])
def test_no_state_is_fresh_for_a_bound_that_is_none(bound: float) -> None:
    assert judge(confirmed_state(), bound=bound).reason == "stale"


def test_a_state_is_immutable() -> None:
    before = Freshness(SKEW, synced=True, applied=heard(AT))
    hear(before, beat_of(9, 9)).reached(AT)
    assert before == Freshness(SKEW, synced=True, applied=heard(AT))


HOURS = 7_200.0


def test_a_primary_whose_clock_is_set_back_ages_nobody_who_goes_on_hearing_confirmed_beats() -> None:
    beat = beat_of(4, 9, at_s=NOW - HOURS, confirmed=(3, 9, NOW - HOURS))
    state = hear(confirmed_state(), beat, now=NOW + 1, mono=MONO + 1).reached(AT)
    assert judge(state, after=1) == (1.0, True, None)
    assert judge(state, after=6).seconds == 6.0


def test_nor_does_a_new_primary_whose_clock_is_hours_behind() -> None:
    epoch = replace(epoch_of(NONCE_2, 9), chain=(EpochLink(7, NONCE, None, {}, True),))
    beat = beat_of(2, 2, at_s=NOW - HOURS, confirmed=(1, 2, NOW - HOURS), nonce=NONCE_2, number=9)
    state = hear(confirmed_state(), beat, epoch=epoch, now=NOW + 1, mono=MONO + 1).reached(Position(9, 2, NONCE_2))
    assert judge(state, after=2) == (2.0, True, None)


def test_the_beats_of_an_older_epoch_are_as_old_as_they_say() -> None:
    beat = beat_of(9, 2, at_s=NOW - HOURS, confirmed=(8, 2, NOW - HOURS), nonce=NONCE_2, number=6)
    epoch = epoch_of(NONCE_2, 6)
    state = hear(confirmed_state(), beat, epoch=epoch, now=NOW + 1, mono=MONO + 1).reached(Position(6, 2, NONCE_2))
    assert judge(state, after=1).seconds == HOURS + 1


def test_after_all_clocks_were_set_back_together_a_beat_that_comes_late_is_as_old_as_it_says() -> None:
    earlier = NOW - HOURS
    beat = beat_of(4, 9, at_s=earlier, confirmed=(3, 9, earlier))
    state = hear(confirmed_state(), beat, now=earlier + 60, mono=MONO + 1).reached(AT)
    assert judge(state, now=earlier + 60, mono=MONO + 1).seconds == 60.0
