"""The verified-token cache: a bounded map from a token's text to what steps 1-5 said of it.

Two generations instead of an LRU list: a hit moves nothing and takes no lock, a token used since the last turn-over
survives the next one, and the size stays bounded. Only tokens that verified are kept, so a flood of forged ones
evicts nothing. Whether a kept result still holds is the caller's to decide at every hit (:mod:`verifier.verifier`).
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")

__all__ = ["TokenCache"]


class TokenCache(Generic[T]):
    """At most ``size`` entries; ``size`` 0 keeps nothing."""

    __slots__ = ("_half", "_keeps_old", "_old", "get", "young")

    def __init__(self, size: int) -> None:
        self._half = size // 2 or size
        self._keeps_old = size > 1
        self._old: dict[str, T] = {}
        self._reset({})

    def _reset(self, young: dict[str, T]) -> None:
        self.young = young
        self.get = young.get  # bound once: the hot path makes one call

    def find(self, token: str) -> T | None:
        """The entry of either generation; one of the older moves to the younger."""
        entry = self.young.get(token)
        if entry is None:
            entry = self._old.get(token)
            if entry is not None:
                self.put(token, entry)
        return entry

    def put(self, token: str, entry: T) -> None:
        """Keep an entry; the older generation goes when the younger one is full."""
        if self._half == 0:
            return
        if len(self.young) >= self._half:
            self._old = self.young if self._keeps_old else {}
            self._reset({})
        self.young[token] = entry

    def clear(self) -> None:
        """Forget everything."""
        self._old = {}
        self._reset({})

    def __len__(self) -> int:
        return len(self.young) + len(self._old)
