"""One Redis server as the key service uses it: reads, and writes whose outcome is never guessed.

A write that could not be sent did not happen (:class:`PrimaryUnreachable`); a write that was sent and not answered may
have happened (:class:`OutcomeUnknown`); an error reply means that nothing happened (:class:`Refused`). The client's own
retries are off: they would turn one append into two.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

import redis.asyncio as redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from verifier.netbind import bound_connection_kwargs
from verifier.redis_tls import PROBLEMS, RedisTls, async_tls_kwargs, tls_problem

from .errors import OutcomeUnknown, PrimaryUnreachable, Refused, StartError
from .limits import CONNECT_TIMEOUT_S, CONNECTIONS_MAX, PRIMARY_TIMEOUT_S

__all__ = ["SCRIPTS", "Node", "async_connection_kwargs", "load_script", "told_of_closing"]

SCRIPTS: Final = (
    "append.lua",
    "beat.lua",
    "bump.lua",
    "client_put.lua",
    "keys_merge.lua",
    "keys_put.lua",
    "open.lua",
    "prune.lua",
    "reader_format.lua",
    "refresh.lua",
    "register.lua",
    "report.lua",
    "serving.lua",
    "session_get.lua",
    "session_start.lua",
    "trim.lua",
)
UNCHECKED: Final = frozenset({"client_put.lua", "refresh.lua", "session_get.lua", "session_start.lua"})
"""Scripts on ``{ks}:*`` alone, which have no part in the trust log's checks."""


@cache
def load_script(name: str) -> tuple[str, str]:
    """A script with the shared checks in front, and its SHA-1. A line of flags (``#!lua …``) stays the first."""
    folder = resources.files(__package__) / "scripts"
    text = (folder / name).read_text()
    flags, text = text.split("\n", 1) if text.startswith("#!") else ("", text)
    if name not in UNCHECKED:
        text = (folder / "_checks.lua").read_text() + text
    text = f"{flags}\n{text}" if flags else text
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@cache
def told_of_closing(base: type[Any]) -> type[Any]:
    """A connection class with an error that redis-py knows when its transport has closed before something is sent.

    uvloop then raises a RuntimeError, which nobody expects of a server that is away; asyncio's own loop does not.
    """

    class ToldOfClosing(base):  # type: ignore[misc]  # any of redis-py's classes
        async def _send_packed_command(self, command: Iterable[bytes]) -> None:
            try:
                await super()._send_packed_command(command)
            except RuntimeError:
                if not self._writer.transport.is_closing():
                    raise
                raise ConnectionResetError("the connection has closed") from None

    return ToldOfClosing


class _Nowhere(redis.Connection):
    """A connection of a node whose server is not known yet."""

    async def connect(self) -> None:
        raise redis.ConnectionError("the server is not known yet")


