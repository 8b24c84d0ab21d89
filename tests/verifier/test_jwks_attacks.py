"""Keys over HTTP under attack, beside a fetch that hangs, and from servers that lie about what they send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.verifier.http_server import JwksServer, drip, patient, raw_server
from tests.verifier.support import AUDIENCE, ISSUER, live_token, members, until
from verifier import ConfigurationError, InvalidToken, Undecidable, Verifier
from verifier.jwks_client import JwksClient
from verifier.limits import JWKS_BYTES_MAX, JWKS_COOLDOWN_S, UNKNOWN_KID_WAITERS_MAX
from verifier.testing import SigningKey, StaticKeys, b64url

__all__ = ["patient"]


@pytest.fixture
def serve() -> Iterator[Callable[..., JwksServer]]:
    with contextlib.ExitStack() as stack:

        def make(*keys: SigningKey) -> JwksServer:
            server = JwksServer(*keys)
            stack.callback(server.close)
            return server

        yield make


def verifier_of(*urls: str, **settings: Any) -> Verifier:
    defaults: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "redis_url": None}
    return Verifier(**{**defaults, "jwks_urls": urls, **settings})


def forged(number: int) -> str:
    """A token of just now with a kid of its own and a signature of the right size, made without signing."""
    now = int(time.time())
    header = b64url(json.dumps({"alg": "RS256", "kid": f"forged-{number}"}).encode())
    return f"{header}.{b64url(json.dumps(members(iat=now, exp=now + 900)).encode())}.{b64url(bytes(256))}"


def outcome(verifier: Verifier, token: str) -> str:
    try:
        verifier.verify(token)
    except (InvalidToken, Undecidable) as error:
        return error.code
    return "valid"


# -- forged kids -----------------------------------------------------------------------------------------------------


def test_many_thousands_of_forged_kids_cost_two_fetches_a_cooldown_and_hold_back_no_known_key(
    key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    good = live_token(key)
    with verifier_of(server.url, token_cache_size=0) as verifier:
        assert verifier.wait_ready(60)
        started, codes, verified = time.monotonic(), set(), 0
        for number in range(20_000):
            codes.add(outcome(verifier, forged(number)))
            if number % 10 == 0:
                assert verifier.verify(good)
                verified += 1
        elapsed_s = time.monotonic() - started
        fetches = len(server.requests)
        assert verified == 2_000
        assert codes <= {"keys_behind", "kid_unknown"}  # the latter for those older than the publication lag
        assert fetches <= 1 + 2 * (elapsed_s / JWKS_COOLDOWN_S + 1)


def test_forged_kids_from_many_threads_hold_a_bounded_number_of_them(
    key: SigningKey, serve: Callable[..., JwksServer], patient: None
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        client = verifier._issuers[0].client
        assert client is not None
        server.gate.clear()
        waiting = [threading.Thread(target=client.refresh, args=(600,)) for _ in range(UNKNOWN_KID_WAITERS_MAX)]
        for thread in waiting:
            thread.start()
        try:
            until(lambda: client._waiting == UNKNOWN_KID_WAITERS_MAX, "as many as may wait do")
            until(lambda: len(server.requests) == 2, "the fetch hangs")
            client.refresh(3_600)  # comes back at once, although the fetch hangs
            assert outcome(verifier, forged(1)) == "keys_behind"
            assert len(server.requests) == 2
            assert client._waiting == UNKNOWN_KID_WAITERS_MAX
        finally:
            server.gate.set()
            for thread in waiting:
                thread.join()
        assert client._waiting == 0


def test_a_fresh_key_is_accepted_although_forged_kids_used_the_budget_up(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        assert outcome(verifier, forged(0)) == "keys_behind"
        assert outcome(verifier, forged(1)) == "keys_behind"
        asked = len(server.requests)
        server.serve_keys(key, other_key)
        until(lambda: other_key.kid in verifier.status().keys, "the fetch that was asked for is made up for, unasked")
        assert verifier.verify(live_token(other_key))
        assert len(server.requests) <= asked + 2


def test_a_caller_waits_for_a_fetch_that_starts_within_its_time(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.keys.JWKS_COOLDOWN_S", 1.0)
    monkeypatch.setattr("verifier.verifier.UNKNOWN_KID_WAIT_S", 60.0)
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        assert outcome(verifier, forged(0)) == "keys_behind"  # both attempts of this cooldown are made
        server.serve_keys(key, other_key)
        assert verifier.verify(live_token(other_key))


# -- nothing is locked over HTTP -------------------------------------------------------------------------------------


def test_known_keys_verify_while_a_fetch_hangs(
    key: SigningKey, serve: Callable[..., JwksServer], patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.verifier.UNKNOWN_KID_WAIT_S", 0.1)
    server = serve(key)
    tokens = [live_token(key, jti=str(number)) for number in range(50)]
    with verifier_of(server.url, token_cache_size=0) as verifier:
        assert verifier.wait_ready(60)
        server.gate.clear()
        try:
            assert outcome(verifier, forged(0)) == "keys_behind"
            until(lambda: len(server.requests) == 2, "its fetch hangs from here on")
            slow = 0
            for number in range(1_000):
                started = time.monotonic()
                assert verifier.verify(tokens[number % 50])
                slow += time.monotonic() - started > 0.05
            assert slow < 500  # as a rule far below, whatever the machine does meanwhile
            assert verifier.status().keys == (key.kid,)
            assert len(server.requests) == 2
        finally:
            server.gate.set()


def test_a_fetch_thread_that_hangs_beyond_close_neither_runs_on_nor_overwrites_newer_keys(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(key)
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 60.0)
    server.gate.clear()
    client = JwksClient([server.url])
    client.start()
    until(lambda: len(server.requests) == 1, "the first fetch hangs")
    old = client._thread
    assert old is not None
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", -1.0)
    client.close()  # does not wait
    assert old.is_alive()
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 60.0)
    newer = serve(other_key)
    client._urls = (newer.url,)
    client.start()
    try:
        assert client.wait_ready(60)
        server.gate.set()
        old.join(60)
        assert not old.is_alive()
        assert client.view.keys is not None
        assert client.view.keys.kids == (other_key.kid,)
        assert len(server.requests) == 1
        assert sum(thread.name == "verifier-jwks" for thread in threading.enumerate()) == 1
    finally:
        client.close()


# -- servers that lie ------------------------------------------------------------------------------------------------


def answer_of(head: str, body: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)


def document(*keys: SigningKey) -> bytes:
    return json.dumps(StaticKeys(*keys).jwks).encode()


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: {less}",
        "Content-Length: {more}",
        "Content-Length: -1",
        "Content-Length: x",
        "Content-Length: {size}\r\nContent-Length: {less}",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked",  # it is not
        "Transfer-Encoding: gzip\r\nContent-Length: {size}",
        "Content-Encoding: br\r\nContent-Length: {size}",
        "Content-Encoding: identity, gzip\r\nContent-Length: {size}",
        "Trust-Generation: 1-\r\nContent-Length: {size}",
        "Trust-Generation: -1-5\r\nContent-Length: {size}",
    ],
)
def test_a_server_that_lies_about_what_it_sends_brings_no_keys(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], patient: None, head: str
) -> None:
    good, lie = serve(key), document(other_key)
    head = head.format(size=len(lie), less=len(lie) - 1, more=len(lie) + 1)
    with raw_server(answer_of(head, lie)) as url, verifier_of(url, good.url) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.status().keys == (key.kid,)
        assert verifier.status().counters["fetch_errors"] == 1


@pytest.mark.parametrize("kind", ["text/html", "application/json", "application/octet-stream", "", "image/png"])
def test_what_a_set_is_called_does_not_matter_only_what_it_is(
    key: SigningKey, serve: Callable[..., JwksServer], kind: str
) -> None:
    server = serve(key)
    server.headers = {"Content-Type": kind}
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.verify(live_token(key))


def test_a_body_that_ends_with_the_connection_is_read_and_a_chunked_one_too(
    key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    body = document(key)
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:])) + b"0\r\n\r\n"
    for answer in (answer_of("Connection: close", body), answer_of("Transfer-Encoding: chunked", chunked)):
        with raw_server(answer) as url, verifier_of(url) as verifier:
            assert verifier.wait_ready(60)
            assert verifier.verify(live_token(key))


def test_the_largest_document_is_read_also_when_it_drips_in(key: SigningKey) -> None:
    body = document(key)
    body += b" " * (JWKS_BYTES_MAX - len(body))

    def answer(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        drip(connection, body[:5], pause_s=0.01)
        connection.sendall(body[5:])

    with raw_server(answer) as url, verifier_of(url) as verifier:
        assert verifier.wait_ready(60)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed_also_when_nothing_else_has_keys(
    key: SigningKey, serve: Callable[..., JwksServer], status: int
) -> None:
    elsewhere, server = serve(key), serve(key)
    server.status = status
    server.headers = {"Location": elsewhere.url, "Refresh": f"0; url={elsewhere.url}"}
    with verifier_of(server.url) as verifier:
        until(lambda: verifier.status().counters.get(f"fetch_status_{status}"), "a failed attempt")
        assert outcome(verifier, live_token(key)) == "keys_unavailable"
        assert elsewhere.requests == []


def test_an_older_generation_from_the_same_server_does_not_take_a_key_back(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key, other_key)
    server.headers = {"Trust-Generation": "7-3", "ETag": '"new"'}
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.serve_keys(key)
        server.headers = {"Trust-Generation": "7-2", "ETag": '"old"'}
        assert outcome(verifier, forged(0)) == "keys_behind"
        until(lambda: verifier.status().counters.get("fetch_generation_older"), "named")
        assert verifier.verify(live_token(other_key))
        assert verifier.status().generation == "7-3"


def test_servers_that_take_turns_at_failing_give_keys_in_the_end(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.keys.JWKS_COOLDOWN_S", 0.1)
    monkeypatch.setattr("verifier.keys.JWKS_MAX_AGE_FLOOR_S", 0.05)
    one, two = serve(key), serve(key)
    for server in (one, two):
        server.headers = {"Cache-Control": "max-age=0"}
    stop = threading.Event()

    def flap() -> None:
        while not stop.wait(0.02):
            one.status, two.status = (200, 503) if one.status == 503 else (503, 200)

    flapping = threading.Thread(target=flap)
    flapping.start()
    try:
        with verifier_of(one.url, two.url) as verifier:
            assert verifier.wait_ready(60)
            for server in (one, two):
                server.serve_keys(other_key)
            until(lambda: verifier.status().keys == (other_key.kid,), "the next set, unasked")
            assert verifier.verify(live_token(other_key))
    finally:
        stop.set()
        flapping.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1\n/", "https://a\tb/", "https://\ud800/", "https://xn--\u00e9/"])
def test_an_impossible_address_is_refused_or_a_failed_attempt_and_never_a_mistake(url: str) -> None:
    try:
        verifier = verifier_of(url)
    except ConfigurationError:
        return
    with verifier:
        until(lambda: verifier.status().counters.get("fetch_errors"), "a failed attempt")
        assert "failures" not in verifier.status().counters
