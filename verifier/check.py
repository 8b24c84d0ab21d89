"""Why a token is accepted or refused, step by step: for people, and for ``python -m verifier check``.

:func:`explain` goes on past a refusal wherever the rest can still be judged, and labels what nothing vouches for. Its
verdict is that of :mod:`verifier.decision`, not another opinion. Where it takes newer keys or revocations to decide,
:meth:`Explanation.undecided` takes back what was said without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from .claims import check_claims
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
from .errors import CODES, InvalidToken, RevokedToken, Undecidable
from .revocations import Snapshot
from .token import Header, Parsed, parse, read_header, read_payload

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
    """``code`` is ``accepted`` or the error's, ``reason`` its detail; ``claims`` the payload, None if unreadable."""

    outcome: Literal["accepted", "refused", "undecidable"]
    code: str
    reason: str | None = None
    steps: tuple[StepVerdict, ...]
    claims: Mapping[str, Any] | None
    claims_verified: bool

    def __repr__(self) -> str:
        return f"Explanation(code={self.code!r})"

    @property
    def accepted(self) -> bool:
        """True if the token is good."""
        return self.outcome == "accepted"

    def undecided(self, error: Undecidable) -> Explanation:
        """The same where keys or revocations are not at hand: what was said without them is taken back."""
        without_keys = error.code.startswith("keys_")
        lacking = (3, 4, 6) if without_keys else (6,)
        reason = f"{error.code}: {CODES[error.code]}"
        steps = tuple(
            StepVerdict(step=step.step, name=step.name, verdict="not judged", reason=reason)
            if step.step in lacking
            else msgspec.structs.replace(step, unverified=step.unverified or (without_keys and step.step == 5))
            for step in self.steps
        )
        verified = self.claims_verified and not without_keys
        return msgspec.structs.replace(
            self, outcome="undecidable", code=error.code, reason=error.reason, steps=steps, claims_verified=verified
        )


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
    refusal = _refusal(token, trust, revocations or Snapshot(), now)
    read = walk.judge(1, lambda: _read(token))
    if read is None:
        for step in range(2, 7):
            walk.skip(step, "the token cannot be read")
        return _explanation(refusal, walk, None)
    parsed, members = read
    chosen = trust if isinstance(trust, Trust) else _tolerantly(lambda: choose_trust(members, trust))
    choice = _key(walk, parsed, members, trust, chosen, now)
    if choice is None or not choice.keys:
        walk.skip(4, "there is no key to check it with")
    else:
        walk.judge(4, lambda: check_signature(parsed.signing_input, parsed.signature, choice.keys))
    if chosen is None:
        walk.skip(5, "whose rules apply is not known")
    else:
        walk.judge(5, lambda: check_claims(members, chosen.rules, now))
    _revocation(walk, refusal, revocations)
    return _explanation(refusal, walk, members)


def _refusal(token: str, trust: Trust | Mapping[str, Trust], revocations: Snapshot, now: float) -> InvalidToken | None:
    """What the decision itself says."""
    try:
        check_revoked(check_static(token, trust, now), revocations)
    except UnknownKid as unknown:
        return find_revoked_kid(unknown, revocations) or unknown
    except InvalidToken as error:
        return error
    return None


def _read(token: str) -> tuple[Parsed, dict[str, Any]]:
    """Step 1: header and payload are JSON objects; what the header says is step 2's."""
    parsed = parse(token)
    try:
        read_header(parsed.header)
    except InvalidToken as error:
        if error.step == 1:
            raise
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
    if chosen is None:
        walk.skip(2, "whose rules apply is not known")
        walk.judge(3, lambda: None if isinstance(trust, Trust) else choose_trust(members, trust))
        return None
    walk.judge(2, lambda: check_header(read_header(parsed.header), chosen.rules, now))
    header = _tolerantly(lambda: read_header(parsed.header))
    if header is None:
        walk.skip(3, "the header names none that can be relied on")
        return None
    return walk.judge(3, lambda: _choose(header, chosen))


def _choose(header: Header, trust: Trust) -> Choice:
    keys = choose_keys(header, trust.rules, trust.keys)
    if not keys and header.alg != "HS256":
        raise InvalidToken("kid_unknown", step=3)
    return Choice(header, keys, 0.0)


def _revocation(walk: _Walk, refusal: InvalidToken | None, revocations: Snapshot | None) -> None:
    """Step 6: also for a token whose key is gone because it was revoked."""
    if revocations is None:
        walk.skip(6, "no source of revocations was named")
    elif refusal is None or isinstance(refusal, RevokedToken):
        walk.judge(6, lambda: _raise_if(refusal))
    else:
        walk.skip(6, "only a token that is good otherwise is looked up")


def _raise_if(refusal: InvalidToken | None) -> None:
    if refusal is not None:
        raise refusal


def _explanation(refusal: InvalidToken | None, walk: _Walk, members: Mapping[str, Any] | None) -> Explanation:
    verified = all(step.verdict == "passed" for step in walk.steps[:4])
    return Explanation(
        outcome="accepted" if refusal is None else "refused",
        code="accepted" if refusal is None else refusal.code,
        reason=None if refusal is None else refusal.reason,
        steps=tuple(walk.steps),
        claims=members,
        claims_verified=members is not None and verified,
    )
