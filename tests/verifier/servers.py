"""Real servers for what the verifier is embedded in: uvicorn, wsgiref and any program, each on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import uvicorn

from tests.verifier.support import until


@contextlib.contextmanager
def uvicorn_of(app: Any, **settings: Any) -> Iterator[str]:
    """The app over sockets; gives the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none", **settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), "uvicorn answers")
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_args: object) -> None: ...


@contextlib.contextmanager
def wsgiref_of(app: Any) -> Iterator[str]:
    """The app over sockets, one request at a time; gives the base URL."""
    with WSGIServer(("127.0.0.1", 0), _Quiet) as server:
        server.set_app(app)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
