"""OpenTelemetry spans of verifications (extra ``tracing``): one ``verifier.verify`` each, with its real start and end.

    verifier = Verifier(…, observer=TracingObserver())

A span is made only inside a trace that is being recorded, so that without one it costs a look. It says what was decided
and never of whom: no token, subject, session or claim. ``ERROR`` is for what is ours (undecidable); a refused token is
an ordinary answer.
"""

from __future__ import annotations

from typing import Final

try:
    from opentelemetry import trace
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider
except ImportError as error:  # pragma: no cover - told apart in a process of its own
    raise ImportError("verifier.tracing needs opentelemetry-api: pip install 'multiregion-jwks[tracing]'") from error

from .observing import Decision

__all__ = ["TracingObserver"]

_NANOSECONDS: Final = 1_000_000_000


class TracingObserver:
    """An :class:`~verifier.observing.Observer` that adds a span to the trace of whoever asks."""

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("verifier", tracer_provider=tracer_provider)

    def decided(self, decision: Decision) -> None:
        """Add the span of one verification."""
        if not trace.get_current_span().is_recording():
            return
        started_ns = int(decision.started_s * _NANOSECONDS)
        attributes: dict[str, str | bool] = {
            "verifier.outcome": decision.outcome,
            "verifier.code": decision.code,
            "verifier.remembered": decision.remembered,
        }
        if decision.alg is not None and decision.typ is not None:
            attributes |= {"verifier.alg": decision.alg, "verifier.typ": decision.typ}
        if decision.outcome == "undecidable":
            attributes["error.type"] = decision.code
        span = self._tracer.start_span(
            "verifier.verify", kind=SpanKind.INTERNAL, attributes=attributes, start_time=started_ns
        )
        if decision.outcome == "undecidable":
            span.set_status(Status(StatusCode.ERROR, decision.code))
        span.end(started_ns + int(decision.duration_s * _NANOSECONDS))
