"""The shell around the mirror: one daemon thread that reads a region's Redis replica and publishes what it knows.

A round is a finite ``XREAD BLOCK`` with an explicit last id, then beat, epoch, meta and the log's last id in one
transaction. Blocking I/O in a thread of its own works alike under asyncio, threads, gunicorn and gRPC. Decisions are in
:mod:`verifier.reader`, :mod:`verifier.freshness` and :mod:`verifier.revocations`.

Everything known stands in one immutable :class:`View`, replaced by a single assignment when a round is complete. Losing
the server changes nothing in it but its age.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from .errors import ConfigurationError
from .freshness import Freshness
from .limits import (
    READ_BATCH_ENTRIES,
    RECONNECT_DELAY_MAX_S,
    RECONNECT_DELAY_MIN_S,
    REDIS_TIMEOUT_S,
    TAIL_BLOCK_MS,
)
from .log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Beat, Entry, Epoch, FormatError, Meta, Position
from .log import parse_stream_id as _stream_id
from .reader import Gap, Raw, Reader, Reread
from .revocations import Mirror, Snapshot

if TYPE_CHECKING:
    import redis

__all__ = ["ReplicaMirror", "View"]

_log: Final = logging.getLogger("verifier.replica")

DROP_EVERY_S: Final = 30.0
"""How often expired entries are looked for; they are harmless meanwhile."""

DROP_BEAT_AGE_MAX_S: Final = 5.0
"""A beat older than this is no witness of the time any more."""


@dataclass(frozen=True, slots=True)
class View:
    """What the mirror knows at one moment. ``connection`` is connecting, reading, tailing, waiting or closed."""

    snapshot: Snapshot
    freshness: Freshness
    position: Position | None = None
    epoch: Epoch | None = None
    connection: str = "connecting"
    problem: str | None = None


class _NotReady(Exception):
    """The server answers but has no trust log (yet): empty, loading, or being synchronised."""


class ReplicaMirror:
    """Mirrors the trust log of one region's Redis: the first of ``urls`` that answers, the next when it is lost.

    After a lost connection it goes on from its position; on another node it reads the log again, because two nodes are
    two histories until shown otherwise. ``on_entries([(position, entry), …])`` is called from the mirror's thread.
    ``max_skew_s``, ``drop_grace_s`` and ``max_token_lifetime_s`` (the longest token that its verifier accepts) are the
    design's bounds in seconds. Raises :class:`ConfigurationError`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        username: str | None = None,
        password: str | None = None,
        source_address: str | None = None,
        max_skew_s: float = 5.0,
        drop_grace_s: float = 300.0,
        max_token_lifetime_s: float = 0.0,
        on_entries: Callable[[list[tuple[Position, Entry]]], None] | None = None,
    ) -> None:
        nodes = [urls] if isinstance(urls, str) else list(urls)
        if not nodes:
            raise ConfigurationError("setting_missing", "redis_url: name at least one server", setting="redis_url")
        self._connectors = [_connector(url, username, password, source_address) for url in nodes]
        self._reader: Reader | None = None
        self._known_gaps: frozenset[Gap] = frozenset()
        self._drop_grace_s = drop_grace_s
        self._mirror = Mirror()
        self._mirror_lock = threading.Lock()
        self._on_change: list[Callable[[View], None]] = []
        self._on_entries = on_entries
        self._closing = threading.Event()
        self._advanced = threading.Condition()
        self._thread: threading.Thread | None = None
        self._next_drop_mono = 0.0
        self._view = View(self._mirror.snapshot, Freshness(max_skew_s, max_token_lifetime_s))
        self.counters: Counter[str] = Counter()

    # -- what others read -----------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """Everything known, in one immutable object."""
        return self._view

    @property
    def snapshot(self) -> Snapshot:
        """The revocations known now."""
        return self._view.snapshot

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        """Call ``on_change(view)`` after each new view is in place, from the thread that made it."""
        self._on_change.append(on_change)

    def wait_synced(self, timeout_s: float) -> bool:
        """Wait for the first complete read of the log; False if it did not happen in time."""
        with self._advanced:
            return self._advanced.wait_for(lambda: self._view.freshness.synced, timeout_s)

    def wait_position(self, reached: Callable[[View], bool], timeout_s: float) -> bool:
        """Wait until ``reached(view)`` holds; False if it did not in time."""
        with self._advanced:
            return self._advanced.wait_for(lambda: reached(self._view), timeout_s)

    def apply_local(self, entries: Sequence[Entry]) -> None:
        """Enforce entries that this process has just appended, without waiting for them to come back."""
        with self._mirror_lock:
            changed = self._mirror.apply(entries)
            if changed:
                self._publish(snapshot=self._mirror.snapshot)

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; does nothing if it runs."""
        if self._closing.is_set() and self._thread is not None:
            self._thread.join()  # bounded by the socket's time-outs; two threads must never share a reader
        if self._thread is None or not self._thread.is_alive():
            self._closing.clear()
            self._thread = threading.Thread(target=self._run, name="verifier-replica", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread and its connection; what was mirrored stays readable and goes on ageing."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(REDIS_TIMEOUT_S + TAIL_BLOCK_MS / 1000)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        import redis

        delay_s = RECONNECT_DELAY_MIN_S
        node = 0
        while not self._closing.is_set():
            client: redis.Redis | None = None
            try:
                client = self._connectors[node]()  # connects
                self._follow(client)
            except (redis.RedisError, OSError, FormatError, _NotReady) as error:
                self._lost(error)
            except Exception:  # noqa: BLE001 - a mistake of ours must not end the mirror in silence
                _log.exception("mirror failed; starting over")
                self.counters["failures"] += 1
                self._reader = None
            finally:
                if client is not None:
                    with contextlib.suppress(redis.RedisError, OSError):
                        client.close()
            delay_s = RECONNECT_DELAY_MIN_S if self._was_tailing() else min(delay_s * 2, RECONNECT_DELAY_MAX_S)
            if len(self._connectors) > 1:
                node, self._reader = (node + 1) % len(self._connectors), None
            self._update(connection="waiting")
            self._closing.wait(random.uniform(0, delay_s))
        self._update(connection="closed")

    def _was_tailing(self) -> bool:
        return self._view.connection == "tailing"

    def _lost(self, error: Exception) -> None:
        problem = _name_problem(error)
        self.counters["disconnects"] += 1
        if problem != self._view.problem:
            _log.warning("mirror lost its replica: %s", problem)
        self._publish(problem=problem)

    def _follow(self, client: redis.Redis) -> None:
        """Read the log from its first entry, or go on from the position; start over whenever the log contradicts it."""
        tolerant, fruitless = False, 0
        while not self._closing.is_set():
            try:
                reader = self._resume(client) or self._first_read(client, tolerant)
                if reader is None:
                    return
                self._reader = reader
                while not self._closing.is_set():
                    self._round(client, reader)
                    fruitless = 0
            except Reread as reread:
                if self._reader is not None and reread.reason == "next_epoch":
                    self._known_gaps = frozenset(self._reader.gaps)
                self._reader = None
                self._pause(fruitless)
                fruitless += 1
                self.counters["rereads"] += 1
                self.counters[f"reread_{reread.reason}"] += 1
                _log.warning("mirror reads the log again: %s", reread.reason)
                self._publish(problem=f"log_{reread.reason}")
                tolerant = reread.reason in ("hole", "fork")

    def _pause(self, fruitless: int) -> None:
        """Before reading again: a log that contradicts itself must not be read in a tight loop."""
        if fruitless >= 2:
            longest_s = min(RECONNECT_DELAY_MIN_S * 2**fruitless, RECONNECT_DELAY_MAX_S)
            self._closing.wait(random.uniform(longest_s / 2, longest_s))

    def _resume(self, client: redis.Redis) -> Reader | None:
        """The reader of the lost connection, if the server still holds what it read; raises :class:`Reread`."""
        reader = self._reader
        if reader is not None:
            _, epoch, meta, last_id = self._read_state(client)
            reader.check(meta, epoch, last_id)
        return reader

    def _first_read(self, client: redis.Redis, tolerant: bool) -> Reader | None:
        """Read the whole log; None if that was broken off by closing, because half of it is no mirror."""
        self._update(connection="reading")
        _, epoch, meta, _ = self._read_state(client)
        reader = Reader(meta, epoch, tolerant, self._known_gaps)
        cursor = "-"
        while True:
            reply: Any = client.xrange(LOG_KEY, min=cursor, count=READ_BATCH_ENTRIES)
            batch: list[Raw] = reply
            self._apply(reader, batch)
            if self._closing.is_set():
                return None
            if len(batch) < READ_BATCH_ENTRIES:
                break
            cursor = f"({batch[-1][0].decode()}"
        if reader.position is None:
            raise _NotReady("the trust log is empty")
        reader.tolerant = False  # the next gap is another one, and may heal
        return reader

    def _round(self, client: redis.Redis, reader: Reader) -> None:
        assert reader.position is not None
        reply: Any = client.xread({LOG_KEY: reader.position.stream_id}, READ_BATCH_ENTRIES, TAIL_BLOCK_MS)
        batch = _only_stream(reply)
        self._apply(reader, batch)
        beat, epoch, meta, last_id = self._read_state(client)
        reader.check(meta, epoch, last_id)
        freshness = replace(self._view.freshness, synced=True, holed_nonce=reader.holed_nonce)
        if beat is not None:
            freshness = freshness.heard(beat, epoch, meta, now=time.time(), mono=time.monotonic())
        freshness = freshness.reached(reader.position)
        self._drop_expired(freshness)
        self._publish(freshness=freshness, epoch=epoch, connection="tailing", problem=None)

    def _read_state(self, client: redis.Redis) -> tuple[Beat | None, Epoch, Meta, tuple[int, int]]:
        with client.pipeline(transaction=True) as pipe:
            pipe.hgetall(BEAT_KEY)
            pipe.hgetall(EPOCH_KEY)
            pipe.hgetall(META_KEY)
            pipe.xrevrange(LOG_KEY, count=1)
            beat, epoch, meta, last = pipe.execute()
        if not meta or not epoch or not last:
            raise _NotReady("the server holds no trust log")
        return self._read_beat(beat), Epoch.decode(epoch), Meta.decode(meta), _stream_id(last[0][0])

    def _read_beat(self, fields: Mapping[bytes, bytes]) -> Beat | None:
        """The beat, or None: without one the mirror ages, but goes on reading."""
        try:
            return Beat.decode(fields) if fields else None
        except FormatError as error:
            self.counters["beats_skipped"] += 1
            _log.error("mirror skipped a beat that it cannot read: %s", error.code)
            return None

    def _apply(self, reader: Reader, batch: list[Raw]) -> None:
        skipped = len(reader.skipped)
        accepted = reader.accept(batch)
        for code in reader.skipped[skipped:]:
            self.counters["entries_skipped"] += 1
            _log.error("mirror skipped an entry that it cannot read: %s", code)
        if not accepted:
            return
        self.counters["entries_read"] += len(accepted)
        with self._mirror_lock:
            self._mirror.apply(entry for _, entry in accepted)
            self._publish(
                snapshot=self._mirror.snapshot,
                position=reader.position,
                freshness=replace(self._view.freshness, holed_nonce=reader.holed_nonce).reached(accepted[-1][0]),
            )
        if self._on_entries is not None:
            self._on_entries(accepted)

    def _drop_expired(self, freshness: Freshness) -> None:
        """Forget expired entries now and then, by both clocks, and never on the word of a beat that is old."""
        now, mono = time.time(), time.monotonic()
        heard = freshness.confirmed or freshness.applied
        if mono < self._next_drop_mono or heard is None:
            return
        self._next_drop_mono = mono + DROP_EVERY_S
        elapsed_s = mono - heard.arrived_mono
        if elapsed_s > DROP_BEAT_AGE_MAX_S:
            return
        with self._mirror_lock:
            if self._mirror.drop_expired(now, heard.at_s + elapsed_s, self._drop_grace_s):
                self._publish(snapshot=self._mirror.snapshot)

    def _update(self, *, connection: str) -> None:
        if self._view.connection != connection:
            self._publish(connection=connection)

    def _publish(self, **changes: Any) -> None:
        with self._advanced:
            self._view = replace(self._view, **changes)
            self._advanced.notify_all()
        for on_change in self._on_change:
            on_change(self._view)


def _only_stream(reply: Any) -> list[Raw]:
    """XREAD's reply, a dict under RESP3 and a list under RESP2, for the one stream that was asked for."""
    if not reply:
        return []
    if isinstance(reply, Mapping):
        (entries,) = reply.values()
        return list(entries[0] if entries and isinstance(entries[0], list) else entries)
    return list(reply[0][1])


