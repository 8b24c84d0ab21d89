"""The revocation feed: what the region's replica shows, handed on to services that have no Redis.

One task per process follows the replica as a verifier does, a finite ``XREAD BLOCK`` and then beat, epoch, meta, last
id and length in one transaction, and puts each event, rendered once, into every consumer's queue. It runs while there
is a consumer. It judges nothing: whether there is a gap, and how fresh the data is, the consumers decide, by the same
code as over Redis (:mod:`verifier.feed` describes the events).

    a consumer …   from the position it names, if that is in the replica's log, or else from the first entry
    catches up     page by page, as fast as it takes them, until the task has passed it
    joins          at a place where the task stands, takes the pages up to there, and then its queue
    is dropped     when its queue is full (``slow_consumer``), its token ends or is revoked, the replica is lost, holds
                   no log any more or another one (``log_changed``), or the service stops; the last event names which

What a consumer may hold back is bounded by its queue, and by one page while it catches up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog
from redis.exceptions import RedisError

from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Epoch, FormatError, Meta, Position, parse_stream_id

from .errors import FeedUnavailable, KeyserviceError
from .limits import (
    FEED_CONSUMERS_MAX,
    FEED_KEEPALIVE_S,
    FEED_PAGE_ENTRIES,
    FEED_QUEUE_BYTES_MAX,
    FEED_RECHECK_S,
    FEED_TAIL_BLOCK_MS,
)
from .store import Node
from .telemetry import Metrics

__all__ = ["Feed"]

_log: Final = structlog.get_logger(__name__)
_Id = tuple[int, int]
_Raw = tuple[bytes, Mapping[bytes, bytes]]
KEEP_ALIVE: Final = b": keep-alive\n\n"
JOIN_TIMEOUT_S: Final = 2.0
"""The task passes a consumer within a round; a consumer hears nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the replica held at one moment, as it is, and as far as it is needed here."""

    beat: Mapping[bytes, bytes]
    raw_epoch: Mapping[bytes, bytes]
    raw_meta: Mapping[bytes, bytes]
    epoch: Epoch
    meta: Meta
    last_id: _Id
    length: int

    def render(self, name: str, since: _State | None = None) -> bytes:
        """The event; epoch and meta only if they are others than ``since``."""
        data: dict[str, Any] = {
            "last_id": _text_id(self.last_id),
            "length": self.length,
            "beat": _text(self.beat) or {},
        }
        if since is None or since.raw_epoch != self.raw_epoch:
            data["epoch"] = _text(self.raw_epoch)
        if since is None or since.raw_meta != self.raw_meta:
            data["meta"] = _text(self.raw_meta)
        return _event(name, data)

    def continues(self, before: _State, cursor: _Id) -> bool:
        """Whether what stands up to the cursor is still what was sent."""
        nonce = before.epoch.nonce_of(cursor[0])
        return self.last_id >= cursor and (nonce is None or self.epoch.nonce_of(cursor[0]) == nonce)

    def why_not_from(self, position: Position) -> str | None:
        """Why a reader at this position cannot go on here, or None; the words are those of a verifier's reader."""
        if position[:2] > self.last_id:
            return "rewind"
        if self.epoch.nonce_of(position.epoch) != position.nonce:
            return "nonce"
        if self.meta.trimmed_to is not None and self.meta.trimmed_to > position[:2]:
            return "trimmed"
        return None


