"""The shell around a region's Redis replica: what it shows goes to the mirror (:mod:`verifier.mirroring`).

A round is a finite ``XREAD BLOCK`` with an explicit last id, then beat, epoch, meta and the log's last id in one
transaction. Blocking I/O in a thread of its own works alike under asyncio, threads, gunicorn and gRPC.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .limits import READ_BATCH_ENTRIES, REDIS_TIMEOUT_S, TAIL_BLOCK_MS
from .log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Epoch, FormatError, Meta
from .log import parse_stream_id as _stream_id
from .mirroring import LogState, MirrorThread, NotReady, View
from .reader import Listed, Raw, Reader, Reread
from .reconnecting import Breaker
from .redis_connecting import (
    URL_OPTIONS,
    Line,
    connection_settings,
    open_client,
    url_options,
    warn_if_password_in_plain,
)
from .redis_tls import RedisTls, TlsProblem
from .sentinel import is_sentinel_url, parse_sentinel_url, sentinel_connector

if TYPE_CHECKING:
    import redis

__all__ = ["ReplicaMirror", "View"]


class ReplicaMirror(MirrorThread):
    """Mirrors the trust log of one region's Redis: the first of ``urls`` that answers, the next when it is lost.

    A URL may name Sentinels instead (:mod:`verifier.sentinel`), which are asked anew at each connection.

    After a lost connection it goes on from its position; on another node it reads the log again, because two nodes are
    two histories until shown otherwise. ``rediss://`` and ``rediss+sentinel://`` are TLS, always verified, with the
    files of ``tls`` if given. ``breaker``: see :mod:`verifier.reconnecting`. ``max_skew_s``, ``drop_grace_s`` and
    ``max_token_lifetime_s`` (the longest token that its verifier accepts) are the design's bounds in seconds. Raises
    :class:`ConfigurationError`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        username: str | None = None,
        password: str | None = None,
        tls: RedisTls | None = None,
        breaker: Breaker | None = None,
        source_address: str | None = None,
        max_skew_s: float = 5.0,
        drop_grace_s: float = 300.0,
        max_token_lifetime_s: float = 0.0,
        tail_block_ms: int = TAIL_BLOCK_MS,
    ) -> None:
        nodes = [urls] if isinstance(urls, str) else list(urls)
        if not nodes:
            raise ConfigurationError("setting_missing", "redis_url: name at least one server", setting="redis_url")
        files = _checked_tls(nodes, tls or RedisTls())
        super().__init__(
            max_skew_s=max_skew_s,
            drop_grace_s=drop_grace_s,
            max_token_lifetime_s=max_token_lifetime_s,
            nodes=len(nodes),
            name="verifier-replica",
            join_s=REDIS_TIMEOUT_S + tail_block_ms / 1000,
            breaker=breaker,
        )
        self._line = Line(self._closing)
        self._connectors = [_connector(url, username, password, source_address, files, self._line) for url in nodes]
        self._tail_block_ms = tail_block_ms
        self._server: object = None

    def close(self) -> None:
        """Stop the thread and its connection, also one on which nothing comes."""
        self._closing.set()
        self._line.hang_up()
        super().close()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection, without a word on it."""
        super().abandon()
        self._line.abandon()

    def _session(self, node: int) -> None:
        import redis

        client = self._connectors[node]()  # connects
        try:
            self._arrive(client)
            self._follow(client)
        finally:
            with contextlib.suppress(redis.RedisError, OSError):
                client.close()

    def _arrive(self, client: redis.Redis) -> None:
        """Through Sentinels another connection may lead to another server, and so to another history."""
        options = client.connection_pool.connection_kwargs
        server = (options.get("host"), options.get("port"), options.get("path"))
        if server != self._server:
            self._server = server
            self._give_up_reader()

    def _problem_of(self, error: Exception) -> str | None:
        return _name_problem(error)

    def _follow(self, client: redis.Redis) -> None:
        """Read the log from its first entry, or go on from the position; start over whenever the log contradicts it."""
        self._tolerant, fruitless = False, 0
        while not self._closing.is_set():
            try:
                reader = self._reader_of_lost(client) or self._first_read(client)
                if reader is None:
                    return
                while not self._closing.is_set():
                    self._next_round(client, reader)
                    fruitless = 0
            except Reread as reread:
                self._pause(fruitless)
                fruitless += 1
                self._reread(reread.reason)

    def _reader_of_lost(self, client: redis.Redis) -> Reader | None:
        return None if self._reader is None else self._resume(self._read_state(client))

    def _first_read(self, client: redis.Redis) -> Reader | None:
        """Read the whole log; None if that was broken off by closing, because half of it is no mirror."""
        self._update(connection="reading")
        reader = self._begin(self._read_state(client))
        with contextlib.closing(_whole_log(client)) as batches:
            for batch, meta in batches:
                if not meta:
                    raise self._absent()
                reader.beside(Meta.decode(meta))
                self._apply(reader, batch)
                if self._closing.is_set():
                    return None
        self._end(reader)
        return reader

    def _next_round(self, client: redis.Redis, reader: Reader) -> None:
        assert reader.position is not None
        reply: Any = client.xread({LOG_KEY: reader.position.stream_id}, READ_BATCH_ENTRIES, self._tail_block_ms)
        try:
            self._apply(reader, _only_stream(reply))
        except Reread:
            self._give_up_reader()  # whatever becomes of the next line: entries may have been lost
            reader.beside(self._read_state(client).meta)  # if the log was trimmed meanwhile, that is no hole
            raise
        self._round(reader, self._read_state(client))

    def _read_state(self, client: redis.Redis) -> LogState:
        with client.pipeline(transaction=True) as pipe:
            pipe.hgetall(BEAT_KEY)
            pipe.hgetall(EPOCH_KEY)
            pipe.hgetall(META_KEY)
            pipe.xrevrange(LOG_KEY, count=1)
            pipe.xlen(LOG_KEY)
            beat, epoch, meta, last, length = pipe.execute()
        if not meta or not epoch or not last:
            raise self._absent()
        return LogState(Epoch.decode(epoch), Meta.decode(meta), self._beat_of(beat), _stream_id(last[0][0]), length)


def _whole_log(client: redis.Redis) -> Generator[tuple[list[Listed], Mapping[bytes, bytes]]]:
    """The log in batches, each with the meta that stood beside it: so a trim between two of them is no hole.

    The next batch is asked for before one is given out: the server works on it meanwhile. Its reply is read even if
    nobody wants it any more, or it would be taken for that to the next question.
    """
    connection: Any = client.connection_pool.get_connection()
    pending = True
    try:
        _ask_batch(connection, "-")
        while pending:
            batch, meta = _take_batch(connection)
            pending = len(batch) >= READ_BATCH_ENTRIES and bool(meta)
            if pending:
                _ask_batch(connection, f"({batch[-1][0].decode()}")
            yield batch, meta
    except GeneratorExit:
        if pending:
            _take_batch(connection)
        raise
    finally:
        client.connection_pool.release(connection)


def _ask_batch(connection: Any, cursor: str) -> None:
    wanted = ("XRANGE", LOG_KEY, cursor, "+", "COUNT", READ_BATCH_ENTRIES)
    connection.send_packed_command(connection.pack_commands([("MULTI",), wanted, ("HGETALL", META_KEY), ("EXEC",)]))


def _take_batch(connection: Any) -> tuple[list[Listed], Mapping[bytes, bytes]]:
    for _ in ("MULTI", "XRANGE", "HGETALL"):
        connection.read_response()
    replies = connection.read_response()
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    batch, meta = replies
    return batch, meta if isinstance(meta, Mapping) else dict(zip(meta[::2], meta[1::2], strict=True))  # RESP3 or 2


def _only_stream(reply: Any) -> list[Raw]:
    """XREAD's reply, a dict under RESP3 and a list under RESP2, for the one stream that was asked for."""
    if not reply:
        return []
    if isinstance(reply, Mapping):
        (entries,) = reply.values()
        return list(entries[0] if entries and isinstance(entries[0], list) else entries)
    return list(reply[0][1])


