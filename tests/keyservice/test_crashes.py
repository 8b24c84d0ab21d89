"""A key service killed between any two steps: what was acknowledged is in force, what was stored gets into the log."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from keyservice.keeper_disk import SqliteDisk
from keyservice.settings import Settings
from tests.keyservice.support import ISSUER, Running, Server, http, is_ready, until
from verifier.log import LOG_KEY

ROOT = Path(__file__).parents[2]
WHEN = ("before", "after")
REVOKING = [(step, when) for step in ("intend", "store", "append", "appended", "report", "settle") for when in WHEN]
"""Of a revocation, in their order."""

MERGING = [
    (step, when) for step in ("register", "bump", "promise", "add", "report", "open", "put-back-keys") for when in WHEN
]
QUICK = {("store", "after"), ("append", "after")}
QUICK_MERGING = {("promise", "after")}


def points(every: list[tuple[str, str]], quick: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(*point, id="-".join(reversed(point)), marks=() if point in quick else pytest.mark.slow)
        for point in every
    ]


def crashing(environment: dict[str, str], step: str, when: str, let_through: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.keyservice.crashing", step, when, str(let_through)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bearer(public: httpx.Client) -> dict[str, str]:
    form = {"grant_type": "client_credentials", "audience": f"{ISSUER}/admin"}
    token = public.post("/oauth2/token", data=form, auth=("ops", "s3cret")).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}


def jti(name: str) -> dict[str, str]:
    return {"kind": "jti", "value": name, "id": name}


def ids_in_log(server: Server) -> list[str]:
    with server.client() as client:
        return [fields[b"id"].decode() for _, fields in client.xrange(LOG_KEY) if fields[b"kind"] == b"jti"]


def in_force(running: Running, name: str) -> bool:
    return running.service.mirror.snapshot.find(issuer=ISSUER, jti=name) is not None


def acknowledged_until_it_died(environment: dict[str, str], child: subprocess.Popen[bytes]) -> dict[str, bool]:
    """Revoke twice; of every revocation that was answered, whether it was acknowledged."""
    public, admin = Path(environment["KEYSERVICE_UDS"]), Path(environment["KEYSERVICE_ADMIN_UDS"])
    answered: dict[str, bool] = {}
    with http(public) as client, http(admin) as admin_client:
        until(lambda: is_ready(client, public), 90)
        headers = bearer(client)
        for name in ("first", "second"):
            try:
                answer = admin_client.post("/admin/revocations", json=jti(name), headers=headers, timeout=60)
            except httpx.HTTPError:
                break
            assert answer.status_code in (200, 202)
            answered[name] = answer.json()["durability"] == "replicated"
    assert child.wait(60) == -signal.SIGKILL
    return answered


@pytest.mark.parametrize("loses", [False, True], ids=["server-stays", "server-loses-all"])
@pytest.mark.parametrize(("step", "when"), points(REVOKING, QUICK))
async def test_killed_beside_any_step_of_a_revocation_nothing_acknowledged_or_stored_is_lost(
    server: Server,
    environment: dict[str, str],
    make_settings: Callable[..., Settings],
    start_service: Any,
    step: str,
    when: str,
    loses: bool,
) -> None:
    environment |= {"KEYSERVICE_RECEIPT_WAIT_MS": "20000"}
    with crashing(environment, step, when, 1) as child:
        answered = acknowledged_until_it_died(environment, child)
    assert answered["first"] is True
    directory = Path(environment["KEYSERVICE_KEEPER_DIR"])
    with closing(SqliteDisk(directory, region="eu-west-1")) as disk:
        stored = set(disk.find_all(["first", "second"]))
    assert {name for name, is_acknowledged in answered.items() if is_acknowledged} <= stored
    assert ("second" in stored) == ((step, when) not in [("intend", "before"), ("store", "before")])
    if loses:
        with server.client() as client:
            client.flushall()
    running: Running = await start_service(make_settings(server.url, keeper_dir=directory))
    await running.until(lambda: stored <= set(ids_in_log(server)))
    await running.until(lambda: all(in_force(running, name) for name in stored))
    for name in ("first", "second"):
        again = await running.admin.post("/admin/revocations", json=jti(name), headers=await running.bearer())
        assert (again.status_code, again.json()["durability"]) == (200, "replicated")
    assert sorted(ids_in_log(server)) == ["first", "second"], "and each of them once"


@pytest.mark.parametrize(("step", "when"), points(MERGING, QUICK_MERGING))
async def test_killed_beside_any_step_of_a_merge_the_next_start_completes_it(
    server: Server,
    environment: dict[str, str],
    make_settings: Callable[..., Settings],
    start_service: Any,
    step: str,
    when: str,
) -> None:
    directory = Path(environment["KEYSERVICE_KEEPER_DIR"])
    if step == "register":
        expected: list[str] = []  # the very first start
    else:
        running: Running = await start_service(make_settings(server.url, keeper_dir=directory))
        for name in (expected := ["a", "b", "c"]):
            answer = await running.admin.post("/admin/revocations", json=jti(name), headers=await running.bearer())
            assert answer.json()["durability"] == "replicated"
        await running.until(lambda: len(running.keeper.disk.private()) == 2)
        await running.service.stop()
        with server.client() as client:
            client.flushall()
    with crashing(environment, step, when, -1) as child:
        assert child.wait(90) == -signal.SIGKILL
    running = await start_service(make_settings(server.url, keeper_dir=directory))
    await running.until(lambda: set(expected) <= set(ids_in_log(server)))
    assert sorted(ids_in_log(server)) == expected
    for name in expected:
        receipt = await running.admin.get(f"/admin/revocations/{name}", headers=await running.bearer())
        assert receipt.json()["durability"] == "replicated"
        assert in_force(running, name)
    answer = await running.admin.post("/admin/revocations", json=jti("new"), headers=await running.bearer())
    assert (answer.status_code, answer.json()["durability"]) == (200, "replicated")
