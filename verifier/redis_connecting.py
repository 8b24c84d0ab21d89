"""Connecting a mirror to Redis: what a URL may say, one connection that can be hung up, and why there is none.

Every connection has time-outs of :data:`~verifier.limits.REDIS_TIMEOUT_S` (a host name is looked up by the system,
which has its own) and no retries: :mod:`verifier.reconnecting` decides about those. :class:`Line` holds its socket, so
that closing need not wait for a time-out and a forked child can let go of its copy.

A server that hangs up before its first reply does not say why. Then, and only then, it is asked once more: over plain
TCP whether it answers TLS, over TLS whether it sends an alert. Neither question carries a credential.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from .limits import REDIS_TIMEOUT_S
from .netbind import bound_connection_kwargs
from .redis_tls import RedisTls, TlsProblem, tls_problem
from .sentinel import is_sentinel_url, parse_sentinel_url
from .settings import is_loopback

if TYPE_CHECKING:
    import threading

    import redis

__all__ = ["Line", "connection_settings", "open_client", "url_options", "warn_if_password_in_plain", "warn_if_plain"]

_log: Final = logging.getLogger("verifier.replica")
_warned: Final[set[tuple[str, str, int | None]]] = set()
_SECURED: Final = {"http": "https", "redis": "rediss", "redis+sentinel": "rediss+sentinel"}

URL_OPTIONS: Final = frozenset({"protocol", "db", "username", "password", "client_name"})
"""What a URL may carry after ``?``. redis-py lets others override time-outs and certificate checks."""


class Line:
    """The socket that a mirror reads from, for others to close: no lock, because a fork may come at any moment."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._socket: socket.socket | None = None
        self._connection: object = None

    @property
    def closing(self) -> bool:
        """Whether the mirror is being closed."""
        return self._closing.is_set()

    def begin(self, connection: object) -> None:
        """A connection connects once: renewed in silence, it could lead to another server. Raises :class:`OSError`."""
        if self._connection is connection:
            raise ConnectionResetError("the connection was lost")
        self._connection = connection

    def use(self, sock: socket.socket) -> None:
        """This is the socket now; it is shut down at once if the mirror is being closed."""
        self._socket = sock
        if self._closing.is_set():
            self.hang_up()

    def hang_up(self) -> None:
        """From any thread: whoever waits for the server waits no longer."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                # SSLSocket.shutdown would take the TLS layer away from the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def abandon(self) -> None:
        """In a forked child: close the copy, and say nothing on it. The connection is the parent's."""
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()


def url_options(url: str) -> dict[str, Any]:
    """A server's URL as keyword arguments of a pool; raises :class:`ValueError`, which does not repeat it."""
    from redis import connection

    parse: Any = connection.parse_url  # redis-py leaves it untyped
    if not set(parse_qs(urlsplit(url).query)) <= URL_OPTIONS:
        raise ValueError("has an option that a URL cannot set")
    return dict(parse(url))


