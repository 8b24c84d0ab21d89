"""The command ``keyservice``.

``serve`` runs the service. ``keys``, ``clients``, ``keepers`` and ``bridge`` talk to a running one over its admin API
(:mod:`keyservice.admin_client`).

Exit codes: 0 done · 2 wrong usage or setting · 4 could not run. Errors are one line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from .bridge_command import bridge
from .cli_clients import clients
from .cli_keepers import keepers
from .cli_keys import keys
from .errors import EXIT_CANNOT_RUN, EXIT_USAGE, KeyserviceError, SettingError

__all__ = ["main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(keys, name="keys")
app.add_typer(clients, name="clients")
app.add_typer(keepers, name="keepers")
app.command()(bridge)

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
