"""A verifier's own account of itself, for health checks, metrics and people."""

from __future__ import annotations

import msgspec

__all__ = ["IssuerStatus", "Status"]


class IssuerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of one issuer. ``age_s`` is None before the first success; ``generation`` where the source tells one."""

    issuer: str | None
    keys: tuple[str, ...]
    age_s: float | None
    generation: str | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A verifier's own account of itself. Times in seconds; ``staleness_s`` None means never synced.

    ``reason`` says why it is not ``fresh``; ``confirmed`` is False while no majority of regions vouches for the age.
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
    keys: tuple[str, ...]
    keys_age_s: float | None
    generation: str | None
    issuers: tuple[IssuerStatus, ...]
    connection: str
    problem: str | None
    region: str | None
    token_cache_entries: int
    counters: dict[str, int]
