"""What goes on working when a region loses its Redis, or every key service (promise P4), on real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regions.access import Caller, Callers
from regions.cluster import AUDIENCE, SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import load_topology
from verifier import RevokedToken, Undecidable, Verifier

WITHIN_S = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    topology = load_topology("default")
    topology = topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    with Cluster(topology, tmp_path) as running:
        yield running


def embedded(cluster: Cluster, caller: Caller, **settings: object) -> Verifier:
    """A verifier of this process, in the caller's region."""
    return Verifier(
        issuer=cluster.file.issuer,
        audience=AUDIENCE,
        jwks_urls=[f"{caller.urls.keyservice_url}/.well-known/jwks.json"],
        redis_url=caller.urls.verifier_redis_url,
        source_address=caller.urls.bind_address,
        **settings,  # type: ignore[arg-type]  # the tests' own keywords
    )


def wait_until(condition: object, verifier: Verifier) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition(verifier.status()):  # type: ignore[operator]  # a lambda
        assert time.monotonic() < deadline, verifier.status()
        time.sleep(0.02)


def decided(verifier: Verifier, token: str) -> bool:
    """Whether it is accepted now; on a slow machine a beat may be late at any moment."""
    try:
        return verifier.verify(token).subject == "worker"
    except Undecidable:
        return False


async def test_valid_tokens_pass_and_revoked_ones_do_not_while_redis_and_key_services_are_gone(
    cluster: Cluster,
) -> None:
    async with Callers(cluster.file) as callers:
        europe = callers["eu-west-1"]
        valid = await callers.home.log_in()
        revoked = await callers.home.log_in()
        never_seen = await callers.home.log_in()
        reply = await callers.home.admin("DELETE", f"/admin/sessions/{revoked.sid}")
        assert reply.status_code in (200, 202)
        assert await europe.first_refusal(revoked.access_token, WITHIN_S) is not None
        assert await europe.order_status(valid.access_token) == 200
        cluster.child("redis-eu-west-1").kill()
        for region in cluster.file.regions:
            cluster.child(f"keyservice-{region}").kill()
        for _ in range(20):
            assert await europe.order_status(valid.access_token) == 200
            assert await europe.order_status(never_seen.access_token) == 200
            assert await europe.order_status(revoked.access_token) == 401


@pytest.mark.slow
async def test_mirror_says_that_it_ages_and_resumes_by_position_when_its_replica_returns(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        europe = callers["eu-west-1"]
        first = await callers.home.client_token("worker", scope="orders:read")
        second = await callers.home.client_token("worker", scope="orders:read")
        with embedded(cluster, europe) as verifier:
            assert verifier.wait_ready(WITHIN_S)
            await callers.home.admin("POST", "/admin/revocations", {"token": first})
            wait_until(lambda status: status.mirror_entries == 1, verifier)
            position = verifier.status().position
            cluster.child("redis-eu-west-1").kill()
            wait_until(lambda status: status.staleness_s > 1.0, verifier)
            with pytest.raises(RevokedToken):
                verifier.verify(first)
            assert (verifier.verify(second).staleness_s or 0.0) > 1.0
            await callers.home.admin("POST", "/admin/revocations", {"token": second})
            cluster.restart_server("eu-west-1")
            wait_until(lambda status: status.mirror_entries == 2 and status.staleness_s < 1.0, verifier)
            with pytest.raises(RevokedToken):
                verifier.verify(second)
            status = verifier.status()
            assert status.position != position
            assert "rereads" not in status.counters


@pytest.mark.slow
async def test_deny_refuses_by_name_once_no_majority_vouches_for_the_mirror(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        token = await callers.home.client_token("worker", scope="orders:read")
        with embedded(cluster, callers.home, on_stale="deny", max_staleness_s=2.0) as verifier:
            wait_until(lambda _: decided(verifier, token), verifier)
            for region in ("eu-west-1", "ap-southeast-1"):
                cluster.child(f"keyservice-{region}").kill()
            wait_until(lambda status: not status.fresh, verifier)
            with pytest.raises(Undecidable) as caught:
                verifier.verify(token)
        assert (caught.value.code, caught.value.reason) == ("revocations_stale", "stale")


@pytest.mark.slow
async def test_revocation_without_its_primary_is_stored_and_replicated_once_there_is_one_again(
    cluster: Cluster,
) -> None:
    async with Callers(cluster.file) as callers:
        europe = callers["eu-west-1"]
        await europe.admin("GET", "/admin/keys")
        cluster.child("redis-us-east-1").kill()
        reply = await europe.admin("POST", "/admin/revocations", {"kind": "jti", "value": "some-token"})
        assert (reply.status_code, reply.json()["durability"]) == (202, "pending")
        assert "retry-after" in reply.headers
        assert "trust-position" not in reply.headers
        path, deadline = f"/admin/revocations/{reply.json()['id']}", time.monotonic() + 60
        while (await europe.admin("GET", path)).json()["durability"] != "replicated":  # Sentinels promote another
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
