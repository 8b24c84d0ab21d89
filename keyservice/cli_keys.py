"""``keyservice keys``: signing keys of a running key service, over its admin API."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import quote

import typer

from .admin_client import call_admin
from .errors import SettingError

__all__ = ["keys"]

keys = typer.Typer(no_args_is_help=True, help="Signing keys of a running key service.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """Every region's keys and their states."""
    answer = call_admin("GET", "/admin/keys")
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "region", "kid", "state", "published", "active", "retiring", title=f"generation {answer['generation']}"
    )
    for key in answer["keys"]:
        times = (_utc(key[name]) for name in ("published_at", "active_at", "retiring_at"))
        table.add_row(key["region"], key["kid"], key["state"], *times)
    Console().print(table)


@keys.command("rotate")
def rotate_keys(as_json: Json = False) -> None:
    """Replace the region's active key as soon as the publish lead allows."""
    answer = call_admin("POST", "/admin/keys/rotate")
    if as_json:
        print(json.dumps(answer))
    elif answer["active"] != answer["replaced"]:
        print(f"{answer['region']}: {answer['active']} signs now; {answer['replaced']} only verifies")
    elif answer["waiting_for"]:
        print(f"{answer['region']}: a successor of {answer['replaced']} waits for {', '.join(answer['waiting_for'])}")
    else:
        print(f"{answer['region']}: a successor of {answer['replaced']} signs from {_utc(answer['activates_at'])}")
    if not as_json and answer["excused"]:
        print(f"not waited for, cut off for longer than the partition budget: {', '.join(answer['excused'])}")


@keys.command("activate")
def activate_key(as_json: Json = False) -> None:
    """Let the region's next key sign now; refused while that would be too early for somebody."""
    answer = call_admin("POST", "/admin/keys/activate")
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{answer['region']}: {answer['active']} signs now; {answer['replaced']} only verifies")


@keys.command("compromise")
def compromise_key(
    kid: Annotated[str | None, typer.Argument(help="The key, of any region.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every key of the region that is asked.")] = False,
    reason: Annotated[str, typer.Option(help="For the record.")] = "compromised",
    as_json: Json = False,
) -> None:
    """Take a key out of use for good, everywhere, and say for how long it was still accepted where."""
    if (kid is None) is not everything:
        raise SettingError("kid_missing", "name one kid, or say --all")
    body = {"reason": reason} if kid is not None else {"all": True, "reason": reason}
    path = "/admin/keys/compromise" if kid is None else f"/admin/keys/{quote(kid, safe='')}/compromise"
    answer = call_admin("POST", path, body)
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("region", "refused after", "served no more after", title=f"compromised: {', '.join(answer['kids'])}")
    for region, seen in answer["exposure"].items():
        bound = "" if seen["unknown_at_most_s"] is None else f"unknown, at most {seen['unknown_at_most_s']:g} s"
        columns = (seen["refused_after_ms"], seen["unpublished_after_ms"])
        table.add_row(region, *(bound if column is None else f"{column} ms" for column in columns))
    Console().print(table)
    others = answer["third_party_clients"]
    print(f"other clients of the key set accept it for up to {others['caching_at_most_s']} s, their cache time")


def _utc(seconds: int | None) -> str:
    from datetime import UTC, datetime

    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
