"""strict_json_object against a slow reference that was written from RFC 8259 and the rules, not from the code."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from verifier.limits import INTEGER_DIGITS_MAX, JSON_DEPTH_MAX
from verifier.token import strict_json_object

BIG = 10**INTEGER_DIGITS_MAX - 1
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(BIG // 10), BIG), st.floats(allow_nan=False, allow_infinity=False), texts
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
objects = st.dictionaries(texts, values, max_size=6)


class Refused(Exception):
    pass


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=-1) if isinstance(value, dict | list) else 0


def unique(found: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in found}) != len(found):
        raise Refused
    return dict(found)


def finite(text: str) -> float:
    if math.isinf(float(text)):
        raise Refused
    return float(text)


def whole(text: str) -> int:
    if len(text) > INTEGER_DIGITS_MAX:
        raise Refused
    return int(text)


def constant(_: str) -> None:
    raise Refused


def reference(raw: bytes) -> dict[str, Any]:
    """Python's reader, and then every rule looked at by itself."""
    hooks: dict[str, Any] = {
        "object_pairs_hook": unique, "parse_float": finite, "parse_int": whole, "parse_constant": constant
    }  # fmt: skip
    try:
        found = json.loads(raw.decode("utf-8", "strict"), **hooks)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused from error
    if not isinstance(found, dict):
        raise Refused
    return found


def same(a: Any, b: Any) -> bool:
    """Equal also in type: 1 is not 1.0, and not true."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def agree(raw: bytes) -> None:
    try:
        expected = reference(raw)
    except Refused:
        with pytest.raises(ValueError):  # noqa: PT011 - the promise is the type alone
            strict_json_object(raw)
        return
    if _depth(expected) >= JSON_DEPTH_MAX:
        return  # the limit has tests of its own
    assert same(strict_json_object(raw), expected)


@given(objects, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_every_spelling_of_an_object_is_read_alike(members: dict[str, Any], escaped: bool, indent: Any) -> None:
    agree(json.dumps(members, ensure_ascii=escaped, indent=indent).encode())
    agree(msgspec.json.encode(members))


@given(objects, st.data())
def test_a_duplicate_name_is_refused_wherever_it_is(members: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(texts)
    spelled = data.draw(st.sampled_from([json.dumps(name), json.dumps(name, ensure_ascii=False)]))
    inner = f"{{{json.dumps(name)}: 1, {spelled}: {json.dumps(data.draw(values))}}}"
    text = data.draw(st.sampled_from([inner, f'{{"a": {inner}}}', f'{{"a": [{{}}, {inner}]}}']))
    with pytest.raises(ValueError):  # noqa: PT011
        strict_json_object(text.encode())
    agree(text.encode())
    if members:
        twice = json.dumps(members)[:-1] + ", " + json.dumps(members)[1:]
        with pytest.raises(ValueError):  # noqa: PT011
            strict_json_object(twice.encode())


@given(st.binary(max_size=200))
@example(b'{"a":1}\x00')
@example(b'{"a":"\x7f"}')
@example(b'{"\\u0061":1,"a":1}')
@example(b'{"a":1e400}')
@example(b'{"a":-0}')
@example(b'{"a":-0.0}')
@example(b'{"a":1E1}')
@example(b'{"a":18446744073709551616}')
@example(b'{"a":-9223372036854775809}')
@example(b'{"a":[18446744073709551616]}')
@example(b'{"a":"\xed\xa0\x80"}')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_read_alike(raw: bytes) -> None:
    agree(raw)


@given(objects, st.data())
def test_any_small_change_to_an_object_is_read_alike(members: dict[str, Any], data: st.DataObject) -> None:
    raw = bytearray(msgspec.json.encode(members))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        piece = data.draw(st.sampled_from(b'"|,|:|{|}|[|]|\\| |0|1|-|e9|\\ud800|NaN|1e999|\xff|\x00|.5|'.split(b"|")))
        raw[at : at + data.draw(st.integers(0, 2))] = piece
    agree(bytes(raw))
