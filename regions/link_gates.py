"""Which public addresses are closed, and which regions are cut off as a whole. Pure; `regions.link` acts on it.

* A **closed** address refuses callers, as if nobody listened: a server that returns stays behind one until it follows
  the primary.
* An **isolated** region has lost its machines: whatever it sent or is sent vanishes, without an end or a reset, and a
  new connection hangs. When it is back its old connections are reset, because the machine does not know them any more:
  also those that lost nothing, unlike after a cut (`regions.link_rules`).

Gates belong to deaths and returns, not to the links: no fault of a link, and no healing, changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from regions.errors import LinkRefused
from regions.link_rules import LinkConfig

__all__ = ["Gates", "Passage"]


class Passage(Enum):
    """What becomes of a connection."""

    OPEN = "open"
    REFUSED = "refused"
    SILENT = "silent"


@dataclass(slots=True)
class Gates:
    """The gates of one link proxy. Changing one that does not exist raises `LinkRefused` (404)."""

    config: LinkConfig
    closed: set[tuple[str, int]] = field(default_factory=set)
    isolated: set[str] = field(default_factory=set)

    def set_closed(self, region: str, port: int, closed: bool) -> None:
        known = {(listener.region, listener.port) for listener in self.config.listeners}
        if (region, port) not in known:
            raise LinkRefused(f"nothing listens on port {port} of region {region!r}", 404)
        (self.closed.add if closed else self.closed.discard)((region, port))

    def set_isolated(self, region: str, isolated: bool) -> None:
        if region not in self.config.regions:
            raise LinkRefused(f"no region {region!r}; the regions are: {', '.join(self.config.regions)}", 404)
        (self.isolated.add if isolated else self.isolated.discard)(region)

    def passage(self, caller: str, target: str, port: int) -> Passage:
        """What becomes of a connection from region `caller` to `port` of region `target`."""
        if caller != target and {caller, target} & self.isolated:
            return Passage.SILENT
        return Passage.REFUSED if (target, port) in self.closed else Passage.OPEN
