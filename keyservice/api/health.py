"""``/livez``, ``/readyz`` and ``/metrics``, on both applications."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Response

from keyservice.telemetry import METRICS_TYPE

from .problems import json_response

__all__ = ["Readiness", "router"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """``reasons`` name what keeps this instance from signing or serving keys; ``warnings`` keep it from nothing."""

    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether this instance can do all of its work that needs no primary."""
        return not self.reasons


def router(readiness: Callable[[], Readiness], metrics: Callable[[], bytes]) -> APIRouter:
    """``readiness()`` and ``metrics()`` are asked anew each time."""
    routes = APIRouter()

    @routes.get("/livez")
    async def livez() -> Response:
        return json_response({"alive": True})

    @routes.get("/readyz")
    async def readyz() -> Response:
        now = readiness()
        body = {"ready": now.ready, "reasons": now.reasons, "warnings": now.warnings, **now.details}
        return json_response(body, 200 if now.ready else 503)

    @routes.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics(), media_type=METRICS_TYPE)

    return routes
