"""What a topology file may say, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from regions.errors import ExitCode, TopologyError
from regions.topology import BUILT_IN, DEFAULT_PORTS, ONE_WAY_MS_MAX, REGIONS_MAX, load_topology, parse_topology

TWO_REGIONS = """
[[regions]]
name = "a"
primary = true

[[regions]]
name = "b"
"""
LINK = """
[[links]]
between = ["a", "b"]
one_way_ms = 40
"""


def refusal(text: str) -> str:
    with pytest.raises(TopologyError) as caught:
        parse_topology(text, source="some.toml")
    assert str(caught.value).startswith("some.toml: ")
    return str(caught.value)


def test_the_default_topology_has_three_regions_on_their_own_addresses() -> None:
    topology = load_topology()
    assert [(region.name, region.index, region.address) for region in topology.regions] == [
        ("us-east-1", 1, "127.0.1.1"),
        ("eu-west-1", 2, "127.0.2.1"),
        ("ap-southeast-1", 3, "127.0.3.1"),
    ]
    assert topology.name == "default"
    assert topology.primary.name == "us-east-1"
    assert topology.ports == DEFAULT_PORTS


def test_the_default_lags_are_40_and_90_ms_in_both_directions() -> None:
    topology = load_topology("default")
    assert topology.one_way_ms("us-east-1", "eu-west-1") == topology.one_way_ms("eu-west-1", "us-east-1") == 40
    assert (
        topology.one_way_ms("us-east-1", "ap-southeast-1") == topology.one_way_ms("ap-southeast-1", "us-east-1") == 90
    )
    assert (
        topology.one_way_ms("eu-west-1", "ap-southeast-1") == topology.one_way_ms("ap-southeast-1", "eu-west-1") == 90
    )
    assert topology.one_way_ms("eu-west-1", "eu-west-1") == 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_topology_loads_under_its_name(name: str) -> None:
    assert load_topology(name).name == name


def test_one_region_needs_no_link() -> None:
    topology = load_topology("one-region")
    assert len(topology.regions) == 1
    assert topology.primary is topology.regions[0]
    assert topology.primary.address_prefix == "127.0.1."


def test_a_file_is_read_by_its_path_and_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "pair.toml"
    path.write_text(TWO_REGIONS + LINK)
    topology = load_topology(path)
    assert topology.name == "pair"
    assert topology.source == str(path)


def test_a_file_may_name_itself() -> None:
    assert parse_topology('name = "mine"\n' + TWO_REGIONS + LINK, source="x.toml").name == "mine"


def test_a_directed_link_differs_by_direction() -> None:
    links = '[[links]]\nfrom = "a"\nto = "b"\none_way_ms = 10\n[[links]]\nfrom = "b"\nto = "a"\none_way_ms = 70.5\n'
    topology = parse_topology(TWO_REGIONS + links, source="some.toml")
    assert topology.one_way_ms("a", "b") == 10
    assert topology.one_way_ms("b", "a") == 70.5


def test_ports_may_be_given_one_by_one() -> None:
    topology = parse_topology(TWO_REGIONS + LINK + "[ports]\nredis = 26379\n", source="some.toml")
    assert topology.ports == {**DEFAULT_PORTS, "redis": 26379}


def test_with_ports_replaces_only_those_given() -> None:
    topology = load_topology().with_ports({"orders": 20_001})
    assert topology.ports == {**DEFAULT_PORTS, "orders": 20_001}


@pytest.mark.parametrize("lag", ["0", "0.5", str(ONE_WAY_MS_MAX)])
def test_a_lag_within_the_limits_is_taken(lag: str) -> None:
    assert parse_topology(TWO_REGIONS + LINK.replace("40", lag), source="s").one_way_ms("a", "b") == float(lag)


@pytest.mark.parametrize("lag", ["-0.1", str(ONE_WAY_MS_MAX + 0.1), "nan", "inf", "true", '"40"'])
def test_a_lag_beyond_the_limits_is_refused_with_its_key(lag: str) -> None:
    assert "links[0].one_way_ms" in refusal(TWO_REGIONS + LINK.replace("40", lag))


def regions_only(count: int) -> str:
    return "".join(f'[[regions]]\nname = "r{i}"\n' for i in range(count))


def test_as_many_regions_as_the_limit_are_read_and_one_more_is_refused() -> None:
    assert "no lag is given" in refusal(regions_only(REGIONS_MAX))  # read, and refused only for the next reason
    assert refusal(regions_only(REGIONS_MAX + 1)).startswith("some.toml: regions: ")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (TWO_REGIONS + LINK + 'colour = "red"\n', ["links[0]", "colour"]),
        ('colour = "red"\n' + TWO_REGIONS + LINK, ["colour"]),
        (TWO_REGIONS + 'colour = "red"\n' + LINK, ["regions[1]", "colour"]),
        (TWO_REGIONS + LINK + "[ports]\nsmtp = 2525\n", ["ports", "smtp"]),
        ("", ["regions"]),
        ("regions = []", ["regions"]),
        (TWO_REGIONS.replace('"b"', '"a"'), ["regions[1].name", "'a'", "regions[0]"]),
        (TWO_REGIONS.replace('"b"', '"B c"'), ["regions[1].name"]),
        (TWO_REGIONS.replace('"b"', '"-b"'), ["regions[1].name"]),
        (TWO_REGIONS.replace('"b"', f'"{"b" * 33}"'), ["regions[1].name"]),
        (TWO_REGIONS, ["links", "from 'a' to 'b'"]),
        (TWO_REGIONS + LINK + LINK, ["links[1]", "'a'", "'b'"]),
        (TWO_REGIONS + LINK.replace('"b"', '"c"'), ["links[0]", "'c'", "a, b"]),
        (TWO_REGIONS + LINK.replace('"b"', '"a"'), ["links[0]", "'a'"]),
        (TWO_REGIONS + LINK.replace('"a", "b"', '"a"'), ["links[0].between"]),
        (TWO_REGIONS + LINK + 'from = "a"\n', ["links[0]", "between", "from"]),
        (TWO_REGIONS + '[[links]]\nfrom = "a"\none_way_ms = 1\n', ["links[0]", "between", "from"]),
        (TWO_REGIONS.replace("primary = true", "") + LINK, ["primary", "none"]),
        (TWO_REGIONS + "primary = true\n" + LINK, ["primary", "'a', 'b'"]),
        (TWO_REGIONS + LINK + "[ports]\nredis = 1023\n", ["ports.redis"]),
        (TWO_REGIONS + LINK + "[ports]\nredis = 65536\n", ["ports.redis"]),
        (TWO_REGIONS + LINK + "[ports]\norders = 18080\n", ["ports.orders", "18080", "'keyservice'"]),
    ],
)
def test_an_impossible_topology_is_refused_with_its_key(text: str, names: list[str]) -> None:
    message = refusal(text)
    assert all(name in message for name in names), message


def test_bad_toml_is_refused_with_its_line() -> None:
    assert "line 3" in refusal("\n\nregions = = 1\n")


def test_an_unfinished_file_is_refused_with_its_line() -> None:
    assert "line 2" in refusal('\nname = """')


def test_a_missing_file_is_refused_with_its_path_and_the_built_in_names(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"nowhere\.toml.*default, one-region"):
        load_topology(tmp_path / "nowhere.toml")


def test_a_directory_and_a_binary_file_are_refused_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="cannot be read"):
        load_topology(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(TopologyError, match=r"binary\.toml: not UTF-8"):
        load_topology(binary)


def test_an_unknown_region_is_refused_with_those_there_are() -> None:
    topology = load_topology()
    with pytest.raises(TopologyError, match=r"mars.*us-east-1"):
        topology.one_way_ms("us-east-1", "mars")


def test_a_topology_error_is_a_usage_error() -> None:
    assert (TopologyError.code, TopologyError.exit_code) == ("topology_invalid", ExitCode.USAGE)
