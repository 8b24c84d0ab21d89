"""Eight threads that verify warm tokens with one verifier, beside one thread: a lock on that path would show.

Under a GIL eight threads cannot be faster than one; the goal is that they are hardly slower. Each thread times its own
verifications from a common start; throughput is all of them over the time until the last has finished.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from benchmarks.configuration import benchmarked_verifier, make_tokens
from benchmarks.form import Result, measured, ratio, take_turns
from benchmarks.peers import Batch, each
from benchmarks.timing import QUICK_ROUNDS, ROUNDS, repeats_for
from verifier.testing import StaticKeys, make_key

__all__ = ["measure"]

THREADS = 8
TOKENS = 64
ROUND_S = 0.1


def measure(*, quick: bool = False) -> Result:
    key = make_key()
    with benchmarked_verifier(StaticKeys(key), 10_000) as verifier:
        batch = each(verifier.verify, make_tokens(key, TOKENS))
        repeats = max(THREADS, repeats_for(batch, 0.02 if quick else ROUND_S))
        one, many = "1 thread", f"{THREADS} threads"
        rounds = take_turns(
            {one: _throughput(batch, 1, repeats), many: _throughput(batch, THREADS, repeats)},
            QUICK_ROUNDS if quick else ROUNDS,
        )
    return Result(
        title="Threads: warm verifications a second, all threads together",
        measurements=measured(rounds, "1/s"),
        figures=(ratio("8 threads ÷ 1 thread", rounds[many], rounds[one], "higher", 0.9),),
    )


def _throughput(batch: Batch, threads: int, repeats: int) -> Callable[[], float]:
    """A round: verifications a second, of as many whatever the number of threads."""
    share = repeats // threads

    def one_round() -> float:
        start = threading.Barrier(threads + 1)

        def work() -> None:
            start.wait()
            for _ in range(share):
                batch()

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        started = time.perf_counter()
        start.wait()
        for worker in workers:
            worker.join()
        return share * threads * TOKENS / (time.perf_counter() - started)

    return one_round
