"""JSON Web Keys (RFC 7517): from a document to keys that can verify, and nothing else. Pure.

A fetched set is untrusted input. One bad key does not spoil the rest: it is left out and named in ``rejected``. The
set as a whole is refused when it is not a set, has no usable key, or uses one ``kid`` twice.
"""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from .errors import InvalidToken
from .limits import HMAC_SECRET_BYTES_MIN, JWKS_BYTES_MAX, JWKS_KEYS_MAX, KID_BYTES_MAX, RSA_BITS_MAX, RSA_BITS_MIN
from .token import decode_segment, strict_json_object

__all__ = ["HmacKey", "JwksError", "KeySet", "PublicKey", "thumbprint"]

KEY_TYPES: Final = {"RS256": "RSA", "RS384": "RSA", "RS512": "RSA", "PS256": "RSA", "ES256": "EC"}
"""Signature algorithms (RFC 7518 section 3.1) and the key type each needs."""

_DIGESTS: Final[dict[str, hashes.HashAlgorithm]] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_REQUIRED: Final = {"RSA": ("e", "kty", "n"), "EC": ("crv", "kty", "x", "y")}

# ROCA (CVE-2017-15361): moduli of the flawed generator are powers of 65537 modulo every one of these primes.
_ROCA_PRIMES: Final = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


_PUBLIC_KEY_MARKS: Final = (b"-----BEGIN", b"---- BEGIN", b'"kty"')
_SSH_NAMES: Final = (b"ssh-", b"ecdsa-", b"sk-ssh-", b"sk-ecdsa-")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


class JwksError(ValueError):
    """A document is not a usable JWK set. ``reason`` is stable and holds nothing of the document."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class _KeyRefused(ValueError):
    """One key is not usable; the message says why."""


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """The RFC 7638 SHA-256 thumbprint, base64url without padding; raises :class:`JwksError`."""
    kty = jwk.get("kty")
    required = _REQUIRED.get(kty) if isinstance(kty, str) else None
    if required is None or not all(isinstance(jwk.get(name), str) and jwk[name].isascii() for name in required):
        raise JwksError("not a public RSA or EC key")
    canonical = msgspec.json.encode({name: jwk[name] for name in required})
    return urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()


_Verify = Callable[[bytes, bytes], None]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key bound to one algorithm. ``verify(signature, signing_input)`` raises ``InvalidSignature``."""

    kid: str | None
    alg: str
    thumbprint: str
    verify: _Verify = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class HmacKey:
    """A shared HS256 secret. ``verify`` compares in constant time; the secret is in no ``repr``."""

    kid: str | None
    verify: _Verify = field(repr=False, compare=False)
    alg: str = "HS256"

    @classmethod
    def from_secret(cls, secret: bytes, kid: str | None = None) -> HmacKey:
        """Raises :class:`ValueError` (``secret_too_short``, ``secret_is_public_key``)."""
        if len(secret) < HMAC_SECRET_BYTES_MIN:
            raise ValueError("secret_too_short")
        if _looks_like_public_key(secret):
            raise ValueError("secret_is_public_key")
        template = hmac.HMAC(secret, hashes.SHA256())

        def verify(signature: bytes, signing_input: bytes) -> None:
            mac = template.copy()
            mac.update(signing_input)
            mac.verify(signature)

        return cls(kid, verify)


def _looks_like_public_key(secret: bytes) -> bool:
    """PEM, an SSH line, a JWK, DER, or what stands between the lines of a PEM or in an SSH line: base64."""
    text = secret.strip()
    if any(mark in text for mark in _PUBLIC_KEY_MARKS) or text.startswith(_SSH_NAMES):
        return True
    try:
        decoded = a2b_base64(text.translate(_FROM_URL) + b"==")
    except Base64Error:
        decoded = b""
    return any(_is_der_key(raw) or raw[4:].startswith(_SSH_NAMES) for raw in (secret, decoded))


