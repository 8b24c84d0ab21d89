"""The ``Trust-Position`` header: a request is judged by what was known there, and makes nobody wait who may not."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import httpx
import pytest

from tests.verifier.support import ISSUER, NONCE, NOW, Mirrored, make_verifier, token_of
from tests.verifier.test_asgi import bearer, client_of, who
from verifier import Verifier
from verifier.asgi import AuthMiddleware
from verifier.testing import ManualClock, SigningKey, StaticRevocations


@pytest.fixture
def app(key: SigningKey) -> AuthMiddleware:
    return AuthMiddleware(who, Mirrored(key).verifier)


def at(token: str, position: str) -> dict[str, str]:
    return bearer(token) | {"Trust-Position": position}


class Waits:
    """How many have waited for a position so far, and whether somebody does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.began = asyncio.Event()
        wait = Verifier._await_position_off_loop

        async def counted(verifier: Verifier, wanted: Any) -> None:
            self.count += 1
            self.began.set()
            await wait(verifier, wanted)

        patch.setattr(Verifier, "_await_position_off_loop", counted)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


async def test_a_request_with_a_position_is_judged_by_what_was_known_there(key: SigningKey, waits: Waits) -> None:
    """It waits for an entry that is on its way, and its token, good before, is refused by it."""
    source, token = StaticRevocations(clock=ManualClock(NOW)), token_of(key)
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=60).start()
    async with client_of(AuthMiddleware(who, verifier)) as client:
        assert (await client.get("/", headers=at(token, f"1-0.{NONCE}"))).status_code == 200
        waits.began.clear()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await client.get("/", headers=at(token, f"1-1.{NONCE}")))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await asyncio.wait_for(waits.began.wait(), 60)
            await asyncio.to_thread(source.revoke, "jti", "t-1", issuer=ISSUER)  # from another thread, as a mirror does
    verifier.close()
    assert (answers[0].status_code, answers[0].json()["code"]) == (401, "token_revoked")


async def test_while_requests_wait_for_their_position_the_loop_and_its_threads_serve_others(
    key: SigningKey, waits: Waits
) -> None:
    source = StaticRevocations(clock=ManualClock(NOW))
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=3).start()
    answers: list[httpx.Response] = []
    async with client_of(AuthMiddleware(who, verifier)) as client, anyio.create_task_group() as group:

        async def ask() -> None:
            answers.append(await client.get("/", headers=at(token_of(key), f"1-9.{NONCE}")))

        for _ in range(100):  # more than the loop has threads
            group.start_soon(ask)
        await asyncio.wait_for(waits.began.wait(), 60)
        assert (await client.get("/", headers=bearer(token_of(key)))).status_code == 200
        await asyncio.to_thread(lambda: None)
    verifier.close()
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "position_not_reached")}
    assert {answer.headers["retry-after"] for answer in answers} == {"3"}


async def test_who_has_no_good_token_makes_nobody_wait(key: SigningKey, other_key: SigningKey, waits: Waits) -> None:
    source = StaticRevocations(clock=ManualClock(NOW))
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=0.01).start()
    async with client_of(AuthMiddleware(who, verifier, optional_paths=["/free"])) as client:
        for token in ("bad", token_of(key)[:-4] + "AAAA", token_of(key, exp=NOW - 100), token_of(other_key)):
            assert (await client.get("/", headers=at(token, f"1-9.{NONCE}"))).status_code == 401
        assert (await client.get("/free", headers={"Trust-Position": f"1-9.{NONCE}"})).status_code == 200
        assert waits.count == 0
        assert (await client.get("/", headers=at(token_of(key), f"1-9.{NONCE}"))).status_code == 503
        assert waits.count == 1
        ignoring = AuthMiddleware(who, verifier, trust_position=False)
        async with client_of(ignoring) as other:
            assert (await other.get("/", headers=at(token_of(key), f"1-9.{NONCE}"))).status_code == 200
            assert (await other.get("/", headers=at(token_of(key), "junk"))).status_code == 200
        assert waits.count == 1
    verifier.close()


@pytest.mark.parametrize(
    "position", ["", "1-1", "junk", f"1-1.{NONCE}x", f"01-1.{NONCE}", "\u00e9", f"1-1.{NONCE},1-1.{NONCE}"]
)
async def test_a_position_that_is_none_is_a_bad_request(app: AuthMiddleware, key: SigningKey, position: str) -> None:
    headers = [("Authorization", f"Bearer {token_of(key)}"), ("Trust-Position", position.encode("latin-1"))]
    async with client_of(app) as client:
        answer = await client.get("/orders", headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (400, "position_invalid")
    assert 'error="invalid_request"' in answer.headers["www-authenticate"]


async def test_two_positions_are_a_bad_request(app: AuthMiddleware, key: SigningKey) -> None:
    position = ("Trust-Position", f"1-0.{NONCE}")
    async with client_of(app) as client:
        answer = await client.get("/orders", headers=[*bearer(token_of(key)).items(), position, position])
    assert answer.json()["code"] == "position_invalid"
