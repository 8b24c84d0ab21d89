"""A proxy that can stop forwarding without a word, as a peer that has vanished or whose way is cut in one direction."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Literal

Way = Literal["both", "to_server", "to_client"]


class BlackHole:
    """TCP in front of a Unix socket. Swallowed bytes are gone; the sockets stay open, new connections are taken too."""

    def __init__(self, target: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = target
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._swallowed: set[str] = set()
        self.accepted = 0
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> BlackHole:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_error: object) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def swallow(self, way: Way) -> None:
        """From now on, on connections old and new."""
        self._swallowed = {"to_server", "to_client"} if way == "both" else {way}

    def heal(self) -> None:
        self._swallowed = set()

    def _spawn(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]  # a bound method
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            self._ends += [near, far]
            self._spawn(self._pump, near, far, "to_server")
            self._spawn(self._pump, far, near, "to_client")

    def _pump(self, one: socket.socket, other: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while chunk := one.recv(65_536):
                if way not in self._swallowed:
                    other.sendall(chunk)
        if way not in self._swallowed:  # nor does a goodbye get through
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)