def _is_der_key(raw: bytes) -> bool:
    """A SEQUENCE whose length covers exactly the rest, and in it first a SEQUENCE or an INTEGER."""
    if raw[:1] != b"\x30" or len(raw) < 4:
        return False
    size = raw[1] & 0x7F if raw[1] & 0x80 else 0
    length = int.from_bytes(raw[2 : 2 + size], "big") if size else raw[1]
    return length == len(raw) - 2 - size and raw[2 + size : 3 + size] in (b"\x30", b"\x02")


def _octets(jwk: Mapping[str, Any], name: str) -> bytes:
    value = jwk.get(name)
    if not isinstance(value, str):
        raise _KeyRefused(f"{name} is missing")
    try:
        return decode_segment(value.encode("ascii"), name)
    except (InvalidToken, UnicodeEncodeError):
        raise _KeyRefused(f"{name} is not base64url") from None


def _uint(jwk: Mapping[str, Any], name: str) -> int:
    """A Base64urlUInt (RFC 7518 section 2), whose octets must be as few as possible."""
    raw = _octets(jwk, name)
    if raw[:1] == b"\0" and len(raw) > 1:
        raise _KeyRefused(f"{name} has leading zeros")
    return int.from_bytes(raw, "big")


def _coordinate(jwk: Mapping[str, Any], name: str) -> int:
    """Of P-256: exactly 32 octets, leading zeros included (RFC 7518 section 6.2.1.2)."""
    raw = _octets(jwk, name)
    if len(raw) != 32:
        raise _KeyRefused(f"{name} has not 32 octets")
    return int.from_bytes(raw, "big")


def _rsa_verify(jwk: Mapping[str, Any], alg: str) -> _Verify:
    n, e = _uint(jwk, "n"), _uint(jwk, "e")
    if not RSA_BITS_MIN <= n.bit_length() <= RSA_BITS_MAX:
        raise _KeyRefused(f"RSA modulus has {n.bit_length()} bits, not {RSA_BITS_MIN} to {RSA_BITS_MAX}")
    if e < 3 or e % 2 == 0 or e >= 2**33:
        raise _KeyRefused("RSA exponent is not an odd number from 3 to 2^33")
    if n % 2 == 0 or _is_roca(n):
        raise _KeyRefused("RSA modulus is weak")
    public_key = rsa.RSAPublicNumbers(e, n).public_key()
    digest = _DIGESTS[alg[2:]]
    if alg.startswith("PS"):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32)
        return lambda signature, data: public_key.verify(signature, data, pss, digest)
    pkcs1 = padding.PKCS1v15()
    return lambda signature, data: public_key.verify(signature, data, pkcs1, digest)


def _is_roca(n: int) -> bool:
    return all(_in_subgroup(n % prime, prime) for prime in _ROCA_PRIMES)


def _in_subgroup(residue: int, prime: int) -> bool:
    power = 1
    for _ in range(prime):
        if power == residue:
            return True
        power = power * 65537 % prime
    return False


def _ec_verify(jwk: Mapping[str, Any], alg: str) -> _Verify:
    if jwk.get("crv") != "P-256":
        raise _KeyRefused(f"{alg} needs crv P-256")
    x, y = _coordinate(jwk, "x"), _coordinate(jwk, "y")
    try:
        public_key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError:
        raise _KeyRefused("the point is not on the curve") from None
    algorithm = ec.ECDSA(hashes.SHA256())

    def verify(signature: bytes, data: bytes) -> None:
        if len(signature) != 64:  # RFC 7518 section 3.4: R and S as two 32-octet integers
            raise InvalidSignature
        der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
        public_key.verify(der, data, algorithm)

    return verify


def _is_short_text(kid: Any) -> bool:
    try:
        return isinstance(kid, str) and 0 < len(kid.encode()) <= KID_BYTES_MAX
    except UnicodeEncodeError:  # a lone surrogate, which no token's header can name
        return False


