"""The rotator: reads the region's keys from the primary, lets :mod:`keyservice.core.rotation` decide, and writes.

Every instance of a region runs it. The decision is made on what was read and written by compare-and-set on exactly
that: whoever loses the race reads again and decides again, so two rotators do what one would. The private half is
stored before the public record; one that is found without a record (its writer died in between, or lost the race)
becomes the next key instead of a new one.

A key is created only once the region's keeper has merged into the epoch: what a server lost of the keys, the keeper has
put back by then. And only while all regions together have less than a key set may have, and only if no key record has
changed since they were counted: the set that the regions publish is never one that verifiers refuse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from verifier.limits import JWKS_KEYS_MAX

from . import keyring
from .core import rotation
from .core.rotation import FINAL_STATES, Gate, KeyRecord, Policy, Serving
from .envelope import Kek
from .errors import EnvelopeError, Refused, RequestRefused
from .keyring import Keyring, NewKey
from .limits import KEYS_REQUESTED_MAX, ROTATION_STEPS_MAX
from .store import Node
from .trust import KeysView, TrustLog, private_key_name, read_keys, read_serving

__all__ = ["KEEPER_NOT_MERGED", "RotationRequest", "Rotator"]

KEEPER_NOT_MERGED: Final = "keeper_not_merged"
"""Why no key is made for the moment: at a start or after a failover, until the region's keeper has merged."""

_log = structlog.get_logger(__name__)


class _Requested(msgspec.Struct, frozen=True):
    """A wish for rotation, in ``{ks}:rotation:<region>``: it is fulfilled when ``kid`` is no longer the active key."""

    kid: str
    at: int


@dataclass(frozen=True, slots=True)
class RotationRequest:
    """What became of a wish for rotation.

    ``activates_at`` is in Unix seconds, None if it has happened, or while regions in ``waiting_for`` have yet to serve
    the successor. Those in ``excused`` were not waited for.
    """

    region: str
    replaced: str
    active: str
    activates_at: int | None
    waiting_for: tuple[str, ...] = ()
    excused: tuple[str, ...] = ()


