"""What verification can answer besides claims, split by whose fault it is.

    VerifierError
    ├── InvalidToken          the token's fault: answer 401
    │   └── RevokedToken      it was valid and has been revoked
    ├── Undecidable           ours: keys or revocations are not at hand, answer 503 and retry
    └── ConfigurationError    the embedding service's: a setting is wrong

Every error has a stable ``code`` from :data:`CODES` and fields instead of prose. No message, field or ``repr`` ever
holds a token, a secret or a claim's value that the token's bearer chose, beyond the names of claims.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CODES", "ConfigurationError", "InvalidToken", "RevokedToken", "Undecidable", "VerifierError"]

CODES: Final[dict[str, str]] = {
    # step 1: parse
    "token_malformed": "not three base64url parts separated by dots (RFC 7515 section 7.1)",
    "token_too_large": "longer than the verifier reads",
    "token_not_canonical": "base64url with padding, foreign characters or unused bits (RFC 4648 section 3.5)",
    "token_json_invalid": "header or payload is not one strict UTF-8 JSON object with unique names (RFC 8259)",
    # step 2: header
    "alg_not_allowed": "the header's alg is not one that this verifier accepts (RFC 8725 section 3.1)",
    "hs256_cutoff": "HS256 tokens are no longer accepted",
    "typ_not_allowed": "the header's typ is neither JWT nor at+jwt (RFC 8725 section 3.11)",
    "crit_not_supported": "the header names critical extensions; none is understood (RFC 7515 section 4.1.11)",
    "kid_invalid": "the header's kid is missing, not a string or too long (RFC 7515 section 4.1.4)",
    # step 3: key
    "kid_unknown": "no key with this kid, and the key set was fetched after the token was issued",
    "alg_key_mismatch": "the key is bound to another algorithm than the header names",
    # step 4: signature
    "signature_invalid": "the signature does not verify with the named key",
    # step 5: claims
    "claim_missing": "a required claim is absent",
    "claim_invalid": "a claim has the wrong type or value",
    "token_expired": "exp is past (RFC 7519 section 4.1.4)",
    "token_not_yet_valid": "nbf or iat is in the future (RFC 7519 section 4.1.5)",
    "token_lifetime_too_long": "exp - iat is longer than any revocation would be kept",
    # step 6: revocation
    "token_revoked": "the token, its session, subject, client or key was revoked",
    # ours
    "keys_unavailable": "no key set was ever fetched, or the last success is older than keys_max_age_s",
    "keys_behind": "the key may be newer than the set held; a fetch was asked for",
    "revocations_stale": "the mirror cannot vouch for its revocations and on_stale is deny",
    "never_synced": "the first read of the trust log has not completed and on_unsynced is deny",
    "position_not_reached": "the mirror has not reached min_position in time",
    # misuse
    "not_started": "verify was called before start() or after close()",
    "setting_missing": "a required setting is absent",
    "setting_invalid": "a setting has an impossible value",
    "secret_too_short": "an HS256 secret has fewer than 32 bytes (RFC 7518 section 3.2)",
    "secret_is_public_key": "a public key was given as an HS256 secret",
    "insecure_url": "plain http:// off loopback without allow_insecure_http=True",
    "jwks_invalid": "a local JWK set has no usable key",
}
"""Code to meaning: the complete list, for docs, tests and clients."""


class VerifierError(Exception):
    """Base of everything that this package raises on purpose."""

    def __init__(self, code: str, message: str | None = None) -> None:
        self.code: str = code
        super().__init__(message or CODES[code])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(code={self.code!r})"


class InvalidToken(VerifierError):
    """The token must not be accepted, now or later: HTTP 401.

    Attributes: ``code``, ``step`` (1-6, see :mod:`verifier.decision`), ``claim`` (name, for claim errors), ``reason``
    (a machine-readable detail), ``expected`` (what the verifier accepts) and ``actual`` (a time, a length of time or a
    JSON type that was found instead, never a value that the bearer could have filled with anything else).
    """

    def __init__(
        self,
        code: str,
        *,
        step: int,
        claim: str | None = None,
        reason: str | None = None,
        expected: str | None = None,
        actual: str | None = None,
    ) -> None:
        self.step: int = step
        self.claim: str | None = claim
        self.reason: str | None = reason
        self.expected: str | None = expected
        self.actual: str | None = actual
        fields = (("claim", claim), ("reason", reason), ("expected", expected), ("actual", actual))
        super().__init__(code, CODES[code] + "".join(f"; {name}: {value}" for name, value in fields if value))


class RevokedToken(InvalidToken):
    """The token was valid and has been revoked: HTTP 401.

    Attributes: ``kind`` (jti, tok, sid, sub, client, kid or all) and ``entry_id``, the id of the trust-log entry, or
    None where the mirror does not keep it.
    """

    def __init__(self, *, kind: str, entry_id: str | None) -> None:
        self.kind: str = kind
        self.entry_id: str | None = entry_id
        super().__init__("token_revoked", step=6, reason=kind)


class Undecidable(VerifierError):
    """Nothing is known against the token, but it cannot be vouched for either: HTTP 503.

    Attributes: ``code``, ``reason``, ``retry_after_s`` (a hint), ``staleness_s`` (where revocations are the cause).
    """

    def __init__(
        self,
        code: str,
        *,
        reason: str | None = None,
        retry_after_s: float = 1.0,
        staleness_s: float | None = None,
    ) -> None:
        self.reason: str | None = reason
        self.retry_after_s: float = retry_after_s
        self.staleness_s: float | None = staleness_s
        super().__init__(code, CODES[code] + (f"; reason: {reason}" if reason else ""))


class ConfigurationError(VerifierError):
    """A setting is missing or wrong. ``setting`` names it; the message says what to do."""

    def __init__(self, code: str, message: str, *, setting: str | None = None) -> None:
        self.setting: str | None = setting
        super().__init__(code, message)
