"""Clocks half a minute off, by libfaketime: the primary's, a replica's, a key service's, a verifier's (P2, P3, P4).

Each process has a clock of its own, told by a file. Only wall clocks are turned: monotonic ones are nobody's to set.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regions.cluster import Cluster
from regions.embedded import SERVER_SETTING, find_server
from regions.recorder.client import PROGRAM
from regions.topology import Topology
from tests.faults.drill import SHORT, durabilities, epoch, healed, replicated, server, settled_primary, until, writing
from tests.faults.harness import FaultCluster

pytestmark = pytest.mark.system

OFF_S = (30, -30)


@functools.cache
def preloaded() -> tuple[str, str]:
    """The variable, and its value, by which `faketime` itself preloads its library."""
    assert shutil.which("faketime"), "these tests need libfaketime; Debian and Ubuntu: apt-get install faketime"
    command = ["faketime", "-m", "-f", "+0", "env"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = [line for line in told.splitlines() if line.startswith(("LD_PRELOAD=", "DYLD_INSERT_LIBRARIES="))]
    name, _, value = lines[0].partition("=")
    return name, value


class Clock:
    """The wall clock of one process, `seconds` from the right time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)

    def set(self, seconds: int) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(f"{seconds:+d}\n")
        partial.replace(self._path)

    @property
    def environment(self) -> dict[str, str]:
        return clock_environment(str(self._path))

    @asynccontextmanager
    async def off(self, faults: FaultCluster, seconds: int, whose: str) -> AsyncIterator[None]:
        with faults.fault(f"clock {seconds:+d} s", whose):
            self.set(seconds)
            try:
                yield
            finally:
                self.set(0)


def clock_environment(path: str) -> dict[str, str]:
    """What makes a process take its wall clock from a file, which it looks at once a second."""
    return {
        preloaded()[0]: preloaded()[1],
        "FAKETIME_TIMESTAMP_FILE": path,
        "FAKETIME_CACHE_DURATION": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


@pytest.fixture(scope="module", autouse=True)
def shared_memory() -> Iterator[None]:
    """What a process leaves there when it is killed, libfaketime cannot remove: we do."""
    place = Path("/dev/shm")
    before = set(place.glob("*faketime_s*"))
    yield
    for path in set(place.glob("*faketime_s*")) - before:
        if not Path("/proc", path.name.rpartition("_")[2]).exists():
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def clock_cluster(topology_of: Any) -> Iterator[Cluster]:
    """A cluster whose servers take their clocks from the file `clock` beside their configuration."""
    with tempfile.TemporaryDirectory(prefix="ft-") as path, pytest.MonkeyPatch.context() as patch:
        binary = find_server().path
        script = Path(path) / binary.name
        settings = " ".join(f"{name}={value}" for name, value in clock_environment('"$clock"').items())
        script.write_text(
            f'#!/bin/sh\n[ -e "$1" ] || exec {shlex.quote(str(binary))} "$@"\nclock="$(dirname "$1")/clock"\n'
            f'[ -e "$clock" ] || echo +0 > "$clock"\nexport {settings}\nexec {shlex.quote(str(binary))} "$@"\n'.replace(
                "$LIB", "\\$LIB"
            )
        )
        script.chmod(0o700)
        patch.setenv(SERVER_SETTING, str(script))
        topology: Topology = topology_of("abc", 10.0)
        with Cluster(topology, Path(path) / "var") as running:
            yield running


def server_clock(cluster: Cluster, region: str) -> Clock:
    return Clock(cluster.servers[region].files.data_dir / "clock")


def seconds_off(cluster: Cluster, region: str) -> float:
    """How far a server's clock is from ours."""
    with server(cluster, region, "observer") as client:
        seconds, microseconds = client.time()
    return float(seconds) + float(microseconds) / 1e6 - time.time()


async def wait_off(cluster: Cluster, region: str, wanted_s: float) -> None:
    await until(
        lambda: abs(seconds_off(cluster, region) - wanted_s) < 2.0, f"the server's clock is {wanted_s:+g} s off"
    )


async def readiness(faults: FaultCluster, region: str) -> dict[str, Any]:
    caller = faults.callers[region]
    body: dict[str, Any] = (await caller.http.get(f"{caller.urls.keyservice_url}/readyz")).json()
    return body


async def until_ready_is(faults: FaultCluster, region: str, *, skewed: bool) -> None:
    """Until a key service names its clock among what keeps it from being ready, or is ready."""
    deadline = time.monotonic() + 40.0
    while True:
        said = await readiness(faults, region)
        if ("clock_skew" in said["reasons"]) is skewed and (skewed or said["ready"]):
            return
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.1)


