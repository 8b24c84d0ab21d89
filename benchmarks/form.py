"""The one form of a benchmark's result, and what it is made from: rounds.

A benchmark times its contestants in rounds, taking turns, so that a slow moment of the machine hits all alike. A
contestant's value is the median of its rounds; a ratio is the median of the rounds' ratios, never that of two medians.
`spread` is the distance between the quartiles as a share of the median.

Only ratios are compared between runs (:mod:`benchmarks.compare`): absolute times are a machine's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

__all__ = [
    "RATIO",
    "Better",
    "Figure",
    "Measurement",
    "Result",
    "Rounds",
    "figure",
    "measured",
    "ratio",
    "spread_of",
    "take_turns",
]

RATIO = "×"
"""The unit of a figure that is a ratio of two measurements of one run."""

Better = Literal["lower", "higher"]

Rounds = dict[str, list[float]]
"""Contestant to what it measured in each round; one that had nothing to measure is left out."""


class Measurement(msgspec.Struct, frozen=True):
    """One contestant: the median of its rounds."""

    name: str
    unit: str
    value: float
    spread: float
    rounds: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised or watched. `goal` None: it is only watched. `better` says which side of the goal is good."""

    name: str
    unit: str
    value: float
    spread: float
    better: Better
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Is the goal reached? None where there is none."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark. `left_out` says what was not measured, and how to have it measured."""

    title: str
    measurements: tuple[Measurement, ...]
    figures: tuple[Figure, ...]
    versions: dict[str, str] = {}
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def figure(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)


def spread_of(values: Sequence[float]) -> float:
    """The distance between the quartiles as a share of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def measured(rounds: Mapping[str, Sequence[float]], unit: str) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(name, unit, statistics.median(values), spread_of(values), len(values))
        for name, values in rounds.items()
    )


def ratio(
    name: str,
    over: Sequence[float],
    under: Sequence[float],
    better: Better,
    goal: float | None = None,
) -> Figure:
    """Round by round `over` ÷ `under`."""
    values = [a / b for a, b in zip(over, under, strict=True)]
    return figure(name, values, RATIO, better, goal)


def figure(name: str, values: Sequence[float], unit: str, better: Better, goal: float | None = None) -> Figure:
    middle, spread = statistics.median(values), spread_of(values)
    return Figure(name=name, unit=unit, value=middle, spread=spread, better=better, goal=goal)


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Each once a round, in an order that turns by one a round: nobody always follows the same neighbour's mess."""
    names = list(contestants)
    found: Rounds = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(contestants[name]())
    return found
