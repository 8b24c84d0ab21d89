"""Every script of the key service does its work on this server, and refuses by name without writing anything."""

from __future__ import annotations

from importlib import resources

import pytest

from keyservice.store import SCRIPTS, UNCHECKED, load_script
from tests.conformance.scenarios import NONCE, SCENARIOS, Bench, refusal
from tests.conformance.target import Target

CHECKED = [name for name, scenario in SCENARIOS.items() if scenario.checks_epoch]


def test_every_script_is_listed_and_has_its_scenario() -> None:
    files = {file.name for file in (resources.files("keyservice") / "scripts").iterdir() if file.name.endswith(".lua")}
    assert {name for name in files if not name.startswith("_")} == set(SCRIPTS) == set(SCENARIOS)
    assert {name for name, scenario in SCENARIOS.items() if not scenario.needs_primary} == UNCHECKED


def test_the_release_is_one_that_is_supported(target: Target) -> None:
    assert target.version.is_supported, target.version


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_loads_under_the_name_that_we_compute(bench: Bench, script: str) -> None:
    text, sha1 = load_script(script)
    assert bench.client.script_load(text) in (sha1, sha1.encode())
    assert bench.client.script_exists(sha1) == [True]


@pytest.mark.parametrize("script", SCENARIOS)
def test_it_does_its_work(bench: Bench, script: str) -> None:
    bench.start()
    SCENARIOS[script].check(bench)


@pytest.mark.parametrize("script", CHECKED)
def test_it_refuses_outside_its_epoch_and_writes_nothing(bench: Bench, script: str) -> None:
    assert refusal(lambda: bench.call(script)) == "TRUST_NO_EPOCH"
    assert not any(bench.everything(script))
    bench.start()
    held = bench.everything(script)
    keys, args = SCENARIOS[script].keys, SCENARIOS[script].args(bench.number)
    for number, nonce in ((str(int(bench.number) + 1), NONCE), (bench.number, "f" * 16)):
        assert bench.refusal(script, keys, [number, nonce, *args[2:]]) == "TRUST_EPOCH"
    assert bench.everything(script) == held
    bench.client.hset(bench.key("epoch"), "replid", "0" * 40)
    held = bench.everything(script)
    assert refusal(lambda: bench.call(script)) == "TRUST_REPLID"
    assert bench.everything(script) == held


def test_without_a_log_only_who_may_start_one_does(bench: Bench) -> None:
    args = ["", "", NONCE, "0", "e", "eu", "", "", "0", "", "1", "1", "86400"]
    assert bench.run("bump.lua", ("meta", "epoch", "log"), args) == [b"waiting"]
    assert not any(bench.everything("bump.lua"))


def test_a_script_sees_role_and_replication_id_of_its_server(bench: Bench) -> None:
    seen = bench.client.eval("return redis.call('INFO', 'replication')", 0)
    told = bench.client.info("replication")
    text = seen.decode() if isinstance(seen, bytes) else str(seen)
    assert f"role:{told['role']}" in text
    assert f"master_replid:{told['master_replid']}" in text
    assert len(told["master_replid"]) == 40


def test_a_script_sees_the_servers_clock_in_microseconds(bench: Bench) -> None:
    before, first, second, after = (
        bench.client.time(),
        *(tuple(map(int, bench.client.eval("return redis.call('TIME')", 0))) for _ in range(2)),
        bench.client.time(),
    )
    assert before <= first <= second <= after
    assert 0 <= first[1] < 1_000_000
