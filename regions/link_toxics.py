"""Toxics: what a proxy can do to one direction of its connections. Names and units are Toxiproxy's.

Pure: no socket, no clock, no asyncio; chance comes from a generator that the caller seeded.

* `latency` (`latency`, `jitter`, ms): comes on top of the link's lag: `latency` ± `jitter`, uniform, never below 0.
  Order is kept.
* `bandwidth` (`rate`, KB/s, 1 KB = 1,000 bytes): of each connection, in this direction.
* `slicer` (`average_size`, `size_variation`, bytes; `delay`, µs): cuts into pieces, `delay` apart. Event loops count
  whole milliseconds: shorter delays give separate writes, several at once.
* `timeout` (`timeout`, ms): nothing comes out. 0: until the toxic is removed, then all of it does. More: both ends are
  closed that long after the toxic came, or the connection if later, and what was held is gone.
* `reset_peer` (`timeout`, ms): both ends are reset that long after the toxic came, or the connection if later; until
  then bytes pass.
* `cut` (none): nothing comes out, and what is under way or sent is lost. Toxiproxy has no such type.

The last three shape nothing: what follows from them is decided in `regions.link_line` and `regions.link_rules`. Left
out: `slow_close`, `limit_data`, and a `toxicity` other than 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Annotated, Any

import msgspec

from regions.errors import LinkRefused

__all__ = [
    "DOWNSTREAM",
    "UPSTREAM",
    "Bandwidth",
    "Cut",
    "End",
    "Latency",
    "Piece",
    "ResetPeer",
    "Slicer",
    "Stage",
    "Timeout",
    "Toxic",
    "ToxicBody",
    "make_stages",
    "make_toxic",
    "update_toxic",
]

UPSTREAM, DOWNSTREAM = "upstream", "downstream"

MS_MAX = 24 * 3_600_000.0
"""A day: longer than any run, and still exact as a time in microseconds."""

STEP_S = 0.1
"""Slow links let bytes through in steps of at most this long, as Toxiproxy's do."""

