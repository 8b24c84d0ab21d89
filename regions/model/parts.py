"""What a world of the model is made of: exchangeable parts, regions, and what is on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

from keyservice.core.evidence import EpochKey, Protocol
from keyservice.core.keepers import Keeper, MemoryDisk, Step
from regions.model.server import Server
from regions.model.tails import KeeperTail, SimVerifier
from verifier.log import Entry

__all__ = ["Acknowledged", "InFlight", "Parts", "Region"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a world is made of; a mutant has another one of them."""

    protocol: type[Protocol] = Protocol
    keeper: type[Keeper] = Keeper
    disk: type[MemoryDisk] = MemoryDisk
    verifier: type[SimVerifier] = SimVerifier
    server: type[Server] = Server
    tail: type[KeeperTail] = KeeperTail


@dataclass(frozen=True, slots=True)
class InFlight:
    """A keeper's step on its way to a server. It may arrive after the keeper that sent it has died or read on."""

    step: Step
    server: str
    keeper: Keeper


@dataclass(slots=True)
class Region:
    """What one region runs. `primary` is whom its writer and keeper take for the primary, right or wrong."""

    name: str
    server: Server
    tail: KeeperTail
    verifier: SimVerifier
    primary: str
    keeper_up: bool = True
    identified: bool = False
    seen: EpochKey | None = None
    pending: list[Entry] = field(default_factory=list)
    unsent: list[Entry] = field(default_factory=list)
    in_flight: list[InFlight] = field(default_factory=list)
    copies: list[MemoryDisk] = field(default_factory=list)
    wall_ms_min: int = 0

    @property
    def keeper(self) -> Keeper:
        """The region's keeper."""
        return self.tail.keeper

    @property
    def disk(self) -> MemoryDisk:
        """Its disk."""
        disk = self.tail.keeper.disk
        assert isinstance(disk, MemoryDisk)
        return disk


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An entry that was acknowledged `replicated`, and when."""

    entry: Entry
    at_ms: int
