"""Who has a seat: what an operator may change about the voters, and what that puts at risk. Pure.

Every change is a new epoch with other voters. It opens only with majorities of the new voters and of every voter set
since the newest epoch that opened, so no change by itself loses anything. Giving up keepers for good (``forget``) is
the exception, for when a majority of a voter set is gone and nothing would ever open again: what only the forgotten
keepers held is lost, which is why it has to be accepted aloud.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from keyservice.errors import RequestRefused
from verifier.log import Epoch

from .evidence import Protocol, Report, Voters

__all__ = ["Change", "Verb", "change_voters"]

Verb = Literal["add", "remove", "replace", "forget"]


@dataclass(frozen=True, slots=True)
class Change:
    """The voters of the epoch to begin, the keepers given up with it, and what may be lost by that (None: nothing)."""

    voters: dict[str, str]
    forgotten: tuple[str, ...] = ()
    at_risk: str | None = None


def change_voters(
    verb: Verb,
    epoch: Epoch,
    reports: Mapping[str, Report],
    *,
    region: str | None = None,
    keeper_id: str | None = None,
    accept_loss: bool = False,
) -> Change:
    """Raises :class:`RequestRefused` naming what is wrong.

    ``keeper_id`` may be left out where the region's keeper reports: it is that one.
    """
    voters = dict(Protocol().voters(epoch))
    if verb == "forget":
        return _forget(epoch, voters, keeper_id, accept_loss)
    if region is None:
        raise RequestRefused("region_missing", "name the region")
    if verb == "add" and region in voters:
        raise RequestRefused("seat_taken", f"{region} has a seat already: replace its keeper instead", status=409)
    if verb != "add" and region not in voters:
        raise RequestRefused("seat_unknown", f"{region} has no seat; those with one: {', '.join(voters)}", status=404)
    if verb == "remove":
        del voters[region]
        if not voters:
            raise RequestRefused("last_seat", "the last seat cannot be removed", status=409)
        return Change(voters)
    voters[region] = _named(region, keeper_id, voters, reports)
    return Change(voters)


def _named(region: str, keeper_id: str | None, voters: Voters, reports: Mapping[str, Report]) -> str:
    reporting = reports[region].keeper_id if region in reports else None
    chosen = keeper_id or reporting
    if chosen is None:
        message = f"no keeper of {region} reports: start it, or name its id"
        raise RequestRefused("keeper_unknown", message, status=409)
    if chosen in voters.values():
        raise RequestRefused("keeper_seated", f"keeper {chosen} has a seat already", status=409)
    return chosen


def _forget(epoch: Epoch, voters: dict[str, str], keeper_id: str | None, accept_loss: bool) -> Change:
    seats = [seat for link in (*epoch.known, *epoch.chain) for seat in link.voters.values()]
    if not keeper_id or keeper_id not in seats:
        raise RequestRefused("keeper_unknown", "name the id of a keeper that has or had a seat", status=404)
    at_risk = (
        f"every revocation that was acknowledged by a majority of which only {keeper_id} and other forgotten keepers "
        "are still missing may be lost: revoke again what must not come back"
    )
    if not accept_loss:
        raise RequestRefused("loss_not_accepted", f"{at_risk}; repeat with accept_loss", status=409)
    return Change({r: "" if seat == keeper_id else seat for r, seat in voters.items()}, (keeper_id,), at_risk)
