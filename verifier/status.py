"""A verifier's own account of itself, for health checks, metrics and people."""

from __future__ import annotations

import msgspec

from .mirroring import View

__all__ = ["FirstRead", "IssuerStatus", "Status"]


class IssuerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of one issuer. ``age_s`` is None before the first success; ``generation`` where the source tells one."""

    issuer: str | None
    keys: tuple[str, ...]
    age_s: float | None
    generation: str | None


class FirstRead(msgspec.Struct, frozen=True, kw_only=True):
    """How far the latest read of the log from its first entry is: at the start, and whenever the log is read again.

    ``total`` is the number of entries that the log had when it began (None: not told, or not begun), and ``fraction``
    the part of them that has been read, 1.0 at the end.
    """

    entries: int
    total: int | None
    fraction: float | None

    @classmethod
    def of(cls, view: View | None) -> FirstRead:
        """From what a mirror shows."""
        if view is None or not view.read_total:
            return cls(entries=0 if view is None else view.read_entries, total=None, fraction=None)
        read, total = view.read_entries, view.read_total
        return cls(entries=read, total=total, fraction=min(read / total, 1.0))


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A verifier's own account of itself. Times in seconds; ``staleness_s`` None means never synced.

    ``reason`` says why it is not ``fresh``; ``confirmed`` is False while no majority of regions vouches for the age.
    ``connection``: none, connecting, reading, tailing, waiting (for the next attempt), circuit_open or closed;
    ``problem`` the last one with the source of revocations (docs/verifier-redis.md), None while all is well.
    ``keys``, ``keys_age_s`` and ``generation`` are those of the first issuer, ``issuers`` those of each.
    """

    ready: bool
    fresh: bool
    reason: str | None
    staleness_s: float | None
    confirmed: bool
    position: str | None
    epoch: int | None
    nonce: str | None
    epoch_open: bool
    mirror_entries: int
    first_read: FirstRead
    keys: tuple[str, ...]
    keys_age_s: float | None
    generation: str | None
    issuers: tuple[IssuerStatus, ...]
    connection: str
    problem: str | None
    region: str | None
    token_cache_entries: int
    counters: dict[str, int]
