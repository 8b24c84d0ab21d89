"""One keeper a region and API instances beside it; who has a seat; disks that are lost or put back from a copy."""

from __future__ import annotations

import asyncio
import hmac
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from keyservice.errors import StartError
from keyservice.intents import encode_entries
from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, KEEPER_SECRET, Proxy, Running, Server, eventually, http, is_ready, until
from tests.keyservice.three import StartThree, Three
from verifier.log import LOG_KEY, META_KEY, Entry, region_key

TwoInstances = Callable[..., tuple[Settings, Settings]]


def jti(name: str, **members: Any) -> dict[str, Any]:
    return {"kind": "jti", "value": name, "id": name, **members}


async def revoke(running: Running, body: dict[str, Any]) -> httpx.Response:
    return await running.admin.post("/admin/revocations", json=body, headers=await running.bearer())


def log_ids(server: Server) -> list[str]:
    with server.client() as client:
        return [fields[b"id"].decode() for _, fields in client.xrange(LOG_KEY) if fields[b"kind"] != b"epoch"]


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def processes(run_dir: Path, server: Server, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A region of three processes: its keeper, and the API instances ``one`` and ``two``."""
    shared = {**environment, "KEYSERVICE_KEEPER_SECRET": KEEPER_SECRET, "KEYSERVICE_RECEIPT_WAIT_MS": "20000"}
    for name in ("KEYSERVICE_KEEPER_DIR", "KEYSERVICE_UDS", "KEYSERVICE_ADMIN_UDS"):
        del shared[name]
    keeper = {"KEYSERVICE_KEEPER_DIR": str(run_dir / "k"), "KEYSERVICE_KEEPER_UDS": str(run_dir / "keeper.sock")}
    needless = {"KEYSERVICE_KEK", "KEYSERVICE_CLIENTS_FILE", "JWT_SECRET"}  # a keeper is told none of them
    keeper |= {name: value for name, value in shared.items() if name not in needless}
    api = {**shared, "KEYSERVICE_KEEPER_URL": f"unix://{run_dir / 'keeper.sock'}"}
    wanted = {"keeper": keeper} | {
        name: {**api, "KEYSERVICE_UDS": str(run_dir / name), "KEYSERVICE_ADMIN_UDS": str(run_dir / f"{name}-admin")}
        for name in ("one", "two")
    }
    with ExitStack() as stack:
        children: dict[str, Any] = {}
        for name, env in wanted.items():
            role = "keeper" if name == "keeper" else "api"
            command = [sys.executable, "-m", "keyservice", "serve", "--role", role]
            child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(child.wait)
            stack.callback(child.kill)
            children[name] = child
        yield children


def test_each_api_instance_stores_with_the_regions_keeper_and_without_it_does_nothing(
    run_dir: Path, server: Server, processes: dict[str, Any]
) -> None:
    with ExitStack() as stack:
        public = {name: stack.enter_context(http(run_dir / name)) for name in ("one", "two")}
        admin = {name: stack.enter_context(http(run_dir / f"{name}-admin")) for name in ("one", "two")}
        until(lambda: all(is_ready(client, run_dir / name) for name, client in public.items()), 90)
        form = {"grant_type": "client_credentials", "audience": f"{ISSUER}/admin"}
        token = public["one"].post("/oauth2/token", data=form, auth=("ops", "s3cret")).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}

        def post(name: str, body: dict[str, Any]) -> httpx.Response:
            return admin[name].post("/admin/revocations", json=body, headers=headers, timeout=60)

        until(lambda: admin["two"].get("/admin/keys", headers=headers).status_code == 200)
        for name in ("one", "two"):
            answer = post(name, jti(f"by-{name}"))
            assert (answer.status_code, answer.json()["durability"]) == (200, "replicated")
        processes["keeper"].send_signal(signal.SIGSTOP)
        answers = [post(name, jti(f"stopped-{name}")) for name in ("one", "two")]
        processes["keeper"].kill()
        processes["keeper"].wait()
        answers += [post(name, jti(f"dead-{name}")) for name in ("one", "two")]
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == (503, "keeper_unavailable")
            assert answer.headers["retry-after"] == "1"
        assert log_ids(server) == ["by-one", "by-two"]
        assert public["two"].get("/.well-known/jwks.json").status_code == 200


# -- a keeper and an API instance in this process, over the real socket -----------------------------------------------


async def test_one_id_at_two_instances_at_the_same_moment_is_one_entry(
    server: Server, two_instances: TwoInstances, start_service: Any
) -> None:
    both = [await start_service(one) for one in two_instances(server.url)]
    headers = [await running.bearer() for running in both]
    for attempt in range(5):
        body = jti(f"x{attempt}")
        posts = [
            running.admin.post("/admin/revocations", json=body, headers=shown)
            for running, shown in zip(both, headers, strict=True)
        ]
        one, two = await asyncio.gather(*posts)
        assert (one.status_code, one.json()) == (two.status_code, two.json())
        assert one.json()["durability"] == "replicated"
    assert log_ids(server) == [f"x{attempt}" for attempt in range(5)]


async def test_an_intent_that_is_in_no_log_is_known_to_every_instance_of_its_region(
    run_dir: Path, server: Server, two_instances: TwoInstances, start_service: Any
) -> None:
    proxy = Proxy(run_dir / "to-primary", server.socket)
    await proxy.open()
    settings = two_instances(server.url, primary_url=proxy.url, receipt_wait_ms=300)
    with_keeper, beside = [await start_service(one) for one in settings]
    await proxy.cut()
    await beside.until(lambda: beside.service.beats.problem is not None)
    first = await revoke(beside, jti("x", reason="left"))
    assert (first.status_code, first.json()["position"]) == (202, None)
    for running in (with_keeper, beside):
        again = await revoke(running, jti("x", reason="left"))
        assert (again.status_code, again.json()) == (202, first.json())
        other = await revoke(running, jti("x", reason="another"))
        assert (other.status_code, other.json()["code"]) == (409, "id_conflict")
        found = await running.admin.get("/admin/revocations/x", headers=await running.bearer())
        assert (found.status_code, found.json()["durability"]) == (200, "pending")
    await proxy.open()
    await beside.until(lambda: log_ids(server) == ["x"])
    await beside.until(lambda: with_keeper.keeper._keeper.pending == 0)
    assert log_ids(server) == ["x"]
    await proxy.cut()


async def test_another_secret_than_the_keepers_is_named_and_nothing_is_done(
    server: Server, two_instances: TwoInstances, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    with_keeper, beside = two_instances(server.url)
    await start_service(with_keeper)
    wrong = make_settings(
        server.url, role="api", keeper_dir=None, keeper_url=beside.keeper_url, keeper_secret="another" * 8
    )
    running = await start_service(wrong)
    answer = await revoke(running, jti("x"))
    assert (answer.status_code, answer.json()["code"]) == (503, "keeper_secret_wrong")
    assert "KEYSERVICE_KEEPER_SECRET" in answer.json()["detail"]
    assert "another" not in answer.text.replace("has another", "")
    assert log_ids(server) == []


async def test_nobody_uses_a_keeper_without_its_secret(
    server: Server, two_instances: TwoInstances, start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_keeper, _ = two_instances(server.url)
    running = await start_service(with_keeper)
    keeper = running.clients["keeper"]
    entry = Entry("x", "jti", ISSUER, "x", None, 2_000_000_000, "", 0, "eu-west-1")
    body = {"entries": encode_entries([entry])}
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/keeper/intents", body),
        ("POST", "/keeper/outcomes", body),
        ("GET", "/keeper/entries/x", None),
    ]
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(shown: bytes, expected: bytes) -> bool:
        compared.append((shown, expected))
        return compare(shown, expected)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for method, path, content in calls:
        for shown in (None, "", KEEPER_SECRET, f"Basic {KEEPER_SECRET}", f"Bearer {KEEPER_SECRET[:-1]}", "Bearer é"):
            headers = {} if shown is None else {"Authorization": shown.encode()}
            answer = await keeper.request(method, path, json=content, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "keeper_secret_wrong")
            assert KEEPER_SECRET not in answer.text
    assert len(compared) == 18, "each in constant time"
    assert await running.keeper.find("x") is None
    right = {"Authorization": f"Bearer {KEEPER_SECRET}"}
    assert (await keeper.request(*calls[2][:2], headers=right)).json()["code"] == "revocation_unknown"
    for before in ([None], body["entries"]):
        answer = await keeper.request("POST", "/keeper/intents", json=body, headers=right)
        assert answer.json() == {"before": before}
    assert await running.keeper.find("x") == entry
    broken = {"entries": [{"v": "1"}]}
    answer = await keeper.request("POST", "/keeper/intents", json=broken, headers=right)
    assert (answer.status_code, answer.json()["code"]) == (422, "field_missing")


# -- exactly one keeper, and the disk that it was ---------------------------------------------------------------------


async def test_a_second_keeper_of_a_region_refuses_to_start(
    server: Server, running: Running, make_settings: Callable[..., Settings], start_service: Any
) -> None:
    await running.until(lambda: _reports(server))
    with pytest.raises(StartError) as refused:
        await start_service(make_settings(server.url))
    assert refused.value.code == "region_has_keeper"
    assert running.keeper.disk.keeper_id in str(refused.value)
    with pytest.raises(StartError) as refused:
        await start_service(running.service.settings)
    assert refused.value.code == "keeper_already_running"
    assert (await revoke(running, jti("x"))).status_code == 200


def _reports(server: Server) -> bool:
    with server.client() as client:
        return bool(client.hexists(region_key("eu-west-1"), "held"))


async def test_a_copy_put_back_in_place_of_a_disk_is_another_keeper_and_has_no_seat(
    server: Server, run_dir: Path, impatient: Callable[..., Settings], start_service: Any
) -> None:
    settings, directory = impatient(server.url, keeper_dir=run_dir / "keeper"), run_dir / "keeper"
    before = await start_service(settings)
    original = before.keeper.disk.keeper_id
    await before.service.stop()
    shutil.copytree(directory, run_dir / "copy")
    between = await start_service(settings)
    assert between.keeper.disk.keeper_id == original, "a restart alone changes nothing"
    await between.until(lambda: between.keeper.seated)
    with server.client() as client:
        for name in ("a", "b"):
            assert (await revoke(between, jti(name))).status_code in (200, 202)
        commit = between.keeper.disk.commit
        await between.until(lambda: int(client.hget(region_key("eu-west-1"), "commit")) >= commit)
    await between.service.stop()
    shutil.rmtree(directory)
    shutil.copytree(run_dir / "copy", directory)
    restored = await start_service(settings)
    assert restored.keeper.disk.keeper_id != original
    await restored.until(lambda: "keeper_not_seated" in restored.service.readiness().warnings)
    answer = await revoke(restored, jti("c"))
    assert (answer.status_code, answer.json()["durability"]) == (202, "pending")
    headers, deadline = await restored.bearer(), time.monotonic() + 60
    while True:  # it reports once the other's last report is too old for one that lives
        region = (await restored.admin.get("/admin/regions", headers=headers)).json()["regions"]["eu-west-1"]
        if region["keeper_id"] == restored.keeper.disk.keeper_id:
            break
        assert time.monotonic() < deadline
        await anyio.sleep(0.1)
    assert (region["seat"], region["voter"]) == (original, False)
    assert log_ids(server) == ["a", "b", "c"]


# -- seats over HTTP --------------------------------------------------------------------------------------------------


async def test_seats_are_read_and_changed_with_the_scopes_for_it_alone(running: Running) -> None:
    watcher, login, ops = [await running.bearer(name) for name in ("watcher", "login", "ops")]
    assert (await running.admin.get("/admin/regions")).status_code == 401
    assert (await running.admin.get("/admin/regions", headers=login)).json()["code"] == "insufficient_scope"
    answer = await running.admin.get("/admin/regions", headers=watcher)
    assert answer.status_code == 200
    body = answer.json()
    keeper_id = running.keeper.disk.keeper_id
    assert (body["epoch"]["open"], body["voters"], body["majority"]) == (True, {"eu-west-1": keeper_id}, 1)
    assert body["missing_to_open"] == []
    region = body["regions"]["eu-west-1"]
    assert (region["seat"], region["keeper_id"], region["voter"], region["merged"]) == (
        keeper_id,
        keeper_id,
        True,
        True,
    )
    for verb in ("add", "remove", "replace", "forget"):
        for headers in (watcher, login):
            answer = await running.admin.post(f"/admin/keepers/{verb}", json={"region": "eu-west-1"}, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
    for verb, wanted, status, code in (
        ("add", {"region": "eu-west-1"}, 409, "seat_taken"),
        ("remove", {"region": "eu-west-1"}, 409, "last_seat"),
        ("remove", {"region": "mars"}, 404, "seat_unknown"),
        ("replace", {}, 422, "region_missing"),
        ("forget", {"keeper_id": keeper_id}, 409, "loss_not_accepted"),
        ("add", {"surprise": 1}, 422, "body_invalid"),
    ):
        answer = await running.admin.post(f"/admin/keepers/{verb}", json=wanted, headers=ops)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert running.service.trust.bumps == 1, "no epoch was begun for any of them"


async def regions(three: Three) -> dict[str, Any]:
    eu = three.running["eu"]
    found: dict[str, Any] = (await eu.admin.get("/admin/regions", headers=await eu.bearer())).json()
    return found


async def change(three: Three, verb: str, **wanted: Any) -> httpx.Response:
    eu = three.running["eu"]
    return await eu.admin.post(f"/admin/keepers/{verb}", json=wanted, headers=await eu.bearer())


async def reports(three: Three, *names: str) -> None:
    """Wait until each of these regions' present keepers reports."""
    for name in names:
        keeper_id = three.running[name].keeper.disk.keeper_id
        await eventually(lambda: regions(three), partial(_is_reporting, name, keeper_id))


def _is_reporting(name: str, keeper_id: str, seen: dict[str, Any]) -> bool:
    return bool(seen["regions"][name]["keeper_id"] == keeper_id)


async def test_a_seat_is_taken_away_and_given_again(start_three: StartThree) -> None:
    three = await start_three()
    assert (await change(three, "remove", region="ap")).status_code == 202
    await three.running["eu"].ready()
    await three.running["eu"].until(lambda: three.running["ap"].keeper.seated is False)
    answer = await three.revoke("us", jti("x"))
    assert (answer.status_code, answer.json()["regions"]["ap"]) == (200, False)
    answer = await change(three, "add", region="ap")
    assert answer.status_code == 202
    assert answer.json()["voters"]["ap"] == three.running["ap"].keeper.disk.keeper_id
    assert (await three.replicated("ap", "x", lambda receipt: receipt["regions"]["ap"]))["regions"]["ap"]


async def test_after_a_lost_disk_the_new_keeper_gets_the_seat_and_the_epoch_opens(start_three: StartThree) -> None:
    three = await start_three()
    assert (await three.revoke("us", jti("before"))).status_code == 200
    old = three.running["us"].keeper.disk.keeper_id
    await three.replace_disk("us")
    us = three.running["us"]
    await us.until(lambda: "keeper_not_seated" in us.service.readiness().warnings)
    assert us.keeper.disk.keeper_id != old
    assert (await three.revoke("eu", jti("between"))).status_code == 200, "the other two are a majority"
    await reports(three, "us")
    answer = await change(three, "replace", region="us")
    assert (answer.status_code, answer.json()["voters"]["us"]) == (202, us.keeper.disk.keeper_id)
    assert answer.json()["at_risk"] is None
    for name in ("before", "between"):
        found = await three.replicated("us", name, lambda receipt: receipt["regions"]["us"])
        assert found["regions"]["us"]
    await three.stop("ap")
    assert (await three.revoke("us", jti("after"))).status_code == 200, "eu and the new keeper are a majority"


async def test_with_two_of_three_disks_lost_nothing_opens_until_they_are_forgotten_aloud(
    start_three: StartThree,
) -> None:
    three = await start_three(receipt_wait_ms=300)
    await three.revoke("us", jti("before"))
    await three.replicated("eu", "before", lambda receipt: receipt["regions"]["eu"])
    lost = {name: three.running[name].keeper.disk.keeper_id for name in ("us", "ap")}
    for name in lost:
        await three.replace_disk(name)
    await reports(three, "us", "ap")
    for name in lost:
        answer = await change(three, "replace", region=name)
        assert answer.status_code == 202
        assert answer.json()["voters"][name] == three.running[name].keeper.disk.keeper_id
    seen = await eventually(
        lambda: regions(three),
        lambda seen: all(region.get("voter") and region["merged"] for region in seen["regions"].values()),
    )
    assert seen["epoch"]["open"] is False
    assert seen["missing_to_open"][0] == 1, "of the voters before, one more"
    assert seen["missing_to_open"][-1] == 0
    answer = await three.revoke("us", jti("during"))
    assert (answer.status_code, answer.json()["durability"]) == (202, "pending")
    answer = await change(three, "forget", keeper_id=lost["us"])
    assert (answer.status_code, answer.json()["code"]) == (409, "loss_not_accepted")
    assert "may be lost" in answer.json()["detail"]
    for keeper_id in lost.values():
        answer = await change(three, "forget", keeper_id=keeper_id, accept_loss=True)
        assert answer.status_code == 202
        assert keeper_id in answer.json()["at_risk"]
    for name in ("before", "during"):
        await three.replicated("us", name)


# -- the first start, and what is none --------------------------------------------------------------------------------


async def test_the_log_begins_when_every_seat_has_a_keeper(
    run_dir: Path, start_server: Callable[..., Server], make_settings: Callable[..., Settings], start_service: Any
) -> None:
    three = Three(run_dir, start_server, make_settings, start_service)
    for proxy in three.proxies.values():
        await proxy.open()
    two = {name: await start_service(three.settings[name], ready=False) for name in ("eu", "us")}
    with three.servers["eu"].client() as client:

        def registered(name: str) -> bytes | None:
            found: bytes | None = client.hget(region_key(name), "at")
            return found

        def anew(seen: dict[str, bytes | None]) -> bool:
            return all(registered(name) not in (None, at) for name, at in seen.items())

        for _ in range(3):  # rounds of both
            seen = {name: registered(name) for name in two}
            await two["eu"].until(partial(anew, seen))
        assert not client.exists(META_KEY, LOG_KEY)
        assert "waiting_for_bootstrap" in two["eu"].service.readiness().reasons
        last = await start_service(three.settings["ap"], ready=False)
        for running in (*two.values(), last):
            await running.ready(60)
        voters = two["us"].service.mirror.view.epoch.chain[0].voters
        keepers = {"eu": two["eu"], "us": two["us"], "ap": last}
        assert voters == {name: running.keeper.disk.keeper_id for name, running in keepers.items()}
    for running in (*two.values(), last):
        await running.service.stop()
    await three.close()


async def signed_by(running: Running) -> str:
    import jwt

    return str(jwt.get_unverified_header(await running.token("orders"))["kid"])


def published(running: Running) -> set[str]:
    document = running.frontend.ring.document
    return set() if document is None else set(document.keys.kids)


@pytest.mark.parametrize("how", ["flushed", "restarted-empty"])
async def test_a_server_that_lost_everything_gets_it_all_back_and_keys_go_on(start_three: StartThree, how: str) -> None:
    three = await start_three()
    everybody = list(three.running.values())
    await three.until_all(lambda running: len(published(running)) == len(running.keeper.disk.keys()) == 6)
    await three.until_all(lambda running: len(running.keeper.disk.private()) == 2)
    for name in ("eu", "us", "ap"):
        assert (await three.revoke(name, jti(f"by-{name}"))).status_code == 200
    epoch = everybody[0].service.mirror.view.epoch
    assert epoch is not None
    kids = published(everybody[0])
    signers = [await signed_by(running) for running in everybody]
    if how == "flushed":
        with three.servers["eu"].client() as client:
            client.flushall()
    else:
        three.servers["eu"].kill()
        three.servers["eu"].start()
    await everybody[0].until(lambda: set(three.log()) == {"by-eu", "by-us", "by-ap"}, 60)
    await three.until_all(lambda running: _later(running, epoch.number))
    for name in three.running:
        for entry_id in ("by-eu", "by-us", "by-ap"):
            await three.replicated(name, entry_id)
    await three.until_all(lambda running: published(running) == kids)
    with three.servers["eu"].client() as client:
        await everybody[0].until(lambda: {kid.decode() for kid in client.hkeys("{trust}:keys")} == kids, 60)
        private = [f"{{ks}}:private:{name}" for name in three.running]
        await everybody[0].until(lambda: [client.hlen(name) for name in private] == [2, 2, 2], 60)
    assert [await signed_by(running) for running in everybody] == signers
    now = everybody[0].service.mirror.view.epoch
    assert now is not None
    assert now.chain[-1].voters == epoch.chain[-1].voters, "with the voters on the keepers' disks"


def _later(running: Running, number: int) -> bool:
    epoch = running.service.mirror.view.epoch
    return epoch is not None and epoch.open and epoch.number > number
