"""The mirror of revocations: a union in any order, that forgets only what can no longer matter."""

from __future__ import annotations

import pytest

from tests.verifier.support import ISSUER, NOW, entry, snapshot_of
from verifier.log import Entry
from verifier.revocations import RECENT_MAX, Hit, Mirror, Snapshot

DAY = 86_400


def find(snapshot: Snapshot, **token: object) -> Hit | None:
    return snapshot.find(issuer=ISSUER, **token)  # type: ignore[arg-type]


def test_a_snapshot_never_changes_and_its_identity_is_its_version() -> None:
    mirror = Mirror()
    first = mirror.snapshot
    assert mirror.apply([entry("jti", "a")])
    second = mirror.snapshot
    assert second is not first
    assert mirror.apply([entry("jti", str(n)) for n in range(100)])
    assert find(first, jti="a") is None
    assert find(second, jti="1") is None
    assert find(second, jti="a") == Hit("jti", "jti-a")


def test_entries_already_held_change_nothing() -> None:
    mirror = Mirror()
    entries = [entry("jti", "a"), entry("sub", "ada"), entry("kid", "k"), entry("all", "")]
    mirror.apply(entries)
    held = mirror.snapshot
    assert not mirror.apply(entries)
    assert not mirror.apply([entry("jti", "a", expires_at=NOW)])  # ends sooner than what is held
    assert not mirror.apply([])
    assert not mirror.apply([entry("epoch", "0123456789abcdef -", expires_at=0)])
    assert mirror.snapshot is held


def test_kinds_and_issuers_do_not_mix() -> None:
    snapshot = snapshot_of(entry("jti", "a"))
    assert find(snapshot, jti="a")
    assert not find(snapshot, sid="a", sub="a", client_id="a", kid="a", tok="a", iat=0)
    assert snapshot.find(issuer="another", jti="a") is None


def test_a_token_without_an_identifier_is_not_hit_by_an_empty_one() -> None:
    assert find(snapshot_of(entry("jti", "a"), entry("sub", "b")), iat=0) is None


@pytest.mark.parametrize(
    ("iat", "hit"), [(NOW - 1, True), (NOW, True), (NOW + 0.5, False), (NOW + 1, False), (None, True)]
)
@pytest.mark.parametrize("kind", ["sub", "client", "all"])
def test_a_cut_off_reaches_its_second_inclusive(kind: str, iat: float | None, hit: bool) -> None:
    snapshot = snapshot_of(entry(kind, "" if kind == "all" else "x", before=NOW))
    assert (find(snapshot, sub="x", client_id="x", iat=iat) is not None) is hit


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_cut_offs_each_counts_by_itself(order: int) -> None:
    early, late = entry("sub", "x", before=NOW - 100, id="early"), entry("sub", "x", before=NOW, id="late")
    mirror = Mirror()
    for one in [early, late][::order]:
        mirror.apply([one])
    assert find(mirror.snapshot, sub="x", iat=NOW - 50) == Hit("sub", "late")
    assert find(mirror.snapshot, sub="x", iat=NOW - 50, after=["late"]) is None
    assert find(mirror.snapshot, sub="x", iat=NOW - 150, after=["late"]) == Hit("sub", "early")
    assert find(mirror.snapshot, sub="x", iat=NOW - 150, after=["late", "early"]) is None


def test_live_cut_offs_are_those_that_would_hit_a_token_issued_now() -> None:
    snapshot = snapshot_of(
        entry("sub", "ada", before=NOW + 5, id="sub"),
        entry("sub", "eve", before=NOW + 5, id="eve"),
        entry("client", "web", before=NOW + 5, id="client"),
        entry("all", "", before=NOW + 5, id="all"),
        entry("sub", "ada", before=NOW - 60, id="past"),
        entry("jti", "ada", id="jti"),
    )
    live = snapshot.live_cutoffs(ISSUER, "ada", "web", NOW)
    assert set(live) == {"sub", "client", "all"}
    assert find(snapshot, sub="ada", client_id="web", iat=NOW, after=live) is None
    assert find(snapshot, sub="ada", client_id="web", iat=NOW + 5) is not None
    assert set(snapshot.live_cutoffs(ISSUER, None, None, NOW)) == {"all"}
    assert snapshot.live_cutoffs("another", "ada", "web", NOW) == ()


@pytest.mark.parametrize("fraction", [0, 0.25, 0.999])
def test_whoever_logs_in_at_any_moment_after_a_cut_off_names_it_or_is_not_hit(fraction: float) -> None:
    snapshot = snapshot_of(entry("sub", "ada", before=NOW + 5, id="cut"))
    for second in range(12):
        now = NOW + second + fraction
        for iat in (now, int(now)):
            assert find(snapshot, sub="ada", iat=iat, after=snapshot.live_cutoffs(ISSUER, "ada", None, now)) is None


