"""Invariant: KeySet.from_document raises JwksError, or holds sound public keys of distinct kids and names the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from tests.verifier import vectors
from verifier import ConfigurationError, InvalidToken
from verifier.jwk import KEY_TYPES, JwksError, KeySet
from verifier.jws import verify_compact


def check(data: bytes) -> None:
    keys = attempt(data)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        assert keys is None, "accepted what is no JSON"
        return
    loose = attempt(document)
    if keys is not None:
        assert loose is not None
        assert (keys.kids, keys.rejected) == (loose.kids, loose.rejected), "bytes and mapping are read differently"
        sound(keys, document)
    if isinstance(document, dict):
        for algorithms in (("RS256", "ES256"), ("HS256",)):
            for token in (vectors.COOKBOOK_RS256_TOKEN, vectors.A3_TOKEN, vectors.COOKBOOK_HS256_TOKEN):
                verified(token, document, algorithms)


def attempt(document: Any) -> KeySet | None:
    try:
        return KeySet.from_document(document)
    except JwksError:
        return None


def sound(keys: KeySet, document: Mapping[str, Any]) -> None:
    assert len(keys) > 0
    assert len(keys) + len(keys.rejected) == len(document["keys"]), "a key was lost"
    assert len(set(keys.kids)) == len(keys.kids)
    left_out = {index for index, _ in keys.rejected}
    for index, jwk in enumerate(document["keys"]):
        if index in left_out:
            continue
        assert KEY_TYPES[jwk.get("alg", "RS256" if jwk["kty"] == "RSA" else "ES256")] == jwk["kty"]
        assert not {"d", "k", "p", "q"} & set(jwk), "a private member"


def verified(token: str, document: Mapping[str, Any], algorithms: tuple[str, ...]) -> None:
    with contextlib.suppress(InvalidToken, ConfigurationError):
        verify_compact(token, document, algorithms)
