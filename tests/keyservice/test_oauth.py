from __future__ import annotations

from typing import Any

import httpx
import jwt
import pytest

from tests.keyservice.support import HS256_SECRET, ISSUER, Running


def claims_of(token: str) -> dict[str, Any]:
    decoded: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return decoded


async def test_a_client_gets_an_access_token_of_rfc_9068(running: Running) -> None:
    answer = await running.public.post(
        "/oauth2/token", data={"grant_type": "client_credentials", "scope": "orders:read"}, auth=("orders", "s3cret")
    )
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["token_type"], body["expires_in"], body["scope"]) == ("Bearer", 120, "orders:read")
    header, claims = jwt.get_unverified_header(body["access_token"]), claims_of(body["access_token"])
    assert header["typ"] == "at+jwt"
    assert header["alg"] == "RS256"
    assert header["kid"] == running.frontend.ring.signing_key().kid
    assert {**claims, "iat": 0, "exp": claims["exp"] - claims["iat"], "jti": ""} == {
        "iss": ISSUER,
        "sub": "orders",
        "aud": "orders",
        "client_id": "orders",
        "scope": "orders:read",
        "iat": 0,
        "exp": 120,
        "jti": "",
    }


async def test_a_client_may_authenticate_in_the_form(running: Running) -> None:
    form = {"grant_type": "client_credentials", "client_id": "orders", "client_secret": "s3cret"}
    assert (await running.public.post("/oauth2/token", data=form)).status_code == 200


async def test_a_pinned_client_gets_the_old_form(running: Running) -> None:
    token = await running.token("legacy", audience="orders")
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "typ": "JWT"}
    assert jwt.decode(token, HS256_SECRET, ["HS256"], audience="orders")["client_id"] == "legacy"


@pytest.mark.parametrize(
    ("form", "auth", "status", "error"),
    [
        ({}, ("orders", "s3cret"), 400, "invalid_request"),
        ({"grant_type": "password"}, ("orders", "s3cret"), 400, "unsupported_grant_type"),
        ({"grant_type": "client_credentials"}, ("orders", "wrong"), 401, "invalid_client"),
        ({"grant_type": "client_credentials"}, ("nobody", "s3cret"), 401, "invalid_client"),
        ({"grant_type": "client_credentials"}, None, 401, "invalid_client"),
        ({"grant_type": "client_credentials", "client_secret": "s3cret"}, ("orders", "s3cret"), 400, "invalid_request"),
        ({"grant_type": "client_credentials", "client_id": "web"}, ("orders", "s3cret"), 400, "invalid_request"),
        ({"grant_type": "client_credentials", "scope": "admin"}, ("orders", "s3cret"), 400, "invalid_scope"),
        ({"grant_type": "client_credentials", "audience": "x"}, ("orders", "s3cret"), 400, "invalid_target"),
        ({"grant_type": "client_credentials"}, ("ops", "s3cret"), 400, "invalid_request"),
        ({"grant_type": "refresh_token"}, ("web", "s3cret"), 400, "invalid_request"),
        ({"grant_type": "refresh_token", "refresh_token": "nonsense"}, ("web", "s3cret"), 400, "invalid_grant"),
        ({"grant_type": "refresh_token", "refresh_token": f"sid.{'x' * 65}"}, ("web", "s3cret"), 400, "invalid_grant"),
    ],
)
async def test_what_is_refused_has_the_shape_of_rfc_6749(
    running: Running, form: dict[str, str], auth: tuple[str, str] | None, status: int, error: str
) -> None:
    credentials = httpx.BasicAuth(*auth) if auth is not None else None
    answer = await running.public.post("/oauth2/token", data=form or {"x": "y"}, auth=credentials)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert set(answer.json()) == {"error", "error_description"}
    assert answer.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in answer.headers) == (status == 401 and auth is not None)


async def test_a_parameter_given_twice_is_refused(running: Running) -> None:
    answer = await running.public.post(
        "/oauth2/token",
        content="grant_type=client_credentials&grant_type=client_credentials",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        auth=("orders", "s3cret"),
    )
    assert answer.json()["error"] == "invalid_request"


@pytest.mark.parametrize(("size", "status"), [(65_536, 400), (65_537, 413)])
async def test_a_form_is_read_up_to_its_limit(running: Running, size: int, status: int) -> None:
    answer = await running.public.post(
        "/oauth2/token",
        content="a=" + "b" * (size - 2),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        auth=("orders", "s3cret"),
    )
    assert answer.status_code == status


# -- sessions ---------------------------------------------------------------------------------------------------------


async def start_session(running: Running, **changes: Any) -> dict[str, Any]:
    wanted = {"sub": "ada", "client_id": "web", "audience": "orders", "scope": "orders:read", **changes}
    answer = await running.admin.post("/admin/sessions", json=wanted, headers=await running.bearer("login"))
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def refresh(running: Running, token: str, client: str = "web", **form: str) -> Any:
    form = {"grant_type": "refresh_token", "refresh_token": token, **form}
    return await running.public.post("/oauth2/token", data=form, auth=(client, "s3cret"))


