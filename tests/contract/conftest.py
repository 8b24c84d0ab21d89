"""A key service as a process of its own on loopback ports, with a rotation that takes a second."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.keyservice.conftest import anyio_backend, run_dir, server, start_server
from tests.keyservice.support import CLIENTS, HS256_SECRET, ISSUER, KEK, Server, until

__all__ = ["anyio_backend", "keyservice", "run_dir", "server", "start_server"]


@dataclass
class KeyService:
    """URLs of a running key service, and calls of its API."""

    url: str
    admin_url: str
    redis_url: str
    environment: dict[str, str] = field(repr=False)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Started and ready."""
        self.process = subprocess.Popen([sys.executable, "-m", "keyservice", "serve"], env=self.environment)
        until(_is_ready(f"{self.url}/readyz"), 60)

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    @property
    def feed_url(self) -> str:
        return f"{self.url}/revocations/feed"

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/.well-known/jwks.json"

    def token(self, client: str = "orders", **form: str) -> str:
        form = {"grant_type": "client_credentials", **form}
        answer = httpx.post(f"{self.url}/oauth2/token", data=form, auth=(client, "s3cret"), trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self.token('ops', audience=f'{ISSUER}/admin')}"}
        answer = httpx.request(
            method, f"{self.admin_url}{path}", json=body, headers=headers, trust_env=False, timeout=60
        )
        assert answer.is_success, answer.text
        return answer.json()

    def active(self) -> str:
        keys = self.admin("GET", "/admin/keys")["keys"]
        return str(next(key["kid"] for key in keys if key["state"] == "active"))

    def rotate(self) -> str:
        """Rotate, wait until the successor signs, and give its kid."""
        before = self.admin("POST", "/admin/keys/rotate")["replaced"]
        until(lambda: self.active() != before)
        return self.active()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier takes a slow key service for a slow one, not for a dead one."""
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 60.0)
    monkeypatch.setattr("verifier.verifier.UNKNOWN_KID_WAIT_S", 60.0)
    monkeypatch.setattr("verifier.feed.FEED_CONNECT_TIMEOUT_S", 60.0)
    monkeypatch.setattr("verifier.feed.FEED_READ_TIMEOUT_S", 60.0)


@pytest.fixture
def keyservice_settings() -> dict[str, str]:
    """What a module wants otherwise."""
    return {}


@pytest.fixture
def keyservice(run_dir: Path, server: Server, keyservice_settings: dict[str, str]) -> Iterator[KeyService]:
    """Started and ready; the active key's successor is published."""
    clients_file = run_dir / "clients.toml"
    clients_file.write_text(CLIENTS)
    ports = [_free_port(), _free_port()]
    environment = {
        "PATH": os.environ["PATH"],
        "KEYSERVICE_PROFILE": "demo",
        "KEYSERVICE_ISSUER": ISSUER,
        "KEYSERVICE_REGION": "eu-west-1",
        "KEYSERVICE_REDIS_URL": server.url,
        "KEYSERVICE_KEK": KEK,
        "KEYSERVICE_CLIENTS_FILE": str(clients_file),
        "KEYSERVICE_KEEPER_DIR": str(run_dir / "keeper"),
        "KEYSERVICE_PORT": str(ports[0]),
        "KEYSERVICE_ADMIN_PORT": str(ports[1]),
        "KEYSERVICE_PUBLISH_LEAD_S": "2",
        "KEYSERVICE_ACCESS_TOKEN_TTL_S": "150",
        "KEYSERVICE_RECEIPT_WAIT_MS": "20000",
        "KEYSERVICE_JWKS_MAX_AGE_S": "1",
        "KEYSERVICE_MAX_SKEW_S": "0.1",
        "KEYSERVICE_REPLICATION_LAG_S": "0",
        "KEYSERVICE_ROTATOR_TICK_S": "0.2",
        "JWT_SECRET": HS256_SECRET,
        **keyservice_settings,
    }
    public, admin = (f"http://127.0.0.1:{port}" for port in ports)
    made = KeyService(public, admin, server.url, environment)
    try:
        made.start()
        until(lambda: len(httpx.get(made.jwks_url, trust_env=False, timeout=60).json()["keys"]) == 2, 60)
        yield made
    finally:
        made.kill(signal.SIGTERM)


def _is_ready(url: str) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            answer = httpx.get(url, trust_env=False, timeout=60)
            return answer.status_code == 200 and "epoch_closed" not in answer.json()["warnings"]
        except httpx.HTTPError:
            return False

    return ask


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
