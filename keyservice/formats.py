"""What verifiers must know, and what may be written. Verifiers are upgraded first.

A kind that old verifiers would skip must not be written while they call themselves fresh: a token that it revokes would
pass there. So ``min_reader_format`` is raised first, and a verifier below it is not fresh, by name
(``log_format_newer``). ``append.lua`` refuses such a kind (``TRUST_READERS``) until then. Nothing ever lowers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redis.exceptions import RedisError

from verifier.log import EPOCH_KEY, FORMAT, KIND_FORMATS, META_KEY, Entry, Epoch, FormatError

from .errors import PrimaryUnreachable, Refused, RequestRefused
from .store import Node

__all__ = ["format_needed", "raise_min_reader_format"]


def format_needed(entries: Iterable[Entry]) -> int:
    """The format that a reader must know to enforce all of these entries."""
    return max((KIND_FORMATS[entry.kind] for entry in entries), default=1)


async def raise_min_reader_format(primary: Node, wanted: int) -> int:
    """Raise ``min_reader_format``; returns the one that holds now, which is higher if it was.

    Raises :class:`RequestRefused` (``reader_format_unknown``) for a format that this release does not know itself, and
    :class:`StoreError`: ``TRUST_NO_EPOCH`` without a log, ``TRUST_EPOCH`` if another epoch began meanwhile (retry).
    """
    if not 1 <= wanted <= FORMAT:
        raise RequestRefused("reader_format_unknown", f"this release knows the formats 1 to {FORMAT}: upgrade it first")
    try:
        fields: Any = await primary.redis.hgetall(EPOCH_KEY)
    except (RedisError, OSError):
        raise PrimaryUnreachable from None
    if not fields:
        raise Refused("TRUST_NO_EPOCH")
    try:
        epoch = Epoch.decode(fields)
    except FormatError as error:
        raise Refused(f"TRUST_FORMAT_{error.code}") from None
    return int(await primary.run("reader_format.lua", (META_KEY, EPOCH_KEY), [str(epoch.number), epoch.nonce, wanted]))
