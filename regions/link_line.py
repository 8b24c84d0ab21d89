"""When what was sent comes out: the link, the toxics on top of it, and the queue of one direction of one connection.

Pure: no socket, no clock, no asyncio.

1. One `DelayLine` per connection and direction keeps the order: nothing comes out before its lag has passed, nothing
   before what was sent earlier. Any number of chunks is under way at once, so lag does not limit throughput.
2. Faults sit at the receiver's end of the way: what has not come out when a fault begins is under it.
3. A change of toxics holds for everything that has not come out, as if it had always been so; a change of the link's
   lag only for what is sent after it.
4. The gate of a direction is its strongest toxic: *cut*, then *held*, then open. Held, nothing comes out, and all that
   has waited does when the gate opens. Cut, what is under way or sent is lost.
5. Before its handshake a line is held, whatever its stream: a caller sends nothing that could be lost before then.
6. A line that has lost something never lets anything out again: what came after the hole must not close it. Its
   connection is reset when the cut is over (`regions.link_rules`); one that had nothing to lose goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from regions.link_toxics import Cut, End, Latency, Piece, Stage, Timeout, Toxic, make_stages

__all__ = ["DelayLine", "Gate", "Link", "Stream"]


@dataclass(slots=True)
class Link:
    """The way from one region to another (or to itself), and what has used it."""

    one_way_ms: float = 0.0
    connections: int = 0
    bytes: int = 0
    bytes_lost: int = 0

    @property
    def one_way_s(self) -> float:
        return self.one_way_ms / 1000


class Gate(Enum):
    """What a direction lets through."""

    OPEN = "open"
    HELD = "held"
    CUT = "cut"


@dataclass(slots=True)
class Stream:
    """One direction of one proxy's connections: a link, and the toxics in the order in which they were added."""

    link: Link
    toxics: list[Toxic] = field(default_factory=list)

    @property
    def gate(self) -> Gate:
        kinds = {type(toxic.attributes) for toxic in self.toxics}
        return Gate.CUT if Cut in kinds else Gate.HELD if Timeout in kinds else Gate.OPEN

    @property
    def one_way_s(self) -> float:
        """How long a lone packet takes, jitter left out."""
        latencies = (toxic.attributes.latency for toxic in self.toxics if isinstance(toxic.attributes, Latency))
        return self.link.one_way_s + sum(latencies) / 1000


class DelayLine:
    """What one direction of one connection has under way, in order.

    `seed` decides everything that chance decides. `started=False`: `start` comes with the handshake. `lost`: something
    was, by a cut.
    """

    __slots__ = ("_gate", "_last_s", "_seed", "_stages", "_started", "_stream", "_under_way", "held_bytes", "lost")

    def __init__(self, stream: Stream, *, seed: str = "", now_s: float = 0.0, started: bool = True) -> None:
        self._stream = stream
        self._seed = seed
        self._started = started
        self._last_s = 0.0  # when the last thing that was sent has the link's lag behind it
        self._under_way: deque[tuple[float, float, bytes | End]] = deque()  # comes out at, out of the link at, what
        self._stages: list[Stage] = []
        self._gate = Gate.OPEN
        self.held_bytes = 0
        self.lost = False
        if stream.toxics or not started:
            self.change(now_s)

    @property
    def next_due_s(self) -> float | None:
        """When the next thing comes out; None if nothing is under way, or nothing may come out."""
        return self._under_way[0][0] if self._under_way and self._gate is Gate.OPEN else None

    def push(self, sent: bytes | End, now_s: float) -> None:
        if self.lost or self._gate is Gate.CUT:
            self._lose(sent)
            return
        self._last_s = max(now_s + self._stream.link.one_way_s, self._last_s)
        if not isinstance(sent, End):
            self.held_bytes += len(sent)
        self._enqueue(self._last_s, sent)

    def pop_due(self, now_s: float) -> bytes | End | None:
        """The next thing that has arrived at `now_s`, or None."""
        if not self._under_way or self._under_way[0][0] > now_s or self._gate is not Gate.OPEN:
            return None
        _, _, arrived = self._under_way.popleft()
        if not isinstance(arrived, End):
            self.held_bytes -= len(arrived)
            self._stream.link.bytes += len(arrived)
        return arrived

    def drop(self) -> None:
        """Forget everything under way: there is nobody left to receive it."""
        self._under_way.clear()
        self.held_bytes = 0

    def start(self, not_before_s: float, now_s: float) -> None:
        """The handshake is on its way: nothing may come out before `not_before_s`, what waits already included."""
        self._started = True
        self._last_s = max(self._last_s, not_before_s)
        self._under_way = deque((due, max(base, not_before_s), sent) for due, base, sent in self._under_way)
        self.change(now_s)

    def change(self, now_s: float) -> None:
        """Take the stream's toxics as they are now (rule 3)."""
        self._gate = self._stream.gate if self._started else Gate.HELD
        under_way, self._under_way = self._under_way, deque()
        if self._gate is Gate.CUT:
            self.held_bytes = 0
            for _, _, sent in under_way:
                self._lose(sent)
            return
        self._stages = make_stages(self._stream.toxics, Random(self._seed), now_s) if self._stream.toxics else []
        for _, base_s, sent in under_way:
            self._enqueue(base_s, sent)

    def _enqueue(self, base_s: float, sent: bytes | End) -> None:
        if not self._stages:
            self._under_way.append((base_s, base_s, sent))
            return
        pieces: list[Piece] = [(base_s, sent)]
        for stage in self._stages:
            pieces = list(stage(pieces))
        self._under_way.extend((due_s, base_s, piece) for due_s, piece in pieces)

    def _lose(self, sent: bytes | End) -> None:
        self.lost = True
        if not isinstance(sent, End):
            self._stream.link.bytes_lost += len(sent)
