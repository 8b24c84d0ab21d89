"""Every checker on evidence made by hand: just inside what is promised, and just outside."""

from __future__ import annotations

from typing import Any

import pytest

from regions.checkers import (
    AcknowledgedNotLost,
    Checker,
    FreshNotFooled,
    NeverUnrevoked,
    NoValidRequestFailed,
    Witness,
    leak_windows,
    tally,
)
from regions.ledger import Ledger, Request, Revocation, Token
from regions.recorder.events import Run

ACKNOWLEDGED = 100.0
WALL = 1_000_000.0
"""Unix seconds at monotonic 0."""
BOUNDS: dict[str, Any] = {"max_staleness_s": 5.0, "max_skew_s": 2.0}


def run(verdict: Any, first: float, last: float, number: int = 0, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "code": None if verdict == "accepted" else f"{verdict}_code",
        "reason": None,
        "entry_id": "r" if verdict == "revoked" else None,
        "may_deny": False,
        "has_min": False,
        "count": 2,
        "ready_count": 2,
        "last_ready_mono": last,
        "first_wall": WALL + first,
        "last_wall": WALL + last,
    }
    return Run(name="t", number=number, verdict=verdict, first_mono=first, last_mono=last, **{**fields, **changes})


def witness(*runs: Run, id: str = "eu#1", started: float = 0.0, at_end: bool = True) -> Witness:
    return Witness(id, id.partition("#")[0], started, {"t": runs} if runs else {}, at_end)


def ledger(*, durability: Any = "replicated", settled: float | None = None, expires_at: float = WALL + 900) -> Ledger:
    made = Ledger()
    made.add_token(Token("t", expires_at))
    revocation = Revocation(id="r", tokens=("t",), region="eu", sent_mono=99.0, sent_wall=WALL + 99.0)
    if durability is not None:
        revocation.acknowledge(durability, "1-1.0123456789abcdef", ACKNOWLEDGED)
    made.revocations.append(revocation)
    made.settled_mono = settled
    return made


def valid_ledger(expires_at: float = WALL + 900) -> Ledger:
    made = Ledger()
    made.add_token(Token("t", expires_at))
    return made


def kinds(checker: Checker) -> list[str]:
    return [violation.kind for violation in checker.check()]


ACCEPTED_THEN_REVOKED = (run("accepted", 1.0, 100.5), run("revoked", 100.6, 120.0, 1))


# -- P2: acknowledged and lost ----------------------------------------------------------------------------------------


def test_acknowledged_revocation_that_is_enforced_at_the_end_is_not_lost() -> None:
    assert kinds(AcknowledgedNotLost([witness(*ACCEPTED_THEN_REVOKED)], ledger(settled=110.0))) == []


def test_acknowledged_revocation_that_is_accepted_at_the_end_is_lost() -> None:
    ends = (*ACCEPTED_THEN_REVOKED, run("accepted", 121.0, 125.0, 2))
    assert kinds(AcknowledgedNotLost([witness(*ends)], ledger(settled=110.0))) == ["acknowledged and lost"]
    undecided = run("undecidable", 1.0, 125.0)
    assert kinds(AcknowledgedNotLost([witness(undecided)], ledger(settled=110.0))) == ["acknowledged and lost"]


def test_expired_token_is_refused_and_therefore_not_lost() -> None:
    expired = run("invalid", 101.0, 125.0, code="token_expired")
    assert kinds(AcknowledgedNotLost([witness(expired)], ledger(settled=110.0))) == []


@pytest.mark.parametrize(("last", "expected"), [(110.0, []), (109.9, ["not looked at"])])
def test_refusal_counts_only_if_it_was_seen_since_the_end(last: float, expected: list[str]) -> None:
    seen = witness(run("revoked", 100.6, last))
    assert kinds(AcknowledgedNotLost([seen], ledger(settled=110.0))) == expected


def test_revocation_that_no_verifier_looked_at_does_not_pass() -> None:
    assert kinds(AcknowledgedNotLost([witness()], ledger())) == ["not looked at"]


def test_nothing_is_demanded_of_a_verifier_that_is_not_connected_at_the_end() -> None:
    cut_off = witness(run("accepted", 1.0, 125.0), at_end=False)
    assert kinds(AcknowledgedNotLost([cut_off], ledger(settled=110.0))) == []


def test_pending_revocation_may_be_lost_unless_it_is_counted() -> None:
    accepting, pending = [witness(run("accepted", 1.0, 125.0))], ledger(durability="pending", settled=110.0)
    assert kinds(AcknowledgedNotLost(accepting, pending)) == []
    both = AcknowledgedNotLost(accepting, pending, counted={"pending", "replicated"})
    assert kinds(both) == ["acknowledged and lost"]


def test_pending_revocation_counts_from_the_receipt_that_says_replicated() -> None:
    promoted = ledger(durability="pending", settled=110.0)
    promoted.revocations[0].acknowledge("replicated", None, 105.0)
    assert promoted.counted({"replicated"}) == [(promoted.revocations[0], 105.0)]
    assert kinds(AcknowledgedNotLost([witness(run("accepted", 1.0, 125.0))], promoted)) == ["acknowledged and lost"]


