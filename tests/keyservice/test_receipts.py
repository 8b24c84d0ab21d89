"""Receipts of three regions with real replication: replicated means a majority's disks, pending is never failed."""

from __future__ import annotations

from typing import Any

import pytest

from keyservice.limits import BULK_REVOCATIONS_MAX
from tests.keyservice.support import Running, Server, eventually
from tests.keyservice.three import REGIONS, StartThree
from verifier.log import Position


def jti(name: str, **members: Any) -> dict[str, Any]:
    return {"kind": "jti", "value": name, "id": name, **members}


async def test_a_receipt_is_replicated_with_a_majority_and_the_same_in_every_region(start_three: StartThree) -> None:
    three = await start_three()
    for region in REGIONS:
        answer = await three.revoke(region, jti(f"from-{region}"))
        assert (answer.status_code, answer.json()["durability"]) == (200, "replicated")
        assert answer.headers["trust-position"] == answer.json()["position"]
        assert set(answer.json()["regions"]) == set(REGIONS)
        assert sum(answer.json()["regions"].values()) >= 2
        for anywhere in REGIONS:
            found = await three.replicated(anywhere, f"from-{region}")
            assert found["position"] == answer.json()["position"]
            assert found["region"] == region
    held = {region: await three.running[region].keeper.find("from-us") for region in REGIONS}
    assert sum(entry is not None for entry in held.values()) >= 2


async def test_a_minority_that_is_down_takes_no_acknowledgement_away(start_three: StartThree) -> None:
    three = await start_three()
    await three.stop("ap")
    for region in ("eu", "us"):
        answer = await three.revoke(region, jti(f"from-{region}"))
        assert (answer.status_code, answer.json()["durability"]) == (200, "replicated")
        assert answer.json()["regions"] == {"eu": True, "us": True, "ap": False}
    await three.start("ap")
    assert await three.replicated("ap", "from-us", lambda receipt: receipt["regions"]["ap"])


async def test_without_a_majority_it_is_pending_until_one_returns(start_three: StartThree) -> None:
    three = await start_three(receipt_wait_ms=300)
    await three.stop("ap", "us")
    answer = await three.revoke("eu", jti("one"))
    assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
    assert answer.json()["durability"] == "pending"
    assert answer.json()["position"] is not None, "it is in the log, and that is not enough"
    assert "trust-position" not in answer.headers
    later = await eventually(lambda: three.receipt("eu", "one"), lambda answer: answer.json()["regions"]["eu"])
    assert later.json()["durability"] == "pending"
    assert later.json()["regions"] == {"eu": True, "us": False, "ap": False}
    assert "trust-position" not in later.headers
    await three.start("us")
    found = await three.replicated("eu", "one")
    assert found["regions"] == {"eu": True, "us": True, "ap": False}
    assert found["position"] == answer.json()["position"]
    assert three.log() == ["one"]


async def test_a_retry_anywhere_gets_the_stored_entry_and_another_request_a_conflict(start_three: StartThree) -> None:
    three = await start_three()
    first = await three.revoke("eu", jti("one", reason="left"))
    for region in REGIONS:
        await three.replicated(region, "one")
        again = await three.revoke(
            region, {"kind": "jti", "value": "one", "reason": "left"}, **{"Idempotency-Key": "one"}
        )
        assert (again.status_code, again.json()["position"]) == (200, first.json()["position"])
        other = await three.revoke(region, jti("one", reason="another"))
        assert (other.status_code, other.json()["code"]) == (409, "id_conflict")
    assert three.log() == ["one"]


