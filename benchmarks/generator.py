"""A load generator in a process of its own: prepared bytes over kept-alive connections, one request under way on each.

    python -m benchmarks.generator

A command a line on stdin, {"host", "port", "path", "authorization", "connections", "requests"}, an answer a line on
stdout: `Load`. An answer counts only if its status is 200; any other, or a lost connection, is an error that ends it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import cast

import msgspec
import uvloop

__all__ = ["Job", "Load"]

_LENGTH = b"content-length:"
WITHIN_S = 120.0
"""A job that takes longer hangs: the slowest server here answers a thousand requests a second."""
_END = b"\r\n\r\n"


class Job(msgspec.Struct, frozen=True):
    """What to do. `authorization` empty sends no such header; it is kept out of the repr."""

    host: str
    port: int
    path: str
    authorization: str
    connections: int
    requests: int

    def __repr__(self) -> str:
        return f"Job({self.host}:{self.port}{self.path}, {self.requests} over {self.connections})"

    def request(self) -> bytes:
        lines = [f"GET {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        if self.authorization:
            lines.append(f"Authorization: {self.authorization}")
        return "\r\n".join([*lines, "", ""]).encode()


class Load(msgspec.Struct, frozen=True):
    """What came of it; times of single requests in milliseconds."""

    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class _Run:
    """What the connections of one job share."""

    def __init__(self, job: Job) -> None:
        self.request = job.request()
        self.to_send = self.to_receive = job.requests
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, what: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(what))


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._received = b""
        self._sent_at = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its bases

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.fail(f"the server closed a connection: {exc}")

    def send(self) -> None:
        run = self._run
        if run.to_send > 0 and self.transport is not None:
            run.to_send -= 1
            self._sent_at = time.perf_counter()
            self.transport.write(run.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not _is_whole(self._received):
            return
        run = self._run
        run.latencies.append(time.perf_counter() - self._sent_at)
        if not self._received.startswith(b"HTTP/1.1 200 "):
            run.fail(f"not 200 but {self._received[:12]!r}")
            return
        self._received = b""
        run.to_receive -= 1
        if run.to_receive == 0 and not run.done.done():
            run.done.set_result(None)
        self.send()


def _is_whole(answer: bytes) -> bool:
    """Is all of the answer there? One without a length is taken for whole at the end of its head."""
    end = answer.find(_END)
    if end < 0:
        return False
    at = answer.lower().find(_LENGTH, 0, end)
    if at < 0:
        return True
    length = int(answer[at + len(_LENGTH) : answer.index(b"\r\n", at)])
    return len(answer) >= end + len(_END) + length


async def drive(job: Job) -> Load:
    """Every connection is open before the clock starts."""
    loop, run = asyncio.get_running_loop(), _Run(job)
    made = [await loop.create_connection(lambda: _Connection(run), job.host, job.port) for _ in range(job.connections)]
    started = time.perf_counter()
    for _, connection in made:
        connection.send()
    try:
        async with asyncio.timeout(WITHIN_S):
            await run.done
    finally:
        took = time.perf_counter() - started
        for transport, _ in made:
            transport.abort()
    cuts = statistics.quantiles(run.latencies, n=100, method="inclusive")
    return Load(job.requests / took, cuts[49] * 1e3, cuts[94] * 1e3, cuts[98] * 1e3)


def main() -> None:
    for line in sys.stdin:
        job = msgspec.json.decode(line, type=Job)
        print(msgspec.json.encode(uvloop.run(drive(job))).decode(), flush=True)


if __name__ == "__main__":
    main()