class Node:
    """A server behind a URL; without one, behind none until :meth:`move`.

    ``redis`` is for reads; writes go through :meth:`write` and :meth:`run`.

    :meth:`move` points it at another server: connections to the old one are closed, also those on which a reply is
    awaited, whose writes then have the outcome that they have: unknown.
    """

    def __init__(
        self,
        url: str | None,
        *,
        username: str | None = None,
        password: str | None = None,
        source_address: str | None = None,
        tls: RedisTls | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "socket_timeout": PRIMARY_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "driver_info": None,
            "protocol": 2,
            "max_connections": CONNECTIONS_MAX,
        }
        if username is not None:
            options["username"] = username
        if password is not None:
            options["password"] = password
        self._options = options
        self._source_address = source_address
        self._tls = tls or RedisTls()
        self._use(redis.ConnectionPool(connection_class=_Nowhere) if url is None else self._pool_of(url))

    def _pool_of(self, url: str) -> redis.ConnectionPool:
        options = {**self._options, **parse_url(url)}
        if not url.startswith("unix:"):
            options.update(async_connection_kwargs(self._source_address, self._tls if _is_tls(url) else None))
        pool = redis.ConnectionPool(**options)
        pool.connection_class = told_of_closing(pool.connection_class)  # type: ignore[arg-type]  # a type is hashable
        return pool

    def _use(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self.redis: redis.Redis = redis.Redis(connection_pool=pool)

    async def move(self, url: str) -> None:
        """Use another server from now on, and have a few connections to it open."""
        old = self._pool
        self._use(self._pool_of(url))
        # Not one after the other: closing a connection to a host that is gone can take as long as a time-out.
        await asyncio.gather(old.disconnect(inuse_connections=True), self.warm(), return_exceptions=True)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.disconnect()

    async def write(self, *command: Any) -> Any:
        """One command, sent at most once; raises :class:`StoreError`."""
        pool = self._pool
        try:
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it so
        except (RedisError, OSError) as error:
            raise PrimaryUnreachable(code=_why_unreachable(error)) from None
        try:
            await connection.send_command(*command)
            return await connection.read_response()
        except BusyLoadingError:
            raise PrimaryUnreachable("the primary is loading its data") from None
        except (AuthenticationError, AuthorizationError):
            raise Refused("NOAUTH") from None
        except ResponseError as error:
            raise error if isinstance(error, NoScriptError) else Refused(_first_word(error)) from None
        except (RedisError, OSError):
            raise OutcomeUnknown from None
        except asyncio.CancelledError:
            await connection.disconnect(nowait=True)  # a reply may still come; nobody may take it for another's
            raise
        finally:
            if pool is not self._pool:  # the node has moved: nobody will ask this pool again
                await connection.disconnect(nowait=True)
            await pool.release(connection)

    async def warm(self) -> None:
        """Have the scripts loaded and a few connections open, so that the first write is one round trip.

        Whatever goes wrong here goes wrong again where it matters.
        """
        texts = [load_script(name)[0] for name in SCRIPTS]
        await asyncio.gather(*(self.write("SCRIPT", "LOAD", text) for text in texts), return_exceptions=True)

    async def run(self, script: str, keys: tuple[str, ...], args: Sequence[str | int | bytes]) -> Any:
        """A script by its file name; raises :class:`StoreError`."""
        text, sha1 = load_script(script)
        try:
            return await self.write("EVALSHA", sha1, len(keys), *keys, *args)
        except NoScriptError:
            return await self.write("EVAL", text, len(keys), *keys, *args)

    async def check(self, setting: str) -> None:
        """Whether the server answers; raises :class:`StartError` for what waiting cannot heal, StoreError else."""
        try:
            await self.redis.ping()
        except (RedisError, OSError) as error:
            if _wrong_credentials(error):
                message = f"{setting}: wrong user name or password (REDIS_USERNAME, REDIS_PASSWORD)"
                raise StartError("redis_wrong_password", message) from None
            if isinstance(error, NoPermissionError):
                raise StartError("redis_no_permission", f"{setting}: the user may not do what is needed") from None
            code = tls_problem(error)
            if code not in (None, "tls_handshake"):  # a server that is starting takes connections and drops them
                raise StartError(code, f"{setting}: the server was reached, and {PROBLEMS[code]}") from None
            raise PrimaryUnreachable from None


def _is_tls(url: str) -> bool:
    return url.startswith("rediss:")


def async_connection_kwargs(source_address: str | None, tls: RedisTls | None) -> dict[str, Any]:
    """Arguments of a pool whose connections leave from there and, unless ``tls`` is None, are TLS: always verified."""
    bound = bound_connection_kwargs(source_address, tls=tls is not None, asynchronous=True)
    if tls is None:
        return bound
    return {**bound, **async_tls_kwargs(bound.get("connection_class", redis.SSLConnection), tls)}


def _first_word(error: RedisError) -> str:
    """The stable part of an error reply; redis-py takes some first words away and gives a class for them."""
    named = {"ReadOnlyError": "READONLY", "NoPermissionError": "NOPERM", "OutOfMemoryError": "OOM"}
    return named.get(type(error).__name__) or str(error).partition(" ")[0][:32] or "ERR"


def _wrong_credentials(error: BaseException | None) -> bool:
    """redis-py wraps what the server says to AUTH into another connection error, sometimes."""
    while error is not None:
        if isinstance(error, AuthenticationError | AuthorizationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _why_unreachable(error: Exception) -> str:
    return "primary_wrong_password" if _wrong_credentials(error) else "primary_unreachable"
