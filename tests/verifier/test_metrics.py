"""Metrics and traces: what they say, and what they never do."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from tests.verifier.http_server import free_port
from tests.verifier.support import ISSUER, SECRET, Mirrored, code_of, make_verifier, token_of
from verifier import InvalidToken, Undecidable, Verifier
from verifier.metrics import CLIENTS_MAX, VerifierMetrics
from verifier.observing import Decision, observers
from verifier.testing import SigningKey
from verifier.tracing import TracingObserver


def test_verifications_are_counted_by_outcome_and_code_and_timed(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    mirrored = Mirrored(key, observer=metrics, hs256_secrets=[SECRET], on_stale="deny")
    token = token_of(key, header={"typ": "at+jwt"})
    mirrored.verifier.verify(token)
    mirrored.verifier.verify(token)
    mirrored.verifier.verify(token_of(SECRET, client_id="old-app"))
    assert code_of(mirrored.verifier, token + "x") == "token_not_canonical"
    mirrored.revoke("jti", "t-1")
    assert code_of(mirrored.verifier, token) == "token_revoked"
    mirrored.clock.advance(600)
    with pytest.raises(Undecidable):
        mirrored.verifier.verify(token_of(key, jti="t-2"))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    total = "verifier_verifications_total"
    assert value(total, outcome="accepted", code="accepted") == 3
    assert value(total, outcome="invalid", code="token_not_canonical") == 1
    assert value(total, outcome="revoked", code="token_revoked") == 1
    assert value(total, outcome="undecidable", code="revocations_stale") == 1
    assert value("verifier_accepted_total", alg="RS256", typ="at+jwt") == 2
    assert value("verifier_accepted_total", alg="HS256", typ="JWT") == 1
    assert value("verifier_hs256_seen_total", client_id="old-app") == 1
    assert value("verifier_verification_duration_seconds_count", remembered="true") == 1
    assert value("verifier_verification_duration_seconds_count", remembered="false") == 5


def test_states_are_read_when_scraped_and_what_is_unknown_is_left_out(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    mirrored = Mirrored(key, synced=False)
    metrics.watch(mirrored.verifier)
    second = make_verifier(key)
    metrics.watch(second, "second")

    def value(name: str, verifier: str = "default", **labels: str) -> float | None:
        return registry.get_sample_value(f"verifier_{name}", {"verifier": verifier, **labels})

    assert (value("ready"), value("fresh"), value("staleness_seconds")) == (0, 0, None)
    assert value("ready", "second") == 0
    mirrored.revocations.beat()
    mirrored.revoke("jti", "t-9")
    assert (value("ready"), value("fresh"), value("staleness_seconds")) == (1, 1, 0)
    assert (value("mirror_entries"), value("position_epoch"), value("position_seq")) == (1, 1, 1)
    assert value("connection", state="tailing") == 1
    assert value("connection", state="closed") == 0
    mirrored.verifier.verify(token_of(key))
    assert value("events_total", event="decided") == 1
    assert value("token_cache_entries") == 1
    assert b"verifier_keys_age_seconds" in generate_latest(registry)


def test_each_family_stands_once_however_many_verifiers_are_watched(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    verifiers = [make_verifier(key) for _ in range(3)]
    metrics.watch(verifiers[0])
    metrics.watch(verifiers[1], "second")
    metrics.watch(verifiers[2], "second")  # takes the place of the one before
    text = generate_latest(registry).decode()
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert {line for line in samples if line.startswith("verifier_ready")} == {
        'verifier_ready{verifier="default"}', 'verifier_ready{verifier="second"}'
    }  # fmt: skip


def test_a_verifier_that_is_gone_is_shown_no_more_and_not_kept(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    verifier: Verifier | None = make_verifier(key)
    assert verifier is not None
    metrics.watch(verifier)
    assert b'verifier_ready{verifier="default"}' in generate_latest(registry)
    verifier = None
    gc.collect()
    assert b'verifier_ready{verifier="default"}' not in generate_latest(registry)


def test_a_state_can_be_asked_for_by_name(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics, verifier = VerifierMetrics(registry), make_verifier(key)
    metrics.watch(verifier)
    assert b'verifier_ready{verifier="default"}' in generate_latest(registry.restricted_registry(["verifier_ready"]))


def test_every_moment_of_a_verifier_can_be_scraped(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    source = f"http://127.0.0.1:{free_port()}/jwks.json"
    unstarted = make_verifier(jwks_urls=[source], redis_url=f"redis://127.0.0.1:{free_port()}")
    metrics.watch(unstarted)
    assert b"verifier_ready" in generate_latest(registry)
    with unstarted:
        assert b"verifier_ready" in generate_latest(registry)
    text = generate_latest(registry).decode()
    assert 'verifier_connection{state="closed",verifier="default"} 1.0' in text
    assert "verifier_staleness_seconds{" not in text
    assert "verifier_keys_age_seconds{" not in text


def test_a_servers_status_is_counted_by_its_class(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics, verifier = VerifierMetrics(registry), make_verifier(key)
    metrics.watch(verifier)
    verifier.counters.update({"fetch_status_503": 2, "fetch_status_500": 1, "fetch_status_404": 1, "fetch_timeout": 4})

    def value(event: str) -> float | None:
        return registry.get_sample_value("verifier_events_total", {"verifier": "default", "event": event})

    assert (value("fetch_status_5xx"), value("fetch_status_4xx"), value("fetch_timeout")) == (3, 1, 4)
    assert value("fetch_status_503") is None


def test_the_clients_of_old_tokens_are_bounded_for_many_threads_too() -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    together = threading.Barrier(8)

    def count(thread: int) -> None:
        together.wait()
        for number in range(CLIENTS_MAX):
            client = f"client-{thread}-{number}"
            metrics.decided(Decision("accepted", "accepted", 1.0, 1e-6, False, "HS256", "JWT", ISSUER, client))

    threads = [threading.Thread(target=count, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = next(family for family in registry.collect() if family.name == "verifier_hs256_seen")
    counts = {sample.labels["client_id"]: sample.value for sample in seen.samples if sample.name.endswith("_total")}
    assert (len(counts), sum(counts.values())) == (CLIENTS_MAX + 1, 8 * CLIENTS_MAX)


def test_the_clients_of_old_tokens_are_bounded() -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    for number in range(CLIENTS_MAX + 50):
        metrics.decided(Decision("accepted", "accepted", 1.0, 1e-6, False, "HS256", "JWT", ISSUER, f"client-{number}"))
    metrics.decided(Decision("accepted", "accepted", 1.0, 1e-6, False, "HS256", "JWT", ISSUER, None))
    assert registry.get_sample_value("verifier_hs256_seen_total", {"client_id": "other"}) == 51
    seen = next(family for family in registry.collect() if family.name == "verifier_hs256_seen")
    assert len({sample.labels["client_id"] for sample in seen.samples}) == CLIENTS_MAX + 1


def traced(key: SigningKey, *tokens: str, within_a_trace: bool = True) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    verifier = make_verifier(key, observer=TracingObserver(provider))

    def verify_all() -> None:
        for token in tokens:
            with contextlib.suppress(InvalidToken):
                verifier.verify(token)

    if within_a_trace:
        with provider.get_tracer("test").start_as_current_span("request"):
            verify_all()
    else:
        verify_all()
    return list(exporter.get_finished_spans())


def test_each_verification_is_a_span_of_the_callers_trace(key: SigningKey) -> None:
    token = token_of(key, sub="ada-lovelace")
    first, second, refused, request = traced(key, token, token, token + "x")
    assert {span.name for span in (first, second, refused)} == {"verifier.verify"}
    assert request.context is not None
    for span in (first, second, refused):
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time >= span.start_time
        assert span.status.status_code is StatusCode.UNSET
    assert dict(second.attributes or {}) == {
        "verifier.outcome": "accepted",
        "verifier.code": "accepted",
        "verifier.remembered": True,
        "verifier.alg": "RS256",
        "verifier.typ": "at+jwt",
    }
    assert (refused.attributes or {})["verifier.code"] == "token_not_canonical"
    for span in (first, refused):
        assert "ada-lovelace" not in span.to_json()
        assert token not in span.to_json()


def test_what_is_undecidable_is_an_error_of_ours() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("request"):
        TracingObserver(provider).decided(Decision("undecidable", "keys_behind", 1.0, 0.5))
    span, _ = exporter.get_finished_spans()
    assert (span.status.status_code, (span.attributes or {})["error.type"]) == (StatusCode.ERROR, "keys_behind")
    assert (span.start_time, span.end_time) == (1_000_000_000, 1_500_000_000)


def test_outside_a_trace_nothing_is_made(key: SigningKey) -> None:
    assert traced(key, token_of(key), within_a_trace=False) == []


def test_several_observers_are_told_in_their_order() -> None:
    heard: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def decided(self, decision: Decision) -> None:
            heard.append(self.name + decision.code)

    observers(Named("a:"), Named("b:")).decided(Decision("invalid", "x", 0.0, 0.0))
    assert heard == ["a:x", "b:x"]


def test_an_observer_that_fails_keeps_no_other_from_hearing_and_is_still_counted(key: SigningKey) -> None:
    heard: list[Decision] = []

    class Broken:
        def decided(self, decision: Decision) -> None:
            raise RuntimeError("no disk")

    class Listening:
        def decided(self, decision: Decision) -> None:
            heard.append(decision)

    verifier = make_verifier(key, observer=observers(Broken(), Listening(), Broken()))
    assert verifier.verify(token_of(key))
    assert [decision.code for decision in heard] == ["accepted"]
    assert verifier.status().counters["observer_failures"] == 1
