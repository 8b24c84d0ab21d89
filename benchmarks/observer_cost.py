"""What an observer adds to a verification: metrics, traces that nobody records, and the hook by itself.

Beside a warm verification, where it weighs most, and beside a cold one. Each observer has a verifier of its own; they
take turns in one run, so that the differences are of the same machine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry

from benchmarks.configuration import AUDIENCE, ISSUER, make_tokens
from benchmarks.form import Figure, Result, Rounds, figure, measured, ratio, take_turns
from benchmarks.peers import each
from benchmarks.timing import QUICK_ROUNDS, ROUNDS, microseconds, repeats_for
from verifier import Verifier
from verifier.metrics import VerifierMetrics
from verifier.observing import Decision, Observer
from verifier.testing import StaticKeys, StaticRevocations, make_key
from verifier.tracing import TracingObserver

__all__ = ["measure"]

WARM, COLD = "warm", "cold"
BARE = "no observer"
ROUND_S = 0.04
TOKENS = 64


class Silent:
    """Does nothing with what it is told: the cost of telling."""

    def decided(self, decision: Decision) -> None: ...


def measure(*, quick: bool = False) -> Result:
    key = make_key()
    keys, tokens = StaticKeys(key), make_tokens(key, TOKENS)
    round_s = 0.005 if quick else ROUND_S
    observers: dict[str, Observer | None] = {
        BARE: None,
        "silent observer": Silent(),
        "VerifierMetrics": VerifierMetrics(CollectorRegistry()),
        "TracingObserver, not recording": TracingObserver(NoOpTracerProvider()),
    }
    contestants: dict[str, Callable[[], float]] = {}
    with ExitStack() as running:
        for temperature, cache_size in ((WARM, 10_000), (COLD, 0)):
            for name, observer in observers.items():
                verifier = running.enter_context(_verifier(keys, cache_size, observer))
                batch = each(verifier.verify, tokens)
                repeats = repeats_for(batch, round_s)
                contestants[f"{temperature}, {name}"] = microseconds(batch, TOKENS, repeats)
        rounds = take_turns(contestants, QUICK_ROUNDS if quick else ROUNDS)
    return Result(
        title="What an observer adds to a verification",
        measurements=measured(rounds, "µs"),
        figures=_figures(rounds, [name for name in observers if name != BARE]),
    )


def _figures(rounds: Rounds, names: list[str]) -> tuple[Figure, ...]:
    figures = []
    for temperature in (WARM, COLD):
        bare = rounds[f"{temperature}, {BARE}"]
        for name in names:
            observed = rounds[f"{temperature}, {name}"]
            added = [with_it - without for with_it, without in zip(observed, bare, strict=True)]
            figures.append(figure(f"{temperature}, {name}: added", added, "µs", "lower"))
            figures.append(ratio(f"{temperature}, {name} ÷ {BARE}", observed, bare, "lower"))
    return tuple(figures)


def _verifier(keys: StaticKeys, cache_size: int, observer: Observer | None) -> Verifier:
    return Verifier(
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks_urls=None,
        jwks=keys.jwks,
        redis_url=StaticRevocations(),
        token_cache_size=cache_size,
        observer=observer,
    )
