"""The ``Trust-Position`` header: a request is judged by what was known there, and makes nobody wait who may not."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from tests.verifier.support import ISSUER, NONCE, NOW, Mirrored, make_verifier, token_of
from tests.verifier.test_asgi import bearer, client_of, who
from verifier.asgi import AuthMiddleware
from verifier.testing import ManualClock, SigningKey, StaticRevocations


@pytest.fixture
def app(key: SigningKey) -> AuthMiddleware:
    return AuthMiddleware(who, Mirrored(key).verifier)


def at(token: str, position: str) -> dict[str, str]:
    return bearer(token) | {"Trust-Position": position}


class Waiting(StaticRevocations):
    """Says that somebody waits for a position, and how many have so far."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.waited = 0
        self.waiting = threading.Event()

    def wait_position(self, reached: Any, timeout_s: float) -> bool:
        self.waited += 1
        self.waiting.set()
        return super().wait_position(reached, timeout_s)


async def test_a_request_with_a_position_is_judged_by_what_was_known_there(key: SigningKey) -> None:
    """It waits for an entry that is on its way, and its token, good before, is refused by it."""
    source, token = Waiting(clock=ManualClock(NOW)), token_of(key)
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=30).start()
    async with client_of(AuthMiddleware(who, verifier)) as client:
        assert (await client.get("/", headers=at(token, f"1-0.{NONCE}"))).status_code == 200
        source.waiting.clear()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await client.get("/", headers=at(token, f"1-1.{NONCE}")))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            assert await anyio.to_thread.run_sync(source.waiting.wait, 20)
            source.revoke("jti", "t-1", issuer=ISSUER)
    verifier.close()
    assert (answers[0].status_code, answers[0].json()["code"]) == (401, "token_revoked")


class Held(Waiting):
    """Gives up on a position when the test says so."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.give_up = threading.Event()

    def wait_position(self, reached: Any, timeout_s: float) -> bool:
        self.waiting.set()
        assert self.give_up.wait(60)
        return False


async def test_while_one_request_waits_for_its_position_the_loop_serves_others(key: SigningKey) -> None:
    source = Held(clock=ManualClock(NOW))
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=0.1).start()
    answers: list[httpx.Response] = []
    async with client_of(AuthMiddleware(who, verifier)) as client, anyio.create_task_group() as group:

        async def ask() -> None:
            answers.append(await client.get("/", headers=at(token_of(key), f"1-9.{NONCE}")))

        group.start_soon(ask)
        assert await anyio.to_thread.run_sync(source.waiting.wait, 20)
        assert (await client.get("/", headers=bearer(token_of(key)))).status_code == 200
        assert not answers
        source.give_up.set()
    verifier.close()
    assert (answers[0].status_code, answers[0].json()["code"]) == (503, "position_not_reached")
    assert answers[0].headers["retry-after"] == "1"


async def test_who_has_no_good_token_makes_nobody_wait(key: SigningKey, other_key: SigningKey) -> None:
    source = Waiting(clock=ManualClock(NOW))
    verifier = make_verifier(key, redis_url=source, min_position_wait_s=0.01).start()
    async with client_of(AuthMiddleware(who, verifier, optional_paths=["/free"])) as client:
        for token in ("bad", token_of(key)[:-4] + "AAAA", token_of(key, exp=NOW - 100), token_of(other_key)):
            assert (await client.get("/", headers=at(token, f"1-9.{NONCE}"))).status_code == 401
        assert (await client.get("/free", headers={"Trust-Position": f"1-9.{NONCE}"})).status_code == 200
        assert source.waited == 0
        assert (await client.get("/", headers=at(token_of(key), f"1-9.{NONCE}"))).status_code == 503
        assert source.waited == 1
        ignoring = AuthMiddleware(who, verifier, trust_position=False)
        async with client_of(ignoring) as other:
            assert (await other.get("/", headers=at(token_of(key), f"1-9.{NONCE}"))).status_code == 200
            assert (await other.get("/", headers=at(token_of(key), "junk"))).status_code == 200
        assert source.waited == 1
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
