"""Private keys at rest: wrapped twice, and opened only in this process.

The key (PKCS #8, DER) is encrypted under a fresh data key with AES-256-GCM, and the data key under the region's
key-encryption key (KEK), also with AES-256-GCM. Both bind region and ``kid`` as associated data, so an envelope moved
to another region or another key does not open. An envelope names its KEK by ``kek_id``: a wrong KEK is a mismatch with
a name, never "no keys".
"""

from __future__ import annotations

import base64
import hashlib
import os
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .errors import EnvelopeError

__all__ = ["Kek", "Sealed", "unwrap", "wrap"]

_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32


class Sealed:
    """Base of types that hold a secret: nothing of it in ``repr``, and no pickling or copying."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(f"a {type(self).__name__} is not to be serialised")


class Kek(Sealed):
    """A region's key-encryption key of 256 bits."""

    __slots__ = ("_key", "kek_id")

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError("a KEK has 32 bytes")
        self._key = key
        self.kek_id: Final = hashlib.sha256(b"kek id" + key).hexdigest()[:16]

    def cipher(self) -> AESGCM:
        """AES-256-GCM under this key."""
        return AESGCM(self._key)


class _Envelope(msgspec.Struct, frozen=True):
    """The JSON in ``{ks}:private:<region>``; ``key`` and ``data`` are base64 of nonce and ciphertext."""

    v: int
    kek_id: str
    key: str
    data: str


def _aad(region: str, kid: str) -> bytes:
    return msgspec.json.encode(["private key", region, kid])


def _seal(cipher: AESGCM, plain: bytes, aad: bytes) -> str:
    nonce = os.urandom(_NONCE_BYTES)
    return base64.b64encode(nonce + cipher.encrypt(nonce, plain, aad)).decode()


def _open(cipher: AESGCM, sealed: str, aad: bytes) -> bytes:
    raw = base64.b64decode(sealed, validate=True)
    return cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], aad)


def wrap(private: bytes, kek: Kek, *, region: str, kid: str) -> str:
    """The envelope of a private key, as JSON."""
    data_key = AESGCM.generate_key(256)
    aad = _aad(region, kid)
    envelope = _Envelope(1, kek.kek_id, _seal(kek.cipher(), data_key, aad), _seal(AESGCM(data_key), private, aad))
    return msgspec.json.encode(envelope).decode()


def unwrap(text: str | bytes, kek: Kek, *, region: str, kid: str) -> bytes:
    """The private key; raises :class:`EnvelopeError` (``kek_mismatch``, ``envelope_invalid``)."""
    try:
        envelope = msgspec.json.decode(text, type=_Envelope)
    except msgspec.DecodeError:
        raise EnvelopeError("envelope_invalid", f"the envelope of key {kid} cannot be read") from None
    if envelope.kek_id != kek.kek_id:
        message = f"key {kid} is wrapped under KEK {envelope.kek_id[:16]}, and KEYSERVICE_KEK is {kek.kek_id}"
        raise EnvelopeError("kek_mismatch", message)
    aad = _aad(region, kid)
    try:
        return _open(AESGCM(_open(kek.cipher(), envelope.key, aad)), envelope.data, aad)
    except (InvalidTag, ValueError):
        raise EnvelopeError("envelope_invalid", f"the envelope of key {kid} was altered or is another key's") from None
