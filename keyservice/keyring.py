"""The keys in memory: the JWKS document of all regions, and this region's private keys ready to sign.

Both are made from one reading of the region's own replica, so an instance never signs with a key that its own JWKS
does not show: records, private keys and document are taken over together, or, if the document is none that a verifier
would take whole, not at all. Records are merged, not replaced: a replica that comes back empty takes no key away.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jose import jwk as jose_jwk

from verifier.jwk import JwksError, KeySet, thumbprint
from verifier.log import Generation

from .core import rotation
from .core.rotation import PUBLISHED_STATES, SIGNING_STATES, KeyRecord
from .envelope import Kek, unwrap, wrap
from .errors import EnvelopeError, SigningUnavailable
from .issuing import SigningKey
from .limits import RSA_BITS
from .trust import KeysView

__all__ = ["Document", "Keyring", "NewKey", "make_document", "new_key", "reopen"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """A JWK set as it is served. ``etag`` is quoted (RFC 9110 section 8.8.3)."""

    body: bytes
    etag: str
    generation: Generation
    keys: KeySet


def make_document(records: Mapping[str, KeyRecord], generation: Generation) -> Document | None:
    """The set of all regions' published keys in a stable order; None if there is none to publish.

    Raises :class:`JwksError` if the result is not a set that a verifier would take whole.
    """
    published = [record for record in records.values() if record.state in PUBLISHED_STATES]
    if not published:
        return None
    published.sort(key=lambda record: (record.region, record.published_at or 0, record.kid))
    body = msgspec.json.encode({"keys": [record.jwk for record in published]})
    keys = KeySet.from_document(body)
    if keys.rejected:
        raise JwksError("a key of the set is not usable")
    return Document(body, f'"{hashlib.sha256(body).hexdigest()}"', generation, keys)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A private key's two forms at rest: public JWK and wrapped envelope."""

    kid: str
    jwk: dict[str, str]
    envelope: str


def _public_jwk(private: rsa.RSAPrivateKey) -> dict[str, str]:
    """RFC 7517 public members; ``kid`` is the RFC 7638 thumbprint."""
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    members = jose_jwk.construct(public.decode(), "RS256").to_dict()
    bare = {name: str(members[name]) for name in ("kty", "n", "e")}
    return {**bare, "use": "sig", "alg": "RS256", "kid": thumbprint(bare)}


