"""When to try which server again. Pure: it is told how an attempt ended, and says what comes next.

After each attempt the next server of the list is next, after a pause with *full jitter*: any length up to a ceiling
that starts at RECONNECT_DELAY_MIN_S, doubles with each attempt that served nothing, and ends at RECONNECT_DELAY_MAX_S.
So the mirrors of a lost server come back spread out, and in the end about once a second each.

The **circuit breaker** is for those to whom that is still too often: an overloaded server, an account that is locked
after failed log-ins, a metered link. It is off unless asked for.

    closed      attempts follow each other as above; after ``failures`` rounds over all servers, none of which served,
                it opens
    open        no attempt for ``open_s`` to 1.25 x ``open_s`` (jitter again), then it is half open
    half open   one round over all servers: the first that serves closes it, a round in vain opens it again

It changes nothing about what is answered meanwhile: what is held ages, and policy decides. It costs up to its pause in
staleness once the server is back, so it is no good where revocations must be fresh within seconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final, Self

from .limits import RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S
from .settings import invalid, seconds

__all__ = ["Breaker", "Pause", "Reconnecting"]

OPEN_JITTER: Final = 0.25
"""Of the pause: enough that the processes of a fleet, opened by one outage, do not all probe together."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """After how many rounds in vain to pause, and for how many seconds."""

    failures: int
    open_s: float

    @classmethod
    def checked(cls, failures: Any, open_s: Any) -> Self | None:
        """From settings, None without ``failures``; raises :class:`ConfigurationError`."""
        pause_s = seconds("redis_breaker_open_s", open_s)
        if failures is None:
            return None
        if type(failures) is not int or failures < 1:
            raise invalid("redis_breaker_failures", "expected a number of rounds, 1 or more, or None for no breaker")
        if pause_s <= RECONNECT_DELAY_MAX_S:
            raise invalid("redis_breaker_open_s", f"must be more than {RECONNECT_DELAY_MAX_S:g}, the longest back-off")
        return cls(failures, pause_s)


@dataclass(frozen=True, slots=True)
class Pause:
    """What comes next: this long, in this state, and then the server of this number."""

    delay_s: float
    node: int
    circuit_open: bool = False


class Reconnecting:
    """The state between attempts; ``node`` is the server to try."""

    def __init__(self, nodes: int, breaker: Breaker | None = None, rng: random.Random | None = None) -> None:
        self.node = 0
        self._nodes, self._breaker = nodes, breaker
        self._rng = random.Random() if rng is None else rng
        self._ceiling_s = RECONNECT_DELAY_MIN_S
        self._in_vain = 0

    def after(self, *, served: bool) -> Pause:
        """An attempt has ended; ``served``: a complete round was read in it."""
        self.node = (self.node + 1) % self._nodes
        if served:
            self._in_vain, self._ceiling_s = 0, RECONNECT_DELAY_MIN_S
        else:
            self._in_vain += 1
            self._ceiling_s = min(self._ceiling_s * 2, RECONNECT_DELAY_MAX_S)
        breaker = self._breaker
        if breaker is not None and self._in_vain >= breaker.failures * self._nodes:
            self._in_vain -= self._nodes  # half open afterwards: one round decides
            return Pause(breaker.open_s * (1 + self._rng.uniform(0, OPEN_JITTER)), self.node, circuit_open=True)
        return Pause(self._rng.uniform(0, self._ceiling_s), self.node)
