"""The one hook: an observer hears of every verification after it was decided. Metrics and traces hang on it.

Without an observer it costs nothing. With one, what it is told costs about a microsecond, and what it does is its own:
it runs in the caller's thread. An exception from it is counted (``observer_failures``), never the caller's.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Final, Literal, Protocol

import msgspec

from .errors import ConfigurationError, InvalidToken, RevokedToken, VerifierError
from .world import Hit

__all__ = ["Decision", "Observation", "Observer", "observers"]

_log: Final = logging.getLogger("verifier.observer")


class Decision(msgspec.Struct, frozen=True, gc=False):
    """One verification. ``code`` is ``accepted`` or the error's; nothing of a refused token is told.

    ``started_s`` is Unix seconds and ``duration_s`` what the caller waited; ``remembered`` True for a hit in the token
    cache. ``alg``, ``typ`` (``JWT``, ``at+jwt`` or ``absent``), ``issuer`` and ``client_id`` are those of an accepted
    token.
    """

    outcome: Literal["accepted", "invalid", "revoked", "undecidable"]
    code: str
    started_s: float
    duration_s: float
    remembered: bool = False
    alg: str | None = None
    typ: str | None = None
    issuer: str | None = None
    client_id: str | None = None


class Observer(Protocol):
    """Hears of verifications."""

    def decided(self, decision: Decision) -> None:
        """Called in the thread (or on the event loop) of whoever asked; must not block."""


class Observation:
    """One verification under observation: made when it begins, told how it ended."""

    __slots__ = ("_counters", "_observer", "_started", "_started_s")

    def __init__(self, observer: Observer, counters: Counter[str]) -> None:
        self._observer = observer
        self._counters = counters
        self._started_s = time.time()
        self._started = time.perf_counter()

    def accepted(self, hit: Hit, *, remembered: bool) -> None:
        """The token was good."""
        duration_s = time.perf_counter() - self._started
        header, facts = hit.verified.header, hit.verified.facts
        self._tell(
            Decision(
                "accepted",
                "accepted",
                self._started_s,
                duration_s,
                remembered,
                header.alg,
                header.typ,
                facts.issuer,
                facts.client_id,
            )
        )

    def refused(self, error: VerifierError) -> None:
        """It was not, or nobody can say. Misuse is nobody's verification, and not told."""
        if isinstance(error, ConfigurationError):
            return
        outcome: Literal["invalid", "revoked", "undecidable"] = "undecidable"
        if isinstance(error, InvalidToken):
            outcome = "revoked" if isinstance(error, RevokedToken) else "invalid"
        self._tell(Decision(outcome, error.code, self._started_s, time.perf_counter() - self._started))

    def _tell(self, decision: Decision) -> None:
        try:
            self._observer.decided(decision)
        except Exception:  # noqa: BLE001 - an observer's mistake must not refuse anybody's token
            self._counters["observer_failures"] += 1
            if self._counters["observer_failures"] == 1:
                _log.exception("the observer failed; later failures are only counted")


class _Several:
    __slots__ = ("_observers",)

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers

    def decided(self, decision: Decision) -> None:
        failure: Exception | None = None
        for observer in self._observers:
            try:
                observer.decided(decision)
            except Exception as error:  # noqa: BLE001 - raised below, once the others were told
                failure = failure or error
        if failure is not None:
            raise failure


def observers(*several: Observer) -> Observer:
    """One observer that tells all of these, in their order; one that fails keeps none of the others from hearing."""
    return _Several(several)