def test_revocation_without_a_receipt_is_not_promised() -> None:
    unknown = ledger(durability=None, settled=110.0)
    assert kinds(AcknowledgedNotLost([witness(run("accepted", 1.0, 125.0))], unknown)) == []


def test_acknowledged_revocation_stands_in_the_log_of_the_last_primary() -> None:
    seen, noted = [witness(*ACCEPTED_THEN_REVOKED)], ledger(settled=110.0)
    assert kinds(AcknowledgedNotLost(seen, noted, log_ids={"r", "other"})) == []
    assert kinds(AcknowledgedNotLost(seen, noted, log_ids={"other"})) == ["acknowledged and lost"]


# -- P2: un-revoked ---------------------------------------------------------------------------------------------------


def test_verifier_that_never_accepts_again_does_not_unrevoke() -> None:
    expired = run("invalid", 121.0, 125.0, 2, code="token_expired")
    assert kinds(NeverUnrevoked([witness(*ACCEPTED_THEN_REVOKED, expired)], ledger())) == []


@pytest.mark.parametrize("durability", ["replicated", "pending", None])
def test_verifier_that_accepts_after_it_refused_has_unrevoked_whatever_the_receipt(durability: Any) -> None:
    flips = (*ACCEPTED_THEN_REVOKED, run("accepted", 121.0, 121.0, 2), run("revoked", 122.0, 130.0, 3))
    assert kinds(NeverUnrevoked([witness(*flips)], ledger(durability=durability))) == ["un-revoked"]


def test_other_region_that_still_accepts_has_not_unrevoked() -> None:
    later = witness(run("accepted", 1.0, 125.0, last_fresh_mono=125.0), id="us#2", started=0.5)
    assert kinds(NeverUnrevoked([witness(*ACCEPTED_THEN_REVOKED), later], ledger())) == []


@pytest.mark.parametrize(
    ("fresh_mono", "expected"), [(None, []), (100.6, []), (100.7, ["un-revoked"])], ids=["stale", "before", "after"]
)
def test_verifier_started_anew_is_bound_once_it_is_fresh(fresh_mono: float | None, expected: list[str]) -> None:
    anew = witness(run("accepted", 121.0, 125.0, last_fresh_mono=fresh_mono), id="eu#2", started=120.0)
    earlier = witness(*ACCEPTED_THEN_REVOKED, at_end=False)
    assert kinds(NeverUnrevoked([earlier, anew], ledger())) == expected


def test_verifier_started_anew_is_bound_once_synced_where_the_server_was_left_alone() -> None:
    earlier = witness(*ACCEPTED_THEN_REVOKED, at_end=False)
    anew = witness(run("accepted", 121.0, 125.0), id="eu#2", started=120.0)
    unsynced = witness(run("accepted", 121.0, 125.0, last_ready_mono=None), id="eu#3", started=120.0)
    assert kinds(NeverUnrevoked([earlier, anew], ledger(), after_restart="synced")) == ["un-revoked"]
    assert kinds(NeverUnrevoked([earlier, unsynced], ledger(), after_restart="synced")) == []


def test_verifier_started_anew_is_not_bound_by_what_was_never_acknowledged() -> None:
    earlier = witness(*ACCEPTED_THEN_REVOKED, at_end=False)
    anew = witness(run("accepted", 121.0, 125.0, last_fresh_mono=125.0), id="eu#2", started=120.0)
    assert kinds(NeverUnrevoked([earlier, anew], ledger(durability="pending"))) == []


# -- P3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fresh_mono", "expected"), [(107.0, []), (107.001, ["fresh and fooled"])])
def test_fresh_verifier_may_accept_until_staleness_and_skew_are_over(fresh_mono: float, expected: list[str]) -> None:
    accepting = witness(run("accepted", 1.0, 125.0, fresh_count=1, last_fresh_mono=fresh_mono))
    assert kinds(FreshNotFooled([accepting], ledger(), **BOUNDS)) == expected


def test_stale_verifier_may_accept_for_ever() -> None:
    accepting = witness(run("accepted", 1.0, 900.0, last_fresh_mono=None))
    assert kinds(FreshNotFooled([accepting], ledger(), **BOUNDS)) == []


def test_fresh_refusal_is_what_is_promised() -> None:
    refusing = witness(run("revoked", 1.0, 900.0, last_fresh_mono=900.0))
    assert kinds(FreshNotFooled([refusing], ledger(), **BOUNDS)) == []


def test_pending_revocation_fools_nobody_unless_it_is_counted() -> None:
    accepting, pending = [witness(run("accepted", 1.0, 125.0, last_fresh_mono=125.0))], ledger(durability="pending")
    assert kinds(FreshNotFooled(accepting, pending, **BOUNDS)) == []
    assert kinds(FreshNotFooled(accepting, pending, counted={"pending"}, **BOUNDS)) == ["fresh and fooled"]


# -- P4 ---------------------------------------------------------------------------------------------------------------


def test_valid_token_that_is_accepted_is_what_is_promised() -> None:
    assert kinds(NoValidRequestFailed([witness(run("accepted", 1.0, 99.0))], valid_ledger())) == []


