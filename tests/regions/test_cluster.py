"""A whole cluster on real servers, as `regions up` and the demo start it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regions.access import Caller, Callers
from regions.cluster import SERVICES, Cluster
from regions.cluster_file import ClusterFile
from regions.errors import ClusterFileError, ClusterRunning
from regions.ports import pick_free_ports
from regions.topology import Topology, load_topology

UP = [sys.executable, "-m", "regions", "up", "--topology", "one-region", "--auto-ports"]
STARTED_WITHIN_S = 150.0
GONE_WITHIN_S = 60.0


def free_topology(name: str) -> Topology:
    topology = load_topology(name)
    return topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(free_topology("default"), tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def test_cluster_file_is_private_and_describes_every_region(cluster: Cluster) -> None:
    assert cluster.file_path.stat().st_mode & 0o777 == 0o600
    described = ClusterFile.read(cluster.file_path)
    assert list(described.regions) == ["us-east-1", "eu-west-1", "ap-southeast-1"]
    assert described.regions["eu-west-1"].bind_address == "127.0.2.1"


def test_cluster_file_shows_no_secret_when_printed(cluster: Cluster) -> None:
    printed = (
        repr(cluster.file) + repr(cluster.file.regions) + repr(cluster.file.clients) + repr(cluster.file.demo_user)
    )
    assert cluster.file.demo_user.password not in printed
    assert cluster.file.hs256_secret not in printed
    assert all(client.client_secret not in printed for client in cluster.file.clients.values())


def test_missing_cluster_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ClusterFileError, match="regions up"):
        ClusterFile.read(tmp_path / "cluster.json")


def test_second_cluster_in_the_same_directory_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ClusterRunning, match="--var"), Cluster(cluster.topology, cluster.file_path.parent):
        pytest.fail("it started")
    cluster.check()


async def replicated(caller: Caller, entry_id: str) -> None:
    """Until the receipt says so: on a slow machine the first one may say pending."""
    deadline = time.monotonic() + STARTED_WITHIN_S
    while (await caller.admin("GET", f"/admin/revocations/{entry_id}")).json()["durability"] != "replicated":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_logged_out_session_is_refused_in_every_region(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        tokens = await callers.home.log_in()
        assert [await caller.order_status(tokens.access_token) for caller in callers.all] == [200, 200, 200]
        reply = await callers["eu-west-1"].admin("DELETE", f"/admin/sessions/{tokens.sid}")
        assert reply.status_code in (200, 202)
        await replicated(callers["eu-west-1"], reply.json()["id"])
        for caller in callers.all:
            assert await caller.first_refusal(tokens.access_token, 60.0) is not None, caller.region


async def test_token_signed_in_any_region_is_accepted_in_every_region(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        for signer in callers.all:
            token = await signer.client_token("worker", scope="orders:read")
            assert [await caller.order_status(token) for caller in callers.all] == [200, 200, 200], signer.region


async def test_every_region_serves_the_same_key_set(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        documents = {(await caller.jwks()).content for caller in callers.all}
    assert len(documents) == 1


async def test_nothing_calls_from_outside_its_region(cluster: Cluster) -> None:
    async with Callers(cluster.file) as callers:
        await callers.home.log_in()
    assert set(cluster.link.counters().unbound.values()) == {0}


# -- the command ----------------------------------------------------------------------------------------------------


class Running:
    """`regions up` in a process of its own, in a process group of its own."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self.process = subprocess.Popen(
            [*UP, "--var", str(var)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not (var / "cluster.json").exists():
            assert self.process.poll() is None, self.process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.file = ClusterFile.read(var / "cluster.json")

    def ports(self) -> list[tuple[str, int]]:
        urls = next(iter(self.file.regions.values()))
        found = [urls.keyservice_url, urls.admin_url, urls.orders_url, urls.login_url, urls.redis_url]
        return [
            (url.rpartition("@")[2].rpartition("//")[2].split(":")[0], int(url.rpartition(":")[2])) for url in found
        ]

    def descendants(self) -> set[int]:
        """Every process that it started, directly or not."""
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, listing.splitlines())}
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found - {self.process.pid}

    def wait_until_gone(self, pids: set[int]) -> None:
        deadline = time.monotonic() + GONE_WITHIN_S
        while any(_listens(*port) for port in self.ports()) or any(_runs(pid) for pid in pids):
            assert time.monotonic() < deadline, "a port is still held, or a process still runs"
            time.sleep(0.1)


