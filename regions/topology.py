"""Which regions there are, where they live on this machine, and how far apart they are.

A topology is a TOML file, or one of the built-in ones named by `BUILT_IN`:

    name = "default"                            # optional: the file's name without `.toml`

    [[regions]]                                 # region i, counted from 1, owns the address 127.0.i.1
    name = "us-east-1"
    primary = true                              # exactly one

    [[links]]                                   # every pair of regions needs a lag, in both directions
    between = ["us-east-1", "eu-west-1"]        # the same both ways; or  from = "…"  and  to = "…"
    one_way_ms = 40

    [ports]                                     # optional, any of `DEFAULT_PORTS`: the same number in every region
    redis = 16379

Everything here is pure but `load_topology`, which reads one file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import msgspec

from regions.errors import TopologyError

__all__ = ["BUILT_IN", "DEFAULT_PORTS", "Region", "Topology", "load_topology", "parse_topology"]

REGIONS_MAX = 16
"""Each region is a real server, a key service and verifiers on this one machine; more would measure the machine."""

ONE_WAY_MS_MAX = 10_000.0
"""`repl-timeout` is 10 s: a longer lag only breaks replication."""

_BUILT_IN_DIR = Path(__file__).parent / "topologies"

BUILT_IN: tuple[str, ...] = ("default", "one-region")
"""Topologies that come with the package, by the name to pass to `load_topology`."""

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$")]
_OneWayMs = Annotated[float, msgspec.Meta(ge=0.0, le=ONE_WAY_MS_MAX)]
_Port = Annotated[int, msgspec.Meta(ge=1024, le=65535)]


class _Ports(msgspec.Struct, forbid_unknown_fields=True):
    redis: _Port = 16379
    keyservice: _Port = 18080
    admin: _Port = 18081
    orders: _Port = 18082
    login: _Port = 18083
    sentinel: _Port = 16380


DEFAULT_PORTS: Mapping[str, int] = MappingProxyType(msgspec.structs.asdict(_Ports()))
"""Port of each service, the same in every region because the addresses differ.

All lie below the ephemeral ranges of Linux (from 32768) and macOS (from 49152), so no outgoing connection takes one.
"""


@dataclass(frozen=True, slots=True)
class Region:
    """A region: its name, its number counted from 1, and the loopback address it owns."""

    name: str
    index: int
    address: str

    @property
    def address_prefix(self) -> str:
        """What the addresses of everything in this region start with, for instance `127.0.2.`."""
        return self.address.rpartition(".")[0] + "."


@dataclass(frozen=True, slots=True)
class Topology:
    """Regions and the lag of each ordered pair of them, in milliseconds one way."""

    name: str
    regions: tuple[Region, ...]
    links: Mapping[tuple[str, str], float]
    primary: Region
    ports: Mapping[str, int]
    source: str
    """Where it was read from, for messages."""

    def region(self, name: str) -> Region:
        """The region called `name`; `TopologyError` if there is none."""
        for region in self.regions:
            if region.name == name:
                return region
        known = ", ".join(region.name for region in self.regions)
        raise TopologyError(f"{self.source}: no region is called {name!r}; there are: {known}")

    def one_way_ms(self, a: str, b: str) -> float:
        """Lag from region `a` to region `b` in milliseconds; 0 inside one region."""
        if a == b:
            return 0.0
        return self.links[self.region(a).name, self.region(b).name]

    def with_ports(self, ports: Mapping[str, int]) -> Topology:
        """The same topology with these ports in place of its own."""
        return replace(self, ports={**self.ports, **ports})


class _Region(msgspec.Struct, forbid_unknown_fields=True):
    name: _Name
    primary: bool = False


class _Link(msgspec.Struct, forbid_unknown_fields=True):
    one_way_ms: _OneWayMs
    between: tuple[str, str] | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    to: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    regions: Annotated[list[_Region], msgspec.Meta(min_length=1, max_length=REGIONS_MAX)]
    links: list[_Link] = []
    ports: _Ports = msgspec.field(default_factory=_Ports)
    name: _Name | None = None


def load_topology(name_or_path: str | Path = "default") -> Topology:
    """Read a built-in topology by its name, or a TOML file by its path.

    Raises `TopologyError` naming the file, and the key or (for a syntax error) the line.
    """
    path = Path(name_or_path)
    if str(name_or_path) in BUILT_IN:
        path = _BUILT_IN_DIR / f"{name_or_path}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TopologyError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        known = ", ".join(BUILT_IN)
        raise TopologyError(
            f"{path}: cannot be read: {error.strerror}; the built-in topologies are: {known}"
        ) from error
    return parse_topology(text, source=str(path), default_name=path.stem)


def parse_topology(text: str, *, source: str, default_name: str = "unnamed") -> Topology:
    """Check the TOML `text` of a topology; `source` says in messages where it came from.

    Raises `TopologyError`.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except tomllib.TOMLDecodeError as error:
        raise TopologyError(f"{source}: not valid TOML: {_with_line(error, text)}") from error
    except msgspec.ValidationError as error:
        raise TopologyError(f"{source}: {_with_key_first(error)}") from error
    regions = _regions(file, source)
    return Topology(
        name=file.name or default_name,
        regions=regions,
        links=_links(file, regions, source),
        primary=_primary(file, regions, source),
        ports=_ports(file, source),
        source=source,
    )


