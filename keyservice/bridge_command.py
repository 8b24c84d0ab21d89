"""The command ``keyservice bridge``: options in, :class:`keyservice.bridge.BridgeSettings` out."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from .errors import SettingError

__all__ = ["bridge"]


class Kind(StrEnum):
    """What an id that stands alone is."""

    JTI = "jti"
    TOK = "tok"
    SID = "sid"
    SUB = "sub"
    CLIENT = "client"


class KeyPart(StrEnum):
    """Where in a key it says what is revoked."""

    NAME = "name"
    VALUE = "value"


def bridge(
    redis: Annotated[
        str,
        typer.Option(
            help="The older system's server, which is only read.",
            envvar="KEYSERVICE_BRIDGE_REDIS_URL",
            metavar="URL",
            show_default=False,
        ),
    ],
    channel: Annotated[
        list[str] | None, typer.Option(help="Listen to this Pub/Sub channel; may be repeated.", show_default=False)
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Scan keys of this form, such as 'blacklist:*'.", metavar="PATTERN", show_default=False),
    ] = None,
    key_part: Annotated[
        KeyPart, typer.Option(help="Where a key says what is revoked: where its name has the star, or its value.")
    ] = KeyPart.NAME,
    kind: Annotated[Kind, typer.Option(help="What an id that stands alone is.")] = Kind.JTI,
    issuer: Annotated[
        list[str] | None,
        typer.Option(
            help="The issuer of ids that come without one, '' for tokens without `iss`; may be repeated.",
            show_default="the key service's",
        ),
    ] = None,
    rescan_s: Annotated[float, typer.Option(help="Scan the keys again after this many seconds.", min=1.0)] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Scan the keys, deliver, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Turn an older system's revocation messages and keys into entries of the trust log, through the admin API.

    Pub/Sub keeps nothing: what is published while the bridge is not connected, or while the server that it listens to
    synchronises anew with its primary, is lost. Only --keys makes up for it.

    The caller needs the scope keyservice:revocations:write. Ends at SIGTERM, after sending what waits.
    """
    from .bridge import Bridge, BridgeSettings
    from .bridge_api import Caller
    from .core.bridge import Rules

    pattern = _pattern(keys)
    _check(redis, channel, keys, once, kind)
    settings = BridgeSettings(
        redis_url=redis,
        caller=Caller.from_env(os.environ),
        channels=tuple(dict.fromkeys(channel or ())),
        keys=pattern,
        by_value=key_part is KeyPart.VALUE,
        rules=Rules(kind.value, tuple(dict.fromkeys(issuer)) if issuer else (None,)),
        rescan_s=rescan_s,
        once=once,
    )

    async def run() -> None:
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await Bridge(settings, _say_json if as_json else _say_text).run(stopping)

    asyncio.run(run())


def _pattern(keys: str | None) -> Any:
    from .core.bridge import KeyPattern

    try:
        return None if keys is None else KeyPattern.parse(keys)
    except ValueError as error:
        raise SettingError("setting_invalid", f"--keys: {error}") from None


def _check(redis: str, channel: list[str] | None, keys: str | None, once: bool, kind: Kind) -> None:
    """Raises :class:`SettingError` for options that do not go together."""
    from redis.asyncio.connection import parse_url

    try:
        parse_url(redis)
    except ValueError:
        message = "--redis is not redis://host:port, rediss://host:port or unix:///path"
        raise SettingError("setting_invalid", message) from None
    if keys is None and (once or not channel):
        raise SettingError("setting_missing", "give --keys" if once else "give --channel, --keys, or both")
    if keys is not None and kind in (Kind.SUB, Kind.CLIENT):
        message = f"--kind {kind.value} with --keys: a key does not say when it was set, which a cut-off needs"
        raise SettingError("setting_invalid", message)


def _say_json(event: str, fields: dict[str, Any]) -> None:
    _write(json.dumps({"event": event, **fields}))


def _say_text(event: str, fields: dict[str, Any]) -> None:
    shown = (
        f"{name} {json.dumps(value, ensure_ascii=False)}"
        for name, value in fields.items()
        if value not in (None, [], {})
    )
    _write(f"{event.replace('_', ' ')}: {', '.join(shown)}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