@pytest.mark.parametrize("verdict", ["invalid", "revoked"])
def test_valid_token_that_is_refused_is_a_violation(verdict: str) -> None:
    assert kinds(NoValidRequestFailed([witness(run(verdict, 1.0, 1.0))], valid_ledger())) == ["valid and refused"]


@pytest.mark.parametrize(("first", "expected"), [(99.0, []), (98.999, ["valid and refused"])])
def test_revoked_token_may_be_refused_from_the_sending_on(first: float, expected: list[str]) -> None:
    unanswered = ledger(durability=None)
    assert kinds(NoValidRequestFailed([witness(run("revoked", first, 120.0))], unanswered)) == expected


@pytest.mark.parametrize(("first", "expected"), [(50.0, []), (49.9, ["valid and refused"])])
def test_token_may_be_refused_once_it_expired(first: float, expected: list[str]) -> None:
    refused = witness(run("invalid", first, 60.0, code="token_expired"))
    assert kinds(NoValidRequestFailed([refused], valid_ledger(expires_at=WALL + 50.0))) == expected


@pytest.mark.parametrize(("ready_count", "expected"), [(0, []), (1, ["valid and refused"])])
def test_undecided_is_allowed_only_until_synced(ready_count: int, expected: list[str]) -> None:
    undecided = witness(run("undecidable", 1.0, 2.0, code="never_synced", ready_count=ready_count))
    assert kinds(NoValidRequestFailed([undecided], valid_ledger())) == expected


@pytest.mark.parametrize(
    ("code", "may_deny", "has_min", "expected"),
    [
        ("revocations_stale", True, False, []),
        ("revocations_stale", False, False, ["valid and refused"]),
        ("keys_unavailable", True, False, ["valid and refused"]),
        ("position_not_reached", False, True, []),
        ("position_not_reached", True, False, ["valid and refused"]),
    ],
)
def test_undecided_is_allowed_under_the_names_of_what_was_asked_for(
    code: str, may_deny: bool, has_min: bool, expected: list[str]
) -> None:
    undecided = witness(run("undecidable", 1.0, 2.0, code=code, may_deny=may_deny, has_min=has_min))
    assert kinds(NoValidRequestFailed([undecided], valid_ledger())) == expected


@pytest.mark.parametrize(
    ("status", "allow", "expected"),
    [
        (200, True, []),
        (None, True, []),
        (401, True, ["valid and refused"]),
        (503, True, ["valid and refused"]),
        (503, False, []),
        (401, False, ["valid and refused"]),
    ],
)
def test_service_answers_valid_tokens(status: int | None, allow: bool, expected: list[str]) -> None:
    made = valid_ledger()
    made.requests.append(
        Request(token="t", region="eu", sent_mono=1.0, answered_mono=1.5, answered_wall=WALL + 1.5, status=status)
    )
    assert kinds(NoValidRequestFailed([], made, allow=allow)) == expected


def test_service_may_refuse_a_token_that_was_revoked_meanwhile() -> None:
    made = ledger()
    made.requests.append(
        Request(token="t", region="eu", sent_mono=98.0, answered_mono=99.5, answered_wall=WALL + 99.5, status=401)
    )
    assert kinds(NoValidRequestFailed([], made)) == []


# -- measures ---------------------------------------------------------------------------------------------------------


def test_leak_window_is_told_from_the_sending_the_receipt_and_the_append() -> None:
    made = ledger()
    made.revocations[0].appended_wall = WALL + 99.5
    (window,) = leak_windows([witness(*ACCEPTED_THEN_REVOKED)], made)
    assert (window.revocation, window.token, window.region) == ("r", "t", "eu")
    assert window.last_accept_after_sent_s == pytest.approx(1.5)
    assert window.first_refusal_after_sent_s == pytest.approx(1.6)
    assert window.last_accept_after_acknowledged_s == pytest.approx(0.5)
    assert window.first_refusal_after_acknowledged_s == pytest.approx(0.6)
    assert window.lag_s == pytest.approx(1.1)


def test_leak_window_of_what_was_never_refused_is_open() -> None:
    (window,) = leak_windows([witness(run("accepted", 1.0, 125.0))], ledger(durability=None))
    assert (window.first_refusal_after_sent_s, window.last_accept_after_acknowledged_s, window.lag_s) == (None,) * 3


def test_tally_names_every_kind_also_those_without_a_violation() -> None:
    fooled = FreshNotFooled([witness(run("accepted", 1.0, 125.0, last_fresh_mono=125.0))], ledger(), **BOUNDS).check()
    assert tally(fooled) == {
        "acknowledged and lost": 0,
        "un-revoked": 0,
        "fresh and fooled": 1,
        "valid and refused": 0,
        "not looked at": 0,
    }
    assert str(fooled[0]).startswith(
        "P3 fresh and fooled: eu: eu#1 called itself fresh and accepted t 25.000 s after r"
    )


def test_two_tokens_of_one_name_are_refused() -> None:
    made = valid_ledger()
    with pytest.raises(ValueError, match="called t"):
        made.add_token(Token("t", WALL))