def _with_line(error: tomllib.TOMLDecodeError, text: str) -> str:
    """`tomllib` names the line, but for an unfinished last value says only `at end of document`."""
    return str(error).replace("at end of document", f"at end of document, line {text.count(chr(10)) + 1}")


def _with_key_first(error: msgspec.ValidationError) -> str:
    """Turn ``Expected `str` - at `$.regions[0].name` `` into ``regions[0].name: Expected `str` ``."""
    problem, _, path = str(error).partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    return f"{key}: {problem}" if key else problem


def _regions(file: _File, source: str) -> tuple[Region, ...]:
    seen: dict[str, int] = {}
    for position, region in enumerate(file.regions):
        if region.name in seen:
            raise TopologyError(
                f"{source}: regions[{position}].name: {region.name!r} is already regions[{seen[region.name]}]"
            )
        seen[region.name] = position
    return tuple(
        Region(name=region.name, index=index, address=f"127.0.{index}.1")
        for index, region in enumerate(file.regions, start=1)
    )


def _primary(file: _File, regions: tuple[Region, ...], source: str) -> Region:
    chosen = [position for position, region in enumerate(file.regions) if region.primary]
    if len(chosen) != 1:
        names = ", ".join(repr(file.regions[position].name) for position in chosen) or "none"
        raise TopologyError(
            f"{source}: regions.primary: exactly one region must say `primary = true`; it is on: {names}"
        )
    return regions[chosen[0]]


def _links(file: _File, regions: tuple[Region, ...], source: str) -> dict[tuple[str, str], float]:
    names = [region.name for region in regions]
    links: dict[tuple[str, str], float] = {}
    for position, link in enumerate(file.links):
        key = f"{source}: links[{position}]"
        for pair in _pairs(link, key):
            for name in pair:
                if name not in names:
                    raise TopologyError(f"{key}: unknown region {name!r}; there are: {', '.join(names)}")
            if pair[0] == pair[1]:
                raise TopologyError(f"{key}: {pair[0]!r} is linked with itself; inside a region the lag is always 0")
            if pair in links:
                raise TopologyError(f"{key}: the link from {pair[0]!r} to {pair[1]!r} was already given")
            links[pair] = link.one_way_ms
    for a, b in permutations(names, 2):
        if (a, b) not in links:
            raise TopologyError(f"{source}: links: no lag is given from {a!r} to {b!r}")
    return links


def _pairs(link: _Link, key: str) -> tuple[tuple[str, str], ...]:
    """The ordered pairs that one `[[links]]` table speaks of."""
    if link.between is not None and link.from_ is None and link.to is None:
        a, b = link.between
        return ((a, b), (b, a)) if a != b else ((a, b),)
    if link.between is None and link.from_ is not None and link.to is not None:
        return ((link.from_, link.to),)
    raise TopologyError(f"{key}: needs either `between = [A, B]`, or `from = A` and `to = B`")


def _ports(file: _File, source: str) -> dict[str, int]:
    ports: dict[str, int] = msgspec.structs.asdict(file.ports)
    owners: dict[int, str] = {}
    for service, port in ports.items():
        if port in owners:
            raise TopologyError(f"{source}: ports.{service}: {port} is also the port of {owners[port]!r}")
        owners[port] = service
    return ports
