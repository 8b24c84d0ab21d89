"""The verified-token cache: as fast as it likes, never wrong (DESIGN 7)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from tests.verifier.support import ISSUER, NOW, Mirrored, code_of, make_verifier, members, raw_token, token_of
from verifier import ConfigurationError, InvalidToken, RevokedToken, Verifier
from verifier.cache import TokenCache
from verifier.decision import Verified, check_revoked, check_static
from verifier.testing import ManualClock, SigningKey


@contextmanager
def counted_static_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    seen: list[str] = []

    def counting(token: str, *rest: Any) -> Verified:
        seen.append(token)
        return check_static(token, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("verifier.judge.check_static", counting)
        yield seen


def test_a_hit_repeats_neither_signature_nor_claims(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored = Mirrored(key)
    token = token_of(key)
    with counted_static_checks(monkeypatch) as seen:
        first = mirrored.verifier.verify(token)
        assert mirrored.verifier.verify(str(token.encode(), "ascii")) is first
        assert len(seen) == 1
        mirrored.revoke("jti", "somebody else's")  # another world: step 6 again, not the rest
        assert mirrored.verifier.verify(token) is first
        assert len(seen) == 1


def test_a_cache_of_size_0_keeps_nothing(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make_verifier(key, token_cache_size=0)
    with counted_static_checks(monkeypatch) as seen:
        verifier.verify(token_of(key))
        verifier.verify(token_of(key))
    assert len(seen) == 2
    assert verifier.status().token_cache_entries == 0


def test_the_ttl_ends_a_hit_exactly(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock(NOW)
    verifier = make_verifier(key, clock=clock, token_cache_ttl_s=10)
    with counted_static_checks(monkeypatch) as seen:
        for step, checks in ((0, 1), (9.999, 1), (0.001, 2), (9.999, 2), (0.001, 3)):
            clock.advance(step)
            verifier.verify(token_of(key))
            assert len(seen) == checks


def test_a_ttl_of_0_never_hits(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make_verifier(key, token_cache_ttl_s=0)
    with counted_static_checks(monkeypatch) as seen:
        verifier.verify(token_of(key))
        verifier.verify(token_of(key))
    assert len(seen) == 2


def test_refused_tokens_are_not_kept_and_evict_nothing(key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make_verifier(key, token_cache_size=4)
    good = token_of(key)
    verifier.verify(good)
    for index in range(50):
        code_of(verifier, token_of(key, jti=str(index))[:-6] + "AAAAAA")
    with counted_static_checks(monkeypatch) as seen:
        verifier.verify(good)
    assert not seen
    assert verifier.status().token_cache_entries == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_the_cache_keeps_to_its_size_and_remembers_what_is_used(size: int) -> None:
    cache: TokenCache[int] = TokenCache(size)
    for number in range(100):
        cache.put(str(number), number)
        assert cache.find(str(number)) == number
        assert len(cache) <= size
    if size >= 4:
        cache.put("used", -1)
        for number in range(100):
            cache.put(str(number), number)
            assert cache.find("used") == -1
    cache.clear()
    assert len(cache) == 0
    assert cache.find("99") is None


# -- revocations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"), [("jti", "t-1"), ("sid", "s-1"), ("sub", "ada"), ("client", "web"), ("all", ""), ("kid", None)]
)
def test_a_revocation_works_at_once_although_the_token_is_cached(key: SigningKey, kind: str, value: str | None) -> None:
    mirrored = Mirrored(key)
    token = token_of(key, sid="s-1", client_id="web")
    mirrored.verifier.verify(token)
    entry_id = mirrored.revoke(kind, key.kid if value is None else value)
    for _ in range(2):
        with pytest.raises(RevokedToken) as caught:
            mirrored.verifier.verify(token)
        assert (caught.value.kind, caught.value.entry_id, caught.value.step) == (kind, entry_id, 6)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("jti", "t-2"), ("sid", "t-1"), ("sub", "Ada"), ("client", "ada"), ("kid", "t-1"), ("tok", "t-1")],
)
def test_a_revocation_of_something_else_does_not_hit(key: SigningKey, kind: str, value: str) -> None:
    mirrored = Mirrored(key)
    token = token_of(key, sid="s-1", client_id="web")
    mirrored.revoke(kind, value)
    assert mirrored.verifier.verify(token)


def test_a_revocation_of_another_issuer_does_not_hit(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    for kind, value in (("jti", "t-1"), ("sub", "ada"), ("all", ""), ("kid", key.kid)):
        mirrored.revocations.revoke(kind, value, issuer=ISSUER + "/other")
    assert mirrored.verifier.verify(token_of(key))


def test_a_token_without_jti_is_revoked_by_the_hash_of_what_was_signed(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    token = raw_token(key, payload=msgspec.json.encode(members(jti=None)))
    mirrored.verifier.verify(token)
    mirrored.revoke("tok", hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest())
    assert code_of(mirrored.verifier, token) == "token_revoked"


def test_a_cut_off_hits_what_was_issued_at_its_second_and_not_later(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    mirrored.revoke("sub", "ada", before=NOW)
    assert code_of(mirrored.verifier, token_of(key, iat=NOW)) == "token_revoked"
    assert code_of(mirrored.verifier, token_of(key, iat=NOW - 0.5)) == "token_revoked"
    assert mirrored.verifier.verify(token_of(key, iat=NOW + 1))


def test_a_cut_off_that_the_token_names_does_not_hit_it_and_another_one_does(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    known = mirrored.revoke("sub", "ada", before=NOW + 5)
    fresh = token_of(key, after=[known])
    assert mirrored.verifier.verify(fresh)
    assert code_of(mirrored.verifier, token_of(key, after=["another"])) == "token_revoked"
    mirrored.revoke("all", "", before=NOW + 5)
    assert code_of(mirrored.verifier, fresh) == "token_revoked"


def test_naming_an_entry_in_after_does_not_undo_an_exact_revocation(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    entry_id = mirrored.revoke("jti", "t-1")
    assert code_of(mirrored.verifier, token_of(key, after=[entry_id])) == "token_revoked"


def test_a_token_without_iat_is_hit_by_every_cut_off_on_it(key: SigningKey) -> None:
    mirrored = Mirrored(key, require_iat=False)
    token = raw_token(key, payload=msgspec.json.encode(members(iat=None)))
    assert mirrored.verifier.verify(token)
    mirrored.revoke("sub", "ada", before=1)
    assert code_of(mirrored.verifier, token) == "token_revoked"


def test_a_verification_overtaken_by_a_revocation_cannot_bring_the_token_back(
    key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = Mirrored(key)
    token = token_of(key)

    def overtaken(*args: Any) -> None:
        check_revoked(*args)
        mirrored.revoke("jti", "t-1")  # after the old world was asked, before the result is kept

    with monkeypatch.context() as patch:
        patch.setattr("verifier.judge.check_revoked", overtaken)
        mirrored.verifier.verify(token)  # began before the revocation: either answer would do
    for _ in range(3):
        assert code_of(mirrored.verifier, token) == "token_revoked"


def test_a_hit_overtaken_by_a_revocation_cannot_bring_the_token_back(
    key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = Mirrored(key)
    token = token_of(key)
    mirrored.verifier.verify(token)
    mirrored.revoke("jti", "somebody else's")

    def overtaken(*args: Any) -> None:
        check_revoked(*args)
        mirrored.revoke("jti", "t-1")

    with monkeypatch.context() as patch:
        patch.setattr("verifier.judge.check_revoked", overtaken)
        mirrored.verifier.verify(token)
    assert code_of(mirrored.verifier, token) == "token_revoked"


def test_no_thread_accepts_a_token_after_its_revocation_was_applied(key: SigningKey) -> None:
    mirrored = Mirrored(key, token_cache_size=8)
    tokens = [token_of(key, jti=f"r-{number}", sub=f"s-{number}") for number in range(24)]
    revoked_until = 0
    wrong: list[int] = []
    done = threading.Event()

    def verify_all(verifier: Verifier) -> None:
        while not done.is_set():
            for number, token in enumerate(tokens):
                known = revoked_until
                try:
                    verifier.verify(token)
                except InvalidToken:
                    continue
                if number < known:
                    wrong.append(number)

    threads = [threading.Thread(target=verify_all, args=(mirrored.verifier,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(len(tokens)):
        for filler in range(20):
            mirrored.revoke("jti", f"filler-{number}-{filler}")
            mirrored.revocations.beat()
        mirrored.revoke("jti", f"r-{number}")
        revoked_until = number + 1
    done.set()
    for thread in threads:
        thread.join(10)
    assert not wrong
    assert {code_of(mirrored.verifier, token) for token in tokens} == {"token_revoked"}


def test_a_revocation_of_a_key_says_so_also_when_no_set_holds_the_key(key: SigningKey, other_key: SigningKey) -> None:
    mirrored = Mirrored(other_key)
    assert code_of(mirrored.verifier, token_of(key)) == "kid_unknown"
    mirrored.revoke("kid", key.kid)
    assert code_of(mirrored.verifier, token_of(key)) == "token_revoked"


# -- life ------------------------------------------------------------------------------------------------------------


def test_a_closed_verifier_answers_no_cached_token_either(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    token = token_of(key)
    mirrored.verifier.verify(token)
    mirrored.verifier.close()
    with pytest.raises(ConfigurationError) as caught:
        mirrored.verifier.verify(token)
    assert caught.value.code == "not_started"
    assert mirrored.verifier.start().verify(token)


async def test_averify_gives_the_same_answers(key: SigningKey) -> None:
    mirrored = Mirrored(key)
    token = token_of(key)
    async with mirrored.verifier as verifier:
        assert (await verifier.averify(token)) is verifier.verify(token)
        mirrored.revoke("jti", "t-1")
        with pytest.raises(RevokedToken):
            await verifier.averify(token)
        with pytest.raises(InvalidToken):
            await verifier.averify("nonsense")
        with pytest.raises(InvalidToken):
            await verifier.averify([])  # type: ignore[arg-type]
