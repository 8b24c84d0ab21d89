"""Metrics and logs. Labels are bounded: route templates, status classes, codes of ours, never a caller's words.

Logs are one JSON object (or one line) per event on standard error. Whatever is called like a secret is cut out before
anything is written; callers do not pass such things in the first place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from functools import cache
from importlib import metadata
from typing import Any, Final

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

__all__ = ["METRICS_TYPE", "Metrics", "configure_logging", "version"]

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECRET_NAMES: Final = frozenset(
    {"token", "access_token", "refresh_token", "secret", "client_secret", "password", "authorization", "kek", "key"}
)


class Metrics:
    """One registry per application, so that several can live in one process."""

    def __init__(self, region: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, and no use
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "keyservice_http_requests",
            "HTTP requests by application, route template, method and status class",
            ("app", "route", "method", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "keyservice_http_request_seconds", "Time to answer, by application", ("app",), registry=registry
        )
        self.tokens = Counter(
            "keyservice_tokens_issued", "Access tokens by grant and algorithm", ("grant", "alg"), registry=registry
        )
        self.sessions = Counter(
            "keyservice_sessions_started", "Sessions, by whether they could be stored", ("outcome",), registry=registry
        )
        self.refreshes = Counter(
            "keyservice_refreshes",
            "Refresh tokens presented: fresh, repeated, reused, revoked or unknown",
            ("outcome",),
            registry=registry,
        )
        self.introspections = Counter(
            "keyservice_introspections", "Tokens introspected, by answer", ("outcome",), registry=registry
        )
        self.assertions_alone = Counter(
            "keyservice_assertions_checked_alone",
            "Client assertions that only this instance's memory was asked about",
            registry=registry,
        )
        self.refused_tokens = Counter(
            "keyservice_token_requests_refused", "Token requests refused, by error code", ("code",), registry=registry
        )
        self.appends = Counter(
            "keyservice_appends", "Revocations sent to the trust log, by outcome", ("outcome",), registry=registry
        )
        self.beats = Counter("keyservice_beats", "Attempts to beat, by outcome", ("outcome",), registry=registry)
        self.keeper_reports = Counter(
            "keyservice_keeper_reports",
            "Evidence sent by this region's keeper, by outcome",
            ("outcome",),
            registry=registry,
        )
        self.keeper_merged = Gauge(
            "keyservice_keeper_merged", "1 if this region's keeper is merged into the current epoch", registry=registry
        )
        self.keeper_entries = Gauge("keyservice_keeper_entries", "Entries on the keeper's disk", registry=registry)
        self.keeper_pending = Gauge(
            "keyservice_keeper_pending", "Entries on the keeper's disk that the log lacks", registry=registry
        )
        self.trim_runs = Counter(
            "keyservice_trim_runs", "Attempts to cut the log shorter, by outcome", ("outcome",), registry=registry
        )
        self.trimmed = Counter("keyservice_trimmed_entries", "Entries that the log lost by trimming", registry=registry)
        self.receipts = Counter(
            "keyservice_receipts", "Revocations answered, by durability", ("durability",), registry=registry
        )
        self.bumps = Gauge("keyservice_epoch_bumps", "Epochs that this instance opened", registry=registry)
        self.epoch = Gauge("keyservice_epoch_number", "Number of the epoch that the mirror is in", registry=registry)
        self.epoch_open = Gauge("keyservice_epoch_open", "1 if that epoch is open", registry=registry)
        self.generation = Gauge("keyservice_keys_generation", "Key set changes in its epoch", registry=registry)
        self.keys = Gauge("keyservice_keys", "Keys by region and state", ("region", "state"), registry=registry)
        self.entries = Gauge("keyservice_mirror_entries", "Revocations held in memory", registry=registry)
        self.skew = Gauge("keyservice_clock_skew_seconds", "Own clock minus the primary's", registry=registry)
        self.primary_up = Gauge("keyservice_primary_reachable", "1 if the last beat got through", registry=registry)
        self.ready = Gauge("keyservice_ready", "1 if this instance can sign and serve keys", registry=registry)
        self.rotation_runs = Counter(
            "keyservice_rotation_runs", "Runs of the rotator, by outcome", ("outcome",), registry=registry
        )
        self.feed_consumers = Gauge("keyservice_feed_consumers", "Open revocation feeds", registry=registry)
        self.feed_ends = Counter(
            "keyservice_feed_ends", "Revocation feeds that ended, by reason", ("reason",), registry=registry
        )
        Info("keyservice_build", "What runs here", registry=registry).info({"version": version(), "region": region})

    def count_append(self, outcome: str, entries: int) -> None:
        """``outcome`` is ``appended`` or an error's code."""
        self.appends.labels(outcome).inc(entries)

    def count_receipts(self, durability: str, receipts: int) -> None:
        """``durability`` is ``replicated`` or ``pending``."""
        self.receipts.labels(durability).inc(receipts)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


@cache
def version() -> str:
    """The installed release."""
    try:
        return metadata.version("multiregion-jwks")
    except metadata.PackageNotFoundError:
        return "unknown"


def _cut_secrets(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    del logger, name
    for field in event:
        if field.lower() in _SECRET_NAMES:
            event[field] = "…"
    return event


def configure_logging(level: str, form: str) -> None:
    """Send every log of this process, also those of libraries, to standard error in one form (json or console)."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _cut_secrets,
    ]
    last: Any = structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                last,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("apscheduler", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel("WARNING")
