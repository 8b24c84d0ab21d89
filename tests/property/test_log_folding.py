"""Folding the log: any batching, order and repetition gives the same refusals; no gap is taken silently."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verifier.support import ISSUER, NONCE, NOW
from verifier.log import CUTOFF_KINDS, NEVER_EXPIRES, Entry, Epoch, EpochLink, Generation, Meta, Position
from verifier.reader import Raw, Reader, Reread
from verifier.revocations import Mirror, Snapshot

GRACE = 300
values = st.sampled_from(["a", "b", "c"])
moments = st.integers(NOW - 3, NOW + 3)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from(["jti", "tok", "sid", "kid", "sub", "client", "all"]))
    value = "" if kind == "all" else draw(values)
    before = draw(moments) if kind in CUTOFF_KINDS else None
    expires_at = NEVER_EXPIRES if kind == "kid" else draw(st.sampled_from([NOW, NOW + 50, NOW + 100]))
    # The id follows from the content, as an honest writer's does: one id never names two things.
    name = f"{kind}-{value}-{before}-{expires_at}"
    return Entry(name, kind, ISSUER, value, before, expires_at, "", NOW * 1000, "r").check()


@st.composite
def tokens(draw: st.DrawFn) -> dict[str, Any]:
    token: dict[str, Any] = {
        name: draw(st.none() | values) for name in ("jti", "tok", "sid", "sub", "client_id", "kid")
    }
    return {**token, "iat": draw(st.none() | moments), "issuer": draw(st.sampled_from([ISSUER, "another"]))}


FIELDS = {"jti": "jti", "tok": "tok", "sid": "sid", "sub": "sub", "client": "client_id", "kid": "kid"}


def naive(held: list[Entry], token: dict[str, Any], after: list[str]) -> bool:
    """What DESIGN 3 and 5 say, entry by entry."""
    for entry in held:
        named = entry.kind == "all" or token[FIELDS[entry.kind]] == entry.value
        if entry.issuer != token["issuer"] or not named:
            continue
        if entry.before is None:
            return True
        if entry.id not in after and (token["iat"] is None or token["iat"] <= entry.before):
            return True
    return False


def hit(snapshot: Snapshot, token: dict[str, Any], after: list[str]) -> bool:
    return snapshot.find(**token, after=after) is not None


@given(st.lists(entries(), max_size=30), st.lists(tokens(), min_size=1, max_size=10), st.data())
@settings(max_examples=300)
def test_any_batching_order_and_repetition_gives_the_same_refusals(
    log: list[Entry], asked: list[dict[str, Any]], data: st.DataObject
) -> None:
    after = data.draw(st.lists(st.sampled_from([entry.id for entry in log]), max_size=3)) if log else []
    whole = Mirror()
    whole.apply(log)
    pieces = Mirror()
    told = data.draw(
        st.permutations(log + data.draw(st.lists(st.sampled_from(log), max_size=10) if log else st.just([])))
    )
    while told:
        size = data.draw(st.integers(1, 7))
        before = pieces.snapshot
        changed = pieces.apply(told[:size])
        assert changed is (pieces.snapshot is not before)
        told = told[size:]
    for token in asked:
        expected = naive(log, token, after)
        assert hit(whole.snapshot, token, after) is expected
        assert hit(pieces.snapshot, token, after) is expected
    assert not pieces.apply(log)


@given(
    st.lists(st.lists(entries(), max_size=6), max_size=6),
    st.lists(st.tuples(st.integers(-10, 120), st.integers(-10, 120)), max_size=6),
    st.lists(tokens(), min_size=1, max_size=8),
)
@settings(max_examples=300)
def test_forgetting_never_loses_an_entry_that_either_clock_still_counts(
    batches: list[list[Entry]], clocks: list[tuple[int, int]], asked: list[dict[str, Any]]
) -> None:
    mirror, held = Mirror(), []
    latest = NOW - 10
    for number, batch in enumerate(batches):
        mirror.apply(batch)
        held += batch
        if number < len(clocks):
            local, server = (NOW + GRACE + offset for offset in clocks[number])
            latest = max(latest, min(local, server))
            mirror.drop_expired(local, server, GRACE)
    must = [entry for entry in held if entry.expires_at == NEVER_EXPIRES or entry.expires_at > latest - GRACE]
    for token in asked:
        if naive(must, token, []):
            assert hit(mirror.snapshot, token, [])
        if hit(mirror.snapshot, token, []):
            assert naive(held, token, [])


# -- the reader --------------------------------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Raw], Epoch]:
    """A log of one to four epochs, each of one to six entries."""
    raws: list[Raw] = []
    links: list[EpochLink] = []
    previous = "-"
    number = 0
    for index in range(draw(st.integers(1, 4))):
        number += draw(st.integers(1, 3))
        nonce = f"{draw(st.integers(0, 2**32 - 1)):08x}{index:08x}"
        size = draw(st.integers(1, 6))
        for seq in range(size):
            entry = Entry(
                f"e-{number}-{seq}",
                "epoch" if seq == 0 else "jti",
                "" if seq == 0 else ISSUER,
                f"{nonce} {previous}" if seq == 0 else f"t-{number}-{seq}",
                None,
                NEVER_EXPIRES if seq == 0 else NOW,
                "",
                NOW,
                "r",
            )
            fields = {name.encode(): text.encode() for name, text in entry.check().encode().items()}
            raws.append((f"{number}-{seq}".encode(), fields))
        previous = f"{number}-{size - 1}.{nonce}"
        links.append(EpochLink(number, nonce, None, {}, False))
    last = links[-1]
    return raws, Epoch(last.number, last.nonce, "r", False, Generation(last.number, 0), tuple(links))


META = Meta("i", None, 1, 1, 86_400)


def batched(data: st.DataObject, log: list[Raw]) -> list[list[Raw]]:
    batches = []
    while log:
        size = data.draw(st.integers(1, 8))
        batches.append(log[:size])
        log = log[size:]
    return batches


def read_all(reader: Reader, batches: list[list[Raw]]) -> list[tuple[Position, Entry]]:
    return [accepted for batch in batches for accepted in reader.accept(batch)]


@given(logs(), st.data())
def test_a_contiguous_log_is_accepted_whole_in_any_batches(made: tuple[list[Raw], Epoch], data: st.DataObject) -> None:
    log, epoch = made
    reader = Reader(META, epoch)
    accepted = read_all(reader, batched(data, log))
    assert [position.stream_id.encode() for position, _ in accepted] == [stream_id for stream_id, _ in log]
    assert all(epoch.nonce_of(position.epoch) == position.nonce for position, _ in accepted)
    assert [position for position, _ in accepted] == sorted(position for position, _ in accepted)
    reader.check(META, epoch, accepted[-1][0][:2])


@given(logs(), st.data())
@settings(max_examples=300)
def test_a_log_that_lacks_an_entry_before_its_last_is_never_taken_silently(
    made: tuple[list[Raw], Epoch], data: st.DataObject
) -> None:
    log, epoch = made
    if len(log) < 2:
        return
    missing = data.draw(st.integers(0, len(log) - 2))
    torn = log[:missing] + log[missing + 1 :]
    strict = Reader(META, epoch)
    with pytest.raises(Reread):
        read_all(strict, batched(data, torn))
    assert strict.position is None or strict.position.stream_id.encode() in [
        stream_id for stream_id, _ in log[:missing]
    ]
    tolerant = Reader(META, epoch, tolerant=True)
    accepted = read_all(tolerant, batched(data, torn))
    assert [position.stream_id.encode() for position, _ in accepted] == [stream_id for stream_id, _ in torn]
    assert tolerant.holed_nonce == epoch.nonce
    assert tolerant.gaps
    later = Reader(META, epoch, known=frozenset(tolerant.gaps))
    assert len(read_all(later, batched(data, torn))) == len(torn)
    assert later.holed_nonce is None


@given(logs(), st.data())
def test_a_log_in_another_order_or_with_repeats_is_never_taken_silently(
    made: tuple[list[Raw], Epoch], data: st.DataObject
) -> None:
    log, epoch = made
    other = data.draw(st.permutations(log) | st.just([*log, data.draw(st.sampled_from(log))]))
    if other == log:
        return
    with pytest.raises(Reread):
        read_all(Reader(META, epoch), batched(data, list(other)))


@given(logs(), st.dictionaries(st.binary(max_size=6), st.binary(max_size=6), max_size=4), st.data())
def test_a_poison_entry_anywhere_but_at_a_seam_costs_only_itself(
    made: tuple[list[Raw], Epoch], poison: dict[bytes, bytes], data: st.DataObject
) -> None:
    log, epoch = made
    ordinary = [index for index, (stream_id, _) in enumerate(log) if not stream_id.endswith(b"-0")]
    if not ordinary:
        return
    at = data.draw(st.sampled_from(ordinary))
    reader = Reader(META, epoch)
    accepted = read_all(reader, batched(data, [*log[:at], (log[at][0], poison), *log[at + 1 :]]))
    assert len(accepted) == len(log) - 1
    assert len(reader.skipped) == 1
    assert reader.position is not None
    assert reader.position.stream_id.encode() == log[-1][0]


def test_the_nonce_of_the_examples_has_the_right_form() -> None:
    assert Position.parse(f"1-1.{NONCE}").nonce == NONCE
