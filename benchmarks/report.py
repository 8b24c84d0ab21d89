"""The results of a run: as tables, and as `benchmarks/results.json`.

A run of some benchmarks replaces those in the file and leaves the others, as long as the machine is the same: numbers
of two machines never stand beside each other.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.form import RATIO, Figure, Result
from benchmarks.machine import Machine

__all__ = ["RESULTS", "Report", "ratios", "read", "show", "value_text", "write"]

RESULTS = Path(__file__).parent / "results.json"


class Report(msgspec.Struct, frozen=True):
    """Benchmark to its result."""

    machine: Machine
    benchmarks: dict[str, Result]

    def merged_into(self, earlier: Report | None) -> Report:
        if earlier is None or earlier.machine != self.machine:
            return self
        return Report(self.machine, earlier.benchmarks | self.benchmarks)


def read(path: Path = RESULTS) -> Report | None:
    """None if nothing was measured yet."""
    return msgspec.json.decode(path.read_bytes(), type=Report) if path.exists() else None


def write(report: Report, path: Path = RESULTS) -> None:
    rounded = msgspec.json.decode(msgspec.json.encode(report))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(_rounded(rounded)), indent=2) + b"\n")


def _rounded(value: object) -> object:
    """Four digits: more would be noise, and make every run a change."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(member) for name, member in value.items()}
    return [_rounded(member) for member in value] if isinstance(value, list) else value


def value_text(value: float, unit: str) -> str:
    """As in a table: three digits or so, and the unit."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:,.{digits}f} {unit}"


def goal_text(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    return f"{'≤' if figure.better == 'lower' else '≥'} {value_text(figure.goal, figure.unit)}"


def show(result: Result, console: Console) -> None:
    """Two tables: who measured what, and what that says about the goals."""
    console.print(f"\n[bold]{result.title}[/bold]")
    measured = Table("", "median", "spread", box=None, pad_edge=False)
    for column in measured.columns[1:]:
        column.justify = "right"
    for m in result.measurements:
        measured.add_row(m.name, value_text(m.value, m.unit), f"{m.spread:.0%}")
    console.print(measured)
    figures = Table("figure", "value", "spread", "goal", "", box=None, pad_edge=False)
    for column in figures.columns[1:4]:
        column.justify = "right"
    for f in result.figures:
        verdict = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}[f.met]
        figures.add_row(f.name, value_text(f.value, f.unit), f"{f.spread:.0%}", goal_text(f), verdict)
    console.print(figures)
    for text in result.notes:
        console.print(f"  {text}", style="dim")
    for text in result.left_out:
        console.print(f"  Left out: {text}", style="yellow")


def ratios(result: Result) -> dict[str, Figure]:
    """The figures that may be compared between runs."""
    return {figure.name: figure for figure in result.figures if figure.unit == RATIO}
