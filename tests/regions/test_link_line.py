"""One direction of one connection, with a hand-moved clock: lag, toxics, hold and cut."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regions.errors import LinkRefused
from regions.link_line import DelayLine, Gate, Link, Stream
from regions.link_toxics import End, Toxic, ToxicBody, make_toxic, update_toxic


def toxic(kind: str, *, at_s: float = 0.0, name: str = "", **attributes: float) -> Toxic:
    return make_toxic(ToxicBody(type=kind, name=name, attributes=dict(attributes)), at_s)


def stream_with(*toxics: Toxic, one_way_ms: float = 0.0) -> Stream:
    return Stream(Link(one_way_ms=one_way_ms), list(toxics))


def arrivals(line: DelayLine) -> list[tuple[float, bytes | End]]:
    """Everything under way, each at the moment at which it comes out."""
    out: list[tuple[float, bytes | End]] = []
    while (due_s := line.next_due_s) is not None:
        arrived = line.pop_due(due_s)
        assert arrived is not None
        out.append((due_s, arrived))
    return out


def data_of(out: list[tuple[float, bytes | End]]) -> bytes:
    return b"".join(piece for _, piece in out if isinstance(piece, bytes))


def test_nothing_comes_out_before_its_lag_and_everything_right_after() -> None:
    line = DelayLine(Stream(Link(one_way_ms=40)))
    line.push(b"x", now_s=100.0)
    assert line.pop_due(100.039) is None
    assert line.next_due_s == pytest.approx(100.04)
    assert line.pop_due(100.0401) == b"x"
    assert line.next_due_s is None


def test_a_hundred_things_sent_at_once_are_all_there_after_one_lag() -> None:
    line = DelayLine(Stream(Link(one_way_ms=40)))
    for i in range(100):
        line.push(b"%d" % i, now_s=0.0)
    assert [line.pop_due(0.0401) for _ in range(100)] == [b"%d" % i for i in range(100)]


def test_an_end_keeps_its_place_behind_the_bytes() -> None:
    line = DelayLine(Stream(Link(one_way_ms=10)))
    line.push(b"x", now_s=0.0)
    line.push(End.EOF, now_s=0.0)
    assert (line.pop_due(1.0), line.pop_due(1.0), line.pop_due(1.0)) == (b"x", End.EOF, None)


def test_a_smaller_lag_does_not_let_later_bytes_overtake() -> None:
    link = Link(one_way_ms=100)
    line = DelayLine(Stream(link))
    line.push(b"first", now_s=0.0)
    link.one_way_ms = 1
    line.push(b"second", now_s=0.01)
    assert line.pop_due(0.05) is None
    assert (line.pop_due(0.1001), line.pop_due(0.1001)) == (b"first", b"second")


def test_a_changed_lag_holds_for_what_is_sent_after_it() -> None:
    link = Link(one_way_ms=1)
    line = DelayLine(Stream(link))
    link.one_way_ms = 100
    line.push(b"x", now_s=0.0)
    assert line.pop_due(0.099) is None
    assert line.pop_due(0.101) == b"x"


def test_a_new_connection_holds_its_first_bytes_for_the_handshake() -> None:
    line = DelayLine(Stream(Link(one_way_ms=40)), started=False)
    line.push(b"x", now_s=0.0)
    assert line.next_due_s is None
    line.start(0.12, now_s=0.0)
    assert line.pop_due(0.119) is None
    assert line.pop_due(0.121) == b"x"


def test_held_bytes_and_link_bytes_count_what_is_under_way_and_what_came_out() -> None:
    link = Link()
    line = DelayLine(Stream(link))
    line.push(b"123", now_s=0.0)
    line.push(b"4567", now_s=0.0)
    assert (line.held_bytes, link.bytes) == (7, 0)
    line.pop_due(0.0)
    assert (line.held_bytes, link.bytes) == (4, 3)
    line.drop()
    assert (line.held_bytes, link.bytes, line.next_due_s) == (0, 3, None)


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.floats(0, 1000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=50
    )
)
def test_order_is_kept_and_no_byte_lost_or_early_whatever_the_lag_becomes(
    sends: list[tuple[float, float, bytes]],
) -> None:
    link = Link()
    line = DelayLine(Stream(link))
    now_s, due = 0.0, []
    for gap_s, one_way_ms, data in sends:
        now_s += gap_s
        link.one_way_ms = one_way_ms
        line.push(data, now_s)
        due.append(now_s + one_way_ms / 1000)
    arrived: list[bytes | End | None] = []
    while (next_due_s := line.next_due_s) is not None:
        assert next_due_s >= due[len(arrived)]
        arrived.append(line.pop_due(next_due_s))
    assert arrived == [data for _, _, data in sends]
    assert link.bytes == sum(len(data) for _, _, data in sends)


# latency and jitter


def test_latency_comes_on_top_of_the_lag() -> None:
    line = DelayLine(stream_with(toxic("latency", latency=100), one_way_ms=40))
    line.push(b"x", now_s=1.0)
    assert line.pop_due(1.1399) is None
    assert line.pop_due(1.1401) == b"x"


def test_two_latencies_add_up() -> None:
    stream = stream_with(toxic("latency", latency=100), toxic("latency", name="more", latency=10))
    line = DelayLine(stream)
    line.push(b"x", now_s=0.0)
    assert line.next_due_s == pytest.approx(0.110)
    assert stream.one_way_s == pytest.approx(0.110)


def test_jitter_stays_within_its_bounds_and_uses_them() -> None:
    delays = []
    line = DelayLine(stream_with(toxic("latency", latency=100, jitter=50)), seed="s")
    for i in range(1_000):
        line.push(b"x", now_s=float(i))  # far apart: order moves nothing
        [(due_s, _)] = arrivals(line)
        delays.append((due_s - i) * 1000)
    assert 49.99 <= min(delays) < 55
    assert 145 < max(delays) <= 150.01
    assert 95 < sum(delays) / 1_000 < 105


def test_jitter_never_brings_anything_before_the_links_lag() -> None:
    line = DelayLine(stream_with(toxic("latency", latency=10, jitter=500), one_way_ms=40), seed="s")
    for i in range(200):
        line.push(b"x", now_s=float(i))
        [(due_s, _)] = arrivals(line)
        assert due_s - i >= 0.0399


def jittered(seed: str) -> list[float]:
    line = DelayLine(stream_with(toxic("latency", latency=100, jitter=100)), seed=seed)
    for i in range(50):
        line.push(b"x", now_s=i / 1000)
    return [due_s for due_s, _ in arrivals(line)]


def test_jitter_is_reproduced_by_its_seed() -> None:
    assert jittered("0:a:b:1") == jittered("0:a:b:1")
    assert jittered("0:a:b:1") != jittered("0:a:b:2")


def test_jitter_keeps_the_order_and_the_end_last() -> None:
    line = DelayLine(stream_with(toxic("latency", latency=100, jitter=100)), seed="s")
    for i in range(100):
        line.push(b"%03d" % i, now_s=i / 1000)
    line.push(End.EOF, now_s=0.1)
    out = arrivals(line)
    assert [due_s for due_s, _ in out] == sorted(due_s for due_s, _ in out)
    assert data_of(out) == b"".join(b"%03d" % i for i in range(100))
    assert out[-1][1] is End.EOF


# bandwidth


def test_bandwidth_counts_kilobytes_of_a_thousand_bytes_from_when_the_line_is_free() -> None:
    line = DelayLine(stream_with(toxic("bandwidth", rate=10), one_way_ms=40))
    line.push(bytes(500), now_s=0.0)
    line.push(bytes(500), now_s=0.0)
    line.push(bytes(500), now_s=5.0)
    assert [due_s for due_s, _ in arrivals(line)] == pytest.approx([0.09, 0.14, 5.09])


def test_a_big_chunk_comes_out_in_steps_at_the_rate() -> None:
    sent = bytes(range(256)) * 40
    line = DelayLine(stream_with(toxic("bandwidth", rate=10)))
    line.push(sent, now_s=0.0)
    line.push(End.EOF, now_s=0.0)
    out = arrivals(line)
    assert [due_s for due_s, _ in out[:3]] == pytest.approx([0.1, 0.2, 0.3])
    assert [len(piece) for _, piece in out[:3] if isinstance(piece, bytes)] == [1000, 1000, 1000]
    assert data_of(out) == sent
    at_s, last = out[-1]
    assert at_s == pytest.approx(1.024)
    assert last is End.EOF


def test_bandwidth_is_each_connections_own() -> None:
    stream = stream_with(toxic("bandwidth", rate=1))
    first, second = DelayLine(stream), DelayLine(stream)
    first.push(bytes(1000), now_s=0.0)
    second.push(bytes(50), now_s=0.0)
    assert second.next_due_s == pytest.approx(0.05)


# slicer


def test_slices_come_delay_apart_and_say_the_same() -> None:
    line = DelayLine(stream_with(toxic("slicer", average_size=10, delay=20_000), one_way_ms=40))
    line.push(b"0123456789abcdefghijXYZ", now_s=0.0)
    out = arrivals(line)
    assert [piece for _, piece in out] == [b"0123456789", b"abcdefghij", b"XYZ"]
    assert [due_s for due_s, _ in out] == pytest.approx([0.04, 0.06, 0.08])


def test_slices_vary_within_their_bounds() -> None:
    line = DelayLine(stream_with(toxic("slicer", average_size=10, size_variation=3)), seed="s")
    line.push(bytes(10_000), now_s=0.0)
    sizes = [len(piece) for _, piece in arrivals(line)[:-1] if isinstance(piece, bytes)]
    assert set(sizes) == set(range(7, 14))
    assert sum(sizes) <= 10_000


def test_toxics_work_one_after_the_other() -> None:
    stream = stream_with(toxic("slicer", average_size=100), toxic("bandwidth", rate=1), toxic("latency", latency=50))
    line = DelayLine(stream)
    line.push(bytes(250), now_s=0.0)
    assert [due_s for due_s, _ in arrivals(line)] == pytest.approx([0.15, 0.25, 0.3])


# hold


def test_what_is_held_stays_and_arrives_when_the_hold_is_lifted() -> None:
    stream = stream_with(one_way_ms=40)
    line = DelayLine(stream)
    line.push(b"under way", now_s=0.0)
    stream.toxics.append(toxic("timeout"))
    line.change(0.01)
    line.push(b"sent later", now_s=1.0)
    line.push(End.RESET, now_s=2.0)
    assert (line.next_due_s, line.pop_due(100.0)) == (None, None)
    assert line.held_bytes == len(b"under way" + b"sent later")
    stream.toxics.clear()
    line.change(100.0)
    assert [line.pop_due(100.0) for _ in range(3)] == [b"under way", b"sent later", End.RESET]
    assert not line.lost


def test_what_was_sent_just_before_a_hold_ends_still_takes_its_lag() -> None:
    stream = stream_with(toxic("timeout"), one_way_ms=40)
    line = DelayLine(stream)
    line.push(b"x", now_s=9.99)
    stream.toxics.clear()
    line.change(10.0)
    assert line.pop_due(10.029) is None
    assert line.pop_due(10.031) == b"x"


def test_a_hold_of_one_stream_leaves_the_other_of_the_same_link_alone() -> None:
    link = Link()
    held, free = DelayLine(Stream(link, [toxic("timeout")])), DelayLine(Stream(link))
    for line in (held, free):
        line.push(b"x", now_s=0.0)
    assert (held.pop_due(1.0), free.pop_due(1.0)) == (None, b"x")


# cut


def test_a_cut_takes_what_is_under_way_and_what_is_sent_and_nothing_comes_out_after_the_hole() -> None:
    stream = stream_with(one_way_ms=40)
    line = DelayLine(stream)
    line.push(b"before", now_s=0.0)
    assert line.pop_due(0.05) == b"before"
    line.push(b"under way", now_s=0.1)
    stream.toxics.append(toxic("cut"))
    line.change(0.11)
    line.push(b"lost", now_s=0.2)
    assert (line.lost, line.held_bytes, line.next_due_s) == (True, 0, None)
    assert (stream.link.bytes, stream.link.bytes_lost) == (6, 13)
    stream.toxics.clear()
    line.change(1.0)
    line.push(b"after", now_s=1.0)
    assert line.pop_due(100.0) is None
    assert line.lost


def test_a_line_that_had_nothing_to_lose_goes_on_after_a_cut() -> None:
    stream = stream_with(toxic("cut"))
    line = DelayLine(stream)
    stream.toxics.clear()
    line.change(1.0)
    line.push(b"x", now_s=1.0)
    assert (line.lost, line.pop_due(1.0)) == (False, b"x")


def test_an_end_can_be_lost_like_bytes() -> None:
    line = DelayLine(stream_with(toxic("cut")))
    line.push(End.EOF, now_s=0.0)
    assert line.lost


def test_a_cut_is_stronger_than_a_hold() -> None:
    assert stream_with(toxic("timeout"), toxic("cut")).gate is Gate.CUT
    assert stream_with(toxic("cut"), toxic("timeout")).gate is Gate.CUT
    assert stream_with(toxic("timeout", timeout=5)).gate is Gate.HELD
    assert stream_with(toxic("latency", latency=5), toxic("reset_peer", timeout=5)).gate is Gate.OPEN


# changes


def test_lifting_a_slow_links_limit_lets_everything_out_at_once() -> None:
    stream = stream_with(toxic("bandwidth", rate=1), one_way_ms=40)
    line = DelayLine(stream)
    line.push(bytes(100_000), now_s=0.0)  # a hundred seconds
    stream.toxics.clear()
    line.change(1.0)
    line.push(b"x", now_s=1.0)
    out = arrivals(line)
    at_s, last = out[-1]
    assert at_s == pytest.approx(1.04)
    assert last == b"x"
    assert all(due_s <= 0.0401 for due_s, _ in out[:-1])
    assert len(data_of(out)) == 100_001


def test_a_new_limit_holds_for_what_is_under_way() -> None:
    stream = stream_with(one_way_ms=40)
    line = DelayLine(stream)
    line.push(bytes(50), now_s=0.0)
    stream.toxics.append(toxic("bandwidth", rate=1))
    line.change(0.02)
    assert line.pop_due(0.089) is None
    assert line.pop_due(0.091) == bytes(50)


_TOXICS = st.sampled_from(
    [
        toxic("latency", latency=30, jitter=30),
        toxic("bandwidth", rate=1),
        toxic("slicer", average_size=3, size_variation=2, delay=1_000),
        toxic("timeout"),
    ]
)
_STEPS = st.one_of(
    st.tuples(st.just("push"), st.binary(min_size=1, max_size=30)),
    st.tuples(st.just("set"), st.lists(_TOXICS, max_size=3)),
    st.tuples(st.just("pop"), st.none()),
)


@given(st.lists(st.tuples(st.floats(0, 0.2), _STEPS), max_size=40))
def test_whatever_toxics_come_and_go_without_a_cut_every_byte_arrives_once_in_order_and_not_before_its_lag(
    steps: list[tuple[float, tuple[str, bytes | list[Toxic] | None]]],
) -> None:
    stream = stream_with(one_way_ms=40)
    line = DelayLine(stream, seed="s")
    now_s, sent, received = 0.0, b"", b""
    sent_at: list[float] = []

    def pop(now_s: float) -> None:
        nonlocal received
        while isinstance(piece := line.pop_due(now_s), bytes):
            assert all(now_s >= at_s + 0.0399 for at_s in sent_at[len(received) : len(received) + len(piece)])
            received += piece

    for gap_s, (_, what) in steps:
        now_s += gap_s
        if isinstance(what, bytes):
            line.push(what, now_s)
            sent += what
            sent_at += [now_s] * len(what)
        elif isinstance(what, list):
            stream.toxics[:] = what
            line.change(now_s)
        else:
            pop(now_s)
    stream.toxics.clear()
    line.change(now_s)
    pop(now_s + 0.0401)
    assert received == sent
    assert line.held_bytes == 0


# what a toxic may say


@pytest.mark.parametrize(
    ("kind", "good", "bad", "named"),
    [
        ("latency", {"latency": 0}, {"latency": -1}, "latency"),
        ("latency", {"jitter": 86_400_000}, {"jitter": 86_400_001}, "jitter"),
        ("latency", {}, {"delay": 1}, "delay"),
        ("bandwidth", {"rate": 1}, {"rate": 0}, "rate"),
        ("bandwidth", {"rate": 1}, {}, "rate"),
        ("slicer", {"average_size": 1}, {"average_size": 0}, "average_size"),
        (
            "slicer",
            {"average_size": 3, "size_variation": 2},
            {"average_size": 3, "size_variation": 3},
            "size_variation",
        ),
        ("timeout", {"timeout": 0}, {"timeout": "0"}, "timeout"),
        ("reset_peer", {"timeout": 0.5}, {"timeout": -0.5}, "timeout"),
        ("cut", {}, {"timeout": 1}, "timeout"),
    ],
)
def test_an_attribute_just_outside_its_bounds_is_refused_by_name(
    kind: str, good: dict[str, float], bad: dict[str, float], named: str
) -> None:
    shown = make_toxic(ToxicBody(type=kind, attributes=good), 0.0).to_json()["attributes"]
    assert shown.items() >= good.items()
    with pytest.raises(LinkRefused, match=named) as refused:
        make_toxic(ToxicBody(type=kind, attributes=bad), 0.0)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (ToxicBody(type="slow_close"), "slow_close"),
        (ToxicBody(type="latency", stream="sideways"), "upstream or downstream"),
        (ToxicBody(type="latency", toxicity=0.5), "toxicity"),
    ],
)
def test_a_toxic_that_cannot_be_is_refused(body: ToxicBody, named: str) -> None:
    with pytest.raises(LinkRefused, match=named):
        make_toxic(body, 0.0)


def test_a_toxic_without_a_name_is_named_after_its_type_and_stream() -> None:
    assert make_toxic(ToxicBody(type="timeout"), 0.0).name == "timeout_downstream"
    assert make_toxic(ToxicBody(type="timeout", stream="upstream"), 0.0).name == "timeout_upstream"
    assert make_toxic(ToxicBody(type="timeout", name="mine"), 0.0).name == "mine"


def test_an_update_changes_what_it_names_and_starts_the_time_again() -> None:
    before = toxic("latency", at_s=1.0, latency=100, jitter=10)
    after = update_toxic(before, ToxicBody(attributes={"latency": 50}), 2.0)
    assert msgspec.structs.asdict(after.attributes) == {"latency": 50, "jitter": 10}
    assert (after.name, after.stream, after.since_s) == (before.name, before.stream, 2.0)
