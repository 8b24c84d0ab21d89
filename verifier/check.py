"""Why a token is accepted or refused, step by step: for people, and for ``python -m verifier check``.

:func:`explain` goes on past a refusal wherever the rest can still be judged, and labels what nothing vouches for. Its
verdict is that of :mod:`verifier.decision`, not another opinion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from .claims import Facts, check_claims
from .decision import (
    Choice,
    Trust,
    UnknownKid,
    check_header,
    check_revoked,
    check_signature,
    check_static,
    choose_keys,
    choose_trust,
    find_revoked_kid,
)
from .errors import CODES, InvalidToken, RevokedToken
from .revocations import Snapshot
from .token import Parsed, parse, read_header, read_payload

__all__ = ["STEPS", "Explanation", "StepVerdict", "explain"]

T = TypeVar("T")
STEPS: Final = ("parse", "header", "key", "signature", "claims", "revocation")


class StepVerdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step: ``passed``, ``refused`` (with an error's fields), or ``not judged`` (``reason`` says why not).

    ``unverified``: it was judged by what the token says of itself, and nothing vouches for that.
    """

    step: int
    name: str
    verdict: Literal["passed", "refused", "not judged"]
    unverified: bool = False
    code: str | None = None
    meaning: str | None = None
    claim: str | None = None
    reason: str | None = None
    expected: str | None = None
    actual: str | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """``code`` is ``accepted`` or the refusal's; ``claims`` are the payload, None if unreadable."""

    accepted: bool
    code: str
    steps: tuple[StepVerdict, ...]
    claims: Mapping[str, Any] | None
    claims_verified: bool

    def __repr__(self) -> str:
        return f"Explanation(code={self.code!r})"


class _Walk:
    """The steps so far; ``unverified`` from the first one that refused on."""

    def __init__(self) -> None:
        self.steps: list[StepVerdict] = []
        self.unverified = False

    def judge(self, step: int, work: Callable[[], T]) -> T | None:
        """The step's result, or None after a refusal, which is noted."""
        try:
            result = work()
        except InvalidToken as error:
            self._note(
                step,
                "refused",
                code=error.code,
                meaning=CODES[error.code],
                claim=error.claim,
                reason=error.reason,
                expected=error.expected,
                actual=error.actual,
            )
            self.unverified = True
            return None
        self._note(step, "passed")
        return result

    def skip(self, step: int, reason: str) -> None:
        """The step cannot be judged."""
        self._note(step, "not judged", reason=reason)
        self.unverified = True

    def _note(self, step: int, verdict: Literal["passed", "refused", "not judged"], **fields: str | None) -> None:
        unverified = self.unverified and verdict != "not judged"
        name = STEPS[step - 1]
        self.steps.append(StepVerdict(step=step, name=name, verdict=verdict, unverified=unverified, **fields))


def explain(token: str, trust: Trust | Mapping[str, Trust], revocations: Snapshot | None, now: float) -> Explanation:
    """Every step's verdict at wall time ``now`` (Unix seconds); ``revocations`` None: nothing is known of them."""
    walk = _Walk()
    read = walk.judge(1, lambda: _read(token))
    if read is None:
        for step in range(2, 7):
            walk.skip(step, "the token cannot be read")
        return _explanation(token, trust, revocations, now, walk, None)
    parsed, members = read
    chosen = trust if isinstance(trust, Trust) else _tolerantly(lambda: choose_trust(members, trust))
    choice = _key(walk, parsed, members, trust, chosen, now)
    if choice is None or not choice.keys:
        walk.skip(4, "there is no key to check it with")
    else:
        walk.judge(4, lambda: check_signature(parsed.signing_input, parsed.signature, choice.keys))
    facts = None
    if chosen is None:
        walk.skip(5, "whose rules apply is not known")
    else:
        facts = walk.judge(5, lambda: check_claims(members, chosen.rules, now))
    _revocation(walk, token, trust, revocations, facts, now)
    return _explanation(token, trust, revocations, now, walk, members)


def _read(token: str) -> tuple[Parsed, dict[str, Any]]:
    parsed = parse(token)
    read_header(parsed.header)
    return parsed, read_payload(parsed.payload)


def _tolerantly(work: Callable[[], T]) -> T | None:
    try:
        return work()
    except InvalidToken:
        return None


def _key(
    walk: _Walk,
    parsed: Parsed,
    members: Mapping[str, Any],
    trust: Trust | Mapping[str, Trust],
    chosen: Trust | None,
    now: float,
) -> Choice | None:
    """Steps 2 and 3."""
    header = read_header(parsed.header)
    if chosen is None:
        walk.skip(2, "whose rules apply is not known")
        walk.judge(3, lambda: None if isinstance(trust, Trust) else choose_trust(members, trust))
        return None
    walk.judge(2, lambda: check_header(header, chosen.rules, now))

    def choose() -> Choice:
        keys = choose_keys(header, chosen.rules, chosen.keys)
        if not keys and header.alg != "HS256":
            raise InvalidToken("kid_unknown", step=3)
        return Choice(header, keys, 0.0)

    return walk.judge(3, choose)


def _revocation(
    walk: _Walk,
    token: str,
    trust: Trust | Mapping[str, Trust],
    revocations: Snapshot | None,
    facts: Facts | None,
    now: float,
) -> None:
    if revocations is None:
        walk.skip(6, "no source of revocations was named")
    elif facts is None or walk.unverified:
        walk.skip(6, "only a token that is good otherwise is looked up")
    else:
        walk.judge(6, lambda: check_revoked(check_static(token, trust, now), revocations))


def _explanation(
    token: str,
    trust: Trust | Mapping[str, Trust],
    revocations: Snapshot | None,
    now: float,
    walk: _Walk,
    members: Mapping[str, Any] | None,
) -> Explanation:
    code = "accepted"
    try:
        check_revoked(check_static(token, trust, now), revocations or Snapshot())
    except UnknownKid as unknown:
        revoked: RevokedToken | None = find_revoked_kid(unknown, revocations or Snapshot())
        code = unknown.code if revoked is None else revoked.code
    except InvalidToken as error:
        code = error.code
    verified = not any(step.verdict == "refused" for step in walk.steps if step.step <= 4)
    return Explanation(
        accepted=code == "accepted",
        code=code,
        steps=tuple(walk.steps),
        claims=members,
        claims_verified=members is not None and verified,
    )
