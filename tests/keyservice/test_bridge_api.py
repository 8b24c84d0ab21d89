"""The admin API as the bridge uses it: tokens are renewed, and every answer has a next step."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from keyservice.bridge_api import RENEWALS_MAX, RETRY_AFTER_MAX_S, AdminApi, Caller
from keyservice.core.bridge import Rules, Step, read
from keyservice.errors import SettingError, StartError

CALLER = Caller("http://id.test/oauth2/token", "http://id.test", "bridge", "s3cret", "https://id.test/admin")
ITEMS = read(b"x", Rules(), 0.0)


class Service:
    """Answers as it is told; gives out numbered tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.expires_in: Any = 900
        self.answers: list[httpx.Response] = []
        self.seen: list[str] = []
        self.forms: list[bytes] = []
        self.token_answer: httpx.Response | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/oauth2/token":
            self.forms.append(request.content)
            if self.token_answer is not None:
                return self.token_answer
            self.tokens += 1
            return httpx.Response(200, json={"access_token": f"t{self.tokens}", "expires_in": self.expires_in})
        self.seen.append(request.headers["authorization"])
        assert [one["value"] for one in json.loads(request.content)["revocations"]] == ["x"]
        return self.answers.pop(0) if self.answers else httpx.Response(202, json={"results": [{"index": 0}]})


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def api(service: Service) -> AsyncIterator[AdminApi]:
    made = AdminApi(CALLER, httpx.MockTransport(service))
    yield made
    await made.close()


async def test_one_token_serves_until_most_of_its_life_is_over(api: AdminApi, service: Service) -> None:
    for _ in range(3):
        assert (await api.revoke(ITEMS)).results == [{"index": 0}]
    assert service.seen == ["Bearer t1"] * 3
    assert service.forms == [b"grant_type=client_credentials&audience=https%3A%2F%2Fid.test%2Fadmin"]
    service.expires_in = 0
    api._renew_at = 0.0
    await api.revoke(ITEMS)
    await api.revoke(ITEMS)
    assert service.seen[3:] == ["Bearer t2", "Bearer t3"]


async def test_a_refused_token_is_replaced_and_refused_ones_in_a_row_are_the_end(
    api: AdminApi, service: Service
) -> None:
    def refused() -> httpx.Response:
        return httpx.Response(401, json={"code": "token_revoked", "detail": "it was"})

    service.answers = [refused() for _ in range(RENEWALS_MAX - 1)]
    steps = [(await api.revoke(ITEMS)).step for _ in range(RENEWALS_MAX)]
    assert steps == [*[Step.RENEW] * (RENEWALS_MAX - 1), Step.RESULTS]
    service.answers = [refused() for _ in range(RENEWALS_MAX)]
    answers = [await api.revoke(ITEMS) for _ in range(RENEWALS_MAX)]
    assert [answer.step for answer in answers] == [*[Step.RENEW] * (RENEWALS_MAX - 1), Step.GIVE_UP]
    assert answers[-1].code == "token_revoked"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), (str(int(RETRY_AFTER_MAX_S) + 1), RETRY_AFTER_MAX_S), ("Wed, 21 Oct", 0.0), (None, 0.0)],
)
async def test_a_service_that_is_away_says_when_to_come_back(
    api: AdminApi, service: Service, header: str | None, seconds: float
) -> None:
    headers = {} if header is None else {"Retry-After": header}
    service.answers = [httpx.Response(503, json={"code": "primary_unreachable"}, headers=headers)]
    answer = await api.revoke(ITEMS)
    assert (answer.step, answer.code, answer.retry_after_s) == (Step.RETRY, "primary_unreachable", seconds)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_no_token_for_now_is_tried_again(api: AdminApi, service: Service, status: int) -> None:
    service.token_answer = httpx.Response(status, text="<html>")
    answer = await api.revoke(ITEMS)
    assert (answer.step, answer.code) == (Step.RETRY, f"http_{status}")


async def test_credentials_that_are_refused_are_the_end(api: AdminApi, service: Service) -> None:
    for status in (400, 401):
        service.token_answer = httpx.Response(status, json={"error": "invalid_client", "error_description": "wrong"})
        with pytest.raises(StartError) as refused:
            await api.revoke(ITEMS)
        assert refused.value.code == "invalid_client"


async def test_no_answer_is_tried_again() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    api = AdminApi(CALLER, httpx.MockTransport(silent))
    answer = await api.revoke(ITEMS)
    assert (answer.step, answer.code) == (Step.RETRY, "keyservice_unreachable")
    await api.close()


@pytest.mark.parametrize(
    ("status", "step"),
    [(200, Step.RESULTS), (413, Step.SPLIT), (403, Step.GIVE_UP), (404, Step.GIVE_UP)],
)
async def test_an_answer_without_json_still_has_a_step(
    api: AdminApi, service: Service, status: int, step: Step
) -> None:
    service.answers = [httpx.Response(status, text="no JSON")]
    assert (await api.revoke(ITEMS)).step is step


def test_who_calls_is_in_the_environment_and_no_secret_is_in_its_repr() -> None:
    environ = {
        "KEYSERVICE_TOKEN_URL": "https://u:hunter2@id.test/oauth2/token",
        "KEYSERVICE_ADMIN_URL": "https://u:hunter2@id.test/",
        "KEYSERVICE_CLIENT_ID": "bridge",
        "KEYSERVICE_CLIENT_SECRET": "hunter2",
        "KEYSERVICE_ISSUER": "https://id.test/",
    }
    caller = Caller.from_env(environ)
    assert (caller.admin_url[-8:], caller.audience) == ("@id.test", "https://id.test/admin")
    assert "hunter2" not in repr(caller)
    assert Caller.from_env({**environ, "KEYSERVICE_ISSUER": ""}).audience is None
    for name in list(environ)[:4]:
        with pytest.raises(SettingError, match=name):
            Caller.from_env({**environ, name: ""})
