"""Where JWK sets come from: one request over HTTP, or one reading of a file. Each answers with a ``Fetched``.

Nothing here decides or remembers: the caller says what it holds (``etag``) and how long it may take. Whatever goes
wrong is a :class:`~verifier.jwk.JwksError` with a short, stable reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self
from urllib.parse import urlsplit

from .jwk import JwksError
from .keys import Fetched
from .limits import JWKS_BYTES_MAX, JWKS_FILE_MAX_AGE_S
from .log import FormatError, Generation

if TYPE_CHECKING:
    import httpx

__all__ = ["FileSource", "HttpSource", "Source", "open_sources"]

_HEADERS: Final = {
    "Accept": "application/jwk-set+json, application/json",
    "Accept-Encoding": "identity",  # a set is small, and a compressed one may be large
    "User-Agent": "multiregion-jwks-verifier",
}
_MAX_AGE: Final = re.compile(r"(?:^|[,\s])max-age=([0-9]{1,9})(?:[,\s]|$)", re.IGNORECASE)


class Source(Protocol):
    """One place to ask. ``timeout_s`` is for all of it; raises :class:`JwksError`."""

    def get(self, etag: str | None, timeout_s: float) -> Fetched:
        """What is there now; ``body`` None if that is still what ``etag`` stands for."""


def open_sources(
    stack: contextlib.ExitStack, urls: Sequence[str], *, source_address: str | None, timeout_s: float
) -> list[Source]:
    """The sources of checked URLs; what they hold open is closed with ``stack``."""
    if not any(url.startswith("http") for url in urls):
        return [FileSource(url) for url in urls]
    import httpx

    one_shot = httpx.Limits(max_keepalive_connections=0)  # fetches are minutes apart
    client = stack.enter_context(
        httpx.Client(
            transport=httpx.HTTPTransport(local_address=source_address, retries=0, limits=one_shot),
            timeout=timeout_s,
            follow_redirects=False,
            trust_env=False,
            headers=_HEADERS,
        )
    )
    return [HttpSource(client, url) for url in urls]


# -- a file ----------------------------------------------------------------------------------------------------------


class FileSource:
    """A JWK set in a file, replaced as a whole (written beside it, then renamed over it).

    Its place, size and times stand for an ETag, so that an unchanged file is not read again.
    """

    def __init__(self, url: str) -> None:
        from urllib.request import url2pathname  # slow to import, and few read a file

        self._path = url2pathname(urlsplit(url).path)

    def get(self, etag: str | None, timeout_s: float) -> Fetched:
        """Read it, if it is another one than ``etag`` stands for; raises :class:`JwksError`."""
        del timeout_s
        try:
            # O_NONBLOCK: what is not a file, such as a pipe, is told from one instead of waited for
            descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                seen, body = _read(descriptor, etag)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise JwksError("file_missing") from None
        except PermissionError:
            raise JwksError("file_not_permitted") from None
        except OSError:
            raise JwksError("file_unreadable") from None
        if body is not None and len(body) > JWKS_BYTES_MAX:
            raise JwksError("too_large")
        return Fetched(body, etag=seen, max_age_s=JWKS_FILE_MAX_AGE_S)


def _read(descriptor: int, etag: str | None) -> tuple[str, bytes | None]:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise JwksError("file_is_none")
    seen = f"{found.st_dev}.{found.st_ino}.{found.st_size}.{found.st_mtime_ns}.{found.st_ctime_ns}"
    if seen == etag:
        return seen, None
    with open(descriptor, "rb", closefd=False) as file:
        body = file.read(JWKS_BYTES_MAX + 1)
    after = os.fstat(descriptor)
    if (after.st_size, after.st_mtime_ns) != (found.st_size, found.st_mtime_ns):  # rewritten in place
        raise JwksError("file_changed_while_read")
    return seen, body


# -- HTTP ------------------------------------------------------------------------------------------------------------


class HttpSource:
    """A JWK set over HTTP. Redirects are refused, bodies are capped, and time is bounded as a whole."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url

    def get(self, etag: str | None, timeout_s: float) -> Fetched:
        """One request; raises :class:`JwksError`."""
        import httpx

        try:
            return self._get({} if etag is None else {"If-None-Match": etag}, time.monotonic() + timeout_s)
        except httpx.TimeoutException:
            raise JwksError("timeout") from None
        except httpx.HTTPError:
            raise JwksError("unreachable") from None
        except (httpx.InvalidURL, UnicodeError):  # an address that only httpx finds impossible
            raise JwksError("url_invalid") from None

    def _get(self, headers: dict[str, str], deadline_mono: float) -> Fetched:
        with (
            _Deadline(deadline_mono - time.monotonic()) as deadline,
            self._client.stream("GET", self._url, headers=headers, extensions={"trace": deadline.trace}) as response,
        ):
            if response.status_code not in (200, 304):
                raise JwksError(f"status_{response.status_code}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise JwksError("content_encoding")
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > JWKS_BYTES_MAX:
                    raise JwksError("too_large")
        sent_etag = response.headers.get("ETag", "")
        return Fetched(
            body=bytes(body) if response.status_code == 200 else None,
            etag=sent_etag if sent_etag.isascii() and sent_etag.isprintable() and sent_etag else None,
            max_age_s=_max_age_s(response.headers.get("Cache-Control", "")),
            generation=_generation(response.headers.get("Trust-Generation")),
        )


class _Deadline:
    """Ends one exchange when its time is over, however steadily the server drips: httpx bounds each read alone."""

    def __init__(self, timeout_s: float) -> None:
        self._socket: socket.socket | None = None
        self._over = False
        self._timer = threading.Timer(max(0.0, timeout_s), self._expire)
        self._timer.daemon = True

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore for each step."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
        if self._over:
            self._expire()

    def _expire(self) -> None:
        self._over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._over and error is not None:
            raise JwksError("too_slow") from None


def _max_age_s(cache_control: str) -> float | None:
    """``max-age`` of a Cache-Control header (RFC 9111 section 5.2.2.1), or None."""
    match = _MAX_AGE.search(cache_control)
    return float(match[1]) if match else None


def _generation(header: str | None) -> Generation | None:
    if header is None:
        return None
    try:
        return Generation.parse(header)
    except FormatError:
        raise JwksError("generation_malformed") from None
