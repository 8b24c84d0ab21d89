"""The trust log's wire format: what every writer and reader agrees on."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.verifier.support import NONCE, NONCE_2, NOW, entry
from verifier.limits import ENTRY_ID_CHARS_MAX, ENTRY_REASON_BYTES_MAX, ENTRY_VALUE_BYTES_MAX
from verifier.log import Beat, Entry, Epoch, FormatError, Generation, Meta, Position, parse_stream_id

EPOCH_ENTRY = entry("epoch", f"{NONCE} -", issuer="", expires_at=0, id="e-1")


def raw(fields: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in fields.items()}


# -- positions -------------------------------------------------------------------------------------------------------


def test_a_position_is_read_and_written() -> None:
    position = Position.parse(f"1764000000000-12.{NONCE}")
    assert position == (1764000000000, 12, NONCE)
    assert str(position) == f"1764000000000-12.{NONCE}"
    assert position.stream_id == "1764000000000-12"


@pytest.mark.parametrize(
    "text",
    ["", "1-2", "1-2.", f"1.{NONCE}", f"-1.{NONCE}", f"1-.{NONCE}", f"01-2.{NONCE}", f"1-02.{NONCE}", f"+1-2.{NONCE}",
     f"1-2.{NONCE}\n", f" 1-2.{NONCE}", f"1-2.{NONCE[1:]}", f"1-2.{NONCE}0", f"1-2.{NONCE.upper()}",
     f"\u0661-2.{NONCE}",
     f"{10**16}-0.{NONCE}", f"1-2-3.{NONCE}", f"1_0-2.{NONCE}"],
)  # fmt: skip
def test_a_position_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        Position.parse(text)
    assert caught.value.code == "position_invalid"


@pytest.mark.parametrize("text", ["", "-", "1", "1-", "-1", "1-2-3", "a-b", "1-+2", "\uff11-2", " 1-2", "1-2\n"])
def test_a_stream_id_of_another_form_is_refused(text: str) -> None:
    for form in (text, text.encode()):
        with pytest.raises(FormatError):
            parse_stream_id(form)
    with pytest.raises(FormatError):
        Generation.parse(text)


def test_generations_compare_by_epoch_then_count() -> None:
    assert Generation.parse("1-9") < Generation.parse("2-0") < Generation.parse("2-10")
    assert str(Generation(2, 10)) == "2-10"


# -- entries ---------------------------------------------------------------------------------------------------------

ENTRIES = [
    entry("jti", "a"),
    entry("tok", "0" * 64, id="t"),
    entry("sid", "s", reason="logout — ✓"),
    entry("sub", "ada", before=0),
    entry("client", "web", region="", reason=""),
    entry("all", ""),
    entry("kid", "k"),
    EPOCH_ENTRY,
    entry("epoch", f"{NONCE_2} 7-3.{NONCE}", issuer="", expires_at=0, id="e-2"),
]


@pytest.mark.parametrize("original", ENTRIES, ids=lambda e: e.kind)
def test_an_entry_is_the_same_after_the_wire(original: Entry) -> None:
    assert Entry.decode(raw(original.encode())) == original
    assert list(original.encode()) == [
        "v", "id", "kind", "issuer", "value", "before", "expires_at", "reason", "at", "region"
    ]  # fmt: skip


def test_unknown_fields_are_ignored_and_optional_ones_may_be_absent() -> None:
    fields = raw(entry("jti", "a").encode())
    assert Entry.decode({**fields, b"colour": b"\xff"}) == entry("jti", "a")
    for name in (b"before", b"reason", b"region"):
        short = {**fields}
        del short[name]
        Entry.decode(short)


@pytest.mark.parametrize("name", ["v", "id", "kind", "issuer", "value", "expires_at", "at"])
def test_a_required_field_that_is_absent_is_named(name: str) -> None:
    fields = raw(entry("jti", "a").encode())
    del fields[name.encode()]
    with pytest.raises(FormatError) as caught:
        Entry.decode(fields)
    assert caught.value.code == "field_missing"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"v": "x"}, "not_an_integer"),
        ({"v": "2", "kind": "tenant"}, "format_newer"),
        ({"kind": "tenant"}, "kind_unknown"),
        ({"kind": ""}, "kind_unknown"),
        ({"id": ""}, "id_invalid"),
        ({"id": "a b"}, "id_invalid"),
        ({"id": "a\n"}, "id_invalid"),
        ({"id": "x" * (ENTRY_ID_CHARS_MAX + 1)}, "id_invalid"),
        ({"value": ""}, "value_invalid"),
        ({"value": "x" * (ENTRY_VALUE_BYTES_MAX + 1)}, "value_invalid"),
        ({"value": "é" * (ENTRY_VALUE_BYTES_MAX // 2 + 1)}, "value_invalid"),
        ({"kind": "all", "value": "x", "before": "1"}, "value_invalid"),
        ({"reason": "x" * (ENTRY_REASON_BYTES_MAX + 1)}, "reason_too_long"),
        ({"before": "1"}, "before_invalid"),
        ({"kind": "sub"}, "before_invalid"),
        ({"kind": "sub", "before": "1.5"}, "not_an_integer"),
        ({"kind": "sub", "before": "-1"}, "not_an_integer"),
        ({"expires_at": "0"}, "expires_at_invalid"),
        ({"expires_at": "1e9"}, "not_an_integer"),
        ({"expires_at": "99999999999999999"}, "not_an_integer"),
        ({"at": ""}, "not_an_integer"),
        ({"kind": "epoch", "expires_at": "0"}, "epoch_entry_invalid"),
        ({"kind": "epoch", "expires_at": "0", "value": f"{NONCE} 1-2"}, "position_invalid"),
    ],
)
def test_an_entry_out_of_bounds_is_named(fields: dict[str, str], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        Entry.decode(raw({**entry("jti", "a").encode(), **fields}))
    assert caught.value.code == code


def test_a_newer_format_of_a_known_kind_is_read() -> None:
    assert Entry.decode(raw({**entry("jti", "a").encode(), "v": "9", "tenant": "x"})) == entry("jti", "a")


def test_bytes_that_are_not_utf8_are_a_format_error() -> None:
    with pytest.raises(FormatError) as caught:
        Entry.decode({**raw(entry("jti", "a").encode()), b"value": b"\xff"})
    assert caught.value.code == "not_utf8"


def test_the_longest_id_value_and_reason_are_taken() -> None:
    longest = entry(
        "jti",
        "é" * (ENTRY_VALUE_BYTES_MAX // 2),
        id="x" * ENTRY_ID_CHARS_MAX,
        reason="r" * ENTRY_REASON_BYTES_MAX,
    )
    assert longest.check() is longest


@pytest.mark.parametrize(
    "change",
    [{"id": "other"}, {"kind": "sid"}, {"issuer": "i"}, {"value": "b"}, {"expires_at": 1}, {"reason": "r"},
     {"region": "r"}],
)  # fmt: skip
def test_entries_are_equal_if_and_only_if_their_digests_are(change: dict[str, Any]) -> None:
    original = entry("jti", "a")
    assert original.digest() == entry("jti", "a").digest()
    assert replace(original, **change).digest() != original.digest()


UUID = "0195f8a0-0000-7000-8000-0000000000ff"


def test_a_uuid_takes_23_characters_in_the_log_and_is_itself_again_when_read() -> None:
    original = entry("jti", "a", id=UUID)
    fields = {name.encode(): value.encode() for name, value in original.encode().items()}
    assert len(fields[b"id"]) == 23
    assert Entry.decode(fields) == original


@pytest.mark.parametrize("entry_id", [UUID.upper(), UUID + "0", UUID[:-1], UUID.replace("-", "_"), "0195f8a0"])
def test_every_other_id_stands_in_the_log_as_it_is(entry_id: str) -> None:
    original = entry("jti", "a", id=entry_id)
    fields = {name.encode(): value.encode() for name, value in original.encode().items()}
    assert fields[b"id"] == entry_id.encode()
    assert Entry.decode(fields) == original


@pytest.mark.parametrize("packed", ["~", "~AAAA", "~AZX4oAAAcACAAAAAAAAAAR", "~AZX4oAAAcACAAAAAAAAAA=", "~" + "A" * 30])
def test_an_id_that_is_packed_in_another_way_is_refused(packed: str) -> None:
    fields = {name.encode(): value.encode() for name, value in entry("jti", "a").encode().items()}
    with pytest.raises(FormatError) as refused:
        Entry.decode({**fields, b"id": packed.encode()})
    assert refused.value.code == "id_invalid"


def test_when_a_log_took_an_entry_is_no_part_of_it() -> None:
    original = entry("jti", "a")
    assert replace(original, at=original.at + 1).digest() == original.digest()


def test_a_digest_cannot_be_shifted_from_one_field_to_the_next() -> None:
    assert entry("jti", "ab", issuer="c").digest() != entry("jti", "b", issuer="ca").digest()


def test_a_conflict_compares_the_callers_fields_only() -> None:
    original = entry("jti", "a")
    assert replace(original, at=1, region="x", expires_at=NOW).caller_fields() == original.caller_fields()
    assert replace(original, reason="r").caller_fields() != original.caller_fields()


def test_an_epoch_entry_says_its_nonce_and_where_the_one_before_ended() -> None:
    assert EPOCH_ENTRY.epoch_start() == (NONCE, None)
    assert ENTRIES[-1].epoch_start() == (NONCE_2, Position(7, 3, NONCE))
    with pytest.raises(FormatError):
        entry("jti", f"{NONCE} -").epoch_start()


# -- the hashes ------------------------------------------------------------------------------------------------------

EPOCH = {
    "number": "7", "nonce": NONCE, "replid": "r", "open": "1", "keys_n": "3",
    "chain": f'[{{"number":7,"nonce":"{NONCE}","previous":null,"voters":{{}},"opened":false,"later":1}}]',
}  # fmt: skip
BEAT = {"nonce": NONCE, "n": "5", "at": "1800000000000", "position": "7-3", "generation": "7-3"}
META = {
    "incarnation": "i", "trimmed_to": "", "writer_format": "1", "min_reader_format": "1",
    "max_token_lifetime_s": "86400",
}  # fmt: skip


def test_the_hashes_are_read() -> None:
    epoch = Epoch.decode(raw({**EPOCH, "later": "x"}))
    assert (epoch.number, epoch.nonce, epoch.open, epoch.generation) == (7, NONCE, True, Generation(7, 3))
    assert (epoch.nonce_of(7), epoch.nonce_of(6)) == (NONCE, None)
    beat = Beat.decode(raw(BEAT))
    assert (beat.n, beat.position, beat.confirmed_n) == (5, Position(7, 3, NONCE), None)
    confirmed = Beat.decode(raw({**BEAT, "confirmed_n": "4", "confirmed_at": "1", "confirmed_position": "7-1"}))
    assert (confirmed.confirmed_n, confirmed.confirmed_position) == (4, Position(7, 1, NONCE))
    meta = Meta.decode(raw({**META, "trimmed_to": "7-2"}))
    assert (meta.incarnation, meta.trimmed_to, Meta.decode(raw(META)).trimmed_to) == ("i", (7, 2), None)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [(Epoch, EPOCH, "number"), (Epoch, EPOCH, "nonce"), (Epoch, EPOCH, "chain"), (Beat, BEAT, "nonce"),
     (Beat, BEAT, "n"), (Beat, BEAT, "at"), (Beat, BEAT, "position"), (Beat, BEAT, "generation"),
     (Meta, META, "incarnation"), (Meta, META, "writer_format"), (Meta, META, "min_reader_format")],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, b"\xff", b"[1]", b"-1"])
def test_a_hash_that_lacks_a_field_or_holds_nonsense_is_a_format_error(
    kind: Any, fields: dict[str, str], name: str, value: bytes | None
) -> None:
    broken = raw(fields)
    if value is None:
        del broken[name.encode()]
    else:  # an incarnation is any text
        broken[name.encode()] = b"\xff" if name == "incarnation" else value
    with pytest.raises(FormatError):
        kind.decode(broken)
    with pytest.raises(FormatError):
        kind.decode({})
