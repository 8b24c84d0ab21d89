"""``python -m verifier check TOKEN``: each step's verdict about a token, for a person or, with ``--json``, a program.

Exit codes: 0 accepted · 1 refused · 2 wrong usage or setting · 3 undecidable (keys or revocations are not at hand).

Nothing here repeats an argument, a token or a secret, on whichever stream: what was mistaken for another argument may
be one. Claims are shown when asked for, and labelled when nothing vouches for them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from .check import Explanation, StepVerdict
from .errors import CODES, ConfigurationError
from .limits import TOKEN_CHARS_MAX
from .settings import invalid, seconds
from .status import Status
from .verifier import Verifier

EXIT_CODES: Final = {"accepted": 0, "refused": 1, "undecidable": 3}
USAGE: Final = 2
WAIT_S_MAX: Final = 3_600.0
"""Who waits longer than an hour for an answer in a terminal has mistyped."""

_SIGNS: Final = {"passed": "✓", "refused": "✗", "not judged": "–"}
_PLAIN_SIGNS: Final = {"passed": "+", "refused": "x", "not judged": "-"}
_SAFE: Final = re.compile(r"the following arguments are required: .*|argument [^:]*: expected one argument")
_ARGUMENT: Final = re.compile(r"argument [A-Za-z-]+(?=: )")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse repeats what it does not understand, and that may be the token."""
        if not _SAFE.fullmatch(message):
            named = _ARGUMENT.match(message)
            message = f"{named[0] if named else 'the arguments'}: not understood, see --help"
        super().error(message)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m verifier", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="say why a token is accepted or refused",
        allow_abbrev=False,
        description="Say, step by step, why a token is accepted or refused. A token in a command line can be read by "
        "everybody on the machine: prefer - (standard input) or @FILE.",
        epilog="Credentials come from the environment: REDIS_USERNAME and REDIS_PASSWORD; VERIFIER_FEED_TOKEN, or "
        "VERIFIER_FEED_CLIENT_ID and VERIFIER_FEED_CLIENT_SECRET (and VERIFIER_FEED_TOKEN_URL). Exit codes: "
        "0 accepted, 1 refused, 2 wrong usage or setting, 3 undecidable.",
    )
    check.add_argument("token", help="the token, or - for standard input, or @FILE")
    check.add_argument("--issuer", help="the exact iss; any if absent")
    check.add_argument("--audience", action="append", help="an accepted aud, may be repeated; any if absent")
    check.add_argument("--jwks", help="the key set: a URL, or a file")
    check.add_argument("--redis", help="where revocations are read: the region's replica")
    check.add_argument("--feed", help="or the region's key service: the URL of its /revocations/feed")
    check.add_argument("--hs256-secret-file", type=Path, help="a file with a shared secret of tokens from before")
    check.add_argument("--algorithm", action="append", help="an accepted alg, may be repeated; RS256 if absent")
    check.add_argument("--leeway-s", type=float, default=30.0, help="clock difference tolerated (default: %(default)s)")
    check.add_argument(
        "--timeout-s", type=float, default=10.0, help="wait for keys and revocations so long (default: %(default)s)"
    )
    check.add_argument("--allow-insecure-http", action="store_true", help="take http:// off this machine")
    check.add_argument("--claims", action="store_true", help="show the claims too")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


# -- what is given ----------------------------------------------------------------------------------------------------


def _read_token(text: str) -> str:
    """Bounded: one that is longer is refused for that, and is not read to its end."""
    if text == "-":
        raw = sys.stdin.buffer.read(2 * TOKEN_CHARS_MAX)
    elif text.startswith("@"):
        raw = _read(Path(text[1:]), "token", 2 * TOKEN_CHARS_MAX)
    else:
        return text
    return raw.decode("utf-8", "replace").strip()


