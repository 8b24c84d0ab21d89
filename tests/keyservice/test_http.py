"""The key set, the admin API and health, over HTTP on the real application with a real server behind it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import pytest

from keyservice.limits import BULK_REVOCATIONS_MAX
from keyservice.settings import Settings
from tests.keyservice.support import HS256_SECRET, ISSUER, Running, Server
from verifier.jwk import KeySet
from verifier.log import EPOCH_KEY, KEYS_KEY, Generation, Position
from verifier.replica import ReplicaMirror
from verifier.testing import make_key, sign

JWKS = "/.well-known/jwks.json"


# -- the key set ------------------------------------------------------------------------------------------------------


async def test_the_key_set_is_public_cacheable_and_has_a_generation(running: Running) -> None:
    answer = await running.public.get(JWKS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/jwk-set+json"
    assert answer.headers["cache-control"] == "public, max-age=2"
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert Generation.parse(answer.headers["trust-generation"]).n > 0
    keys = KeySet.from_document(answer.content)
    assert not keys.rejected
    assert running.frontend.ring.signing_key().kid in keys.kids


async def test_head_gives_the_headers_alone(running: Running) -> None:
    got, head = await running.public.get(JWKS), await running.public.head(JWKS)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers} == {**got.headers}


@pytest.mark.parametrize(
    ("header", "status"), [("{etag}", 304), ("W/{etag}", 304), ('"x", {etag}', 304), ("*", 304), ('"x"', 200)]
)
async def test_a_client_that_has_the_set_gets_304(running: Running, header: str, status: int) -> None:
    etag = (await running.public.get(JWKS)).headers["etag"]
    answer = await running.public.get(JWKS, headers={"If-None-Match": header.format(etag=etag)})
    assert answer.status_code == status
    assert bool(answer.content) is (status == 200)
    assert answer.headers["etag"] == etag
    assert "trust-generation" in answer.headers


async def test_the_key_set_is_only_read(running: Running) -> None:
    answer = await running.public.post(JWKS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["code"] == "method_not_allowed"


async def test_a_replica_that_comes_back_empty_takes_no_key_away(running: Running, server: Server) -> None:
    before = (await running.public.get(JWKS)).content
    with server.client() as client:
        client.delete(KEYS_KEY)
        client.hincrby(EPOCH_KEY, "keys_n", 1)
    generation = running.frontend.ring.document
    await running.until(lambda: running.frontend.ring.document is not generation)
    after = (await running.public.get(JWKS)).content
    assert set(KeySet.from_document(before).kids) <= set(KeySet.from_document(after).kids)


async def test_another_regions_published_keys_are_in_the_set(running: Running, server: Server) -> None:
    other = make_key()
    times = {"prepared_at": 1, "published_at": 1, "active_at": None, "retiring_at": None, "removed_at": None}
    record = {"v": 1, "kid": other.kid, "region": "us-east-1", "alg": "RS256", "jwk": other.jwk, "rev": 1, **times}
    with server.client() as client:
        client.hset(KEYS_KEY, other.kid, msgspec.json.encode({**record, "state": "published"}))
        client.hincrby(EPOCH_KEY, "keys_n", 1)
    await running.until(lambda: other.kid in running.frontend.ring.document.keys.kids)  # type: ignore[union-attr]
    with server.client() as client:
        client.hset(KEYS_KEY, other.kid, msgspec.json.encode({**record, "state": "removed", "rev": 2}))
        client.hincrby(EPOCH_KEY, "keys_n", 1)
    await running.until(lambda: other.kid not in running.frontend.ring.document.keys.kids)  # type: ignore[union-attr]


# -- who may use the admin API ----------------------------------------------------------------------------------------


async def test_without_a_token_there_is_a_challenge(running: Running) -> None:
    for method, path in (
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys/rotate"),
        ("GET", "/admin/revocations"),
        ("GET", "/admin/revocations/x"),
        ("POST", "/admin/revocations"),
        ("POST", "/admin/sessions"),
        ("DELETE", "/admin/sessions/x"),
    ):
        answer = await running.admin.request(method, path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["code"] == "token_missing"


async def refused(running: Running, token: str) -> str:
    answer = await running.admin.get("/admin/keys", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    return str(answer.json()["code"])


async def test_hs256_is_never_a_bearer_here(running: Running) -> None:
    token = await running.token("legacy", audience=f"{ISSUER}/admin")
    assert await refused(running, token) == "alg_not_allowed"
    import jwt

    now = int(time.time())
    claims = {"iss": ISSUER, "aud": f"{ISSUER}/admin", "sub": "ops", "client_id": "ops", "iat": now, "exp": now + 60}
    forged = jwt.encode({**claims, "scope": "keyservice:admin"}, HS256_SECRET, "HS256")
    assert await refused(running, forged) == "alg_not_allowed"


async def test_another_audience_or_a_foreign_key_is_refused(running: Running) -> None:
    assert await refused(running, await running.token("ops", audience="orders")) == "claim_invalid"
    assert await refused(running, sign(make_key(), {"iss": ISSUER, "aud": f"{ISSUER}/admin"})) == "kid_unknown"
    assert await refused(running, "nonsense") == "token_malformed"


async def test_a_scope_is_needed_and_admin_implies_all(running: Running) -> None:
    narrow, all_of_them = await running.bearer("login"), await running.bearer("ops")
    answer = await running.admin.get("/admin/keys", headers=narrow)
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    assert (await running.admin.get("/admin/keys", headers=all_of_them)).status_code == 200


async def test_a_revoked_admin_token_is_refused(running: Running) -> None:
    mine, victim = await running.bearer(), await running.token(audience=f"{ISSUER}/admin")
    assert (await running.admin.post("/admin/revocations", json={"token": victim}, headers=mine)).status_code == 200
    assert await refused(running, victim) == "token_revoked"


# -- revocations ------------------------------------------------------------------------------------------------------


async def revoke(running: Running, body: dict[str, Any], **headers: str) -> Any:
    return await running.admin.post("/admin/revocations", json=body, headers={**(await running.bearer()), **headers})


async def test_a_receipt_says_replicated_when_a_majority_of_regions_has_it_on_disk(running: Running) -> None:
    answer = await revoke(running, {"token": await running.token("orders")})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"id", "position", "durability", "regions"}
    assert (body["durability"], body["regions"]) == ("replicated", {"eu-west-1": True})
    assert Position.parse(body["position"]).seq == 1
    assert answer.headers["trust-position"] == body["position"]
    assert await running.keeper.find(body["id"]) is not None


async def test_a_receipt_claims_no_more_than_is_known(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(make_settings(server.url, receipt_wait_ms=0))
    answer = await revoke(running, {"kind": "jti", "value": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
    body = answer.json()
    assert (body["durability"], body["regions"]) == ("pending", {"eu-west-1": False})
    assert Position.parse(body["position"]).seq == 1
    assert "trust-position" not in answer.headers
    later = await eventually_replicated(running, body["id"])
    assert later["position"] == body["position"]


async def eventually_replicated(running: Running, entry_id: str) -> dict[str, Any]:
    """The receipt, once it says so."""
    headers = await running.bearer()
    with anyio.fail_after(60):
        while True:
            answer = await running.admin.get(f"/admin/revocations/{entry_id}", headers=headers)
            if answer.status_code == 200 and answer.json()["durability"] == "replicated":
                assert answer.headers["trust-position"] == answer.json()["position"]
                found: dict[str, Any] = answer.json()
                return found
            assert "trust-position" not in answer.headers
            await anyio.sleep(0.05)


async def test_a_retry_with_the_same_id_gets_the_stored_entry(running: Running, server: Server) -> None:
    body = {"kind": "sub", "value": "ada", "reason": "left"}
    first = await revoke(running, body, **{"Idempotency-Key": "one"})
    again = await revoke(running, {**body, "id": "one"})
    assert first.json() == again.json()
    with server.client() as client:
        assert client.xlen("{trust}:log") == 2
    other = await revoke(running, {**body, "value": "bob", "id": "one"})
    assert (other.status_code, other.json()["code"]) == (409, "id_conflict")
    differing = await revoke(running, {**body, "id": "two"}, **{"Idempotency-Key": "three"})
    assert (differing.status_code, differing.json()["code"]) == (422, "id_conflict")


async def test_requests_with_one_id_at_the_same_time_append_once(running: Running, server: Server) -> None:
    body = {"kind": "sub", "value": "ada", "id": "one"}
    answers = await asyncio.gather(*(revoke(running, body) for _ in range(5)))
    assert len({answer.json()["position"] for answer in answers}) == 1
    with server.client() as client:
        assert client.xlen("{trust}:log") == 2


async def test_an_entry_of_another_instance_is_known_by_its_id(
    server: Server, two_instances: Callable[..., tuple[Settings, Settings]], start_service: Any
) -> None:
    running, other = [await start_service(settings) for settings in two_instances(server.url)]
    first = await revoke(running, {"kind": "jti", "value": "x", "id": "one"})
    await other.until(lambda: other.service.index.get("one"))
    assert (await revoke(other, {"kind": "jti", "value": "x", "id": "one"})).json() == first.json()
    assert (await revoke(other, {"kind": "jti", "value": "y", "id": "one"})).status_code == 409


async def test_many_revocations_have_a_result_each(running: Running) -> None:
    items = [{"kind": "jti", "value": f"j{n}"} for n in range(1500)]
    items[3] = {"kind": "epoch", "value": "x"}
    items[5] = {"kind": "jti", "value": "x", "id": "twice"}
    items[6] = {"kind": "jti", "value": "y", "id": "twice"}
    answer = await revoke(running, {"revocations": items})
    assert answer.status_code == 202
    results = answer.json()["results"]
    assert [result["index"] for result in results] == list(range(1500))
    assert {n: r["code"] for n, r in enumerate(results) if "code" in r} == {3: "kind_unknown", 6: "id_conflict"}
    assert len({r["position"] for r in results if "position" in r}) == 1498
    assert {r["durability"] for r in results if "position" in r} == {"replicated"}
    assert running.service.mirror.snapshot.find(issuer=ISSUER, jti="j1499") is not None


async def test_a_bulk_of_which_nothing_is_accepted_is_refused_with_its_results(
    running: Running, server: Server
) -> None:
    await revoke(running, {"kind": "jti", "value": "j", "id": "one"})
    items = [{"kind": "epoch", "value": "x"}, {"kind": "jti", "value": "other", "id": "one"}]
    answer = await revoke(running, {"revocations": items})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["code"] == "revocations_refused"
    assert [(r["index"], r["code"]) for r in answer.json()["results"]] == [(0, "kind_unknown"), (1, "id_conflict")]
    with server.client() as client:
        assert client.xlen("{trust}:log") == 2
    answer = await revoke(running, {"revocations": [*items, {"kind": "jti", "value": "j", "id": "one"}]})
    assert answer.status_code == 202


@pytest.mark.parametrize(("count", "status"), [(0, 422), (1, 200), (BULK_REVOCATIONS_MAX + 1, 422)])
async def test_a_bulk_has_a_bounded_size(running: Running, count: int, status: int) -> None:
    items = [{"kind": "jti", "value": f"j{n}"} for n in range(count)]
    assert (await revoke(running, {"revocations": items})).status_code == status


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"kind": "sub", "value": "x", "surprise": 1}, 422, "body_invalid"),
        ({"kind": "sub", "value": 7}, 422, "body_invalid"),
        ({"kind": "sub", "value": "x", "revocations": []}, 422, "request_ambiguous"),
        ({"token": "a.b.c"}, 422, "token_malformed"),
        ([], 422, "body_invalid"),
    ],
)
async def test_a_bad_request_is_a_problem_document(running: Running, body: Any, status: int, code: str) -> None:
    answer = await revoke(running, body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json()) == {"type", "title", "status", "code", "detail"}


async def test_a_body_that_is_not_json_is_refused(running: Running) -> None:
    headers = await running.bearer()
    answer = await running.admin.post("/admin/revocations", content=b"{", headers=headers)
    assert answer.status_code == 415
    headers["Content-Type"] = "application/json"
    answer = await running.admin.post("/admin/revocations", content=b"{", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "body_not_json")
    answer = await running.admin.post("/admin/sessions", content=b"[" * 65_537, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


async def test_revocations_are_read_back_page_by_page(running: Running) -> None:
    for n in range(5):
        await revoke(running, {"kind": "jti", "value": f"j{n}", "id": f"id{n}", "reason": "test"})
    headers = await running.bearer()
    one = (await running.admin.get("/admin/revocations/id3", headers=headers)).json()
    assert (one["kind"], one["value"], one["issuer"], one["reason"], one["region"]) == (
        "jti",
        "j3",
        ISSUER,
        "test",
        "eu-west-1",
    )
    seen: list[str] = []
    before: str | None = ""
    while before is not None:
        params = {"limit": "2", **({"before": before} if before else {})}
        page = (await running.admin.get("/admin/revocations", headers=headers, params=params)).json()
        seen += [item["id"] for item in page["revocations"]]
        before = page["next"]
    assert seen == ["id4", "id3", "id2", "id1", "id0"]
    missing = await running.admin.get("/admin/revocations/none", headers=headers)
    assert (missing.status_code, missing.json()["code"]) == (404, "revocation_unknown")
    wrong = await running.admin.get("/admin/revocations?limit=1001", headers=headers)
    assert (wrong.status_code, wrong.json()["code"]) == (422, "page_invalid")


# -- outages ----------------------------------------------------------------------------------------------------------


async def test_without_the_primary_writes_say_so_and_memory_goes_on(
    server: Server, impatient: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(impatient(server.url))
    headers = await running.bearer()
    session = (
        await running.admin.post(
            "/admin/sessions", json={"sub": "ada", "client_id": "web", "audience": "orders"}, headers=headers
        )
    ).json()
    server.kill()
    await running.until(lambda: running.service.beats.problem is not None)
    answers = [
        await running.admin.post("/admin/revocations", json={"kind": "sub", "value": "a"}, headers=headers),
        await running.admin.post("/admin/revocations", json={"kind": "jti", "value": "j"}, headers=headers),
        await running.admin.delete(f"/admin/sessions/{session['sid']}", headers=headers),
    ]
    for answer in answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        assert (answer.json()["durability"], answer.json()["position"]) == ("pending", None)
        found = await running.admin.get(f"/admin/revocations/{answer.json()['id']}", headers=headers)
        assert (found.status_code, found.json()["durability"], found.json()["position"]) == (200, "pending", None)
    assert running.service.mirror.snapshot.find(issuer=ISSUER, jti="j") is not None, "in force here at once"
    form = {"grant_type": "refresh_token", "refresh_token": session["refresh_token"]}
    answer = await running.public.post("/oauth2/token", data=form, auth=("web", "s3cret"))
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.json()["error_description"].startswith("session_store_unreachable")
    assert await running.token("orders")
    assert (await running.public.get(JWKS)).status_code == 200
    ready = await running.public.get("/readyz")
    assert ready.status_code == 200
    assert "primary_unreachable" in ready.json()["warnings"]


async def test_a_write_without_an_answer_is_pending_and_never_failed(
    server: Server, impatient: Callable[..., Settings], start_service: Any
) -> None:
    running = await start_service(impatient(server.url))
    headers = await running.bearer()
    with server.stopped():
        body = {"kind": "jti", "value": "a", "id": "one"}
        answer = await running.admin.post("/admin/revocations", json=body, headers=headers)
        assert (answer.status_code, answer.json()["durability"]) == (202, "pending")
        assert "trust-position" not in answer.headers
    await eventually_replicated(running, "one")
    with server.client() as client:
        ids = [fields[b"id"] for _, fields in client.xrange("{trust}:log")]
    assert ids.count(b"one") == 1


async def test_a_clock_that_is_off_stops_signing_and_says_so(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    offset_s = 0.0
    running = await start_service(make_settings(server.url), clock=lambda: time.time() + offset_s)
    await running.until(lambda: running.service.beats.problem is None)
    offset_s = 0.8
    await anyio.sleep(0.5)
    assert await running.token("orders")
    offset_s = 1.5
    await running.until(lambda: running.service.beats.problem == "clock_skew")
    form = {"grant_type": "client_credentials"}
    answer = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert (answer.status_code, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.json()["error_description"].startswith("clock_skew")
    ready = await running.public.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["clock_skew"])
    with server.client() as client:
        n = client.hget("{trust}:beat", "n")
        await anyio.sleep(0.5)
        assert client.hget("{trust}:beat", "n") == n
    offset_s = 0.0
    await running.until(lambda: running.service.beats.problem is None)
    assert await running.token("orders")


async def test_a_clock_that_is_off_dates_no_revocation(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    offset_s = 0.0
    running = await start_service(make_settings(server.url), clock=lambda: time.time() + offset_s)
    await running.until(lambda: running.service.beats.problem is None)
    headers = await running.bearer()
    offset_s = -2.0
    await running.until(lambda: running.service.beats.problem == "clock_skew")
    items = [{"kind": "sub", "value": "a"}, {"kind": "no such"}]
    answers = [
        await running.admin.post("/admin/revocations", json=items[0], headers=headers),
        await running.admin.post("/admin/revocations", json={"revocations": items}, headers=headers),
        await running.admin.delete("/admin/sessions/some-session", headers=headers),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (503, "clock_skew")
        assert answer.headers["retry-after"] == "1"
    with server.client() as client:
        assert client.xlen("{trust}:log") == 1
    offset_s = 0.0
    await running.until(lambda: running.service.beats.problem is None)
    answer = await running.admin.post("/admin/revocations", json=items[0], headers=headers)
    assert answer.status_code == 200


async def test_while_revocations_are_unknown_nothing_is_signed_and_no_bearer_accepted(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = await running.bearer()
    await asyncio.to_thread(running.service.mirror.close)  # or its next round would put what it knows back
    monkeypatch.setattr(running.service.mirror, "_view", ReplicaMirror(running.service.settings.redis_url).view)
    answer = await running.admin.get("/admin/keys", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "mirror_not_synced")
    form = {"grant_type": "client_credentials"}
    answer = await running.public.post("/oauth2/token", data=form, auth=("orders", "s3cret"))
    assert answer.json()["error_description"].startswith("mirror_not_synced")


# -- health -----------------------------------------------------------------------------------------------------------


async def test_health_and_metrics_are_on_both_applications(running: Running) -> None:
    for client in (running.public, running.admin):
        assert (await client.get("/livez")).json() == {"alive": True}
        ready = (await client.get("/readyz")).json()
        assert (ready["ready"], ready["reasons"], ready["warnings"]) == (True, [], [])
        assert (await client.get("/metrics")).status_code == 200


async def test_metrics_have_bounded_labels_and_no_secret(running: Running) -> None:
    token = await running.token("orders")
    await running.public.get("/no/such/path?x=1")
    await running.public.request("BREW", "/livez")
    await running.admin.get("/admin/revocations/some-id", headers=await running.bearer())
    text = (await running.admin.get("/metrics")).text
    assert 'route="unmatched"' in text
    assert 'method="other"' in text
    assert 'route="/admin/revocations/{entry_id}"' in text
    assert 'keyservice_tokens_issued_total{alg="RS256",grant="client_credentials"}' in text
    assert 'keyservice_keys{region="eu-west-1",state="active"} 1.0' in text
    assert "keyservice_epoch_open 1.0" in text
    for secret in (token, "s3cret", "some-id", "/no/such"):
        assert secret not in text


async def test_an_unknown_path_is_a_problem_document(running: Running) -> None:
    answer = await running.admin.get("/nowhere")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = await running.public.get("/oauth2/token")
    assert (answer.status_code, answer.json()["error"]) == (405, "invalid_request")


async def test_a_region_that_waits_for_the_bootstrap_says_so(
    server: Server, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    both = {"regions": "us-east-1,eu-west-1", "bootstrap_region": "us-east-1"}
    waiting = await start_service(make_settings(server.url, **both), ready=False)
    await waiting.until(lambda: "waiting_for_bootstrap" in waiting.service.readiness().reasons)
    answer = await waiting.public.get("/readyz")
    assert answer.status_code == 503
    assert (await waiting.public.get(JWKS)).json()["code"] == "keys_unavailable"
    other = await start_service(make_settings(server.url, **both, region="us-east-1", kek="b" * 43))
    await waiting.ready()
    await waiting.until(lambda: len(waiting.frontend.ring.document.keys) == 4)
    await other.ready()
    await other.until(lambda: len(other.frontend.ring.document.keys) == 4)
    assert (await waiting.public.get(JWKS)).content == (await other.public.get(JWKS)).content
