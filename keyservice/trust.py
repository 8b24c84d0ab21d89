"""The trust log as its writers see it: append, beat, key records and epochs, each by a script with the shared checks.

A refusal says what to do next (:mod:`keyservice.core.epochs`): open a new epoch by compare-and-set, read the epoch that
somebody else opened, or give up. A retry after a refusal is safe, because a refusal is made before anything is written;
a write whose reply is lost is never retried here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import msgspec
import structlog
from redis.exceptions import RedisError

from verifier.jwk import JwksError, thumbprint
from verifier.log import (
    BEAT_KEY,
    EPOCH_KEY,
    FORMAT,
    KEYS_KEY,
    LOG_KEY,
    META_KEY,
    Entry,
    Epoch,
    FormatError,
    Generation,
    Position,
)

from .core.epochs import Step, after_refusal
from .core.ids import uuid7
from .core.revocation import Stored
from .core.rotation import KeyRecord
from .errors import PrimaryUnreachable, Refused, WaitingForBootstrap
from .limits import APPEND_ENTRIES_MAX, SCRIPT_ATTEMPTS_MAX
from .store import Node

__all__ = ["BeatResult", "KeysView", "TrustLog", "private_key_name", "read_keys"]

T = TypeVar("T")
_log = structlog.get_logger(__name__)


def private_key_name(region: str) -> str:
    """The hash of a region's wrapped private keys, by ``kid``."""
    return f"{{ks}}:private:{region}"


class BeatResult(NamedTuple):
    """Whether a beat was written, and the primary's clock (milliseconds)."""

    written: bool
    server_ms: int


@dataclass(frozen=True, slots=True)
class KeysView:
    """Every key record and what belongs to it, read in one transaction. ``epoch`` is None while there is no log."""

    epoch: Epoch | None
    records: dict[str, KeyRecord]
    private: dict[str, bytes]

    @property
    def generation(self) -> Generation:
        """The version of this set; 0-0 while there is no epoch."""
        return self.epoch.generation if self.epoch is not None else Generation(0, 0)


async def read_keys(node: Node, region: str) -> KeysView:
    """Key records, epoch and the region's wrapped private keys, as they were at one moment.

    Raises :class:`PrimaryUnreachable` if the server does not answer. A record that cannot be read, or whose ``kid`` is
    not its key's thumbprint (RFC 7638), is left out.
    """
    try:
        async with node.redis.pipeline(transaction=True) as pipe:
            for key in (EPOCH_KEY, KEYS_KEY, private_key_name(region)):
                pipe.hgetall(key)
            epoch, records, private = await pipe.execute()
    except (RedisError, OSError):
        raise PrimaryUnreachable from None
    try:
        seen = Epoch.decode(epoch) if epoch else None
    except FormatError as error:
        raise Refused(f"TRUST_FORMAT_{error.code}") from None
    readable = (_readable(kid.decode("utf-8", "replace"), raw) for kid, raw in records.items())
    return KeysView(
        seen,
        {record.kid: record for record in readable if record is not None},
        {kid.decode("utf-8", "replace"): envelope for kid, envelope in private.items()},
    )


def _readable(kid: str, raw: bytes) -> KeyRecord | None:
    try:
        record = msgspec.json.decode(raw, type=KeyRecord)
        if record.kid == thumbprint(record.jwk) == record.jwk.get("kid") == kid:
            return record
    except (msgspec.DecodeError, JwksError):
        pass
    _log.error("key record left out: unreadable, or its kid is not its thumbprint", kid=kid[:64])
    return None


