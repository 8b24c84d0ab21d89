"""How a client proves itself: by one method at a time, each assertion once, and nothing learnt from a refusal."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from keyservice.clients import Client, load_clients
from keyservice.core.assertions import AssertionRefused, check_assertion
from keyservice.errors import SettingError
from keyservice.limits import ASSERTION_LIFE_MAX_S, ASSERTIONS_REMEMBERED_MAX
from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, SECRET_HASH, Proxy, Running, Server

JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
TOKEN_ENDPOINT = f"{ISSUER}/oauth2/token"
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
KEYS: dict[str, Any] = {"ES256": EC_KEY, "RS256": RSA_KEY, "PS256": RSA_KEY}


def public(alg: str) -> dict[str, Any]:
    of = jwt.algorithms.ECAlgorithm if alg == "ES256" else jwt.algorithms.RSAAlgorithm
    jwk: dict[str, Any] = of.to_jwk(KEYS[alg].public_key(), as_dict=True)
    return {**{name: value for name, value in jwk.items() if name != "key_ops"}, "alg": alg, "kid": alg}


JWKS = {"keys": [public(alg) for alg in KEYS]}
ROBOT = Client(client_id="robot", audiences=("orders",), scopes=("orders:read",), jwks=JWKS)


def assertion(alg: str = "ES256", *, headers: dict[str, Any] | None = None, key: Any = None, **changes: Any) -> str:
    now = int(time.time())
    claims = {"iss": "robot", "sub": "robot", "aud": ISSUER, "iat": now, "exp": now + 60, "jti": str(uuid.uuid4())}
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    return jwt.encode(claims, key or KEYS[alg], alg, {"kid": alg, **(headers or {})})


async def register(running: Running, **changes: Any) -> dict[str, Any]:
    body = {"client_id": "robot", "audiences": ["orders"], "scopes": ["orders:read"], "jwks": JWKS, **changes}
    answer = await running.admin.post("/admin/clients", json=body, headers=await running.bearer())
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def ask(running: Running, text: str, **form: str) -> httpx.Response:
    form = {"grant_type": "client_credentials", "client_assertion_type": JWT_BEARER, "client_assertion": text, **form}
    return await running.public.post("/oauth2/token", data=form)


# -- private_key_jwt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", list(KEYS))
@pytest.mark.parametrize("aud", [ISSUER, TOKEN_ENDPOINT, ["elsewhere", TOKEN_ENDPOINT]])
async def test_a_client_with_keys_gets_a_token_for_its_assertion(running: Running, alg: str, aud: Any) -> None:
    assert "client_secret" not in await register(running)
    answer = await ask(running, assertion(alg, aud=aud), client_id="robot")
    assert answer.status_code == 200, answer.text
    claims = jwt.decode(answer.json()["access_token"], options={"verify_signature": False})
    assert (claims["client_id"], claims["scope"]) == ("robot", "orders:read")


async def test_an_assertion_works_once_in_any_instance(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    one, other = [await start_service(settings) for settings in two_instances(server.url)]
    await register(one)
    await other.until(lambda: other.frontend.registry.get("robot"))
    text = assertion()
    answers = await asyncio.gather(*(ask(running, text) for running in (one, other, one, other)))
    assert sorted(answer.status_code for answer in answers) == [200, 401, 401, 401]
    assert {answer.json()["error_description"] for answer in answers if answer.status_code == 401} == {
        "client authentication failed: client_assertion: jti was used before"
    }
    with server.client() as client:
        (name,) = client.keys("{ks}:assertion:*")
        assert 0 < client.ttl(name) <= 91


async def test_without_the_primary_an_instance_goes_by_its_own_memory(
    proxy: Proxy, server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, primary_url=proxy.url))
    await register(running)
    await proxy.cut()
    text = assertion()
    assert (await ask(running, text)).status_code == 200
    assert (await ask(running, text)).status_code == 401
    assert running.service.metrics.registry.get_sample_value("keyservice_assertions_checked_alone_total") == 1


async def test_a_key_that_was_taken_away_authenticates_no_more(running: Running) -> None:
    await register(running)
    headers = await running.bearer()
    body = {"jwks": {"keys": [public("RS256")]}}
    assert (await running.admin.patch("/admin/clients/robot", json=body, headers=headers)).status_code == 200
    assert (await ask(running, assertion("ES256"))).status_code == 401
    assert (await ask(running, assertion("RS256"))).status_code == 200


def refused(text: str, now: float | None = None) -> str:
    with pytest.raises(AssertionRefused) as raised:
        check_assertion(text, {"robot": ROBOT}, {ISSUER, TOKEN_ENDPOINT}, now or time.time(), 30)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": "https://elsewhere.test"}, "aud is"),
        ({"aud": None}, "aud is"),
        ({"aud": [7]}, "aud is"),
        ({"iss": "somebody"}, "iss and sub"),
        ({"iss": None}, "iss and sub"),
        ({"exp": None}, "exp is missing"),
        ({"exp": int(time.time()) - 31}, "exp is missing or past"),
        ({"exp": int(time.time() + ASSERTION_LIFE_MAX_S) + 3_600}, "exp is more than"),
        ({"iat": int(time.time()) + 3_600}, "nbf or iat"),
        ({"nbf": int(time.time()) + 3_600}, "nbf or iat"),
        ({"jti": None}, "jti has"),
        ({"jti": "x" * 257}, "jti has"),
        ({"headers": {"typ": "at+jwt"}}, "alg is one of"),
        ({"headers": {"kid": "RS256"}}, ""),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, ""),
        ({"sub": "nobody", "iss": "nobody"}, ""),
        ({"sub": None}, ""),
    ],
)
def test_an_assertion_says_all_that_it_has_to(changes: dict[str, Any], reason: str) -> None:
    said = refused(assertion(**changes))
    assert said.startswith(reason)
    assert bool(said) is bool(reason), "who has not signed is told nothing"


@pytest.mark.parametrize(("late_s", "good"), [(-1, True), (0, False)])
def test_an_assertion_is_good_until_its_exp_and_the_leeway(late_s: int, good: bool) -> None:
    exp = int(time.time()) + 60
    text = assertion(exp=exp)
    if good:
        check_assertion(text, {"robot": ROBOT}, {ISSUER}, exp + 30 + late_s, 30)
    else:
        assert refused(text, exp + 30 + late_s).startswith("exp")


def test_a_symmetric_or_unsigned_assertion_is_none() -> None:
    secret = "a secret of the client that is long enough"  # pragma: allowlist secret
    claims = {"iss": "robot", "sub": "robot", "aud": ISSUER, "exp": int(time.time()) + 60, "jti": "x"}
    assert refused(jwt.encode(claims, secret, "HS256")).startswith("alg is one of")
    assert refused(jwt.encode(claims, "", "none")).startswith("alg is one of")
    assert refused("nonsense") == "not a JWT"


@pytest.mark.parametrize("alg", list(KEYS))
def test_an_unknown_client_costs_a_signature_check_too(alg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyservice.core import assertions

    tried: list[str] = []
    nobody = assertions._nobody

    def counted(name: str) -> Any:
        tried.append(name)
        return nobody(name)

    monkeypatch.setattr(assertions, "_nobody", counted)
    assert refused(assertion(alg, sub="nobody", iss="nobody")) == ""
    assert tried == [alg]


async def test_what_is_remembered_of_assertions_is_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyservice import assertions

    monkeypatch.setattr(assertions, "ASSERTIONS_REMEMBERED_MAX", 3)
    await register(running)
    for _ in range(5):
        assert (await ask(running, assertion())).status_code == 200
    assert len(running.frontend._client_auth._assertions._used) == 3
    assert ASSERTIONS_REMEMBERED_MAX > 3


# -- one method, and one only -----------------------------------------------------------------------------------------


async def test_two_methods_at_once_are_refused(running: Running) -> None:
    await register(running)
    form = {"grant_type": "client_credentials", "client_assertion_type": JWT_BEARER}
    with_secret = {**form, "client_assertion": assertion(), "client_id": "orders", "client_secret": "s3cret"}
    wrong_type = {**form, "client_assertion_type": "x", "client_assertion": "y"}
    answers = [
        await running.public.post("/oauth2/token", data=with_secret),
        await running.public.post("/oauth2/token", data={**form, "client_assertion": "x"}, auth=("orders", "s3cret")),
        await running.public.post("/oauth2/token", data=form),
        await running.public.post("/oauth2/token", data=wrong_type),
        await ask(running, assertion(), client_id="orders"),
    ]
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(400, "invalid_request")] * 5
    basic = "Basic " + base64.b64encode(b"orders:s3cret").decode()
    twice = [("Authorization", basic), ("Authorization", basic)]
    answer = await running.public.post("/oauth2/token", data={"grant_type": "client_credentials"}, headers=twice)
    assert answer.json()["error"] == "invalid_request"


async def test_a_client_without_a_secret_has_no_empty_one(running: Running) -> None:
    await register(running)
    for secret in ("", "x", "s3cret"):
        auth = ("robot", secret)
        answer = await running.public.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=auth)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


async def test_an_unknown_client_and_a_wrong_secret_hash_alike_and_answer_alike(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyservice import clients

    hashed: list[str] = []
    verify = clients._verify

    def counted(expected: str, secret: str) -> bool:
        hashed.append(expected)
        return verify(expected, secret)

    await register(running)
    monkeypatch.setattr(clients, "_verify", counted)
    answers = [
        await running.public.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=(name, "wrong"))
        for name in ("orders", "nobody", "robot")
    ]
    assert len({(answer.status_code, answer.text) for answer in answers}) == 1
    cost = SECRET_HASH.split("$")[:4]
    assert [text.split("$")[:4] for text in hashed] == [cost] * 3


# -- the clients file -------------------------------------------------------------------------------------------------


def file_with(path: Path, keys: str, secret: str = "") -> dict[str, Client]:
    path.write_text(f'[[clients]]\nclient_id = "robot"\naudiences = ["orders"]\n{secret}\n{keys}')
    return load_clients(path)


def test_a_clients_file_may_hold_public_keys(tmp_path: Path) -> None:
    jwk = public("ES256")
    lines = "\n".join(f'{name} = "{value}"' for name, value in jwk.items())
    (robot,) = file_with(tmp_path / "c.toml", f"[[clients.jwks.keys]]\n{lines}").values()
    assert robot.keys is not None
    assert robot.keys.kids == ("ES256",)
    check_assertion(assertion(), {"robot": robot}, {ISSUER}, time.time(), 30)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("", "neither secret_hash nor jwks"),
        ("jwks = {keys = []}", "jwks: keys is not a list"),
        ('jwks = {keys = [{kty = "oct", k = "AAAA"}]}', "jwks"),
        ('jwks = {keys = [{kty = "RSA", n = "AQAB", e = "AQAB"}]}', "jwks"),
    ],
)
def test_a_clients_file_with_no_usable_key_is_refused_by_name(tmp_path: Path, keys: str, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        file_with(tmp_path / "c.toml", keys)