async def test_ten_thousand_revocations_take_one_wait(start_three: StartThree, monkeypatch: pytest.MonkeyPatch) -> None:
    three = await start_three(receipt_wait_ms=60_000)
    waits: list[int] = []
    receipts = three.running["us"].service.receipts
    settle = receipts.settle

    async def counted(stored: Any, timeout_s: float) -> Any:
        waits.append(len(stored))
        return await settle(stored, timeout_s)

    monkeypatch.setattr(receipts, "settle", counted)
    items = [{"kind": "jti", "value": f"j{n}"} for n in range(BULK_REVOCATIONS_MAX)]
    answer = await three.revoke("us", {"revocations": items})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert {result["durability"] for result in results} == {"replicated"}
    assert len({result["position"] for result in results}) == BULK_REVOCATIONS_MAX
    furthest = max(Position.parse(result["position"]) for result in results)
    assert answer.headers["trust-position"] == str(furthest)
    assert waits == [BULK_REVOCATIONS_MAX]
    assert len(three.log()) == BULK_REVOCATIONS_MAX


async def test_while_the_primary_is_out_of_reach_a_revocation_is_stored_and_merged_later(
    start_three: StartThree,
) -> None:
    three = await start_three(receipt_wait_ms=300)
    us = three.running["us"]
    await three.proxies["us"].cut()
    await us.until(lambda: us.service.beats.problem is not None)
    answer = await three.revoke("us", jti("one", reason="left"))
    assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
    assert answer.json() == {
        "id": "one",
        "position": None,
        "durability": "pending",
        "regions": dict.fromkeys(REGIONS, False),
    }
    again = await three.revoke("us", jti("one", reason="left"))
    assert (again.status_code, again.json()) == (202, answer.json())
    other = await three.revoke("us", jti("one", reason="another"))
    assert (other.status_code, other.json()["code"]) == (409, "id_conflict")
    assert (await three.receipt("us", "one")).json()["durability"] == "pending"
    assert (await three.receipt("eu", "one")).status_code == 404
    assert three.log() == []
    await three.proxies["us"].open()
    for region in REGIONS:
        assert (await three.replicated(region, "one"))["region"] == "us"
    assert three.log() == ["one"]


async def test_a_reply_that_is_lost_after_the_write_makes_nothing_fail_and_nothing_twice(
    start_three: StartThree,
) -> None:
    three = await start_three(receipt_wait_ms=300)
    three.proxies["us"].eats_answers = True
    answer = await three.revoke("us", jti("one"))
    assert answer.status_code in (200, 202)
    assert answer.json()["id"] == "one"
    assert three.log() == ["one"], "it was applied"
    three.proxies["us"].eats_answers = False
    for region in REGIONS:
        await three.replicated(region, "one")
    again = await three.revoke("us", jti("one"))
    assert again.json()["id"] == "one"
    us = three.running["us"]
    await us.until(lambda: us.keeper._keeper.pending == 0)
    assert three.log() == ["one"]


async def full(running: Running) -> None:
    """From now on the keeper's disk takes nothing that is new."""

    def fill() -> None:
        db = running.keeper.disk._db
        db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")

    await running.keeper.in_thread(fill)


async def test_a_disk_that_takes_nothing_more_stores_nothing_and_appends_nothing(
    running: Running, server: Server
) -> None:
    headers = await running.bearer()
    before = running.keeper.disk.count
    await full(running)
    items = [{"kind": "jti", "value": f"j{n}", "id": f"j{n}", "reason": "r" * 256} for n in range(200)]
    answer = await running.admin.post("/admin/revocations", json={"revocations": items}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (503, "keeper_disk")
    assert "nothing was done" in answer.json()["detail"]
    assert running.keeper.disk.count == before
    with server.client() as client:
        assert client.xlen("{trust}:log") == 1
    assert running.service.mirror.snapshot.find(issuer="https://id.test", jti="j0") is None, "nor is it in force here"
    assert (await running.admin.get("/admin/revocations/j0", headers=headers)).status_code == 404
    await running.keeper.in_thread(lambda: running.keeper.disk._db.execute("PRAGMA max_page_count=1000000"))
    answer = await running.admin.post("/admin/revocations", json={"revocations": items}, headers=headers)
    assert answer.status_code == 200, "a retry is safe"
    with server.client() as client:
        assert client.xlen("{trust}:log") == 201