class TrustLog:
    """Writes to ``{trust}:*`` on the primary, in the epoch that it believes in (``seen``)."""

    def __init__(self, primary: Node, *, region: str, bootstraps: bool, max_token_lifetime_s: int) -> None:
        self._primary = primary
        self._region = region
        self._bootstraps = bootstraps
        self._max_token_lifetime_s = max_token_lifetime_s
        self.seen: Epoch | None = None
        self.bumps = 0

    async def append(self, entries: Sequence[Entry]) -> list[Stored]:
        """Append up to 1,000 entries in one script; the result has the primary's ``at``. Raises :class:`StoreError`."""
        if not 0 < len(entries) <= APPEND_ENTRIES_MAX:
            raise ValueError("one call appends 1 to 1,000 entries")
        fields = [value for entry in entries for value in _caller_known(entry)]

        async def call(epoch: Epoch) -> list[Stored]:
            first, _, at = await self._run("append.lua", (LOG_KEY, EPOCH_KEY), epoch, fields)
            places = (Position(epoch.number, seq, epoch.nonce) for seq in range(int(first), int(first) + len(entries)))
            return [Stored(replace(entry, at=int(at)), place) for entry, place in zip(entries, places, strict=True)]

        return await self._checked(call)

    async def beat(self, interval_ms: int) -> BeatResult:
        """Beat, unless somebody else just did. Raises :class:`StoreError`."""

        async def call(epoch: Epoch) -> BeatResult:
            keys = (BEAT_KEY, EPOCH_KEY, LOG_KEY)
            written, server_ms = await self._run("beat.lua", keys, epoch, [str(interval_ms)])
            return BeatResult(bool(written), int(server_ms))

        return await self._checked(call)

    async def warm(self) -> None:
        """Make the next call one round trip."""
        await self._primary.warm()

    async def server_ms(self) -> int:
        """The primary's clock in milliseconds. Raises :class:`StoreError`."""
        seconds, microseconds = await self._primary.write("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def put_keys(
        self, changes: Sequence[tuple[int, KeyRecord]], *, unchanged_since: Generation | None = None
    ) -> Generation:
        """Write records whose present ``rev`` is as given (-1: none), all or none; returns the new generation.

        ``unchanged_since`` also demands that no key record has changed since that generation. Raises
        :class:`Refused` with ``TRUST_REV`` if something changed meanwhile: read again and decide again.
        """
        fields = [
            value for rev, record in changes for value in (record.kid, str(rev), msgspec.json.encode(record).decode())
        ]

        async def call(epoch: Epoch) -> Generation:
            if unchanged_since is not None and unchanged_since.epoch != epoch.number:
                raise Refused("TRUST_REV")
            guard = "" if unchanged_since is None else str(unchanged_since.n)
            (keys_n,) = await self._run("keys_put.lua", (KEYS_KEY, EPOCH_KEY), epoch, [guard, *fields])
            return Generation(epoch.number, int(keys_n))

        return await self._checked(call)

    async def ensure_epoch(self) -> Epoch:
        """The current epoch; opens the first one where that is this region's to do. Raises :class:`StoreError`."""

        async def call(epoch: Epoch) -> Epoch:
            return epoch

        return await self._checked(call)

    # -- how a call is carried through ------------------------------------------------------------------------------

    async def _checked(self, call: Callable[[Epoch], Awaitable[T]]) -> T:
        """Make a call in the current epoch; after a refusal do what it says and make it again."""
        refusal = Refused("TRUST_EPOCH")
        for _ in range(SCRIPT_ATTEMPTS_MAX):
            epoch = self.seen or await self._read_epoch()
            if epoch is None:
                await self._bump(None)
                continue
            try:
                return await call(epoch)
            except Refused as refused:
                refusal = refused
                await self._react(refused, epoch)
        raise refusal

    async def _react(self, refused: Refused, epoch: Epoch) -> None:
        step = after_refusal(refused.code)
        if step is Step.BUMP:
            await self._bump(None if refused.code == "TRUST_NO_EPOCH" else epoch)
        elif step is Step.REREAD:
            self.seen = None
        elif step is Step.UNREACHABLE:
            self.seen = None
            raise PrimaryUnreachable("the server at KEYSERVICE_PRIMARY_URL is not a primary", code="not_primary")
        else:
            raise refused

    async def _run(self, script: str, keys: tuple[str, ...], epoch: Epoch, args: Sequence[str]) -> list[bytes]:
        reply: list[bytes] = await self._primary.run(script, keys, [str(epoch.number), epoch.nonce, *args])
        return reply

    async def _read_epoch(self) -> Epoch | None:
        reply = await self._primary.write("HGETALL", EPOCH_KEY)
        fields = dict(zip(reply[::2], reply[1::2], strict=True)) if isinstance(reply, list) else reply
        try:
            self.seen = Epoch.decode(fields) if fields else None
        except FormatError as error:
            raise Refused(f"TRUST_FORMAT_{error.code}") from None
        return self.seen

    async def _bump(self, old: Epoch | None) -> None:
        """Open the epoch after ``old``, unless somebody else was faster. Afterwards the epoch is to be read again."""
        args = [
            *(("", "") if old is None else (str(old.number), old.nonce)),
            secrets.token_hex(8),
            "0",
            uuid7(time.time()),
            self._region,
            "1" if self._bootstraps else "0",
            secrets.token_hex(16),
            str(FORMAT),
            str(self._max_token_lifetime_s),
        ]
        outcome, *number = await self._primary.run("bump.lua", (META_KEY, EPOCH_KEY, LOG_KEY), list(args))
        self.seen = None
        if outcome == b"waiting":
            raise WaitingForBootstrap
        if outcome == b"bumped":
            self.bumps += 1
            _log.info("epoch opened", number=int(number[0]), first=old is None)


def _caller_known(entry: Entry) -> tuple[str, ...]:
    """The fields of an entry that ``append.lua`` takes, in its order."""
    fields = entry.encode()
    return tuple(fields[name] for name in ("id", "kind", "issuer", "value", "before", "expires_at", "reason", "region"))
