"""``keyservice clients``: clients of a running key service, and hashes for the clients file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from .admin_client import call_admin
from .errors import SettingError

__all__ = ["clients"]

clients = typer.Typer(no_args_is_help=True, help="Clients: who gets tokens, and proves itself by what.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@clients.command("hash")
def hash_secret(
    secret: Annotated[
        str | None, typer.Argument(help="The secret; standard input if absent.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the Argon2id hash that belongs into the clients file."""
    from .clients import hash_secret as make

    text = secret if secret is not None else sys.stdin.readline().rstrip("\n")
    if not text:
        raise SettingError("secret_missing", "give a secret as an argument or on standard input")
    hashed = make(text)
    print(json.dumps({"secret_hash": hashed}) if as_json else hashed)


@clients.command("list")
def list_clients(as_json: Json = False) -> None:
    """Every client of the file and of the admin API."""
    answer = call_admin("GET", "/admin/clients")
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("client", "from", "proves itself by", "tokens", "audiences", "scopes", "introspects")
    for client in answer["clients"]:
        proofs = [name for name, has in (("secret", client["has_secret"]), ("keys", client["jwks"])) if has]
        told = (" ".join(client["audiences"]), " ".join(client["scopes"]), "yes" if client["introspect"] else "")
        table.add_row(client["client_id"], client["source"], ", ".join(proofs), client["token_alg"], *told)
    Console().print(table)


@clients.command("add")
def add(
    client_id: Annotated[str | None, typer.Argument(help="Its id; one is made if absent.", show_default=False)] = None,
    audience: Annotated[
        list[str] | None, typer.Option(help="May have tokens for this; give it again for more.")
    ] = None,
    scope: Annotated[list[str] | None, typer.Option(help="May have this scope; give it again for more.")] = None,
    jwks: Annotated[
        Path | None, typer.Option(help="A file with its public keys (a JWK set): then it has no secret.")
    ] = None,
    token_alg: Annotated[str, typer.Option(help="RS256, or HS256 for a client that cannot read RS256 yet.")] = "RS256",
    introspect: Annotated[bool, typer.Option("--introspect", help="May ask /oauth2/introspect.")] = False,
    as_json: Json = False,
) -> None:
    """Make a client, and show its secret: this once, never again."""
    body: dict[str, Any] = {
        "audiences": audience or [],
        "scopes": scope or [],
        "token_alg": token_alg,
        "introspect": introspect,
    }
    if client_id is not None:
        body["client_id"] = client_id
    if jwks is not None:
        body["jwks"] = _read_jwks(jwks)
    answer = call_admin("POST", "/admin/clients", body)
    if as_json:
        print(json.dumps(answer))
        return
    print(f"client_id      {answer['client_id']}")
    if "client_secret" in answer:
        print(f"client_secret  {answer['client_secret']}")


def _read_jwks(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise SettingError("jwks_invalid", f"{path}: {error.strerror or 'cannot be read'}") from None
    except ValueError:
        raise SettingError("jwks_invalid", f"{path} is not JSON") from None


@clients.command("remove")
def remove(client_id: Annotated[str, typer.Argument(help="Its id.")], as_json: Json = False) -> None:
    """Delete a client; tokens that it has run out, or are revoked by kind client."""
    answer = call_admin("DELETE", f"/admin/clients/{quote(client_id, safe='')}")
    print(json.dumps(answer) if as_json else f"{answer['client_id']} is deleted")
