"""What the bridge's tasks share: how progress is said, how long to wait between tries, how tasks end together."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from verifier.limits import RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S

from .errors import StartError

__all__ = ["Say", "Trouble", "cancel", "first_failure"]

Say = Callable[[str, dict[str, Any]], None]
"""``say(event, fields)``: a line of progress. No field ever holds what a message said."""


class Trouble:
    """Waits between tries, longer each time and with full jitter, and says each kind of trouble once.

    ``patience_s``: how long it may go on; None for ever.
    """

    def __init__(self, side: str, say: Say, patience_s: float | None) -> None:
        self._side, self._say, self._patience_s = side, say, patience_s
        self._since: float | None = None
        self._tries = 0
        self._code = ""

    def over(self) -> None:
        """A try succeeded."""
        if self._since is not None:
            self._say("recovered", {"side": self._side, "after_s": round(time.monotonic() - self._since, 1)})
        self._since, self._tries, self._code = None, 0, ""

    async def wait(self, code: str, at_least_s: float = 0.0) -> None:
        """A try failed: wait before the next. Raises :class:`StartError` when patience is at its end."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if code != self._code:
            self._say("trouble", {"side": self._side, "code": code})
            self._code = code
        if self._patience_s is not None and now - self._since > self._patience_s:
            raise StartError(code, f"{self._side}: no success for {self._patience_s:g} s")
        delay_s = random.uniform(0, min(RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S * 2.0**self._tries))
        self._tries = min(self._tries + 1, 16)
        await asyncio.sleep(max(delay_s, at_least_s))


async def first_failure(
    tasks: Sequence[asyncio.Task[Any]], until: asyncio.Task[Any], *, ends_with: Sequence[asyncio.Task[Any]]
) -> None:
    """Until ``until`` or all of ``ends_with`` is done; raises what the first task to fail raised."""
    waiting = {*tasks, until}
    while not until.done() and not all(task.done() for task in ends_with):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """End tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