class _Consumer:
    """A bounded queue of events on their way to one consumer."""

    def __init__(self, on_end: Callable[[str], None]) -> None:
        self._on_end = on_end
        self.joined = False
        self.greeted = False
        self.ended: str | None = None
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._wake = asyncio.Event()

    def put(self, event: bytes) -> None:
        self._size += len(event)
        if self._size > FEED_QUEUE_BYTES_MAX:
            self.end("slow_consumer")
        elif self.ended is None:
            self._queue.append(event)
            self._wake.set()

    def end(self, reason: str) -> None:
        """No more events, and those not yet taken are given up."""
        if self.ended is None:
            self.ended = reason
            self._queue.clear()
            self._wake.set()
            self._on_end(reason)

    async def get(self) -> bytes | None:
        """The next event, or None if there is none for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FEED_KEEPALIVE_S):
                await self._wake.wait()
        if not self._queue:
            return None
        event = self._queue.popleft()
        self._size -= len(event)
        if not self._queue and self.ended is None:
            self._wake.clear()
        return event


class _Pages:
    """Reads the log for one consumer, up to where the task stands.

    The meta stands beside each page: what is trimmed meanwhile is told from a hole.
    """

    def __init__(self, replica: Node, cursor: _Id | None, state: _State) -> None:
        self._replica = replica
        self._epoch = state.epoch
        self._raw_meta = state.raw_meta
        self.cursor = cursor

    async def read(self, until: _Id | None) -> AsyncIterator[bytes]:
        """Events with the entries up to ``until`` (None: to the last)."""
        while self.cursor is None or until is None or self.cursor < until:
            first = "-" if self.cursor is None else f"({_text_id(self.cursor)}"
            async with self._replica.redis.pipeline(transaction=True) as pipe:
                pipe.xrange(LOG_KEY, first, "+" if until is None else _text_id(until), count=FEED_PAGE_ENTRIES)
                pipe.hgetall(META_KEY)
                page, raw_meta = await pipe.execute()
            if raw_meta and raw_meta != self._raw_meta:
                self._raw_meta = raw_meta
                yield _event("meta", {"meta": _text(raw_meta)})
            if page:
                self.cursor = parse_stream_id(page[-1][0])
                yield _entries(page, self._epoch)
            if len(page) < FEED_PAGE_ENTRIES:
                return


class Feed:
    """Follows the replica for as long as there are consumers."""

    def __init__(self, replica: Node, metrics: Metrics) -> None:
        self._replica = replica
        self._metrics = metrics
        self._consumers: set[_Consumer] = set()
        self._task: asyncio.Task[None] | None = None
        self._cursor: _Id | None = None
        self._state: _State | None = None
        self._moved = asyncio.Event()
        self._next_round_mono = 0.0
        self._closed = False

    async def open(self, last_event_id: str | None, recheck: Callable[[], object]) -> AsyncIterator[bytes]:
        """The events for one consumer. ``recheck`` raises when it may not go on.

        Raises :class:`FeedUnavailable`: ``trust_log_absent``, ``replica_unreachable``, ``log_unreadable``,
        ``feed_full`` or ``shutting_down``.
        """
        if self._closed:
            raise FeedUnavailable("shutting_down", "this instance is stopping")
        if len(self._consumers) >= FEED_CONSUMERS_MAX:
            raise FeedUnavailable("feed_full", "this instance feeds as many consumers as it can")
        return self._serve(await self._read_state(), last_event_id, recheck)

    async def close(self) -> None:
        """End every stream by name."""
        self._closed = True
        self._end_all("shutting_down")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- one consumer -------------------------------------------------------------------------------------------------

    async def _serve(
        self, state: _State, last_event_id: str | None, recheck: Callable[[], object]
    ) -> AsyncIterator[bytes]:
        consumer = _Consumer(self._ended)
        self._consumers.add(consumer)
        self._metrics.feed_consumers.set(len(self._consumers))
        try:
            async for event in self._events(consumer, state, last_event_id, recheck):
                yield event
        finally:
            self._consumers.discard(consumer)
            self._metrics.feed_consumers.set(len(self._consumers))
            consumer.end("disconnected")

    async def _events(
        self, consumer: _Consumer, state: _State, last_event_id: str | None, recheck: Callable[[], object]
    ) -> AsyncIterator[bytes]:
        cursor, reset = _start(state, last_event_id)
        if reset is not None:
            yield _event("reset", {"reason": reset})
        yield state.render("begin" if cursor is None else "resume")
        catching_up = _Pages(self._replica, cursor, state)
        try:
            async for event in catching_up.read(None):
                yield event
            async for event in catching_up.read(await self._join(consumer, catching_up.cursor)):
                yield event
        except (RedisError, OSError):
            consumer.end("replica_unreachable")
        except FormatError:
            consumer.end("log_unreadable")
        async for event in _queued(consumer, recheck):
            yield event
        yield _event("end", {"reason": consumer.ended})

    async def _join(self, consumer: _Consumer, cursor: _Id | None) -> _Id | None:
        """Wait until the task has passed the consumer; from then on its queue gets what follows the id returned."""
        if self._task is None or self._task.done():
            self._cursor = None
            self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                while consumer.ended is None and (
                    self._cursor is None or (cursor is not None and self._cursor < cursor)
                ):
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            consumer.end("log_changed")
        consumer.joined = True
        return self._cursor

    # -- the task -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        reason = "feed_failed"
        try:
            state = await self._read_state()
            self._state, self._cursor = None, state.last_id
            while self._consumers:
                self._moved.set()
                await self._round()
        except FeedUnavailable as error:
            reason = error.code
        except (RedisError, OSError):
            reason = "replica_unreachable"
        except FormatError:
            reason = "log_unreadable"
        except Exception:  # noqa: BLE001 - a mistake of ours must not end in silence
            _log.exception("feed failed")
        finally:
            self._cursor = None
            self._end_all(reason)
            self._moved.set()

    async def _round(self) -> None:
        assert self._cursor is not None
        reply: Any = await self._replica.redis.xread(
            {LOG_KEY: _text_id(self._cursor)}, FEED_PAGE_ENTRIES, FEED_TAIL_BLOCK_MS
        )
        batch: list[_Raw] = reply[0][1] if reply else []
        if batch:
            cursor = parse_stream_id(batch[-1][0])
            self._put(lambda consumer: consumer.joined, lambda: _entries(batch, self._epoch()))
            self._cursor = cursor
        before, state = self._state, await self._read_state()
        self._state = state
        if before is not None and not state.continues(before, self._cursor):
            raise FeedUnavailable("log_changed", "this region's replica holds another history than before")
        self._put(lambda consumer: consumer.joined and not consumer.greeted, lambda: state.render("round"))
        mono = asyncio.get_running_loop().time()
        if before is not None and (before != state or mono >= self._next_round_mono):
            self._next_round_mono = mono + FEED_KEEPALIVE_S
            self._put(lambda consumer: consumer.greeted, lambda: state.render("round", before))
        for consumer in self._consumers:
            consumer.greeted = consumer.joined

    def _epoch(self) -> Epoch | None:
        return None if self._state is None else self._state.epoch

    def _put(self, which: Callable[[_Consumer], bool], render: Callable[[], bytes]) -> None:
        """Render once, if there is anyone to render for."""
        chosen = [consumer for consumer in self._consumers if which(consumer)]
        if chosen:
            event = render()
            for consumer in chosen:
                consumer.put(event)

    def _ended(self, reason: str) -> None:
        self._metrics.feed_ends.labels(reason).inc()
        if reason == "slow_consumer":
            _log.warning("feed consumer dropped", reason=reason)

    def _end_all(self, reason: str) -> None:
        for consumer in self._consumers:
            consumer.end(reason)

    async def _read_state(self) -> _State:
        """Raises :class:`FeedUnavailable`."""
        try:
            async with self._replica.redis.pipeline(transaction=True) as pipe:
                for key in (BEAT_KEY, EPOCH_KEY, META_KEY):
                    pipe.hgetall(key)
                pipe.xrevrange(LOG_KEY, count=1)
                pipe.xlen(LOG_KEY)
                beat, epoch, meta, last, length = await pipe.execute()
        except (RedisError, OSError):
            raise FeedUnavailable("replica_unreachable", "this region's replica does not answer") from None
        if not epoch or not meta or not last:
            raise FeedUnavailable("trust_log_absent", "this region's replica holds no trust log")
        try:
            return _State(
                beat, epoch, meta, Epoch.decode(epoch), Meta.decode(meta), parse_stream_id(last[0][0]), length
            )
        except FormatError:
            raise FeedUnavailable("log_unreadable", "this region's trust log is of another form") from None


async def _queued(consumer: _Consumer, recheck: Callable[[], object]) -> AsyncIterator[bytes]:
    """What is put into the queue, until the consumer is ended; its token is looked at again now and then."""
    loop = asyncio.get_running_loop()
    next_check = loop.time() + FEED_RECHECK_S
    while consumer.ended is None:
        event = await consumer.get()
        if consumer.ended is None:
            yield KEEP_ALIVE if event is None else event
        if loop.time() >= next_check:
            next_check = loop.time() + FEED_RECHECK_S
            try:
                recheck()
            except KeyserviceError as error:
                consumer.end(error.code)


def _start(state: _State, last_event_id: str | None) -> tuple[_Id | None, str | None]:
    """Where a consumer starts (None: at the first entry), and why not where it asked to."""
    if not last_event_id:
        return None, None
    try:
        position = Position.parse(last_event_id)
    except FormatError:
        return None, "position"
    reason = state.why_not_from(position)
    return (position[:2], None) if reason is None else (None, reason)


def _text_id(stream_id: _Id) -> str:
    return f"{stream_id[0]}-{stream_id[1]}"


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str] | None:
    """The fields as text, or None if they are none: to a verifier both are an entry that it cannot read."""
    try:
        return {name.decode(): value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        return None


def _entries(batch: Sequence[_Raw], epoch: Epoch | None) -> bytes:
    number, seq = parse_stream_id(batch[-1][0])
    nonce = None if epoch is None else epoch.nonce_of(number)
    data = [(stream_id.decode("ascii", "replace"), _text(fields) or {}) for stream_id, fields in batch]
    return _event("entries", data, None if nonce is None else str(Position(number, seq, nonce)))


def _event(name: str, data: Any, event_id: str | None = None) -> bytes:
    """One event (WHATWG HTML, section 9.2.6). JSON has no bare line break."""
    id_line = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"event: %b\n%bdata: %b\n\n" % (name.encode(), id_line, msgspec.json.encode(data))
