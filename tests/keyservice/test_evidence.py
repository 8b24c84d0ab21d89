"""Counting: when enough keepers have merged, hold an entry, or confirmed a beat; and who may be made a voter."""

from __future__ import annotations

from typing import Any

import pytest

from keyservice.core.evidence import Electorate, Protocol, Report, majority, renewed
from keyservice.core.membership import Verb, change_voters
from keyservice.errors import RequestRefused
from tests.keyservice.test_keeper_rules import epoch, link
from verifier.log import Epoch, EpochLink, Position

PROTOCOL = Protocol()
THREE = {"eu": "e", "us": "u", "ap": "a"}


def report(keeper_id: str, of: Epoch, held: str = "5-0", beat_n: int = -1, **changes: Any) -> Report:
    return Report(
        **{
            "region": keeper_id,
            "keeper_id": keeper_id,
            "number": of.number,
            "nonce": of.nonce,
            "held": held,
            "commit": 1,
            "beat_n": beat_n,
            **changes,
        }
    )


@pytest.mark.parametrize(("regions", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_a_majority_is_more_than_half_of_the_seats(regions: int, needed: int) -> None:
    assert majority({str(n): "" for n in range(regions)}) == needed


# -- replicated -------------------------------------------------------------------------------------------------------

OPEN = epoch(link(5, voters=THREE), is_open=True)


@pytest.mark.parametrize(
    ("held", "upto"),
    [
        ({"e": "5-9"}, None),
        ({"e": "5-9", "u": "5-3"}, (5, 3)),
        ({"e": "5-9", "u": "5-3", "a": "5-7"}, (5, 7)),
        ({"e": "5-9", "stranger": "5-9"}, None),
        ({"e": "5-9", "u": "4-100"}, (4, 100)),
    ],
)
def test_an_entry_is_replicated_when_a_majority_of_the_voters_holds_it(
    held: dict[str, str], upto: tuple[int, int] | None
) -> None:
    reports = [report(keeper_id, OPEN, position) for keeper_id, position in held.items()]
    assert PROTOCOL.replicated_to(OPEN, reports) == upto
    if upto is not None:
        number, seq = upto
        assert PROTOCOL.is_replicated(Position(number, seq, OPEN.nonce), OPEN, reports)
        assert not PROTOCOL.is_replicated(Position(number, seq + 1, OPEN.nonce), OPEN, reports)


def test_nothing_is_replicated_in_a_closed_epoch() -> None:
    closed = epoch(link(5, voters=THREE))
    assert PROTOCOL.replicated_to(closed, [report(keeper_id, closed, "5-9") for keeper_id in "eua"]) is None


def test_evidence_of_another_epoch_of_the_same_number_does_not_count() -> None:
    reports = [report("e", OPEN, "5-9"), report("u", OPEN, "5-9", nonce="f" * 16)]
    assert PROTOCOL.replicated_to(OPEN, reports) is None
    assert PROTOCOL.holders(Position(5, 9, OPEN.nonce), OPEN, reports) == {"e"}


def test_a_vacant_seat_counts_in_the_majority_and_holds_nothing() -> None:
    vacant = epoch(link(5, voters={**THREE, "ap": ""}), is_open=True)
    assert PROTOCOL.replicated_to(vacant, [report("e", vacant, "5-9"), report("", vacant, "5-9")]) is None
    assert PROTOCOL.replicated_to(vacant, [report("e", vacant, "5-9"), report("u", vacant, "5-8")]) == (5, 8)


@pytest.mark.parametrize(
    ("beats", "confirmed"),
    [
        ({"e": 9}, None),
        ({"e": 9, "u": -1}, None),
        ({"e": 9, "u": 4}, 4),
        ({"e": 9, "u": 4, "a": 6}, 6),
        ({"x": 9, "e": 9}, None),
    ],
)
def test_a_beat_is_confirmed_when_a_majority_of_the_voters_reached_it(
    beats: dict[str, int], confirmed: int | None
) -> None:
    found = PROTOCOL.confirmed(OPEN, [report(keeper_id, OPEN, beat_n=n) for keeper_id, n in beats.items()])
    assert (None if found is None else found.beat_n) == confirmed
    closed = epoch(link(5, voters=THREE))
    assert PROTOCOL.confirmed(closed, [report(keeper_id, closed, beat_n=9) for keeper_id in "eua"]) is None


def test_within_one_nonce_no_record_moves_back() -> None:
    held = report("e", OPEN, "5-9", 7, beat_at_ms=70, beat_position="5-8")
    older = report("e", OPEN, "5-4", 3, beat_at_ms=30, beat_position="5-3")
    assert renewed(held, older) == held
    assert renewed(older, held) == held
    assert renewed(None, older) == older
    other = report("e", epoch(link(6, voters=THREE)), "5-4")
    assert renewed(held, other) == other, "another epoch's evidence starts anew"
    assert renewed(held, report("new", OPEN, "5-1")).held == "5-1", "so does another keeper's"


# -- opening ----------------------------------------------------------------------------------------------------------

A, B = {"eu": "e1", "us": "u1", "ap": "a1"}, {"eu": "e2", "us": "u1", "ap": "a1"}


def chained(*links: EpochLink, known: tuple[EpochLink, ...] = ()) -> Epoch:
    return epoch(*links, known=known)


@pytest.mark.parametrize(
    ("of", "electorates"),
    [
        (chained(link(5, voters=A)), [A]),
        (chained(link(4, voters=A, was_open=True), link(5, voters=B)), [A, B]),
        (chained(link(3, voters=A, was_open=True), link(4, voters=B, was_open=True), link(5, voters=B)), [B, B]),
        (chained(link(3, voters=A, was_open=True), link(4, voters=B), link(5, voters=A)), [A, B, A]),
        (chained(link(3, voters=A, was_open=True), link(5, voters=A), known=(link(4, voters=B),)), [A, B, A]),
        (chained(link(3, voters=A, was_open=True), link(5, voters=A), known=(link(6, voters=B),)), [A, A]),
        (chained(link(4, voters={"eu": "e1", "us": "", "ap": ""}), link(5, voters=A)), [A]),
    ],
)
def test_an_epoch_needs_every_voter_set_since_the_newest_that_opened(
    of: Epoch, electorates: list[dict[str, str]]
) -> None:
    assert PROTOCOL.electorates(of) == [Electorate.of(voters) for voters in electorates]


@pytest.mark.parametrize(("merged", "may"), [("e2 u1", False), ("e2 e1", False), ("u1 a1", True), ("e1 u1 e2", True)])
def test_an_epoch_opens_with_majorities_of_the_old_voters_and_of_the_new(merged: str, may: bool) -> None:
    of = chained(link(4, voters=A, was_open=True), link(5, voters={"eu": "e2", "us": "u1", "ap": "a1"}))
    needs_both = [report(keeper_id, of) for keeper_id in merged.split()]
    expected = sum(k in merged.split() for k in A.values()) >= 2 and sum(k in merged.split() for k in B.values()) >= 2
    assert PROTOCOL.may_open(of, needs_both) is expected is may


def test_voters_older_than_those_of_an_epoch_that_opened_are_not_asked() -> None:
    """A laggard log began epoch 6 with the voters of 3, all replaced since: it never opens, and blocks nobody."""
    replaced = {"eu": "e3", "us": "u3", "ap": "a3"}
    opened = (link(3, voters=A, was_open=True), link(4, voters=replaced, was_open=True))
    of = chained(
        link(3, voters=A, was_open=True), link(6, voters=A, chosen=3), link(7, voters=replaced, chosen=4), known=opened
    )
    assert PROTOCOL.electorates(of) == [Electorate.of(replaced), Electorate.of(replaced)]
    again = chained(link(3, voters=A, was_open=True), link(6, voters=A), link(7, voters=A, chosen=6), known=opened)
    assert PROTOCOL.electorates(again) == [Electorate.of(voters) for voters in (replaced, A, A)], "chosen anew"


def test_nobody_waits_for_a_forgotten_keeper() -> None:
    gone = EpochLink(5, "5" * 16, None, {"eu": "e1", "us": "", "ap": ""}, False, forgotten=("u1", "a1"))
    of = chained(link(4, voters=A, was_open=True), gone)
    assert PROTOCOL.electorates(of) == [Electorate(frozenset({"e1"}), 1), Electorate(frozenset({"e1"}), 2)]
    assert not PROTOCOL.may_open(of, [report("e1", of)]), "the new seats are vacant and count"
    replaced = EpochLink(6, "6" * 16, None, {"eu": "e1", "us": "u2", "ap": "a1"}, False)
    of = chained(link(4, voters=A, was_open=True), gone, replaced)
    assert PROTOCOL.may_open(of, [report("e1", of), report("u2", of)])


FIVE = {"eu": "e", "us": "u", "ap": "a", "sa": "s", "af": "f"}


@pytest.mark.parametrize(
    ("forgotten", "merged", "may"),
    [("", "e u a", True), ("f", "e u", False), ("f s", "e u", False), ("f s", "e u a", True), ("f s a", "e u", True)],
)
def test_those_that_a_forgotten_minority_leaves_are_asked_to_the_last_one(
    forgotten: str, merged: str, may: bool
) -> None:
    """One of them may be the only one that holds an entry that the forgotten ones and it acknowledged."""
    seats = {region: f"{seat}2" if seat in forgotten.split() else seat for region, seat in FIVE.items()}
    new = EpochLink(5, "5" * 16, None, seats, False, forgotten=tuple(forgotten.split()))
    of = chained(link(4, voters=FIVE, was_open=True), new)
    everybody_new = [report(f"{seat}2", of) for seat in forgotten.split()]
    assert PROTOCOL.may_open(of, [*everybody_new, *(report(seat, of) for seat in merged.split())]) is may


def test_merged_into_another_epoch_is_not_merged_into_this_one() -> None:
    of = chained(link(5, voters=A))
    before = chained(link(4, voters=A))
    assert PROTOCOL.merged_ids(of, [report("e1", of), report("u1", before)]) == {"e1"}
    assert not PROTOCOL.may_open(of, [report("e1", of), report("u1", before)])


# -- who has a seat ---------------------------------------------------------------------------------------------------

CURRENT = epoch(link(4, voters={"eu": "old"}, was_open=True), link(5, voters=THREE), is_open=True)
REPORTS = {name: report(f"new-{name}", CURRENT, region=name) for name in ("eu", "sa")}


@pytest.mark.parametrize(
    ("verb", "region", "keeper_id", "voters"),
    [
        ("add", "sa", None, {**THREE, "sa": "new-sa"}),
        ("add", "sa", "named", {**THREE, "sa": "named"}),
        ("remove", "ap", None, {"eu": "e", "us": "u"}),
        ("replace", "eu", None, {**THREE, "eu": "new-eu"}),
        ("replace", "us", "named", {**THREE, "us": "named"}),
    ],
)
def test_every_change_of_the_voters(verb: Verb, region: str, keeper_id: str | None, voters: dict[str, str]) -> None:
    change = change_voters(verb, CURRENT, REPORTS, region=region, keeper_id=keeper_id)
    assert (change.voters, change.forgotten, change.at_risk) == (voters, (), None)


@pytest.mark.parametrize(
    ("verb", "wanted", "code", "status"),
    [
        ("add", {}, "region_missing", 422),
        ("add", {"region": "eu"}, "seat_taken", 409),
        ("remove", {"region": "sa"}, "seat_unknown", 404),
        ("replace", {"region": "sa"}, "seat_unknown", 404),
        ("replace", {"region": "us"}, "keeper_unknown", 409),
        ("replace", {"region": "us", "keeper_id": "a"}, "keeper_seated", 409),
        ("replace", {"region": "us", "keeper_id": "u"}, "keeper_seated", 409),
        ("forget", {}, "keeper_unknown", 404),
        ("forget", {"keeper_id": "stranger", "accept_loss": True}, "keeper_unknown", 404),
        ("forget", {"keeper_id": "", "accept_loss": True}, "keeper_unknown", 404),
        ("forget", {"keeper_id": "u"}, "loss_not_accepted", 409),
    ],
)
def test_a_change_that_is_refused_is_refused_by_name(
    verb: Verb, wanted: dict[str, Any], code: str, status: int
) -> None:
    with pytest.raises(RequestRefused) as refused:
        change_voters(verb, CURRENT, REPORTS, **wanted)
    assert (refused.value.code, refused.value.status) == (code, status)


def test_the_last_seat_stays() -> None:
    alone = epoch(link(5, voters={"eu": "e"}), is_open=True)
    with pytest.raises(RequestRefused) as refused:
        change_voters("remove", alone, {}, region="eu")
    assert refused.value.code == "last_seat"


def test_forgetting_says_what_may_be_lost_and_leaves_the_seat_vacant() -> None:
    change = change_voters("forget", CURRENT, {}, keeper_id="u", accept_loss=True)
    assert change.voters == {**THREE, "us": ""}
    assert change.forgotten == ("u",)
    assert "u" in (change.at_risk or "")
    past = change_voters("forget", CURRENT, {}, keeper_id="old", accept_loss=True)
    assert (past.voters, past.forgotten) == (THREE, ("old",)), "one that had a seat earlier can be given up too"
    with pytest.raises(RequestRefused, match="may be lost"):
        change_voters("forget", CURRENT, {}, keeper_id="u")


@pytest.mark.parametrize(
    ("merged", "needed"), [((), 2), (("e",), 1), (("e", "u"), 0), (("e", "u", "a"), 0), (("x",), 2)]
)
def test_how_many_more_must_merge(merged: tuple[str, ...], needed: int) -> None:
    assert Electorate.of(THREE).missing(frozenset(merged)) == needed
    assert Electorate.of({"eu": "", "us": ""}).missing(frozenset({""})) == 2
