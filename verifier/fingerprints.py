"""A compact, immutable set of 64-bit fingerprints, each with a coarse time at which it may be forgotten. Pure.

A revoked token's id has 36 characters, which cost Python about 150 bytes each in a set. Of ids that are only ever asked
for, a keyed hash is enough: eight bytes, and one byte for the *code* of its end.

* **Buckets.** Records of nine bytes stand one after another in buckets (``bytes``), found by the fingerprint's low
  bits and searched by the substring search of ``bytes``. The number of buckets follows the number of records one by one
  (linear hashing): the first ``split`` of the ``mask + 1`` buckets are split by one bit more. So nothing is ever
  rebuilt as a whole, and no step lasts longer for a large set but the copy of the list of buckets.
* **Versions.** A change makes a new :class:`Table` that shares every bucket it did not touch; nothing is changed once
  it is made. Whoever holds a table sees all of one version.
* **Ends.** :func:`coarse_end` rounds up, to a 32nd of the life that an entry had left, and 18 hours at most. A code
  stands for one such end; there are at most 255, and past that ends are rounded up further. Never down: a record leaves
  later than it might, not earlier.
* **False hits.** A set of n fingerprints hits an id that is not in it with a probability of n / 2**64: 5.4e-14 for a
  million, which is one needless login in 58 years of 10,000 new tokens a second. The hash is keyed by a secret of the
  process (:data:`fingerprint`), so nobody outside can look for an id that collides. No hit is ever missed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

__all__ = ["Table", "coarse_end", "fingerprint", "pack"]

RECORD: Final = 9
"""Bytes of a record: fingerprint and code."""

LOAD: Final = 16
"""Records a bucket on average: more take longer to search, fewer cost more memory (49 bytes a bucket)."""

CODES_MAX: Final = 255
WIDTH_BITS_MIN: Final = 8
WIDTH_BITS_MAX: Final = 16

pack: Final = Struct("<q").pack
_BYTES: Final = tuple(bytes((code,)) for code in range(CODES_MAX))


def _blake2b(text: str) -> int:
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=_SECRET).digest()
    return int.from_bytes(raw, "little", signed=True)


_SECRET: Final = secrets.token_bytes(32)


def _chosen() -> Callable[[str], int]:
    """Python's own hash of a text, which it keeps with the text, if it is a keyed one of 64 bits with a random key."""
    known = sys.hash_info
    keyed = known.width == 64 and known.algorithm.startswith("siphash") and not known.cutoff
    random_key = bool(sys.flags.ignore_environment) or os.environ.get("PYTHONHASHSEED", "random") in ("", "random")
    return hash if keyed and random_key and sys.flags.hash_randomization else _blake2b


fingerprint: Final = _chosen()
"""A text to a signed 64-bit number, keyed by a secret of this process."""