def new_key(kek: Kek, region: str) -> NewKey:
    """Generate and wrap a key. Takes about 50 ms of CPU: not for the event loop."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=RSA_BITS)
    public = _public_jwk(private)
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return NewKey(public["kid"], public, wrap(der, kek, region=region, kid=public["kid"]))


def _load(envelope: bytes | str, kek: Kek, region: str, kid: str) -> rsa.RSAPrivateKey:
    private = serialization.load_der_private_key(unwrap(envelope, kek, region=region, kid=kid), None)
    if not isinstance(private, rsa.RSAPrivateKey):
        raise EnvelopeError("envelope_invalid", f"key {kid} is not an RSA key")
    return private


def reopen(envelope: bytes | str, kek: Kek, region: str, kid: str) -> NewKey:
    """A stored private key again, for which no public record was written; raises :class:`EnvelopeError`."""
    public = _public_jwk(_load(envelope, kek, region, kid))
    if public["kid"] != kid:
        raise EnvelopeError("envelope_invalid", f"key {kid} is stored under another name")
    return NewKey(kid, public, envelope if isinstance(envelope, str) else envelope.decode())


def _signing_key(envelope: bytes, kek: Kek, region: str, kid: str) -> SigningKey:
    private = _load(envelope, kek, region, kid)
    if _public_jwk(private)["kid"] != kid:
        raise EnvelopeError("envelope_invalid", f"key {kid} is stored under another name")
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return SigningKey(kid, pem)


class Keyring:
    """Records, document and private keys of one instance. Changed only on the event loop."""

    def __init__(self, kek: Kek, region: str, *, is_revoked: Callable[[str], bool], executor: Executor) -> None:
        self._kek = kek
        self._region = region
        self._is_revoked = is_revoked
        self._executor = executor
        self._private: dict[str, SigningKey] = {}
        self._tried: dict[str, tuple[bytes, SigningKey | str]] = {}
        self._over: frozenset[str] = frozenset()
        self.records: dict[str, KeyRecord] = {}
        self.document: Document | None = None
        self.problem: str | None = None
        """Why a private key could not be opened (``kek_mismatch``, ``envelope_invalid``), or None."""
        self.refused: str | None = None
        """Why the last reading was not taken over, or None."""

    async def take(self, view: KeysView) -> bool:
        """Take over a reading of the replica, whole or not at all; False while a private key is missing."""
        records = rotation.merge(self.records, view.records.values())
        opened = await self._open(records, view.private)
        held = self.document.generation if self.document is not None else view.generation
        try:
            document = make_document(self._unrevoked(records), max(held, view.generation))
        except JwksError as error:
            if error.reason != self.refused:
                _log.error("key set not taken over", reason=error.reason)
            self.refused = error.reason
            self._over = frozenset(kid for kid, record in records.items() if record.state not in SIGNING_STATES)
            return True
        before = {kid: key for kid, key in self._private.items() if kid in records and self._is_mine(records[kid])}
        self._private = before | {kid: key for kid, key in opened.items() if not isinstance(key, str)}
        self.problem = next((code for kid, code in opened.items() if isinstance(code, str) and kid not in before), None)
        self.records, self.document, self.refused = records, document or self.document, None
        self._over = frozenset()
        return not self.missing_private

    def _unrevoked(self, records: Mapping[str, KeyRecord]) -> dict[str, KeyRecord]:
        return {kid: record for kid, record in records.items() if not self._is_revoked(kid)}

    def leave_out_revoked(self) -> None:
        """Serve no revoked key any more, before its record says so; a set that would then be empty is left."""
        if self.document is not None:
            with suppress(JwksError):
                self.document = make_document(self._unrevoked(self.records), self.document.generation) or self.document

    async def opens(self, view: KeysView) -> frozenset[str]:
        """The own kids of ``view`` whose private half opens."""
        opened = await self._open(view.records, view.private)
        return frozenset(kid for kid, key in opened.items() if not isinstance(key, str))

    async def _open(
        self, records: Mapping[str, KeyRecord], envelopes: Mapping[str, bytes]
    ) -> dict[str, SigningKey | str]:
        """Own keys that are not over, by kid: ready to sign, or the code of why not.

        An envelope is unwrapped in the executor, and once: what became of it is remembered.
        """
        found: dict[str, SigningKey | str] = {}
        for kid, record in records.items():
            if not self._is_mine(record):
                self._tried.pop(kid, None)
            elif kid in envelopes:
                tried = self._tried.get(kid)
                if tried is None or tried[0] != envelopes[kid]:
                    tried = self._tried[kid] = envelopes[kid], await self._try(kid, envelopes[kid])
                found[kid] = tried[1]
        return found

    async def _try(self, kid: str, envelope: bytes) -> SigningKey | str:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, _signing_key, envelope, self._kek, self._region, kid)
        except (EnvelopeError, ValueError) as error:
            code = error.code if isinstance(error, EnvelopeError) else "envelope_invalid"
            _log.error("private key not opened", kid=kid, code=code)
            return code

    def _is_mine(self, record: KeyRecord) -> bool:
        return record.region == self._region and record.state in SIGNING_STATES

    @property
    def active(self) -> KeyRecord | None:
        """The record of the key that this region signs with."""
        mine = [r for r in self.records.values() if r.region == self._region and r.state == "active"]
        return max(mine, key=lambda record: (record.active_at or 0, record.kid), default=None)

    @property
    def missing_private(self) -> tuple[str, ...]:
        """Own kids that have a public record and no private half that could be opened."""
        return tuple(kid for kid, r in self.records.items() if self._is_mine(r) and kid not in self._private)

    def signing_key(self) -> SigningKey:
        """The key to sign with now; raises :class:`SigningUnavailable` by name."""
        record = self.active
        if record is None:
            raise SigningUnavailable("no_signing_key", "this region has no active key yet")
        if self._is_revoked(record.kid):
            raise SigningUnavailable("signing_key_revoked", "the active key was revoked; its successor is on the way")
        if record.kid in self._over:
            raise SigningUnavailable("key_set_not_taken", "the active key was replaced, and the new set cannot be used")
        key = self._private.get(record.kid)
        if key is None:
            raise SigningUnavailable(
                self.problem or "private_key_missing", "the active key's private half is not at hand"
            )
        return key

    def foreign_kek(self, view: KeysView) -> str | None:
        """The id of another KEK that wraps a private key of this region, or None."""
        named = (self._named_kek(envelope) for kid, envelope in view.private.items())
        return next((kek_id for kek_id in named if kek_id != self._kek.kek_id), None)

    @staticmethod
    def _named_kek(envelope: bytes) -> str:
        try:
            return str(msgspec.json.decode(envelope)["kek_id"])[:16]
        except (msgspec.DecodeError, KeyError, TypeError):
            return "unreadable"