async def assert_refuses_by_name(faults: FaultCluster, region: str) -> None:
    """A region's key service gives no token and stores no revocation, and says that it is its clock."""
    caller, client = faults.callers[region], faults.cluster.file.clients["worker"]
    signing = await caller.http.post(
        f"{caller.urls.keyservice_url}/oauth2/token",
        data={"grant_type": "client_credentials"},
        auth=(client.client_id, client.client_secret),
    )
    assert (signing.status_code, signing.json()["error"]) == (503, "temporarily_unavailable")
    assert "clock_skew" in signing.json()["error_description"]
    revoking = await caller.admin("POST", "/admin/revocations", {"kind": "jti", "value": f"refused-{time.time()}"})
    assert (revoking.status_code, revoking.json()["code"]) == (503, "clock_skew")


async def until_primary_clock(faults: FaultCluster, region: str) -> None:
    """Until a key service says that it is the primary's clock, and is ready all the same."""
    deadline = time.monotonic() + 60.0
    while True:
        said = await readiness(faults, region)
        if "primary_clock" in said["warnings"] and said["ready"]:
            return
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.1)


async def assert_signs(faults: FaultCluster, region: str) -> None:
    caller, client = faults.callers[region], faults.cluster.file.clients["worker"]
    signing = await caller.http.post(
        f"{caller.urls.keyservice_url}/oauth2/token",
        data={"grant_type": "client_credentials"},
        auth=(client.client_id, client.client_secret),
    )
    assert signing.status_code == 200, signing.text


@pytest.mark.parametrize("off_s", OFF_S)
async def test_primary_whose_clock_is_off_is_named_by_everybody_and_no_region_stops_signing(
    clock_cluster: Cluster, directory: Path, off_s: int
) -> None:
    cluster = clock_cluster
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid, names = faults.mint_offline(3), faults.mint_offline(15)
        await faults.accepted_everywhere([*valid, *names])
        home = await settled_primary(cluster)
        number = epoch(cluster, home).number
        async with faults.load(valid):
            for at, region in enumerate("abc"):
                await faults.revoke_all(names[5 * at :][:5], via=region)
            async with server_clock(cluster, home).off(faults, off_s, f"the server of {home}"):
                await wait_off(cluster, home, off_s)
                for region in "abc":
                    await until_primary_clock(faults, region)
                    await assert_signs(faults, region)
                    assert (await readiness(faults, region))["beat"] == "primary_clock"
                for recorder in faults.recorders.values():
                    await asyncio.to_thread(recorder.wait_sample, lambda seen: not seen.fresh, 120.0)
                (meanwhile,) = faults.mint_offline(1)
                await faults.revoke(meanwhile, via=home)
                for recorder in faults.recorders.values():
                    await asyncio.to_thread(recorder.wait_for, meanwhile, "revoked", 120.0)
            await wait_off(cluster, home, 0)
            for region in "abc":
                await until_ready_is(faults, region, skewed=False)
                (name,) = faults.mint_offline(1)
                await replicated(faults, [await faults.revoke(name, via=region)], via=region, within_s=30.0)
        assert epoch(cluster, home).number == number
        await healed(faults)


@pytest.mark.parametrize("off_s", OFF_S)
async def test_replica_whose_clock_is_off_un_revokes_nothing_and_its_verifier_stays_fresh(
    clock_cluster: Cluster, directory: Path, off_s: int
) -> None:
    cluster = clock_cluster
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        home = await settled_primary(cluster)
        region = next(each for each in "abc" if each != home)
        async with faults.load(valid), writing(faults) as writers:
            await writers.more(3)
            async with server_clock(cluster, region).off(faults, off_s, f"the server of {region}"):
                await wait_off(cluster, region, off_s)
                await writers.more(5)
                since = time.monotonic()
                recorder = faults.recorders[region]
                await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.mono > since + 3 and seen.fresh, 30.0)
                (name,) = faults.mint_offline(1)
                revoked = await faults.revoke(name, via=home)
                await replicated(faults, [revoked], via=region, within_s=30.0)
                await asyncio.to_thread(recorder.wait_for, name, "revoked", 30.0)
            await wait_off(cluster, region, 0)
            await writers.more(3)
        await healed(faults)


