"""Whose clock is wrong, where a region's and the primary's differ. Pure.

One region that differs from the primary takes its own clock for the wrong one. Where a majority of regions, and two at
least, see the primary off alike, it is the primary's: in the same direction, and as far as right clocks agree. A clock
that is years off finds no support in one that is off by seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

__all__ = ["SIGHTING_DOUBT_S", "SIGHTING_MAX_AGE_S", "primary_is_off"]

SIGHTING_MAX_AGE_S: Final = 10.0
"""A sighting older than this says nothing; each region renews its own every second while the clocks differ."""


SIGHTING_DOUBT_S: Final = 1.0
"""By so much a sighting may fall short: it is the least that the clocks can differ by, and an exchange takes time."""


def primary_is_off(own_s: float, sightings: Mapping[str, float], regions: Collection[str], max_skew_s: float) -> bool:
    """Whether a majority of ``regions`` see the primary off as this one does.

    ``own_s`` is this region's clock minus the primary's, in seconds; ``sightings`` are those of all regions, this one
    included, each not older than :data:`SIGHTING_MAX_AGE_S`.
    """
    alike_s = 2 * max_skew_s + SIGHTING_DOUBT_S
    seen = [skew_s for region, skew_s in sightings.items() if region in regions and abs(skew_s) > max_skew_s]
    alike = sum(skew_s * own_s > 0 and abs(skew_s - own_s) <= alike_s for skew_s in seen)
    return alike >= max(2, len(regions) // 2 + 1)
