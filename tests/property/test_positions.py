"""Positions: what is written is what is read, and their order is total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.log import FormatError, Generation, Position, parse_stream_id

numbers = st.integers(min_value=0, max_value=10**16 - 1)
nonces = st.text(alphabet="0123456789abcdef", min_size=16, max_size=16)
positions = st.builds(Position, numbers, numbers, nonces)


@given(positions)
def test_what_is_written_is_what_is_read(position: Position) -> None:
    assert Position.parse(str(position)) == position
    assert parse_stream_id(position.stream_id) == parse_stream_id(position.stream_id.encode()) == position[:2]


@given(numbers, numbers)
def test_a_generation_is_what_was_written(epoch: int, n: int) -> None:
    assert Generation.parse(str(Generation(epoch, n))) == (epoch, n)


@given(positions, positions, positions)
def test_their_order_is_total_and_that_of_the_log(a: Position, b: Position, c: Position) -> None:
    assert (a < b) + (b < a) + (a == b) == 1
    assert not a < b < c or a < c
    if a[:2] != b[:2]:
        assert (a < b) is (a[:2] < b[:2])


@given(st.one_of(st.text(), st.from_regex(r"[0-9]{0,20}-[0-9]{0,20}\.[0-9a-fA-F]{0,18}\n?", fullmatch=True)))
def test_any_text_is_a_position_of_one_spelling_or_a_format_error(text: str) -> None:
    try:
        position = Position.parse(text)
    except FormatError:
        return
    assert str(position) == text


@given(st.one_of(st.binary(), st.from_regex(rb"[0-9]{0,20}-[0-9]{0,20}", fullmatch=True)))
def test_any_bytes_are_a_stream_id_or_a_format_error(raw: bytes) -> None:
    try:
        epoch, seq = parse_stream_id(raw)
    except FormatError:
        return
    assert f"{epoch}-{seq}".encode() == raw


@given(positions, st.integers(0, 60), st.characters())
def test_a_changed_position_is_another_one_or_none(position: Position, at: int, character: str) -> None:
    text = str(position)
    changed = text[:at] + character + text[at + 1 :]
    if changed == text:
        return
    try:
        assert Position.parse(changed) != position
    except FormatError:
        with pytest.raises(FormatError):
            Position.parse(changed)
