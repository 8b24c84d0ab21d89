"""What only a mirror over the feed has: its stream, its tokens, and a server that may be slow, wrong or hostile."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import redis

from keyservice.bearer import BearerRefused
from tests.verifier.feed_server import GOOD, FeedServer, feeding
from tests.verifier.http_server import drip, free_port, raw_server
from tests.verifier.mirrors import (
    Heard,
    client,
    holds,
    module_dir,
    over_feed,
    primary,
    reaches,
    server,
    shared_server,
    short_rounds,
    staleness,
    started,
)
from tests.verifier.support import NONCE_2, until
from tests.verifier.valkey import Primary, Server, command, live, running
from verifier.feed import FeedMirror
from verifier.feed_tokens import ClientCredentials, FeedError, GivenToken
from verifier.limits import FEED_EVENT_BYTES_MAX, FEED_TOKEN_REPLY_BYTES_MAX
from verifier.log import LOG_KEY
from verifier.mirroring import MirrorThread

__all__ = ["client", "module_dir", "primary", "server", "shared_server", "short_rounds"]

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
BEGIN = b'event: begin\ndata: {"last_id":"1-0","epoch":{},"meta":{}}\n\n'


@pytest.fixture
def feed(server: Server) -> Iterator[FeedServer]:
    with feeding(server) as made:
        yield made


def named(mirror: MirrorThread, problem: str) -> None:
    until(lambda: mirror.view.problem == problem, f"{problem} is named, not {mirror.view.problem}")


def asked_from(feed: FeedServer) -> list[str | None]:
    return [headers.get("last-event-id") for headers in feed.requests]


def read_events(feed: FeedServer, count: int, last_event_id: str | None = None) -> list[tuple[str, str, Any]]:
    """The first events of a stream, as any client of server-sent events sees them: id, name, data."""
    headers = {"Authorization": f"Bearer {GOOD}"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    with httpx.stream("GET", feed.url, headers=headers, trust_env=False, timeout=60) as response:
        assert response.status_code == 200
        found, event = [], {"id": "", "event": "", "data": ""}
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name in event:
                event[name] = value
            elif not line and event["event"]:
                found.append((event["id"], event["event"], json.loads(event["data"])))
                event = {"id": "", "event": "", "data": ""}
                if len(found) == count:
                    break
    return found


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_stopped_key_service_is_named_and_then_resumed_from_the_position(feed: FeedServer, primary: Primary) -> None:
    primary.append(*live("jti", ["a"]))
    heard = Heard()
    with over_feed(feed, heard) as mirror:
        reaches(mirror, primary.position)
        was = primary.position
        feed.stop()
        until(lambda: mirror.view.problem is not None, "the loss is noticed")
        assert holds(mirror, "a")
        primary.append(*live("jti", ["b"]))
        feed.start()
        reaches(mirror, primary.position)
        assert holds(mirror, "b")
        assert (mirror.counters["entries_read"], mirror.counters["rereads"]) == (3, 0)
        assert mirror.view.problem is None
    assert asked_from(feed)[0] is None
    assert asked_from(feed)[-1] == was
    assert heard.calls.count("begin") == 1
    assert feed.ends("shutting_down") == 1


@pytest.mark.parametrize("how", ["rewind", "nonce", "trimmed", "position"])
def test_a_position_that_is_not_in_the_log_is_reset_by_name_and_the_log_sent_whole(
    feed: FeedServer, primary: Primary, client: redis.Redis, how: str
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    asked = {"rewind": f"1-9.{primary.nonce}", "nonce": f"1-1.{NONCE_2}", "position": "7"}.get(how, primary.position)
    if how == "trimmed":
        primary.open_epoch(2, NONCE_2)
        primary.set_meta(incarnation="first", trimmed_to="2-0")
    events = read_events(feed, 3, asked)
    assert [(name, data) for _, name, data in events[:1]] == [("reset", {"reason": how})]
    assert [name for _, name, _ in events[1:]] == ["begin", "entries"]
    assert [entry_id for entry_id, _ in events[2][2]][:2] == ["1-0", "1-1"]


def test_events_name_positions_and_a_client_goes_on_from_the_last_one(feed: FeedServer, primary: Primary) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    first = read_events(feed, 3)
    assert [name for _, name, _ in first] == ["begin", "entries", "round"]
    assert first[1][0] == primary.position
    assert [name for _, name, _ in read_events(feed, 2, first[1][0])] == ["resume", "round"]
    again = read_events(feed, 2, f"1-1.{primary.nonce}")
    assert [entry_id for entry_id, _ in again[1][2]] == ["1-2", "1-3"]


def test_a_mirror_that_was_away_while_the_log_was_replaced_reads_it_whole_and_unites(
    feed: FeedServer, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a", "b"]))
    with over_feed(feed) as mirror:
        reaches(mirror, primary.position)
        feed.stop()
        client.flushall()
        other = Primary(client, number=1, nonce=NONCE_2)
        other.append(*live("jti", ["c", "d", "e"]))
        feed.start()
        reaches(mirror, other.position)
        assert [holds(mirror, jti) for jti in "abcde"] == [True] * 5
        assert mirror.counters["reread_nonce"] == 1


def test_a_log_that_is_rewound_under_a_stream_ends_it_by_name(
    feed: FeedServer, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    with over_feed(feed) as mirror:
        reaches(mirror, primary.position)
        primary.remove(2, 3)
        until(lambda: mirror.counters["reread_rewind"] > 0, "rewind")
        assert feed.ends("log_changed") == 1
        assert [holds(mirror, jti) for jti in "abc"] == [True] * 3


# -- many, and slow ones ---------------------------------------------------------------------------------------------


def test_many_consumers_cost_the_replica_one_reader(feed: FeedServer, primary: Primary, client: redis.Redis) -> None:
    with contextlib.ExitStack() as stack:
        mirrors = [stack.enter_context(over_feed(feed)) for _ in range(20)]
        for mirror in mirrors:
            reaches(mirror, primary.position)
        assert feed.consumers() == 20

        def blocked() -> int:
            return sum(b"cmd=xread" in line for line in command(client, "CLIENT", "LIST").splitlines())

        assert max(blocked() for _ in range(50)) <= 1
        primary.append(*live("jti", ["a"]))
        primary.beat()
        for mirror in mirrors:
            until(lambda m=mirror: holds(m, "a") and staleness(m).fresh, "told")  # type: ignore[misc]
    until(lambda: feed.consumers() == 0, "gone")


def test_a_slow_consumer_is_dropped_by_name_and_the_others_are_served(
    feed: FeedServer, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyservice.feed.FEED_QUEUE_BYTES_MAX", 100_000)
    request = f"GET /revocations/feed HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {GOOD}\r\n\r\n".encode()
    port = int(feed.url.split(":")[2].split("/")[0])
    with socket.socket() as slow, over_feed(feed) as mirror:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(request)
        reaches(mirror, primary.position)
        until(lambda: feed.consumers() == 2, "both are fed")
        for number in itertools.count():
            primary.append(*live("jti", [f"{number}-{n}" for n in range(100)]))
            until(lambda: str(mirror.view.position) == primary.position, "the other one is served")
            if feed.ends("slow_consumer"):
                break
        # it takes in what was on its way, and then hears why there is no more
        slow.settimeout(60)
        taken = b""
        while b"slow_consumer" not in taken[-200:]:
            chunk = slow.recv(65_536)
            assert chunk, "it was not told"
            taken += chunk
        assert feed.ends("slow_consumer") == 1
        assert mirror.counters["disconnects"] == 0


def test_one_consumer_too_many_is_refused_by_name(
    feed: FeedServer, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyservice.feed.FEED_CONSUMERS_MAX", 1)
    with over_feed(feed) as first:
        reaches(first, primary.position)
        with over_feed(feed) as second:
            named(second, "feed_full")
        reaches(first, primary.position)


# -- its replica -----------------------------------------------------------------------------------------------------


def test_a_replica_that_is_lost_is_named_and_the_mirror_goes_on_ageing(run_dir: Any) -> None:
    with running(run_dir) as server, feeding(server) as feed:
        with server.client() as client:
            primary = Primary(client)
            primary.append(*live("jti", ["a"]))
            primary.beat()
        with over_feed(feed) as mirror:
            until(lambda: staleness(mirror).fresh, "fresh")
            server.stop()
            named(mirror, "replica_unreachable")
            assert holds(mirror, "a")
            age = staleness(mirror).seconds or 0.0
            until(lambda: (staleness(mirror).seconds or 0.0) > age, "ageing")
            server.start()
            with server.client() as client:
                primary.client = client
                primary.append(*live("jti", ["b"]))
            reaches(mirror, primary.position)
            assert (holds(mirror, "b"), mirror.counters["rereads"]) == (True, 0)


def test_a_replica_without_a_log_is_told_apart_from_one_that_is_lost(
    feed: FeedServer, primary: Primary, client: redis.Redis
) -> None:
    heard = Heard()
    with over_feed(feed, heard) as mirror:
        reaches(mirror, primary.position)
        client.delete(LOG_KEY)
        named(mirror, "no_trust_log")
    assert heard.calls[-1] == "absent"


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_that_is_refused_is_named(feed: FeedServer, primary: Primary) -> None:
    with started(FeedMirror([feed.url], GivenToken("another"))) as mirror:
        named(mirror, "wrong_credentials")
    feed.bearer.refusal = BearerRefused("insufficient_scope", "the token lacks the scope", status=403)
    with over_feed(feed) as mirror:
        named(mirror, "no_permission")
        assert not mirror.view.freshness.synced


def test_a_stream_ends_when_its_token_does_and_goes_on_with_a_new_one(
    feed: FeedServer, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyservice.feed.FEED_RECHECK_S", 0.05)
    asked = []

    def token() -> str:
        asked.append(1)
        feed.bearer.refusal = None
        return GOOD

    with started(FeedMirror([feed.url], GivenToken(token))) as mirror:
        reaches(mirror, primary.position)
        feed.bearer.refusal = BearerRefused("token_expired", "exp is past", status=401)
        until(lambda: len(asked) == 2, "asked again")
        primary.append(*live("jti", ["a"]))
        until(lambda: holds(mirror, "a"), "goes on")
        assert (mirror.counters["disconnects"], mirror.counters["entries_read"]) == (0, 2)


def test_a_revoked_token_ends_its_stream(feed: FeedServer, primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyservice.feed.FEED_RECHECK_S", 0.05)
    with over_feed(feed) as mirror:
        reaches(mirror, primary.position)
        feed.bearer.refusal = BearerRefused("token_revoked", "revoked", status=401)
        until(lambda: feed.ends("token_revoked") == 1, "ended")
        named(mirror, "wrong_credentials")


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ü", 7, None])
def test_what_is_no_token_is_sent_nowhere(token: Any) -> None:
    with started(FeedMirror([f"http://127.0.0.1:{free_port()}/"], GivenToken(lambda: token))) as mirror:
        named(mirror, "token_unusable")


def test_a_function_that_fails_is_named_and_its_words_are_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    def token() -> str:
        raise RuntimeError("p4ssw0rd")

    with started(FeedMirror([f"http://127.0.0.1:{free_port()}/"], GivenToken(token))) as mirror:
        named(mirror, "token_unavailable")
    assert "p4ssw0rd" not in caplog.text


@contextlib.contextmanager
def token_server(*replies: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Answers in turn, the last one for ever; what was asked is in the list."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        listener.settimeout(0.02)
        while not closing.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(60)
                    got = b""
                    while b"grant_type" not in got:
                        more = connection.recv(65_536)
                        if not more:
                            raise ConnectionError
                        got += more
                    asked.append(got)
                    connection.sendall(replies[min(len(asked), len(replies)) - 1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/oauth2/token", asked
    finally:
        closing.set()
        thread.join()
        listener.close()


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status.encode(), len(body), body)


def token_reply(**members: Any) -> bytes:
    return reply(json.dumps({"access_token": GOOD, "token_type": "Bearer", "expires_in": 900, **members}).encode())


def test_client_credentials_are_renewed_before_the_token_ends(
    feed: FeedServer, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = SimpleNamespace(now=1_000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("verifier.feed_tokens.time", clock)
    with token_server(token_reply(expires_in=40), token_reply()) as (url, asked):
        tokens = ClientCredentials(url, "orders", "s3cret", "https://id.test/admin")
        with started(FeedMirror([feed.url], tokens)) as mirror:
            reaches(mirror, primary.position)
            clock.now += 19.9
            heard = mirror.view
            until(lambda: mirror.view is not heard, "another round")
            assert len(asked) == 1
            clock.now += 0.1
            until(lambda: len(asked) == 2, "renewed at half of its life")
            until(lambda: len(feed.requests) == 2, "a stream with the new token")
            primary.append(*live("jti", ["a"]))
            until(lambda: holds(mirror, "a"), "goes on")
            assert (mirror.counters["disconnects"], mirror.counters["rereads"]) == (0, 0)
        assert asked_from(feed)[-1] == f"1-0.{primary.nonce}"
    assert b"audience=https%3A%2F%2Fid.test%2Fadmin" in asked[0]
    assert b"scope=keyservice%3Arevocations%3Aread" in asked[0]


def test_a_token_that_the_feed_refuses_is_asked_for_anew(feed: FeedServer, primary: Primary) -> None:
    with token_server(token_reply(access_token="old"), token_reply()) as (url, asked):
        with started(FeedMirror([feed.url], ClientCredentials(url, "orders", "s3cret", None))) as mirror:
            reaches(mirror, primary.position)
        assert len(asked) == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (reply(b'{"error":"invalid_client"}', "401 Unauthorized"), "wrong_credentials"),
        (reply(b"", "503 Service Unavailable"), "token_unavailable"),
        (reply(b"", "307 Temporary Redirect"), "token_unavailable"),
        (reply(b"not json"), "token_unavailable"),
        (token_reply(access_token="two words"), "token_unusable"),
        (token_reply(padding="x" * FEED_TOKEN_REPLY_BYTES_MAX), "token_unavailable"),
    ],
)
def test_a_token_that_is_not_given_is_named(answer: bytes, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    with token_server(answer) as (url, _), httpx.Client(trust_env=False, timeout=60) as client:
        with pytest.raises(FeedError) as caught:
            ClientCredentials(url, "orders", "s3cret", None).get(client)
        assert caught.value.code == problem
        with started(FeedMirror([url], ClientCredentials(url, "orders", "s3cret", None))) as mirror:
            named(mirror, problem)
    assert "s3cret" not in caplog.text


# -- servers that are wrong or hostile -------------------------------------------------------------------------------


def says(text: bytes, then: threading.Event | None = None) -> Callable[[socket.socket], Any]:
    """A server that says this and hangs up, or waits."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(text)
        if then is not None:
            then.wait(120)

    return answer


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 0\r\n\r\n", "feed_garbage"),
        (OK.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), "feed_garbage"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "redirected"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "feed_not_found"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "feed_refused"),
        (b"HTTP/1.1 503 Oops\r\nContent-Length: 4\r\n\r\nnope", "feed_unavailable"),
        (b'HTTP/1.1 503 Oops\r\nContent-Length: 24\r\n\r\n{"code":"Not A Code \\" "}', "feed_unavailable"),
        (b"\x00\x01\x02 no http", "unreachable"),
        (OK, "feed_ended"),
        (OK + b"event: begin\ndata: nonsense\n\n", "feed_garbage"),
        (OK + b'event: begin\ndata: {"last_id":7}\n\n', "feed_garbage"),
        (OK + b'event: begin\ndata: {"last_id":"1-0"}\n\n', "feed_garbage"),
        (OK + BEGIN, "format"),
        (OK + b"event: entries\ndata: []\n\n", "feed_garbage"),
        (OK + b"event: b\xffgin\ndata: x\n\n", "feed_garbage"),
        (OK + b'event: end\ndata: {"reason":"shutting_down"}\n\n', "shutting_down"),
        (OK + b'event: end\ndata: {"reason":"Not A Code"}\n\n', "feed_ended"),
        (OK + b"data: " + b"x" * (FEED_EVENT_BYTES_MAX + 1), "feed_event_too_long"),
        (OK + b"data: x\n" * (FEED_EVENT_BYTES_MAX // 2 + 1), "feed_event_too_long"),
    ],
)
def test_what_is_no_feed_is_named_and_changes_nothing(
    text: bytes, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    with raw_server(says(text)) as url, started(FeedMirror([url], GivenToken(GOOD))) as mirror:
        named(mirror, problem)
        assert mirror.view.snapshot.entries == 0
        assert not mirror.view.freshness.synced
        assert mirror.counters["failures"] == 0
    assert GOOD not in caplog.text


def test_a_silent_stream_is_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.feed.FEED_READ_TIMEOUT_S", 0.2)
    silent = threading.Event()
    with raw_server(says(OK, then=silent)) as url:
        with started(FeedMirror([url], GivenToken(GOOD))) as mirror:
            named(mirror, "timeout")
        silent.set()


def test_closing_does_not_wait_for_a_silent_server() -> None:
    silent = threading.Event()
    with raw_server(says(OK + b": hello\n\n", then=silent)) as url:
        mirror = FeedMirror([url], GivenToken(GOOD))
        mirror.start()
        until(lambda: mirror._socket is not None, "connected")
        began = time.monotonic()
        mirror.close()
        assert time.monotonic() - began < 30  # the read time-out is 60 s here, and the server says nothing for longer
        assert mirror.view.connection == "closed"
        silent.set()


def test_comments_keep_a_stream_alive_and_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.feed.FEED_READ_TIMEOUT_S", 1.0)
    done = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(OK)
        drip(connection, b": " + b"x" * 40 + b"\n\n")
        done.set()

    with raw_server(answer) as url, started(FeedMirror([url], GivenToken(GOOD))) as mirror:
        assert done.wait(60)
        named(mirror, "feed_ended")
        assert mirror.view.snapshot.entries == 0


def test_the_next_feed_of_a_list_is_tried_and_read_from_the_start(feed: FeedServer, primary: Primary) -> None:
    primary.append(*live("jti", ["a"]))
    urls = [f"http://127.0.0.1:{free_port()}/", feed.url]
    with started(FeedMirror(urls, GivenToken(GOOD))) as mirror:
        reaches(mirror, primary.position)
        assert holds(mirror, "a")


def test_a_feed_is_read_from_the_source_address_that_is_set(feed: FeedServer, primary: Primary) -> None:
    mirror = FeedMirror([feed.url], GivenToken(GOOD), source_address="127.0.0.9")
    with started(mirror):
        reaches(mirror, primary.position)
        assert mirror._socket is not None
        assert mirror._socket.getsockname()[0] == "127.0.0.9"


def test_no_token_is_logged(feed: FeedServer, primary: Primary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="verifier"), over_feed(feed) as mirror:
        reaches(mirror, primary.position)
        feed.stop()
        until(lambda: mirror.counters["disconnects"] > 0, "lost")
    assert GOOD not in caplog.text + repr(mirror) + repr(mirror.view)
