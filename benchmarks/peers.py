"""Other people's JWT libraries for Python, each set up in its fastest documented way, with the checks that it has.

All check signature, `exp`, `iss` and `aud`, want `exp` and `iat` to be there, and are told which algorithm is allowed.
None of them looks at revocations or bounds a token's lifetime.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.metadata import version
from typing import Any

import jwt
import oxyjwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from jose import jwk as jose_jwk
from jose import jwt as jose_jwt
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import RSAKey

from benchmarks.configuration import AUDIENCE, ISSUER
from verifier.testing import SigningKey, StaticKeys
from verifier.token import parse

__all__ = ["RAW", "Batch", "Each", "each", "python_peers", "raw_check", "serve_jwks", "versions"]

RAW = "raw check (pyca)"
LIBRARIES = ("authlib", "cryptography", "joserfc", "oxyjwt", "pyjwt", "python-jose")

Each = Callable[[str], object]
"""One verification; raises if it refuses."""

Batch = Callable[[], object]
"""One verification of every token."""


def each(verify: Each, tokens: list[str]) -> Batch:
    def batch() -> None:
        for token in tokens:
            verify(token)

    return batch


def raw_check(key: SigningKey, tokens: list[str]) -> Batch:
    """The signature check alone, everything else done beforehand: what no verifier over pyca can be faster than."""
    public, pkcs1, sha256 = key.private.public_key(), padding.PKCS1v15(), hashes.SHA256()
    parts = [(parsed.signature, parsed.signing_input) for parsed in map(parse, tokens)]

    def batch() -> None:
        for signature, signing_input in parts:
            public.verify(signature, signing_input, pkcs1, sha256)

    return batch


@contextmanager
def serve_jwks(keys: StaticKeys) -> Iterator[str]:
    """The URL of a JWK set on loopback."""
    body = json.dumps(keys.jwks).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/jwks.json"
        finally:
            server.shutdown()
            thread.join()


def python_peers(key: SigningKey, jwks_url: str) -> dict[str, Each]:
    """Name to one verification."""
    return {
        "PyJWT, key object": _pyjwt(key),
        "PyJWT, JWKS client": _pyjwt_client(jwks_url),
        "python-jose": _python_jose(key),
        "joserfc, key object": _joserfc(key),
        "authlib, key object": _authlib(key),
        "oxyjwt, key object": _oxyjwt(key),
    }


def _pyjwt(key: SigningKey) -> Each:
    public = key.private.public_key()
    settings: dict[str, Any] = {"algorithms": ["RS256"], "audience": AUDIENCE, "issuer": ISSUER}
    options: Any = {"require": ["exp", "iat"]}
    return lambda token: jwt.decode(token, public, options=options, **settings)


def _pyjwt_client(jwks_url: str) -> Each:
    client = jwt.PyJWKClient(jwks_url, cache_keys=True, lifespan=86_400)
    settings: dict[str, Any] = {"algorithms": ["RS256"], "audience": AUDIENCE, "issuer": ISSUER}
    options: Any = {"require": ["exp", "iat"]}
    return lambda token: jwt.decode(token, client.get_signing_key_from_jwt(token), options=options, **settings)


def _python_jose(key: SigningKey) -> Each:
    prepared = jose_jwk.construct(dict(key.jwk), "RS256")
    options = {"require_exp": True, "require_iat": True}
    return lambda token: jose_jwt.decode(
        token, prepared, algorithms=["RS256"], audience=AUDIENCE, issuer=ISSUER, options=options
    )


def _joserfc(key: SigningKey) -> Each:
    prepared = RSAKey.import_key(dict(key.jwk))
    registry = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": AUDIENCE},
        exp={"essential": True},
        iat={"essential": True},
    )
    return lambda token: registry.validate(joserfc_jwt.decode(token, prepared, algorithms=["RS256"]).claims)


def _authlib(key: SigningKey) -> Each:
    with warnings.catch_warnings(record=True):  # it says at import that joserfc is its successor
        module = import_module("authlib.jose")
    library, prepared = module.JsonWebToken(["RS256"]), module.JsonWebKey.import_key(dict(key.jwk))
    wanted = {
        "iss": {"essential": True, "value": ISSUER},
        "aud": {"essential": True, "value": AUDIENCE},
        "exp": {"essential": True},
        "iat": {"essential": True},
    }
    return lambda token: library.decode(token, prepared, claims_options=wanted).validate()


def _oxyjwt(key: SigningKey) -> Each:
    pem = key.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    prepared = oxyjwt.DecodingKey.from_rsa_pem(pem)
    options = {"require": ["exp", "iat"]}
    return lambda token: oxyjwt.decode(
        token, prepared, algorithms=["RS256"], audience=AUDIENCE, issuer=ISSUER, options=options
    )


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}
