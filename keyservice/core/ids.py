"""Identifiers: UUIDv7 (RFC 9562 section 5.7), which sort by time."""

from __future__ import annotations

import secrets
import uuid

__all__ = ["uuid7"]


def uuid7(now: float, random_bits: int | None = None) -> str:
    """A UUIDv7 for wall time ``now`` (Unix seconds). ``random_bits`` (74 bits) is drawn if absent."""
    bits = secrets.randbits(74) if random_bits is None else random_bits
    value = (int(now * 1000) & (2**48 - 1)) << 80
    value |= 0x7 << 76 | (bits >> 62) << 64 | 0b10 << 62 | (bits & (2**62 - 1))
    return str(uuid.UUID(int=value))
