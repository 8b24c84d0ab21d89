"""Running the key service: its HTTP servers and everything else in one process and one event loop.

Ends by itself on SIGTERM, on SIGINT, and when the pipe that a parent holds (``KEYSERVICE_PARENT_FD``) is closed: a
parent that dies takes it along.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from .app import Service, build
from .errors import StartError
from .limits import SHUTDOWN_GRACE_S
from .settings import Settings

__all__ = ["serve"]

_log: Final = structlog.get_logger(__name__)
BACKLOG: Final = 2_048


class _Server(uvicorn.Server):
    """Leaves signals to :func:`serve`, because two servers share them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(settings: Settings) -> None:
    """Run until told to stop; raises :class:`SettingError`, :class:`StartError`."""
    service = build(settings)
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(service))


async def _serve(service: Service) -> None:
    settings = service.settings
    stopping = asyncio.Event()
    _stop_on_signals(stopping)
    _stop_with_parent(settings.parent_fd, stopping)
    places = {
        "public": (settings.host, settings.port, settings.uds, "KEYSERVICE_"),
        "admin": (settings.admin_host, settings.admin_port, settings.admin_uds, "KEYSERVICE_ADMIN_"),
        "keeper": (settings.keeper_host, settings.keeper_port or 0, settings.keeper_uds, "KEYSERVICE_KEEPER_"),
    }
    with contextlib.ExitStack() as opened:
        try:
            listening = []
            for name, app in service.apps.items():
                sock = _listen(*places[name])
                opened.enter_context(contextlib.closing(sock))
                if (path := places[name][2]) is not None:
                    opened.callback(path.unlink, missing_ok=True)
                listening.append((app, sock))
            await service.start()
            await _run_servers(listening, stopping, service.end_streams)
        finally:
            await service.stop()


async def _run_servers(
    listening: list[tuple[ASGIApp, socket.socket]],
    stopping: asyncio.Event,
    end_streams: Callable[[], Awaitable[None]],
) -> None:
    servers = [(_server(app), sock) for app, sock in listening]
    running = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in servers]
    for _, sock in servers:
        _log.info("listening", address=str(sock.getsockname()))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait([stopped, *running], return_when=asyncio.FIRST_COMPLETED)
    await end_streams()  # a server waits for the answers under way, and these would not end by themselves
    for server, _ in servers:
        server.should_exit = True
    await asyncio.gather(*running)
    stopped.cancel()


def _server(app: ASGIApp) -> _Server:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )
    return _Server(config)


def _stop_on_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stopping.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopping.set))


def _stop_with_parent(parent_fd: int | None, stopping: asyncio.Event) -> None:
    """Stop when the other end of the pipe is closed; what is written into it is ignored."""
    if parent_fd is None:
        return
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(parent_fd, 1_024):
            loop.remove_reader(parent_fd)
            stopping.set()

    try:
        os.fstat(parent_fd)
        loop.add_reader(parent_fd, readable)
    except OSError:
        raise StartError("parent_fd_invalid", "KEYSERVICE_PARENT_FD is not an open pipe") from None


def _listen(host: str, port: int, uds: Path | None, prefix: str) -> socket.socket:
    """A listening socket; raises :class:`StartError` naming the setting that is to blame."""
    setting, place = (f"{prefix}UDS", str(uds)) if uds is not None else (f"{prefix}PORT", f"{host}:{port}")
    try:
        return _listen_unix(uds) if uds is not None else _listen_tcp(host, port)
    except UnicodeError:  # from the name's encoding for DNS
        raise StartError("cannot_listen", f"{prefix}HOST: {host!r} is not an address of this machine") from None
    except OSError as error:
        if uds is None and (isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL):
            setting = f"{prefix}HOST"
        code = "port_in_use" if error.errno == errno.EADDRINUSE else "cannot_listen"
        reason = error.strerror or str(error)
        raise StartError(code, f"{setting}: cannot listen on {place}: {reason.lower()}") from None


def _listen_tcp(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _listen_unix(path: Path) -> socket.socket:
    """Bind a socket that only this user can reach, in place of one that nobody listens on any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