def coarse_end(expires_at: int, at_ms: int) -> int:
    """The time (Unix seconds, never before ``expires_at``) that a record's code stands for.

    ``at_ms`` is when a primary first took the entry, in milliseconds, 0 if that is not known.
    """
    life_s = max(0, expires_at - at_ms // 1000) if at_ms else 0
    bits = min(max((life_s >> 6).bit_length(), WIDTH_BITS_MIN), WIDTH_BITS_MAX)
    return -(-expires_at >> bits) << bits


class Table:
    """Fingerprints and their ends. ``size`` is the number of records; ``cursor`` the first bucket not yet swept."""

    __slots__ = ("buckets", "codes", "counts", "cursor", "ends", "mask", "size", "split")

    def __init__(self) -> None:
        self.buckets: list[bytes] = [b""]
        self.mask = 0
        self.split = 0
        self.size = 0
        self.cursor = 0
        self.codes: dict[int, int] = {}  # end to code
        self.ends = [0] * CODES_MAX
        self.counts = [0] * CODES_MAX

    @property
    def shape(self) -> tuple[list[bytes], int, int, int]:
        """Buckets, mask, split and the wider mask: what :meth:`end_of` looks at, for whoever cannot afford a call."""
        return self.buckets, self.mask, self.split, 2 * self.mask + 1

    def end_of(self, mark: int) -> int | None:
        """The end of this fingerprint's record, None if there is none."""
        at = mark & self.mask
        if at < self.split:
            at = mark & (2 * self.mask + 1)
        bucket = self.buckets[at]
        place = _find(bucket, pack(mark))
        return None if place < 0 else self.ends[bucket[place + 8]]

    # -- new versions -------------------------------------------------------------------------------------------------

    def _copy(self) -> Table:
        copy = Table()
        copy.buckets, copy.mask, copy.split = self.buckets.copy(), self.mask, self.split
        copy.size, copy.cursor = self.size, self.cursor
        copy.codes, copy.ends, copy.counts = self.codes.copy(), self.ends.copy(), self.counts.copy()
        return copy

    def with_records(self, records: Iterable[tuple[int, int]]) -> tuple[Table, bool]:
        """With these fingerprints and their coarse ends; and whether one that was held ends later than it did."""
        new = self._copy()
        buckets, mask, split, wide = new.shape
        codes, counts = new.codes, new.counts
        added, raised = 0, False
        for mark, end in records:
            code = codes.get(end)
            if code is None:
                code = new._code(end)
            at = mark & mask
            if at < split:
                at = mark & wide
            bucket, needle = buckets[at], pack(mark)
            if needle in bucket and (place := _find(bucket, needle)) >= 0:
                raised |= new._raise(at, place, code)
                continue
            buckets[at] = bucket + needle + _BYTES[code]
            counts[code] += 1
            added += 1
        new.size += added
        new._grow()
        return new, raised

    def _code(self, end: int) -> int:
        """The code of an end that has none yet."""
        free = next((code for code, count in enumerate(self.counts) if not count and not self.ends[code]), None)
        if free is None:
            later = [held for held in self.codes if held >= end]
            if later:
                return self.codes[min(later)]
            latest = max(self.codes)
            free = self.codes.pop(latest)  # all that have this end now last longer
        self.codes[end], self.ends[free] = free, end
        return free

    def _raise(self, at: int, place: int, code: int) -> bool:
        bucket = self.buckets[at]
        held = bucket[place + 8]
        if self.ends[held] >= self.ends[code]:
            return False
        self.counts[held] -= 1
        self.counts[code] += 1
        self.buckets[at] = bucket[: place + 8] + _BYTES[code] + bucket[place + RECORD :]
        return True

    def _grow(self) -> None:
        buckets = self.buckets
        while len(buckets) * LOAD < self.size:
            bit = (self.mask + 1).bit_length() - 1
            stay, move = _parted(buckets[self.split], bit)
            buckets[self.split] = stay
            buckets.append(move)
            self.split += 1
            if self.split > self.mask:
                self.mask, self.split = 2 * self.mask + 1, 0

    def _shrink(self, most: int) -> None:
        buckets = self.buckets
        while len(buckets) > 1 and len(buckets) * LOAD > 4 * self.size and most:
            if not self.split:
                self.mask >>= 1
                self.split = self.mask + 1
            self.split -= 1
            buckets[self.split] += buckets.pop()
            most -= 1
        self.cursor = min(self.cursor, len(buckets) - 1)

    def is_due(self, limit: float) -> bool:
        """Whether any record's end is at or before ``limit``."""
        return any(end <= limit for end, code in self.codes.items() if self.counts[code])

    def swept(self, limit: float, most: int) -> Table:
        """Without records whose end is at or before ``limit``, in the next ``most`` buckets; itself if there are none.

        A ``cursor`` other than 0 says that buckets are left to sweep.
        """
        dead = bytes(code for end, code in self.codes.items() if end <= limit and self.counts[code])
        if not dead:
            return self
        if all(end <= limit or not self.counts[code] for end, code in self.codes.items()):
            return Table()
        new = self._copy()
        start = 0 if most >= len(new.buckets) else self.cursor
        stop = min(start + most, len(new.buckets))
        for at in range(start, stop):
            bucket = new.buckets[at]
            codes = bucket[8::RECORD]
            if len(codes.translate(None, dead)) < len(codes):
                new.buckets[at] = new._without(bucket, codes, dead)
        new.cursor = 0 if stop == len(new.buckets) else stop
        new._shrink(most)
        for end, code in list(new.codes.items()):
            if not new.counts[code]:
                del new.codes[end]
                new.ends[code] = 0
        return new

    def _without(self, bucket: bytes, codes: bytes, dead: bytes) -> bytes:
        for code in dead:
            gone = codes.count(code)
            self.counts[code] -= gone
            self.size -= gone
        return b"".join([bucket[RECORD * n : RECORD * (n + 1)] for n, code in enumerate(codes) if code not in dead])


def _find(bucket: bytes, needle: bytes) -> int:
    """Where the fingerprint's record begins, -1 if it has none: two records may hold its bytes across their border."""
    place = bucket.find(needle)
    while place >= 0 and place % RECORD:
        place = bucket.find(needle, place + 1)
    return place


def _parted(bucket: bytes, bit: int) -> tuple[bytes, bytes]:
    """The records that have this bit clear, and those that have it set."""
    byte, flag = bit >> 3, 1 << (bit & 7)
    records = [bucket[at : at + RECORD] for at in range(0, len(bucket), RECORD)]
    stay = b"".join([record for record in records if not record[byte] & flag])
    return stay, b"".join([record for record in records if record[byte] & flag])
