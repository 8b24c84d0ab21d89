"""OAuth clients: what one is, the TOML file that lists some, and the check of their secrets.

    [[clients]]
    client_id = "orders"
    secret_hash = "$argon2id$…"          # `keyservice clients hash`
    scopes = ["orders:read"]
    audiences = ["orders"]
    token_alg = "RS256"                  # or "HS256" for a client that cannot read RS256 yet
    introspect = false                   # true: may ask /oauth2/introspect
    jwks = { keys = [{ … }] }            # public keys for private_key_jwt, beside a secret or instead of one

Others are made by the admin API (:mod:`keyservice.registry`). Secrets are stored as Argon2id hashes. A hash costs about
20 ms, so it is computed in threads of its own, and a secret that was right a moment ago is recognised by a keyed hash
under a key that only this process has. An unknown client costs what a wrong secret costs.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
import tomllib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec
from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import Argon2Error, InvalidHashError

from verifier.jwk import JwksError, KeySet

from .errors import KeyserviceError, SettingError
from .limits import (
    ARGON2_MEMORY_KIB,
    ARGON2_PARALLELISM,
    ARGON2_THREADS,
    ARGON2_TIME_COST,
    ARGON2_WAITING_MAX,
    CLIENT_ID_CHARS_MAX,
    CLIENT_KEYS_MAX,
    CLIENT_LIST_MAX,
    CLIENT_SECRET_CHARS_MAX,
    CLIENTS_MAX,
    VERIFIED_SECRET_TTL_S,
    VERIFIED_SECRETS_MAX,
)

__all__ = [
    "ASSERTION_ALGORITHMS",
    "Authenticator",
    "Client",
    "ClientLookup",
    "Clients",
    "TooManyLogins",
    "client_problem",
    "hash_secret",
    "load_clients",
]

ASSERTION_ALGORITHMS: Final = ("ES256", "PS256", "RS256")
"""What a client may sign its assertions with."""

T = TypeVar("T")
_hasher: Final = PasswordHasher(ARGON2_TIME_COST, ARGON2_MEMORY_KIB, ARGON2_PARALLELISM)


class TooManyLogins(KeyserviceError):
    """More client secrets wait to be checked than is good for the machine: HTTP 503."""

    def __init__(self) -> None:
        super().__init__("temporarily_unavailable", "too many client authentications are waiting")


class Client(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[clients]]`` table. A client has a secret, or public keys, or both."""

    client_id: str
    secret_hash: str = ""
    scopes: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    token_alg: Literal["RS256", "HS256"] = "RS256"
    introspect: bool = False
    jwks: dict[str, Any] | None = None

    @property
    def keys(self) -> KeySet | None:
        """Its public keys; None if it has none."""
        return None if self.jwks is None else _key_set(msgspec.json.encode(self.jwks))

    def __repr__(self) -> str:
        return f"Client({self.client_id!r})"


Clients = dict[str, Client]


class ClientLookup(Protocol):
    """Where clients are found: a :data:`Clients`, or whatever else has them."""

    def get(self, client_id: str, /) -> Client | None:
        """The client with this id, or None."""


@lru_cache(CLIENTS_MAX)
def _key_set(document: bytes) -> KeySet:
    return KeySet.from_document(document)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    clients: tuple[Client, ...]


def hash_secret(secret: str) -> str:
    """The Argon2id hash that belongs into a clients file."""
    return _hasher.hash(secret)