# -- forgetting ------------------------------------------------------------------------------------------------------

GRACE = 300


def dropped(mirror: Mirror, now: float, server_now: float) -> bool:
    return mirror.drop_expired(now, server_now, GRACE)


@pytest.mark.parametrize(
    ("local", "server", "gone"), [(0, 0, True), (-1, 0, False), (0, -1, False), (-1, 9e9, False), (9e9, -1, False)]
)
def test_an_entry_leaves_only_when_both_clocks_are_past_its_end_and_the_grace(
    local: float, server: float, gone: bool
) -> None:
    mirror = Mirror()
    mirror.apply([entry("jti", "a", expires_at=NOW), entry("sub", "b", expires_at=NOW)])
    end = NOW + GRACE
    assert dropped(mirror, end + local, end + server) is gone
    assert (find(mirror.snapshot, jti="a") is None) is gone
    assert (find(mirror.snapshot, sub="b", iat=0) is None) is gone


def test_what_never_expires_stays() -> None:
    mirror = Mirror()
    mirror.apply([entry("kid", "k"), entry("jti", "a", expires_at=NOW)])
    assert dropped(mirror, 9e12, 9e12)
    assert not dropped(mirror, 9e12, 9e12)
    assert find(mirror.snapshot, kid="k")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("together", [True, False])
def test_of_two_entries_for_one_thing_the_one_that_lasts_longest_counts(order: int, together: bool) -> None:
    pair = [entry("jti", "a", expires_at=NOW, id="short"), entry("jti", "a", expires_at=NOW + DAY, id="long")][::order]
    mirror = Mirror()
    for batch in [pair] if together else [[one] for one in pair]:
        mirror.apply(batch)
    dropped(mirror, NOW + GRACE + 1, NOW + GRACE + 1)
    assert find(mirror.snapshot, jti="a") == Hit("jti", "long")
    assert dropped(mirror, NOW + DAY + GRACE, NOW + DAY + GRACE)
    assert find(mirror.snapshot, jti="a") is None


def test_one_expired_cut_off_of_two_leaves_the_other() -> None:
    mirror = Mirror()
    mirror.apply([entry("sub", "x", before=NOW, expires_at=NOW, id="a")])
    mirror.apply([entry("sub", "x", before=NOW - 9, expires_at=NOW + DAY, id="b")])
    assert dropped(mirror, NOW + GRACE, NOW + GRACE)
    assert find(mirror.snapshot, sub="x", iat=NOW - 5) is None
    assert find(mirror.snapshot, sub="x", iat=NOW - 10) == Hit("sub", "b")


def test_when_all_is_gone_nothing_is_left() -> None:
    mirror = Mirror()
    mirror.apply([entry("jti", str(n), expires_at=NOW) for n in range(1000)])
    assert mirror.snapshot.entries == 1000
    assert dropped(mirror, NOW + DAY, NOW + DAY)
    assert (mirror.snapshot.entries, dict(mirror.snapshot.issuers)) == (0, {})


def test_adding_one_by_one_does_not_copy_everything_each_time() -> None:
    mirror = Mirror()
    for n in range(3000):
        mirror.apply([entry("jti", str(n)), entry("sub", str(n))])
    of = mirror.snapshot.issuers[ISSUER]
    assert of.sub is not None
    assert of.jti is not None
    assert len(of.sub.tiers) <= 8
    assert len(of.jti.recent) <= RECENT_MAX < len(of.jti)
    assert mirror.snapshot.entries == 6000
    assert all(find(mirror.snapshot, jti=str(n)) and find(mirror.snapshot, sub=str(n), iat=0) for n in range(3000))


def test_values_are_compared_exactly() -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    snapshot = snapshot_of(entry("sub", composed))
    assert find(snapshot, sub=composed, iat=0)
    for other in (decomposed, composed.upper(), composed + " ", ""):
        assert find(snapshot, sub=other, iat=0) is None


def test_entries_of_any_iterable_are_taken() -> None:
    mirror = Mirror()

    def one_by_one() -> list[Entry]:
        return [entry("jti", "a")]

    assert mirror.apply(iter(one_by_one()))
    assert find(mirror.snapshot, jti="a")


def test_a_thing_that_is_revoked_twice_is_counted_once() -> None:
    mirror = Mirror()
    for number in range(50):
        mirror.apply([entry("jti", f"t-{number % 10}", id=f"e-{number}", expires_at=NOW + number)])
        mirror.apply([entry("sub", "ada", id=f"s-{number}", before=NOW + number)])
        assert mirror.snapshot.entries == min(number + 1, 10) + 1
    mirror.drop_expired(NOW + 1_000, NOW + 1_000, 950)
    assert mirror.snapshot.entries == 1
