"""A token that was never seen before: verified with every check on and no cache, beside other libraries.

Everyone goes through the same tokens, signed with one RSA-2048 key. The base of a ratio is the bare signature check of
the same language: pyca's `public_key.verify` for Python, `crypto.verify` for Node.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.configuration import benchmarked_verifier, make_tokens
from benchmarks.form import Figure, Result, Rounds, measured, ratio, take_turns
from benchmarks.node_peers import NODE_RAW, node_peers
from benchmarks.peers import RAW, Batch, each, python_peers, raw_check, serve_jwks, versions
from benchmarks.timing import QUICK_ROUNDS, ROUNDS, microseconds, repeats_for
from verifier.testing import StaticKeys, make_key

__all__ = ["NODE_COLD", "VERIFIER", "measure"]

VERIFIER = "verifier, cache off"
NODE_COLD = [NODE_RAW, "fast-jwt", "jose, key object", "aws-jwt-verify"]
ROUND_S = 0.04
TOKENS = 64


def measure(*, quick: bool = False) -> Result:
    key = make_key()
    keys, tokens = StaticKeys(key), make_tokens(key, TOKENS)
    round_s = 0.005 if quick else ROUND_S
    left_out: list[str] = []
    with (
        benchmarked_verifier(keys, 0) as verifier,
        serve_jwks(keys) as url,
        node_peers(keys, tokens, left_out) as node,
    ):
        batches: dict[str, Batch] = {RAW: raw_check(key, tokens), VERIFIER: each(verifier.verify, tokens)}
        batches |= {name: each(verify, tokens) for name, verify in python_peers(key, url).items()}
        contestants: dict[str, Callable[[], float]] = {
            name: microseconds(batch, TOKENS, repeats_for(batch, round_s)) for name, batch in batches.items()
        }
        if node is not None:
            contestants |= node.contestants(NODE_COLD, round_s)
        rounds = take_turns(contestants, QUICK_ROUNDS if quick else ROUNDS)
    return Result(
        title="Cold: a token not seen before, cache off, every check on",
        measurements=measured(rounds, "µs"),
        figures=_figures(rounds),
        versions=versions() | ({} if node is None else node.versions),
        left_out=tuple(left_out),
        notes=("PyJWT and the others look at no revocations and refuse fewer malformed tokens.",),
    )


def _figures(rounds: Rounds) -> tuple[Figure, ...]:
    mine = rounds[VERIFIER]
    figures = [
        ratio("verifier ÷ raw check", mine, rounds[RAW], "lower", 1.25),
        ratio("PyJWT with a key object ÷ verifier", rounds["PyJWT, key object"], mine, "higher", 2.3),
        ratio("PyJWT with its JWKS client ÷ verifier", rounds["PyJWT, JWKS client"], mine, "higher", 4.0),
    ]
    figures += [
        ratio(f"{name} ÷ raw check", rounds[name], rounds[NODE_RAW if name in NODE_COLD else RAW], "lower")
        for name in rounds
        if name not in (RAW, NODE_RAW, VERIFIER)
    ]
    return tuple(figures)
