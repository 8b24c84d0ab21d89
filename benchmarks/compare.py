"""Has anything become slower? The ratios of three runs, each one's median, against the committed results.

Only ratios: they are of two measurements of one run, so they mean the same on another machine, or nearly. Peers' ratios
to the raw check are left out, which others' releases move; so are figures that only this run or only the file has, by
name, so that nothing is passed over in silence.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.form import Figure
from benchmarks.report import Report, ratios

__all__ = ["COMPARED", "RUNS", "WORSE_BY", "Comparison", "compare", "show"]

COMPARED = ("cold", "warm", "threads", "http_share")
RUNS = 3
WORSE_BY = 0.25
"""A quarter: what shared machines do to a median of three stays well below."""


class Comparison(msgspec.Struct, frozen=True):
    """One ratio then and now; `worse_by` 0.3 is thirty per cent to the bad, negative is better."""

    benchmark: str
    name: str
    before: float
    now: float
    worse_by: float

    @property
    def worsened(self) -> bool:
        return self.worse_by > WORSE_BY


def compare(committed: Report, runs: Sequence[Report]) -> tuple[list[Comparison], list[str]]:
    """Every ratio that both have, and the names of those that only one has."""
    found: list[Comparison] = []
    unmatched: list[str] = []
    for benchmark in runs[0].benchmarks:
        earlier = committed.benchmarks.get(benchmark)
        before = {} if earlier is None else _own(ratios(earlier).values())
        now = [_own(ratios(run.benchmarks[benchmark]).values()) for run in runs]
        for name, figure in before.items():
            values = [run[name].value for run in now if name in run]
            if values:
                found.append(_compared(benchmark, figure, statistics.median(values)))
        unmatched += [f"{benchmark}: {name}" for name in sorted(before.keys() ^ now[0].keys())]
    return found, unmatched


def _own(figures: Iterable[Figure]) -> Mapping[str, Figure]:
    """Those that this project can worsen: with a goal, or of the verifier itself."""
    return {figure.name: figure for figure in figures if figure.goal is not None or not _of_a_peer(figure.name)}


def _of_a_peer(name: str) -> bool:
    over, _, under = name.partition(" ÷ ")
    mine = ("verifier", "same object", "order service", "8 threads")
    return not over.startswith(mine) and not under.startswith(mine)


def _compared(benchmark: str, before: Figure, now: float) -> Comparison:
    change = now / before.value if before.better == "lower" else before.value / now
    return Comparison(benchmark, before.name, before.value, now, change - 1)


def show(found: Sequence[Comparison], unmatched: Sequence[str], console: Console) -> None:
    table = Table("benchmark", "ratio", "committed", "now", "worse by", "", box=None, pad_edge=False)
    for column in table.columns[2:5]:
        column.justify = "right"
    for c in found:
        verdict = "[red]worsened[/red]" if c.worsened else ""
        table.add_row(c.benchmark, c.name, f"{c.before:.3g}", f"{c.now:.3g}", f"{c.worse_by:+.0%}", verdict)
    console.print(table)
    for name in unmatched:
        console.print(f"  Not compared, because only one side has it: {name}", style="yellow")
