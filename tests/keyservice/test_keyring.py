"""The keys in memory: taken over whole or not at all, and only private keys that were really opened count."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from keyservice.core.rotation import KeyRecord, State
from keyservice.envelope import Kek
from keyservice.errors import SigningUnavailable
from keyservice.keyring import Keyring, NewKey, new_key
from keyservice.trust import KeysView
from verifier.limits import JWKS_KEYS_MAX
from verifier.testing import make_key

KEK = Kek(b"k" * 32)
EU = "eu-west-1"
KEYS = [new_key(KEK, EU) for _ in range(2)]
FOREIGN = make_key()


def record(key: NewKey, state: State, rev: int = 1) -> KeyRecord:
    return KeyRecord(kid=key.kid, region=EU, alg="RS256", jwk=key.jwk, state=state, rev=rev, published_at=1)


def foreign(count: int) -> list[KeyRecord]:
    """Another region's published keys, made up from one modulus."""
    made = []
    for n in range(count):
        jwk = {**FOREIGN.jwk, "kid": f"foreign-{n}"}
        made.append(KeyRecord(kid=jwk["kid"], region="us", alg="RS256", jwk=jwk, state="published", rev=1))
    return made


def view(*records: KeyRecord, private: dict[str, str] | None = None) -> KeysView:
    envelopes = {key.kid: key.envelope for key in KEYS} if private is None else private
    return KeysView(None, {r.kid: r for r in records}, {kid: text.encode() for kid, text in envelopes.items()})


def altered(key: NewKey) -> str:
    """An envelope that names the right KEK and does not open."""
    envelope = msgspec.json.decode(key.envelope)
    return msgspec.json.encode({**envelope, "data": envelope["key"]}).decode()


@pytest.fixture
def ring() -> Iterator[Keyring]:
    with ThreadPoolExecutor(1) as executor:
        yield Keyring(KEK, EU, is_revoked=lambda kid: False, executor=executor)


def shown(ring: Keyring) -> Any:
    assert ring.document is not None
    return ring.document.keys.kids


async def test_past_the_limit_of_a_set_nothing_of_it_is_taken_over(ring: Keyring) -> None:
    old, new = KEYS
    await ring.take(view(record(old, "active"), *foreign(JWKS_KEYS_MAX - 1)))
    assert len(shown(ring)) == JWKS_KEYS_MAX
    full = (record(old, "retiring", 2), record(new, "active"), *foreign(JWKS_KEYS_MAX - 1))
    with capture_logs() as logs:
        for _ in range(3):
            await ring.take(view(*full))
    assert new.kid not in ring.records
    assert len(logs) == 1
    assert old.kid in shown(ring)
    with pytest.raises(SigningUnavailable) as unavailable:
        ring.signing_key()  # it was replaced, and is removed sooner or later
    assert unavailable.value.code == "key_set_not_taken"
    await ring.take(view(record(old, "removed", 3), record(new, "active"), *foreign(JWKS_KEYS_MAX - 1)))
    assert ring.signing_key().kid == new.kid
    assert new.kid in shown(ring)


async def test_a_set_that_is_not_taken_over_stops_no_signing_by_a_key_that_is_still_active(ring: Keyring) -> None:
    old, new = KEYS
    await ring.take(view(record(old, "active")))
    await ring.take(view(record(old, "active"), record(new, "published"), *foreign(JWKS_KEYS_MAX)))
    assert ring.signing_key().kid in shown(ring)
    assert new.kid not in ring.missing_private


async def test_only_what_was_really_opened_is_usable(ring: Keyring) -> None:
    one, two = KEYS
    other = new_key(Kek(b"o" * 32), EU)
    private = {one.kid: one.envelope, two.kid: altered(two), other.kid: other.envelope}
    seen = view(record(one, "active"), record(two, "published"), record(other, "published"), private=private)
    assert await ring.opens(seen) == {one.kid}
    whole = view(*seen.records.values())
    assert await ring.opens(whole) == {one.kid, two.kid}


async def test_a_private_half_of_another_key_is_not_usable(ring: Keyring) -> None:
    from keyservice.envelope import unwrap, wrap

    one, two = KEYS
    der = unwrap(one.envelope, KEK, region=EU, kid=one.kid)
    swapped = wrap(der, KEK, region=EU, kid=two.kid)
    assert await ring.opens(view(record(two, "published"), private={two.kid: swapped})) == frozenset()


async def test_a_key_that_does_not_open_is_said_once_and_again_only_when_it_changes(ring: Keyring) -> None:
    one, two = KEYS
    broken = altered(two)
    seen = view(record(one, "active"), record(two, "published"), private={one.kid: one.envelope, two.kid: broken})
    with capture_logs() as logs:
        for _ in range(3):
            await ring.take(seen)
            await ring.opens(seen)
        assert [line["event"] for line in logs] == ["private key not opened"]
        assert (ring.problem, ring.missing_private) == ("envelope_invalid", (two.kid,))
        await ring.take(view(*seen.records.values(), private={one.kid: one.envelope, two.kid: broken + " "}))
        assert len(logs) == 2
    await ring.take(view(*seen.records.values()))
    assert (ring.problem, ring.missing_private) == (None, ())