def load_clients(path: Path) -> Clients:
    """Read and check a clients file; raises :class:`SettingError` naming the file and what is wrong in it."""
    try:
        tables = tomllib.loads(path.read_bytes().decode())
        listed = msgspec.convert(tables, _File).clients
    except OSError as error:
        raise _wrong(path, error.strerror or "cannot be read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(path, f"is not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise _wrong(path, str(error)) from None
    clients: Clients = {}
    for index, client in enumerate(listed):
        problem = "is there twice" if client.client_id in clients else client_problem(client)
        if problem is not None:
            raise _wrong(path, f"clients[{index}] ({client.client_id[:64]}): {problem}")
        clients[client.client_id] = client
    return clients


def _wrong(path: Path, problem: str) -> SettingError:
    return SettingError("clients_file_invalid", f"KEYSERVICE_CLIENTS_FILE: {path}: {problem}")


def client_problem(client: Client) -> str | None:
    """What is wrong with a client, or None."""
    if not 0 < len(client.client_id.encode()) <= CLIENT_ID_CHARS_MAX or not client.client_id.isprintable():
        return f"client_id has 1 to {CLIENT_ID_CHARS_MAX} bytes of printable text"
    if not client.audiences:
        return "audiences is empty"
    if max(len(client.audiences), len(client.scopes)) > CLIENT_LIST_MAX:
        return f"there are more than {CLIENT_LIST_MAX} scopes or audiences"
    if any(not scope or set(scope) & set(' "\\') or not scope.isprintable() for scope in client.scopes):
        return "a scope is a word without spaces"
    if not client.secret_hash and client.jwks is None:
        return "it has neither secret_hash nor jwks"
    return _secret_problem(client.secret_hash) or _keys_problem(client)


def _secret_problem(secret_hash: str) -> str | None:
    try:
        kind = extract_parameters(secret_hash).type.name if secret_hash else "ID"
    except (InvalidHashError, ValueError):
        kind = ""
    return None if kind == "ID" else "secret_hash is not an Argon2id hash (make one with `keyservice clients hash`)"


def _keys_problem(client: Client) -> str | None:
    try:
        keys = client.keys
    except JwksError as error:
        return f"jwks: {error.reason}"
    if keys is None:
        return None
    if keys.rejected:
        index, reason = keys.rejected[0]
        return f"jwks: key {index}: {reason}"
    if len(keys) > CLIENT_KEYS_MAX:
        return f"jwks has more than {CLIENT_KEYS_MAX} keys"
    if any(key.alg not in ASSERTION_ALGORITHMS for key in keys):
        return f"jwks: alg is one of {', '.join(ASSERTION_ALGORITHMS)}"
    return None


class Authenticator:
    """Checks client secrets. ``authenticate`` is to be awaited on one event loop."""

    def __init__(self, clients: ClientLookup, *, mono: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self._mono = mono
        self._key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, float] = OrderedDict()
        self._executor = ThreadPoolExecutor(ARGON2_THREADS, thread_name_prefix="argon2")
        self._waiting = 0
        self._nobody = hash_secret(secrets.token_hex(16))

    async def authenticate(self, client_id: str, secret: str) -> Client | None:
        """The client, if the secret is its own; None otherwise. Raises :class:`TooManyLogins`."""
        if len(secret) > CLIENT_SECRET_CHARS_MAX or len(client_id) > CLIENT_ID_CHARS_MAX:
            return None
        client = self._clients.get(client_id)
        expected = client.secret_hash if client is not None and client.secret_hash else self._nobody
        mark = hmac.digest(self._key, f"{expected}\0{secret}".encode(), "sha256")
        if client is not None and self._recently_verified(mark):
            return client
        if not await self._matches(expected, secret) or client is None or not client.secret_hash:
            return None
        self._remember(mark)
        return client

    async def hash(self, secret: str) -> str:
        """The Argon2id hash of a new secret. Raises :class:`TooManyLogins`."""
        return await self._work(hash_secret, secret)

    async def _matches(self, expected: str, secret: str) -> bool:
        return await self._work(_verify, expected, secret)

    async def _work(self, function: Callable[..., T], *arguments: str) -> T:
        if self._waiting >= ARGON2_WAITING_MAX:
            raise TooManyLogins
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        finally:
            self._waiting -= 1

    def _recently_verified(self, mark: bytes) -> bool:
        until = self._verified.get(mark)
        return until is not None and self._mono() < until

    def _remember(self, mark: bytes) -> None:
        self._verified[mark] = self._mono() + VERIFIED_SECRET_TTL_S
        self._verified.move_to_end(mark)
        while len(self._verified) > VERIFIED_SECRETS_MAX:
            self._verified.popitem(last=False)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _verify(expected: str, secret: str) -> bool:
    try:
        return _hasher.verify(expected, secret)
    except Argon2Error:
        return False