@contextlib.contextmanager
def keyservice_clock(cluster: Cluster, region: str, clock: Clock) -> Iterator[None]:
    """A region's key service is started again with a clock of its own, and at the end with ours."""
    name = f"keyservice-{region}"
    usual = cluster._services[name]
    for environment in (usual.env | clock.environment, usual.env):
        cluster.child(name).kill()
        cluster._wait_ready([cluster._start_again(replace(cluster._services[name], env=environment))])
        if environment is not usual.env:
            yield


@pytest.mark.parametrize("off_s", OFF_S)
async def test_key_service_whose_clock_is_off_neither_signs_nor_beats_nor_revokes_and_says_so(
    clock_cluster: Cluster, directory: Path, off_s: int
) -> None:
    cluster = clock_cluster
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid = faults.mint_offline(3)
        await faults.accepted_everywhere(valid)
        home = await settled_primary(cluster)
        region = next(each for each in "abc" if each != home)
        clock = Clock(directory / f"keyservice-{off_s}.clock")
        await faults.revoke_all(faults.mint_offline(1), via=region)  # its caller has a token from now on
        with keyservice_clock(cluster, region, clock):
            async with faults.load(valid), writing(faults, [each for each in "abc" if each != region]) as writers:
                await writers.more(3)
                async with clock.off(faults, off_s, f"the key service of {region}"):
                    await until_ready_is(faults, region, skewed=True)
                    await assert_refuses_by_name(faults, region)
                    said = await readiness(faults, region)
                    assert said["beat"] == "clock_skew"
                    assert abs(said["clock_skew_s"] - off_s) < 2.0
                    begun = {each: len(made) for each, made in writers.made.items()}
                    await writers.more(8)  # the others go on, and their verifiers and this one stay fresh
                    made = [one for each, had in begun.items() for one in writers.made[each][had:]]
                    assert durabilities(made) <= {"replicated", "pending"}
                    for recorder in faults.recorders.values():
                        await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.fresh, 30.0)
                await until_ready_is(faults, region, skewed=False)
                (name,) = faults.mint_offline(1)
                assert (await faults.revoke(name, via=region)).acknowledged_mono is not None
        await healed(faults)


@pytest.mark.parametrize("off_s", OFF_S)
async def test_verifier_whose_clock_is_off_says_that_it_is_not_fresh_and_still_enforces_and_accepts(
    clock_cluster: Cluster, directory: Path, off_s: int
) -> None:
    cluster = clock_cluster
    async with FaultCluster(cluster, directory, **SHORT) as faults:
        valid, names = faults.mint_offline(3), faults.mint_offline(10)
        await faults.accepted_everywhere([*valid, *names])
        clock = Clock(directory / f"verifier-{off_s}.clock")
        settings = [f"{name}={value}" for name, value in clock.environment.items()]
        recorder = await faults.restart_recorder("b", program=("env", *settings, *PROGRAM))
        await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.fresh, 30.0)
        await faults.accepted_everywhere([*valid, *names])
        async with clock.off(faults, off_s, "the verifier of b"):
            await asyncio.to_thread(
                recorder.wait_sample, lambda seen: not seen.fresh and abs(seen.wall - time.time() - off_s) < 5.0, 30.0
            )
            revoked = await faults.revoke_all(names, via="a")
            assert len([each for each in revoked if each.acknowledged_mono is not None]) == len(names)
            for name in names:
                await asyncio.to_thread(recorder.wait_for, name, "revoked", 30.0)
            since = time.monotonic()
            await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.mono > since + 3.0, 30.0)
            assert not [sample for sample in recorder.samples if sample.mono > since and sample.fresh]
        await asyncio.to_thread(recorder.wait_sample, lambda seen: seen.fresh, 30.0)
        await healed(faults)


def test_the_clock_of_a_process_is_turned_and_its_monotonic_one_is_not(directory: Path) -> None:
    """Without this the tests above would show nothing."""
    clock = Clock(directory / "probe.clock")
    clock.set(3_600)
    command = [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"]
    told = subprocess.run(command, env=clock.environment, capture_output=True, text=True, check=True, timeout=60).stdout
    wall, monotonic = map(float, told.split())
    assert abs(wall - time.time() - 3_600) < 30
    assert abs(monotonic - time.monotonic()) < 30
