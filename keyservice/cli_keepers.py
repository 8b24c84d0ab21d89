"""``keyservice keepers``: what every region's keeper reports, and who has a seat."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .admin_client import call_admin

__all__ = ["keepers"]

keepers = typer.Typer(no_args_is_help=True, help="Keepers of a running key service, and the seats they vote from.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Region = Annotated[str, typer.Argument(help="The region whose seat it is.")]
KeeperId = Annotated[
    str | None, typer.Argument(help="The keeper; if absent the one that reports in the region.", show_default=False)
]


@keepers.command("list")
def list_keepers(as_json: Json = False) -> None:
    """Every region: who has its seat, who reports, and how far its disk holds the log."""
    answer = call_admin("GET", "/admin/regions")
    if as_json:
        print(json.dumps(answer))
        return
    epoch = answer["epoch"]
    if epoch is None:
        print("there is no trust log yet: it begins once every region's keeper runs")
        return
    state = "open" if epoch["open"] else f"closed, {max(answer['missing_to_open'], default=0)} more keepers must merge"
    rows = [("region", "keeper", "seat", "merged", "holds", "reported")]
    rows += [(region, *_row(report)) for region, report in answer["regions"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"epoch {epoch['number']}: {state}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"a majority of {answer['majority']} holds the log up to {answer['replicated_to'] or 'nothing yet'}")


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    seat, keeper = report["seat"], report["keeper_id"]
    if keeper is None:
        return (seat or "nobody", "vacant" if seat == "" else "yes" if seat else "none", "does not report", "", "")
    held = str(report["held"]).partition(".")[0]
    has = "yes" if report["voter"] else "vacant" if seat == "" else f"of {seat}" if seat else "none"
    return (keeper, has, "yes" if report["merged"] else "no", held, f"{report['age_ms'] / 1000:.1f} s ago")


def _change(verb: str, as_json: bool, **body: object) -> None:
    answer = call_admin("POST", f"/admin/keepers/{verb}", {k: v for k, v in body.items() if v is not None})
    if as_json:
        print(json.dumps(answer))
        return
    seats = ", ".join(f"{region}: {seat or 'vacant'}" for region, seat in answer["voters"].items())
    print(f"a new epoch begins with these seats: {seats}")
    if answer["at_risk"]:
        print(f"accepted: {answer['at_risk']}")


@keepers.command("add")
def add(region: Region, keeper_id: KeeperId = None, as_json: Json = False) -> None:
    """Give a new region's keeper a seat."""
    _change("add", as_json, region=region, keeper_id=keeper_id)


@keepers.command("remove")
def remove(region: Region, as_json: Json = False) -> None:
    """Take a region's seat away; a majority of the others then decides."""
    _change("remove", as_json, region=region)


@keepers.command("replace")
def replace(region: Region, keeper_id: KeeperId = None, as_json: Json = False) -> None:
    """Give a region's seat to another keeper, for instance after its disk was lost."""
    _change("replace", as_json, region=region, keeper_id=keeper_id)


@keepers.command("forget")
def forget(
    keeper_id: Annotated[str, typer.Argument(help="The keeper that will never come back.")],
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on though what only such keepers held is lost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Give a keeper up for good, when too many are gone for any epoch to open."""
    _change("forget", as_json, keeper_id=keeper_id, accept_loss=accept_loss)
