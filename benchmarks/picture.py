"""`docs/images/bench.svg`: the results as bars, readable on a light page and on a dark one.

A panel is drawn for each benchmark that was run. A scale is linear from zero, or logarithmic where values lie decades
apart; a panel's title says the unit, which way is better, and the scale. The verifier's own bars are coloured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import msgspec

from benchmarks.form import Result
from benchmarks.machine import Machine
from benchmarks.report import Report

__all__ = ["PICTURE", "Panel", "draw", "panels", "write"]

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "bench.svg"
WIDTH, LABELS, BARS = 880, 310, 470
ROW, GAP, HEAD = 24, 30, 60
ON_NODE = ("fast-jwt", "jose, ", "aws-jwt-verify")
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .number { stroke-width: 4; paint-order: stroke; stroke: #ffffff; }
  .title { font-weight: 600; font-size: 15px; }
  .note { fill: #59636e; font-size: 12px; }
  .bar { fill: #9aa7b4; } .own { fill: #0969da; } .goal { stroke: #bc4c00; stroke-width: 2; stroke-dasharray: 4 3; }
  .page { fill: #ffffff; } .goal-text { fill: #bc4c00; font-size: 12px; } .axis { stroke: #c9d1d9; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .number { stroke: #0d1117; }
    .note { fill: #9198a1; } .page { fill: #0d1117; } .axis { stroke: #3d444d; }
    .bar { fill: #656c76; } .own { fill: #4493f8; } .goal { stroke: #f0883e; } .goal-text { fill: #f0883e; }
  }
"""


class Panel(msgspec.Struct, frozen=True):
    """Bars with one unit. `log` starts at a power of ten below the least."""

    title: str
    note: str
    unit: str
    bars: Sequence[tuple[str, float]]
    log: bool = False
    goal: float | None = None


def panels(report: Report) -> list[Panel]:
    makers: dict[str, Callable[[Result], Panel]] = {
        "cold": _cold,
        "warm": _warm,
        "http_share": _http,
        "load": _load,
    }
    return [make(report.benchmarks[name]) for name, make in makers.items() if name in report.benchmarks]


def _cold(result: Result) -> Panel:
    suffix = " ÷ raw check"
    bars = [(f.name.removesuffix(suffix), f.value) for f in result.figures if f.name.endswith(suffix)]
    return Panel(
        "A new token, cache off, every check on",
        "× the bare RS256 signature check of the same language; less is better",
        "×",
        sorted(bars, key=lambda bar: bar[1]),
        goal=result.figure(f"verifier{suffix}").goal,
    )


def _warm(result: Result) -> Panel:
    bars = sorted(((m.name, m.value) for m in result.measurements), key=lambda bar: bar[1])
    return Panel("A token seen before", "µs, logarithmic; less is better", "µs", bars, log=True)


def _http(result: Result) -> Panel:
    suffix = " ÷ no auth"
    shares = [(f.name.removesuffix(suffix), f.value * 100) for f in result.figures if f.name.endswith(suffix)]
    bars = [("no auth", 100.0), *shares]
    return Panel(
        "One FastAPI endpoint, one worker", "% of its requests a second without auth; more is better", "%", bars
    )


def _load(result: Result) -> Panel:
    bars = [(m.name, m.value) for m in result.measurements if m.unit == "1/s"]
    return Panel(
        "The order service at concurrency 100",
        "requests a second; more is better; generator and service share the machine",
        "1/s",
        bars,
    )


def draw(report: Report) -> str:
    """The SVG document."""
    body: list[str] = []
    top = 16
    for panel in panels(report):
        body += _panel(panel, top)
        top += HEAD + ROW * len(panel.bars) + GAP
    body.append(_text(16, top, _machine(report.machine), "note"))
    height = top + 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Benchmarks of the verifier"><style>{STYLE}</style>'
    )
    return "\n".join([head, f'<rect class="page" width="{WIDTH}" height="{height}"/>', *body, "</svg>", ""])


def _machine(machine: Machine) -> str:
    return f"{machine.cpu}, {machine.cores} cores · {machine.python} · {machine.openssl}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{name} text-anchor="{anchor}">{escape(text)}</text>'


def _scale(panel: Panel) -> Callable[[float], float]:
    """Value to pixels; the largest bar leaves room for its number."""
    most = max(value for _, value in panel.bars)
    if not panel.log:
        return lambda value: value / most * BARS
    low = math.floor(math.log10(min(value for _, value in panel.bars)))
    return lambda value: (math.log10(value) - low) / (math.log10(most) - low) * BARS


def _panel(panel: Panel, top: float) -> list[str]:
    scale = _scale(panel)
    left, first = LABELS + 10, top + HEAD
    end = first + ROW * len(panel.bars)
    parts = [_text(16, top + 14, panel.title, "title"), _text(16, top + 34, panel.note, "note")]
    numbers = []
    for row, (name, value) in enumerate(panel.bars):
        y = first + ROW * row
        kind = "own" if name.startswith(("verifier", "order service")) else "bar"
        parts.append(_text(LABELS, y + 14, _label(name), anchor="end"))
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{y + 3}" width="{scale(value):.1f}" height="{ROW - 8}" rx="2"/>'
        )
        numbers.append(_text(left + scale(value) + 6, y + 14, _number(value, panel.unit), "number"))
    parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{first}" y2="{end}"/>')
    if panel.goal is not None:
        x = left + scale(panel.goal)
        parts.append(f'<line class="goal" x1="{x:.1f}" x2="{x:.1f}" y1="{first - 2}" y2="{end}"/>')
        parts.append(_text(x, first - 6, f"goal {_number(panel.goal, panel.unit)}", "goal-text", "middle"))
    return parts + numbers


def _label(name: str) -> str:
    return f"{name} (Node)" if name.startswith(ON_NODE) else name


def _number(value: float, unit: str) -> str:
    digits = 0 if value >= 20 else 2
    return f"{value:,.{digits}f} {unit}"


def write(report: Report, path: Path = PICTURE) -> None:
    path.write_text(draw(report), encoding="utf-8")
