"""Metrics and traces: what they say, and what they never do."""

from __future__ import annotations

import contextlib

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from tests.verifier.support import ISSUER, SECRET, Mirrored, code_of, make_verifier, token_of
from verifier import InvalidToken, Undecidable
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
    metrics.watch(make_verifier(key), "second")

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
