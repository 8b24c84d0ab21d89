"""Whose clock is wrong, where a region's and the primary's differ. Pure.

One region that differs from the primary takes its own clock for the wrong one. Where a majority of regions, and two at
least, see the primary off in the same direction, it is the primary's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

__all__ = ["SIGHTING_MAX_AGE_S", "primary_is_off"]

SIGHTING_MAX_AGE_S: Final = 10.0
"""A sighting older than this says nothing; each region renews its own every second while the clocks differ."""


def primary_is_off(sightings: Mapping[str, float], regions: Collection[str], max_skew_s: float) -> bool:
    """Whether a majority of ``regions`` see the primary off the same way.

    ``sightings`` are the regions' clocks minus the primary's, in seconds, each not older than
    :data:`SIGHTING_MAX_AGE_S`.
    """
    skews = [skew_s for region, skew_s in sightings.items() if region in regions]
    needed = max(2, len(regions) // 2 + 1)
    return sum(s > max_skew_s for s in skews) >= needed or sum(s < -max_skew_s for s in skews) >= needed
