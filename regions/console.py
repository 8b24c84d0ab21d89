"""What a person sees while something long runs: steps, checks and tables; and the same as JSON lines for a program.

On a terminal a step shows a spinner until it ends; elsewhere every line is plain and printed once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

__all__ = ["Reporter"]

PIPE_COLUMNS = 160
"""Wide enough for every table of ours: nothing is cut off in a file or a pipe."""


class Reporter:
    """Prints progress, and remembers whether every check held."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._json = as_json
        terminal = sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else PIPE_COLUMNS)
        self.failed: list[str] = []
        self.checks = 0

    def _emit(self, kind: str, **members: Any) -> None:
        sys.stdout.write(msgspec.json.encode({"type": kind, **members}).decode() + "\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        """A heading."""
        if self._json:
            self._emit("title", text=text)
        else:
            self._console.print(f"\n[bold]{text}[/bold]")

    def note(self, text: str) -> None:
        """Something to know."""
        if self._json:
            self._emit("note", text=text)
        else:
            self._console.print(f"  [dim]{text}[/dim]" if self._console.is_terminal else f"  {text}")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something that takes a while."""
        started = time.monotonic()
        if self._json:
            yield
        elif self._console.is_terminal:
            with self._console.status(text):
                yield
        else:
            self._console.print(f"  … {text}")
            yield
        if self._json:
            self._emit("step", text=text, seconds=round(time.monotonic() - started, 3))

    def check(self, ok: bool, text: str, **members: Any) -> bool:
        """A line that held or not."""
        self.checks += 1
        if not ok:
            self.failed.append(text)
        if self._json:
            self._emit("check", ok=ok, text=text, **members)
        else:
            mark = "[green]✓[/green]" if ok else "[bold red]✗[/bold red]"
            self._console.print(f"  {mark} {text}")
        return ok

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Figures, right-aligned but for the first column."""
        if self._json:
            self._emit("table", title=title, columns=list(columns), rows=[list(row) for row in rows])
            return
        table = Table(title=title, title_justify="left", title_style="italic")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
