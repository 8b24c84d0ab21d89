"""When a mirror tries which server again: the delays are jittered, the list goes round, the breaker pauses."""

from __future__ import annotations

import random
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.mirrors import client, module_dir, over_redis, primary, reaches, server, shared_server, short_rounds
from tests.verifier.support import until
from tests.verifier.valkey import Primary, running
from verifier import ConfigurationError
from verifier.limits import RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S
from verifier.reconnecting import OPEN_JITTER, Breaker, Reconnecting

__all__ = ["client", "module_dir", "primary", "server", "shared_server", "short_rounds"]

MIRRORS = 200


def attempts(seed: int, count: int) -> list[float]:
    """When one mirror that has just lost its server tries again, in seconds after that."""
    mirror = Reconnecting(1, rng=random.Random(seed))
    first = mirror.after(served=True).delay_s
    return list(accumulate([first, *(mirror.after(served=False).delay_s for _ in range(count - 1))]))


def test_two_hundred_mirrors_of_one_lost_server_do_not_come_back_in_the_same_instants() -> None:
    times = [attempts(seed, 8) for seed in range(MIRRORS)]
    first = Counter(int(one[0] / 0.005) for one in times)
    assert max(first.values()) <= MIRRORS / 4  # a tenth is expected of each 5 ms of the first 50
    eighth = Counter(int(one[7] / 0.1) for one in times)
    assert max(eighth.values()) <= MIRRORS / 10  # spread over seconds
    assert len({one[0] for one in times}) == MIRRORS


def test_the_ceiling_doubles_up_to_its_end_and_falls_back_once_a_server_has_served() -> None:
    class Highest(random.Random):
        def uniform(self, _low: float, high: float) -> float:
            return high

    mirror = Reconnecting(1, rng=Highest())
    delays = [mirror.after(served=False).delay_s for _ in range(8)]
    assert delays[:4] == pytest.approx([RECONNECT_DELAY_MIN_S * 2**n for n in range(1, 5)])
    assert delays[-1] == RECONNECT_DELAY_MAX_S
    assert mirror.after(served=True).delay_s == RECONNECT_DELAY_MIN_S


def test_the_list_goes_round() -> None:
    mirror = Reconnecting(3)
    assert mirror.node == 0
    assert [mirror.after(served=served).node for served in (False, True, False, False)] == [1, 2, 0, 1]


# -- the circuit breaker ----------------------------------------------------------------------------------------------


def test_without_a_breaker_no_pause_is_longer_than_the_back_off() -> None:
    mirror = Reconnecting(2)
    pauses = [mirror.after(served=False) for _ in range(200)]
    assert not any(pause.circuit_open for pause in pauses)
    assert max(pause.delay_s for pause in pauses) <= RECONNECT_DELAY_MAX_S


def test_it_opens_after_so_many_rounds_over_all_servers_and_not_one_attempt_sooner() -> None:
    mirror = Reconnecting(2, Breaker(3, 30.0))
    assert [mirror.after(served=False).circuit_open for _ in range(6)] == [False] * 5 + [True]


def test_half_open_one_round_in_vain_opens_it_again() -> None:
    mirror = Reconnecting(2, Breaker(3, 30.0))
    for _ in range(6):
        mirror.after(served=False)
    assert [mirror.after(served=False).circuit_open for _ in range(4)] == [False, True, False, True]


def test_half_open_a_server_that_serves_closes_it() -> None:
    mirror = Reconnecting(2, Breaker(3, 30.0))
    for _ in range(6):
        mirror.after(served=False)
    assert not mirror.after(served=True).circuit_open
    assert [mirror.after(served=False).circuit_open for _ in range(6)] == [False] * 5 + [True]


def test_the_pause_is_the_one_that_was_asked_for_and_a_quarter_more_at_most() -> None:
    pauses = [Reconnecting(1, Breaker(1, 30.0), random.Random(n)).after(served=False).delay_s for n in range(MIRRORS)]
    assert all(30.0 <= pause <= 30.0 * (1 + OPEN_JITTER) for pause in pauses)
    assert max(Counter(int(pause / 0.1) for pause in pauses).values()) <= MIRRORS / 10


@pytest.mark.parametrize(
    ("failures", "open_s", "setting"),
    [
        (0, 30.0, "redis_breaker_failures"),
        (True, 30.0, "redis_breaker_failures"),
        (1.5, 30.0, "redis_breaker_failures"),
        (3, RECONNECT_DELAY_MAX_S, "redis_breaker_open_s"),
        (3, float("nan"), "redis_breaker_open_s"),
        (None, -1, "redis_breaker_open_s"),
    ],
)
def test_impossible_settings_of_the_breaker_are_named(failures: Any, open_s: Any, setting: str) -> None:
    with pytest.raises(ConfigurationError, match=setting) as refused:
        Breaker.checked(failures, open_s)
    assert refused.value.setting == setting


def test_the_smallest_breaker_is_one_round_and_just_longer_than_the_back_off() -> None:
    longer = RECONNECT_DELAY_MAX_S + 0.1
    assert Breaker.checked(1, longer) == Breaker(1, longer)
    assert Breaker.checked(None, 30.0) is None


def test_an_open_breaker_is_shown_and_leaves_the_server_alone_until_its_pause_is_over(run_dir: Path) -> None:
    with over_redis(f"unix://{run_dir}/s", breaker=Breaker(2, 600.0)) as mirror:
        until(lambda: mirror.view.connection == "circuit_open", "open")
        assert mirror.view.problem == "unreachable"
        assert mirror.counters["disconnects"] == 2
        with running(run_dir), pytest.raises(AssertionError):
            until(lambda: mirror.view.connection != "circuit_open", "left alone", within_s=1.0)
        assert mirror.counters["disconnects"] == 2
    assert mirror.view.connection == "closed"


def test_a_breaker_closes_again_by_itself(run_dir: Path) -> None:
    with running(run_dir) as server:
        with server.client() as client:
            log = Primary(client)
        with over_redis(server, breaker=Breaker(1, 0.2)) as mirror:
            reaches(mirror, log.position)
            server.stop()
            until(lambda: mirror.view.connection == "circuit_open", "open")
            server.start()
            reaches(mirror, log.position)