def _read(path: Path, setting: str, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except (OSError, ValueError) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        raise invalid(setting, f"the file cannot be read: {said}") from None


def _verifier(given: argparse.Namespace) -> Verifier:
    remote = given.jwks is not None and "://" in given.jwks
    local = given.jwks is not None and not remote
    secret = given.hs256_secret_file
    redis, feed = given.redis is not None, given.feed is not None
    return Verifier(
        issuer=given.issuer,
        audience=given.audience,
        jwks_urls=[given.jwks] if remote else None,
        jwks=_read(Path(given.jwks), "jwks") if local else None,
        redis_url=given.redis,
        redis_username=os.environ.get("REDIS_USERNAME") if redis else None,
        redis_password=os.environ.get("REDIS_PASSWORD") if redis else None,
        feed_url=given.feed,
        feed_token=os.environ.get("VERIFIER_FEED_TOKEN") if feed else None,
        feed_client_id=os.environ.get("VERIFIER_FEED_CLIENT_ID") if feed else None,
        feed_client_secret=os.environ.get("VERIFIER_FEED_CLIENT_SECRET") if feed else None,
        feed_token_url=os.environ.get("VERIFIER_FEED_TOKEN_URL") if feed else None,
        hs256_secrets=[] if secret is None else [_read(secret, "hs256_secret_file").strip()],
        algorithms=given.algorithm or ("RS256",),
        leeway_s=given.leeway_s,
        allow_insecure_http=given.allow_insecure_http,
        token_cache_size=0,
    )


# -- what is told -----------------------------------------------------------------------------------------------------


def _reason(told: Explanation, status: Status) -> str | None:
    """What keeps keys or revocations away, where that is known."""
    failures = sorted(name for name in status.counters if name.startswith("fetch_") and name != "fetch_errors")
    if told.code == "keys_unavailable" and told.reason is None:
        return failures[0].removeprefix("fetch_") if failures else "no answer yet"
    return (told.reason or status.connection) if told.code == "never_synced" else told.reason


def _line(step: StepVerdict, signs: dict[str, str]) -> str:
    fields = (("claim", step.claim), ("reason", step.reason), ("expected", step.expected), ("found", step.actual))
    said = "; ".join(f"{name} {value}" for name, value in fields if value)
    text = {"passed": "passed", "refused": f"{step.code}: {step.meaning}", "not judged": "not judged"}[step.verdict]
    unverified = "  (unverified)" if step.unverified else ""
    return f"{signs[step.verdict]} {step.step} {step.name:<10} {text}{unverified}{f' [{said}]' if said else ''}"


def _print(told: Explanation, status: Status, show_claims: bool) -> None:
    signs = _SIGNS if _can_print("".join(_SIGNS.values())) else _PLAIN_SIGNS
    for step in told.steps:
        print(_line(step, signs))
    if status.connection != "none":
        age = "never read" if status.staleness_s is None else f"{status.staleness_s:.1f} s old"
        print(f"  revocations: {status.mirror_entries} held, {age}, {'fresh' if status.fresh else status.reason}")
    if show_claims and told.claims is not None:
        # In ASCII: a stranger's claims must not steer a terminal.
        print(f"  {'claims' if told.claims_verified else 'claims, UNVERIFIED'}: {json.dumps(told.claims, indent=2)}")
    if told.accepted:
        print("accepted")
    else:
        reason = _reason(told, status)
        print(f"{told.outcome}: {told.code}: {CODES[told.code]}{f' [reason {reason}]' if reason else ''}")


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _document(told: Explanation, status: Status, show_claims: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": 1,
        "outcome": told.outcome,
        "code": told.code,
        "reason": _reason(told, status),
        "steps": msgspec.to_builtins(told.steps),
        "keys": status.keys,
        "revocations": {
            "source": status.connection != "none",
            "entries": status.mirror_entries,
            "staleness_s": status.staleness_s,
            "fresh": status.fresh,
            "reason": status.reason,
        },
    }
    if show_claims:
        document |= {"claims": told.claims, "claims_verified": told.claims_verified}
    return document


def _check(given: argparse.Namespace) -> int:
    wait_s = min(seconds("timeout_s", given.timeout_s), WAIT_S_MAX)
    token = _read_token(given.token)
    with _verifier(given) as verifier:
        verifier.wait_ready(wait_s)
        told, status = verifier.explain(token), verifier.status()
    if given.json:
        print(json.dumps(_document(told, status, given.claims)))
    else:
        _print(told, status, given.claims)
    return EXIT_CODES[told.outcome]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    given = _arguments(argv)
    try:
        return _check(given)
    except ConfigurationError as error:
        print(f"verifier: error [{error.code}]: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
