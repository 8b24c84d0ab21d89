"""Where an entry is stored before it is appended: the region's keeper, in this process or at ``KEYSERVICE_KEEPER_URL``.

An *intent* on a keeper's disk outlives the writer, the primary and the region's server: whatever becomes of the append,
the keeper sees to it that the entry gets into the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol
from urllib.parse import quote

import httpx
import msgspec

from verifier.log import Entry, FormatError

from .core.evidence import EpochKey
from .errors import KeeperUnavailable
from .limits import KEEPER_CONNECTIONS_MAX, KEEPER_TIMEOUT_S

__all__ = ["BeforeBody", "EntriesBody", "Intents", "KeeperClient", "OutcomeBody", "decode_entries", "encode_entries"]


class Intents(Protocol):
    """A keeper as writers see it."""

    async def intend(self, entries: Sequence[Entry]) -> list[Entry | None]:
        """Store each entry whose id is new, on disk when this returns; of each, what was stored under its id before.

        Raises :class:`KeeperUnavailable`: nothing was stored.
        """

    async def appended(self, epoch: EpochKey, entries: Sequence[Entry]) -> None:
        """These were appended in this epoch. A hint: without it they may be appended twice."""

    async def given_up(self, entries: Sequence[Entry]) -> None:
        """These could not be appended: the keeper need not wait for the writer any longer. A hint."""

    async def find(self, entry_id: str) -> Entry | None:
        """What is stored under an id; raises :class:`KeeperUnavailable`."""

    async def close(self) -> None:
        """Close connections."""


class EntriesBody(msgspec.Struct, frozen=True):
    """Entries by field name, all of them text, as in the log."""

    entries: list[dict[str, str]]


class BeforeBody(msgspec.Struct, frozen=True):
    """What was stored under the ids of intents before, None for nothing."""

    before: list[dict[str, str] | None]


class OutcomeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of intents: appended in an epoch, or (``number`` None) given up."""

    entries: list[dict[str, str]]
    number: int | None = None
    nonce: str = ""


def encode_entries(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """For JSON."""
    return [entry.encode() for entry in entries]


def decode_entries(bodies: Sequence[dict[str, str]]) -> list[Entry]:
    """From JSON; raises :class:`FormatError`."""
    return [Entry.decode({name.encode(): value.encode() for name, value in body.items()}) for body in bodies]


class KeeperClient:
    """The keeper in another process. ``secret`` is ``KEYSERVICE_KEEPER_SECRET``; it is never logged."""

    def __init__(self, url: str, secret: str, *, source_address: str | None = None) -> None:
        transport: httpx.AsyncHTTPTransport
        limits = httpx.Limits(max_connections=KEEPER_CONNECTIONS_MAX, max_keepalive_connections=KEEPER_CONNECTIONS_MAX)
        if url.startswith("unix://"):
            transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix://"), limits=limits)
            url = "http://keeper"
        else:
            transport = httpx.AsyncHTTPTransport(local_address=source_address, limits=limits)
        self._http = httpx.AsyncClient(
            transport=transport,
            base_url=url,
            timeout=KEEPER_TIMEOUT_S,
            trust_env=False,
            headers={"Authorization": f"Bearer {secret}"},
        )

    async def intend(self, entries: Sequence[Entry]) -> list[Entry | None]:
        """Raises :class:`KeeperUnavailable`."""
        answer = await self._post("/keeper/intents", EntriesBody(encode_entries(entries)))
        try:
            bodies = msgspec.json.decode(answer.content, type=BeforeBody).before
            before = [None if body is None else decode_entries([body])[0] for body in bodies]
        except (msgspec.DecodeError, FormatError):
            raise _wrong_answer() from None
        if len(before) != len(entries):
            raise _wrong_answer()
        return before

    async def appended(self, epoch: EpochKey, entries: Sequence[Entry]) -> None:
        """Lost without harm."""
        await self._hint(OutcomeBody(encode_entries(entries), epoch.number, epoch.nonce))

    async def given_up(self, entries: Sequence[Entry]) -> None:
        """Lost without harm."""
        await self._hint(OutcomeBody(encode_entries(entries)))

    async def find(self, entry_id: str) -> Entry | None:
        """Raises :class:`KeeperUnavailable`."""
        try:
            answer = await self._http.get(f"/keeper/entries/{quote(entry_id, safe='')}")
        except httpx.HTTPError:
            raise KeeperUnavailable from None
        if answer.status_code == 404:
            return None
        try:
            (entry,) = decode_entries(msgspec.json.decode(_checked(answer).content, type=EntriesBody).entries)
        except (msgspec.DecodeError, FormatError, ValueError):
            raise _wrong_answer() from None
        return entry

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def _hint(self, body: OutcomeBody) -> None:
        with suppress(KeeperUnavailable):  # the keeper finds out by itself, a little later
            await self._post("/keeper/outcomes", body)

    async def _post(self, path: str, body: EntriesBody | OutcomeBody) -> httpx.Response:
        content = msgspec.json.encode(body)
        try:
            answer = await self._http.post(path, content=content, headers={"Content-Type": "application/json"})
        except httpx.HTTPError:
            raise KeeperUnavailable from None
        return _checked(answer)


_CODES: Final = frozenset({"keeper_disk", "keeper_unavailable"})


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    if answer.status_code == 401:
        raise KeeperUnavailable("keeper_secret_wrong", "the region's keeper has another KEYSERVICE_KEEPER_SECRET")
    try:
        code = str(msgspec.json.decode(answer.content)["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        code = "keeper_unavailable"
    code = code if code in _CODES else "keeper_unavailable"
    raise KeeperUnavailable(code, f"the region's keeper answered {answer.status_code}")


def _wrong_answer() -> KeeperUnavailable:
    return KeeperUnavailable("keeper_unavailable", "what answers at KEYSERVICE_KEEPER_URL is no keeper of this release")
