"""The link proxy: one process that owns every public address and carries bytes to the unix sockets behind, with lag
and faults.

    python -m regions.link CONFIG.json

The file is a `regions.link_rules.LinkConfig`. When every address is bound the process prints one line, `ready`. It
stops on SIGTERM or SIGINT. What becomes of a connection and its bytes is decided in `regions.link_rules`, bytes move in
`regions.link_connection`, and `regions.link_api` is the HTTP that the control socket speaks; this file binds sockets
and puts the rest together. A server that refuses (its socket is absent or closed) resets the caller, and so does an
address that is closed; that, and regions that are isolated, is in `regions.link_gates`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from regions.errors import ExitCode, LinkFailed, RegionsError
from regions.link_api import control_app
from regions.link_connection import Connection
from regions.link_gates import Gates, Passage
from regions.link_rules import LinkConfig, Listener, Network, Pair

OPEN_FILES_MAX = 65_536
"""Two descriptors a connection. macOS starts a process with a soft limit of 256."""

LISTEN_BACKLOG = 4096
"""1,500 verifiers may reconnect at once."""

REDIAL_S = 0.01
"""When a hold ends, all that wait connect at once, more than a server's queue takes."""

CONTROL_GRACE_S = 1
"""A control request takes a millisecond; whoever is slower is not waited for."""


class _Caller(asyncio.Protocol):
    """Stands at a public address; hands a new connection on once it is known where it comes from."""

    def __init__(self, accept: Callable[[asyncio.Transport], None]) -> None:
        self._accept = accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accept(cast(asyncio.Transport, transport))


class Proxy:
    """All public addresses and the control socket; `async with` binds and closes them.

    Entering raises `LinkFailed` naming the address that cannot be bound.
    """

    def __init__(self, config: LinkConfig) -> None:
        self._config = config
        self._network = Network(config)
        self._carrying: set[asyncio.Task[None]] = set()
        self._gates = Gates(config)
        self._connections: defaultdict[Pair, dict[Connection, Listener]] = defaultdict(dict)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Proxy:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as opening:
            for listener in self._config.listeners:
                protocol = partial(_Caller, partial(self._accept, listener))
                try:
                    server = await loop.create_server(protocol, listener.address, listener.port, backlog=LISTEN_BACKLOG)
                except OSError as error:
                    raise LinkFailed(
                        f"cannot listen on {listener.address}:{listener.port}: {error.strerror}"
                    ) from error
                opening.callback(server.close)
            app = control_app(
                self._network, self._gates, changed=self._change, gates_changed=self._enforce_gates, reset=self._reset
            )
            await opening.enter_async_context(_served(app, Path(self._config.control)))
            self._open = opening.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    def _change(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            for connection in list(self._connections[pair]):
                connection.change()

    def _reset(self, pair: Pair) -> None:
        for connection in list(self._connections[pair]):
            connection.reset()

    def _enforce_gates(self) -> None:
        """Have every open connection meet the gates as they stand now."""
        for pair, connections in self._connections.items():
            for connection, listener in list(connections.items()):
                passage = self._passage(pair, listener)
                if passage is Passage.SILENT and not connection.silent:
                    connection.silence()
                elif passage is Passage.REFUSED or (connection.silent and passage is Passage.OPEN):
                    connection.reset()

    def _passage(self, pair: Pair, listener: Listener) -> Passage:
        return self._gates.passage(pair.caller, pair.target, listener.port)

    def _accept(self, listener: Listener, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        if peer is None:  # gone before it was accepted
            transport.abort()
            return
        call = self._network.call(peer[0], listener.region, time.monotonic())
        connection = Connection(call, self._config.queue_bytes_max)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_protocol(connection.caller)
        connection.caller.connection_made(transport)
        self._connections[call.pair][connection] = listener
        if self._passage(call.pair, listener) is Passage.SILENT:
            connection.silence()
        task = asyncio.get_running_loop().create_task(self._carry(connection, call.pair, listener))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        task.add_done_callback(lambda _: self._connections[call.pair].pop(connection))

    async def _carry(self, connection: Connection, pair: Pair, listener: Listener) -> None:
        """Call the server behind `listener`, and stay until the connection is over."""
        try:
            if await connection.handshake():
                await self._dial(connection, pair, listener)
                if not connection.ending:
                    await connection.over.wait()
        finally:
            connection.abort()

    async def _dial(self, connection: Connection, pair: Pair, listener: Listener) -> None:
        while not connection.ending:
            try:
                if self._passage(pair, listener) is Passage.REFUSED:
                    raise ConnectionRefusedError
                sock = _connected(listener.uds)
                await asyncio.get_running_loop().create_unix_connection(lambda: connection.server, sock=sock)
            except BlockingIOError:  # the server's queue is full: over TCP the SYN would be sent again
                await asyncio.sleep(REDIAL_S)
                continue
            except OSError:
                self._network.refused[listener.region] += 1
                connection.refuse()
            return


def _connected(path: str) -> socket.socket:
    """Connecting to a unix socket succeeds or fails at once; asyncio takes the answer "queue full" for "under way"."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


class _Server(uvicorn.Server):
    """Leaves signals to :func:`serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.asynccontextmanager
async def _served(app: ASGIApp, path: Path) -> AsyncIterator[None]:
    """Serve `app` on a unix socket that is ours alone; raises `LinkFailed`."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CONTROL_GRACE_S,
    )
    server = _Server(config)
    with _listening(path) as sock:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@contextlib.contextmanager
def _listening(path: Path) -> Generator[socket.socket, None, None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            if path.is_socket():  # left by a proxy that was killed
                path.unlink()
            sock.bind(str(path))
            path.chmod(0o600)
            sock.listen()
        except OSError as error:
            raise LinkFailed(f"cannot listen on the control socket {path}: {error.strerror or error}") from error
        sock.setblocking(False)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


async def serve(config: LinkConfig) -> None:
    """Run the proxy until SIGTERM or SIGINT. Raises `LinkFailed`."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Proxy(config):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stop.wait()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: list[str]) -> int:
    """Run the process; returns its exit code."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m regions.link CONFIG.json\n")
        return ExitCode.USAGE
    os.umask(0o077)  # the control socket is ours alone
    _allow_many_connections()
    try:
        config = LinkConfig.from_json(Path(argv[0]).read_bytes())
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config))
    except OSError as error:
        sys.stderr.write(f"error [{LinkFailed.code}]: {error}\n")
        return LinkFailed.exit_code
    except RegionsError as error:
        sys.stderr.write(f"error [{error.code}]: {error}\n")
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
