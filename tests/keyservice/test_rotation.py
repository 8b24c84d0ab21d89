"""The life of a key: in pairs just inside and just outside each time, and as a state machine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keyservice.core import rotation
from keyservice.core.rotation import STATES, Decision, Gate, KeyRecord, Policy, Serving, State, decide, gate

POLICY = Policy(rotation_interval_s=1000, publish_lead_s=100, removal_delay_s=50)
EU = "eu-west-1"


def record(kid: str, state: State, region: str = EU, **times: int) -> KeyRecord:
    return KeyRecord(kid=kid, region=region, alg="RS256", jwk={"kid": kid}, state=state, rev=3, **times)


def deciding(now: float, *records: KeyRecord, **options: Any) -> tuple[dict[str, str], bool]:
    """The states that the decision moves keys to, and whether it asks for a new key."""
    held = {r.kid: r for r in records}
    decision = decide(held, EU, now, POLICY, **{"usable": set(held), **options})
    return {r.kid: r.state for r in decision.changes}, decision.create


def test_a_region_without_keys_creates_one() -> None:
    assert deciding(0) == ({}, True)


def test_the_very_first_key_is_published_and_signs_at_once_and_a_standby_is_asked_for() -> None:
    assert deciding(10, record("a", "prepared", prepared_at=10)) == ({"a": "active"}, True)


def test_a_first_key_gets_all_its_times() -> None:
    (changed,) = decide({"a": record("a", "prepared")}, EU, 10.2, POLICY, usable={"a"}).changes
    assert (changed.published_at, changed.active_at, changed.rev) == (11, 11, 5)


def test_a_standby_is_published_and_waits() -> None:
    held = record("a", "active", active_at=0), record("b", "prepared")
    assert deciding(10, *held) == ({"b": "published"}, False)


@pytest.mark.parametrize(("now", "moved"), [(999, False), (1000, True)])
def test_a_key_is_replaced_when_its_interval_is_over(now: int, moved: bool) -> None:
    held = record("a", "active", active_at=0), record("b", "published", published_at=1)
    assert deciding(now, *held) == (({"a": "retiring", "b": "active"}, True) if moved else ({}, False))


@pytest.mark.parametrize(("now", "moved"), [(1999, False), (2000, True)])
def test_a_standby_waits_for_the_publish_lead_even_when_it_is_due(now: int, moved: bool) -> None:
    held = record("a", "active", active_at=0), record("b", "published", published_at=1900)
    assert (deciding(now, *held)[0] == {"a": "retiring", "b": "active"}) is moved


@pytest.mark.parametrize(("now", "moved"), [(149, False), (150, True)])
def test_a_rotation_on_request_waits_for_the_publish_lead_and_no_longer(now: int, moved: bool) -> None:
    held = record("a", "active", active_at=0), record("b", "published", published_at=50)
    assert (deciding(now, *held, rotate_kid="a")[0] != {}) is moved


def test_a_request_for_a_key_that_was_replaced_since_is_fulfilled() -> None:
    held = record("b", "active", active_at=0), record("c", "published", published_at=0)
    assert deciding(500, *held, rotate_kid="a") == ({}, False)


@pytest.mark.parametrize(("now", "moved"), [(549, False), (550, True)])
def test_a_retiring_key_is_removed_when_its_last_token_has_expired(now: int, moved: bool) -> None:
    held = (
        record("a", "retiring", retiring_at=500),
        record("b", "active", active_at=500),
        record("c", "published", published_at=500),
    )
    assert deciding(now, *held) == (({"a": "removed"} if moved else {}), False)


def test_a_revoked_active_key_is_replaced_at_once() -> None:
    held = record("a", "active", active_at=0), record("b", "published", published_at=9)
    assert deciding(10, *held, revoked={"a"}) == ({"a": "compromised", "b": "active"}, True)


def test_a_revoked_active_key_without_a_standby_asks_for_a_new_one() -> None:
    assert deciding(10, record("a", "active", active_at=0), revoked={"a"}) == ({"a": "compromised"}, True)


def test_a_removed_key_stays_removed_when_revoked() -> None:
    held = record("a", "removed"), record("b", "active", active_at=0), record("c", "published", published_at=0)
    assert deciding(10, *held, revoked={"a"}) == ({}, False)


def test_a_key_without_its_private_half_is_never_activated_and_never_replaced_by_a_new_one() -> None:
    held = record("a", "active", active_at=0), record("b", "published", published_at=0)
    assert deciding(5000, *held, usable={"a"}) == ({}, False)
    assert deciding(5000, record("b", "published", published_at=0), usable=set()) == ({}, False)


def test_of_two_active_keys_the_newest_goes_on() -> None:
    held = (
        record("a", "active", active_at=10),
        record("b", "active", active_at=20),
        record("c", "published", published_at=5),
    )
    assert deciding(30, *held) == ({"a": "retiring"}, False)


def test_other_regions_keys_are_left_alone() -> None:
    held = record("a", "prepared", region="us-east-1"), record("b", "active", region="us-east-1", active_at=0)
    assert deciding(9999, *held) == ({}, True)


def test_merging_takes_the_furthest_state_then_the_higher_rev() -> None:
    older, newer = record("a", "active"), record("a", "retiring")
    assert rotation.merge({"a": newer}, [older])["a"] is newer
    assert rotation.merge({"a": older}, [newer])["a"] is newer
    raised = msgspec.structs.replace(older, rev=9)
    assert rotation.merge({"a": older}, [raised])["a"] is raised
    assert rotation.merge({"a": older}, [])["a"] is older


US = "us-east-1"
STANDBY = record("b", "published", published_at=1900)


def served(**regions: dict[str, float]) -> Serving:
    """Both regions alive at 2000, and since when they serve what."""
    return Serving((EU, US), {EU: regions.get("eu", {}), US: regions.get("us", {})}, {EU: 2000, US: 2000})


def test_the_gate_opens_when_every_region_has_served_the_key_for_long_enough() -> None:
    assert gate(STANDBY, Serving(), 2000, POLICY) == Gate(2000)
    assert gate(STANDBY, served(eu={"b": 1901}), 2000, POLICY) == Gate(None, (US,))
    assert gate(STANDBY, served(us={"b": 1901}), 2000, POLICY) == Gate(None, (EU,))
    assert gate(STANDBY, served(eu={"b": 1901}, us={"b": 1902.5}), 2000, POLICY) == Gate(2000)
    slow = replace(POLICY, serve_lead_s=200)
    assert gate(STANDBY, served(eu={"b": 1901}, us={"b": 1902.5}), 2000, slow) == Gate(2103)


def test_serving_another_key_is_no_evidence_for_this_one() -> None:
    assert gate(STANDBY, served(eu={"a": 1}, us={"b": 1}), 2000, POLICY) == Gate(None, (EU,))


@pytest.mark.parametrize(("silent_s", "excused"), [(3615, ()), (3616, (US,))])
def test_a_region_is_excused_by_name_once_it_is_past_the_partition_budget(
    silent_s: int, excused: tuple[str, ...]
) -> None:
    now = 2000 + silent_s
    serving = Serving((EU, US), {EU: {"b": 1901}}, {EU: now, US: 2000})
    assert gate(STANDBY, serving, now, POLICY) == Gate(None if not excused else 2000, () if excused else (US,), excused)


def test_a_region_that_was_never_heard_is_waited_for_from_the_publication_on() -> None:
    serving = Serving((EU, US), {EU: {"b": 1901}}, {EU: 5400})
    assert gate(STANDBY, serving, 1900 + 3615, POLICY).waiting_for == (US,)
    assert gate(STANDBY, serving, 1900 + 3616, POLICY).excused == (US,)


def test_a_region_is_excused_no_earlier_than_it_stops_serving_by_its_own_clock() -> None:
    """It heard of a beat a moment after its last report, its clock is slow, and ours is fast."""
    skew_s = POLICY.max_skew_s
    stops_at = 2000 + 1 + POLICY.partition_budget_s + skew_s
    serving = Serving((EU, US), {EU: {"b": 1901}}, {EU: stops_at, US: 2000})
    assert gate(STANDBY, serving, stops_at + skew_s, POLICY).waiting_for == (US,)


def test_an_activation_waits_for_the_regions_and_says_for_which() -> None:
    held = {"a": record("a", "active", active_at=0), "b": STANDBY}
    late = decide(held, EU, 2000, POLICY, usable=set(held), serving=served(eu={"b": 1901}))
    assert (late.changes, late.gate) == ((), Gate(None, (US,)))
    done = decide(held, EU, 2000, POLICY, usable=set(held), serving=served(eu={"b": 1901}, us={"b": 1950}))
    assert {r.kid: r.state for r in done.changes} == {"a": "retiring", "b": "active"}


def test_where_nothing_signs_nobody_is_waited_for() -> None:
    decision = decide({"b": STANDBY}, EU, 2000, POLICY, usable={"b"}, serving=served())
    assert [r.state for r in decision.changes] == ["active"]


def test_a_clock_that_is_off_moves_nothing_by_time_and_still_replaces_what_is_revoked() -> None:
    held = {
        "a": record("a", "active", active_at=0),
        "b": record("b", "published", published_at=1),
        "c": record("c", "retiring", retiring_at=1),
    }
    ten_years = 3.2e8
    assert decide(held, EU, ten_years, POLICY, usable=set(held), clock_sound=False) == Decision()
    moved = decide(held, EU, ten_years, POLICY, usable=set(held), revoked={"a"}, clock_sound=False)
    assert {r.kid: r.state for r in moved.changes} == {"a": "compromised", "b": "active"}


YEARS = 10 * 365 * 86_400


def test_a_time_that_a_wrong_clock_wrote_is_set_to_now_and_waited_for_anew() -> None:
    wrong = YEARS + 500
    held = [
        record("a", "active", prepared_at=1, published_at=1, active_at=wrong),
        record("b", "published", prepared_at=wrong, published_at=wrong),
        record("c", "retiring", prepared_at=1, published_at=1, active_at=1, retiring_at=wrong),
    ]
    decision = decide({r.kid: r for r in held}, EU, 500, POLICY, usable={"a", "b", "c"})
    times = {r.kid: (r.state, r.published_at, r.active_at, r.retiring_at) for r in decision.changes}
    assert times == {
        "a": ("active", 1, 500, None),
        "b": ("published", 500, None, None),
        "c": ("retiring", 1, 1, 500),
    }
    after = {r.kid: r for r in decision.changes}
    assert all(after[r.kid].order > r.order for r in held)
    assert decide(after, EU, 501, POLICY, usable=set(after)) == Decision()
    assert {r.kid: r.state for r in decide(after, EU, 550, POLICY, usable=set(after)).changes} == {"c": "removed"}
    late = decide(after, EU, 1500, POLICY, usable=set(after)).changes
    assert {r.kid: r.state for r in late} == {"a": "retiring", "b": "active", "c": "removed"}


def test_a_time_that_another_instance_s_clock_may_have_written_is_left_alone() -> None:
    held = [record("a", "active", active_at=510), record("b", "published", published_at=510)]
    assert deciding(500, *held) == ({}, False)


def test_a_wrong_clock_sets_no_time_right() -> None:
    held = {"a": record("a", "active", active_at=YEARS), "b": record("b", "published", published_at=YEARS)}
    assert decide(held, EU, 500, POLICY, usable=set(held), clock_sound=False) == Decision()


@pytest.mark.parametrize(
    ("now", "retired", "moved"),
    [(150, None, True), (150, {}, False), (9_999, {}, False), (249, {"a": 200.0}, False), (250, {"a": 200.0}, True)],
)
def test_a_retiring_key_stays_until_its_region_has_known_for_long_enough_not_to_sign_with_it(
    now: int, retired: dict[str, float] | None, moved: bool
) -> None:
    held = [
        record("a", "retiring", retiring_at=100),
        record("b", "active", active_at=now - 1),
        record("c", "published", published_at=now - 1),
    ]
    assert deciding(now, *held, retired=retired)[0] == ({"a": "removed"} if moved else {})


class Rotator(RuleBasedStateMachine):
    """Whatever happens, in whatever order: states move forward, and nobody signs with what was not published before."""

    @initialize()
    def begin(self) -> None:
        self.now = 1_000.0
        self.records: dict[str, KeyRecord] = {}
        self.revoked: set[str] = set()
        self.created = 0
        self.rotate_kid: str | None = None

    def run(self, now: float) -> Decision:
        return decide(
            self.records,
            EU,
            now,
            POLICY,
            usable=set(self.records),
            revoked=self.revoked,
            rotate_kid=self.rotate_kid,
        )

    def apply(self, decision: Decision) -> None:
        for changed in decision.changes:
            before = self.records[changed.kid]
            assert STATES.index(changed.state) > STATES.index(before.state)
            assert changed.rev > before.rev
            self.records[changed.kid] = changed
        if decision.create:
            self.created += 1
            kid = f"k{self.created}"
            self.records[kid] = rotation.prepare(kid, EU, "RS256", {}, self.now)

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def somebody_asks(self) -> None:
        self.rotate_kid = next((kid for kid, r in self.records.items() if r.state == "active"), None)

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def a_key_is_revoked(self, data: st.DataObject) -> None:
        self.revoked.add(data.draw(st.sampled_from(sorted(self.records))))

    @rule()
    def a_tick(self) -> None:
        before = {kid for kid, r in self.records.items() if r.state in ("published", "active", "retiring")}
        had_active = any(r.state == "active" and kid not in self.revoked for kid, r in self.records.items())
        for _ in range(6):
            decision = self.run(self.now)
            if not decision.changes and not decision.create:
                break
            self.apply(decision)
        last = self.run(self.now)
        assert (last.changes, last.create) == ((), False)
        states = [r.state for r in self.records.values()]
        assert states.count("active") == 1
        assert states.count("published") == 1
        assert "prepared" not in states
        for kid, r in self.records.items():
            if r.state == "active" and had_active:
                assert kid in before, "an active key was in the JWKS before it signed"
            if r.state == "removed":
                assert r.retiring_at is not None
                assert self.now >= r.retiring_at + POLICY.removal_delay_s
            if r.state == "active" and had_active and r.active_at == math.ceil(self.now):
                assert r.published_at is not None

    @invariant()
    def no_revoked_key_signs_after_a_tick(self) -> None:
        if self.run(self.now) == Decision():
            assert not any(r.state == "active" and kid in self.revoked for kid, r in self.records.items())


TestRotator = Rotator.TestCase
TestRotator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
