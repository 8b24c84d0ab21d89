"""The shell around a key service's ``GET /revocations/feed``: a mirror for services that have no Redis.

The server hands on what its region's replica shows, as server-sent events, and judges nothing: gaps, epochs and
freshness are decided here by the same code as over Redis (:mod:`verifier.mirroring`).

    event     data                                               what it means here
    -------   ------------------------------------------------   ------------------------------------------------
    begin     beat, epoch, meta, last_id, length                 the log from its first entry follows
    resume    the same                                           what follows the position that was asked for
    reset     reason                                             that position is not in the log; begin follows
    meta      meta                                               it changed, and stood beside the entries that follow
    entries   [[stream id, fields], …]                           in the log's order
    round     as begin; epoch and meta only if they changed      read after every entry sent before it
    end       reason                                             the server ends the stream, by name

The first round after ``begin`` says that the log has been sent whole. A stream on which nothing comes, not even a
comment, for :data:`~verifier.limits.FEED_READ_TIMEOUT_S` is lost; the next one goes on from the position.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .feed_tokens import FeedError, FeedTokens
from .jwks_client import import_httpx
from .limits import FEED_CONNECT_TIMEOUT_S, FEED_EVENT_BYTES_MAX, FEED_READ_TIMEOUT_S, FEED_TOKEN_REPLY_BYTES_MAX
from .log import Epoch, FormatError, Meta
from .log import parse_stream_id as _stream_id
from .mirroring import LogState, MirrorThread, NotReady
from .reader import Raw, Reader, Reread
from .sse import Event, EventParser, EventTooLong

if TYPE_CHECKING:
    import httpx

__all__ = ["FeedMirror"]

_log: Final = logging.getLogger("verifier.feed")
_HEADERS: Final = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "identity",
    "Cache-Control": "no-store",
    "User-Agent": "multiregion-jwks-verifier",
}
_CODE: Final = re.compile(r"[a-z][a-z_]{0,39}\Z")
_ABSENT: Final = "trust_log_absent"
RESETS: Final = frozenset({"rewind", "nonce", "trimmed", "position"})
"""Why a server cannot go on from a position: reasons that may label a counter."""


class _StateData(msgspec.Struct):
    last_id: str
    beat: dict[str, str] = {}
    epoch: dict[str, str] | None = None
    meta: dict[str, str] | None = None
    length: int | None = None


class _MetaData(msgspec.Struct):
    meta: dict[str, str]


class _Reason(msgspec.Struct):
    reason: str = ""


class FeedMirror(MirrorThread):
    """Mirrors the trust log through a key service: the first of ``urls`` that answers, the next when it is lost.

    Times as for :class:`~verifier.replica.ReplicaMirror`. ``tokens`` gives what is shown to the server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokens: FeedTokens,
        *,
        source_address: str | None = None,
        max_skew_s: float = 5.0,
        drop_grace_s: float = 300.0,
        max_token_lifetime_s: float = 0.0,
    ) -> None:
        self._urls = tuple(urls)
        self._tokens = tokens
        self._source_address = source_address
        self._following: Reader | None = None
        self._complete = False
        self._socket: socket.socket | None = None
        self._token_ended = False
        self._fruitless = 0
        self._epoch: Epoch | None = None
        self._meta: Meta | None = None
        super().__init__(
            max_skew_s=max_skew_s,
            drop_grace_s=drop_grace_s,
            max_token_lifetime_s=max_token_lifetime_s,
            nodes=len(self._urls),
            name="verifier-feed",
            join_s=FEED_CONNECT_TIMEOUT_S + FEED_READ_TIMEOUT_S,
        )
        self._handlers: dict[str, Callable[[bytes], None]] = {
            "begin": self._on_begin,
            "resume": self._on_resume,
            "reset": self._on_reset,
            "meta": self._on_meta,
            "entries": self._on_entries,
            "round": self._on_round,
            "end": self._on_end,
        }

    def start(self) -> None:
        """Start the thread; does nothing if it runs."""
        import_httpx()
        super().start()

    def close(self) -> None:
        """Stop the thread and its connection, also one on which nothing comes."""
        self._closing.set()
        self._hang_up()
        super().close()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection, without a word on it."""
        super().abandon()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()

    def _hang_up(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore for each step."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._closing.is_set():
                self._hang_up()

    # -- one session --------------------------------------------------------------------------------------------------

    def _session(self, node: int) -> None:
        import httpx

        transport = httpx.HTTPTransport(local_address=self._source_address, retries=0)
        timeout = httpx.Timeout(FEED_READ_TIMEOUT_S, connect=FEED_CONNECT_TIMEOUT_S)
        self._tolerant, self._fruitless = False, 0
        with httpx.Client(
            transport=transport, timeout=timeout, follow_redirects=False, trust_env=False, headers=_HEADERS
        ) as client:
            while not self._closing.is_set():
                try:
                    self._stream(client, self._urls[node])
                except httpx.HTTPError:
                    if not self._closing.is_set():
                        raise
                except Reread as reread:
                    self._pause(self._fruitless)
                    self._fruitless += 1
                    self._reread(reread.reason)

    def _stream(self, client: httpx.Client, url: str) -> None:
        """Follow one stream until closing or until its token is to be renewed; raises whatever else ends it."""
        headers = {"Authorization": f"Bearer {self._tokens.get(client)}"}
        if self._reader is not None and self._reader.position is not None:
            headers["Last-Event-ID"] = str(self._reader.position)
        self._following, self._complete, self._token_ended = None, False, False
        self._epoch, self._meta = None, None
        with client.stream("GET", url, headers=headers, extensions={"trace": self._trace}) as response:
            self._check(response)
            for event in self._events(response):
                handler = self._handlers.get(event.name)
                if handler is not None:  # what a newer server may say besides
                    handler(event.data)
                if self._closing.is_set() or self._token_ended or self._tokens.is_due():
                    return
        if not self._closing.is_set():
            raise FeedError("feed_ended")

    def _events(self, response: httpx.Response) -> Iterator[Event]:
        parser = EventParser(FEED_EVENT_BYTES_MAX)
        for chunk in response.iter_raw():
            if self._closing.is_set():
                return
            try:
                yield from parser.feed(chunk)
            except EventTooLong:
                raise FeedError("feed_event_too_long") from None
            except UnicodeDecodeError:
                raise FeedError("feed_garbage") from None

    def _check(self, response: httpx.Response) -> None:
        """Raises :class:`FeedError` unless this is the stream that was asked for."""
        status = response.status_code
        if status == 401:
            self._tokens.refused()
            raise FeedError("wrong_credentials")
        if status == 503:
            reason = _problem_code(response)
            raise self._absent() if reason == _ABSENT else FeedError(reason)
        if status != 200:
            named = {403: "no_permission", 404: "feed_not_found"}
            raise FeedError("redirected" if response.is_redirect else named.get(status, "feed_refused"))
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream" or response.headers.get("Content-Encoding", "identity") != "identity":
            raise FeedError("feed_garbage")

    def _problem_of(self, error: Exception) -> str | None:
        import httpx

        if isinstance(error, FeedError):
            return error.code
        if isinstance(error, NotReady):
            return "no_trust_log"
        if isinstance(error, FormatError):
            return "format"
        if isinstance(error, httpx.TimeoutException):
            return "timeout"
        return "unreachable" if isinstance(error, httpx.HTTPError | OSError) else None

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_begin(self, data: bytes) -> None:
        self._update(connection="reading")
        self._give_up_reader()
        self._following, self._complete = self._begin(self._state(data)), False

    def _on_resume(self, data: bytes) -> None:
        self._following, self._complete = self._resume(self._state(data)), True

    def _on_reset(self, data: bytes) -> None:
        reason = _decode(data, _Reason).reason
        self._reread(reason if reason in RESETS else "reset")

    def _on_meta(self, data: bytes) -> None:
        self._meta = Meta.decode(_bytes(_decode(data, _MetaData).meta))
        self._started().beside(self._meta)

    def _on_entries(self, data: bytes) -> None:
        batch: list[Raw] = [
            (stream_id.encode(), _bytes(fields))
            for stream_id, fields in _decode(data, list[tuple[str, dict[str, str]]])
        ]
        self._apply(self._started(), batch)

    def _on_round(self, data: bytes) -> None:
        reader, state = self._started(), self._state(data)
        if not self._complete:
            self._end(reader)
            self._complete = True
        self._round(reader, state)
        self._fruitless = 0

    def _on_end(self, data: bytes) -> None:
        reason = _decode(data, _Reason).reason
        if reason == _ABSENT:
            raise self._absent()
        if reason == "token_expired":
            self._tokens.refused()
            self._token_ended = True
            return
        raise FeedError(reason if _CODE.match(reason) else "feed_ended")

    def _started(self) -> Reader:
        if self._following is None:
            raise FeedError("feed_garbage")
        return self._following

    def _state(self, data: bytes) -> LogState:
        """Epoch and meta are sent when they changed."""
        sent = _decode(data, _StateData)
        if sent.epoch is not None:
            self._epoch = Epoch.decode(_bytes(sent.epoch))
        if sent.meta is not None:
            self._meta = Meta.decode(_bytes(sent.meta))
        if self._epoch is None or self._meta is None:
            raise FeedError("feed_garbage")
        return LogState(
            self._epoch, self._meta, self._beat_of(_bytes(sent.beat)), _stream_id(sent.last_id), sent.length
        )


def _bytes(fields: Mapping[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in fields.items()}


def _decode(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError:
        raise FeedError("feed_garbage") from None


def _problem_code(response: httpx.Response) -> str:
    """The ``code`` of a problem document (RFC 9457), if it looks like one."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > FEED_TOKEN_REPLY_BYTES_MAX:
            break
    with contextlib.suppress(msgspec.DecodeError):
        code = msgspec.json.decode(body, type=dict[str, Any]).get("code")
        if isinstance(code, str) and _CODE.match(code):
            return code
    return "feed_unavailable"