def _check_key_ops(key_ops: Any) -> None:
    """RFC 7517 section 4.3: strings, none twice; a key that may not verify is not for us."""
    if not isinstance(key_ops, list) or not all(isinstance(each, str) for each in key_ops):
        raise _KeyRefused("key_ops is not a list of strings")
    if "verify" not in key_ops:
        raise _KeyRefused("key_ops lacks verify")
    if len(set(key_ops)) != len(key_ops):
        raise _KeyRefused("key_ops names one twice")


def _public_key(jwk: Any) -> PublicKey:
    if not isinstance(jwk, dict):
        raise _KeyRefused("not an object")
    kty = jwk.get("kty")
    if not isinstance(kty, str) or kty not in _REQUIRED:
        raise _KeyRefused("kty is not RSA or EC; a symmetric key has no place in a set")
    if not _PRIVATE_MEMBERS.isdisjoint(jwk):
        raise _KeyRefused("holds private members")
    if jwk.get("use", "sig") != "sig":
        raise _KeyRefused("use is not sig")
    _check_key_ops(jwk.get("key_ops", ["verify"]))
    alg = jwk.get("alg", "RS256" if kty == "RSA" else "ES256")
    if not isinstance(alg, str) or KEY_TYPES.get(alg) != kty:
        raise _KeyRefused("alg does not fit kty")
    kid = jwk.get("kid")
    if kid is not None and not _is_short_text(kid):
        raise _KeyRefused("kid is not a short string")
    verify = _rsa_verify(jwk, alg) if kty == "RSA" else _ec_verify(jwk, alg)
    return PublicKey(kid, alg, thumbprint(jwk), verify)


class KeySet:
    """An immutable set of public keys by ``kid``. ``rejected`` names the keys that were left out, and why."""

    __slots__ = ("_by_kid", "_without_kid", "rejected")

    def __init__(self, keys: list[PublicKey], rejected: tuple[tuple[int, str], ...] = ()) -> None:
        self._by_kid: dict[str, PublicKey] = {}
        for key in keys:
            if key.kid is not None and self._by_kid.setdefault(key.kid, key) is not key:
                raise JwksError("one kid is used twice")
        self._without_kid = tuple(key for key in keys if key.kid is None)
        self.rejected = rejected

    @classmethod
    def from_document(cls, document: Mapping[str, Any] | bytes) -> KeySet:
        """Read a JWK set (RFC 7517 section 5); raises :class:`JwksError` and never half-reads one."""
        if isinstance(document, bytes):
            if len(document) > JWKS_BYTES_MAX:
                raise JwksError("the document is too large")
            try:
                document = strict_json_object(document)
            except ValueError:
                raise JwksError("the document is not a strict JSON object") from None
        if not isinstance(document, Mapping):
            raise JwksError("the document is neither a mapping nor bytes")
        members = document.get("keys")
        if not isinstance(members, list) or not 0 < len(members) <= JWKS_KEYS_MAX:
            raise JwksError(f"keys is not a list of 1 to {JWKS_KEYS_MAX}")
        keys: list[PublicKey] = []
        rejected: list[tuple[int, str]] = []
        for index, member in enumerate(members):
            try:
                keys.append(_public_key(member))
            except (_KeyRefused, ValueError) as error:
                rejected.append((index, str(error)))
        if not keys:
            raise JwksError("the set has no usable key")
        return cls(keys, tuple(rejected))

    def get(self, kid: str) -> PublicKey | None:
        """The key with this ``kid``, or None."""
        return self._by_kid.get(kid)

    def only_fit(self, alg: str) -> PublicKey | None:
        """The one key bound to ``alg``, for a token without a ``kid``; None if there is none or a choice."""
        fitting = [key for key in self if key.alg == alg]
        return fitting[0] if len(fitting) == 1 else None

    def __iter__(self) -> Iterator[PublicKey]:
        return iter((*self._by_kid.values(), *self._without_kid))

    def __len__(self) -> int:
        return len(self._by_kid) + len(self._without_kid)

    @property
    def kids(self) -> tuple[str, ...]:
        """Every ``kid`` held, in the document's order."""
        return tuple(self._by_kid)
