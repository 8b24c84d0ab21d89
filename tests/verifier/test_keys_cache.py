"""The JWKS cache's decisions (DESIGN 7), by a clock that the test moves."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest

from tests.verifier import vectors
from tests.verifier.support import NOW
from verifier.jwk import JwksError, KeySet
from verifier.keys import Fetched, JwksCache, KeysView
from verifier.limits import JWKS_COOLDOWN_S, JWKS_MAX_AGE_CEILING_S, JWKS_MAX_AGE_DEFAULT_S, PUBLICATION_LAG_S
from verifier.log import Generation


def body(*kids: str) -> bytes:
    return json.dumps({"keys": [{**vectors.A2_KEY, "kid": kid} for kid in kids]}).encode()


def take(cache: JwksCache, reply: Fetched, *, source: int = 0, mono: float = 100.0) -> bool:
    cache.attempted(source, mono)
    return cache.succeeded(source, reply, started_at=NOW, started_mono=mono)


def may_fetch(cache: JwksCache, mono: float, *, wanted: bool = False) -> bool:
    ready = cache.ready_after_s(mono, wanted=wanted) == 0
    assert ready == (cache.next_source(mono, set(), wanted=wanted) is not None)
    return ready


def kids(cache: JwksCache) -> tuple[str, ...]:
    return () if cache.view.keys is None else cache.view.keys.kids


def refused(cache: JwksCache, reply: Fetched, *, source: int = 0, mono: float = 200.0) -> str:
    before = cache.view
    with pytest.raises(JwksError) as caught:
        take(cache, reply, source=source, mono=mono)
    assert cache.view is before
    return caught.value.reason


# -- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [b"", b"{}", b'{"keys": []}', b"<html>", b'{"keys": [{"kty": "oct", "k": "AA"}]}', body("a", "a")]
)
def test_a_bad_document_never_replaces_a_good_one(bad: bytes) -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), generation=Generation(1, 0)))
    refused(cache, Fetched(bad, generation=Generation(1, 1)))
    assert kids(cache) == ("a",)
    assert cache.view.generation == Generation(1, 0)


@pytest.mark.parametrize(
    ("generation", "taken"), [((1, 4), False), ((0, 9), False), ((1, 5), True), ((1, 6), True), ((2, 0), True)]
)
@pytest.mark.parametrize("unchanged", [False, True])
def test_an_older_generation_is_a_failed_attempt(generation: tuple[int, int], taken: bool, unchanged: bool) -> None:
    cache = JwksCache(2)
    take(cache, Fetched(body("a"), etag='"1"', generation=Generation(1, 5)))
    reply = Fetched(None if unchanged else body("b"), generation=Generation(*generation))
    if taken:
        assert take(cache, reply, mono=200) is not unchanged
        assert cache.view.generation == generation
        assert cache.view.fetched_mono == 200
    else:
        assert refused(cache, reply) == "generation_older"
        assert kids(cache) == ("a",)


def test_a_reply_without_a_generation_keeps_the_one_held() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), generation=Generation(1, 5)))
    take(cache, Fetched(body("b")), mono=200)
    assert (kids(cache), cache.view.generation) == (("b",), Generation(1, 5))
    assert refused(cache, Fetched(body("c"), generation=Generation(1, 4))) == "generation_older"


def test_not_modified_renews_what_is_held() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), etag='"1"'))
    assert cache.etag(0) == '"1"'
    assert not take(cache, Fetched(None), mono=200)
    assert (kids(cache), cache.view.fetched_mono, cache.etag(0)) == (("a",), 200, '"1"')


def test_not_modified_without_a_document_of_that_source_is_refused() -> None:
    assert refused(JwksCache(1), Fetched(None)) == "not_modified_without_document"
    assert refused(JwksCache(1, KeySet.from_document(body("a"))), Fetched(None)) == "not_modified_without_document"
    cache = JwksCache(2)
    take(cache, Fetched(body("a")))  # no ETag was sent
    assert refused(cache, Fetched(None)) == "not_modified_without_document"


def test_an_etag_is_only_sent_while_its_document_is_the_one_held() -> None:
    cache = JwksCache(2)
    take(cache, Fetched(body("a"), etag='"a"'), source=0)
    take(cache, Fetched(body("b"), etag='"b"'), source=1)
    assert (cache.etag(0), cache.etag(1)) == (None, '"b"')
    assert refused(cache, Fetched(None), source=0) == "not_modified_without_document"
    assert kids(cache) == ("b",)


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_age_s", "counted"),
    [(None, JWKS_MAX_AGE_DEFAULT_S), (60.0, 60.0), (0.0, 1.0), (1e9, JWKS_MAX_AGE_CEILING_S)],
)
def test_a_set_is_refreshed_ahead_of_its_max_age_with_jitter(max_age_s: float | None, counted: float) -> None:
    due = set()
    for seed in range(50):
        cache = JwksCache(1, rng=random.Random(seed))
        assert cache.is_due(0)
        take(cache, Fetched(body("a"), max_age_s=max_age_s))
        assert not cache.is_due(100 + 0.719 * counted)
        assert cache.is_due(100 + 0.8 * counted)
        due.add(cache.wake_after_s(100))
    assert len(due) > 40
    assert max(due) - min(due) > 0.05 * counted


def test_a_failed_pass_is_tried_again_soon_but_not_at_once() -> None:
    cache = JwksCache(1)
    cache.failed(100)
    assert 0 < cache.wake_after_s(100) <= JWKS_COOLDOWN_S
    assert cache.is_due(100 + JWKS_COOLDOWN_S)


def test_a_failed_pass_does_not_bring_a_refresh_forward() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), max_age_s=1000))
    cache.failed(110)
    assert cache.wake_after_s(110) > 500


def test_a_source_is_asked_twice_a_cooldown_however_the_attempts_end() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a")), mono=100)
    assert may_fetch(cache, 100.1)  # one fast retry
    refused(cache, Fetched(b"{}"), mono=100.1)
    assert not may_fetch(cache, 100.2)
    assert cache.next_source(100.2, set()) is None
    assert not may_fetch(cache, 100 + JWKS_COOLDOWN_S - 0.01)
    assert may_fetch(cache, 100 + JWKS_COOLDOWN_S)
    cache.attempted(0, 100 + JWKS_COOLDOWN_S)
    assert not may_fetch(cache, 100.05 + JWKS_COOLDOWN_S)  # the second attempt still counts
    assert may_fetch(cache, 100.1 + JWKS_COOLDOWN_S)


def attack(cache: JwksCache, from_s: float, to_s: float) -> list[float]:
    """When fetches are made while a hundred forged kids a second ask for them."""
    fetches = []
    for mono in (from_s + tick / 100 for tick in range(int((to_s - from_s) * 100))):
        if may_fetch(cache, mono, wanted=True):
            cache.attempted(0, mono, wanted=True)
            fetches.append(mono)
    return fetches


def test_over_a_long_time_forged_kids_cost_two_fetches_a_cooldown() -> None:
    assert len(attack(JwksCache(1), 0, 600)) <= 2 * 600 / JWKS_COOLDOWN_S + 1


def test_what_forged_kids_ask_for_is_spread_so_that_a_fresh_key_waits_for_half_a_cooldown_at_most() -> None:
    fetches = attack(JwksCache(1), 0, 600)
    gaps = [after - before for before, after in pairwise(fetches)]
    assert max(gaps) < JWKS_COOLDOWN_S / 2 + 0.05
    assert min(gaps) > JWKS_COOLDOWN_S / 2 - 0.05


@pytest.mark.parametrize("ago_s", [0.0, 0.1, JWKS_COOLDOWN_S / 2, JWKS_COOLDOWN_S])
def test_an_unknown_kid_has_its_fetch_at_once_however_recent_the_scheduled_one(ago_s: float) -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a")), mono=100)
    assert may_fetch(cache, 100 + ago_s, wanted=True)


def test_forged_kids_do_not_hold_back_a_scheduled_fetch_for_longer_than_a_cooldown() -> None:
    cache = JwksCache(1)
    last = attack(cache, 100, 130)[-1]
    assert may_fetch(cache, last + JWKS_COOLDOWN_S / 2 + 0.01)


def test_a_second_source_has_its_own_cooldown() -> None:
    cache = JwksCache(2)
    cache.attempted(0, 100, wanted=True)
    assert cache.next_source(100.1, set(), wanted=True) == 1
    assert cache.next_source(100.1, {1}, wanted=True) is None
    assert cache.next_source(100.1, set(), wanted=False) == 0


def test_a_reply_to_an_older_request_never_overwrites_a_newer_one() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("new")), mono=200)
    assert refused(cache, Fetched(body("old")), mono=199.9) == "reply_older"
    assert kids(cache) == ("new",)
    assert take(cache, Fetched(body("same moment")), mono=200)


def test_sources_are_asked_in_order_each_once_a_pass() -> None:
    cache = JwksCache(3)
    assert [cache.next_source(0, set()), cache.next_source(0, {0}), cache.next_source(0, {0, 1})] == [0, 1, 2]
    assert cache.next_source(0, {0, 1, 2}) is None
    cache.attempted(0, 0.0)
    cache.attempted(0, 0.1)
    assert cache.next_source(0.2, set()) == 1


# -- what is known ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "knows"), [(PUBLICATION_LAG_S, False), (PUBLICATION_LAG_S + 0.1, True), (-60, False)]
)
def test_a_set_knows_the_keys_of_tokens_issued_the_publication_lag_before_its_fetch_began(
    after: float, knows: bool
) -> None:
    view = KeysView(KeySet.from_document(body("a")), None, 100.0, NOW + after)
    assert view.knows_tokens_of(NOW) is knows


def test_a_set_that_was_never_fetched_knows_no_token() -> None:
    for view in (KeysView(), JwksCache(1, KeySet.from_document(body("a")), mono=5.0).view):
        assert not view.knows_tokens_of(NOW - 86_400)


def test_a_view_is_immutable() -> None:
    cache = JwksCache(1)
    before: Any = cache.view
    take(cache, Fetched(body("a")))
    assert before == KeysView()
    with pytest.raises(AttributeError):
        before.keys = None


# -- what the trust log says -------------------------------------------------------------------------------------------


def test_a_newer_generation_in_the_trust_log_brings_the_next_fetch_forward_and_an_older_one_does_not() -> None:
    cache = JwksCache(1)
    assert not cache.expect(Generation(1, 5), 99.0)  # before the first fetch there is nothing to be behind
    take(cache, Fetched(body("a"), generation=Generation(1, 3), max_age_s=300))
    assert not cache.is_due(110.0)
    assert not cache.expect(Generation(1, 3), 110.0)
    assert not cache.expect(Generation(1, 2), 110.0)
    assert not cache.is_due(112.0)
    assert cache.expect(Generation(1, 4), 110.0)
    assert cache.is_due(111.0)
    assert cache.wake_after_s(110.0) <= 1.0
    assert not cache.expect(Generation(1, 4), 110.5)  # the log says so again and again
    take(cache, Fetched(body("a", "b"), generation=Generation(1, 4), max_age_s=300), mono=111.0)
    assert not cache.is_due(140.0)


def test_a_source_that_is_still_behind_is_asked_again_within_its_cooldown() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), generation=Generation(1, 3), max_age_s=300))
    cache.expect(Generation(1, 4), 110.0)
    take(cache, Fetched(body("a"), generation=Generation(1, 3), max_age_s=300), mono=111.0)
    assert not cache.is_due(111.5)
    assert cache.is_due(111.0 + JWKS_COOLDOWN_S)


def test_a_source_without_generations_is_left_alone() -> None:
    cache = JwksCache(1)
    take(cache, Fetched(body("a"), max_age_s=300))
    assert not cache.expect(Generation(9, 9), 110.0)
    assert not cache.is_due(120.0)


def test_a_fleet_spreads_what_the_log_tells_all_of_it_at_once() -> None:
    first = []
    for seed in range(200):
        cache = JwksCache(1, rng=random.Random(seed))
        take(cache, Fetched(body("a"), generation=Generation(1, 3), max_age_s=300))
        cache.expect(Generation(1, 4), 110.0)
        first.append(cache.wake_after_s(110.0))
    assert max(first) - min(first) > 0.9
    assert max(sum(at <= other < at + 0.05 for other in first) for at in first) < 30