def _listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((address, port)) == 0


def _runs(pid: int) -> bool:
    listing = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False).stdout
    return listing.strip() != "" and not listing.startswith("Z")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    started = Running(tmp_path / "var")
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.wait()
    assert started.process.stderr is not None
    started.process.stderr.close()


def test_kill_minus_9_of_the_parent_leaves_no_process_and_no_port(running: Running) -> None:
    pids = running.descendants()
    assert len(pids) >= 6  # guard, link proxy, server, key service, orders, login
    assert all(_listens(*port) for port in running.ports())
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    running.wait_until_gone(pids)
    deadline = time.monotonic() + GONE_WITHIN_S
    while list(running.var.glob("*.json")):  # passwords
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cluster_starts_again_at_once_in_the_directory_of_one_that_was_killed(running: Running) -> None:
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    (running.var / "cluster.json").unlink(missing_ok=True)
    again = Running(running.var)
    again.process.terminate()
    assert again.process.wait(GONE_WITHIN_S) == 0
    assert again.process.stderr is not None
    again.process.stderr.close()


def test_ctrl_c_ends_everything_and_exits_cleanly(running: Running) -> None:
    pids = running.descendants()
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.process.wait(GONE_WITHIN_S) == 0
    running.wait_until_gone(pids)
    assert not (running.var / "cluster.json").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "regions", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_demo_of_one_region_holds_every_line_and_says_so_to_a_program(tmp_path: Path) -> None:
    result = run("demo", "--topology", "one-region", "--var", str(tmp_path / "var"), "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    checks = [line for line in lines if line["type"] == "check"]
    assert [check["text"] for check in checks if not check["ok"]] == []
    assert len(checks) >= 17
    assert result.returncode == 0


def assert_one_line(result: subprocess.CompletedProcess[str], code: str, exit_code: int) -> None:
    assert result.returncode == exit_code, result.stderr
    assert result.stderr.startswith(f"regions: error [{code}]: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr + result.stdout


def test_unreadable_topology_is_one_line_and_exit_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[[regions]]\nname = \n")
    assert_one_line(run("up", "--topology", str(bad), "--var", str(tmp_path)), "topology_invalid", 2)
    assert_one_line(run("up", "--topology", str(tmp_path / "none.toml")), "topology_invalid", 2)


def test_directory_with_somebody_elses_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("precious")
    assert_one_line(
        run("up", "--topology", "one-region", "--auto-ports", "--var", str(tmp_path)), "directory_refused", 4
    )
    assert (tmp_path / "data" / "mine").read_text() == "precious"


def test_directory_that_cannot_be_is_one_line_and_exit_4(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for var in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_one_line(
            run("up", "--topology", "one-region", "--auto-ports", "--var", str(var)), "directory_refused", 4
        )


def test_unknown_option_is_one_line_and_exit_2() -> None:
    assert_one_line(run("up", "--no-such-option"), "usage", 2)


def test_port_in_use_is_one_line_naming_the_setting_and_exit_4(tmp_path: Path) -> None:
    topology = free_topology("one-region")
    file = tmp_path / "taken.toml"
    ports = "".join(f"{name} = {port}\n" for name, port in topology.ports.items())
    file.write_text(f'[[regions]]\nname = "solo"\nprimary = true\n[ports]\n{ports}')
    with socket.socket() as taken:
        taken.bind((topology.regions[0].address, topology.ports["orders"]))
        taken.listen()
        result = run("up", "--topology", str(file), "--var", str(tmp_path))
    assert_one_line(result, "port_in_use", 4)
    assert "orders" in result.stderr


def test_missing_server_program_is_one_line_and_exit_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIONS_REDIS_SERVER", "no-such-server")
    result = run("up", "--topology", "one-region", "--auto-ports", "--var", str(tmp_path))
    assert_one_line(result, "server_not_found", 4)
    assert "REGIONS_REDIS_SERVER" in result.stderr
