"""How a round is timed: as many repeats as fill it, found once and then kept, with the garbage collector at rest."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

__all__ = ["QUICK_ROUNDS", "ROUNDS", "microseconds", "repeats_for"]

QUICK_ROUNDS = 7
ROUNDS = 31
"""Many and short, so that two neighbours of a round meet the same machine; odd, so that the median was measured."""


def seconds(batch: Callable[[], object], repeats: int) -> float:
    """How long `repeats` batches take together."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for _ in range(repeats):
            batch()
        return time.perf_counter() - started
    finally:
        gc.enable()


def repeats_for(batch: Callable[[], object], round_s: float) -> int:
    """How many batches fill a round."""
    batch()  # what is only slow the first time
    return max(1, round(round_s / seconds(batch, 1)))


def microseconds(batch: Callable[[], object], size: int, repeats: int) -> Callable[[], float]:
    """A round: microseconds for one of the `size` things that a batch does."""
    return lambda: seconds(batch, repeats) / repeats / size * 1e6
