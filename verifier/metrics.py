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

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

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
"""So many clients of HS256 tokens are told apart."""

_BUCKETS: Final = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)
_CONNECTIONS: Final = ("connecting", "reading", "tailing", "waiting", "closed", "none")


class VerifierMetrics:
    """An :class:`~verifier.observing.Observer` with the metrics of one verifier or several, in one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
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
        self._remembered = {known: self._seconds.labels("true" if known else "false") for known in (True, False)}
        self._ok = self._verifications.labels("accepted", "accepted")
        self._clients: set[str] = set()

    def decided(self, decision: Decision) -> None:
        """Count one verification."""
        self._remembered[decision.remembered].observe(decision.duration_s)
        if decision.outcome != "accepted":
            self._verifications.labels(decision.outcome, decision.code).inc()
            return
        self._ok.inc()
        self._accepted.labels(decision.alg, decision.typ).inc()
        if decision.alg == "HS256":
            self._hs256.labels(self._client(decision.client_id)).inc()

    def _client(self, client_id: str | None) -> str:
        name = client_id or "unnamed"
        if name not in self._clients:
            if len(self._clients) >= CLIENTS_MAX:
                return "other"
            self._clients.add(name)
        return name

    def watch(self, verifier: Verifier, name: str = "default") -> None:
        """Show this verifier's state at every scrape, under the label ``verifier``."""
        self._registry.register(_States(verifier, name))


class _States(Collector):
    def __init__(self, verifier: Verifier, name: str) -> None:
        self._verifier = verifier
        self._name = name

    def describe(self) -> Iterable[Metric]:
        """None in advance: two verifiers in one registry have the same families, told apart by their label."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """What the verifier says of itself now."""
        status = self._verifier.status()
        for name, text, value in _gauges(status):
            if value is not None:
                family = GaugeMetricFamily(f"verifier_{name}", text, labels=("verifier",))
                family.add_metric((self._name,), float(value))
                yield family
        yield from self._labelled(status)

    def _labelled(self, status: Status) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "verifier_keys_age_seconds", "Since the key set was fetched", labels=("verifier", "issuer")
        )
        generation = GaugeMetricFamily(
            "verifier_keys_generation", "Key set changes in its epoch", labels=("verifier", "issuer")
        )
        for issuer in status.issuers:
            labels = (self._name, issuer.issuer or "")
            if issuer.age_s is not None:
                age.add_metric(labels, issuer.age_s)
            if issuer.generation is not None:
                generation.add_metric(labels, Generation.parse(issuer.generation).n)
        yield age
        yield generation
        connection = GaugeMetricFamily(
            "verifier_connection", "1 for the state of the mirror's connection", labels=("verifier", "state")
        )
        for state in _CONNECTIONS:
            connection.add_metric((self._name, state), float(status.connection == state))
        yield connection
        events = CounterMetricFamily(
            "verifier_events", "What status().counters counts, by name", labels=("verifier", "event")
        )
        for event, count in sorted(status.counters.items()):
            events.add_metric((self._name, event), count)
        yield events


def _gauges(status: Status) -> Iterator[tuple[str, str, float | None]]:
    position = None if status.position is None else Position.parse(status.position)
    yield "ready", "1 if keys and revocations are held", status.ready
    yield "fresh", "1 if a majority of regions vouches for revocations no older than the bound", status.fresh
    yield "staleness_seconds", "Age of the revocations that are judged by", status.staleness_s
    yield "mirror_entries", "Revocations held in memory", status.mirror_entries
    yield "position_epoch", "Epoch of the last entry applied", None if position is None else position.epoch
    yield "position_seq", "Its number within the epoch", None if position is None else position.seq
    yield "epoch_open", "1 if the epoch is open", status.epoch_open
    yield "token_cache_entries", "Verified tokens remembered", status.token_cache_entries