def _name_problem(error: Exception) -> str:
    """A short, stable name; never the error's own text, which may quote a URL."""
    name = type(error).__name__
    known = {
        "AuthenticationError": "wrong_credentials",
        "NoPermissionError": "no_permission",
        "TimeoutError": "timeout",
        "BusyLoadingError": "loading",
        "_NotReady": "no_trust_log",
        "FormatError": "format",
    }
    return known.get(name, "unreachable")


def _connector(
    url: str, username: str | None, password: str | None, source_address: str | None
) -> Callable[[], redis.Redis]:
    """A function that makes a client with one connection, own time-outs and no retries; checks the URL at once."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from .netbind import bound_connection_kwargs

    settings: dict[str, Any] = {
        "socket_timeout": REDIS_TIMEOUT_S,
        "socket_connect_timeout": REDIS_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "driver_info": None,  # no CLIENT SETINFO: Redis 7.0 cannot allow it to a user
    }
    if username is not None:
        settings["username"] = username
    if password is not None:
        settings["password"] = password
    if source_address is not None and not url.startswith("unix:"):
        settings.update(bound_connection_kwargs(source_address, tls=url.startswith("rediss:")))
    try:
        redis.ConnectionPool.from_url(url, **settings)
    except (ValueError, TypeError):
        message = "redis_url: expected redis://host:port, rediss://host:port or unix:///path"
        raise ConfigurationError("setting_invalid", message, setting="redis_url") from None

    def connect() -> redis.Redis:
        return redis.Redis.from_url(url, single_connection_client=True, **settings)

    return connect
