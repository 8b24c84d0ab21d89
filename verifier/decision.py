"""Whether a token is good: the six steps in order, each in its own module, over data given as arguments. Pure.

1. parse, 2. header (:mod:`verifier.token`), 3. key (here), 4. signature (:mod:`verifier.jwk`),
5. claims (:mod:`verifier.claims`), 6. revocation (:mod:`verifier.revocations`).

The same numbers stand in every :class:`~verifier.errors.InvalidToken`. Policy about stale data is not here: that is
about the verifier, not about the token (:mod:`verifier.verifier`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidSignature

from .claims import Facts, check_claims
from .errors import InvalidToken, RevokedToken
from .jwk import HmacKey, KeySet, PublicKey
from .limits import PUBLICATION_LAG_S
from .revocations import Snapshot
from .token import Header, Parsed, parse, read_payload

__all__ = ["Rules", "UnknownKid", "Verified", "check_kid_revoked", "check_revoked", "check_static"]

PUBLIC_KEY_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "ES256")


class UnknownKid(InvalidToken):
    """Nothing is wrong with the token but that no key has its ``kid``: the key set held may be too old to know it.

    Nothing of it is verified. ``iat`` (Unix seconds) tells how new a key set would have to be, and ``issuer`` and
    ``kid`` whether the key was revoked. For want of an ``iat``, any set fetched from now on is new enough.
    """

    def __init__(self, facts: Facts, kid: str, now: float) -> None:
        self.iat = now - PUBLICATION_LAG_S if facts.iat is None else facts.iat
        self.issuer = facts.issuer
        self.kid = kid
        super().__init__("kid_unknown", step=3)


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


@dataclass(frozen=True, slots=True)
class Verified:
    """A token that passed steps 1-5. ``valid_from`` and ``valid_until`` (Unix seconds) bound when that holds.

    ``kid`` is the key's; ``named`` says whether the token's header named it.
    """

    members: dict[str, Any] = field(repr=False)
    facts: Facts = field(repr=False)
    alg: str
    kid: str | None
    key: PublicKey | HmacKey
    tok: str | None
    valid_until: float
    named: bool


def _keys_for(header: Header, rules: Rules, keys: KeySet | None) -> tuple[PublicKey | HmacKey, ...]:
    """Step 3: the key by ``kid`` and bound to ``alg``; HS256 secrets without a ``kid`` are each tried."""
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
        raise InvalidToken("alg_key_mismatch", step=3)
    return (key,)


def _check_header(header: Header, rules: Rules, now: float) -> None:
    """Step 2's policy: the algorithm and the type."""
    if header.alg == "HS256":
        if not rules.hs256_keys:
            raise InvalidToken("alg_not_allowed", step=2)
        if rules.hs256_until is not None and now >= rules.hs256_until:
            raise InvalidToken("hs256_cutoff", step=2)
    elif header.alg not in rules.algorithms:
        raise InvalidToken("alg_not_allowed", step=2)
    if not header.is_jwt:
        raise InvalidToken("typ_not_allowed", step=2)


def _check_signature(parsed: Parsed, candidates: tuple[PublicKey | HmacKey, ...]) -> PublicKey | HmacKey:
    """Step 4: the key that verifies; raises :class:`InvalidToken`."""
    for key in candidates:
        try:
            key.verify(parsed.signature, parsed.signing_input)
        except InvalidSignature:
            continue
        return key
    raise InvalidToken("signature_invalid", step=4)


def check_static(token: str, rules: Rules, keys: KeySet | None, now: float) -> Verified:
    """Steps 1-5 at wall time ``now`` (Unix seconds).

    Raises :class:`InvalidToken`; :class:`UnknownKid` when a newer key set might know the key.
    """
    parsed = parse(token)
    header = parsed.header
    _check_header(header, rules, now)
    candidates = _keys_for(header, rules, keys)
    if not candidates and header.alg != "HS256":
        raise UnknownKid(check_claims(read_payload(parsed.payload), rules, now), header.kid or "", now)
    key = _check_signature(parsed, candidates)
    members = read_payload(parsed.payload)
    facts = check_claims(members, rules, now)
    valid_until = facts.valid_until
    if header.alg == "HS256" and rules.hs256_until is not None:
        valid_until = min(valid_until, rules.hs256_until)
    tok = None if facts.jti is not None else hashlib.sha256(parsed.signing_input).hexdigest()
    return Verified(members, facts, header.alg, header.kid or key.kid, key, tok, valid_until, header.kid is not None)


def check_kid_revoked(unknown: UnknownKid, revocations: Snapshot) -> None:
    """Step 6 for a key that is gone: raises :class:`RevokedToken` if it is gone because it was revoked."""
    hit = revocations.find(issuer=unknown.issuer, kid=unknown.kid)
    if hit is not None and hit.kind == "kid":
        raise RevokedToken(kind=hit.kind, entry_id=hit.entry_id)


def check_revoked(verified: Verified, revocations: Snapshot) -> None:
    """Step 6: raises :class:`RevokedToken` if an entry hits the token, its session, subject, client or key."""
    facts = verified.facts
    hit = revocations.find(
        issuer=facts.issuer,
        jti=facts.jti,
        tok=verified.tok,
        sid=facts.sid,
        sub=facts.sub,
        client_id=facts.client_id,
        kid=verified.kid,
        iat=facts.iat,
        after=facts.after,
    )
    if hit is not None:
        raise RevokedToken(kind=hit.kind, entry_id=hit.entry_id)
