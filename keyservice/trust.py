"""The trust log as its writers see it: append, beat, key records and epochs, each by a script with the shared checks.

A refusal says what to do next (:mod:`keyservice.core.epochs`): open a new epoch by compare-and-set, read the epoch that
somebody else opened, or give up. A retry after a refusal is safe, because a refusal is made before anything is written;
a write whose reply is lost is never retried here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

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
    Hole,
    Position,
    region_key,
    serving_key,
)

from .core.clocks import SIGHTING_MAX_AGE_S
from .core.epochs import Step, after_refusal
from .core.evidence import EpochKey, Report, key_of
from .core.ids import uuid7
from .core.keepers import Add, Bump
from .core.revocation import Stored
from .core.rotation import KeyRecord, Serving
from .errors import PrimaryUnreachable, Refused, WaitingForBootstrap
from .limits import APPEND_ENTRIES_MAX, SCRIPT_ATTEMPTS_MAX
from .store import Node

__all__ = ["BeatResult", "KeysView", "TrustLog", "private_key_name", "read_keys", "read_serving"]

T = TypeVar("T")
_APPEND_KEYS: Final = (LOG_KEY, EPOCH_KEY, BEAT_KEY, META_KEY)
_log = structlog.get_logger(__name__)


def _clock_key(region: str) -> str:
    return f"{{ks}}:clock:{region}"


def private_key_name(region: str) -> str:
    """The hash of a region's wrapped private keys, by ``kid``."""
    return f"{{ks}}:private:{region}"


class BeatResult(NamedTuple):
    """Whether a beat was written, and the primary's clock (milliseconds)."""

    written: bool
    server_ms: int


@dataclass(frozen=True, slots=True)
class KeysView:
    """Every key record and what belongs to it, read in one transaction. ``epoch`` is None while there is no log.

    ``merged``: this region's keeper has merged into the epoch, so what it holds of the keys is in here. ``from_own``:
    it was read from the region's own server, as every instance of the region reads it.
    """

    epoch: Epoch | None
    records: dict[str, KeyRecord]
    private: dict[str, bytes]
    merged: bool = False
    from_own: bool = False

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
            pipe.hmget(region_key(region), ["number", "nonce"])
            epoch, records, private, merged = await pipe.execute()
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
        merged=seen is not None and merged == [str(seen.number).encode(), seen.nonce.encode()],
    )


