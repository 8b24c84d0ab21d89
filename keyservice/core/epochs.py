"""What to do when a script refuses to touch the trust log. Pure.

A script refuses with one of these words, and has then changed nothing:

    TRUST_NOT_PRIMARY   the server is a replica: writes cannot go there at all
    TRUST_NO_EPOCH      no epoch yet: the bootstrap region opens the first, the others wait
    TRUST_REPLID        the server drew a new replication id, by a restart, a promotion or its first replica: its
                        history may have forked, so the next write needs a new epoch, made by compare-and-set
    TRUST_EPOCH         somebody else has opened another epoch: read it and go on
    TRUST_REV           a record changed since it was read: decide again
    TRUST_STATE         a key's state would move backwards: never retried

Losing the race for a new epoch is an outcome like any other: the winner's epoch is read and used.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["Step", "after_refusal", "bootstraps"]


class Step(Enum):
    """What the writer does next."""

    BUMP = "bump"
    REREAD = "reread"
    UNREACHABLE = "unreachable"
    GIVE_UP = "give_up"


_STEPS: Final = {
    "TRUST_REPLID": Step.BUMP,
    "TRUST_NO_EPOCH": Step.BUMP,
    "TRUST_EPOCH": Step.REREAD,
    "TRUST_NOT_PRIMARY": Step.UNREACHABLE,
}


def after_refusal(code: str) -> Step:
    """The next step after a script refused with ``code``."""
    return _STEPS.get(code, Step.GIVE_UP)


def bootstraps(region: str, regions: tuple[str, ...], bootstrap_region: str | None) -> bool:
    """Whether this region may start the trust log on a server that has none."""
    return region == bootstrap_region if bootstrap_region is not None else regions == (region,)
