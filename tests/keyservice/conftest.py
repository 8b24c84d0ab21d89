"""Fixtures of the key service's tests: real servers on unix sockets in short directories, and whole services."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keyservice.app import build
from keyservice.settings import Settings, load_settings
from tests.keyservice.support import (
    CLIENTS,
    HS256_SECRET,
    ISSUER,
    KEEPER_SECRET,
    KEK,
    Proxy,
    Running,
    Server,
    running_service,
)
from tests.keyservice.three import REGIONS, StartThree, Three


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private directory with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="ks-") as path:
        yield Path(path)


@pytest.fixture
def start_server(run_dir: Path) -> Iterator[Callable[..., Server]]:
    """``start_server("name", "--port", "0", …)``: a running server, gone after the test."""
    servers: list[Server] = []

    def start(name: str = "redis", *arguments: str) -> Server:
        server = Server(run_dir, name, arguments)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server()


@pytest.fixture
async def proxy(run_dir: Path, server: Server) -> AsyncIterator[Proxy]:
    """What stands between a service and ``server``, where that is its primary."""
    proxy = Proxy(run_dir / "to-primary", server.socket)
    await proxy.open()
    yield proxy
    await proxy.cut()


@pytest.fixture
def clients_file(run_dir: Path) -> Path:
    path = run_dir / "clients.toml"
    path.write_text(CLIENTS)
    return path


@pytest.fixture
def environment(run_dir: Path, clients_file: Path) -> dict[str, str]:
    """A whole environment but for Redis."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return inherited | {
        "KEYSERVICE_PROFILE": "demo",
        "KEYSERVICE_ISSUER": ISSUER,
        "KEYSERVICE_REGION": "eu-west-1",
        "KEYSERVICE_KEK": KEK,
        "KEYSERVICE_CLIENTS_FILE": str(clients_file),
        "KEYSERVICE_UDS": str(run_dir / "public.sock"),
        "KEYSERVICE_ADMIN_UDS": str(run_dir / "admin.sock"),
        "KEYSERVICE_KEEPER_DIR": str(run_dir / "keeper"),
        "KEYSERVICE_START_TIMEOUT_S": "60",
        "KEYSERVICE_REDIS_URL": f"unix://{run_dir / 'redis.sock'}",
        "JWT_SECRET": "a shared secret of the old days, 32 bytes or more",
        "PYTHONWARNINGS": "error",
    }


@pytest.fixture
def make_settings(clients_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of one region in the demo profile; every one can be replaced."""
    for name in ("REDIS_ADDR", "REDIS_USERNAME", "REDIS_PASSWORD", "JWT_SECRET"):
        monkeypatch.delenv(name, raising=False)

    def make(redis_url: str, **overrides: Any) -> Settings:
        given: dict[str, Any] = {
            "profile": "demo",
            "issuer": ISSUER,
            "region": "eu-west-1",
            "redis_url": redis_url,
            "kek": KEK,
            "jwt_secret": HS256_SECRET,
            "clients_file": clients_file,
            "keeper_dir": Path(tempfile.mkdtemp(prefix="keeper-", dir=clients_file.parent)),
            "receipt_wait_ms": 20_000,  # a busy machine turns nothing into pending,
            "max_staleness_s": 60,  # stale
            "refresh_grace_s": 300,  # or a reuse
        }
        return load_settings(**{**given, **overrides})

    return make


@pytest.fixture
def two_instances(run_dir: Path, make_settings: Callable[..., Settings]) -> Callable[..., tuple[Settings, Settings]]:
    """``two_instances(redis_url)``: settings of one region's keeper with an API, and of an API instance beside it."""

    def make(redis_url: str, **overrides: Any) -> tuple[Settings, Settings]:
        uds = run_dir / "keeper.sock"
        return (
            make_settings(redis_url, keeper_uds=uds, keeper_secret=KEEPER_SECRET, **overrides),
            make_settings(
                redis_url,
                role="api",
                keeper_dir=None,
                keeper_url=f"unix://{uds}",
                keeper_secret=KEEPER_SECRET,
                **overrides,
            ),
        )

    return make


@pytest.fixture
def impatient(make_settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """Settings with which a receipt that stays pending is soon given."""
    return partial(make_settings, receipt_wait_ms=300)


StartService = Callable[[Settings], Any]


@pytest.fixture
async def start_service() -> AsyncIterator[StartService]:
    """``await start_service(settings)``: a started, ready service."""
    async with AsyncExitStack() as stack:

        async def start(settings: Settings, *, ready: bool = True, **options: Any) -> Running:
            running = await stack.enter_async_context(running_service(build(settings, **options)))
            if ready:
                await running.ready()
            return running

        yield start


@pytest.fixture
async def running(server: Server, make_settings: Callable[..., Settings], start_service: StartService) -> Running:
    """One region, started and ready."""
    started: Running = await start_service(make_settings(server.url))
    return started


@pytest.fixture
async def start_three(
    run_dir: Path, start_server: Callable[..., Server], make_settings: Callable[..., Settings], start_service: Any
) -> AsyncIterator[StartThree]:
    """``await start_three(receipt_wait_ms=300)``: all three regions, ready."""
    made: list[Three] = []

    async def start(**overrides: Any) -> Three:
        three = Three(run_dir, start_server, make_settings, start_service, **overrides)
        made.append(three)
        await three.start(*REGIONS)
        return three

    yield start
    for three in made:
        await three.stop(*list(three.running))
        await three.close()
