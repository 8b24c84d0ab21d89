"""What authentication leaves of a FastAPI endpoint's requests per second: one worker, warm token, one run.

    python -m benchmarks.http_share [--rounds 15] [--round-ms 700] [--connections 16] [--json]

Each variant is uvicorn in a process of its own; rounds are interleaved, and every request has the same headers, also
where nobody looks at them. A worker is bound by its CPU: shares are of requests for each second that its process
computed, so that other work on the machine counts little, and medians of the rounds' own ratios.
Goals: the middleware at least 0.93 of no authentication, the dependency at least 0.97 of an empty one.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI

from benchmarks.tools import Rows, options, show
from verifier import Verifier
from verifier.asgi import AuthMiddleware
from verifier.fastapi import bearer
from verifier.testing import StaticKeys, StaticRevocations, make_key, sign

VARIANTS = ("no authentication", "ASGI middleware", "empty dependency", "bearer dependency")
BASES = {"ASGI middleware": "no authentication", "bearer dependency": "empty dependency"}
CLAIMS = {
    "iss": "https://id.bench.test", "aud": "orders", "sub": "user-1234567890", "client_id": "web",
    "jti": "0192f0c1-7b0e-7cc3-98c4-dc0c0c07398f", "sid": "0192f0c1-7b0e-7cc3-98c4-dc0c0c07398e",
    "scope": "orders:read orders:write",
}  # fmt: skip


def make_app(variant: str, jwks: Any) -> FastAPI:
    app = FastAPI()
    verifier = Verifier(
        issuer=CLAIMS["iss"], audience="orders", jwks_urls=None, jwks=jwks, redis_url=StaticRevocations()
    ).start()
    dependencies: list[Any] = []
    if variant == "ASGI middleware":
        app.add_middleware(AuthMiddleware, verifier=verifier)
    elif variant == "bearer dependency":
        dependencies = [Depends(bearer(verifier))]
    elif variant == "empty dependency":

        async def nothing() -> None: ...

        dependencies = [Depends(nothing)]

    @app.get("/orders", dependencies=dependencies)
    async def orders() -> dict[str, Any]:
        return {"customer": "user-1234567890", "orders": ["1 x espresso"]}

    return app


def serve(variant: str) -> None:
    """A child: makes a key, prints its port and a token, and serves until its standard input closes."""
    key = make_key()
    app = make_app(variant, StaticKeys(key).jwks)
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # named, or the event loop leaves Nagle's algorithm on
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    print(listener.getsockname()[1], sign(key, CLAIMS), flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))

    async def run() -> None:
        async def watch() -> None:
            while await asyncio.to_thread(sys.stdin.readline):
                print(time.process_time(), flush=True)
            server.should_exit = True

        watching = asyncio.ensure_future(watch())
        await server.serve([listener])
        await watching

    asyncio.run(run())


class Served:
    """The child of a variant, and the request that it is sent."""

    def __init__(self, variant: str, stack: ExitStack) -> None:
        argv = [sys.executable, "-m", "benchmarks.http_share", "--serve", variant]
        child = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert child.stdout is not None
        assert child.stdin is not None
        self._answers, self._questions = child.stdout, child.stdin
        port, token = self._answers.readline().split()
        self.port = int(port)
        lines = ("GET /orders HTTP/1.1", f"Host: 127.0.0.1:{port}", "Accept: application/json", "User-Agent: bench/1")
        self.request = "\r\n".join([*lines, f"Authorization: Bearer {token}", "", ""]).encode()

    def cpu_s(self) -> float:
        """Seconds that it has computed so far."""
        self._questions.write("\n")
        self._questions.flush()
        return float(self._answers.readline())


class Asking(asyncio.Protocol):
    """One connection: asks again as soon as the answer is there."""

    def __init__(self, request: bytes) -> None:
        self.request, self.answers, self.received = request, 0, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.received.endswith(b"}"):  # of the one JSON object: head and body may come apart
            if not self.received.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"not 200: {self.received[:80]!r}")
            self.received = b""
            self.answers += 1
            self.transport.write(self.request)


async def cost_of(served: Served, connections: int, duration_s: float) -> tuple[float, float]:
    """Requests a second, and seconds of the server's CPU a request."""
    loop = asyncio.get_running_loop()
    asking = [
        (await loop.create_connection(lambda: Asking(served.request), "127.0.0.1", served.port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(0.05)
    before, cpu_s, started = sum(one.answers for one in asking), served.cpu_s(), time.perf_counter()
    await asyncio.sleep(duration_s)
    answers, took_s = sum(one.answers for one in asking) - before, time.perf_counter() - started
    cpu_s = served.cpu_s() - cpu_s
    for one in asking:
        one.transport.close()
    return answers / took_s, cpu_s / answers


def measure(rounds: int, round_s: float, connections: int) -> Rows:
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with ExitStack() as stack:
        servers = {variant: Served(variant, stack) for variant in VARIANTS}
        for _ in range(rounds):
            for variant, served in servers.items():
                found[variant].append(asyncio.run(cost_of(served, connections, round_s)))
    rows: Rows = {}
    for variant, costs in found.items():
        base = BASES.get(variant, VARIANTS[0])
        ratios = [theirs[1] / mine[1] for mine, theirs in zip(costs, found[base], strict=True)]
        rows[variant] = {
            "requests/s": statistics.median(rate for rate, _ in costs),
            "CPU us/request": statistics.median(cpu_s for _, cpu_s in costs) * 1e6,
            f"of {base}": statistics.median(ratios),
        }
    return rows


def main() -> None:
    if "--serve" in sys.argv:
        serve(sys.argv[-1])
        return
    arguments = options(__doc__, rounds=15, round_ms=700, connections=16)
    show(measure(arguments.rounds, arguments.round_ms / 1000, arguments.connections), as_json=arguments.json)


if __name__ == "__main__":
    main()
