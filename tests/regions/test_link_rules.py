"""What becomes of a connection and who calls whom, with a hand-moved clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from regions.errors import LinkFailed, LinkRefused
from regions.link_rules import Call, Change, Ending, Fate, Lag, LinkConfig, Listener, Network, link_config
from regions.link_toxics import End, ToxicBody
from regions.topology import load_topology

CONFIG = LinkConfig(
    listeners=[Listener("127.0.1.1", 6379, "a", "/run/a.sock")],
    regions={"a": "127.0.1.", "b": "127.0.2.", "c": "127.0.12."},
    links=[Lag("a", "b", 40.0), Lag("b", "a", 60.0)],
    control="/run/control.sock",
)


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
    call = network.call("127.0.2.1", "a", 0.0)
    assert call.pair is network.pairs["b:a"]
    assert call.round_trip_s == pytest.approx(0.1)
    assert network.links["b", "a"].connections == 1
    assert network.links["a", "b"].connections == 0
    call.to_target.push(b"123", 0.0)
    call.to_target.pop_due(1.0)
    call.to_caller.push(b"4567", 0.0)
    call.to_caller.pop_due(1.0)
    assert (network.links["b", "a"].bytes, network.links["a", "b"].bytes) == (3, 4)


def test_a_call_inside_a_region_has_no_lag() -> None:
    assert Network(CONFIG).call("127.0.1.1", "a", 0.0).round_trip_s == 0


def test_an_unbound_caller_counts_as_local_to_its_target_and_is_counted() -> None:
    network = Network(CONFIG)
    assert network.call("127.0.0.1", "b", 0.0).pair is network.pairs["b:b"]
    assert network.counters()["unbound"] == {"a": 0, "b": 1, "c": 0}


# new connections


class Lab:
    """One call from b to a (60 ms there, 40 ms back), opened at 100 s."""

    def __init__(self, *before: Change) -> None:
        self.network = Network(CONFIG)
        self.network.apply(before, 50.0)
        self.call: Call = self.network.call("127.0.2.1", "a", 100.0)

    def change(self, now_s: float, *changes: Change) -> None:
        self.network.apply(changes, now_s)
        self.call.change(now_s)

    def heal(self, now_s: float) -> None:
        self.network.heal()
        self.call.change(now_s)


def put(kind: str, stream: str = "upstream", *, proxy: str = "b:a", **attributes: float) -> Change:
    return Change(proxy, put=[ToxicBody(type=kind, stream=stream, attributes=dict(attributes))])


def remove(name: str, *, proxy: str = "b:a") -> Change:
    return Change(proxy, remove=[name])


def test_a_first_byte_arrives_one_round_trip_and_one_lag_after_the_connect() -> None:
    lab = Lab()
    lab.call.to_target.push(b"x", 100.0)
    assert lab.call.connected
    assert lab.call.to_target.pop_due(100.159) is None
    assert lab.call.to_target.pop_due(100.161) == b"x"


def test_a_handshake_takes_the_latency_of_both_streams_too() -> None:
    lab = Lab(put("latency", "upstream", latency=10), put("latency", "downstream", latency=100))
    lab.call.to_target.push(b"x", 100.0)
    assert lab.call.to_target.next_due_s == pytest.approx(100 + 0.07 + 0.14 + 0.07)


@pytest.mark.parametrize("kind", ["timeout", "cut"])
@pytest.mark.parametrize("stream", ["upstream", "downstream"])
def test_a_new_connection_hangs_with_what_it_sent_while_either_direction_is_closed_and_then_shakes_hands(
    kind: str, stream: str
) -> None:
    lab = Lab(put(kind, stream))
    assert lab.call.connected is False
    assert lab.call.fate() is None
    lab.call.to_target.push(b"x", 150.0)
    lab.change(200.0, remove(f"{kind}_{stream}"))
    assert lab.call.fate() is None
    assert lab.call.to_target.pop_due(200.159) is None
    assert lab.call.to_target.pop_due(200.161) == b"x"


def test_a_handshake_waits_until_both_directions_are_open() -> None:
    lab = Lab(put("timeout", "upstream"), put("timeout", "downstream"))
    lab.change(110.0, remove("timeout_upstream"))
    assert not lab.call.connected
    lab.change(120.0, remove("timeout_downstream"))
    lab.call.to_target.push(b"x", 120.0)
    assert lab.call.to_target.next_due_s == pytest.approx(120.16)


def test_a_hold_of_another_pair_does_not_concern_a_new_connection() -> None:
    assert Lab(put("timeout", proxy="a:b"), put("cut", proxy="c:a")).call.connected


# how the link ends connections


def test_nothing_ends_a_connection_over_a_link_that_is_only_slow() -> None:
    lab = Lab(put("latency", latency=10), put("bandwidth", rate=1), put("slicer", average_size=1), put("timeout"))
    assert lab.call.fate() is None


@pytest.mark.parametrize(("kind", "how"), [("timeout", Ending.CLOSE), ("reset_peer", Ending.RESET)])
@pytest.mark.parametrize("stream", ["upstream", "downstream"])
def test_a_time_runs_from_the_toxic_or_if_later_from_the_connection(kind: str, how: Ending, stream: str) -> None:
    assert Lab(put(kind, stream, timeout=500)).call.fate() == Fate(100.5, how)
    lab = Lab()
    lab.change(103.0, put(kind, stream, timeout=500))
    assert lab.call.fate() == Fate(103.5, how)
    lab.change(104.0, put(kind, stream, timeout=700))  # changed: the time starts again
    assert lab.call.fate() == Fate(104.7, how)
    lab.heal(104.1)
    assert lab.call.fate() is None


def test_the_earliest_end_counts() -> None:
    lab = Lab(put("timeout", timeout=500), put("reset_peer", "downstream", timeout=400))
    assert lab.call.fate() == Fate(100.4, Ending.RESET)


def test_a_pair_that_is_down_resets_what_is_open_and_what_is_new_until_it_is_up() -> None:
    lab = Lab()
    lab.change(101.0, Change("b:a", enabled=False))
    for call in (lab.call, lab.network.call("127.0.2.1", "a", 101.0)):
        fate = call.fate()
        assert fate is not None
        assert (fate.how, fate.due_s <= 101.0) == (Ending.RESET, True)
    assert lab.network.call("127.0.3.1", "a", 101.0).fate() is None
    lab.change(102.0, Change("b:a", enabled=True))
    assert lab.network.call("127.0.2.1", "a", 102.0).fate() is None


def test_a_connection_that_lost_bytes_is_reset_when_the_cut_is_over_and_not_before() -> None:
    lab = Lab()
    lab.change(101.0, put("cut", "upstream"), put("cut", "downstream"))
    lab.call.to_target.push(b"x", 101.0)
    assert lab.call.fate() is None
    lab.change(102.0, remove("cut_upstream"))
    assert lab.call.fate() is None  # what would say so could not come back
    lab.change(103.0, remove("cut_downstream"))
    assert lab.call.fate() is not None


@pytest.mark.parametrize("lost", [b"x", End.EOF, End.RESET])
def test_one_cut_direction_is_enough_to_lose_something(lost: bytes | End) -> None:
    lab = Lab()
    lab.change(101.0, put("cut", "downstream"))
    lab.call.to_caller.push(lost, 101.0)
    lab.heal(102.0)
    assert lab.call.fate() == Fate(100.0, Ending.RESET)


def test_a_connection_that_was_silent_during_a_cut_goes_on() -> None:
    lab = Lab()
    lab.change(101.0, put("cut", "upstream"), put("cut", "downstream"))
    lab.heal(102.0)
    assert lab.call.fate() is None
    lab.call.to_target.push(b"x", 102.0)
    assert lab.call.to_target.pop_due(102.061) == b"x"


# changes of many pairs at once


def test_changes_are_all_made_or_none() -> None:
    network = Network(CONFIG)
    with pytest.raises(LinkRefused, match="mars"):
        network.apply([put("cut"), put("cut", proxy="a:mars")], 0.0)
    with pytest.raises(LinkRefused, match="rate"):
        network.apply([put("cut"), put("bandwidth", rate=0)], 0.0)
    assert network.pairs["b:a"].toxics == []
    changed = network.apply([put("cut"), put("cut", "downstream"), Change("a:b", enabled=False)], 0.0)
    assert changed == [network.pairs["b:a"], network.pairs["a:b"]]
    assert [toxic.name for toxic in network.pairs["b:a"].toxics] == ["cut_upstream", "cut_downstream"]


def test_a_toxic_put_again_takes_the_place_of_the_first() -> None:
    network = Network(CONFIG)
    pair = network.pairs["b:a"]
    network.apply([put("latency", latency=1), put("bandwidth", rate=1), put("latency", latency=2)], 0.0)
    assert [(toxic.type, toxic.to_json()["attributes"]) for toxic in pair.toxics] == [
        ("latency", {"latency": 2, "jitter": 0}),
        ("bandwidth", {"rate": 1}),
    ]


def test_a_toxic_put_again_under_its_name_may_change_streams() -> None:
    network = Network(CONFIG)
    for stream in ("upstream", "downstream"):
        network.apply([Change("b:a", put=[ToxicBody("cut", name="mine", stream=stream)])], 0.0)
    assert [(toxic.name, toxic.stream) for toxic in network.pairs["b:a"].toxics] == [("mine", "downstream")]


def test_healing_ends_every_fault_and_keeps_the_lags() -> None:
    network = Network(CONFIG)
    network.set_link("a", "b", 77)
    network.apply([put("cut"), Change("a:c", put=[ToxicBody("timeout")], enabled=False)], 0.0)
    network.heal()
    assert all(pair.enabled and not pair.toxics for pair in network.pairs.values())
    assert network.links["a", "b"].one_way_ms == 77


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