async def test_a_session_gives_a_token_and_a_refresh_token(running: Running) -> None:
    body = await start_session(running)
    assert set(body) == {"access_token", "refresh_token", "token_type", "expires_in", "scope", "sid"}
    claims = claims_of(body["access_token"])
    assert (claims["sub"], claims["client_id"], claims["sid"]) == ("ada", "web", body["sid"])


async def test_a_refresh_gives_a_token_of_the_same_session(running: Running) -> None:
    session = await start_session(running)
    first = await refresh(running, session["refresh_token"])
    assert first.status_code == 200
    assert claims_of(first.json()["access_token"])["sid"] == session["sid"]
    assert first.json()["refresh_token"] != session["refresh_token"]
    assert (await refresh(running, first.json()["refresh_token"])).status_code == 200


async def test_how_a_user_was_authenticated_is_in_every_token_of_the_session(running: Running) -> None:
    known = {"auth_time": 1_700_000_000, "acr": "x" * 256, "amr": ["pwd", *["otp"] * 7]}
    session = await start_session(running, **known)
    renewed = (await refresh(running, session["refresh_token"])).json()
    for token in (session["access_token"], renewed["access_token"]):
        assert {name: value for name, value in claims_of(token).items() if name in known} == known


async def test_a_refresh_token_is_bound_to_its_client_and_scope(running: Running) -> None:
    session = await start_session(running)
    assert (await refresh(running, session["refresh_token"], "orders")).json()["error"] == "invalid_grant"
    assert (await refresh(running, session["refresh_token"], scope="profile")).json()["error"] == "invalid_scope"
    assert (await refresh(running, session["refresh_token"])).status_code == 200


async def test_a_session_s_record_goes_when_the_session_does(running: Running, server: Any) -> None:
    session = await start_session(running)
    with server.client() as client:
        assert 43_000 < client.ttl(f"{{ks}}:session:{session['sid']}") <= 43_200
    assert (await refresh(running, session["refresh_token"])).status_code == 200
    with server.client() as client:
        assert 43_000 < client.ttl(f"{{ks}}:session:{session['sid']}") <= 43_200


@pytest.mark.parametrize("kind", ["sid", "sub"])
async def test_a_revoked_session_or_subject_refreshes_no_more(running: Running, kind: str) -> None:
    session = await start_session(running)
    value = session["sid"] if kind == "sid" else "ada"
    answer = await running.admin.post(
        "/admin/revocations", json={"kind": kind, "value": value}, headers=await running.bearer()
    )
    assert answer.status_code == 200
    assert (await refresh(running, session["refresh_token"])).json()["error"] == "invalid_grant"


async def test_a_log_in_right_after_a_cut_off_is_not_caught(running: Running) -> None:
    receipt = (
        await running.admin.post(
            "/admin/revocations", json={"kind": "sub", "value": "ada"}, headers=await running.bearer()
        )
    ).json()
    session = await start_session(running)
    assert claims_of(session["access_token"])["after"] == [receipt["id"]]
    renewed = await refresh(running, session["refresh_token"])
    assert renewed.status_code == 200
    assert "after" not in claims_of((await start_session(running, sub="bob"))["access_token"])


async def test_logging_out_ends_the_session(running: Running, server: Any) -> None:
    session = await start_session(running)
    answer = await running.admin.delete(f"/admin/sessions/{session['sid']}", headers=await running.bearer("login"))
    assert (answer.status_code, answer.json()["durability"]) == (200, "replicated")
    assert (await refresh(running, session["refresh_token"])).json()["error"] == "invalid_grant"
    with server.client() as client:
        assert not client.exists(f"{{ks}}:session:{session['sid']}")
    stored = running.service.index.get(answer.json()["id"])
    assert stored is not None
    assert (stored.entry.kind, stored.entry.value) == ("sid", session["sid"])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"client_id": "nobody"}, "client_unknown"),
        ({"audience": "elsewhere"}, "audience_not_allowed"),
        ({"audience": []}, "audience_not_allowed"),
        ({"scope": "keyservice:admin"}, "scope_not_allowed"),
        ({"sub": ""}, "sub_invalid"),
        ({"sub": "x" * 257}, "sub_invalid"),
        ({"surprise": 1}, "body_invalid"),
        ({"auth_time": True}, "body_invalid"),
        ({"auth_time": -1}, "body_invalid"),
        ({"acr": "x" * 257}, "body_invalid"),
        ({"amr": ["pwd"] * 9}, "body_invalid"),
    ],
)
async def test_a_session_only_has_what_its_client_may_have(running: Running, change: dict[str, Any], code: str) -> None:
    wanted = {"sub": "ada", "client_id": "web", "audience": "orders", "scope": "orders:read", **change}
    answer = await running.admin.post("/admin/sessions", json=wanted, headers=await running.bearer("login"))
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.headers["content-type"] == "application/problem+json"
