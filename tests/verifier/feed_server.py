"""The key service's feed in front of a real server, over real HTTP, for tokens that a test makes good or not."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from keyservice.api import feed as feed_api
from keyservice.api import problems
from keyservice.bearer import AdminBearer, BearerRefused
from keyservice.feed import Feed
from keyservice.store import Node
from keyservice.telemetry import Metrics
from tests.verifier.valkey import Server

GOOD = "a-good-token"


class Bearer:
    """Takes one token. ``refusal`` is what the next check answers, to any."""

    def __init__(self) -> None:
        self.refusal: BearerRefused | None = None

    def check(self, authorization: str | None, scope: str) -> None:
        assert scope == "keyservice:revocations:read"
        if self.refusal is not None:
            raise self.refusal
        if authorization != f"Bearer {GOOD}":
            raise BearerRefused("token_malformed", "not the token of this test", status=401)


class FeedServer:
    """``requests`` holds the headers of every request so far."""

    def __init__(self, redis_url: str) -> None:
        self.bearer = Bearer()
        self.metrics = Metrics("test")
        self.requests: list[dict[str, str]] = []
        self._redis_url = redis_url
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._listening = threading.Event()
        self._thread: threading.Thread | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/revocations/feed"

    def consumers(self) -> float:
        return self.metrics.registry.get_sample_value("keyservice_feed_consumers") or 0.0

    def ends(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("keyservice_feed_ends_total", {"reason": reason}) or 0.0

    def start(self) -> None:
        """On the port that it had before, if it had one."""
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self._stopping, self._listening = asyncio.Event(), threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(listener),))
        self._thread.start()
        assert self._listening.wait(60)

    def stop(self) -> None:
        """As the key service stops: streams are ended by name."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(60)
            self._thread = None

    async def _run(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        node = Node(self._redis_url)
        feed = Feed(node, self.metrics)
        app = self._app(feed)
        config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        self._listening.set()  # the socket takes connections in already
        await self._stopping.wait()
        await feed.close()
        server.should_exit = True
        await serving
        await node.close()

    def _app(self, feed: Feed) -> ASGIApp:
        app = FastAPI()
        problems.install(app)
        app.include_router(feed_api.router(cast(AdminBearer, self.bearer), feed))

        async def remembering(scope: Scope, receive: Receive, send: Send) -> None:
            self.requests.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await app(scope, receive, send)

        return remembering


@contextmanager
def feeding(server: Server) -> Iterator[FeedServer]:
    feed = FeedServer(server.url)
    try:
        feed.start()
        yield feed
    finally:
        feed.stop()
