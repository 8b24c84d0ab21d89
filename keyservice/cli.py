"""The command ``keyservice``.

``serve`` runs the service. ``keys`` talks to a running one over its admin API, as a client named in the environment
(``KEYSERVICE_ADMIN_URL``, ``KEYSERVICE_TOKEN_URL``, ``KEYSERVICE_CLIENT_ID``, ``KEYSERVICE_CLIENT_SECRET``).

Exit codes: 0 done · 2 wrong usage or setting · 4 could not run. Errors are one line on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from .errors import EXIT_CANNOT_RUN, EXIT_USAGE, KeyserviceError, SettingError, StartError

__all__ = ["main"]

HTTP_TIMEOUT_S = 10.0

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys = typer.Typer(no_args_is_help=True, help="Signing keys of a running key service.")
clients = typer.Typer(no_args_is_help=True, help="The clients file.")
app.add_typer(keys, name="keys")
app.add_typer(clients, name="clients")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class Role(StrEnum):
    """What a process does."""

    ALL = "all"
    API = "api"
    KEEPER = "keeper"


@app.callback()
def _root() -> None:
    """Signs access tokens, publishes the public keys, writes revocations."""


@app.command()
def serve(
    role: Annotated[
        Role | None,
        typer.Option(help="What this process does: everything, or without the region's keeper, or only that."),
    ] = None,
) -> None:
    """Run the key service; settings are KEYSERVICE_<NAME> in the environment."""
    from .serve import serve as run
    from .settings import load_settings
    from .telemetry import configure_logging

    settings = load_settings() if role is None else load_settings(role=role.value)
    configure_logging(settings.log_level, settings.log_format)
    run(settings)


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


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """Every region's keys and their states."""
    answer = _admin("GET", "/admin/keys")
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
    answer = _admin("POST", "/admin/keys/rotate")
    if as_json:
        print(json.dumps(answer))
    elif answer["activates_at"] is None:
        print(f"{answer['region']}: {answer['active']} signs now; {answer['replaced']} only verifies")
    else:
        print(f"{answer['region']}: a successor of {answer['replaced']} signs from {_utc(answer['activates_at'])}")


def _utc(seconds: int | None) -> str:
    from datetime import UTC, datetime

    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise SettingError("setting_missing", f"{name} is not set")
    return value


def _admin(method: str, path: str) -> Any:
    """One call of the admin API with a token of our own; raises :class:`StartError` with the server's code."""
    import httpx

    token_url, admin_url = _environment("KEYSERVICE_TOKEN_URL"), _environment("KEYSERVICE_ADMIN_URL").rstrip("/")
    credentials = (_environment("KEYSERVICE_CLIENT_ID"), _environment("KEYSERVICE_CLIENT_SECRET"))
    form = {"grant_type": "client_credentials"}
    if os.environ.get("KEYSERVICE_ISSUER"):
        form["audience"] = f"{os.environ['KEYSERVICE_ISSUER'].rstrip('/')}/admin"
    try:
        with httpx.Client(timeout=HTTP_TIMEOUT_S, trust_env=False) as http:
            token = _answer(http.post(token_url, data=form, auth=credentials))["access_token"]
            return _answer(http.request(method, admin_url + path, headers={"Authorization": f"Bearer {token}"}))
    except httpx.InvalidURL:
        raise SettingError("setting_invalid", "KEYSERVICE_TOKEN_URL or KEYSERVICE_ADMIN_URL is not a URL") from None
    except httpx.HTTPError as error:
        message = f"no answer from KEYSERVICE_TOKEN_URL or KEYSERVICE_ADMIN_URL: {type(error).__name__}"
        raise StartError("keyservice_unreachable", message) from None


def _answer(response: Any) -> Any:
    try:
        body = response.json()
    except ValueError:
        body = {}
    if response.is_success and isinstance(body, dict):
        return body
    code = body.get("code") or body.get("error") or f"http_{response.status_code}"
    detail = body.get("detail") or body.get("error_description") or "the key service refused"
    raise StartError(str(code), str(detail))


def run(command: Callable[[], Any]) -> int:
    """Run a command; its exit code. Errors of ours become one line."""
    try:
        command()
    except SettingError as error:
        return _complain(error, EXIT_USAGE)
    except KeyserviceError as error:
        return _complain(error, EXIT_CANNOT_RUN)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def _complain(error: KeyserviceError, exit_code: int) -> int:
    line = " ".join(str(error).split())
    print(f"keyservice: error [{error.code}]: {line}", file=sys.stderr)
    return exit_code


def main() -> None:
    """The console command."""
    sys.exit(run(app))
