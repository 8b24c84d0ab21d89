"""The process around a recording verifier: rounds of verifications, commands in, events out.

A round: look at the status, verify the next tokens in turn, look at the status again. A round counts as fresh only if
both looks said so, and bears the time before the first: at that time the verifier called itself fresh, and held no more
revocations than it used afterwards. Rounds that come late are left out, not caught up with.

One thread reads stdin, all else happens in the main thread. It ends on `stop`, and when stdin closes or nobody reads
stdout any more: whoever started it is gone.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from regions.recorder.events import (
    Command,
    Event,
    Pace,
    Policy,
    Report,
    Reported,
    Sample,
    Started,
    Stopped,
    Unwatch,
    Watch,
)
from regions.recorder.tape import ACCEPTED, Outcome, Tape, Watched
from verifier import ConfigurationError, InvalidToken, RevokedToken, Undecidable, Verifier
from verifier.settings import environment_settings
from verifier.status import Status

__all__ = ["Recording", "main"]

SAMPLES_HZ = 10.0
TELL_OPEN_EVERY_S = 1.0
"""How much of what a killed recorder saw is lost at most."""

COMMANDS_PER_ROUND = 2_000
"""So that thousands of new tokens do not keep the first of them waiting."""


def judge(verifier: Verifier, watched: Watched, max_staleness_s: float | None) -> Outcome:
    """One verification as an outcome."""
    try:
        verifier.verify(watched.token, max_staleness_s=max_staleness_s, min_position=watched.min)
    except RevokedToken as error:
        return Outcome("revoked", error.code, error.kind, error.entry_id)
    except InvalidToken as error:
        return Outcome("invalid", error.code, error.claim or error.reason)
    except Undecidable as error:
        return Outcome("undecidable", error.code, error.reason)
    return ACCEPTED


class Recording:
    """Rounds over a started verifier, until told to stop. `commands` gives None when nobody is left to give any."""

    def __init__(
        self, verifier: Verifier, commands: queue.SimpleQueue[Command | None], out: BinaryIO, *, on_stale: str
    ) -> None:
        self._verifier = verifier
        self._commands = commands
        self._out = out
        self._encoder = msgspec.json.Encoder()
        self._on_stale = on_stale
        self._tape = Tape(may_deny=on_stale == "deny")
        self._pace = Pace()
        self._max_staleness_s: float | None = None
        self._tokens: list[Watched] = []
        self._cursor = 0
        self._owed = 0.0
        self._told_of: tuple[object, ...] = ()
        self._next_sample_mono = 0.0
        self._next_tell_mono = 0.0
        self._stopping = False

    def run(self) -> None:
        """Raises `BrokenPipeError` when nobody reads the events any more."""
        started = Started(os.getpid(), self._verifier.region, self._on_stale, time.monotonic(), time.time())
        self._write([started])
        next_mono = time.monotonic()
        while not self._stopping:
            self._obey_until(next_mono)
            self._round()
            next_mono = max(next_mono + 1 / self._pace.rounds_hz, time.monotonic())
        self._tape.tell_open()
        stopped = Stopped(time.monotonic(), self._tape.verifications, time.process_time())
        self._write([*self._tape.take(), stopped])

    # -- commands -------------------------------------------------------------------------------------------------

    def _obey_until(self, next_mono: float) -> None:
        """Wait for the next round, and obey whatever comes meanwhile."""
        for _ in range(COMMANDS_PER_ROUND):
            wait_s = next_mono - time.monotonic()
            try:
                command = self._commands.get(wait_s > 0, wait_s if wait_s > 0 else None)
            except queue.Empty:
                return
            self._obey(command)
            if self._stopping:
                return

    def _obey(self, command: Command | None) -> None:
        if isinstance(command, Watch):
            self._tape.watch(command.name, command.token, command.min)
            self._tokens = self._tape.watched
        elif isinstance(command, Unwatch):
            self._tape.unwatch(command.name)
            self._tokens = self._tape.watched
        elif isinstance(command, Pace):
            self._pace = command
        elif isinstance(command, Policy):
            self._max_staleness_s = command.max_staleness_s
            self._tape.set_policy(may_deny=self._on_stale == "deny" or command.max_staleness_s is not None)
        elif isinstance(command, Report):
            self._tape.tell_open()
            self._write([*self._tape.take(), Reported(command.id, time.monotonic(), self._tape.verifications)])
        else:
            self._stopping = True

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        began = time.monotonic()
        before = self._verifier.status()
        for watched in self._next_tokens():
            began_mono = time.monotonic()
            outcome = judge(self._verifier, watched, self._max_staleness_s)
            ended_mono = time.monotonic()
            self._tape.add(watched, outcome, began_mono=began_mono, ended_mono=ended_mono, wall=time.time())
        fresh = before.fresh and self._verifier.status().fresh
        self._tape.round_over(began, ready=before.ready, fresh=fresh)
        if began >= self._next_tell_mono:
            self._tape.tell_open()
            self._next_tell_mono = began + TELL_OPEN_EVERY_S
        self._write([*self._sample(began, before), *self._tape.take()])

    def _next_tokens(self) -> list[Watched]:
        """As many as the pace gives this round, the longest unseen first, none of them twice."""
        self._owed = min(self._owed + self._pace.rate / self._pace.rounds_hz, max(len(self._tokens), 1))
        count = min(int(self._owed), len(self._tokens))
        self._owed -= count
        start = self._cursor % len(self._tokens) if self._tokens else 0
        self._cursor = start + count
        return (self._tokens + self._tokens)[start : start + count]

    def _sample(self, mono: float, status: Status) -> list[Sample]:
        state = (status.ready, status.fresh, status.reason, status.epoch, status.nonce, status.connection)
        if state == self._told_of and mono < self._next_sample_mono:
            return []
        self._told_of, self._next_sample_mono = state, mono + 1 / SAMPLES_HZ
        return [
            Sample(
                mono=mono,
                wall=time.time(),
                ready=status.ready,
                fresh=status.fresh,
                reason=status.reason,
                staleness_s=status.staleness_s,
                confirmed=status.confirmed,
                position=status.position,
                epoch=status.epoch,
                nonce=status.nonce,
                entries=status.mirror_entries,
                connection=status.connection,
            )
        ]

    def _write(self, events: list[Event]) -> None:
        if events:
            self._out.write(b"".join(self._encoder.encode(event) + b"\n" for event in events))
            self._out.flush()


def read_commands(lines: BinaryIO, commands: queue.SimpleQueue[Command | None]) -> None:
    """Put every command in the queue, and None at the end, also after a line that is none: nothing is skipped."""
    decoder = msgspec.json.Decoder(Command)
    try:
        for line in lines:
            commands.put(decoder.decode(line))
    except msgspec.DecodeError as error:
        sys.stderr.write(f"recorder: a line on stdin is no command: {error}\n")  # names members, never their values
    commands.put(None)


def main(make_verifier: Callable[[], Verifier] = Verifier.from_env) -> None:
    """Run until stdin closes. Settings are those of `Verifier.from_env`; a wrong one is exit code 2."""
    try:
        on_stale = str(environment_settings().get("on_stale", "allow"))
        verifier = make_verifier()
    except ConfigurationError as error:
        sys.stderr.write(f"recorder: error [{error.code}]: {error}\n")
        sys.exit(2)
    commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(sys.stdin.buffer, commands), name="commands", daemon=True).start()
    try:
        with verifier:
            Recording(verifier, commands, sys.stdout.buffer, on_stale=on_stale).run()
    except BrokenPipeError:
        os._exit(1)  # nobody reads: a flush at exit would fail once more
    os._exit(0)  # the daemon thread may be reading stdin, whose lock an orderly exit would want
