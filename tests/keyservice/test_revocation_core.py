"""What a revocation request means."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from keyservice.core.ids import uuid7
from keyservice.core.revocation import (
    Draft,
    EntryIndex,
    RevocationPolicy,
    RevocationRequest,
    draft,
    entry_for,
    sid_draft,
)
from keyservice.errors import RequestRefused
from verifier.log import Entry, Position
from verifier.testing import make_key, sign

POLICY = RevocationPolicy(
    "https://id.test", "eu-west-1", max_token_lifetime_s=86_400, session_life_s=44_100, max_skew_s=5
)
KEY = make_key()
NOW = 1_000_000.25


def drafted(**fields: Any) -> Draft:
    return draft(RevocationRequest(**fields), "given", NOW, POLICY)


def entry(**fields: Any) -> Entry:
    return entry_for(drafted(**fields), NOW, POLICY)


def test_of_a_token_only_its_jti_is_kept() -> None:
    token = sign(KEY, {"iss": "https://other.test", "jti": "j1", "exp": 1_000_900, "sub": "ada"})
    made = entry(token=token)
    assert (made.kind, made.value, made.issuer, made.expires_at) == ("jti", "j1", "https://other.test", 1_000_900)
    assert made.before is None


@pytest.mark.parametrize("jti", [None, 7, "", "x" * 257])
def test_a_token_without_a_usable_jti_is_known_by_its_hash(jti: Any) -> None:
    token = sign(KEY, {"exp": 1_000_900.5} | ({} if jti is None else {"jti": jti}))
    made = entry(token=token)
    assert made.kind == "tok"
    assert made.value == hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()
    assert (made.issuer, made.expires_at) == ("", 1_000_901)


@pytest.mark.parametrize("exp", [None, True, "soon", 10**14, -1])
def test_without_a_usable_exp_an_entry_outlives_every_token(exp: Any) -> None:
    made = entry(token=sign(KEY, {"jti": "j", "exp": exp}))
    assert made.expires_at == 1_086_401


def test_cut_offs_reach_into_the_future_by_the_skew() -> None:
    for kind, value in (("sub", "ada"), ("client", "web"), ("all", None)):
        made = entry(kind=kind, value=value)
        assert (made.before, made.expires_at) == (1_000_006, 1_086_406)


@pytest.mark.parametrize(("kind", "value"), [("sid", "s1"), ("sub", "ada"), ("client", "web"), ("all", None)])
def test_what_can_hit_a_session_outlives_the_longest_session(kind: str, value: str | None) -> None:
    policy = replace(POLICY, session_life_s=30 * 86_400)
    made = entry_for(drafted(kind=kind, value=value), NOW, policy)
    assert made.expires_at >= max(NOW, made.before or 0) + 30 * 86_400
    token = entry_for(drafted(kind="jti", value="j"), NOW, policy)
    assert token.expires_at == 1_086_401


def test_a_cut_off_may_name_its_time() -> None:
    assert entry(kind="sub", value="ada", before=900_000).before == 900_000
    assert entry(kind="sub", value="ada", before=900_000).expires_at == 1_086_401
    assert entry(kind="sub", value="ada", before=1_000_006).before == 1_000_006
    with pytest.raises(RequestRefused, match="future"):
        entry(kind="sub", value="ada", before=1_000_007)


def test_a_revoked_key_stays_revoked() -> None:
    assert entry(kind="kid", value="abc").expires_at == 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "kind_unknown"),
        ({"kind": "epoch", "value": "x"}, "kind_unknown"),
        ({"kind": "user", "value": "x"}, "kind_unknown"),
        ({"kind": "sub"}, "value_invalid"),
        ({"kind": "all", "value": "x"}, "value_invalid"),
        ({"kind": "tok", "value": "x"}, "value_invalid"),
        ({"kind": "jti", "value": "x", "before": 1}, "before_invalid"),
        ({"kind": "sub", "value": "x", "before": -1}, "before_invalid"),
        ({"token": "x.y.z"}, "token_malformed"),
        ({"token": "x.y.z", "kind": "jti"}, "request_ambiguous"),
        ({"kind": "jti", "value": "x" * 257}, "value_invalid"),
        ({"kind": "jti", "value": "x", "reason": "x" * 257}, "reason_too_long"),
        ({"kind": "jti", "value": "x", "id": "no spaces"}, "id_invalid"),
        ({"kind": "jti", "value": "x", "id": "x" * 65}, "id_invalid"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        entry(**fields)
    assert refused.value.code == code


@pytest.mark.parametrize("issuer", ["x" * 256, "ß" * 128])
def test_an_issuer_is_bounded_in_bytes_before_anything_is_written(issuer: str) -> None:
    token = {"token": sign(KEY, {"iss": issuer, "jti": "j", "exp": 1_000_900})}
    named = {"kind": "jti", "value": "j", "issuer": issuer}
    for fields in (token, named):
        assert entry(**fields).issuer == issuer
    token = {"token": sign(KEY, {"iss": issuer + "x", "jti": "j", "exp": 1_000_900})}
    named = {"kind": "jti", "value": "j", "issuer": issuer + "x"}
    for fields in (token, named):
        with pytest.raises(RequestRefused) as refused:
            drafted(**fields)
        assert refused.value.code == "issuer_too_long"


@pytest.mark.parametrize("fields", [{"value": "x" * 256}, {"reason": "x" * 256}, {"id": "x" * 64}])
def test_at_the_limits_all_is_well(fields: dict[str, Any]) -> None:
    entry(**{"kind": "jti", "value": "x", **fields})


def test_a_retry_is_recognised_by_what_the_caller_chose() -> None:
    stored = entry(kind="sub", value="ada", reason="left", id="one")
    assert drafted(kind="sub", value="ada", reason="left", id="one").same_request(stored)
    assert drafted(kind="sub", value="ada", reason="left", before=stored.before).same_request(stored)
    for other in ({"value": "bob"}, {"reason": ""}, {"kind": "client"}, {"issuer": "x"}, {"before": 5}):
        assert not drafted(**{"kind": "sub", "value": "ada", "reason": "left", **other}).same_request(stored)


def test_the_end_of_a_session_lives_until_its_last_token_expired() -> None:
    made = entry_for(sid_draft("s1", "one", NOW + 10, POLICY), NOW, POLICY)
    assert (made.kind, made.value, made.expires_at) == ("sid", "s1", 1_000_011)


def test_the_index_keeps_the_first_entry_of_an_id_and_gives_the_newest_first() -> None:
    index = EntryIndex()
    first, second = entry(kind="jti", value="a", id="x"), entry(kind="sub", value="b", id="y")
    index.add([(Position(5, 1, "0" * 16), first), (Position(5, 2, "0" * 16), second)])
    index.add([(Position(5, 3, "0" * 16), entry(kind="jti", value="other", id="x"))])
    stored = index.get("x")
    assert stored is not None
    assert stored.entry is first
    assert [s.entry.id for s in index.newest(lambda _: True)] == ["y", "x"]
    assert [s.entry.id for s in index.newest(lambda e: e.kind == "jti")] == ["x"]
    assert stored.position == Position(5, 1, "0" * 16)


def test_a_place_is_known_only_in_the_reading_that_showed_it() -> None:
    index = EntryIndex()
    first = entry(kind="jti", value="a", id="x")
    index.add([(Position(5, 1, "0" * 16), first)])
    assert index.place_of(first) == Position(5, 1, "0" * 16)
    index.begin()
    assert index.place_of(first) is None
    assert index.get("x") == (first, Position(5, 1, "0" * 16)), "what is stored under an id is known all the same"
    index.add([(Position(9, 4, "1" * 16), msgspec.structs.replace(first, at=7)), (Position(9, 5, "1" * 16), first)])
    assert index.place_of(first) == Position(9, 4, "1" * 16)
    other = entry(kind="jti", value="other", id="x")
    index.add([(Position(9, 6, "1" * 16), other)])
    assert index.place_of(other) is None, "another entry under the id has no place of its own here"


@pytest.mark.parametrize(("limit", "left"), [(1_086_400, 2), (1_086_401, 1)])
def test_the_index_forgets_what_has_expired_and_never_a_key(limit: float, left: int) -> None:
    index = EntryIndex()
    held = [entry(kind="jti", value="a", id="x"), entry(kind="kid", value="k", id="y")]
    index.add((Position(5, seq, "0" * 16), e) for seq, e in enumerate(held))
    index.drop_expired(limit)
    assert len(index) == left


def test_ids_sort_by_time() -> None:
    assert uuid7(1.0) < uuid7(2.0)
    assert uuid7(1_700_000_000.0)[14] == "7"
    assert uuid7(1.0, 0) == "00000000-03e8-7000-8000-000000000000"