def _name_problem(error: Exception) -> str | None:
    """A short, stable name; never the error's own text, which may quote a URL. None for a mistake of ours."""
    import redis

    if not isinstance(error, redis.RedisError | OSError | FormatError | NotReady):
        return None
    name = type(error).__name__
    if isinstance(error, TlsProblem):
        return error.code
    known = {
        "AuthenticationError": "wrong_credentials",
        "NoPermissionError": "no_permission",
        "TimeoutError": "timeout",
        "BusyLoadingError": "loading",
        "NotReady": "no_trust_log",
        "FormatError": "format",
    }
    return known.get(name, "unreachable")


def _is_tls(url: str) -> bool:
    return url.startswith("rediss")


def _checked_tls(urls: Sequence[str], tls: RedisTls) -> RedisTls:
    """Files are for TLS: given without it, somebody believes in an encryption that is not there."""
    if tls and not any(_is_tls(url) for url in urls):
        setting = next(name for name in ("ca", "cert", "key") if getattr(tls, name) is not None)
        message = f"redis_tls_{setting}: is given, and no redis_url begins with rediss:// or rediss+sentinel://"
        raise ConfigurationError("setting_invalid", message, setting=f"redis_tls_{setting}")
    if tls:
        tls.check()
    return tls


def _connector(
    url: str, username: str | None, password: str | None, source_address: str | None, tls: RedisTls, line: Line
) -> Callable[[], redis.Redis]:
    """A function that makes a client with one connection; checks the URL at once."""
    used = tls if _is_tls(url) else None
    unix = url.startswith("unix:")
    settings = connection_settings(username, password, source_address, used, line, unix=unix)
    try:
        if is_sentinel_url(url):
            connect = sentinel_connector(parse_sentinel_url(url), settings, open_client)
        else:
            options = {**settings, **url_options(url), "connection_class": settings["connection_class"]}
            connect = _direct(options)
    except (ValueError, TypeError) as error:
        raise ConfigurationError("setting_invalid", _expected(url, error), setting="redis_url") from None
    warn_if_password_in_plain("redis_url", url, password)
    return connect


def _direct(options: Mapping[str, Any]) -> Callable[[], redis.Redis]:
    """In a closure, where no ``repr`` shows the password among them."""

    def connect() -> redis.Redis:
        return open_client(options)

    return connect


def _expected(url: str, error: Exception) -> str:
    if is_sentinel_url(url):
        return "redis_url: expected redis+sentinel://host:port,host:port/GROUP"
    if "option" in str(error):
        return (
            f"redis_url: a URL may carry {', '.join(sorted(URL_OPTIONS))}; for TLS there is redis_tls_ca and the like"
        )
    return "redis_url: expected redis://host:port, rediss://host:port or unix:///path"
