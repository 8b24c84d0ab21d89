"""A service without Redis: the verifier over the feed of a real key service process, from log-in to revocation."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.conftest import KeyService
from tests.keyservice.support import ISSUER, Server, until
from verifier import RevokedToken, Verifier


def make(keyservice: KeyService, **settings: Any) -> Verifier:
    given: dict[str, Any] = {
        "issuer": ISSUER,
        "audience": "orders",
        "jwks_urls": [keyservice.jwks_url],
        "redis_url": None,
        "feed_url": keyservice.feed_url,
        "feed_client_id": "mirrors",
        "feed_client_secret": "s3cret",
    }
    return Verifier(**{**given, **settings})


@pytest.fixture
def verifier(keyservice: KeyService) -> Iterator[Verifier]:
    with make(keyservice) as made:
        assert made.wait_ready(60)
        yield made


def refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except RevokedToken:
        return True
    return False


def test_a_revocation_is_enforced_over_the_feed(keyservice: KeyService, verifier: Verifier) -> None:
    token, other = keyservice.token(), keyservice.token()
    assert verifier.verify(token).subject == "orders"
    began = time.monotonic()
    receipt = keyservice.admin("POST", "/admin/revocations", {"token": token})
    until(lambda: refused(verifier, token))
    print(f"enforced {1000 * (time.monotonic() - began):.0f} ms after the request")
    verifier.verify(other)
    verifier.verify(other, min_position=receipt["position"])
    status = verifier.status()
    assert (status.connection, status.problem, status.position) == ("tailing", None, receipt["position"])


def test_a_key_service_that_went_away_takes_no_revocation_along_and_is_followed_again(
    keyservice: KeyService, verifier: Verifier
) -> None:
    tokens = [keyservice.token() for _ in range(3)]
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
        keyservice.admin("POST", "/admin/revocations", {"token": tokens[number]})
        until(lambda n=number: refused(verifier, tokens[n]))  # type: ignore[misc]
        keyservice.kill(how)
        until(lambda: verifier.status().problem is not None)
        assert refused(verifier, tokens[number])
        verifier.verify(tokens[2])
        keyservice.start()
        until(lambda: verifier.status().problem is None)
    assert verifier.status().counters.get("rereads", 0) == 0
    assert verifier.status().counters["entries_read"] == 3  # each once: the epoch's, and two


def test_a_key_service_whose_replica_is_gone_says_so(
    keyservice: KeyService, verifier: Verifier, server: Server
) -> None:
    token = keyservice.token()
    keyservice.admin("POST", "/admin/revocations", {"token": token})
    until(lambda: refused(verifier, token))
    server.kill()
    until(lambda: verifier.status().problem == "replica_unreachable")
    assert refused(verifier, token)
    server.start()
    until(lambda: verifier.status().problem in (None, "no_trust_log"))
    assert refused(verifier, token)


def ask(keyservice: KeyService, token: str | None) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with httpx.stream("GET", keyservice.feed_url, headers=headers, trust_env=False, timeout=60) as answer:
        if answer.status_code != 200:
            answer.read()
        return answer


def test_the_feed_is_for_those_who_may_read_revocations(keyservice: KeyService) -> None:
    admin = f"{ISSUER}/admin"
    refusals = (
        (None, 401, "token_missing"),
        (keyservice.token("orders"), 401, "claim_invalid"),  # a token for a service
        (keyservice.token("legacy", audience=admin), 401, "alg_not_allowed"),
        (keyservice.token("login", audience=admin), 403, "insufficient_scope"),
    )
    for token, status, code in refusals:
        answer = ask(keyservice, token)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["Content-Type"] == "application/problem+json"
    for client in ("ops", "mirrors"):
        answer = ask(keyservice, keyservice.token(client, audience=admin))
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"


def test_what_is_wrong_with_a_feed_stands_in_the_status(keyservice: KeyService) -> None:
    by_token = {"feed_client_id": None, "feed_client_secret": None}
    unfit = keyservice.token("login", audience=f"{ISSUER}/admin")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"feed_client_secret": "wrong"}, "wrong_credentials"),
        ({"feed_client_id": "orders"}, "wrong_credentials"),
        ({**by_token, "feed_token": "nonsense"}, "wrong_credentials"),
        ({**by_token, "feed_token": lambda: unfit}, "no_permission"),
        ({"feed_url": "http://127.0.0.1:1/revocations/feed"}, "unreachable"),
    )
    for settings, problem in wrong:
        with make(keyservice, **settings) as verifier:
            until(lambda v=verifier, p=problem: v.status().problem == p)  # type: ignore[misc]
            assert not verifier.status().ready


def test_the_client_whose_feed_it_is_can_be_cut_off(keyservice: KeyService, verifier: Verifier) -> None:
    keyservice.admin("POST", "/admin/revocations", {"kind": "client", "value": "mirrors"})
    until(lambda: verifier.status().counters.get("disconnects", 0) > 0)
