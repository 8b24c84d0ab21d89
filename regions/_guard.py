"""The guard: the process that owns the children of a `regions.nursery.Nursery`, and ends them when their user is gone.

Started by the nursery as `python -I -S _guard.py CONTROL_FD GRACE_S`, so it imports the standard library only. It sits
in a session of its own, where no Ctrl-C and no closing terminal reaches it or its children. It reads JSON lines from
the control socket and answers on it:

    {"op": "spawn", "id", "argv", "env", "cwd", "log"}  →  {"event": "spawned", "id", "pid"}
                                                        or {"event": "failed", "id", "error"}
    {"op": "signal", "id", "signal"}                       to the child's whole process group
    {"op": "remove", "path"}                               this file or directory goes when all end
                                                        →  {"event": "exited", "id", "code"}   when a child ended

When the control socket closes, or the nursery's process is gone (a fork of it might hold the socket open), it ends
every process group (TERM, the grace, KILL), removes what it was told to, and exits. Should the guard itself be killed,
Linux kills its children (PR_SET_PDEATHSIG), and the nursery kills their groups on any system.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

PARENT_CHECK_S = 0.5
REAP_POLL_S = 0.01
KILLED_WITHIN_S = 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Guard:
    """Children by the id that the nursery gave them."""

    def __init__(self, control: socket.socket, grace_s: float) -> None:
        self._control = control
        self._grace_s = grace_s
        self._parent_pid = os.getppid()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._to_remove: list[str] = []
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._pid = os.getpid()

    def run(self) -> None:
        """Serve until the nursery is gone, then end everything."""
        woken = _wake_on_signals(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        received = b""
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while os.getppid() == self._parent_pid:
                ready = {key.fileobj for key, _ in selector.select(PARENT_CHECK_S)}
                if woken in ready and signal.SIGTERM in woken.recv(4096):
                    break
                if self._control in ready:
                    chunk = self._control.recv(65_536)
                    if not chunk:
                        break
                    *lines, received = (received + chunk).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))
                self._reap()
        self._end_all()

    def _obey(self, request: dict[str, Any]) -> None:
        if request["op"] == "spawn":
            self._spawn(request)
        elif request["op"] == "signal":
            self._signal(request["id"], request["signal"])
        elif request["op"] == "remove":
            self._to_remove.append(request["path"])

    def _spawn(self, request: dict[str, Any]) -> None:
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                child = subprocess.Popen(
                    request["argv"],
                    env=request["env"],
                    cwd=request["cwd"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                    preexec_fn=self._die_with_guard,  # noqa: PLW1509 - this process has one thread
                )
            finally:
                os.close(log)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            self._tell({"event": "failed", "id": request["id"], "error": str(error)})
            return
        self._children[request["id"]] = child
        self._tell({"event": "spawned", "id": request["id"], "pid": child.pid})

    def _die_with_guard(self) -> None:
        """Runs in the child between fork and exec."""
        if self._libc is not None:
            self._libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != self._pid:  # the guard was gone before the line above
                os._exit(1)

    def _signal(self, number: int, to_send: int) -> None:
        child = self._children.get(number)
        if child is not None:  # else it has been reaped, and its pid may be someone else's by now
            _signal_group(child.pid, to_send)

    def _reap(self) -> None:
        for number, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[number]
                # What it left behind. Process ids are handed out in turn, so a moment after the wait this one is
                # still free or its own group's.
                _signal_group(child.pid, signal.SIGKILL)
                self._tell({"event": "exited", "id": number, "code": child.returncode})

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a nursery that is gone is noticed where it is read
            self._control.sendall(json.dumps(event).encode() + b"\n")

    def _end_all(self) -> None:
        for to_send, wait_s in ((signal.SIGTERM, self._grace_s), (signal.SIGKILL, KILLED_WITHIN_S)):
            for child in self._children.values():
                _signal_group(child.pid, to_send)
                _signal_group(child.pid, signal.SIGCONT)  # a stopped process takes no TERM
            deadline = time.monotonic() + wait_s
            while self._children and time.monotonic() < deadline:
                self._reap()
                time.sleep(REAP_POLL_S)
        for path in self._to_remove:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(path)  # a file


def _wake_on_signals(*numbers: signal.Signals) -> socket.socket:
    """A socket that receives the number of each of these signals as a byte.

    Handled, not ignored: a handled signal is back to its default in a child, an ignored one stays ignored.
    """
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    signal.set_wakeup_fd(waking.detach(), warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return woken


def _signal_group(group: int, to_send: int) -> None:
    with contextlib.suppress(OSError):  # gone already
        os.killpg(group, to_send)


if __name__ == "__main__":
    os.umask(0o077)
    Guard(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])).run()