_Ms = Annotated[float, msgspec.Meta(ge=0.0, le=MS_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class End(Enum):
    """How one direction of a connection ends. It travels like bytes."""

    EOF = "eof"  # the sender is done; the other direction may go on
    RESET = "reset"  # the connection is gone in both directions


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    latency: _Ms = 0.0
    jitter: _Ms = 0.0


class Bandwidth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: _Count


class Slicer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    average_size: _Count
    size_variation: Annotated[int, msgspec.Meta(ge=0)] = 0
    delay: Annotated[float, msgspec.Meta(ge=0.0, le=MS_MAX * 1000)] = 0.0

    def __post_init__(self) -> None:
        if self.size_variation >= self.average_size:
            raise ValueError("`size_variation` must be smaller than `average_size`")


class Timeout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timeout: _Ms = 0.0


class ResetPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timeout: _Ms = 0.0


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


Attributes = Latency | Bandwidth | Slicer | Timeout | ResetPeer | Cut

_TYPES: dict[str, type[Attributes]] = {
    "latency": Latency,
    "bandwidth": Bandwidth,
    "slicer": Slicer,
    "timeout": Timeout,
    "reset_peer": ResetPeer,
    "cut": Cut,
}


class ToxicBody(msgspec.Struct, frozen=True):
    """A toxic as it is sent. Fields that Toxiproxy has and we do not are ignored, as Toxiproxy would."""

    type: str = ""
    name: str = ""
    stream: str = DOWNSTREAM
    toxicity: float = 1.0
    attributes: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Toxic:
    """A toxic at work since `since_s` (monotonic)."""

    name: str
    type: str
    stream: str
    attributes: Attributes
    since_s: float

    def to_json(self) -> dict[str, Any]:
        """As the API shows it. Whole numbers are shown as such: some clients know no others."""
        attributes = {
            name: int(value) if float(value).is_integer() else value
            for name, value in msgspec.structs.asdict(self.attributes).items()
        }
        return {
            "name": self.name,
            "type": self.type,
            "stream": self.stream,
            "toxicity": 1.0,
            "attributes": attributes,
        }


def make_toxic(body: ToxicBody, now_s: float) -> Toxic:
    """Raises `LinkRefused` (400) saying what is wrong."""
    if body.stream not in (UPSTREAM, DOWNSTREAM):
        raise LinkRefused("stream was invalid, can be either upstream or downstream", 400)
    if body.type not in _TYPES:
        raise LinkRefused(f"invalid toxic type {body.type!r}; there are: {', '.join(_TYPES)}", 400)
    attributes = _attributes(body.type, body.attributes, body.toxicity)
    return Toxic(body.name or f"{body.type}_{body.stream}", body.type, body.stream, attributes, now_s)


def update_toxic(toxic: Toxic, body: ToxicBody, now_s: float) -> Toxic:
    """The same toxic with the attributes that `body` names changed; its time starts again. Raises `LinkRefused`."""
    merged = msgspec.structs.asdict(toxic.attributes) | body.attributes
    attributes = _attributes(toxic.type, merged, body.toxicity)
    return Toxic(toxic.name, toxic.type, toxic.stream, attributes, now_s)


def _attributes(kind: str, attributes: dict[str, Any], toxicity: float) -> Attributes:
    if toxicity != 1:
        raise LinkRefused("toxicity other than 1 is not supported: a toxic works on every connection", 400)
    try:
        return msgspec.convert(attributes, _TYPES[kind])
    except msgspec.ValidationError as error:
        raise LinkRefused(f"bad request body: {kind}: {error}", 400) from None


# Shaping: each stage takes pieces in order, with the times at which they would come out, and gives pieces in order.

Piece = tuple[float, bytes | End]
Stage = Callable[[Iterable[Piece]], Iterator[Piece]]


def make_stages(toxics: Sequence[Toxic], rng: Random, now_s: float) -> list[Stage]:
    """What one connection's bytes pass through, in the order in which the toxics were added."""
    stages: list[Stage] = []
    for toxic in toxics:
        match toxic.attributes:
            case Latency() as latency:
                stages.append(_Delaying(latency, rng))
            case Bandwidth() as bandwidth:
                stages.append(_Limiting(bandwidth, now_s))
            case Slicer() as slicer:
                stages.append(_Slicing(slicer, rng, now_s))
            case Timeout() | ResetPeer() | Cut():
                pass
    return stages


class _Delaying:
    def __init__(self, toxic: Latency, rng: Random) -> None:
        self._toxic = toxic
        self._rng = rng
        self._last_s = 0.0

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for at_s, sent in pieces:
            delay_ms = self._toxic.latency
            if self._toxic.jitter:
                delay_ms += self._rng.uniform(-self._toxic.jitter, self._toxic.jitter)
            self._last_s = max(self._last_s, at_s + max(delay_ms, 0.0) / 1000)
            yield self._last_s, sent


class _Limiting:
    def __init__(self, toxic: Bandwidth, now_s: float) -> None:
        self._bytes_per_s = toxic.rate * 1000
        self._step_bytes = max(1, int(self._bytes_per_s * STEP_S))
        self._free_s = now_s

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for at_s, sent in pieces:
            self._free_s = max(self._free_s, at_s)
            if isinstance(sent, End):
                yield self._free_s, sent
                continue
            for start in range(0, len(sent), self._step_bytes):
                part = sent[start : start + self._step_bytes]
                self._free_s += len(part) / self._bytes_per_s
                yield self._free_s, part


class _Slicing:
    def __init__(self, toxic: Slicer, rng: Random, now_s: float) -> None:
        self._toxic = toxic
        self._rng = rng
        self._next_s = now_s

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for at_s, sent in pieces:
            self._next_s = max(self._next_s, at_s)
            if isinstance(sent, End):
                yield self._next_s, sent
                continue
            for part in self._slices(sent):
                yield self._next_s, part
                self._next_s += self._toxic.delay / 1_000_000

    def _slices(self, data: bytes) -> Iterator[bytes]:
        average, variation = self._toxic.average_size, self._toxic.size_variation
        start = 0
        while start < len(data):
            size = average + (self._rng.randint(-variation, variation) if variation else 0)
            yield data[start : start + size]
            start += size
