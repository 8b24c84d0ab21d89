"""The gRPC interceptors over real sockets: both servers, all four kinds of call, bytes for messages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.verifier.support import NONCE, Mirrored, token_of
from verifier import Claims, ConfigurationError, Verifier, current_claims
from verifier.grpc import AsyncAuthInterceptor, AuthInterceptor
from verifier.testing import SigningKey

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
DEADLINE_S = 30.0


def subject() -> bytes:
    claims = current_claims()
    return str(claims and claims.subject).encode()


def blocking_handlers() -> dict[str, Callable[[Any, Any], Any]]:
    def unary(_request: Any, _context: Any) -> bytes:
        return subject()

    def stream(_request: Any, _context: Any) -> Iterator[bytes]:
        yield subject()
        yield subject()

    return {kind: stream if kind.endswith("stream") else unary for kind in KINDS}


def async_handlers() -> dict[str, Callable[[Any, Any], Any]]:
    async def unary(_request: Any, _context: Any) -> bytes:
        await asyncio.sleep(0)
        return subject()

    async def stream(_request: Any, _context: Any) -> Any:
        yield subject()
        await asyncio.sleep(0)
        yield subject()

    return {kind: stream if kind.endswith("stream") else unary for kind in KINDS}


def service(handlers: dict[str, Callable[[Any, Any], Any]], name: str = "orders.Orders") -> Any:
    make = {kind: getattr(grpc, f"{kind}_rpc_method_handler") for kind in KINDS}
    return grpc.method_handlers_generic_handler(name, {kind: make[kind](handlers[kind]) for kind in KINDS})


@contextmanager
def threaded(verifier: Verifier, **settings: Any) -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, interceptors=[AuthInterceptor(verifier, **settings)])
        server.add_generic_rpc_handlers((service(blocking_handlers()), service(blocking_handlers(), "health.Health")))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


@contextmanager
def aio(
    verifier: Verifier, handlers: dict[str, Callable[[Any, Any], Any]] | None = None, **settings: Any
) -> Iterator[str]:
    ready, done = threading.Event(), threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        server = grpc.aio.server(interceptors=[AsyncAuthInterceptor(verifier, **settings)])
        server.add_generic_rpc_handlers(
            (service(handlers or async_handlers()), service(async_handlers(), "health.Health"))
        )
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        ready.set()
        await asyncio.to_thread(done.wait)
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        done.set()
        thread.join()


@contextmanager
def aio_with_blocking_handlers(verifier: Verifier, **settings: Any) -> Iterator[str]:
    with aio(verifier, blocking_handlers(), **settings) as address:
        yield address


Server = Callable[..., Any]
SERVERS: dict[str, Server] = {"threads": threaded, "aio": aio, "aio, plain functions": aio_with_blocking_handlers}


@pytest.fixture(params=list(SERVERS.values()), ids=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Server:
    made: Server = request.param
    return made


@pytest.fixture
def mirrored(key: SigningKey) -> Mirrored:
    return Mirrored(key, min_position_wait_s=0.01)


def call(address: str, kind: str, metadata: Any = (), name: str = "orders.Orders") -> list[bytes]:
    with grpc.insecure_channel(address) as channel:
        method = getattr(channel, kind)(f"/{name}/{kind}")
        message = iter([b"1", b"2"]) if kind.startswith("stream") else b"1"
        answer = method(message, metadata=metadata, timeout=DEADLINE_S)
        return list(answer) if kind.endswith("stream") else [answer]


def refusal(address: str, kind: str, metadata: Any = ()) -> tuple[grpc.StatusCode, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call(address, kind, metadata)
    error: Any = caught.value
    return error.code(), dict(error.trailing_metadata())


def auth(token: str, **more: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}"), *((name.replace("_", "-"), value) for name, value in more.items())]


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_see_the_claims_and_nobody_else_gets_there(
    server: Server, mirrored: Mirrored, key: SigningKey, kind: str
) -> None:
    with server(mirrored.verifier, optional_methods=["/orders.Orders/none"]) as address:
        for _ in range(2):
            assert set(call(address, kind, auth(token_of(key)))) == {b"ada"}
        code, trailers = refusal(address, kind)
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.UNAUTHENTICATED, "token_required")
        code, trailers = refusal(address, kind, auth("bad"))
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.UNAUTHENTICATED, "token_malformed")


@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
def test_each_refusal_has_its_status_and_code(server: Server, mirrored: Mirrored, key: SigningKey, kind: str) -> None:
    scopes = {"/orders.Orders": ["orders:read"], f"/orders.Orders/{kind}": ["orders:write"]}
    with server(mirrored.verifier, scopes=scopes) as address:
        lacking = token_of(key, scope="orders:read", jti="1")
        enough = token_of(key, scope="orders:read orders:write", jti="2")
        code, trailers = refusal(address, kind, auth(lacking))
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.PERMISSION_DENIED, "insufficient_scope")
        assert set(call(address, kind, auth(enough))) == {b"ada"}
        code, trailers = refusal(address, kind, [*auth(enough), *auth(enough)])
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
        code, trailers = refusal(address, kind, auth(enough, trust_position=f"1-9.{NONCE}"))
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.UNAVAILABLE, "position_not_reached")
        assert trailers["retry-after"] == "1"
        code, trailers = refusal(address, kind, auth(enough, trust_position="junk"))
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "position_invalid")
        mirrored.revoke("jti", "2")
        code, trailers = refusal(address, kind, auth(enough))
        assert (code, trailers["auth-code"]) == (grpc.StatusCode.UNAUTHENTICATED, "token_revoked")


def test_optional_and_public_methods(server: Server, mirrored: Mirrored, key: SigningKey) -> None:
    settings: dict[str, Any] = {
        "optional_methods": ["/orders.Orders/unary_unary"],
        "public_methods": ["/health.Health"],
    }
    with server(mirrored.verifier, **settings) as address:
        assert call(address, "unary_unary", auth(token_of(key))) == [b"ada"]
        assert call(address, "unary_unary") == [b"None"]  # and nothing of the call before
        assert refusal(address, "unary_unary", auth("bad"))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert refusal(address, "unary_stream")[0] == grpc.StatusCode.UNAUTHENTICATED
        assert call(address, "unary_unary", auth("bad"), "health.Health") == [b"None"]


def test_a_method_that_does_not_exist_is_unimplemented(server: Server, mirrored: Mirrored) -> None:
    with server(mirrored.verifier) as address, pytest.raises(grpc.RpcError) as caught:
        call(address, "unary_unary", (), "nothing.Here")
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


class Asked:
    """A verifier's face that says when it was asked for the first time."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier, self.once = verifier, threading.Event()

    def verify(self, token: str) -> Claims:
        try:
            return self._verifier.verify(token)
        finally:
            self.once.set()

    async def averify(self, token: str) -> Claims:
        return self.verify(token)

    def remembered(self, token: str) -> Claims | None:
        return self._verifier.remembered(token)


def test_a_client_with_a_retry_policy_comes_again_when_it_was_told_to(server: Server, key: SigningKey) -> None:
    mirrored = Mirrored(key, synced=False)
    verifier: Any = Asked(mirrored.verifier)
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "60s", '
        '"maxBackoff": "60s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )
    with server(verifier) as address:
        options = [("grpc.enable_retries", 1), ("grpc.service_config", policy)]
        with grpc.insecure_channel(address, options=options) as channel:
            pending = channel.unary_unary("/orders.Orders/unary_unary").future(
                b"1", metadata=auth(token_of(key)), timeout=DEADLINE_S
            )
            assert verifier.once.wait(DEADLINE_S)  # and has answered: never_synced
            mirrored.revocations.beat()
            # Its own back-off is a minute: it gets through because the server's hint of a second counts instead.
            assert pending.result(DEADLINE_S) == b"ada"


@pytest.mark.parametrize("setting", [{"public_methods": "/a"}, {"optional_methods": ["a.B"]}, {"scopes": {"a": []}}])
def test_a_method_without_its_slash_is_a_wrong_setting(mirrored: Mirrored, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AuthInterceptor(mirrored.verifier, **setting)
