"""A harness's side of a recording verifier: starts the process, tells it what to watch, keeps what it says."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from regions.cluster_file import ClusterFile
from regions.errors import NotReady, ServerStartFailed
from regions.recorder.events import (
    Command,
    Event,
    Pace,
    Policy,
    Report,
    Reported,
    Run,
    Sample,
    Started,
    Stop,
    Stopped,
    Unwatch,
    Verdict,
    Watch,
)

__all__ = ["PROGRAM", "Recorder", "recorder_environment"]

_T = TypeVar("_T")

PROGRAM = (sys.executable, "-m", "regions.recorder")

SAMPLES_MAX = 20_000
"""Half an hour of them; older ones are forgotten."""

STARTED_WITHIN_S = 30.0
ENDED_WITHIN_S = 5.0


def recorder_environment(cluster: ClusterFile, region: str, **settings: object) -> dict[str, str]:
    """The environment of a recorder in one of a cluster's regions; `settings` are parameters of `Verifier`.

    `min_position_wait_s` is 0: waiting is the recorder's own rounds.
    """
    urls = cluster.regions[region]
    own_first = [urls, *(other for name, other in cluster.regions.items() if name != region)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("VERIFIER_", "REDIS_", "JWT_"))}
    chosen = {"min_position_wait_s": 0, "max_token_lifetime_s": 86_400, **settings}
    return {
        **ours,
        "VERIFIER_ISSUER": cluster.issuer,
        "VERIFIER_AUDIENCE": cluster.audience,
        "VERIFIER_REGION": region,
        "VERIFIER_JWKS_URLS": ",".join(f"{each.keyservice_url}/.well-known/jwks.json" for each in own_first),
        "VERIFIER_REDIS_URL": urls.verifier_redis_url,
        "VERIFIER_SOURCE_ADDRESS": urls.bind_address,
        "JWT_SECRET": cluster.hs256_secret,
        **{f"VERIFIER_{name.upper()}": str(value) for name, value in chosen.items()},
    }


class Recorder:
    """One recording verifier. `with Recorder(…) as recorder:` starts it and ends it; it also ends if this process does.

    `id` tells it from others, also from an earlier one in the same region. `env` is its whole environment; what it
    writes to stderr goes to `log_path`. `program` is what to run. Every method may be called from any thread.
    """

    def __init__(
        self, id: str, region: str, env: Mapping[str, str], log_path: Path, *, program: Sequence[str] = PROGRAM
    ) -> None:
        self.id = id
        self.region = region
        self.started: Started | None = None
        self.stopped: Stopped | None = None
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._env = dict(env)
        self._log_path = log_path
        self._program = list(program)
        self._tokens: dict[str, str] = {}
        self._runs: dict[str, dict[int, Run]] = {}
        self._reported = -1
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._ended = False
        self._expected_to_end = False

    def __repr__(self) -> str:
        return f"<Recorder {self.id}>"

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the process; `wait_ready` says when its verifier has read the log."""
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._program,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                umask=0o077,
                start_new_session=True,  # Ctrl-C reaches the harness only: it decides
            )
        self._reader = threading.Thread(target=self._read, name=f"recorder-{self.id}", daemon=True)
        self._reader.start()
        return self

    def close(self) -> None:
        """Have it tell the rest and end. Calling it again does nothing."""
        self._expected_to_end = True
        with contextlib.suppress(ServerStartFailed):
            self._send(Stop())
        try:
            self._process.wait(ENDED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._clean_up()

    def kill(self) -> None:
        """As its host would die: what it has not told by now is lost, about a second of it at most."""
        self._expected_to_end = True
        self._process.kill()
        self._clean_up()

    def send_signal(self, number: int) -> None:
        """Send the process a signal, for instance SIGSTOP; `report` waits in vain while it stands still."""
        self._process.send_signal(number)

    def _clean_up(self) -> None:
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be written goes nowhere
                    stream.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process, for signals."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still tells."""
        return not self._ended

    def check(self) -> None:
        """Raise `ServerStartFailed` if it ended though nobody asked it to."""
        if self._ended and not self._expected_to_end:
            tail = "".join(f"\n  {line}" for line in self._log_path.read_text(errors="replace").splitlines()[-20:])
            raise ServerStartFailed(f"recorder {self.id} ended; the end of its log {self._log_path}:{tail}")

    # -- commands -------------------------------------------------------------------------------------------------

    def watch(self, name: str, token: str, min_position: str | None = None) -> None:
        """Verify this token from now on. Raises `ValueError` if the name is another token's."""
        if self._tokens.setdefault(name, token) != token:
            raise ValueError(f"{name} is the name of another token")
        self._send(Watch(name, token, min_position))

    def unwatch(self, name: str) -> None:
        """Not any more; what was seen stays."""
        self._send(Unwatch(name))

    def pace(self, rate: float, rounds_hz: float) -> None:
        """Verifications a second in all, and rounds a second (the resolution of times, with few tokens)."""
        self._send(Pace(rate, rounds_hz))

    def policy(self, max_staleness_s: float | None) -> None:
        """Bound the age of the revocations at each verification, whatever `on_stale` says; None: not any more."""
        self._send(Policy(max_staleness_s))

    def report(self, timeout_s: float = 10.0) -> None:
        """Return when everything that it has seen by now is here. Raises `NotReady`, `ServerStartFailed`."""
        number = next(self._ids)
        self._send(Report(number))
        self._wait(lambda: self._reported >= number or None, timeout_s, "did not report")

    def _send(self, command: Command) -> None:
        self.check()
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(msgspec.json.encode(command) + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ServerStartFailed(f"recorder {self.id} is gone; its log is {self._log_path}") from error

    # -- what it saw ----------------------------------------------------------------------------------------------

    @property
    def runs(self) -> dict[str, tuple[Run, ...]]:
        """By token name, each name's in their order, as last told (`report` brings them up to date)."""
        with self._changed:
            return {name: tuple(runs[number] for number in sorted(runs)) for name, runs in self._runs.items()}

    @property
    def events(self) -> list[Run]:
        """All runs, in the order in which they began."""
        return sorted((run for runs in self.runs.values() for run in runs), key=lambda run: run.first_mono)

    def runs_of(self, name: str) -> tuple[Run, ...]:
        """One token's runs in their order, none if it was never verified."""
        with self._changed:
            runs = self._runs.get(name, {})
            return tuple(runs[number] for number in sorted(runs))

    def latest(self, name: str) -> Run | None:
        """The run that a token is in, or None while it was never verified."""
        return next(reversed(self.runs_of(name)), None)

    def last_accept(self, name: str) -> float | None:
        """Monotonic seconds at which the last verification that was accepted began."""
        return max((run.last_mono for run in self.runs_of(name) if run.verdict == "accepted"), default=None)

    def first_refusal(self, name: str) -> float | None:
        """Monotonic seconds at which the first verification that said *revoked* had ended."""
        return min((run.first_mono for run in self.runs_of(name) if run.verdict == "revoked"), default=None)

    def wait_ready(self, timeout_s: float = STARTED_WITHIN_S) -> None:
        """Until its verifier holds keys and has read the log. Raises `NotReady`, `ServerStartFailed`."""
        self._wait(lambda: any(sample.ready for sample in self.samples) or None, timeout_s, "is not ready")

    def wait_for(self, name: str, verdict: Verdict, timeout_s: float) -> Run:
        """Until the token's verdict is this one; returns the run. Raises `NotReady` saying what it is instead."""

        def found() -> Run | None:
            run = self.latest(name)
            return run if run is not None and run.verdict == verdict else None

        return self._wait(found, timeout_s, f"does not find {name} {verdict}", lambda: repr(self.latest(name)))

    def wait_sample(self, wanted: Callable[[Sample], bool], timeout_s: float) -> Sample:
        """Until its last sample is as wanted. Raises `NotReady`, `ServerStartFailed`."""

        def found() -> Sample | None:
            return self.samples[-1] if self.samples and wanted(self.samples[-1]) else None

        def last() -> str:
            return repr(self.samples[-1]) if self.samples else "no sample"

        return self._wait(found, timeout_s, "has no such status", last)

    def _wait(
        self, found: Callable[[], _T | None], timeout_s: float, problem: str, detail: Callable[[], str] = str
    ) -> _T:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (result := found()) is None:
                self.check()
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._ended:
                    raise NotReady(f"recorder {self.id} {problem} after {timeout_s:g} s; {detail()}")
                self._changed.wait(left_s)
            return result

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._process.stdout is not None
        decoder = msgspec.json.Decoder(Event)
        try:
            for line in self._process.stdout:
                if line.endswith(b"\n"):  # else it was killed half-way
                    event = decoder.decode(line)
                    with self._changed:
                        self._note(event)
                        self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _note(self, event: Event) -> None:
        if isinstance(event, Run):
            self._runs.setdefault(event.name, {})[event.number] = event
        elif isinstance(event, Sample):
            self.samples.append(event)
        elif isinstance(event, Reported):
            self._reported = event.id
        elif isinstance(event, Started):
            self.started = event
        else:
            self.stopped = event
