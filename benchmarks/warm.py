"""A token that was seen before: what the cache of verified tokens costs, and what it costs when revocations pour in.

The mixture is what a busy service meets: of a hundred requests one carries a token never seen, the others one of a
thousand in use, while a thread applies a hundred revocations a second to the mirror. Each of those makes every cached
token be judged by the new revocations once more.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.configuration import ISSUER, benchmarked_verifier, make_tokens
from benchmarks.form import Figure, Result, Rounds, figure, measured, ratio, take_turns
from benchmarks.node_peers import node_peers
from benchmarks.peers import RAW, Batch, each, raw_check
from benchmarks.timing import QUICK_ROUNDS, ROUNDS, microseconds, repeats_for, seconds
from verifier import Verifier
from verifier.testing import SigningKey, StaticKeys, StaticRevocations, make_key

__all__ = ["FRESH_STRING", "MIXTURE", "NODE_WARM", "SAME_OBJECT", "measure"]

SAME_OBJECT, FRESH_STRING = "verifier, same object", "verifier, equal string just decoded"
MIXTURE = "verifier, 1 % new tokens, 100 revocations/s"
NODE_WARM = ["fast-jwt, cached", "fast-jwt, cached by token"]
ROUND_S = 0.04
TOKENS = 64
POPULATION = 1_000
FRESH_SHARE = 0.01
REVOCATIONS_PER_S = 100.0
VERIFICATIONS = 20_000


def measure(*, quick: bool = False) -> Result:
    key = make_key()
    keys, tokens = StaticKeys(key), make_tokens(key, TOKENS)
    round_s = 0.005 if quick else ROUND_S
    left_out: list[str] = []
    revocations = StaticRevocations()
    with (
        benchmarked_verifier(keys, 10_000) as verifier,
        benchmarked_verifier(keys, 10_000, revocations=revocations) as busy,
        node_peers(keys, tokens, left_out) as node,
    ):
        batches: dict[str, Batch] = {
            RAW: raw_check(key, tokens),
            SAME_OBJECT: each(verifier.verify, tokens),
            FRESH_STRING: _decoding(verifier, tokens),
        }
        contestants: dict[str, Callable[[], float]] = {
            name: microseconds(batch, TOKENS, repeats_for(batch, round_s)) for name, batch in batches.items()
        }
        contestants[MIXTURE] = _mixture(busy, key, revocations, VERIFICATIONS // 10 if quick else VERIFICATIONS)
        if node is not None:
            contestants |= node.contestants(NODE_WARM, round_s)
        rounds = take_turns(contestants, QUICK_ROUNDS if quick else ROUNDS)
    return Result(
        title="Warm: a token seen before",
        measurements=measured(rounds, "µs"),
        figures=_figures(rounds),
        versions={} if node is None else node.versions,
        left_out=tuple(left_out),
        notes=("fast-jwt hashes the token before it looks it up; told to use the token itself, it warns of the risk.",),
    )


def _figures(rounds: Rounds) -> tuple[Figure, ...]:
    figures = [
        figure(SAME_OBJECT, rounds[SAME_OBJECT], "µs", "lower", 0.4),
        figure(FRESH_STRING, rounds[FRESH_STRING], "µs", "lower", 0.7),
        figure(MIXTURE, rounds[MIXTURE], "µs", "lower", 2.0),
    ]
    mine = (SAME_OBJECT, FRESH_STRING, MIXTURE)
    figures += [ratio(f"{name} ÷ raw check", rounds[name], rounds[RAW], "lower") for name in mine]
    for name in NODE_WARM:
        if name in rounds:
            goal = 1.0 if name == "fast-jwt, cached" else None
            figures.append(ratio(f"same object ÷ {name}", rounds[SAME_OBJECT], rounds[name], "lower", goal))
    return tuple(figures)


def _decoding(verifier: Verifier, tokens: list[str]) -> Batch:
    """As a request brings it: bytes, made a string that has no hash yet."""
    received = [token.encode() for token in tokens]

    def batch() -> None:
        for raw in received:
            verifier.verify(raw.decode())

    return batch


def _mixture(verifier: Verifier, key: SigningKey, revocations: StaticRevocations, count: int) -> Callable[[], float]:
    """A round: mean microseconds over `count` verifications. Its new tokens are made before the clock starts."""
    rng = random.Random(1)
    population = make_tokens(key, POPULATION)
    each(verifier.verify, population)()

    def one_round() -> float:
        requests = rng.choices(population, k=count)
        new = make_tokens(key, round(count * FRESH_SHARE))
        for at, token in zip(rng.sample(range(count), len(new)), new, strict=True):
            requests[at] = token
        with _revoking(revocations):
            return seconds(each(verifier.verify, requests), 1) / count * 1e6

    return one_round


@contextmanager
def _revoking(revocations: StaticRevocations) -> Iterator[None]:
    """A hundred revocations a second, of tokens that nobody carries."""
    over = threading.Event()

    def apply() -> None:
        number = 0
        while not over.wait(1 / REVOCATIONS_PER_S):
            number += 1
            revocations.revoke("jti", f"somebody-else-{number}", issuer=ISSUER)

    thread = threading.Thread(target=apply)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
