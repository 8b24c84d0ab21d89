"""What to do when a script refuses to touch the trust log. Pure.

A script refuses with one of these words, and has then changed nothing:

    TRUST_NOT_PRIMARY   the server is a replica: writes cannot go there at all
    TRUST_NO_EPOCH      no epoch or no log yet, or none any more: for the keepers to begin one, and for writers to wait
    TRUST_REPLID        the server drew a new replication id, by a restart, a promotion or its first replica: its
                        history may have forked, so the next write needs a new epoch, made by compare-and-set
    TRUST_EPOCH         somebody else has opened another epoch: read it and go on
    TRUST_REV           a record changed since it was read: decide again
    TRUST_KEEPER        another keeper of the region is alive: for the second one to stand aside
    TRUST_STATE         a key's state would move backwards: never retried

Losing the race for a new epoch is an outcome like any other: the winner's epoch is read and used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final

__all__ = ["Step", "after_refusal", "founders"]


class Step(Enum):
    """What the writer does next."""

    BUMP = "bump"
    WAIT = "wait"
    REREAD = "reread"
    UNREACHABLE = "unreachable"
    GIVE_UP = "give_up"


_STEPS: Final = {
    "TRUST_REPLID": Step.BUMP,
    "TRUST_NO_EPOCH": Step.WAIT,
    "TRUST_EPOCH": Step.REREAD,
    "TRUST_NOT_PRIMARY": Step.UNREACHABLE,
}


def after_refusal(code: str) -> Step:
    """The next step after a script refused with ``code``."""
    return _STEPS.get(code, Step.GIVE_UP)


def founders(
    region: str, regions: Sequence[str], bootstrap_region: str | None, registered: Mapping[str, str]
) -> dict[str, str] | None:
    """The voters of the very first epoch, by region, if this region may open it now; None if not.

    One region is named to do it (a single one need not be), and only once every seat has a keeper that holds nothing:
    a keeper that holds anything has a log to bring back, and brings it back itself.
    """
    if region != (bootstrap_region if bootstrap_region is not None or len(regions) > 1 else region):
        return None
    return {name: registered[name] for name in regions} if set(regions) <= registered.keys() else None
