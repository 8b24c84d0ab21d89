"""Verifications folded into runs: what a recording verifier remembers, and in whose favour it errs."""

from __future__ import annotations

from regions.recorder.events import Run
from regions.recorder.tape import ACCEPTED, Outcome, Tape

REVOKED = Outcome("revoked", "token_revoked", "jti", "entry-1")
STALE = Outcome("undecidable", "revocations_stale", "stale")


class Rounds:
    """A tape with one token `t`, verified once a round; a verification lasts 0.25 s."""

    def __init__(self, *, may_deny: bool = False) -> None:
        self.tape = Tape(may_deny=may_deny)
        self.tape.watch("t", "token")
        self.told: dict[int, Run] = {}
        self.events = 0

    def round(self, at: float, outcome: Outcome, *, ready: bool = True, fresh: bool = True) -> None:
        (watched,) = self.tape.watched
        self.tape.add(watched, outcome, began_mono=at + 0.25, ended_mono=at + 0.5, wall=1_000 + at)
        self.tape.round_over(at, ready=ready, fresh=fresh)
        self.take()

    def take(self) -> None:
        for run in self.tape.take():
            self.events += 1
            self.told[run.number] = run

    def runs(self) -> list[Run]:
        self.tape.tell_open()
        self.take()
        return [self.told[number] for number in sorted(self.told)]


def test_acceptance_bears_the_time_it_began_and_a_refusal_the_time_it_ended() -> None:
    rounds = Rounds()
    rounds.round(1.0, ACCEPTED)
    rounds.round(2.0, REVOKED)
    accepted, revoked = rounds.runs()
    assert (accepted.last_mono, revoked.first_mono) == (1.25, 2.5)


def test_equal_outcomes_are_one_run_and_cost_one_event_until_asked_for() -> None:
    rounds = Rounds()
    for at in range(1_000):
        rounds.round(float(at), ACCEPTED)
    assert rounds.events == 1
    (run,) = rounds.runs()
    assert (run.count, run.first_mono, run.last_mono, run.last_wall) == (1_000, 0.25, 999.25, 1_999.0)
    assert rounds.events == 2
    rounds.runs()
    assert rounds.events == 2


def test_every_change_of_verdict_is_kept_also_a_flip_back() -> None:
    rounds = Rounds()
    for at, outcome in enumerate((ACCEPTED, REVOKED, ACCEPTED, STALE, ACCEPTED)):
        rounds.round(float(at), outcome)
    assert [run.verdict for run in rounds.runs()] == ["accepted", "revoked", "accepted", "undecidable", "accepted"]
    assert [run.number for run in rounds.runs()] == [0, 1, 2, 3, 4]


def test_undecidable_of_another_code_or_reason_is_another_run() -> None:
    rounds = Rounds()
    rounds.round(0.0, STALE)
    rounds.round(1.0, STALE._replace(reason="hole"))
    rounds.round(2.0, Outcome("undecidable", "keys_behind"))
    assert [(run.code, run.reason) for run in rounds.runs()] == [
        ("revocations_stale", "stale"),
        ("revocations_stale", "hole"),
        ("keys_behind", None),
    ]


def test_fresh_acceptance_bears_the_beginning_of_the_last_fresh_round() -> None:
    rounds = Rounds()
    rounds.round(1.0, ACCEPTED, fresh=True)
    rounds.round(2.0, ACCEPTED, fresh=True)
    rounds.round(3.0, ACCEPTED, fresh=False)
    (run,) = rounds.runs()
    assert (run.count, run.fresh_count, run.last_fresh_mono, run.last_mono) == (3, 2, 2.0, 3.25)


def test_round_that_was_not_ready_counts_neither_as_ready_nor_as_fresh() -> None:
    rounds = Rounds()
    rounds.round(1.0, ACCEPTED, ready=False, fresh=True)
    (run,) = rounds.runs()
    assert (run.ready_count, run.fresh_count, run.last_ready_mono, run.last_fresh_mono) == (0, 0, None, None)


def test_another_policy_ends_the_run() -> None:
    rounds = Rounds()
    rounds.round(1.0, ACCEPTED)
    rounds.tape.set_policy(may_deny=True)
    rounds.round(2.0, ACCEPTED)
    assert [run.may_deny for run in rounds.runs()] == [False, True]


def test_token_that_is_watched_again_goes_on_counting_its_runs() -> None:
    rounds = Rounds()
    rounds.round(1.0, ACCEPTED)
    rounds.tape.unwatch("t")
    rounds.tape.unwatch("t")
    rounds.tape.watch("t", "token", "5-0.0123456789abcdef")
    rounds.round(2.0, ACCEPTED)
    assert [(run.number, run.has_min) for run in rounds.runs()] == [(0, False), (1, True)]
