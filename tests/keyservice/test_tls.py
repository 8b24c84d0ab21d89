"""A key service whose Redis and Sentinels speak TLS, from a source address or not. Run by `make test-tls`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyservice.errors import StartError
from keyservice.primary import primary_node
from keyservice.settings import Settings
from keyservice.store import Node
from tests.verifier.tls_lab import PASSWORD, Authority, authority, sentinel, serving, stranger
from verifier.redis_tls import RedisTls

__all__ = ["authority", "stranger"]

pytestmark = pytest.mark.system

Make = Callable[..., Settings]


@pytest.fixture(params=[None, "127.0.0.1"], ids=["unbound", "bound"])
def source(request: pytest.FixtureRequest) -> str | None:
    address: str | None = request.param
    return address


async def test_a_key_service_runs_on_redis_over_tls_with_a_client_certificate(
    run_dir: Path, authority: Authority, make_settings: Make, start_service: Any, source: str | None
) -> None:
    cert, key = authority.issue("client").names
    files = {"redis_tls_ca": authority.file, "redis_tls_cert": cert, "redis_tls_key": key}
    with serving(run_dir / "tls", authority.issue("server"), authority, clients=True) as server:
        running = await start_service(make_settings(server.url, source_address=source, **files))
        assert await running.bearer()
        await running.service.stop()


async def test_the_primary_is_followed_through_sentinels_over_tls(
    run_dir: Path, authority: Authority, make_settings: Make, source: str | None
) -> None:
    pair = authority.issue("server")
    with (
        serving(run_dir / "tls", pair, authority) as server,
        sentinel(run_dir / "sentinel", pair, authority, server) as url,
    ):
        node = primary_node(
            make_settings(
                server.url, primary_url=url, source_address=source, redis_tls_ca=authority.file, redis_password=PASSWORD
            )
        )
        try:
            await node.check("KEYSERVICE_PRIMARY_URL")
            assert await node.write("SET", "{ks}:k", "v") == b"OK"
        finally:
            await node.close()


@pytest.mark.parametrize("code", ["tls_unknown_ca", "tls_wrong_host", "tls_expired"])
async def test_a_certificate_that_is_refused_is_named_at_the_start(
    run_dir: Path, authority: Authority, stranger: Authority, source: str | None, code: str
) -> None:
    details: dict[str, Any] = {"tls_wrong_host": {"address": "127.0.0.9"}, "tls_expired": {"days": (-3, -1)}}
    ca = stranger if code == "tls_unknown_ca" else authority
    with serving(run_dir / "tls", authority.issue("server", **details.get(code, {})), authority) as server:
        node = Node(server.url, source_address=source, tls=RedisTls(ca.file))
        with pytest.raises(StartError, match="KEYSERVICE_REDIS_URL") as refused:
            await node.check("KEYSERVICE_REDIS_URL")
        await node.close()
    assert refused.value.code == code
    assert PASSWORD not in str(refused.value)
