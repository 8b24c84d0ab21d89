"""What an older system's messages and keys mean, and what becomes of them: no socket, no clock."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyservice.core.bridge import (
    BRIDGED_KINDS,
    MESSAGE_BYTES_MAX,
    PERMANENT,
    Garbage,
    Item,
    KeyPattern,
    Known,
    Pending,
    Rules,
    Step,
    after_answer,
    body_of,
    judge,
    read,
)
from keyservice.core.revocation import RevocationPolicy, RevocationRequest, draft, entry_for
from keyservice.errors import RequestRefused
from verifier.testing import make_key, sign

NOW = 1_700_000_000.25
RULES = Rules()
KEY = make_key()
POLICY = RevocationPolicy("https://id.test", "eu", 86_400, 86_400, 5)


def said(raw: bytes | str, rules: Rules = RULES, *, key: bool = False, now: float = NOW) -> dict[str, Any]:
    (item,) = read(raw.encode() if isinstance(raw, str) else raw, rules, now, key=key)
    body: dict[str, Any] = json.loads(item.body)
    assert body["id"] == item.id
    return body


def without_id(raw: bytes | str, rules: Rules = RULES, **options: Any) -> dict[str, Any]:
    return {name: value for name, value in said(raw, rules, **options).items() if name != "id"}


def code_of(raw: bytes | str, rules: Rules = RULES, *, key: bool = False) -> str:
    with pytest.raises(Garbage) as refused:
        read(raw.encode() if isinstance(raw, str) else raw, rules, NOW, key=key)
    return refused.value.code


def token(**claims: Any) -> str:
    return sign(KEY, {"iss": "https://id.test", "exp": int(NOW) + 60, **claims})


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "request_"),
    [
        ("f81d4fae", {"kind": "jti", "value": "f81d4fae"}),
        ("  f81d4fae\n", {"kind": "jti", "value": "f81d4fae"}),
        ('"f81d4fae"', {"kind": "jti", "value": "f81d4fae"}),
        ("12345", {"kind": "jti", "value": "12345"}),
        ("eyJhbGciOiJub25lIn0.e30", {"kind": "jti", "value": "eyJhbGciOiJub25lIn0.e30"}),
        ("a.b.c", {"kind": "jti", "value": "a.b.c"}),
        ('{"jti": "x"}', {"kind": "jti", "value": "x"}),
        ('{"jti": 7}', {"kind": "jti", "value": "7"}),
        ('{"jti": "x", "exp": 1, "sub": "u", "iss": "i"}', {"kind": "jti", "value": "x", "issuer": "i"}),
        ('{"sid": "s", "issuer": ""}', {"kind": "sid", "value": "s", "issuer": ""}),
        ('{"sub": "u", "reason": "left"}', {"kind": "sub", "value": "u", "reason": "left"}),
        ('{"sub": "u", "before": 1600000000}', {"kind": "sub", "value": "u", "before": 1_600_000_000}),
        ('{"client": "c"}', {"kind": "client", "value": "c"}),
        ('{"client_id": "c", "sub": "u"}', {"kind": "client", "value": "c"}),
        ('{"kind": "sid", "value": "s"}', {"kind": "sid", "value": "s"}),
        (json.dumps({"tok": "0a" * 32}), {"kind": "tok", "value": "0a" * 32}),
    ],
)
def test_a_message_in_each_form_says_what_is_revoked(raw: str, request_: dict[str, Any]) -> None:
    assert without_id(raw) == request_


@pytest.mark.parametrize("form", ["{}", '"{}"', '{{"token": "{}"}}', '{{"access_token": "{}", "sub": "u"}}'])
def test_a_token_travels_whole(form: str) -> None:
    sent = token(jti="x")
    assert without_id(form.format(sent)) == {"token": sent}


def test_an_id_that_stands_alone_is_of_the_kind_that_was_set_and_counts_for_every_issuer_that_was() -> None:
    items = read(b"s", Rules("sid", ("", "https://old.test")), NOW)
    bodies = [json.loads(item.body) for item in items]
    assert [(body["kind"], body["issuer"]) for body in bodies] == [("sid", ""), ("sid", "https://old.test")]
    assert len({item.id for item in items}) == 2


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "identifier_missing"),
        (b"  ", "identifier_missing"),
        (b"\xff\xfe", "message_not_utf8"),
        (b"x" * (MESSAGE_BYTES_MAX + 1), "message_too_long"),
        (b"x" * 257, "identifier_invalid"),
        (b"two words", "identifier_invalid"),
        (b"a\x00b", "identifier_invalid"),
        (b"eyJ.x.y", "token_malformed"),
        (b'{"token": "eyJ.x.y"}', "token_malformed"),
        (b'{"token": 7}', "identifier_missing"),
        (b"{", "json_invalid"),
        (b"[" * MESSAGE_BYTES_MAX, "json_invalid"),
        (b'{"a":' * 6000, "json_invalid"),
        (b'{"jti": "\\ud800"}', "json_invalid"),
        (b"[]", "json_form_unknown"),
        (b"{}", "identifier_missing"),
        (b'{"jti": ""}', "identifier_missing"),
        (b'{"jti": true}', "identifier_invalid"),
        (b'{"jti": ["x"]}', "identifier_invalid"),
        (b'{"kind": "jti"}', "identifier_invalid"),
        (b'{"tok": "0A"}', "identifier_invalid"),
        (b'{"kind": "kid", "value": "x"}', "kind_not_bridged"),
        (b'{"kind": "all", "value": ""}', "kind_not_bridged"),
        (b'{"jti": "x", "issuer": "' + b"i" * 257 + b'"}', "identifier_invalid"),
    ],
)
def test_garbage_has_a_stable_code_and_no_content(raw: bytes, code: str) -> None:
    assert code_of(raw) == code
    with pytest.raises(Garbage) as refused:
        read(raw, RULES, NOW)
    assert str(refused.value) == code


def test_at_the_limits_a_message_is_read() -> None:
    assert said(b"x" * 256)["value"] == "x" * 256
    assert said(b"x" + b" " * (MESSAGE_BYTES_MAX - 1))["value"] == "x"
    assert said(json.dumps({"jti": "x", "issuer": "i" * 256}))["issuer"] == "i" * 256
    assert said(json.dumps({"jti": "x", "reason": "r" * 256}))["reason"] == "r" * 256


def test_what_goes_beside_an_identifier_never_costs_the_revocation() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"reason": "r" * 257},
        {"reason": 7},
        {"exp": "soon"},
        {"before": "x"},
        {"before": 10**12},
        {"x": {}},
    )
    for beside in wrong:
        assert without_id(json.dumps({"sub": "u", **beside})) == {"kind": "sub", "value": "u"}


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))))
def test_whatever_is_published_is_a_request_or_garbage(raw: bytes) -> None:
    try:
        items = read(raw, RULES, NOW)
    except Garbage:
        return
    assert items


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_MEMBERS = st.sampled_from(
    ["token", "jti", "sid", "sub", "client", "tok", "kind", "value", "issuer", "iss", "reason", "exp", "before"]
)


@given(st.dictionaries(_MEMBERS, _JSON, max_size=5))
def test_what_is_read_from_any_object_is_what_the_admin_api_takes(members: dict[str, Any]) -> None:
    try:
        items = read(json.dumps(members).encode(), RULES, NOW)
    except Garbage:
        return
    for item in items:
        asked = msgspec.json.decode(item.body, type=RevocationRequest)
        entry_for(draft(asked, "unused", NOW, POLICY), NOW, POLICY)


# -- ids --------------------------------------------------------------------------------------------------------------


def test_a_repeated_message_a_scan_and_a_token_are_one_request() -> None:
    ids = {
        said("x", Rules(issuers=("https://id.test",)))["id"],
        said("x", Rules(issuers=("https://id.test",)), key=True, now=NOW + 60)["id"],
        said('{"jti": "x", "iss": "https://id.test", "reason": "left"}')["id"],
        said(token(jti="x"))["id"],
        said(token(jti="x", sub="u"))["id"],
    }
    assert len(ids) == 1


def test_what_is_revoked_makes_the_id() -> None:
    forms = [
        '{"jti": "x"}',
        '{"sid": "x"}',
        '{"jti": "y"}',
        '{"jti": "x", "issuer": ""}',
        '{"jti": "x", "issuer": "i"}',
    ]
    assert len({said(form)["id"] for form in forms}) == len(forms)


def test_a_second_cut_off_is_another_one_and_one_that_says_its_time_is_not() -> None:
    assert said('{"sub": "u"}')["id"] != said('{"sub": "u"}', now=NOW + 0.001)["id"]
    dated = '{"sub": "u", "before": 1600000000}'
    assert said(dated)["id"] == said(dated, now=NOW + 1)["id"] == said(dated, key=True)["id"]


def test_a_cut_off_in_a_key_says_its_time_or_is_garbage() -> None:
    assert code_of('{"sub": "u"}', key=True) == "cutoff_in_a_key"
    assert code_of("u", Rules("sub"), key=True) == "cutoff_in_a_key"


@pytest.mark.parametrize("kind", BRIDGED_KINDS)
def test_every_id_is_one_that_the_trust_log_takes(kind: str) -> None:
    value = "0a" * 32
    asked = msgspec.json.decode(read(value.encode(), Rules(kind), NOW)[0].body, type=RevocationRequest)
    entry = entry_for(draft(asked, "unused", NOW, POLICY), NOW, POLICY)
    assert (entry.id, entry.kind, entry.value) == (asked.id, kind, value)


# -- key patterns -----------------------------------------------------------------------------------------------------


def test_where_the_star_stands_is_what_a_key_says() -> None:
    assert KeyPattern.parse("blacklist:*").inner(b"blacklist:a:b") == b"a:b"
    assert KeyPattern.parse("jwt:*:revoked").inner(b"jwt:x:revoked") == b"x"
    assert KeyPattern.parse("jwt:*:revoked").glob == b"jwt:*:revoked"


@pytest.mark.parametrize("pattern", ["", "*", "blacklist", "a:*:*", "a:?*", "a:[b]*", "a:\\*"])
def test_a_pattern_that_does_not_say_where_the_id_stands_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="one star"):
        KeyPattern.parse(pattern)


# -- waiting ----------------------------------------------------------------------------------------------------------


def item(name: str, size: int = 10) -> Item:
    return Item(name, b"x" * size)


def test_the_queue_holds_each_id_once_and_no_more_than_its_bounds() -> None:
    queue = Pending(2, 100)
    assert [queue.offer(item(name)) for name in ("a", "a", "b", "c", "b")] == [True, True, True, False, True]
    assert [one.id for one in queue.take(10, 1000)] == ["a", "b"]
    assert (queue.offer(item("big", 100)), queue.offer(item("d", 1))) == (True, False)
    assert not Pending(2, 100).offer(item("e", 101))


def test_a_scan_leaves_half_of_the_queue_to_messages() -> None:
    queue = Pending(4, 1000)
    queue.offer(item("a"))
    assert not queue.half_full()
    queue.offer(item("b"))
    assert queue.half_full()
    queue = Pending(100, 100)
    queue.offer(item("a", 49))
    assert not queue.half_full()
    queue.offer(item("b", 1))
    assert queue.half_full()


def test_a_request_takes_the_oldest_within_its_bounds_and_at_least_one() -> None:
    queue = Pending(10, 1000)
    for name in "abc":
        queue.offer(item(name))
    assert [one.id for one in queue.take(2, 1000)] == ["a", "b"]
    queue.put_back([item("a")])
    assert [one.id for one in queue.take(10, 11)] == ["c"]
    assert [one.id for one in queue.take(10, 1)] == ["a"]
    assert queue.take(10, 1000) == []


def test_what_was_taken_finds_its_place_again_however_full_the_queue_is() -> None:
    queue = Pending(1, 100)
    queue.offer(item("a"))
    taken = queue.take(1, 100)
    queue.offer(item("b"))
    queue.put_back([*taken, item("b")])
    assert [one.id for one in queue.take(10, 1000)] == ["b", "a"]


def test_only_the_newest_ids_are_remembered() -> None:
    known = Known(2)
    known.add(["a", "b"])
    known.add(["c"])
    assert [name in known for name in "abc"] == [False, True, True]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "step"),
    [
        (200, "", Step.RESULTS),
        (202, "", Step.RESULTS),
        (422, "revocations_refused", Step.RESULTS),
        (422, "body_invalid", Step.GIVE_UP),
        (401, "token_expired", Step.RENEW),
        (403, "scope_missing", Step.GIVE_UP),
        (404, "not_found", Step.GIVE_UP),
        (413, "body_too_large", Step.SPLIT),
        (408, "", Step.RETRY),
        (429, "", Step.RETRY),
        (500, "internal_error", Step.RETRY),
        (503, "primary_unreachable", Step.RETRY),
    ],
)
def test_an_answer_says_what_to_do_next(status: int, code: str, step: Step) -> None:
    assert after_answer(status, code) is step


def test_each_item_has_its_own_fate() -> None:
    items = [item(name) for name in "abcdef"]
    results = [
        {"index": 0, "id": "a", "durability": "pending"},
        {"index": 1, "id": "b", "durability": "replicated"},
        {"index": 2, "code": "id_conflict"},
        {"index": 3, "code": "value_invalid"},
        {"index": 4, "code": "outcome_unknown"},
    ]
    verdict = judge(items, results)
    assert (verdict.stored, verdict.replicated, verdict.refused) == (3, ["b"], {"value_invalid": 1})
    assert [one.id for one in verdict.again] == ["e", "f"]
    assert verdict.again_codes == {"outcome_unknown": 1, "result_missing": 1}


@pytest.mark.parametrize("results", [None, [], "x", [7], [{"index": "0"}], [{"code": "x"}]])
def test_without_readable_results_everything_is_sent_again(results: Any) -> None:
    assert [one.id for one in judge([item("a")], results).again] == ["a"]


def test_what_the_key_service_says_of_a_request_that_it_will_never_take_is_permanent() -> None:
    asked = [
        RevocationRequest(kind="x", value="v"),
        RevocationRequest(kind="jti", value=""),
        RevocationRequest(kind="jti", value="v", before=1),
        RevocationRequest(kind="jti", value="v", issuer="i" * 257),
        RevocationRequest(kind="jti", value="v", reason="r" * 257),
        RevocationRequest(kind="jti", value="v", id="no blanks"),
        RevocationRequest(token="x"),
        RevocationRequest(token="x", kind="jti"),
    ]
    for request in asked:
        with pytest.raises(RequestRefused) as refused:
            entry_for(draft(request, "e", NOW, POLICY), NOW, POLICY)
        assert refused.value.code in PERMANENT


def test_a_bulk_body_is_a_list_of_the_items() -> None:
    items = [*read(b"x", RULES, NOW), *read(b"y", RULES, NOW)]
    assert [one["value"] for one in json.loads(body_of(items))["revocations"]] == ["x", "y"]


def test_what_an_item_holds_is_not_in_its_repr() -> None:
    sent = token(jti="x")
    (one,) = read(sent.encode(), RULES, NOW)
    assert sent not in repr(one)
