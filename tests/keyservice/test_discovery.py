"""The metadata documents: true, the same bytes everywhere, and found where the RFCs say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, Running, Server
from tests.keyservice.three import StartThree

OAUTH = "/.well-known/oauth-authorization-server"
OPENID = "/.well-known/openid-configuration"


async def test_both_documents_are_the_same_bytes_in_every_region(start_three: StartThree) -> None:
    three = await start_three()
    answers = [await running.public.get(path) for running in three.running.values() for path in (OAUTH, OPENID)]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.content for answer in answers}) == 1


async def test_the_document_says_what_is_true(running: Running) -> None:
    answer = await running.public.get(OAUTH)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=2"
    assert answer.headers["access-control-allow-origin"] == "*"
    document = answer.json()
    assert document["issuer"] == ISSUER
    assert document["grant_types_supported"] == ["client_credentials", "refresh_token"]
    assert document["response_types_supported"] == document["id_token_signing_alg_values_supported"] == []
    methods = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
    for endpoint in ("token_endpoint", "introspection_endpoint", "revocation_endpoint"):
        assert document[f"{endpoint}_auth_methods_supported"] == methods
        assert document[f"{endpoint}_auth_signing_alg_values_supported"] == ["ES256", "PS256", "RS256"]
        path = document[endpoint].removeprefix(ISSUER)
        answer = await running.public.post(path, data={"x": "y"})
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client"), "there is such an endpoint"
    assert (await running.public.get(document["jwks_uri"].removeprefix(ISSUER))).status_code == 200


async def test_head_gives_the_headers_alone_and_nothing_else_is_allowed(running: Running) -> None:
    got, head = await running.public.get(OPENID), await running.public.head(OPENID)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers} == {**got.headers}
    assert (await running.public.post(OPENID)).status_code == 405
    assert (await running.admin.get(OPENID)).status_code == 404


@pytest.mark.parametrize("slash", ["", "/"])
async def test_an_issuer_with_a_path_has_everything_under_it(
    server: Server, make_settings: Callable[..., Settings], start_service: Any, slash: str
) -> None:
    issuer = f"https://id.test/tenant{slash}"
    running = await start_service(make_settings(server.url, issuer=issuer))
    paths = (f"{OAUTH}/tenant", OAUTH, f"/tenant{OPENID}", OPENID)
    answers = [await running.public.get(path) for path in paths]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    document = answers[0].json()
    assert document["issuer"] == issuer
    assert document["token_endpoint"] == "https://id.test/tenant/oauth2/token"
    for prefix in ("", "/tenant"):
        form = {"grant_type": "client_credentials"}
        answer = await running.public.post(f"{prefix}/oauth2/token", data=form, auth=("orders", "s3cret"))
        assert answer.status_code == 200
        assert (await running.public.get(f"{prefix}/.well-known/jwks.json")).status_code == 200
    refused = await running.public.post("/tenant/oauth2/token", data={"grant_type": "x"}, auth=("orders", "s3cret"))
    assert set(refused.json()) == {"error", "error_description"}, "errors keep their form under the path"
    assert (await running.public.get("/tenantelse/livez")).status_code == 404
    text = (await running.public.get("/metrics")).text
    assert 'route="/oauth2/token"' in text
