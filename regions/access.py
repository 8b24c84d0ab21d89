"""Talking to a cluster as a caller in one of its regions: HTTP clients that bind the region's address."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from regions.cluster_file import ClusterFile

__all__ = ["Caller", "Callers", "Unexpected"]

HTTP_TIMEOUT_S = 10.0


class Unexpected(Exception):
    """A service answered something else than the step needs. Holds no body: it may be a token."""

    def __init__(self, what: str, reply: httpx.Response) -> None:
        code = ""
        if reply.headers.get("content-type", "").endswith("json"):
            body = reply.json()
            code = f" {body.get('code') or body.get('error') or ''}" if isinstance(body, dict) else ""
        super().__init__(f"{what}: HTTP {reply.status_code}{code}")


def expect(what: str, reply: httpx.Response, *statuses: int) -> Any:
    """The reply's JSON if its status is one of `statuses`; raises `Unexpected`."""
    if reply.status_code not in statuses:
        raise Unexpected(what, reply)
    return reply.json() if reply.content else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a log-in gave."""

    access_token: str
    sid: str


class Caller:
    """Someone in one region. Everything sent from here binds the region's address, so the link proxy delays it."""

    def __init__(self, cluster: ClusterFile, region: str) -> None:
        self.cluster = cluster
        self.region = region
        self.urls = cluster.regions[region]
        transport = httpx.AsyncHTTPTransport(local_address=self.urls.bind_address)
        self.http = httpx.AsyncClient(transport=transport, timeout=HTTP_TIMEOUT_S, trust_env=False)
        self._admin_token = ""
        self._renew_at = 0.0

    async def log_in(self) -> Tokens:
        """Password to tokens, at the login service."""
        user = self.cluster.demo_user
        body = {"username": user.username, "password": user.password}
        reply = expect("log in", await self.http.post(f"{self.urls.login_url}/login", json=body), 200, 201)
        return Tokens(reply["access_token"], reply["sid"])

    async def client_token(self, client: str, **form: str) -> str:
        """A client-credentials token of one of the cluster's clients."""
        answer = await self._client_credentials(client, form)
        return str(answer["access_token"])

    async def _client_credentials(self, client: str, form: dict[str, str]) -> Any:
        secret = self.cluster.clients[client]
        reply = await self.http.post(
            f"{self.urls.keyservice_url}/oauth2/token",
            data={"grant_type": "client_credentials", **form},
            auth=(secret.client_id, secret.client_secret),
        )
        return expect("client credentials", reply, 200)

    async def admin(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """A request to this region's admin API, as the cluster's admin client.

        Made again with a new token if that was refused: its key may have been revoked meanwhile.
        """
        reply = await self._admin(method, path, body)
        if reply.status_code == 401:
            self._renew_at = 0.0
            reply = await self._admin(method, path, body)
        return reply

    async def _admin(self, method: str, path: str, body: Any) -> httpx.Response:
        if time.time() >= self._renew_at:
            answer = await self._client_credentials("admin", {"scope": "keyservice:admin"})
            self._admin_token, self._renew_at = answer["access_token"], time.time() + answer["expires_in"] / 2
        headers = {"Authorization": f"Bearer {self._admin_token}"}
        return await self.http.request(method, f"{self.urls.admin_url}{path}", json=body, headers=headers)

    async def order_status(self, token: str) -> int:
        """The order service's HTTP status for a token."""
        url = f"{self.urls.orders_url}/orders"
        return (await self.http.get(url, headers={"Authorization": f"Bearer {token}"})).status_code

    async def verifier_status(self) -> Any:
        """What the verifier in this region's order service says of itself."""
        return expect("status", await self.http.get(f"{self.urls.orders_url}/status"), 200)

    async def jwks(self) -> httpx.Response:
        """This region's key set."""
        return await self.http.get(f"{self.urls.keyservice_url}/.well-known/jwks.json")

    async def first_refusal(self, token: str, timeout_s: float) -> float | None:
        """Ask the order service again and again; Unix seconds of the first 401's arrival, None if there is none."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if await self.order_status(token) == 401:
                return time.time()
            await asyncio.sleep(0.001)
        return None


class Callers:
    """One caller a region."""

    def __init__(self, cluster: ClusterFile) -> None:
        self.cluster = cluster
        self._callers = {region: Caller(cluster, region) for region in cluster.regions}

    def __getitem__(self, region: str) -> Caller:
        return self._callers[region]

    @property
    def all(self) -> list[Caller]:
        """Every region's, in the topology's order."""
        return list(self._callers.values())

    @property
    def home(self) -> Caller:
        """The primary's region."""
        return self._callers[self.cluster.primary]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for caller in self.all:
            await caller.http.aclose()
