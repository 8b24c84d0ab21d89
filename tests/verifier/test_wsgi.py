"""The WSGI middleware, on real servers: one request at a time (wsgiref), and forked workers (gunicorn)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.verifier.http_server import JwksServer
from tests.verifier.servers import wsgiref_of
from tests.verifier.support import AUDIENCE, ISSUER, NONCE, Mirrored, live_token, token_of, until
from verifier import ConfigurationError, current_claims
from verifier.testing import SigningKey
from verifier.wsgi import AuthMiddleware


class Application:
    """Answers with whom it sees: at once below /, while the body is being made below /stream."""

    def __init__(self) -> None:
        self.closed = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        claims = environ.get("verifier.claims", "nothing set")
        start_response("200 OK", [("content-type", "text/plain")])
        if environ["PATH_INFO"].startswith("/stream"):
            return Stream(self)
        assert current_claims() is (None if claims == "nothing set" else claims)
        return [(claims if isinstance(claims, str) else str(claims and claims.subject)).encode()]


class Stream:
    def __init__(self, application: Application) -> None:
        self._application = application

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(2):
            claims = current_claims()
            yield str(claims and claims.subject).encode()

    def close(self) -> None:
        assert current_claims() is not None
        self._application.closed += 1


@pytest.fixture
def mirrored(key: SigningKey) -> Mirrored:
    return Mirrored(key)


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def client(mirrored: Mirrored, application: Application) -> Iterator[httpx.Client]:
    app = AuthMiddleware(
        application, mirrored.verifier, optional_paths=["/catalog"], public_paths=["/livez"], realm="orders"
    )
    with wsgiref_of(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
        assert client.get("/livez").text == "nothing set"  # and no claims were left behind in the server's thread


def auth(token: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **more}


def test_the_application_gets_the_claims(client: httpx.Client, key: SigningKey) -> None:
    for _ in range(2):
        assert client.get("/orders", headers=auth(token_of(key))).text == "ada"
    assert client.get("/orders", headers={"authorization": f"bEARER   {token_of(key)}"}).text == "ada"


def test_a_body_that_is_still_being_made_sees_them_until_it_is_closed(
    client: httpx.Client, application: Application, key: SigningKey
) -> None:
    assert client.get("/stream", headers=auth(token_of(key))).text == "adaada"
    assert application.closed == 1


def test_refusals_are_those_of_the_asgi_middleware(client: httpx.Client, key: SigningKey) -> None:
    nobody = client.get("/orders", params={"access_token": token_of(key)})
    assert (nobody.status_code, nobody.headers["www-authenticate"]) == (401, 'Bearer realm="orders"')
    assert nobody.headers["content-type"] == "application/problem+json"
    assert nobody.json()["code"] == "token_required"
    bad = client.get("/orders", headers=auth("bad"))
    assert (bad.status_code, bad.json()["code"]) == (401, "token_malformed")
    head = client.head("/orders", headers=auth("bad"))
    assert (head.status_code, head.content) == (401, b"")
    twice = client.get("/orders", headers=[*auth(token_of(key)).items(), ("Authorization", "Bearer x")])
    assert (twice.status_code, twice.json()["code"]) == (400, "invalid_request")
    junk = client.get("/orders", headers=auth(token_of(key), **{"Trust-Position": "junk"}))
    assert (junk.status_code, junk.json()["code"]) == (400, "position_invalid")


def test_an_optional_path_takes_nobody_and_refuses_a_bad_token(client: httpx.Client, key: SigningKey) -> None:
    assert client.get("/catalog/1").text == "None"
    assert client.get("/catalog/1", headers=auth(token_of(key))).text == "ada"
    assert client.get("/catalog/1", headers=auth("bad")).status_code == 401
    assert client.get("/catalog/%2e%2e/orders").status_code == 401


def test_a_revoked_token_is_refused_from_the_next_request_on(
    client: httpx.Client, mirrored: Mirrored, key: SigningKey
) -> None:
    assert client.get("/orders", headers=auth(token_of(key))).status_code == 200
    mirrored.revoke("jti", "t-1")
    assert client.get("/orders", headers=auth(token_of(key))).json()["code"] == "token_revoked"


def test_scopes_a_position_and_our_own_trouble(key: SigningKey) -> None:
    mirrored = Mirrored(key, min_position_wait_s=0.01)
    with wsgiref_of(AuthMiddleware(Application(), mirrored.verifier, scopes=["a"])) as url:
        assert httpx.get(url, headers=auth(token_of(key))).json()["code"] == "insufficient_scope"
        late = auth(token_of(key, scope="a", jti="2"), **{"Trust-Position": f"1-9.{NONCE}"})
        answer = httpx.get(url, headers=late)
    assert (answer.status_code, answer.json()["code"]) == (503, "position_not_reached")
    assert answer.headers["retry-after"] == "1"


def test_an_error_of_the_application_leaves_no_claims_behind(mirrored: Mirrored, key: SigningKey) -> None:
    def failing(_environ: Any, _start_response: Any) -> Any:
        assert current_claims() is not None
        raise RuntimeError("the application's")

    environ = {"PATH_INFO": "/", "HTTP_AUTHORIZATION": f"Bearer {token_of(key)}"}
    with pytest.raises(RuntimeError, match="the application's"):
        AuthMiddleware(failing, mirrored.verifier)(environ, lambda *_: lambda _: None)
    assert current_claims() is None


def test_misuse_is_not_disguised_as_an_answer(mirrored: Mirrored, key: SigningKey) -> None:
    mirrored.verifier.close()
    environ = {"PATH_INFO": "/", "HTTP_AUTHORIZATION": f"Bearer {token_of(key)}"}
    with pytest.raises(ConfigurationError):
        AuthMiddleware(Application(), mirrored.verifier)(environ, lambda *_: lambda _: None)


PROGRAM = """
from verifier import Verifier, current_claims
from verifier.wsgi import AuthMiddleware