def connection_settings(
    username: str | None,
    password: str | None,
    source_address: str | None,
    tls: RedisTls | None,
    line: Line,
    *,
    unix: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for a pool whose connections can be hung up; ``tls`` None is none, ``unix`` a Unix socket."""
    # What connecting would import, in a thread that a fork could cut off in the midst of it.
    import encodings.idna  # noqa: F401
    import secrets  # noqa: F401

    from redis.backoff import NoBackoff
    from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
    from redis.retry import Retry

    settings: dict[str, Any] = {
        "socket_timeout": REDIS_TIMEOUT_S,
        "socket_connect_timeout": REDIS_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "driver_info": None,  # no CLIENT SETINFO: Redis 7.0 cannot allow it to a user
        "line": line,
        "connection_class": UnixDomainSocketConnection if unix else Connection if tls is None else SSLConnection,
    }
    if not unix:
        settings.update(bound_connection_kwargs(source_address, tls=tls is not None))
    if tls is not None:
        settings["tls"] = tls
    if username is not None:
        settings["username"] = username
    if password is not None:
        settings["password"] = password
    make = _tls_line_class if tls is not None else _line_class
    settings["connection_class"] = make(settings["connection_class"])
    return settings


@cache
def _line_class(base: type[Any]) -> type[Any]:
    class OnLine(base):  # type: ignore[misc]  # any of redis-py's classes
        def __init__(self, *, line: Line, **kwargs: Any) -> None:
            self._line = line
            super().__init__(**kwargs)

        def _connect(self) -> socket.socket:
            self._line.begin(self)
            sock: socket.socket = super()._connect()
            self._line.use(sock)
            return sock

    return OnLine


@cache
def _tls_line_class(base: type[Any]) -> type[Any]:
    class Trusting(base):  # type: ignore[misc]  # as above
        def __init__(self, *, line: Line, tls: RedisTls, **kwargs: Any) -> None:
            self._line, self._tls = line, tls
            super().__init__(**kwargs)

        def _connect(self) -> socket.socket:
            self._line.begin(self)
            sock: socket.socket = super()._connect()
            return sock

        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            return _secured(sock, self.host, self._tls, self._line)

    return Trusting


def _secured(sock: socket.socket, host: str, tls: RedisTls, line: Line) -> ssl.SSLSocket:
    """TLS on a connected socket; raises :class:`TlsProblem` or :class:`ssl.SSLError`."""
    try:
        context = tls.context()
    except OSError:
        raise TlsProblem("tls_files") from None
    secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    line.use(secured)
    try:
        secured.do_handshake()
    except (TimeoutError, ConnectionError, ssl.SSLEOFError):
        secured.close()
        raise TlsProblem("tls_handshake") from None
    except BaseException:
        secured.close()
        raise
    return secured


def open_client(options: Mapping[str, Any]) -> redis.Redis:
    """A client with one connection, made with these arguments of a pool.

    Raises what redis-py raises, or :class:`TlsProblem` where TLS is the reason.
    """
    import redis

    pool = redis.ConnectionPool(max_connections=1, **options)
    try:
        pool.release(pool.get_connection())
    except (redis.ConnectionError, redis.InvalidResponse) as error:
        pool.disconnect()
        code = tls_problem(error) or (_ask_why(options) if _hung_up(error) else None)
        if code is not None:
            raise TlsProblem(code) from None
        raise
    except BaseException:
        pool.disconnect()
        raise
    return redis.Redis.from_pool(pool)


def _hung_up(error: redis.RedisError) -> bool:
    """A connection that was lost, or on which nonsense came; not one that was never made, and no reply in words."""
    if type(error).__name__ not in ("ConnectionError", "InvalidResponse"):
        return False
    cause = error.__cause__ or error.__context__
    return cause is None or not isinstance(cause, ConnectionRefusedError | socket.gaierror)


def _ask_why(options: Mapping[str, Any]) -> str | None:
    """Why a server took a connection and hung up before its first reply, as far as it lets us know."""
    line: Line = options["line"]
    if "path" in options or line.closing:
        return None
    host, port, address = options.get("host", "localhost"), options.get("port", 6379), options.get("source_address")
    source = None if address is None else (address, 0)
    tls: RedisTls | None = options.get("tls")
    try:
        with socket.create_connection((host, port), REDIS_TIMEOUT_S, source) as sock:
            line.use(sock)
            return _speaks_tls(sock) if tls is None else _alert(sock, host, tls, line)
    except OSError:
        return None


def _speaks_tls(sock: socket.socket) -> str | None:
    """Send a greeting and look at the first byte: a record of TLS begins with its type (RFC 8446 section 5.1)."""
    sent = ssl.MemoryBIO()
    greeting = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        greeting.do_handshake()
    sock.sendall(sent.read())
    return "tls_expected" if sock.recv(1) in (b"\x15", b"\x16") else None


def _alert(sock: socket.socket, host: str, tls: RedisTls, line: Line) -> str | None:
    """In TLS 1.3 a server refuses our certificate only after our part of the handshake is done."""
    try:
        with _secured(sock, host, tls, line) as secured:
            secured.recv(1)
    except ssl.SSLError as error:
        return tls_problem(error)
    return None


def warn_if_password_in_plain(setting: str, url: str, password: str | None) -> None:
    """:func:`warn_if_plain` for whatever a Redis URL names, if there is a password in it or beside it."""
    if is_sentinel_url(url):
        named = parse_sentinel_url(url)
        credential, places = named.password, [(place.host, place.port) for place in named.sentinels]
    else:
        parts = urlsplit(url)
        credential, places = parts.password, [(parts.hostname or "localhost", parts.port or 6379)]
    if credential is not None or password is not None:
        for host, port in places:
            warn_if_plain(setting, url.partition("://")[0], host, port)


def warn_if_plain(setting: str, scheme: str, host: str | None, port: int | None) -> None:
    """Log, once for each place, that a credential travels where it can be read; nothing on loopback or with TLS."""
    if scheme not in _SECURED or is_loopback(host) or (scheme, host or "", port) in _warned:
        return
    _warned.add((scheme, host or "", port))
    where = f"{host}:{port}" if port else host
    text = "%s: a credential goes over plain %s:// to %s, where it can be read on the way; use %s://"
    _log.warning(text, setting, scheme, where, _SECURED[scheme])
