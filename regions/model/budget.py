"""What P2 promises where disks are lost, as a rule that says when one more may go.

*A voter set counts* from the moment that its epoch began until a later epoch has opened, and this and everything
acknowledged before is replicated in that one: which is what `GET /admin/revocations` shows. Voters that were chosen
before those of such an epoch count no more, whenever their epoch began. *Of every voter set that counts at most a
minority may be lost*: keepers whose disk is gone, or was put back from a copy, and vacant seats. Then nothing that was
acknowledged is lost, and a new epoch can always open. A keeper with no seat in a set that counts may always go.

An entry counts as acknowledged from the moment that the evidence for it is complete, whether or not anybody has been
told: a receipt may be read later, and from a server that everybody else has left behind.

Which epoch *carries* an entry follows from what may still be lost: with R seats, a majority of m, and f of them lost,
R - m - f more may go, so it takes one holder more than that among the voters that are left. In an epoch in which the
entry was acknowledged this is so by itself. In a later one it is not: the one keeper that added the entry may be the
only one that has it, even after the epoch has opened. That an epoch has opened is knowledge of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from keyservice.core.evidence import EpochKey, Protocol, chosen_in, majority
from regions.model.server import Data
from verifier.log import Entry, EpochLink

if TYPE_CHECKING:
    from keyservice.core.keepers import MemoryDisk

__all__ = ["Budget"]


class Budget:
    """What was acknowledged, which epochs began and opened, and whose disks are gone: seen from outside, all of it."""

    def __init__(self) -> None:
        self.owed: dict[bytes, Entry] = {}
        self.begun: dict[EpochKey, EpochLink] = {}
        self.opened: dict[EpochKey, EpochLink] = {}
        self._rules = Protocol()
        self._reached: dict[str, tuple[int, int]] = {}

    def see(self, data: Data) -> None:
        """A report was put in place, or the epoch opened: for some entries the evidence may be complete now."""
        epoch = data.epoch
        if epoch is None or not epoch.open:
            return
        seats = set(self._rules.voters(epoch).values()) - {""}
        counted = [r for r in data.reports.values() if self._rules.counts(r, epoch) and r.keeper_id in seats]
        needed = majority(self._rules.voters(epoch))
        if len(counted) < needed:
            return
        held = sorted((tuple(map(int, r.held.split("-"))) for r in counted), reverse=True)[needed - 1]
        before = self._reached.get(epoch.nonce, (0, 0))
        if held > before:
            self._reached[epoch.nonce] = (held[0], held[1])
            new = (e for position, e in data.log if before < position[:2] <= held and e.kind == "jti")
            self.owed.update((entry.digest(), entry) for entry in new)

    def may_lose(self, keeper_id: str, disks: Mapping[str, MemoryDisk]) -> bool:
        """Whether this keeper's disk may be lost now. `disks` are all that are left, by keeper id."""
        base = self.base(disks)
        if base is None:
            return False
        chosen = chosen_in(self.opened[base])
        since = [link for key, link in self.begun.items() if key >= base and chosen_in(link) >= chosen]
        counting = [link for link in since if _filled(link) >= majority(link.voters)]
        return all(
            keeper_id not in link.voters.values() or self._left(link, disks) - 1 >= majority(link.voters)
            for link in counting
        )

    def base(self, disks: Mapping[str, MemoryDisk]) -> EpochKey | None:
        """The newest opened epoch from which on every acknowledged entry is carried; None if there is none."""
        owed = set(self.owed)
        for key in sorted(self.opened, reverse=True):
            link = self.opened[key]
            voters = [disks[keeper_id] for keeper_id in link.voters.values() if keeper_id in disks]
            enough = self.holders_needed(link, disks)
            owed -= {d for d in owed if sum(d in disk.entries for disk in voters) >= enough}
            known = sum(key in disk.links and disk.links[key].opened for disk in voters)
            if not owed and known >= enough:
                return key
        return None

    def is_owed_still(self, digest: bytes, base: EpochKey, disks: Mapping[str, MemoryDisk]) -> bool:
        """Whether so many of the voters that are left hold it that no epoch opens without one of them.

        With fewer left than a majority every one of them has to merge, once the others are forgotten.
        """
        link = self.begun[base]
        return sum(digest in disks[k].entries for k in link.voters.values() if k in disks) >= self.holders_needed(
            link, disks
        )

    def holders_needed(self, link: EpochLink, disks: Mapping[str, MemoryDisk]) -> int:
        """How many of the voters that are left must hold an entry, so that one does whoever else is lost."""
        return max(self._left(link, disks) - majority(link.voters), 0) + 1

    def is_carried(self, entry: Entry, disks: Mapping[str, MemoryDisk]) -> bool:
        """Whether the newest epoch that opened carries this entry."""
        link = self.opened[max(self.opened)]
        held = sum(entry.digest() in disks[k].entries for k in link.voters.values() if k in disks)
        return held >= self.holders_needed(link, disks)

    def _left(self, link: EpochLink, disks: Iterable[str]) -> int:
        return len({keeper_id for keeper_id in link.voters.values() if keeper_id} & set(disks))


def _filled(link: EpochLink) -> int:
    return sum(bool(keeper_id) for keeper_id in link.voters.values())
