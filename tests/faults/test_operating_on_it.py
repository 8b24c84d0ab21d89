"""What operators do to servers that run: trim, rotate a password, start a script that does not end (P2, P3, P4)."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from regions.topology import Topology
from tests.faults.harness import FaultCluster
from tests.faults.operating import MAX_STALENESS_S, WITHIN_S, Root, aside, operated, revoking_everywhere, until, watched
from verifier.log import META_KEY, parse_stream_id
from verifier.testing import sign

SLOW_S = 3.0
DEAD = 1_500
"""More than the key service finds worth a trim."""

GRACE_S = 4
SHORT: dict[str, str] = {"KEYSERVICE_DROP_GRACE_S": str(GRACE_S), "KEYSERVICE_LEEWAY_S": "2"}


@pytest.mark.slow
async def test_a_verifier_that_sleeps_while_the_log_is_trimmed_past_it_wakes_up_complete(
    topology_of: Callable[..., Topology], directory: Path
) -> None:
    with operated(topology_of(), directory / "trimmed", **SHORT) as cluster:
        root = Root(cluster)
        async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
            last = await aside(lambda: faults.recorders["b"].wait_sample(lambda sample: sample.fresh, 120.0))
            with faults.asleep("b"):
                await traffic.flows(12)  # these live on, and are carried forward
                await revoke_short_lived(faults, DEAD)
                await traffic.flows(3)
                trimmed = await aside(lambda: until(lambda: trimmed_to(root), "the log is trimmed", 120.0))
            assert last.position is not None
            assert trimmed > parse_stream_id(last.position.partition(".")[0])
            await traffic.flows()


@pytest.mark.slow
async def test_a_verifier_whose_password_was_changed_keeps_what_it_holds_and_says_why(
    root: Root, directory: Path
) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        refused = [name for each in faults.ledger.revocations if each.replicated_mono for name in each.tokens]
        recorder = faults.recorders["b"]
        with root.at("b") as server, faults.fault("password changed", "redis-b"):
            right = root.cluster.servers["b"].passwords["verifier"]
            server.execute_command("ACL", "SETUSER", "verifier", "resetpass", f">{uuid.uuid4().hex}")
            server.execute_command("CLIENT", "KILL", "USER", "verifier")
            try:
                stale = await aside(lambda: recorder.wait_sample(lambda sample: not sample.fresh, 120.0))
                assert stale.reason == "stale"
                assert stale.entries >= len(refused)
                status = await faults.callers["b"].verifier_status()
                assert status["problem"] == "wrong_credentials"
                for name in refused[:3]:
                    await aside(recorder.wait_for, name, "revoked", 120.0)
                await traffic.flows()
            finally:
                server.execute_command("ACL", "SETUSER", "verifier", "resetpass", f">{right}")
        deadline = time.monotonic() + WITHIN_S
        while (status := await faults.callers["b"].verifier_status())["problem"] is not None:
            assert time.monotonic() < deadline, status["problem"]


@pytest.mark.slow
async def test_a_primary_that_sleeps_while_a_verifier_restarts_fools_nobody(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        with faults.fault("DEBUG SLEEP", "redis-a"), asleep(root):
            await faults.restart_recorder("a", wait_ready=False)
            stale = await aside(lambda: faults.recorders["c"].wait_sample(lambda sample: not sample.fresh, 120.0))
            assert stale.reason == "stale"
        await traffic.flows()


@pytest.mark.slow
async def test_a_primary_busy_with_a_script_while_a_verifier_restarts_fools_nobody(root: Root, directory: Path) -> None:
    async with watched(root, directory) as faults, revoking_everywhere(faults) as traffic:
        before = root.open_epoch()
        with faults.fault("busy script", "redis-a"), busy(root):
            await faults.restart_recorder("a", wait_ready=False)
            stale = await aside(lambda: faults.recorders["c"].wait_sample(lambda sample: not sample.fresh, 120.0))
            assert stale.reason == "stale"
        await traffic.flows()
        assert root.open_epoch().number == before.number


@contextmanager
def asleep(root: Root) -> Iterator[None]:
    """The primary answers nobody; it has slept for long enough when this is left."""

    def sleep() -> None:
        with root.at("a", timeout_s=60.0) as server:
            server.execute_command("DEBUG", "SLEEP", SLOW_S + MAX_STALENESS_S)

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        until(lambda: not _answers(root), "the primary sleeps")
        yield
    finally:
        thread.join()


def _answers(root: Root) -> bool:
    with root.at("a", timeout_s=0.5) as server, suppress(redis.RedisError):
        return bool(server.ping())
    return False


@contextmanager
def busy(root: Root) -> Iterator[None]:
    """A script that does not end runs on the primary until this is left."""

    def run() -> None:
        with root.at("a", timeout_s=60.0) as server, suppress(redis.ResponseError):
            server.eval("while true do end", 0)

    with root.at("a") as server:
        server.config_set("busy-reply-threshold", 200)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: _is_busy(root), "the primary is busy")
        yield
        assert _is_busy(root)
    finally:
        with root.at("a") as server:
            server.execute_command("SCRIPT", "KILL")
            thread.join()
            server.config_set("busy-reply-threshold", 5_000)


def _is_busy(root: Root) -> bool:
    with root.at("a") as server:
        try:
            server.ping()
        except redis.ResponseError as error:
            return "BUSY" in str(error)
    return False


async def revoke_short_lived(faults: FaultCluster, count: int) -> None:
    """Revocations of tokens that expire at once."""
    file = faults.cluster.file
    claims = {"iss": file.issuer, "aud": file.audience, "sub": "worker", "client_id": "worker"}
    tokens = [sign(file.hs256_secret, {**claims, "jti": uuid.uuid4().hex}, lifetime_s=1) for _ in range(count)]
    items = [{"token": token} for token in tokens]
    reply = await faults.callers["a"].admin("POST", "/admin/revocations", {"revocations": items})
    assert reply.status_code in (200, 202), reply.status_code


def trimmed_to(root: Root) -> tuple[int, int] | None:
    with root.at("a") as server:
        told = server.hget(META_KEY, "trimmed_to")
    return parse_stream_id(told) if told else None