class Rotator:
    """Moves the keys of one region on. ``changed()`` is called after the primary's records were changed."""

    def __init__(
        self,
        primary: Node,
        trust: TrustLog,
        ring: Keyring,
        kek: Kek,
        policy: Policy,
        *,
        region: str,
        clock: Callable[[], float],
        regions: Callable[[], Sequence[str]],
        is_revoked: Callable[[str], bool],
        executor: Executor,
    ) -> None:
        self._primary = primary
        self._regions = regions
        self.gate: Gate | None = None
        """What the next activation by plan waits for, None if none is due."""
        self._trust = trust
        self._ring = ring
        self._kek = kek
        self._policy = policy
        self._region = region
        self._clock = clock
        self._is_revoked = is_revoked
        self._executor = executor
        self._lock = asyncio.Lock()
        self._retired: dict[str, float] = {}
        self.problem: str | None = None

    async def tick(self, replacing: str | None = None) -> KeysView:
        """Decide and act until nothing is left to do; the keys as they then are. Raises :class:`StoreError`.

        ``replacing`` is an active key that is to be replaced in this run, if the gate of its successor is open.
        """
        async with self._lock:
            view = await self._read()
            for _ in range(ROTATION_STEPS_MAX):
                if not await self._step(view, replacing):
                    break
                view = await self._read()
            return view

    async def request(self) -> RotationRequest:
        """Replace the active key as soon as the publish lead allows. Raises :class:`StoreError`, RequestRefused."""
        view = await self.tick()
        if rotation.live(view.records) > KEYS_REQUESTED_MAX:
            message = f"there are more than {KEYS_REQUESTED_MAX} keys: rotate when retiring ones have gone"
            raise RequestRefused("key_set_nearly_full", message, status=409)
        active = _active(view, self._region)
        if active is None:
            raise Refused("NO_ACTIVE_KEY")
        wish = msgspec.json.encode(_Requested(active.kid, int(self._clock())))
        await self._primary.write("SET", self._wish_key, wish)
        view = await self.tick()
        now_active = _active(view, self._region) or active
        gate = self.gate or Gate(None)
        when = gate.opens_at if now_active.kid == active.kid else None
        return RotationRequest(self._region, active.kid, now_active.kid, when, gate.waiting_for, gate.excused)

    async def activate(self) -> RotationRequest:
        """Replace the active key now. Raises :class:`StoreError`, RequestRefused: what it would have to wait for."""
        view = await self.tick()
        active = _active(view, self._region)
        if active is None:
            raise Refused("NO_ACTIVE_KEY")
        view = await self.tick(active.kid)
        now_active, gate = _active(view, self._region) or active, self.gate or Gate(None)
        if now_active.kid == active.kid:
            waits = f"until {gate.opens_at}" if gate.opens_at is not None else f"for {', '.join(gate.waiting_for)}"
            waits = waits if gate.opens_at is not None or gate.waiting_for else "for a standby key"
            raise RequestRefused("activation_too_early", f"the next key waits {waits}", status=409)
        return RotationRequest(self._region, active.kid, now_active.kid, None, (), gate.excused)

    @property
    def _wish_key(self) -> str:
        return f"{{ks}}:rotation:{self._region}"

    async def _read(self) -> KeysView:
        await self._trust.ensure_epoch()
        return await read_keys(self._primary, self._region)

    async def _wished(self) -> str | None:
        raw = await self._primary.write("GET", self._wish_key)
        try:
            return msgspec.json.decode(raw, type=_Requested).kid if raw else None
        except msgspec.DecodeError:
            return None

    async def _step(self, view: KeysView, replacing: str | None) -> bool:
        """One step; True if the keys changed, or were found changed."""
        foreign = self._ring.foreign_kek(view)
        if foreign is not None:
            self._complain("kek_mismatch", wrapped_under=foreign)
            return False
        usable, wished, serving = await self._ring.opens(view), await self._wished(), await self._serving(view)
        now, server_s = self._clock(), await self._trust.server_ms() / 1000
        clock_sound = abs(now - server_s) <= self._policy.max_skew_s
        decision = rotation.decide(
            view.records,
            self._region,
            now,
            self._policy,
            usable=usable,
            revoked={kid for kid in view.records if self._is_revoked(kid)},
            rotate_kid=replacing or wished,
            serving=serving,
            retired=self._known_retired(now) if clock_sound else self._retired,
            clock_sound=clock_sound,
        )
        self._show_gate(decision.gate)
        why_not = _why_not_create(view) if decision.create and not decision.changes else None
        self._complain(why_not if clock_sound else "clock_skew")
        try:
            if decision.changes:
                await self._put(decision.changes, view)
                return True
            if decision.create and why_not is None:
                await self._create(view)
                return True
        except Refused as refused:
            if refused.code != "TRUST_REV":
                raise
            return True  # somebody else was faster
        await self._forget_private(view)
        return False

    async def _serving(self, view: KeysView) -> Serving:
        """Asked for only where it can matter: while a standby waits beside an active key."""
        states = {record.state for record in view.records.values() if record.region == self._region}
        if view.epoch is None or not {"published", "active"} <= states:
            return Serving()
        seated = view.epoch.chain[-1].voters if view.epoch.chain else ()
        return await read_serving(self._primary, tuple(dict.fromkeys((*self._regions(), *seated))), view.epoch)

    def _known_retired(self, now: float) -> Mapping[str, float]:
        """Since when this region's own server shows which keys as retiring: until then its instances sign with them."""
        retiring = {kid for kid, record in self._ring.records.items() if record.state == "retiring"}
        self._retired = {kid: self._retired.get(kid, now) for kid in retiring}
        return self._retired

    def _show_gate(self, gate: Gate | None) -> None:
        """Say once what an activation waits for, and for whom it does not wait."""
        if gate is not None and (self.gate is None or gate.excused != self.gate.excused) and gate.excused:
            _log.warning("rotation goes on without regions beyond the partition budget", excused=gate.excused)
        self.gate = gate

    async def _put(self, records: tuple[KeyRecord, ...], view: KeysView) -> None:
        """In the very epoch whose evidence was asked for, and while no region's keys have changed since."""
        changes = [(view.records[record.kid].rev, record) for record in records]
        generation = await self._trust.put_keys(changes, unchanged_since=view.generation)
        for record in records:
            _log.info("key moved", kid=record.kid, state=record.state, generation=str(generation))

    async def _create(self, view: KeysView) -> None:
        key = await self._orphan(view)
        if key is None:
            key = await self._in_executor(keyring.new_key, self._kek, self._region)
            await self._primary.write("HSET", private_key_name(self._region), key.kid, key.envelope)
        record = rotation.prepare(key.kid, self._region, "RS256", key.jwk, self._clock())
        await self._trust.put_keys([(-1, record)], unchanged_since=view.generation)
        _log.info("key prepared", kid=key.kid)

    async def _orphan(self, view: KeysView) -> NewKey | None:
        """A private half without a public record; None if there is none that opens."""
        for kid in sorted(view.private.keys() - view.records.keys()):
            try:
                return await self._in_executor(keyring.reopen, view.private[kid], self._kek, self._region, kid)
            except EnvelopeError as error:
                _log.error("stored private key cannot be used", kid=kid, code=error.code)
        return None

    async def _in_executor(self, function: Callable[..., NewKey], *args: object) -> NewKey:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def _forget_private(self, view: KeysView) -> None:
        """Delete the private halves of keys that will never sign again."""
        over = [kid for kid in view.private if kid in view.records and view.records[kid].state in FINAL_STATES]
        if over:
            await self._primary.write("HDEL", private_key_name(self._region), *over)

    def _complain(self, problem: str | None, **details: str) -> None:
        if problem is not None and problem != self.problem:
            tell = _log.info if problem == KEEPER_NOT_MERGED else _log.error
            tell("rotation stopped", code=problem, **details)
        self.problem = problem


def _why_not_create(view: KeysView) -> str | None:
    """On a server that lost the keys there are none until the region's keeper has put them back."""
    if not view.merged:
        return KEEPER_NOT_MERGED
    return "key_set_full" if rotation.live(view.records) >= JWKS_KEYS_MAX else None


def _active(view: KeysView, region: str) -> KeyRecord | None:
    active = (record for record in view.records.values() if record.region == region and record.state == "active")
    return max(active, key=lambda record: (record.active_at or 0, record.kid), default=None)
