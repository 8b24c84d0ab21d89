"""Whether a token is good: the six steps in order, each in its own module, over data given as arguments. Pure.

1. parse, 2. header (:mod:`verifier.token`), 3. key (here), 4. signature (:mod:`verifier.jwk`),
5. claims (:mod:`verifier.claims`), 6. revocation (:mod:`verifier.revocations`).

The same numbers stand in every :class:`~verifier.errors.InvalidToken`. Policy about stale data is not here: that is
about the verifier, not about the token (:mod:`verifier.verifier`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature

from .claims import Facts, check_claims
from .errors import InvalidToken, RevokedToken
from .jwk import HmacKey, KeySet, PublicKey
from .limits import HEADER_BYTES_MAX, PUBLICATION_LAG_S
from .revocations import Snapshot
from .token import Header, parse, read_header, read_payload

__all__ = [
    "Rules",
    "Trust",
    "UnknownKid",
    "Verified",
    "check_header",
    "check_revoked",
    "check_signature",
    "check_static",
    "choose_keys",
    "choose_trust",
    "find_revoked_kid",
]

PUBLIC_KEY_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "ES256")

Key = PublicKey | HmacKey
_FAR: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a verifier accepts. ``None`` for issuer or audiences skips that check. Times are seconds."""

    issuer: str | None
    audiences: frozenset[str] | None
    algorithms: frozenset[str] = frozenset({"RS256"})
    leeway_s: float = 30.0
    max_token_lifetime_s: float = 86_400.0
    require_iat: bool = True
    hs256_keys: tuple[HmacKey, ...] = field(default=(), repr=False)
    hs256_until: float | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """Steps 2 and 3 of a header: what it says, and the keys that may have signed (more than one only for HS256).

    ``until`` (Unix seconds) is when its algorithm is no longer accepted.
    """

    header: Header
    keys: tuple[Key, ...]
    until: float


class Trust:
    """An issuer's rules and the keys held for it now: everything that steps 2-5 judge by. ``keys`` never change.

    ``until_mono`` (monotonic seconds) is when they are too old to decide by; whoever holds the trust sees to that.

    ``choose`` remembers what headers meant. Only such are kept as led to a key, in two generations of bounded size, so
    that strangers can neither fill it nor make a look-up slow.
    """

    __slots__ = ("_known", "_old", "keys", "rules", "until_mono")

    REMEMBERED = 256

    def __init__(self, rules: Rules, keys: KeySet | None) -> None:
        self.rules = rules
        self.keys = keys
        self.until_mono = _FAR
        self._known: dict[bytes, Choice] = {}
        self._old: dict[bytes, Choice] = {}

    def choose(self, segment: bytes) -> Choice:
        """Steps 2 and 3 for a header's segment, but for the time; raises :class:`InvalidToken`."""
        choice = self._known.get(segment)
        if choice is not None:
            return choice
        choice = self._old.get(segment)
        if choice is None:
            header = read_header(segment)
            check_header(header, self.rules)
            until = self.rules.hs256_until if header.alg == "HS256" else None
            choice = Choice(header, choose_keys(header, self.rules, self.keys), _FAR if until is None else until)
        if choice.keys and len(segment) <= HEADER_BYTES_MAX:
            if len(self._known) >= self.REMEMBERED:
                self._old, self._known = self._known, {}
            self._known[segment] = choice
        return choice

    def has(self, verified: Verified) -> bool:
        """Step 3 again, for a token that verified by other keys: these hold the very key (HS256 secrets stay)."""
        key = verified.key
        if isinstance(key, HmacKey):
            return True
        if self.keys is None:
            return False
        if verified.header.kid is None:
            return self.keys.only_fit(verified.header.alg) == key
        return key.kid is not None and self.keys.get(key.kid) == key


class Verified(msgspec.Struct, frozen=True, gc=False):
    """A token that passed steps 1-5. ``facts`` bound when that holds, ``valid_until`` (Unix seconds) also HS256's end.

    ``kid`` is the key's; ``header`` says whether the token named it, ``trust`` under whose rules it was judged.
    """

    members: dict[str, Any]
    facts: Facts
    header: Header
    kid: str | None
    key: Key
    tok: str | None
    valid_until: float
    trust: Trust

    def __repr__(self) -> str:
        return f"Verified(alg={self.header.alg!r}, kid={self.kid!r})"


class UnknownKid(InvalidToken):
    """Nothing is wrong with the token but that no key has its ``kid``: the key set held may be too old to know it.

    Nothing of it is verified. ``iat`` (Unix seconds) tells how new a key set would have to be, and ``issuer`` and
    ``kid`` whether the key was revoked. For want of an ``iat``, any set fetched from now on is new enough. ``rules``
    are those of the issuer whose key it would be.
    """

    def __init__(self, facts: Facts, kid: str, now: float, rules: Rules) -> None:
        self.iat = now - PUBLICATION_LAG_S if facts.iat is None else facts.iat
        self.issuer = facts.issuer
        self.kid = kid
        self.rules = rules
        super().__init__("kid_unknown", step=3)


