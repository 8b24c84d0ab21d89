"""Policy about data that is not at hand (DESIGN 7): allow, deny, never synced, and bounds per call."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.verifier.support import (
    NONCE,
    NONCE_2,
    NOW,
    Mirrored,
    Source,
    code_of,
    entry,
    heard,
    make_verifier,
    snapshot_of,
    token_of,
)
from verifier import ConfigurationError, RevokedToken, Undecidable
from verifier.freshness import Freshness
from verifier.log import Position
from verifier.mirroring import View
from verifier.testing import SigningKey


def undecided(mirrored: Mirrored, token: str, **arguments: Any) -> Undecidable:
    with pytest.raises(Undecidable) as caught:
        mirrored.verifier.verify(token, **arguments)
    return caught.value


# -- stale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_deny_refuses_by_name_just_past_the_bound(key: SigningKey, cached: bool) -> None:
    mirrored = Mirrored(key, on_stale="deny", max_staleness_s=5, token_cache_size=100 if cached else 0)
    token = token_of(key)
    assert mirrored.verifier.verify(token)
    mirrored.clock.advance(5)
    assert mirrored.verifier.verify(token)
    mirrored.clock.advance(0.01)
    error = undecided(mirrored, token)
    assert (error.code, error.reason) == ("revocations_stale", "stale")
    assert error.staleness_s == pytest.approx(5.01)
    mirrored.revocations.beat()
    assert mirrored.verifier.verify(token)


@pytest.mark.parametrize("wall", [True, False])
def test_deny_counts_each_of_the_two_clocks_alone(key: SigningKey, wall: bool) -> None:
    mirrored = Mirrored(key, on_stale="deny", max_staleness_s=5)
    token = token_of(key)
    mirrored.verifier.verify(token)
    if wall:
        mirrored.clock.now += 5.01
    else:
        mirrored.clock.mono += 5.01
    assert undecided(mirrored, token).reason == "stale"


def test_a_wall_clock_that_steps_back_does_not_make_old_data_fresh(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny", max_staleness_s=5)
    token = token_of(key)
    mirrored.clock.mono += 6
    mirrored.clock.now -= 20
    assert undecided(mirrored, token).code == "revocations_stale"


def test_an_old_beat_that_arrives_late_is_as_old_as_it_is(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny", max_staleness_s=5)
    mirrored.revocations.beat(age_s=5.5)
    assert undecided(mirrored, token_of(key)).staleness_s == pytest.approx(5.5)


def test_deny_refuses_while_no_majority_vouches(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny", confirmed=False)
    assert undecided(mirrored, token_of(key)).reason == "epoch_closed"
    mirrored.revocations.beat(confirmed=True)
    assert mirrored.verifier.verify(token_of(key))


def test_allow_goes_on_with_what_is_held_and_says_how_stale(key: SigningKey) -> None:
    mirrored = Mirrored(key, max_staleness_s=5)
    mirrored.revoke("jti", "revoked")
    good, revoked = token_of(key, exp=NOW + 80_000), token_of(key, jti="revoked", exp=NOW + 80_000)
    mirrored.clock.advance(70_000)
    assert mirrored.verifier.verify(good).staleness_s == 70_000
    assert code_of(mirrored.verifier, revoked) == "token_revoked"
    status = mirrored.verifier.status()
    assert (status.fresh, status.reason, status.staleness_s) == (False, "stale", 70_000)


def test_a_stale_verifier_still_says_revoked_and_invalid_rather_than_undecidable(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny")
    mirrored.revoke("jti", "revoked")
    token = token_of(key, jti="revoked")
    mirrored.clock.advance(60)
    assert code_of(mirrored.verifier, token) == "token_revoked"
    assert code_of(mirrored.verifier, "nonsense") == "token_malformed"


def test_an_expired_cached_token_under_deny_is_expired_and_not_undecidable(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny")
    token = token_of(key, exp=NOW + 60)
    mirrored.verifier.verify(token)
    mirrored.clock.advance(90)
    assert code_of(mirrored.verifier, token) == "token_expired"


# -- a bound per call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_stale", ["allow", "deny"])
def test_a_bound_per_call_is_kept_whatever_the_policy_and_the_cache(key: SigningKey, on_stale: str) -> None:
    mirrored = Mirrored(key, on_stale=on_stale)
    token = token_of(key)
    mirrored.verifier.verify(token)
    mirrored.clock.advance(2)
    assert mirrored.verifier.verify(token, max_staleness_s=2)
    mirrored.clock.advance(0.01)
    error = undecided(mirrored, token, max_staleness_s=2)
    assert (error.code, error.reason) == ("revocations_stale", "stale")
    assert mirrored.verifier.verify(token)


def test_a_bound_per_call_may_be_wider_than_the_policy(key: SigningKey) -> None:
    mirrored = Mirrored(key, on_stale="deny", max_staleness_s=5)
    mirrored.clock.advance(60)
    assert mirrored.verifier.verify(token_of(key), max_staleness_s=60)
    assert undecided(mirrored, token_of(key)).reason == "stale"


def test_a_bound_per_call_that_is_no_number_is_not_kept_by_anything(key: SigningKey) -> None:
    assert undecided(Mirrored(key), token_of(key), max_staleness_s=float("nan")).code == "revocations_stale"


def test_a_bound_per_call_cannot_be_kept_without_a_mirror(key: SigningKey) -> None:
    verifier = make_verifier(key)
    assert verifier.verify(token_of(key))
    with pytest.raises(Undecidable) as caught:
        verifier.verify(token_of(key), max_staleness_s=5)
    assert (caught.value.code, caught.value.reason) == ("revocations_stale", "no_mirror")


# -- never synced ----------------------------------------------------------------------------------------------------


def test_before_the_first_read_everything_good_is_undecidable_by_default(key: SigningKey) -> None:
    mirrored = Mirrored(key, synced=False)
    assert undecided(mirrored, token_of(key)).code == "never_synced"
    assert code_of(mirrored.verifier, "nonsense") == "token_malformed"
    mirrored.revocations.beat()
    assert mirrored.verifier.verify(token_of(key))


@pytest.mark.parametrize("on_stale", ["allow", "deny"])
def test_on_unsynced_allow_decides_until_the_first_read_and_on_stale_after_it(key: SigningKey, on_stale: str) -> None:
    mirrored = Mirrored(key, synced=False, on_unsynced="allow", on_stale=on_stale)
    claims = mirrored.verifier.verify(token_of(key))
    assert claims.staleness_s is None
    assert mirrored.verifier.verify(token_of(key)) is claims
    assert undecided(mirrored, token_of(key), max_staleness_s=5).reason == "never_synced"
    mirrored.revocations.beat(age_s=60)
    if on_stale == "allow":
        assert mirrored.verifier.verify(token_of(key)).staleness_s == 60
    else:
        assert undecided(mirrored, token_of(key)).reason == "stale"


def test_a_verifier_that_was_never_synced_enforces_what_it_has_read_so_far(key: SigningKey) -> None:
    mirrored = Mirrored(key, synced=False, on_unsynced="allow")
    mirrored.verifier.verify(token_of(key))
    mirrored.revoke("jti", "t-1")
    assert code_of(mirrored.verifier, token_of(key)) == "token_revoked"


def test_verify_works_as_soon_as_wait_ready_has_said_so(key: SigningKey) -> None:
    source = Source(View(snapshot_of(), Freshness(5.0)))
    verifier = make_verifier(key, redis_url=source).start()
    assert not verifier.wait_ready(0)
    source.view = replace(source.view, freshness=replace(source.view.freshness, synced=True))  # not told yet
    assert verifier.wait_ready(0)
    assert verifier.verify(token_of(key))


# -- min_position ----------------------------------------------------------------------------------------------------

AT = Position(7, 4, NONCE)


def source_at(position: Position, *, snapshot: Any = None, **freshness: Any) -> Source:
    state = replace(Freshness(5.0, synced=True, epoch_open=True), **freshness)
    return Source(View(snapshot_of() if snapshot is None else snapshot, state, position))


@pytest.mark.parametrize(
    ("wanted", "reached"),
    [(f"7-4.{NONCE}", True), (f"7-0.{NONCE}", True), (f"7-5.{NONCE}", False), (f"7-3.{NONCE_2}", False)],
)
def test_a_position_is_reached_at_it_or_past_it_in_the_same_history(
    key: SigningKey, wanted: str, reached: bool
) -> None:
    verifier = make_verifier(key, redis_url=source_at(AT), min_position_wait_s=0).start()
    if reached:
        assert verifier.verify(token_of(key), min_position=wanted)
    else:
        with pytest.raises(Undecidable) as caught:
            verifier.verify(token_of(key), min_position=wanted)
        assert caught.value.code == "position_not_reached"


LATER = Position(8, 3, NONCE_2)


def test_a_later_epoch_counts_once_a_confirmed_beat_of_it_is_applied(key: SigningKey) -> None:
    source = source_at(LATER, confirmed=heard(LATER))
    assert make_verifier(key, redis_url=source).start().verify(token_of(key), min_position=str(AT))


@pytest.mark.parametrize(
    "state",
    [
        {"epoch_open": False},
        {"epoch_open": True},  # opened, but what the regions added to it may not have been read yet
        {"epoch_open": True, "confirmed": heard(AT)},
        {"epoch_open": True, "applied": heard(LATER), "pending_confirmed": heard(LATER)},
    ],
)
def test_a_later_epoch_that_nothing_vouches_for_does_not_count(key: SigningKey, state: dict[str, Any]) -> None:
    verifier = make_verifier(key, redis_url=source_at(LATER, **state)).start()
    with pytest.raises(Undecidable):
        verifier.verify(token_of(key), min_position=str(AT))


def test_a_lower_epoch_does_not_count_however_confirmed(key: SigningKey) -> None:
    verifier = make_verifier(key, redis_url=source_at(AT, confirmed=heard(AT))).start()
    with pytest.raises(Undecidable):
        verifier.verify(token_of(key), min_position=str(LATER))


def test_a_position_past_a_hole_is_not_reached(key: SigningKey) -> None:
    verifier = make_verifier(key, redis_url=source_at(AT, holed_nonce=NONCE)).start()
    with pytest.raises(Undecidable):
        verifier.verify(token_of(key), min_position=f"7-3.{NONCE}")


def test_what_the_position_brought_is_enforced_although_the_mirror_has_not_told_us_yet(key: SigningKey) -> None:
    source = source_at(Position(7, 3, NONCE))
    verifier = make_verifier(key, redis_url=source).start()
    token = token_of(key)
    verifier.verify(token)
    source.view = replace(source.view, snapshot=snapshot_of(entry("jti", "t-1")), position=AT)
    with pytest.raises(RevokedToken):
        verifier.verify(token, min_position=str(AT))
    with pytest.raises(RevokedToken):
        verifier.verify(token)


def test_a_position_that_is_not_reached_waits_a_bounded_time(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=0.05)
    started = time.monotonic()
    assert undecided(mirrored, token_of(key), min_position=f"1-9.{NONCE}").code == "position_not_reached"
    assert time.monotonic() - started >= 0.05


def test_a_position_that_arrives_while_waiting_is_enough(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=60)
    assert mirrored.verifier.status().position == f"1-0.{NONCE}"
    timer = threading.Timer(0.02, mirrored.revoke, ("jti", "t-1"))
    timer.start()
    with pytest.raises(RevokedToken):
        mirrored.verifier.verify(token_of(key), min_position=f"1-1.{NONCE}")
    timer.join()


@pytest.mark.parametrize(
    "text", ["", "7-4", "7-4.", f"7-4.{NONCE.upper()}", f" 7-4.{NONCE}", f"07-4.{NONCE}", 5, b"7-4"]
)
def test_a_position_of_another_form_is_misuse(key: SigningKey, text: Any) -> None:
    verifier = make_verifier(key, redis_url=source_at(AT)).start()
    with pytest.raises(ConfigurationError) as caught:
        verifier.verify(token_of(key), min_position=text)
    assert caught.value.setting == "min_position"


def test_a_position_cannot_be_reached_without_a_mirror(key: SigningKey) -> None:
    with pytest.raises(Undecidable) as caught:
        make_verifier(key).verify(token_of(key), min_position=str(AT))
    assert caught.value.reason == "no mirror"


async def test_averify_waits_for_a_position_off_the_event_loop(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=10)
    answers: list[str] = []

    async def verify() -> None:
        try:
            await mirrored.verifier.averify(token_of(key), min_position=f"1-1.{NONCE}")
        except RevokedToken as error:
            answers.append(error.kind)

    async with anyio.create_task_group() as group:
        group.start_soon(verify)
        await anyio.lowlevel.checkpoint()
        mirrored.revoke("jti", "t-1")  # reached only because the loop goes on
    assert answers == ["jti"]


# -- what it says of itself ------------------------------------------------------------------------------------------


def test_status_says_what_is_held(key: SigningKey) -> None:
    mirrored = Mirrored(key, region="eu-west-1")
    mirrored.revoke("jti", "a")
    mirrored.revoke("sub", "b")
    mirrored.verifier.verify(token_of(key))
    status = mirrored.verifier.status()
    assert (status.ready, status.fresh, status.reason, status.confirmed) == (True, True, None, True)
    assert (status.position, status.epoch, status.nonce) == (f"1-2.{NONCE}", 1, NONCE)
    assert (status.mirror_entries, status.keys, status.region) == (2, (key.kid,), "eu-west-1")
    assert status.token_cache_entries == 1
    assert status.counters["decided"] == 1


def test_outcomes_are_counted(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    mirrored.verifier.verify(token_of(key))
    code_of(mirrored.verifier, "nonsense")
    mirrored.revoke("jti", "t-1")
    code_of(mirrored.verifier, token_of(key))
    counters = mirrored.verifier.status().counters
    assert (counters["decided"], counters["invalid"], counters["revoked"]) == (1, 1, 1)
