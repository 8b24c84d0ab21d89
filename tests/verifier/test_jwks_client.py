"""Keys over HTTP (DESIGN 7), against real servers on loopback that are slow, huge, wrong, lying or gone."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from tests.verifier import vectors
from tests.verifier.http_server import JwksServer, drip, free_port, raw_server
from tests.verifier.support import AUDIENCE, ISSUER, SECRET, code_of, live_token, members, sign_segments, until
from verifier import InvalidToken, Undecidable, Verifier
from verifier.jwks_client import JwksClient
from verifier.limits import JWKS_BYTES_MAX
from verifier.log import Generation
from verifier.testing import SigningKey, StaticKeys, StaticRevocations, b64url


@pytest.fixture
def serve() -> Iterator[Callable[..., JwksServer]]:
    with contextlib.ExitStack() as stack:

        def make(*keys: SigningKey) -> JwksServer:
            server = JwksServer(*keys)
            stack.callback(server.close)
            return server

        yield make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not taken for a slow server."""
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter times, so that a test sees more than one cooldown."""
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 1.0)
    monkeypatch.setattr("verifier.keys.JWKS_COOLDOWN_S", 0.2)


def verifier_of(*urls: str, **settings: Any) -> Verifier:
    defaults: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "redis_url": None}
    return Verifier(**{**defaults, "jwks_urls": urls, **settings})


def old_token(key: SigningKey, **claims: Any) -> str:
    """Issued a minute ago: a set that is fetched now would have to know its key."""
    now = int(time.time())
    return live_token(key, iat=now - 60, **claims)


def undecided(verifier: Verifier, token: str) -> str:
    with pytest.raises(Undecidable) as caught:
        verifier.verify(token)
    return caught.value.code


# -- fetching --------------------------------------------------------------------------------------------------------


def test_keys_are_fetched_and_then_nothing_is(key: SigningKey, serve: Callable[..., JwksServer]) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        for number in range(50):
            assert verifier.verify(live_token(key, jti=str(number)))
        assert len(server.requests) == 1
        status = verifier.status()
        assert (status.ready, status.keys) == (True, (key.kid,))
        assert status.keys_age_s is not None
        assert status.keys_age_s < 10


def test_the_second_request_names_the_etag_and_a_304_renews(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    server.headers = {"ETag": '"one"', "Trust-Generation": "5-1"}
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.status, server.body = 304, b""
        assert undecided(verifier, live_token(other_key)) == "keys_behind"
        assert [request.get("if-none-match") for request in server.requests] == [None, '"one"']
        assert verifier.verify(live_token(key))
        assert verifier.status().generation == "5-1"
        assert verifier.status().counters.get("fetch_errors", 0) == 0


def test_a_fresh_rotation_is_accepted_at_once_although_a_fetch_was_just_made(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.serve_keys(key, other_key)
        assert verifier.verify(live_token(other_key))
        assert verifier.verify(live_token(key))
        assert len(server.requests) == 2


async def test_averify_waits_for_a_fresh_key_without_blocking_the_loop(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.serve_keys(key, other_key)
        server.gate.clear()
        answers: list[Any] = []

        async def verify() -> None:
            answers.append((await verifier.averify(live_token(other_key)))["sub"])

        async with anyio.create_task_group() as group:
            group.start_soon(verify)
            await anyio.to_thread.run_sync(until, lambda: len(server.requests) == 2, "the fetch is in flight")
            server.gate.set()  # reached only because the loop goes on
        assert answers == ["ada"]


def test_a_removed_key_stops_working_although_the_token_is_cached(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    token = old_token(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        verifier.verify(token)
        server.serve_keys(other_key)
        assert verifier.verify(live_token(other_key))
        assert code_of(verifier, token) == "kid_unknown"


def test_a_cached_token_without_kid_is_refused_once_a_second_key_fits(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    now = int(time.time())
    claims = json.dumps(members(iat=now - 600, exp=now + 900)).encode()
    token = sign_segments(key, b64url(b'{"alg":"RS256"}'), b64url(claims))
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.verify(token)
        assert verifier.verify(token)
        server.serve_keys(key, other_key)
        assert verifier.verify(live_token(other_key))
        assert code_of(verifier, token) == "kid_invalid"


def test_a_key_that_was_exchanged_under_its_kid_stops_working_although_the_token_is_cached(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    token = live_token(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        verifier.verify(token)
        server.body = json.dumps(
            {"keys": [{**other_key.jwk, "kid": key.kid}, {**other_key.jwk, "kid": "new"}]}
        ).encode()
        assert verifier.verify(live_token(other_key, header={"kid": "new"}))
        assert code_of(verifier, token) == "signature_invalid"


# -- unknown kids ----------------------------------------------------------------------------------------------------


async def test_forged_kids_in_async_code_hold_one_thread_and_not_the_services_own(
    key: SigningKey, serve: Callable[..., JwksServer], patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.verifier.UNKNOWN_KID_WAIT_S", 60.0)
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.gate.clear()
        codes: list[str] = []
        forged = [live_token(key, header={"kid": f"forged-{number}"}) for number in range(200)]

        async def forge(token: str) -> None:
            with pytest.raises(Undecidable) as caught:
                await verifier.averify(token)
            codes.append(caught.value.code)

        async with anyio.create_task_group() as group:
            for token in forged:
                group.start_soon(forge, token)
            await anyio.to_thread.run_sync(until, lambda: len(server.requests) == 2, "the fetch is in flight")
            for _ in range(20):
                await asyncio.to_thread(lambda: None)  # the loop's own threads are free
            assert codes == []  # all of them still wait
            server.gate.set()
        assert codes == ["keys_behind"] * 200


def test_an_unknown_kid_is_the_tokens_fault_only_after_a_fetch_that_began_late_enough(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        assert code_of(verifier, old_token(other_key)) == "kid_unknown"
        assert undecided(verifier, live_token(other_key)) == "keys_behind"
        assert len(server.requests) == 2  # for the first the set at hand was new enough


def test_a_token_without_iat_and_with_an_unknown_kid_is_refused_only_after_a_fetch(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    header = b64url(json.dumps({"alg": "RS256", "kid": other_key.kid}).encode())
    claims = members(iat=None, exp=int(time.time()) + 900)
    token = sign_segments(other_key, header, b64url(json.dumps(claims).encode()))
    with verifier_of(server.url, require_iat=False) as verifier:
        assert verifier.wait_ready(60)
        assert code_of(verifier, token) == "kid_unknown"
        assert len(server.requests) == 2


def test_an_unknown_kid_is_undecidable_while_the_fetch_fails(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.status = 500
        assert undecided(verifier, live_token(other_key)) == "keys_behind"
        assert verifier.verify(live_token(key))


def test_a_token_that_would_be_refused_anyway_causes_no_fetch(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        now = int(time.time())
        for claims in ({"exp": now - 60}, {"iss": "x"}, {"aud": "x"}, {"iat": now + 3600, "exp": now + 3700}):
            with pytest.raises(InvalidToken):
                verifier.verify(live_token(other_key, **claims))
        assert len(server.requests) == 1


def test_a_set_that_has_arrived_is_judged_by_although_the_verifier_was_not_told_yet(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(key)
    told, told_once = threading.Event(), threading.Event()
    tell = Verifier._keys_changed

    def late(self: Verifier) -> None:
        if told_once.is_set():
            told.wait(10)
        told_once.set()
        tell(self)

    monkeypatch.setattr(Verifier, "_keys_changed", late)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        until(told_once.is_set, "told of the first set")
        server.serve_keys(key, other_key)
        client = verifier._issuers[0].client
        assert client is not None
        threading.Thread(target=client.refresh, args=(10,)).start()
        until(lambda: other_key.kid in verifier.status().keys, "the set has arrived")
        try:
            assert verifier.verify(old_token(other_key))  # a valid token: not the token's fault
        finally:
            told.set()


def test_wait_ready_means_that_verify_works(key: SigningKey, serve: Callable[..., JwksServer]) -> None:
    for _ in range(5):
        server = serve(key)
        with verifier_of(server.url) as verifier:
            assert verifier.wait_ready(60)
            assert verifier.verify(old_token(key))


# -- servers that are wrong --------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "404": {"status": 404},
    "204": {"status": 204, "body": b""},
    "304 to a question that was not asked": {"status": 304, "body": b""},
    "301": {"status": 301, "headers": {"Location": "{good}"}},
    "302": {"status": 302, "headers": {"Location": "{good}"}},
    "307": {"status": 307, "headers": {"Location": "{good}"}},
    "308": {"status": 308, "headers": {"Location": "{good}"}},
    "empty": {"body": b""},
    "HTML": {"body": b"<html>Sign in to the airport's network</html>"},
    "a JSON list": {"body": b"[]"},
    "no keys": {"body": b'{"keys": []}'},
    "BOM": {"body": b'\xef\xbb\xbf{"keys": []}'},
    "a symmetric key": {"body": b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}'},
    "kty a list": {"body": b'{"keys": [{"kty": ["RSA"]}]}'},
    "one kid twice": {"body": json.dumps({"keys": [vectors.THUMBPRINT_KEY] * 2}).encode()},
    "too large": {"body": b" " * (JWKS_BYTES_MAX + 1)},
    "compressed": {"body": gzip.compress(b" " * 50_000_000), "headers": {"Content-Encoding": "gzip"}},
    "junk that says it is compressed": {"headers": {"Content-Encoding": "gzip"}},
    "a malformed generation": {"headers": {"Trust-Generation": "new"}},
    "cut short": {"headers": {"Content-Length": "100000"}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_a_failed_attempt_and_the_next_url_is_tried(
    key: SigningKey, serve: Callable[..., JwksServer], wrong: dict[str, Any], patient: None
) -> None:
    good, bad, elsewhere = serve(key), serve(key), serve(key)
    bad.status = wrong.get("status", 200)
    bad.body = wrong.get("body", bad.body)
    bad.headers = {name: value.format(good=elsewhere.url) for name, value in wrong.get("headers", {}).items()}
    with verifier_of(bad.url, good.url) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.verify(live_token(key))
        assert (len(bad.requests), len(good.requests), len(elsewhere.requests)) == (1, 1, 0)
        assert verifier.status().counters["fetch_errors"] == 1


@pytest.mark.parametrize("wrong", ["500", "HTML", "no keys", "301", "too large", "one kid twice"])
def test_a_good_set_outlives_wrong_answers(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], wrong: str
) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.status = WRONG[wrong].get("status", 200)
        server.body = WRONG[wrong].get("body", b"")
        assert undecided(verifier, live_token(other_key)) == "keys_behind"
        assert len(server.requests) == 2
        assert verifier.verify(live_token(key))


def test_a_region_that_lags_behind_does_not_take_a_key_back(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    lagging, current = serve(key), serve(key, other_key)
    lagging.headers, current.headers = {"Trust-Generation": "5-1"}, {"Trust-Generation": "5-2"}
    with verifier_of(current.url, lagging.url) as verifier:
        assert verifier.wait_ready(60)
        current.status = 503
        assert undecided(verifier, live_token(key, header={"kid": "unknown"})) == "keys_behind"
        assert len(lagging.requests) == 1
        assert verifier.verify(live_token(other_key))
        assert verifier.status().generation == "5-2"


@pytest.mark.parametrize("etag", ['"é"', '"\x01"', ""])
def test_an_etag_that_cannot_be_sent_back_does_not_end_fetching(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], etag: str
) -> None:
    server = serve(key)
    server.headers = {"ETag": etag}
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.serve_keys(key, other_key)
        assert verifier.verify(live_token(other_key))
        assert verifier.status().counters.get("failures", 0) == 0


def _drip_header(connection: socket.socket) -> None:
    drip(connection, b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000)


def _drip_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    drip(connection, b" " * 10_000)


def _never(connection: socket.socket) -> None:
    connection.recv(1)


def _endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        _drip_header,
        _drip_body,
        _never,
        _endless,
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000),
        lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
        lambda connection: connection.sendall(b"\x00\xff" * 100),
        lambda connection: None,
    ],
    ids=["drips its header", "drips its body", "is silent", "is endless", "has endless headers", "speaks SSH",
         "speaks noise", "hangs up"],
)  # fmt: skip
def test_a_server_holds_the_fetch_no_longer_than_the_time_for_all_of_it(
    key: SigningKey, serve: Callable[..., JwksServer], impatient: None, answer: Callable[[socket.socket], Any]
) -> None:
    good = serve(key)
    with raw_server(answer) as url, verifier_of(url, good.url) as verifier:
        assert verifier.wait_ready(60)  # by itself none of them would end
        assert verifier.verify(live_token(key))


# -- servers that are gone ------------------------------------------------------------------------------------------


def test_started_with_everything_down_it_says_so_and_recovers(
    key: SigningKey, serve: Callable[..., JwksServer], impatient: None
) -> None:
    server = serve(key)
    server.status = 503
    with verifier_of(f"http://127.0.0.1:{free_port()}/", server.url) as verifier:
        assert not verifier.wait_ready(0.05)
        assert undecided(verifier, old_token(key)) == "keys_unavailable"
        assert not verifier.status().ready
        server.status = 200
        assert verifier.wait_ready(60)
        assert verifier.verify(old_token(key))


def test_flapping_servers_are_asked_until_one_answers(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer], impatient: None
) -> None:
    server = serve(key)
    server.headers = {"Cache-Control": "max-age=1"}
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
        server.status = 500
        until(lambda: verifier.status().counters.get("fetch_errors", 0) >= 2, "two failures")
        assert verifier.verify(live_token(key))
        server.serve_keys(other_key)
        server.status = 200
        until(lambda: verifier.status().keys == (other_key.kid,), "the next set, unasked")


def test_keys_past_their_greatest_age_decide_nothing_and_work_again_after_a_fetch(
    key: SigningKey, serve: Callable[..., JwksServer], impatient: None
) -> None:
    server = serve(key)
    server.headers = {"Cache-Control": "max-age=1"}
    token, legacy = live_token(key), live_token(SECRET)
    with verifier_of(server.url, keys_max_age_s=4, hs256_secrets=[SECRET]) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.verify(token)
        server.status = 500

        def code() -> str | None:
            try:
                verifier.verify(token)
            except Undecidable as error:
                return error.code
            return None

        until(lambda: code() == "keys_unavailable", "too old, although the token is cached")
        assert verifier.verify(legacy)  # needs no fetched key
        server.status = 200
        until(lambda: code() is None, "good again")


def test_a_document_to_start_from_works_before_the_first_fetch(key: SigningKey) -> None:
    with verifier_of(f"http://127.0.0.1:{free_port()}/", jwks=StaticKeys(key).jwks) as verifier:
        assert verifier.wait_ready(0)
        assert verifier.verify(live_token(key))


def test_proxy_variables_are_ignored(
    key: SigningKey, serve: Callable[..., JwksServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with verifier_of(serve(key).url) as verifier:
        assert verifier.wait_ready(60)


@pytest.mark.parametrize(
    ("header", "max_age_s"),
    [
        ("public, max-age=300", 300),
        ("max-age=5", 5),
        ("MAX-AGE=5", 5),
        ("s-maxage=9, max-age=7", 7),
        ("s-maxage=9", None),
        ("max-age=", None),
        ("max-age=-1", None),
        ("max-age=99999999999999", None),
        ("no-store", None),
        ("", None),
    ],
)
def test_max_age_is_read_from_the_header(header: str, max_age_s: float | None) -> None:
    from verifier.jwks_sources import _max_age_s

    assert _max_age_s(header) == max_age_s


# -- life ------------------------------------------------------------------------------------------------------------


def test_closing_does_not_wait_for_a_slow_server(
    key: SigningKey, serve: Callable[..., JwksServer], impatient: None
) -> None:
    server = serve(key)
    server.gate.clear()
    verifier = verifier_of(server.url).start()
    until(lambda: server.requests, "the fetch is in flight")
    verifier.close()  # while the server still holds its answer back
    assert not server.gate.is_set()


def test_a_client_can_be_started_twice_closed_twice_and_started_again(
    key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    client = JwksClient([server.url])
    for _ in range(2):
        client.start()
        client.start()
        assert client.wait_ready(60)
        client.close()
        client.close()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("verifier-jwks") == 0


def test_a_request_is_anonymous_and_asks_for_a_plain_set(key: SigningKey, serve: Callable[..., JwksServer]) -> None:
    server = serve(key)
    with verifier_of(server.url) as verifier:
        assert verifier.wait_ready(60)
    (request,) = server.requests
    assert not {"authorization", "cookie"} & set(request)
    assert request["accept-encoding"] == "identity"


def test_a_key_that_the_trust_log_tells_of_is_held_before_any_token_needs_it(
    key: SigningKey, other_key: SigningKey, serve: Callable[..., JwksServer]
) -> None:
    server = serve(key)
    server.headers = {"Cache-Control": "max-age=3600", "Trust-Generation": "1-0"}
    source = StaticRevocations()
    with verifier_of(server.url, redis_url=source) as verifier:
        assert verifier.wait_ready(60)
        server.serve_keys(key, other_key)
        server.headers["Trust-Generation"] = "1-1"
        told = replace(source.view.epoch, generation=Generation(1, 1))  # type: ignore[type-var]
        source._publish(epoch=told)
        until(lambda: other_key.kid in verifier.status().keys, "the new set")
        assert verifier.status().generation == "1-1"
        source._publish(epoch=told)
        assert verifier.verify(live_token(other_key))
    assert len(server.requests) == 2