async def read_serving(node: Node, regions: Sequence[str], epoch: Epoch) -> Serving:
    """What each of these regions says it serves in this epoch. Raises :class:`PrimaryUnreachable`."""
    try:
        async with node.redis.pipeline(transaction=True) as pipe:
            for region in regions:
                pipe.hgetall(serving_key(region))
                pipe.hget(region_key(region), "at")
            answers = await pipe.execute()
    except (RedisError, OSError):
        raise PrimaryUnreachable from None
    since: dict[str, dict[str, float]] = {}
    heard_at: dict[str, float] = {}
    for region, served, at_ms in zip(regions, answers[::2], answers[1::2], strict=True):
        if served.get(b"nonce") == epoch.nonce.encode():
            kids = {name: at for name, at in served.items() if name.startswith(b"kid:")}
            since[region] = {n[4:].decode("ascii", "replace"): int(at) / 1000 for n, at in kids.items() if at.isdigit()}
        if at_ms is not None and at_ms.isdigit():
            heard_at[region] = int(at_ms) / 1000
    return Serving(tuple(regions), since, heard_at)


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

    def __init__(self, primary: Node, *, region: str, max_token_lifetime_s: int) -> None:
        self._primary = primary
        self._region = region
        self._max_token_lifetime_s = max_token_lifetime_s
        self.seen: Epoch | None = None
        self.bumps = 0

    async def append(self, entries: Sequence[Entry]) -> list[Stored]:
        """Append up to 1,000 entries in one script; the result has the primary's ``at``. Raises :class:`StoreError`."""
        if not 0 < len(entries) <= APPEND_ENTRIES_MAX:
            raise ValueError("one call appends 1 to 1,000 entries")
        fields = [value for entry in entries for value in _appended_fields(entry)]

        async def call(epoch: Epoch) -> list[Stored]:
            first, _, at, _ = await self._run("append.lua", _APPEND_KEYS, key_of(epoch), ["", *fields])
            places = (Position(epoch.number, seq, epoch.nonce) for seq in range(int(first), int(first) + len(entries)))
            return [Stored(_taken(entry, int(at)), place) for entry, place in zip(entries, places, strict=True)]

        return await self._checked(call)

    async def beat(self, interval_ms: int) -> BeatResult:
        """Beat, unless somebody else just did. Raises :class:`StoreError`."""

        async def call(epoch: Epoch) -> BeatResult:
            keys = (BEAT_KEY, EPOCH_KEY, LOG_KEY)
            written, server_ms = await self._run("beat.lua", keys, key_of(epoch), [str(interval_ms)])
            return BeatResult(bool(written), int(server_ms))

        return await self._checked(call)

    async def warm(self) -> None:
        """Make the next call one round trip."""
        await self._primary.warm()

    async def server_ms(self) -> int:
        """The primary's clock in milliseconds. Raises :class:`StoreError`."""
        seconds, microseconds = await self._primary.write("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def tell_skew(self, skew_s: float, server_ms: int, regions: Collection[str]) -> dict[str, float]:
        """Say how far this region's clock is from the primary's; what every region says of its own, if lately."""
        try:
            async with self._primary.redis.pipeline(transaction=True) as pipe:
                pipe.hset(_clock_key(self._region), mapping={"skew_s": repr(skew_s), "at": str(server_ms)})
                for region in regions:
                    pipe.hmget(_clock_key(region), ["skew_s", "at"])
                _, *told = await pipe.execute()
        except (RedisError, OSError):
            raise PrimaryUnreachable from None
        sightings = {}
        for region, (skew, at_ms) in zip(regions, told, strict=True):
            if skew is not None and at_ms is not None and abs(server_ms - int(at_ms)) < SIGHTING_MAX_AGE_S * 1000:
                sightings[region] = float(skew)
        return sightings

    async def forget_skew(self) -> None:
        """The clocks agree again."""
        await self._primary.write("DEL", _clock_key(self._region))

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
            (keys_n,) = await self._run("keys_put.lua", (KEYS_KEY, EPOCH_KEY), key_of(epoch), [guard, *fields])
            return Generation(epoch.number, int(keys_n))

        return await self._checked(call)

    async def ensure_epoch(self) -> Epoch:
        """The current epoch, on this very server. Raises :class:`StoreError`."""

        async def call(epoch: Epoch) -> Epoch:
            return epoch

        return await self._checked(call)

    # -- a keeper's steps, each in the one epoch that it was decided for -------------------------------------------

    async def add(self, add: Add) -> int:
        """Append a keeper's entries and name its epochs; the newest beat of that epoch, -1 for none."""
        fields = [value for entry in add.entries for value in _appended_fields(entry)]
        links = msgspec.json.encode(add.links).decode() if add.links else ""
        *_, beat_n = await self._in_epoch(add.seen, "append.lua", _APPEND_KEYS, [links, *fields])
        return int(beat_n)

    async def report(self, report: Report, version: str) -> None:
        """Put a keeper's evidence in place."""
        beat = (str(report.beat_n), str(report.beat_at_ms), report.beat_position)
        fields = [report.keeper_id, report.held, str(report.commit), *beat, version]
        await self._in_epoch(report.epoch, "report.lua", (region_key(report.region), EPOCH_KEY), fields)

    async def serve(self, epoch: EpochKey, kids: Sequence[str]) -> None:
        """Say which keys this region serves. Raises :class:`StoreError`."""
        await self._in_epoch(epoch, "serving.lua", (serving_key(self._region), EPOCH_KEY), list(kids))

    async def open_epoch(self, epoch: EpochKey) -> bool:
        """Open the epoch that enough keepers have merged into; False if it was open."""
        (done,) = await self._in_epoch(epoch, "open.lua", (EPOCH_KEY, BEAT_KEY, LOG_KEY), [])
        return bool(int(done))

    async def put_back_keys(
        self, epoch: EpochKey, records: Sequence[KeyRecord], private: Mapping[str, bytes | str]
    ) -> int:
        """Put back key records and this region's wrapped private keys that the log lacks; how many it lacked."""
        fields: list[bytes | str] = [str(len(records))]
        for record in records:
            fields += (record.kid, msgspec.json.encode(record))
        for kid, envelope in private.items():
            fields += (kid, envelope)
        keys = (KEYS_KEY, EPOCH_KEY, private_key_name(self._region))
        (changed,) = await self._in_epoch(epoch, "keys_merge.lua", keys, fields)
        return int(changed)

    async def bump(self, bump: Bump, *, forgotten: Sequence[str] = (), min_reader_format: int = FORMAT) -> bool:
        """Open a new epoch with these voters, after the one that was seen; False if it is another one by now.

        After none was seen, this makes what is missing of a log, and only where something is.
        """
        seen = bump.seen
        if seen is None:
            held = await self._read_epoch()
            seen = None if held is None else key_of(held)
        return await self._bump(
            seen,
            above=bump.above,
            voters=msgspec.json.encode(dict(bump.voters)).decode(),
            forgotten=msgspec.json.encode(list(forgotten)).decode() if forgotten else "",
            holes=_encoded_holes(bump.holes),
            chosen="" if bump.chosen is None else msgspec.json.encode(bump.chosen).decode(),
            on_absent=bump.seen is None,
            min_reader_format=min_reader_format,
        )

    async def register(self, keeper_id: str) -> bool:
        """Claim this region's seat on a server without a log; False if there is a log."""
        outcome, *_ = await self._primary.run("register.lua", (META_KEY, region_key(self._region)), [keeper_id])
        return bool(outcome == b"registered")

    async def registered(self, regions: Sequence[str]) -> dict[str, str]:
        """The keepers that have claimed a seat, all of them holding nothing."""
        found = {}
        for region in regions:
            keeper_id, empty = await self._primary.write("HMGET", region_key(region), "keeper_id", "empty")
            if keeper_id and empty == b"1":
                found[region] = keeper_id.decode("ascii", "replace")
        return found

    async def _in_epoch(
        self, epoch: EpochKey, script: str, keys: tuple[str, ...], args: Sequence[bytes | str]
    ) -> list[bytes]:
        """A script in this very epoch. Whatever it refuses for, whoever decided decides again; but where the server is
        another one than the epoch's, a new epoch is opened first."""
        try:
            return await self._run(script, keys, epoch, args)
        except Refused as refused:
            if after_refusal(refused.code) is Step.BUMP:
                await self._bump(epoch)
            raise

    # -- how a call is carried through ------------------------------------------------------------------------------

    async def _checked(self, call: Callable[[Epoch], Awaitable[T]]) -> T:
        """Make a call in the current epoch; after a refusal do what it says and make it again."""
        refusal = Refused("TRUST_EPOCH")
        for _ in range(SCRIPT_ATTEMPTS_MAX):
            epoch = self.seen or await self._read_epoch()
            if epoch is None:
                raise WaitingForBootstrap
            try:
                return await call(epoch)
            except Refused as refused:
                refusal = refused
                await self._react(refused, epoch)
        raise refusal

    async def _react(self, refused: Refused, epoch: Epoch) -> None:
        step = after_refusal(refused.code)
        if step is Step.WAIT:
            self.seen = None
            raise WaitingForBootstrap
        if step is Step.BUMP:
            await self._bump(key_of(epoch))
        elif step is Step.REREAD:
            self.seen = None
        elif step is Step.UNREACHABLE:
            self.seen = None
            raise PrimaryUnreachable("the server at KEYSERVICE_PRIMARY_URL is not a primary", code="not_primary")
        else:
            raise refused

    async def _run(
        self, script: str, keys: tuple[str, ...], epoch: EpochKey, args: Sequence[bytes | str]
    ) -> list[bytes]:
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

    async def _bump(
        self,
        seen: EpochKey | None,
        *,
        above: int = 0,
        voters: str = "",
        forgotten: str = "",
        holes: str = "",
        chosen: str = "",
        on_absent: bool = False,
        min_reader_format: int = FORMAT,
    ) -> bool:
        """Open the epoch after ``seen``, with its voters where no others are given; False if somebody was faster.

        Afterwards the epoch is to be read again.
        """
        args = [
            *(("", "") if seen is None else (str(seen.number), seen.nonce)),
            secrets.token_hex(8),
            str(above),
            uuid7(time.time()),
            self._region,
            voters,
            forgotten,
            "1" if on_absent else "0",
            secrets.token_hex(16) if on_absent else "",
            str(FORMAT),
            str(min_reader_format),
            str(self._max_token_lifetime_s),
            holes,
            chosen,
        ]
        outcome, *number = await self._primary.run("bump.lua", (META_KEY, EPOCH_KEY, LOG_KEY), list(args))
        self.seen = None
        if outcome == b"waiting":
            raise WaitingForBootstrap
        if outcome == b"bumped":
            self.bumps += 1
            _log.info("epoch begun", number=int(number[0]), first=seen is None)
        return bool(outcome == b"bumped")


def _encoded_holes(holes: frozenset[Hole]) -> str:
    """As an epoch's hash has them; nothing for none."""
    pairs = sorted((right, left) for left, right in holes)
    return msgspec.json.encode([(left and str(left), str(right)) for right, left in pairs]).decode() if pairs else ""


def _appended_fields(entry: Entry) -> tuple[str, ...]:
    """The fields of an entry that ``append.lua`` takes, in its order: those of the log, less the version."""
    _, *fields = entry.encode().values()
    return tuple(fields)


def _taken(entry: Entry, at_ms: int) -> Entry:
    """The entry with the time at which a primary first took it."""
    if entry.at:
        return entry
    named = (entry.id, entry.kind, entry.issuer, entry.value, entry.before, entry.expires_at, entry.reason)
    return Entry(*named, at_ms, entry.region)
