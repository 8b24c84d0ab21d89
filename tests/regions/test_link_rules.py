"""The link proxy's decisions, with a hand-moved clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regions.errors import LinkFailed
from regions.link_rules import DelayLine, End, Lag, Link, LinkConfig, Listener, Network, link_config
from regions.topology import load_topology

CONFIG = LinkConfig(
    listeners=[Listener("127.0.1.1", 6379, "a", "/run/a.sock")],
    regions={"a": "127.0.1.", "b": "127.0.2.", "c": "127.0.12."},
    links=[Lag("a", "b", 40.0), Lag("b", "a", 60.0)],
    control="/run/control.sock",
)


def test_nothing_comes_out_before_its_lag_and_everything_right_after() -> None:
    line = DelayLine(Link(one_way_ms=40))
    line.push(b"x", now_s=100.0)
    assert line.pop_due(100.039) is None
    assert line.next_due_s == pytest.approx(100.04)
    assert line.pop_due(100.0401) == b"x"
    assert line.next_due_s is None


def test_a_hundred_things_sent_at_once_are_all_there_after_one_lag() -> None:
    line = DelayLine(Link(one_way_ms=40))
    for i in range(100):
        line.push(b"%d" % i, now_s=0.0)
    assert [line.pop_due(0.0401) for _ in range(100)] == [b"%d" % i for i in range(100)]


def test_an_end_keeps_its_place_behind_the_bytes() -> None:
    line = DelayLine(Link(one_way_ms=10))
    line.push(b"x", now_s=0.0)
    line.push(End.EOF, now_s=0.0)
    assert (line.pop_due(1.0), line.pop_due(1.0), line.pop_due(1.0)) == (b"x", End.EOF, None)


def test_a_smaller_lag_does_not_let_later_bytes_overtake() -> None:
    link = Link(one_way_ms=100)
    line = DelayLine(link)
    line.push(b"first", now_s=0.0)
    link.one_way_ms = 1
    line.push(b"second", now_s=0.01)
    assert line.pop_due(0.05) is None
    assert (line.pop_due(0.1001), line.pop_due(0.1001)) == (b"first", b"second")


def test_a_changed_lag_holds_for_what_is_sent_after_it() -> None:
    link = Link(one_way_ms=1)
    line = DelayLine(link)
    link.one_way_ms = 100
    line.push(b"x", now_s=0.0)
    assert line.pop_due(0.099) is None
    assert line.pop_due(0.101) == b"x"


def test_a_new_connection_holds_its_first_bytes_for_the_handshake() -> None:
    line = DelayLine(Link(one_way_ms=40), not_before_s=0.12)
    line.push(b"x", now_s=0.0)
    assert line.pop_due(0.119) is None
    assert line.pop_due(0.121) == b"x"


def test_held_bytes_and_link_bytes_count_what_is_under_way_and_what_came_out() -> None:
    link = Link()
    line = DelayLine(link)
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
    line = DelayLine(link)
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


@pytest.mark.parametrize(
    ("address", "region"),
    [
        ("127.0.1.1", "a"),
        ("127.0.1.77", "a"),
        ("127.0.2.1", "b"),
        ("127.0.12.1", "c"),
        ("127.0.0.1", None),
        ("127.0.21.1", None),
    ],
)
def test_a_caller_belongs_to_the_region_of_its_source_address(address: str, region: str | None) -> None:
    assert Network(CONFIG).region_of(address) == region


def test_a_call_uses_one_link_each_way() -> None:
    network = Network(CONFIG)
    call = network.call("127.0.2.1", "a")
    assert (call.to_target, call.to_caller) == (network.links["b", "a"], network.links["a", "b"])
    assert call.round_trip_s == pytest.approx(0.1)
    assert network.links["b", "a"].connections == 1
    assert network.links["a", "b"].connections == 0


def test_a_call_inside_a_region_has_no_lag() -> None:
    assert Network(CONFIG).call("127.0.1.1", "a").round_trip_s == 0


def test_an_unbound_caller_counts_as_local_to_its_target_and_is_counted() -> None:
    network = Network(CONFIG)
    call = network.call("127.0.0.1", "b")
    assert call.to_target is call.to_caller is network.links["b", "b"]
    assert network.counters()["unbound"] == {"a": 0, "b": 1, "c": 0}


def test_a_link_of_an_unknown_region_cannot_be_set() -> None:
    with pytest.raises(LinkFailed, match=r"'mars'.*a, b, c"):
        Network(CONFIG).set_link("a", "mars", 1)


def test_the_configuration_survives_its_file() -> None:
    assert LinkConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(
    ("replace", "by", "named"),
    [
        (b'"region": "a"', b'"region": "mars"', "mars"),
        (b'"to": "b"', b'"to": "mars"', "mars"),
        (b'"port": 6379', b'"port": "x"', "listeners"),
        (b'"one_way_ms": 40.0', b'"one_way_ms": -1', "one_way_ms"),
        (b'"control"', b'"colour"', "colour"),
        (b"{", b"{{", "malformed"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_key(replace: bytes, by: bytes, named: str) -> None:
    changed = CONFIG.to_json().replace(replace, by, 1)
    assert changed != CONFIG.to_json()
    with pytest.raises(LinkFailed, match=named):
        LinkConfig.from_json(changed)


def test_a_topology_becomes_a_configuration() -> None:
    topology = load_topology()
    config = link_config(topology, {("eu-west-1", "redis"): Path("/run/r2.sock")}, Path("/run/control.sock"))
    assert config.listeners == [Listener("127.0.2.1", 16379, "eu-west-1", "/run/r2.sock")]
    assert config.regions == {"us-east-1": "127.0.1.", "eu-west-1": "127.0.2.", "ap-southeast-1": "127.0.3."}
    network = Network(config)
    for (a, b), one_way_ms in topology.links.items():
        assert network.links[a, b].one_way_ms == one_way_ms
