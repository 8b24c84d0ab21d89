"""The shell around :mod:`verifier.keys`: one daemon thread that fetches JWK sets (:mod:`verifier.jwks_sources`).

Nothing is locked while a request runs: verifications read ``view``, and those that meet an unknown ``kid`` may wait for
the pass in flight or about to start, a bounded time and a bounded number of them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from .jwk import JwksError, KeySet
from .jwks_sources import Source, open_sources
from .keys import JwksCache, KeysView
from .limits import HTTP_TIMEOUT_S, UNKNOWN_KID_WAITERS_MAX
from .log import Generation

__all__ = ["JwksClient"]

_log: Final = logging.getLogger("verifier.jwks")


def import_httpx() -> None:
    """Before a thread needs it: a process forked while a thread imports has half a module, and nobody to finish it."""
    import httpcore  # noqa: F401 - httpx imports it at the first request
    import httpx  # noqa: F401


class JwksClient:
    """Keeps the key set of ``urls`` (own region's first) in ``view``; ``on_change(view)`` follows every success."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        initial: KeySet | None = None,
        source_address: str | None = None,
        on_change: Callable[[KeysView], None] | None = None,
    ) -> None:
        self._urls = tuple(urls)
        self._cache = JwksCache(len(self._urls), initial, mono=time.monotonic())
        self._source_address = source_address
        self._on_change = on_change
        self._wake = threading.Condition()
        self._wanted = False
        self._waiting = 0
        self._life: object | None = None  # of the thread that is to run; an older one that still hangs ends by itself
        self._started = 0
        self._finished = 0
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()

    @property
    def view(self) -> KeysView:
        """The key set held now."""
        return self._cache.view

    def start(self) -> None:
        """Start the thread; does nothing if it runs."""
        import_httpx()
        if self._thread is None or not self._thread.is_alive():
            self._life = life = object()
            self._thread = threading.Thread(target=self._run, args=(life,), name="verifier-jwks", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread; the keys held stay readable."""
        with self._wake:
            self._life = None
            self._wake.notify_all()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(HTTP_TIMEOUT_S + 1)

    def refresh(self, timeout_s: float) -> None:
        """Ask for a newer set because of an unknown ``kid``, and wait for it, at most ``timeout_s``.

        Where a cooldown forbids another pass until later than that, this waits for the one in flight, if there is one;
        the next one starts by itself when the cooldown ends. At once where already many threads wait.
        """
        with self._wake:
            target, held = self._started, self.view.keys
            self._wanted = True
            if self._cache.ready_after_s(time.monotonic(), wanted=True) < timeout_s:
                target += 1
            self._wake.notify_all()
            if self._waiting >= UNKNOWN_KID_WAITERS_MAX:
                return
            self._waiting += 1
            try:
                self._wake.wait_for(
                    lambda: self._finished >= target or self._life is None or self.view.keys is not held, timeout_s
                )
            finally:
                self._waiting -= 1

    def expect(self, generation: Generation) -> None:
        """Fetch soon, if the set held is older than this; called with whatever the trust log says."""
        held = self.view.generation
        if held is None or generation <= held:
            return
        with self._wake:
            if self._cache.expect(generation, time.monotonic()):
                self._wake.notify_all()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for a first key set; False if there is none in time."""
        with self._wake:
            return self._wake.wait_for(lambda: self.view.keys is not None, timeout_s)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, life: object) -> None:
        with contextlib.ExitStack() as stack:
            sources = open_sources(stack, self._urls, source_address=self._source_address, timeout_s=HTTP_TIMEOUT_S)
            while (wanted := self._await_turn(life)) is not None:
                try:
                    self._pass(sources, life, wanted=wanted)
                except Exception:  # noqa: BLE001 - a mistake of ours must not end the thread in silence
                    _log.exception("fetching keys failed")
                    self.counters["failures"] += 1
                    self._cache.failed(time.monotonic())
                finally:
                    with self._wake:
                        if self._life is life:
                            self._finished = self._started
                        self._wake.notify_all()

    def _await_turn(self, life: object) -> bool | None:
        """Wait until a pass is due (False) or one is wanted for an unknown ``kid`` (True); None when closing."""
        with self._wake:
            while self._life is life:
                mono = time.monotonic()
                wanted = self._wanted and self._cache.ready_after_s(mono, wanted=True) == 0
                if wanted or (self._cache.is_due(mono) and self._cache.ready_after_s(mono, wanted=False) == 0):
                    self._wanted = False
                    self._started += 1
                    return wanted
                self._wake.wait(min(max(self._pause_s(mono), 0.01), 60.0))
        return None

    def _pause_s(self, mono: float) -> float:
        """Until the next pass that is foreseen."""
        due_s = max(self._cache.wake_after_s(mono), self._cache.ready_after_s(mono, wanted=False))
        return min(due_s, self._cache.ready_after_s(mono, wanted=True)) if self._wanted else due_s

    def _pass(self, sources: Sequence[Source], life: object, *, wanted: bool) -> None:
        """Try each source that may be asked, until one gives a good set."""
        tried: set[int] = set()
        while (index := self._cache.next_source(time.monotonic(), tried, wanted=wanted)) is not None:
            tried.add(index)
            started_at, started_mono = time.time(), time.monotonic()
            self._cache.attempted(index, started_mono, wanted=wanted)
            self.counters["fetches"] += 1
            problem = self._try(sources[index], life, index, started_at, started_mono)
            if problem is None or self._life is not life:
                return
            self.counters["fetch_errors"] += 1
            self.counters[f"fetch_{problem}"] += 1
            _log.warning("no keys from source %d: %s", index, problem)
        self._cache.failed(time.monotonic())

    def _try(self, source: Source, life: object, index: int, started_at: float, started_mono: float) -> str | None:
        """One attempt; None if it brought a good set, else a short, stable name of what went wrong."""
        try:
            reply = source.get(self._cache.etag(index), HTTP_TIMEOUT_S)
            if self._life is not life:
                return "too_late"
            self._cache.succeeded(index, reply, started_at=started_at, started_mono=started_mono)
        except JwksError as error:
            return error.reason.replace(" ", "_")
        if self._on_change is not None:
            self._on_change(self._cache.view)
        return None
