"""A keeper's part in the keys: it holds the furthest record of each, and puts back what a log lacks of them.

Public records are merged by the furthest state, then the higher ``rev``. Of private keys it holds its own region's, as
wrapped as they are in Redis: a keeper needs no key-encryption key, and cannot unwrap any.

It also says for its region which keys the region serves: those of the set that it read from the region's own server.
Every instance reads the same server several times a second, and one that could not for :data:`KEYS_SILENCE_MAX_S`
serves no set at all; so after that time no instance of the region serves an older one.
"""

from __future__ import annotations

from typing import Final

import structlog

from verifier.jwk import JwksError

from .core.evidence import EpochKey, key_of
from .core.rotation import FINAL_STATES, PUBLISHED_STATES, KeyRecord
from .errors import KeeperUnavailable, StoreError
from .keeper import KeeperRunner
from .keeper_disk import SqliteDisk
from .keyring import make_document
from .store import Node
from .trust import KeysView, TrustLog, read_keys

__all__ = ["KeyKeeper"]

_log: Final = structlog.get_logger(__name__)


class KeyKeeper:
    """Takes every reading of the key set, as a taker of :class:`~keyservice.jobs.KeyPoll`, and one at each merge."""

    def __init__(self, runner: KeeperRunner, disk: SqliteDisk, trust: TrustLog, primary: Node, *, region: str) -> None:
        self._runner = runner
        self._disk = disk
        self._trust = trust
        self._primary = primary
        self._region = region
        self._said: tuple[EpochKey, list[str]] | None = None
        runner.before_merging = self._put_back

    async def _put_back(self) -> bool:
        """Once the keeper is merged, the primary holds all that it knows of the keys. Raises :class:`StoreError`."""
        return await self._hold(await read_keys(self._primary, self._region))

    async def take(self, view: KeysView) -> bool:
        """Hold what was read, put back what the log lacks of it, and say what is served; False if that did not work."""
        return await self._hold(view) and await self._say(view)

    async def _say(self, view: KeysView) -> bool:
        if view.epoch is None or not view.from_own:
            return True
        epoch = key_of(view.epoch)
        kids = sorted(kid for kid, record in view.records.items() if record.state in PUBLISHED_STATES)
        if (epoch, kids) == self._said:
            return True
        try:
            if make_document(view.records, view.generation) is not None:
                await self._trust.serve(epoch, kids)
        except JwksError:
            return True  # no instance takes this set over; the ring says so
        except StoreError as error:
            _log.info("not said what is served", code=error.code)
            return False
        self._said = (epoch, kids)
        return True

    async def repeat(self) -> None:
        """Say again what was said last: a time that a wrong clock of the primary wrote is set right by it."""
        if self._said is not None:
            try:
                await self._trust.serve(*self._said)
            except StoreError as error:
                _log.info("not said again what is served", code=error.code)

    async def _hold(self, view: KeysView) -> bool:
        if view.epoch is None:
            return False
        try:
            held, private = await self._runner.in_thread(lambda: self._store(view))
            behind = [r for kid, r in held.items() if kid not in view.records or view.records[kid].order < r.order]
            lost = {kid: envelope for kid, envelope in private.items() if kid not in view.private}
            if behind or lost:
                count = await self._trust.put_back_keys(key_of(view.epoch), behind, lost)
                _log.warning("keeper put back keys", count=count)
        except (StoreError, KeeperUnavailable) as error:
            _log.info("keys not held or put back", code=error.code)
            return False
        return True

    def _store(self, view: KeysView) -> tuple[dict[str, KeyRecord], dict[str, bytes]]:
        held, private = self._disk.keys(), self._disk.private()
        new = {kid: r for kid, r in view.records.items() if kid not in held or held[kid].order < r.order}
        held |= new
        over = {kid for kid, record in held.items() if record.state in FINAL_STATES}
        wrapped = {kid: e for kid, e in view.private.items() if private.get(kid) != e and kid not in over}
        if new or wrapped or over & private.keys():
            self._disk.store_keys(new.values(), wrapped, over & private.keys())
        return held, {kid: envelope for kid, envelope in (private | wrapped).items() if kid not in over}