def check_header(header: Header, rules: Rules, now: float | None = None) -> None:
    """Step 2's policy: the algorithm, at ``now`` if that is given, and the type; raises :class:`InvalidToken`."""
    if header.alg not in rules.algorithms and not (header.alg == "HS256" and rules.hs256_keys):
        allowed = sorted(rules.algorithms | ({"HS256"} if rules.hs256_keys else set()))
        raise InvalidToken("alg_not_allowed", step=2, expected=" or ".join(allowed))
    if header.typ is None:
        raise InvalidToken("typ_not_allowed", step=2, expected="JWT or at+jwt")
    if now is not None and header.alg == "HS256" and rules.hs256_until is not None and now >= rules.hs256_until:
        raise _cut_off(rules.hs256_until, now)


def _cut_off(until: float, now: float) -> InvalidToken:
    return InvalidToken("hs256_cutoff", step=2, expected=f"before {until:.0f}", actual=f"{now:.0f}")


def choose_keys(header: Header, rules: Rules, keys: KeySet | None) -> tuple[Key, ...]:
    """Step 3: the key by ``kid`` and bound to ``alg``; HS256 secrets without a ``kid`` are each tried.

    Empty where no key has this ``kid``; raises :class:`InvalidToken`.
    """
    if header.alg == "HS256":
        return tuple(key for key in rules.hs256_keys if header.kid is None or key.kid in (None, header.kid))
    if keys is None:
        return ()
    if header.kid is None:
        only = keys.only_fit(header.alg)
        if only is None:
            raise InvalidToken("kid_invalid", step=3, reason="missing, and not one key alone fits")
        return (only,)
    key = keys.get(header.kid)
    if key is None:
        return ()
    if key.alg != header.alg:
        raise InvalidToken("alg_key_mismatch", step=3, expected=key.alg)
    return (key,)


def choose_trust(members: Mapping[str, Any], trusts: Mapping[str, Trust]) -> Trust:
    """Whose keys to look among, by a payload that nothing vouches for yet; raises :class:`InvalidToken`.

    This only says which issuer's keys and rules the token has to satisfy: no key of one issuer ever verifies a token
    that names another.
    """
    issuer = members.get("iss")
    trust = trusts.get(issuer) if type(issuer) is str else None
    if trust is None:
        code = "claim_missing" if "iss" not in members else "claim_invalid"
        raise InvalidToken(code, step=3, claim="iss", reason="none of the issuers")
    return trust


def check_signature(signing_input: bytes, signature: bytes, keys: tuple[Key, ...]) -> Key:
    """Step 4: the key that verifies; raises :class:`InvalidToken`."""
    for key in keys:
        try:
            key.verify(signature, signing_input)
        except InvalidSignature:
            continue
        return key
    raise InvalidToken("signature_invalid", step=4)


def check_static(token: str, trust: Trust | Mapping[str, Trust], now: float) -> Verified:
    """Steps 1-5 at wall time ``now`` (Unix seconds), for one issuer or for several by name.

    Raises :class:`InvalidToken`; :class:`UnknownKid` when a newer key set might know the key.
    """
    parsed = parse(token)
    members: dict[str, Any] | None = None
    if not isinstance(trust, Trust):
        members = read_payload(parsed.payload)
        trust = choose_trust(members, trust)
    choice = trust.choose(parsed.header)
    header, until = choice.header, choice.until
    if now >= until:
        raise _cut_off(until, now)
    if not choice.keys and header.alg != "HS256":
        facts = check_claims(read_payload(parsed.payload), trust.rules, now)
        raise UnknownKid(facts, header.kid or "", now, trust.rules)
    key = check_signature(parsed.signing_input, parsed.signature, choice.keys)
    if members is None:
        members = read_payload(parsed.payload)
    facts = check_claims(members, trust.rules, now)
    until = facts.valid_until if until == _FAR else min(until, facts.valid_until)
    tok = None if facts.jti is not None else hashlib.sha256(parsed.signing_input).hexdigest()
    return Verified(members, facts, header, header.kid or key.kid, key, tok, until, trust)


def find_revoked_kid(unknown: UnknownKid, revocations: Snapshot) -> RevokedToken | None:
    """Step 6 for a key that is gone: the refusal, if it is gone because it was revoked."""
    hit = revocations.find(issuer=unknown.issuer, kid=unknown.kid)
    return RevokedToken(kind=hit.kind, entry_id=hit.entry_id) if hit is not None and hit.kind == "kid" else None


def check_revoked(verified: Verified, revocations: Snapshot) -> None:
    """Step 6: raises :class:`RevokedToken` if an entry hits the token, its session, subject, client or key."""
    facts = verified.facts
    hit = revocations.find_at(
        facts.issuer,
        verified.kid,
        facts.jti,
        verified.tok,
        facts.sid,
        facts.sub,
        facts.client_id,
        facts.iat,
        facts.after,
    )
    if hit is not None:
        raise RevokedToken(kind=hit.kind, entry_id=hit.entry_id)
