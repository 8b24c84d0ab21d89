"""Three regions in this process: real servers that replicate, and in each a whole key service with its keeper."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from keyservice.settings import Settings
from tests.keyservice.support import Proxy, Running, Server, eventually
from verifier.log import LOG_KEY, region_key

__all__ = ["REGIONS", "StartThree", "Three"]

REGIONS = ("eu", "us", "ap")
"""The primary's server is eu's."""


class Three:
    """``running[region]`` is its service; ``proxies[region]`` stands between that and the primary."""

    def __init__(
        self,
        run_dir: Path,
        start_server: Callable[..., Server],
        make_settings: Callable[..., Settings],
        start_service: Any,
        **overrides: Any,
    ) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        self._start_service = start_service
        self.servers = {"eu": start_server("eu", "--port", port, "--bind", "127.0.0.1")}
        for region in REGIONS[1:]:
            self.servers[region] = start_server(region, "--port", "0", "--replicaof", "127.0.0.1", port)
        self.proxies = {
            region: Proxy(run_dir / f"to-primary-{region}", self.servers["eu"].socket) for region in REGIONS
        }
        self.settings = {
            region: make_settings(
                self.servers[region].url,
                primary_url=self.proxies[region].url,
                region=region,
                regions=",".join(REGIONS),
                bootstrap_region="eu",
                kek=base64.b64encode(region.encode() * 16).decode(),
                **overrides,
            )
            for region in REGIONS
        }
        self.running: dict[str, Running] = {}

    async def start(self, *regions: str) -> None:
        """These, at one time, until all are ready."""
        for region in regions:
            await self.proxies[region].cut()
            await self.proxies[region].open()
        started = await asyncio.gather(*(self._start_service(self.settings[r], ready=False) for r in regions))
        self.running.update(zip(regions, started, strict=True))
        for running in started:
            await running.ready(60)

    async def stop(self, *regions: str) -> None:
        """The services of these regions; their servers go on."""
        for region in regions:
            await self.running.pop(region).service.stop()

    async def close(self) -> None:
        for proxy in self.proxies.values():
            await proxy.cut()

    async def revoke(self, region: str, body: dict[str, Any], **headers: str) -> Any:
        running = self.running[region]
        bearer = await running.bearer()
        return await running.admin.post("/admin/revocations", json=body, headers={**bearer, **headers})

    async def receipt(self, region: str, entry_id: str) -> Any:
        running = self.running[region]
        return await running.admin.get(f"/admin/revocations/{entry_id}", headers=await running.bearer())

    async def replicated(
        self, region: str, entry_id: str, also: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> dict[str, Any]:
        """The receipt there, once it says so, and what else is wanted of it."""

        def done(answer: Any) -> bool:
            return answer.status_code == 200 and answer.json()["durability"] == "replicated" and also(answer.json())

        found: dict[str, Any] = (await eventually(lambda: self.receipt(region, entry_id), done)).json()
        return found

    async def until_all(self, condition: Callable[[Running], Any]) -> None:
        """Wait until it holds in every region."""
        for running in self.running.values():
            await running.until(lambda running=running: condition(running), 60)  # type: ignore[misc]

    def log(self, region: str = "eu") -> list[str]:
        """The ids of all revocations that a region's server holds, in their order."""
        with self.servers[region].client() as client:
            entries = client.xrange(LOG_KEY)
        return [fields[b"id"].decode() for _, fields in entries if fields[b"kind"] != b"epoch"]

    async def replace_disk(self, region: str) -> None:
        """The region's keeper goes with its disk; a new one starts on an empty directory."""
        await self.stop(region)
        shutil.rmtree(self.settings[region].keeper_dir)  # type: ignore[arg-type]
        with self.servers["eu"].client() as client:
            client.hincrby(region_key(region), "at", -60_000)  # as if the old one were silent for a minute
        self.running[region] = await self._start_service(self.settings[region], ready=False)


StartThree = Callable[..., Awaitable[Three]]
