"""Redis connections leave from the source address they were given: every kind of connection that redis-py has.

The hooks that are overridden are private to redis-py. These tests fail when a release stops calling them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from verifier.netbind import bound_connection_kwargs

SOURCE = "127.0.2.1"
TARGET = "127.0.1.1"


class PingServer:
    """Answers every command with PONG and notes where each caller comes from; with TLS if given a context."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.callers: list[str] = []
        self._context = context
        self._caller: socket.socket | None = None
        self._listener = socket.create_server((TARGET, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, (address, _) = self._listener.accept()
            with connection:
                if address == TARGET:  # `close` says goodbye
                    return
                self.callers.append(address)
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        if self._context is not None:
            connection = self._context.wrap_socket(connection, server_side=True)
        self._caller = connection
        with connection:
            while received := connection.recv(4096):
                connection.sendall(b"+PONG\r\n" * received.count(b"*"))

    def close(self) -> None:
        if self._caller is not None:  # one that a failed test left open would be waited for
            with contextlib.suppress(OSError):
                self._caller.shutdown(socket.SHUT_RDWR)
        socket.create_connection((TARGET, self.port), source_address=(TARGET, 0)).close()
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `TARGET`, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(TARGET))])
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(private + built.public_bytes(Encoding.PEM))
    return path


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def server(tls: bool, certificate: Path) -> Iterator[PingServer]:
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = PingServer(context)
    yield server
    server.close()


@pytest.fixture
def common(tls: bool, certificate: Path) -> dict[str, Any]:
    """What every client here is given besides its source address."""
    kwargs: dict[str, Any] = {"socket_timeout": 60, "protocol": 2}
    return {**kwargs, "ssl_ca_certs": str(certificate)} if tls else kwargs


def url(server: PingServer, tls: bool) -> str:
    return f"{'rediss' if tls else 'redis'}://{TARGET}:{server.port}"


def test_a_client_leaves_from_its_source_address(server: PingServer, tls: bool, common: dict[str, Any]) -> None:
    with redis.Redis.from_url(url(server, tls), **bound_connection_kwargs(SOURCE, tls=tls), **common) as client:
        assert client.ping()
    assert server.callers == [SOURCE]


async def test_an_async_client_leaves_from_its_source_address(
    server: PingServer, tls: bool, common: dict[str, Any]
) -> None:
    bound = bound_connection_kwargs(SOURCE, tls=tls, asynchronous=True)
    pool = redis.asyncio.ConnectionPool(host=TARGET, port=server.port, **bound, **common)
    async with redis.asyncio.Redis.from_pool(pool) as client:
        assert await client.ping()
    assert server.callers == [SOURCE]


def test_a_sentinel_managed_client_leaves_from_its_source_address(
    server: PingServer, tls: bool, common: dict[str, Any]
) -> None:
    class Manager(redis.sentinel.Sentinel):
        def discover_master(self, service_name: str) -> tuple[str, int]:
            return TARGET, server.port

    bound = bound_connection_kwargs(SOURCE, tls=tls, sentinel=True)
    manager: Any = Manager([])  # type: ignore[no-untyped-call]  # redis-py leaves Sentinel untyped
    with manager.master_for("any", **bound, **common) as client:
        assert client.ping()
    assert server.callers == [SOURCE]


async def test_an_async_sentinel_managed_client_leaves_from_its_source_address(
    server: PingServer, tls: bool, common: dict[str, Any]
) -> None:
    class Manager(redis.asyncio.sentinel.Sentinel):
        async def discover_master(self, service_name: str) -> tuple[str, int]:
            return TARGET, server.port

    bound = bound_connection_kwargs(SOURCE, tls=tls, sentinel=True, asynchronous=True)
    manager: Any = Manager([])  # type: ignore[no-untyped-call]  # redis-py leaves Sentinel untyped
    async with manager.master_for("any", **bound, **common) as client:
        assert await client.ping()
    assert server.callers == [SOURCE]


@pytest.mark.parametrize("tls", [False], indirect=True)
def test_keepalive_and_time_outs_hold_for_a_bound_connection(server: PingServer, common: dict[str, Any]) -> None:
    options = {socket.TCP_KEEPCNT: 3}
    bound = bound_connection_kwargs(SOURCE)
    pool = redis.ConnectionPool(
        host=TARGET, port=server.port, socket_keepalive=True, socket_keepalive_options=options, **bound, **common
    )
    connection = pool.get_connection()
    sock = connection._get_socket()
    assert sock is not None
    assert sock.gettimeout() == 60
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    pool.disconnect()


def test_a_refused_connection_is_redis_own_error() -> None:
    with socket.create_server((TARGET, 0)) as listener:
        port = listener.getsockname()[1]
    client = redis.Redis.from_url(f"redis://{TARGET}:{port}", **bound_connection_kwargs(SOURCE))
    with client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_a_source_address_that_is_not_here_is_redis_own_error(common: dict[str, Any]) -> None:
    client = redis.Redis.from_url(f"redis://{TARGET}:1", **bound_connection_kwargs("192.0.2.1"))
    with client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_without_a_source_address_nothing_changes_and_redis_is_not_imported() -> None:
    program = "import sys, verifier.netbind as n; print(n.bound_connection_kwargs(None), 'redis' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "{} False\n"
