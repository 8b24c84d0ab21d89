"""What a check of the token leaves of an endpoint's requests a second: one FastAPI endpoint, one uvicorn worker each.

All applications run at once, and one at a time is driven over kept-alive connections. The share of the middleware is of
the same endpoint without any check; that of `Depends(bearer(...))` is of one with a dependency that does nothing, since
FastAPI's own machinery for dependencies is what an application chose to pay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from benchmarks.configuration import make_tokens
from benchmarks.form import Result, measured, ratio, take_turns
from benchmarks.serving import Generator, generator, serve
from verifier.testing import StaticKeys, make_key

__all__ = ["measure"]

NO_AUTH, MIDDLEWARE, EMPTY, DEPENDS, PYJWT = (
    "no auth",
    "verifier, ASGI middleware",
    "an empty dependency",
    "verifier, Depends(bearer(...))",
    "PyJWT in a dependency",
)
APPS = {
    NO_AUTH: "no_auth",
    MIDDLEWARE: "middleware",
    EMPTY: "empty_dependency",
    DEPENDS: "depends",
    PYJWT: "pyjwt",
}
ROUNDS = 21
REQUESTS, CONNECTIONS = 2_000, 16


def measure(*, quick: bool = False) -> Result:
    key = make_key()
    keys = StaticKeys(key)
    authorization = f"Bearer {make_tokens(key, 1)[0]}"
    environment = {"BENCH_JWKS": msgspec.json.encode(keys.jwks).decode()}
    requests = REQUESTS // 20 if quick else REQUESTS
    with ExitStack() as stack:
        driver = stack.enter_context(generator())
        ports = {name: stack.enter_context(serve(app, authorization, environment)) for name, app in APPS.items()}
        contestants = {name: _driving(driver, port, authorization, requests) for name, port in ports.items()}
        for warm_up in contestants.values():
            warm_up()
        rounds = take_turns(contestants, ROUNDS)
    return Result(
        title="HTTP: requests a second to one FastAPI endpoint, one worker",
        measurements=measured(rounds, "1/s"),
        figures=(
            ratio(f"{MIDDLEWARE} ÷ {NO_AUTH}", rounds[MIDDLEWARE], rounds[NO_AUTH], "higher", 0.93),
            ratio(f"{DEPENDS} ÷ {EMPTY}", rounds[DEPENDS], rounds[EMPTY], "higher", 0.97),
            *(
                ratio(f"{name} ÷ {NO_AUTH}", rounds[name], rounds[NO_AUTH], "higher")
                for name in (EMPTY, DEPENDS, PYJWT)
            ),
        ),
        notes=(f"{CONNECTIONS} kept-alive connections, {requests:,} requests a round",),
    )


def _driving(driver: Generator, port: int, authorization: str, requests: int) -> Callable[[], float]:
    return lambda: driver.load(port, authorization, requests=requests, connections=CONNECTIONS).per_second