verifier = Verifier.from_env().start()  # in the parent, before it forks
assert verifier.wait_ready(60)

def application(environ, start_response):
    start_response("200 OK", [("content-type", "text/plain")])
    return [current_claims().subject.encode()]

app = AuthMiddleware(application, verifier)
"""


def test_under_forked_workers_each_has_a_verifier_of_its_own(run_dir: Path, key: SigningKey) -> None:
    (run_dir / "program.py").write_text(PROGRAM)
    keys = JwksServer(key)
    listener = socket.create_server(("127.0.0.1", 0))
    env = {
        **os.environ,
        "VERIFIER_ISSUER": ISSUER,
        "VERIFIER_AUDIENCE": AUDIENCE,
        "VERIFIER_JWKS_URLS": keys.url,
        "VERIFIER_REDIS_URL": "none",
        "GUNICORN_FD": str(listener.fileno()),
    }
    argv = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--threads", "2", "--no-control-socket"]
    argv += ["--bind", f"fd://{listener.fileno()}", "--chdir", str(run_dir), "program:app"]
    child = subprocess.Popen(argv, env=env, pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    listener.close()
    try:
        until(lambda: answers(child, url), "a worker answers", 60)
        good = auth(live_token(key))  # 503: the worker's first fetch of keys is still to come
        until(lambda: httpx.get(url, headers=good, timeout=60).status_code != 503, "a worker has keys", 60)
        until(lambda: httpx.get(url, headers=good, timeout=60).text == "ada", "both workers have keys", 60)
        assert json.loads(httpx.get(url, timeout=30).text)["code"] == "token_required"
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
        keys.close()


def answers(child: subprocess.Popen[bytes], url: str) -> bool:
    assert child.poll() is None, child.stderr and child.stderr.read()
    try:
        httpx.get(url, timeout=60)
    except httpx.TransportError:
        return False
    return True
