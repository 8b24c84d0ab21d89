"""``python -m verifier check TOKEN``: each step's verdict about a token, for a person or, with ``--json``, a program.

Exit codes: 0 accepted · 1 refused · 2 wrong usage or setting · 3 undecidable (keys or revocations are not at hand).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .check import Explanation, StepVerdict
from .errors import CODES, ConfigurationError, Undecidable
from .status import Status
from .verifier import Verifier

ACCEPTED, REFUSED, USAGE, UNDECIDABLE = 0, 1, 2, 3
_SIGNS = {"passed": "✓", "refused": "✗", "not judged": "–"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m verifier", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="say why a token is accepted or refused",
        description="Say, step by step, why a token is accepted or refused. A token in a command line can be read by "
        "everybody on the machine: prefer - (standard input) or @FILE.",
    )
    check.add_argument("token", help="the token, or - for standard input, or @FILE")
    check.add_argument("--issuer", help="the exact iss; any if absent")
    check.add_argument("--audience", action="append", help="an accepted aud, may be repeated; any if absent")
    check.add_argument("--jwks", required=True, help="the key set: a URL, or a file")
    check.add_argument("--redis", help="the region's replica; user and password from REDIS_USERNAME, REDIS_PASSWORD")
    check.add_argument("--hs256-secret-file", type=Path, help="a file with a shared secret of tokens from before")
    check.add_argument("--algorithm", action="append", help="an accepted alg, may be repeated; RS256 if absent")
    check.add_argument("--leeway-s", type=float, default=30.0, help="clock difference tolerated (default: %(default)s)")
    check.add_argument("--timeout-s", type=float, default=10.0, help="wait for keys and revocations so long")
    check.add_argument("--allow-insecure-http", action="store_true", help="take keys over http:// off this machine")
    check.add_argument("--claims", action="store_true", help="show the claims too")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def _read_token(text: str) -> str:
    if text == "-":
        return sys.stdin.read().strip()
    if text.startswith("@"):
        return _read(Path(text[1:]), "the token").decode("utf-8", "replace").strip()
    return text


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{what}: {path}: {error.strerror or 'cannot be read'}"
        raise ConfigurationError("setting_invalid", message) from None


def _verifier(given: argparse.Namespace) -> Verifier:
    remote = "://" in given.jwks
    secrets = [] if given.hs256_secret_file is None else [_read(given.hs256_secret_file, "the secret").strip()]
    return Verifier(
        issuer=given.issuer,
        audience=given.audience,
        jwks_urls=[given.jwks] if remote else None,
        jwks=None if remote else _read(Path(given.jwks), "the key set"),
        redis_url=given.redis,
        redis_username=os.environ.get("REDIS_USERNAME") if given.redis else None,
        redis_password=os.environ.get("REDIS_PASSWORD") if given.redis else None,
        hs256_secrets=secrets,
        algorithms=given.algorithm or ("RS256",),
        leeway_s=given.leeway_s,
        allow_insecure_http=given.allow_insecure_http,
        token_cache_size=0,
    )


def _missing(status: Status) -> Undecidable | None:
    """What could not be had in time, so that nothing can be said for certain."""
    failures = sorted(name for name in status.counters if name.startswith("fetch_") and name != "fetch_errors")
    if not status.keys and failures:
        return Undecidable("keys_unavailable", reason=failures[0].removeprefix("fetch_"))
    if status.staleness_s is None and status.connection != "none":
        return Undecidable("never_synced", reason=status.problem or status.connection)
    return None


def _line(step: StepVerdict) -> str:
    fields = (("claim", step.claim), ("reason", step.reason), ("expected", step.expected), ("found", step.actual))
    said = "; ".join(f"{name} {value}" for name, value in fields if value)
    text = {"passed": "passed", "refused": f"{step.code}: {step.meaning}", "not judged": "not judged"}[step.verdict]
    unverified = "  (unverified)" if step.unverified else ""
    return f"{_SIGNS[step.verdict]} {step.step} {step.name:<10} {text}{unverified}{f' [{said}]' if said else ''}"


def _print(told: Explanation, missing: Undecidable | None, status: Status, show_claims: bool) -> None:
    for step in told.steps:
        print(_line(step))
    if status.connection != "none":
        age = "never read" if status.staleness_s is None else f"{status.staleness_s:.1f} s old"
        print(f"  revocations: {status.mirror_entries} held, {age}, {'fresh' if status.fresh else status.reason}")
    if show_claims and told.claims is not None:
        label = "claims" if told.claims_verified else "claims, UNVERIFIED"
        print(f"  {label}: {msgspec.json.format(msgspec.json.encode(told.claims)).decode()}")
    if missing is not None:
        print(f"undecidable: {missing}")
    else:
        print("accepted" if told.accepted else f"refused: {told.code}: {CODES[told.code]}")


def _document(told: Explanation, missing: Undecidable | None, status: Status, show_claims: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": 1,
        "outcome": "undecidable" if missing else "accepted" if told.accepted else "refused",
        "code": missing.code if missing else told.code,
        "reason": missing.reason if missing else None,
        "steps": msgspec.to_builtins(told.steps),
        "keys": status.keys,
        "revocations": {
            "source": status.connection != "none",
            "entries": status.mirror_entries,
            "staleness_s": status.staleness_s,
            "fresh": status.fresh,
        },
    }
    if show_claims:
        document |= {"claims": told.claims, "claims_verified": told.claims_verified}
    return document


def _check(given: argparse.Namespace) -> int:
    token = _read_token(given.token)
    with _verifier(given) as verifier:
        verifier.wait_ready(given.timeout_s)
        told, status = verifier.explain(token), verifier.status()
    missing = _missing(status)
    if given.json:
        print(msgspec.json.encode(_document(told, missing, status, given.claims)).decode())
    else:
        _print(told, missing, status, given.claims)
    if missing is not None:
        return UNDECIDABLE
    return ACCEPTED if told.accepted else REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = _arguments(argv)
    try:
        return _check(given)
    except ConfigurationError as error:
        print(f"verifier: error [{error.code}]: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
