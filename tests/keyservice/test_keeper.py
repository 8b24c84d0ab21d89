"""One region's keeper on a real server: receipts that say replicated, freshness, and what outlives the server."""

from __future__ import annotations

from typing import Any

from tests.keyservice.support import Running, Server


async def revoke(running: Running, value: str, **members: Any) -> dict[str, Any]:
    body = {"kind": "jti", "value": value, **members}
    answer = await running.admin.post("/admin/revocations", json=body, headers=await running.bearer())
    return {"status": answer.status_code, "headers": answer.headers, **answer.json()}


async def test_what_the_server_lost_comes_back_from_the_keeper(server: Server, running: Running) -> None:
    receipt = await revoke(running, "t-1")
    assert receipt["status"] == 200
    with server.client() as client:
        client.flushall()

        def is_back() -> bool:
            return any(fields[b"value"] == b"t-1" for _, fields in client.xrange("{trust}:log"))

        await running.until(is_back)
    await running.ready()
    answer = await running.admin.get(f"/admin/revocations/{receipt['id']}", headers=await running.bearer())
    assert answer.json()["durability"] == "replicated"
    assert answer.json()["position"] != receipt["position"]
