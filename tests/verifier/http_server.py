"""Servers on loopback that answer as a test wants them to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from verifier.testing import SigningKey, StaticKeys


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a slow machine does not reach, for tests that count fetches or wait for the one they caused."""
    monkeypatch.setattr("verifier.jwks_client.HTTP_TIMEOUT_S", 60.0)
    monkeypatch.setattr("verifier.keys.JWKS_COOLDOWN_S", 600.0)
    monkeypatch.setattr("verifier.verifier.UNKNOWN_KID_WAIT_S", 60.0)


class JwksServer:
    """What the next answers are; ``requests`` holds the headers of each request so far."""

    def __init__(self, *keys: SigningKey) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = b""
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[dict[str, str]] = []
        self.serve_keys(*keys)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append({name.lower(): value for name, value in self.headers.items()})
                outer.gate.wait(120)
                with contextlib.suppress(OSError):
                    self.send_response(outer.status)
                    for name, value in {"Content-Length": str(len(outer.body)), **outer.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(outer.body)

            def log_message(self, *_args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/jwks.json"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def serve_keys(self, *keys: SigningKey) -> None:
        self.body = json.dumps(StaticKeys(*keys).jwks).encode()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], Any]) -> Iterator[str]:
    """``answer(connection)`` after the request was read, for as long as it likes; gives the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()
    threads = []

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            answer(connection)

    def accept() -> None:
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=handle, args=(connection,), daemon=True))
                threads[-1].start()

    listener.settimeout(0.02)
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/jwks.json"
    finally:
        closing.set()
        acceptor.join()
        listener.close()


def drip(connection: socket.socket, text: bytes, pause_s: float = 0.05) -> None:
    for byte in text:
        connection.sendall(bytes([byte]))
        time.sleep(pause_s)


def free_port() -> int:
    """A port of which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
