"""Clients that authenticate by a signed assertion (private_key_jwt), each assertion once.

A ``jti`` is remembered by this instance, and on the primary for all regions. While the primary is unreachable this
instance's memory alone decides, and that is counted: tokens go on being issued.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection

import structlog

from .clients import Client, ClientLookup
from .core.assertions import Assertion, AssertionRefused, check_assertion
from .errors import StoreError
from .limits import ASSERTIONS_REMEMBERED_MAX
from .store import Node
from .telemetry import Metrics

__all__ = ["Assertions"]

_log = structlog.get_logger(__name__)


class Assertions:
    """``audiences`` are this server's names; ``primary_answers`` says whether asking it is worth the wait."""

    def __init__(
        self,
        clients: ClientLookup,
        audiences: Collection[str],
        primary: Node,
        metrics: Metrics,
        *,
        leeway_s: float,
        clock: Callable[[], float],
        primary_answers: Callable[[], bool],
    ) -> None:
        self._clients = clients
        self._audiences = frozenset(audiences)
        self._primary = primary
        self._metrics = metrics
        self._leeway_s = leeway_s
        self._clock = clock
        self._primary_answers = primary_answers
        self._used: OrderedDict[str, float] = OrderedDict()

    async def authenticate(self, text: str) -> Client:
        """The client that signed it; raises :class:`AssertionRefused`."""
        assertion = check_assertion(text, self._clients, self._audiences, self._clock(), self._leeway_s)
        if not await self._is_first_use(assertion):
            raise AssertionRefused("jti was used before")
        return assertion.client

    async def _is_first_use(self, assertion: Assertion) -> bool:
        name = hashlib.sha256(f"{assertion.client.client_id}\0{assertion.jti}".encode()).hexdigest()
        until = assertion.exp + self._leeway_s
        now = self._clock()
        if self._used.get(name, now) > now:
            return False
        self._used[name] = until  # before anything is awaited: of two at once one is the first
        self._used.move_to_end(name)
        while len(self._used) > ASSERTIONS_REMEMBERED_MAX:
            self._used.popitem(last=False)
        if not self._primary_answers():
            return self._alone("primary_unreachable")
        life_s = max(1, math.ceil(until - now))
        try:
            return await self._primary.write("SET", f"{{ks}}:assertion:{name}", 1, "NX", "EX", life_s) is not None
        except StoreError as error:
            return self._alone(error.code)

    def _alone(self, code: str) -> bool:
        self._metrics.assertions_alone.inc()
        _log.warning("client assertion checked against this instance's memory alone", code=code)
        return True
