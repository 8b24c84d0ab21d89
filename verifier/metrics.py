"""Prometheus metrics of a verifier: what it decided, and what it knows of itself (extra ``metrics``).

    metrics = VerifierMetrics()
    verifier = Verifier(…, observer=metrics)
    metrics.watch(verifier)

Counts and durations come from the observer's hook, at each verification. States are read from
:meth:`~verifier.Verifier.status` when somebody scrapes, and cost nothing in between. Labels are bounded: outcomes and
codes are the package's own, ``client_id`` (of HS256 tokens that verified) stops at :data:`CLIENTS_MAX`, then is
``other``. A state that is not known, such as the staleness before the first read, is left out.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final
from weakref import ref

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:  # pragma: no cover - told apart in a process of its own
    raise ImportError("verifier.metrics needs prometheus-client: pip install 'multiregion-jwks[metrics]'") from error

from .log import Generation, Position
from .observing import Decision
from .status import Status

if TYPE_CHECKING:
    from .verifier import Verifier

__all__ = ["CLIENTS_MAX", "VerifierMetrics"]

CLIENTS_MAX: Final = 100
"""So many clients of HS256 tokens are told apart: the evidence before a cut-off needs names, not thousands of them."""

_BUCKETS: Final = (
    5e-7, 1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0
)  # fmt: skip
_CONNECTIONS: Final = ("connecting", "reading", "tailing", "waiting", "circuit_open", "closed", "none")
_HTTP_STATUS: Final = re.compile(r"(_status_[0-9])[0-9]+\Z")


class VerifierMetrics:
    """An :class:`~verifier.observing.Observer` with the metrics of one verifier or several, one to a registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._verifications = Counter(
            "verifier_verifications", "Tokens judged, by outcome and code", ("outcome", "code"), registry=registry
        )
        self._seconds = Histogram(
            "verifier_verification_duration_seconds",
            "What a caller waited for a verdict",
            ("remembered",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._accepted = Counter(
            "verifier_accepted", "Tokens accepted, by algorithm and type", ("alg", "typ"), registry=registry
        )
        self._hs256 = Counter(
            "verifier_hs256_seen", "HS256 tokens accepted, by client", ("client_id",), registry=registry
        )
        # Looking a child up by its labels takes longer than counting: those of accepted tokens are kept at hand.
        self._remembered = {known: self._seconds.labels("true" if known else "false") for known in (True, False)}
        self._ok = self._verifications.labels("accepted", "accepted")
        self._kinds: dict[tuple[str | None, str | None], Counter] = {}
        self._clients: dict[str, Counter] = {}
        self._naming = threading.Lock()
        self._states = _States()
        registry.register(self._states)

    def decided(self, decision: Decision) -> None:
        """Count one verification."""
        self._remembered[decision.remembered].observe(decision.duration_s)
        if decision.outcome != "accepted":
            self._verifications.labels(decision.outcome, decision.code).inc()
            return
        self._ok.inc()
        kind = decision.alg, decision.typ
        accepted = self._kinds.get(kind)
        if accepted is None:
            accepted = self._kinds[kind] = self._accepted.labels(*kind)
        accepted.inc()
        if decision.alg == "HS256":
            self._of_client(decision.client_id or "unnamed").inc()

    def _of_client(self, name: str) -> Counter:
        client = self._clients.get(name)
        if client is not None:
            return client
        with self._naming:
            if name not in self._clients and len(self._clients) < CLIENTS_MAX:
                self._clients[name] = self._hs256.labels(name)
            return self._clients.get(name) or self._hs256.labels("other")

    def watch(self, verifier: Verifier, name: str = "default") -> None:
        """Show this verifier's state at every scrape, under the label ``verifier``, for as long as it exists.

        Another one under the same name takes its place.
        """
        self._states.watch(name, verifier)


class _States(Collector):
    """The states of all verifiers that are watched: one family each, with a sample for each verifier."""

    def __init__(self) -> None:
        self._watched: Mapping[str, ref[Verifier]] = {}
        self._changing = threading.Lock()

    def watch(self, name: str, verifier: Verifier) -> None:
        """By a new mapping: a scrape may be going through the old one."""
        with self._changing:
            living = {known: each for known, each in self._watched.items() if each() is not None}
            self._watched = {**living, name: ref(verifier)}

    def describe(self) -> Iterable[Metric]:
        """The families without samples: by them a registry finds names that are taken, or asked for alone."""
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        """What the verifiers say of themselves now."""
        found = ((name, each()) for name, each in sorted(self._watched.items()))
        return self._families({name: verifier.status() for name, verifier in found if verifier is not None})

    def _families(self, told: Mapping[str, Status]) -> Iterator[Metric]:
        for name, (text, read) in _GAUGES.items():
            family = GaugeMetricFamily(f"verifier_{name}", text, labels=("verifier",))
            for verifier, status in told.items():
                value = read(status)
                if value is not None:
                    family.add_metric((verifier,), float(value))
            yield family
        yield from _keys(told)
        connection = GaugeMetricFamily(
            "verifier_connection", "1 for the state of the mirror's connection", labels=("verifier", "state")
        )
        for verifier, status in told.items():
            for state in _CONNECTIONS:
                connection.add_metric((verifier, state), float(status.connection == state))
        yield connection
        events = CounterMetricFamily(
            "verifier_events", "What status().counters counts, by name", labels=("verifier", "event")
        )
        for verifier, status in told.items():
            for event, count in _bounded(status.counters).items():
                events.add_metric((verifier, event), count)
        yield events


def _keys(told: Mapping[str, Status]) -> Iterator[Metric]:
    labels = ("verifier", "issuer")
    age = GaugeMetricFamily("verifier_keys_age_seconds", "Since the key set was fetched", labels=labels)
    generation = GaugeMetricFamily("verifier_keys_generation", "Key set changes in its epoch", labels=labels)
    for verifier, status in told.items():
        for issuer in status.issuers:
            of = verifier, issuer.issuer or ""
            if issuer.age_s is not None:
                age.add_metric(of, issuer.age_s)
            if issuer.generation is not None:
                generation.add_metric(of, Generation.parse(issuer.generation).n)
    yield age
    yield generation


def _bounded(counters: Mapping[str, int]) -> dict[str, int]:
    """Their names are the package's own, but for the HTTP status that a server chose: its class is enough."""
    events: dict[str, int] = {}
    for name, count in sorted(counters.items()):
        event = _HTTP_STATUS.sub(r"\1xx", name)
        events[event] = events.get(event, 0) + count
    return events


def _seq(status: Status) -> int | None:
    return None if status.position is None else Position.parse(status.position).seq


_GAUGES: Final[dict[str, tuple[str, Callable[[Status], float | None]]]] = {
    "ready": ("1 if keys and revocations are held", lambda status: status.ready),
    "fresh": (
        "1 if a majority of regions vouches for revocations no older than the bound",
        lambda status: status.fresh,
    ),
    "staleness_seconds": ("Age of the revocations that are judged by", lambda status: status.staleness_s),
    "mirror_entries": ("Revocations held in memory", lambda status: status.mirror_entries),
    "position_epoch": ("Epoch of the last entry applied", lambda status: status.epoch),
    "position_seq": ("Its number within the epoch", _seq),
    "epoch_open": ("1 if the epoch is open", lambda status: status.epoch_open),
    "token_cache_entries": ("Verified tokens remembered", lambda status: status.token_cache_entries),
}
