"""Starts what the HTTP benchmarks drive, each in a process of its own, and the generator that drives it."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.generator import Job, Load

__all__ = ["PATH", "Generator", "generator", "serve", "serve_trivial"]

PATH = "/orders"
ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 60.0
READY_IN_A_ROW = 40
"""New connections answered 200 one after the other: with two workers both have then had some."""


class Generator:
    """One load generator: `load` drives one server and gives what it saw. Raises `RuntimeError` on anything but 200."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def load(self, port: int, authorization: str, *, requests: int, connections: int) -> Load:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = Job("127.0.0.1", port, PATH, authorization, connections, requests)
        self._process.stdin.write(msgspec.json.encode(job).decode() + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the load generator gave up on {job}: see above")
        return msgspec.json.decode(answer, type=Load)


@contextmanager
def generator() -> Iterator[Generator]:
    command = [sys.executable, "-m", "benchmarks.generator"]
    with _process(command, {}) as process:
        yield Generator(process)


@contextmanager
def serve(app: str, authorization: str, environment: Mapping[str, str], *, workers: int = 1) -> Iterator[int]:
    """The port of uvicorn with an application of :mod:`benchmarks.http_apps`, ready for that token."""
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", f"benchmarks.http_apps:{app}", "--factory", "--port", str(port)]
    command += ["--workers", str(workers), "--loop", "uvloop", "--http", "httptools", "--backlog", "1024"]
    with _process([*command, "--no-access-log", "--log-level", "error"], environment) as process:
        _wait_ready(process, port, authorization)
        yield port


@contextmanager
def serve_trivial() -> Iterator[int]:
    port = _free_port()
    with _process([sys.executable, "-m", "benchmarks.trivial_server", str(port)], {}) as process:
        _wait_ready(process, port, "")
        yield port


@contextmanager
def _process(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def _wait_ready(process: subprocess.Popen[str], port: int, authorization: str) -> None:
    deadline, good, status = time.monotonic() + READY_WITHIN_S, 0, 0
    while good < READY_IN_A_ROW:
        if process.poll() is not None:
            raise RuntimeError("a server ended before it was ready: see above")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a server was not ready within {READY_WITHIN_S:.0f} s; its last answer was {status}")
        status = _ask(port, authorization)
        good = good + 1 if status == 200 else 0
        if not good:
            time.sleep(0.05)


def _ask(port: int, authorization: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", PATH, headers={"Authorization": authorization} if authorization else {})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
