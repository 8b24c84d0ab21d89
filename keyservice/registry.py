"""Every client: those of the file, which only the file changes, and those made by the admin API.

The latter are one hash on the primary, ``{ks}:clients``, changed by compare-and-set on the very bytes that were read.
Each instance holds all of them in memory and asks its region's replica once a second whether they changed, so that a
client goes on getting tokens without the primary, and without Redis. ``{ks}:clients:revision`` is a random word, new at
each change: after a failover that lost a change it differs too. A server without one has lost its data, or never had
any: what is held stays, and is put back on a primary that has none.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import structlog
from redis.exceptions import RedisError

from .clients import Client, Clients, client_problem
from .errors import RequestRefused, StoreError
from .limits import CLIENTS_MAX
from .store import Node

__all__ = ["ClientRegistry", "Registered"]

_log = structlog.get_logger(__name__)

_CLIENTS: Final = "{ks}:clients"
_REVISION: Final = "{ks}:clients:revision"


class Registered(msgspec.Struct, frozen=True):
    """A client as it is stored. Times are Unix seconds."""

    client: Client
    created_at: int
    updated_at: int


class ClientRegistry:
    """``get`` and iteration are from memory; the rest is on the primary and raises :class:`StoreError`."""

    def __init__(self, file: Clients, primary: Node, own: Node, *, clock: Callable[[], float]) -> None:
        self._file = file
        self._primary = primary
        self._own = own
        self._clock = clock
        self._held: dict[str, Registered] = {}
        self._revision: bytes | None = None

    # -- in memory --------------------------------------------------------------------------------------------------

    def get(self, client_id: str, /) -> Client | None:
        """The client with this id; one in the file stands in front of any other."""
        client = self._file.get(client_id)
        if client is not None:
            return client
        registered = self._held.get(client_id)
        return registered.client if registered is not None else None

    def registered(self, client_id: str) -> Registered | None:
        """A client that the admin API made; None for one of the file."""
        return None if client_id in self._file else self._held.get(client_id)

    def in_file(self, client_id: str) -> bool:
        """Whether only the file changes this client."""
        return client_id in self._file

    def __iter__(self) -> Iterator[tuple[Client, Registered | None]]:
        for client in self._file.values():
            yield client, None
        for client_id, registered in sorted(self._held.items()):
            if client_id not in self._file:
                yield registered.client, registered

    # -- from the region's replica ----------------------------------------------------------------------------------

    async def once(self) -> None:
        """Take over what changed. A server that does not answer, or has lost everything, takes no client away."""
        try:
            revision = await self._own.redis.get(_REVISION)
            if revision is None:
                await self._put_back()
            if revision in (None, self._revision):
                return
            async with self._own.redis.pipeline(transaction=True) as pipe:
                pipe.get(_REVISION)
                pipe.hgetall(_CLIENTS)
                revision, stored = await pipe.execute()
        except (StoreError, RedisError, OSError):
            return
        if revision is not None:
            self._take(revision, stored)

    def _take(self, revision: bytes, stored: dict[bytes, bytes]) -> None:
        found = {client_id.decode(): _decode(raw) for client_id, raw in stored.items()}
        self._held = {client_id: one for client_id, one in found.items() if one is not None}
        self._revision = revision
        for client_id in self._held.keys() & self._file.keys():
            _log.warning("client is in the clients file too, which counts", client_id=client_id[:64])

    # -- on the primary ---------------------------------------------------------------------------------------------

    async def add(self, client: Client) -> Registered:
        """Store a new client; raises :class:`RequestRefused` (409) if there is one with its id."""
        if self.in_file(client.client_id):
            raise _exists()
        now = int(self._clock())
        return await self._put(b"", Registered(client, now, now), _exists())

    async def change(self, client_id: str, changed: Callable[[Client], Client]) -> Registered:
        """Replace a client by what ``changed`` makes of it; raises :class:`RequestRefused` (404, 409)."""
        raw, before = await self._read(client_id)
        after = Registered(changed(before.client), before.created_at, int(self._clock()))
        return await self._put(raw, after, _lost_race())

    async def remove(self, client_id: str, allowed: Callable[[Client], object]) -> None:
        """Delete a client that ``allowed`` does not raise for; raises :class:`RequestRefused` (404, 409)."""
        raw, before = await self._read(client_id)
        allowed(before.client)
        await self._run(client_id, raw, b"", _lost_race())
        self._held = {name: one for name, one in self._held.items() if name != client_id}

    async def _read(self, client_id: str) -> tuple[bytes, Registered]:
        if self.in_file(client_id):
            raise RequestRefused("client_read_only", "the client is in the clients file: change that", status=409)
        raw = await self._primary.write("HGET", _CLIENTS, client_id)
        before = _decode(raw) if raw is not None else None
        if before is None:
            raise RequestRefused("client_unknown", "there is no client with this id", status=404)
        return raw, before

    async def _put(self, expected: bytes, registered: Registered, otherwise: RequestRefused) -> Registered:
        problem = client_problem(registered.client)
        if problem is not None:
            raise RequestRefused("client_invalid", problem)
        client_id = registered.client.client_id
        await self._run(client_id, expected, msgspec.json.encode(registered), otherwise)
        self._held = {**self._held, client_id: registered}
        return registered

    async def _put_back(self) -> None:
        """Where the primary has no clients at all, those that are held: it lost its data."""
        if not self._held or await self._primary.write("GET", _REVISION) is not None:
            return
        for client_id, registered in self._held.items():
            await self._script(client_id, b"", msgspec.json.encode(registered))
        _log.warning("the primary had lost its clients: put back", count=len(self._held))

    async def _script(self, client_id: str, expected: bytes, wanted: bytes) -> Any:
        arguments = (client_id, expected, wanted, secrets.token_hex(16), str(CLIENTS_MAX))
        return await self._primary.run("client_put.lua", (_CLIENTS, _REVISION), arguments)

    async def _run(self, client_id: str, expected: bytes, wanted: bytes, otherwise: RequestRefused) -> None:
        await self._put_back()
        outcome = await self._script(client_id, expected, wanted)
        if outcome == b"full":
            raise RequestRefused("clients_too_many", f"there are {CLIENTS_MAX} clients already", status=409)
        if outcome != b"done":
            raise otherwise


def _decode(raw: bytes) -> Registered | None:
    try:
        registered = msgspec.json.decode(raw, type=Registered)
    except msgspec.DecodeError:
        registered = None
    if registered is None or client_problem(registered.client) is not None:
        _log.error("a stored client was left out: unreadable, or of a newer release")
        return None
    return registered


def _exists() -> RequestRefused:
    return RequestRefused("client_exists", "there is a client with this id", status=409)


def _lost_race() -> RequestRefused:
    return RequestRefused("client_changed", "somebody else changed the client at the same time; try again", status=409)
