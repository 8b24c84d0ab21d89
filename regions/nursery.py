"""Child processes that never outlive their user.

    with Nursery(log_dir) as nursery:
        child = nursery.spawn("redis-1", [binary, config])
        nursery.check()                                     # raises if a child died unexpectedly

However the `with` ends (its end, an exception, Ctrl-C, `kill -9` of this process), every child's process group is
ended (TERM, a grace, KILL), so every port is free again. That is the guard's doing (`regions._guard`): a process in
between, which owns the children and watches this one. Ctrl-C in a terminal reaches this process only: it decides.

Everything here blocks for a short while; under asyncio call it in a thread. It may be used from several threads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from regions.errors import ServerStartFailed

__all__ = ["Child", "Nursery"]

SPAWN_TIMEOUT_S = 10.0
"""A fork and an exec; on a machine slower than this nothing else would work either."""

GUARD_MARGIN_S = 6.0
"""How much longer than the grace the guard may take: it waits up to 5 s for killed processes to go."""

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 16 * 1024

_GUARD = Path(__file__).with_name("_guard.py")


class Child:
    """A process of a `Nursery`, in a process group of its own. Signals go to the whole group."""

    def __init__(self, nursery: Nursery, number: int, name: str, log_path: Path) -> None:
        self._nursery = nursery
        self._number = number
        self._log_start = log_path.stat().st_size if log_path.exists() else 0
        self._ended = threading.Event()
        self._code: int | None = None
        self.name = name
        self.log_path = log_path
        self.pid = 0
        self.expected_to_end = False
        """Whether `terminate` or `kill` ended it; any other end is an error (`Nursery.check`)."""

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid} code={self._code}>"

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._code

    def wait(self, timeout_s: float) -> int | None:
        """Wait up to `timeout_s` for its end; like `poll`."""
        self._ended.wait(timeout_s)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send it a signal, for instance SIGSTOP; nothing happens if it has ended."""
        self._nursery._send({"op": "signal", "id": self._number, "signal": int(number)})

    def terminate(self, grace_s: float = 3.0) -> int | None:
        """TERM, and KILL if it has not ended within `grace_s`. Returns the exit code."""
        self._expect_end()
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)  # a stopped process takes no TERM
        return self.poll() if self._ended.wait(grace_s) else self.kill()

    def kill(self) -> int | None:
        """KILL, and wait until it is gone. Returns the exit code."""
        self._expect_end()
        self.send_signal(signal.SIGKILL)
        return self.wait(SPAWN_TIMEOUT_S)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> list[str]:
        """The last lines that this process (not an earlier one of the same name) wrote."""
        return self._log()[-lines:]

    def wait_for_line(self, line: str, timeout_s: float) -> None:
        """Wait until it has written exactly this line.

        Raises `ServerStartFailed` if it ends, or `timeout_s` passes, before.
        """
        deadline = time.monotonic() + timeout_s
        while line not in self._log():
            if self._ended.wait(0.01):
                raise ServerStartFailed(self._how_it_ended())
            if time.monotonic() > deadline:
                raise ServerStartFailed(f"{self.name} did not say {line!r} within {timeout_s:g} s; {self._tail_text()}")

    def _expect_end(self) -> None:
        if self._code is None:  # else it had ended by itself, and that stays an error
            self.expected_to_end = True

    def _log(self) -> list[str]:
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - LOG_TAIL_BYTES))
                return log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _how_it_ended(self) -> str:
        code = self._code or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} (pid {self.pid}) {how}, unexpectedly; {self._tail_text()}"

    def _tail_text(self) -> str:
        tail = "".join(f"\n  {line}" for line in self.log_tail())
        return f"the end of its log {self.log_path}:{tail}" if tail else f"its log {self.log_path} is empty"

    def _has_ended(self, code: int | None) -> None:
        self._code = code
        self._ended.set()


class Nursery:
    """Starts children, each with its own log `NAME.log` in `log_dir`; see the module's docstring.

    `grace_s` is the time between TERM and KILL when all are ended together. `hold` are file descriptors that the guard
    keeps open until the last child has ended and what was to be removed is removed: for instance a lock.
    """

    def __init__(self, log_dir: Path, *, grace_s: float = 3.0, hold: Sequence[int] = ()) -> None:
        self._hold = tuple(hold)
        self._log_dir = log_dir.absolute()
        self._grace_s = grace_s
        self._children: dict[int, Child] = {}
        self._numbers = itertools.count()
        self._answers: dict[int, str | None] = {}  # per spawn: None, or why it failed
        self._changed = threading.Condition()
        self._closing = False

    def __enter__(self) -> Nursery:
        self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket, theirs = socket.socketpair()
        with theirs, (self._log_dir / "guard.log").open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(theirs.fileno()), str(self._grace_s)],
                pass_fds=[theirs.fileno(), *self._hold],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_events, name="nursery", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def children(self) -> list[Child]:
        """All that were ever started, in that order."""
        return list(self._children.values())

    def spawn(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Child:
        """Start a process; `env` is its whole environment (default: this process's). Umask is 077.

        Raises `ServerStartFailed` if it cannot be started, for instance for want of the executable.
        """
        number = next(self._numbers)
        child = Child(self, number, name, self._log_dir / f"{name}.log")
        self._children[number] = child
        request = {
            "op": "spawn",
            "id": number,
            "argv": list(argv),
            "env": dict(os.environ if env is None else env),
            "cwd": None if cwd is None else str(cwd.absolute()),
            "log": str(child.log_path),
        }
        self._send(request)
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers, SPAWN_TIMEOUT_S)
            error = self._answers.get(number, "the guard did not answer")
        if error is not None:
            raise ServerStartFailed(f"{name} could not be started ({argv[0]}): {error}")
        return child

    def remove_at_end(self, path: Path) -> None:
        """Remove a file, or a directory and all in it, after the last child has ended, however this process ends."""
        self._send({"op": "remove", "path": str(path.absolute())})

    def check(self) -> None:
        """Raise `ServerStartFailed` naming a child that ended though nobody asked it to, with the end of its log."""
        for child in self.children:
            if child.poll() is not None and not child.expected_to_end:
                raise ServerStartFailed(child._how_it_ended())
        if self._guard.poll() is not None:
            raise ServerStartFailed(f"the guard process ended unexpectedly; see {self._log_dir / 'guard.log'}")

    def close(self) -> None:
        """End every child and wait until all are gone. Calling it again does nothing."""
        if self._closing:
            return
        self._closing = True
        for child in self.children:
            child._expect_end()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            self._guard.wait(self._grace_s + GUARD_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._reader.join()
        self._socket.close()

    def _send(self, request: dict[str, Any]) -> None:
        with self._changed, contextlib.suppress(OSError):  # a guard that is gone has taken every child with it
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def _read_events(self) -> None:
        with self._socket.makefile("rb") as events, contextlib.suppress(OSError):
            for line in events:
                self._note(json.loads(line))
        self._guard_is_gone()

    def _note(self, event: dict[str, Any]) -> None:
        child = self._children[event["id"]]
        with self._changed:
            if event["event"] == "spawned":
                child.pid = event["pid"]
                self._answers[event["id"]] = None
            elif event["event"] == "failed":
                self._answers[event["id"]] = event["error"]
                del self._children[event["id"]]
            else:
                child._has_ended(event["code"])
            self._changed.notify_all()

    def _guard_is_gone(self) -> None:
        """Whatever it has not reported as ended is orphaned: on Linux dead already, elsewhere still running."""
        for child in self.children:
            if child.pid and child.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
                child._has_ended(-signal.SIGKILL)
