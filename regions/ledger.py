"""What a harness did and was told: tokens, revocations with their receipts, faults, requests. Data for `checkers`.

Times are CLOCK_MONOTONIC in seconds (`_mono`; one clock for all processes of a machine) or Unix seconds (`_wall`,
`expires_at`). A harness notes a sending *before* it sends and an answer *after* it came, so that nothing is accused of
being late for what it could not know yet.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

__all__ = ["Durability", "Fault", "Ledger", "Request", "Revocation", "Token"]

Durability = Literal["pending", "replicated"]


class Token(msgspec.Struct, frozen=True):
    """A token that is valid until it expires or is revoked; `name` is what recorders know it by."""

    name: str
    expires_at: float


class Revocation(msgspec.Struct, kw_only=True):
    """One revocation of a harness: what it hits, and what its receipts said.

    `acknowledged_mono` is when the first receipt came, with this `durability`; `replicated_mono` when the first one
    came that said *replicated*, there or later. Without a receipt the outcome is open, and `problem` says why.
    """

    id: str
    tokens: tuple[str, ...]
    region: str
    sent_mono: float
    sent_wall: float
    acknowledged_mono: float | None = None
    durability: Durability | None = None
    position: str | None = None
    replicated_mono: float | None = None
    appended_wall: float | None = None
    """The primary's time of the append."""
    problem: str | None = None

    def acknowledge(self, durability: Durability, position: str | None, mono: float) -> None:
        """A receipt came at `mono`: the first one, or one that says more."""
        if self.acknowledged_mono is None:
            self.acknowledged_mono, self.durability, self.position = mono, durability, position
        if durability == "replicated" and self.replicated_mono is None:
            self.replicated_mono = mono

    def counted_mono(self, counted: Collection[Durability]) -> float | None:
        """Since when it counts as acknowledged, if receipts of the durabilities `counted` do; None if it does not."""
        if "pending" in counted and self.acknowledged_mono is not None:
            return self.acknowledged_mono
        return self.replicated_mono if "replicated" in counted else None


class Fault(msgspec.Struct, kw_only=True):
    """Something broken on purpose, from `began_mono` to `ended_mono` (None: it lasts)."""

    kind: str
    target: str
    began_mono: float
    ended_mono: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a service with a token. `status` is HTTP's, or None where no answer came."""

    token: str
    region: str
    sent_mono: float
    answered_mono: float
    answered_wall: float
    status: int | None


class Ledger:
    """Everything of one scenario. `settled_mono` is when all faults were over and verdicts had to be right again."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.revocations: list[Revocation] = []
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.settled_mono: float | None = None

    def add_token(self, token: Token) -> None:
        """Names are unique: a checker that mixes two tokens up accuses nobody in particular."""
        if token.name in self.tokens:
            raise ValueError(f"two tokens are called {token.name}")
        self.tokens[token.name] = token

    def revoked_from(self) -> dict[str, float]:
        """By token: when the first revocation that hits it was sent (monotonic), whatever became of that."""
        first: dict[str, float] = {}
        for revocation in self.revocations:
            for name in revocation.tokens:
                first[name] = min(first.get(name, revocation.sent_mono), revocation.sent_mono)
        return first

    def counted(self, counted: Collection[Durability]) -> list[tuple[Revocation, float]]:
        """The revocations that count as acknowledged, and since when."""
        return [(each, since) for each in self.revocations if (since := each.counted_mono(counted)) is not None]
