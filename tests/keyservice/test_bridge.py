"""``keyservice bridge`` between a real older server and a real key service, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keyservice.bridge import Bridge, BridgeSettings
from keyservice.bridge_api import Caller
from keyservice.core.bridge import KeyPattern, Rules
from keyservice.errors import StartError
from tests.keyservice.support import CLIENTS, HS256_SECRET, ISSUER, KEK, SECRET_HASH, Server, until
from verifier.log import LOG_KEY, Entry
from verifier.testing import make_key, sign

CHANNEL = "token_invalidation"
KEY = make_key()

BRIDGE_CLIENT = f"""
[[clients]]
client_id = "bridge"
secret_hash = "{SECRET_HASH}"
scopes = ["keyservice:revocations:write"]
audiences = ["{ISSUER}/admin"]
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class KeyService:
    """``keyservice serve`` on ports of its own; started again, it is the same one."""

    def __init__(self, run_dir: Path, server: Server) -> None:
        (run_dir / "clients.toml").write_text(CLIENTS + BRIDGE_CLIENT)
        self.server = server
        self.port, self.admin_port = free_port(), free_port()
        self.environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | {
            "KEYSERVICE_PROFILE": "demo",
            "KEYSERVICE_ISSUER": ISSUER,
            "KEYSERVICE_REGION": "eu-west-1",
            "KEYSERVICE_KEK": KEK,
            "KEYSERVICE_CLIENTS_FILE": str(run_dir / "clients.toml"),
            "KEYSERVICE_PORT": str(self.port),
            "KEYSERVICE_ADMIN_PORT": str(self.admin_port),
            "KEYSERVICE_REDIS_URL": server.url,
            "JWT_SECRET": HS256_SECRET,
            "KEYSERVICE_KEEPER_DIR": str(run_dir / "keeper"),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.after = b"-"

    @property
    def caller(self) -> Caller:
        return Caller.from_env(self.caller_environment)

    @property
    def caller_environment(self) -> dict[str, str]:
        return {
            "KEYSERVICE_TOKEN_URL": f"http://127.0.0.1:{self.port}/oauth2/token",
            "KEYSERVICE_ADMIN_URL": f"http://127.0.0.1:{self.admin_port}",
            "KEYSERVICE_CLIENT_ID": "bridge",
            "KEYSERVICE_CLIENT_SECRET": "s3cret",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "keyservice", "serve"]
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._ready, 60)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False, timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def forget(self) -> None:
        """Leave out what is in the log by now."""
        with self.server.client() as client:
            ((last, _),) = client.xrevrange(LOG_KEY, count=1)
        self.after = b"(" + last

    def entries(self) -> list[Entry]:
        with self.server.client() as client:
            logged = client.xrange(LOG_KEY, self.after)
        decoded = [Entry.decode(fields) for _, fields in logged]
        return [entry for entry in decoded if entry.kind != "epoch"]

    def revoked(self) -> Counter[tuple[str, str, str]]:
        return Counter((entry.kind, entry.issuer, entry.value) for entry in self.entries())


class Child:
    """``keyservice bridge`` as a process, and what it has said so far."""

    def __init__(self, environment: dict[str, str], out: Path, *arguments: str) -> None:
        self.out = out
        self.errors = out.with_suffix(".err")
        command = [sys.executable, "-m", "keyservice", "bridge", *arguments]
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with out.open("wb") as stdout, self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                env={**inherited, "PYTHONWARNINGS": "error", **environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    def said(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.out.read_text().split("\n")[:-1] if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def terminate(self, timeout_s: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def complaint(self, exit_code: int, timeout_s: float = 60) -> str:
        assert self.process.wait(timeout_s) == exit_code, self.errors.read_text()
        (line,) = self.errors.read_text().splitlines()
        assert line.startswith("keyservice: error [")
        return line


@pytest.fixture
def legacy(start_server: Callable[..., Server]) -> Server:
    return start_server("legacy")


@pytest.fixture(scope="module")
def shared() -> Iterator[KeyService]:
    """One for all tests, because starting it takes longest: they keep apart by what they revoke."""
    with tempfile.TemporaryDirectory(prefix="ks-") as path:
        server = Server(Path(path), "redis")
        made = KeyService(Path(path), server)
        try:
            server.start()
            yield made
        finally:
            made.kill()
            server.kill()


@pytest.fixture
def service(shared: KeyService) -> KeyService:
    """Running; its ``entries`` are those of this test."""
    if shared.process is None:
        shared.start()
    shared.forget()
    return shared


StartBridge = Callable[..., Child]


@pytest.fixture
def start_bridge(run_dir: Path, legacy: Server) -> Iterator[StartBridge]:
    """``start_bridge(service.caller_environment, "--once", …)``; ``--redis`` and ``--json`` are given."""
    children: list[Child] = []

    def start(environment: dict[str, str], *arguments: str, redis_url: str | None = None) -> Child:
        given = ("--redis", redis_url or legacy.url, "--json", *arguments)
        children.append(Child(environment, run_dir / f"bridge-{len(children)}.out", *given))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.wait()


def publish(legacy: Server, *messages: str, listeners: int = 1) -> None:
    with legacy.client() as client:
        for message in messages:
            assert client.publish(CHANNEL, message) == listeners


def token(**claims: Any) -> str:
    return sign(KEY, {"iss": ISSUER, **claims})


# -- from the old system into the trust log ---------------------------------------------------------------------------


def test_messages_and_keys_become_revocations_each_once_and_the_old_server_is_only_read(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    sent, other = token(jti="from-a-token"), token(sub="no jti")
    with legacy.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "bridge", "on", ">pw", "~blacklist:*", f"&{CHANNEL}", "+subscribe", "+ping", "+scan"
        )
        client.set("blacklist:from-a-key", "1", ex=600)
        client.set(f"blacklist:{other}", "1", ex=600)
        client.set("blacklist:two words", "1")
        client.set("session:other", "1")
    child = start_bridge(
        service.caller_environment,
        *("--channel", CHANNEL, "--keys", "blacklist:*", "--rescan-s", "1", "--issuer", ISSUER),
        redis_url=f"unix://bridge:pw@{legacy.socket}",
    )
    until(lambda: child.said("scanned"))
    messages = ["plain", json.dumps({"sid": "s", "reason": "logged out"}), json.dumps({"token": sent}), sent, "[]"]
    publish(legacy, *messages, "from-a-key", *messages)
    publish(legacy, json.dumps({"client": "c"}))
    until(lambda: ("client", ISSUER, "c") in service.revoked())
    scans = len(child.said("scanned"))
    until(lambda: len(child.said("scanned")) >= scans + 2)
    assert child.terminate() == 0
    named = {(entry.kind, entry.value): entry for entry in service.entries()}
    assert set(named) == {
        ("jti", "plain"),
        ("jti", "from-a-key"),
        ("jti", "from-a-token"),
        ("tok", next(value for kind, value in named if kind == "tok")),
        ("sid", "s"),
        ("client", "c"),
    }
    assert set(service.revoked().values()) == {1}
    assert named["sid", "s"].reason == "logged out"
    (ended,) = child.said("ended")
    assert (ended["messages"], ended["lost"], ended["waiting"]) == (12, 0, 0)
    assert ended["garbage"]["json_form_unknown"] == 2
    assert ended["garbage"]["identifier_invalid"] == ended["scans"]
    assert {line["code"] for line in child.said("garbage")} == {"json_form_unknown", "identifier_invalid"}
    said = child.out.read_text() + child.errors.read_text()
    assert not any(secret in said for secret in (sent, other, "two words", "s3cret", "from-a-key", "plain"))
    with legacy.client() as client:
        assert client.dbsize() == 4


def test_what_pubsub_may_lose_is_said_at_the_start(service: KeyService, start_bridge: StartBridge) -> None:
    with_keys = start_bridge(service.caller_environment, "--channel", CHANNEL, "--keys", "blacklist:*")
    without = start_bridge(service.caller_environment, "--channel", CHANNEL)
    (line,) = until(lambda: with_keys.said("pubsub_may_lose"))
    assert line["note"].endswith("the keys are scanned again to make up for it")
    (line,) = until(lambda: without.said("pubsub_may_lose"))
    assert line["note"].endswith("nothing makes up for it: use --keys")
    assert "synchronises anew" in line["note"]


def test_once_delivers_every_key_and_ends_and_again_changes_nothing(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    with legacy.client() as client:
        client.mset({f"jwt:{n}:revoked": "1" for n in range(12_000)})
    for _ in range(2):
        child = start_bridge(service.caller_environment, "--keys", "jwt:*:revoked", "--once")
        assert child.process.wait(60) == 0
        assert service.revoked() == {("jti", ISSUER, str(n)): 1 for n in range(12_000)}
        (ended,) = child.said("ended")
        assert (ended["scans"], ended["lost"], ended["waiting"]) == (1, 0, 0)
        assert ended["keys"] >= ended["stored"] >= 12_000


def test_with_values_it_is_the_value_that_says_what_is_revoked(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    with legacy.client() as client:
        client.set("blacklist:user:7", json.dumps({"sub": "7", "before": int(time.time()) - 10}))
        client.set("blacklist:user:8", json.dumps({"sub": "8"}))
        client.set("blacklist:1", "some-jti")
        client.lpush("blacklist:2", "x")
    child = start_bridge(service.caller_environment, "--keys", "blacklist:*", "--key-part", "value", "--once")
    assert child.process.wait(60) == 0
    assert set(service.revoked()) == {("sub", ISSUER, "7"), ("jti", ISSUER, "some-jti")}
    (ended,) = child.said("ended")
    assert ended["garbage"] == {"cutoff_in_a_key": 1, "key_not_a_string": 1}


def test_logging_out_everywhere_twice_cuts_off_twice(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    child = start_bridge(service.caller_environment, "--channel", CHANNEL, "--kind", "sub")
    until(lambda: child.said("pubsub_may_lose"))
    until(lambda: listening(legacy))
    publish(legacy, "u")
    until(lambda: service.revoked()["sub", ISSUER, "u"] == 1)
    publish(legacy, "u")
    until(lambda: service.revoked()["sub", ISSUER, "u"] == 2)


def listening(legacy: Server) -> bool:
    with legacy.client() as client:
        return bool(client.pubsub_numsub(CHANNEL)[0][1])


# -- when something is away -------------------------------------------------------------------------------------------


def test_a_lost_connection_is_said_and_the_keys_make_up_for_what_was_published_meanwhile(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    options = ("--channel", CHANNEL, "--keys", "blacklist:*", "--rescan-s", "3600")
    child = start_bridge(service.caller_environment, *options)
    until(lambda: child.said("scanned"))
    legacy.kill()
    until(lambda: child.said("trouble"))
    legacy.start()
    with legacy.client() as client:
        client.set("blacklist:meanwhile", "1")
        until(lambda: listening(legacy))
        client.client_kill_filter(_type="pubsub")  # it may have scanned before the key was there: lost once more
    until(lambda: ("jti", ISSUER, "meanwhile") in service.revoked())
    assert child.said("pubsub_gap")[0]["note"].endswith("the keys are scanned")
    until(lambda: listening(legacy))
    publish(legacy, "after")
    until(lambda: ("jti", ISSUER, "after") in service.revoked())
    assert child.said("recovered")
    assert child.terminate() == 0


def test_what_was_heard_while_the_key_service_was_away_arrives_once(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    child = start_bridge(service.caller_environment, "--channel", CHANNEL)
    until(lambda: listening(legacy))
    publish(legacy, "before-it")
    until(lambda: ("jti", ISSUER, "before-it") in service.revoked())
    service.kill()
    publish(legacy, *(f"away-{n}" for n in range(50)), "before-it")
    assert until(lambda: child.said("trouble"))[0]["code"] == "keyservice_unreachable"
    service.start()
    until(lambda: len(service.revoked()) == 51)
    until(lambda: child.said("recovered"))
    assert child.terminate() == 0
    assert set(service.revoked().values()) == {1}


def test_what_could_not_be_delivered_before_the_end_is_said(
    legacy: Server, service: KeyService, start_bridge: StartBridge
) -> None:
    child = start_bridge(service.caller_environment, "--channel", CHANNEL)
    until(lambda: listening(legacy))
    service.kill()
    publish(legacy, "x", "y")
    until(lambda: child.said("trouble"))
    child.process.send_signal(signal.SIGTERM)
    line = child.complaint(4)
    assert "[bridge_undelivered]: 2 revocations" in line
    assert child.said("ended")[0]["waiting"] == 2


class InProcess:
    """A bridge in this process, with bounds of the test's own."""

    def __init__(self, legacy: Server, caller: Caller, **settings: Any) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        given: dict[str, Any] = {"redis_url": legacy.url, "caller": caller, "channels": (CHANNEL,), **settings}
        self.bridge = Bridge(BridgeSettings(**given), lambda event, fields: self.lines.append((event, fields)))
        self.stopping = asyncio.Event()

    def said(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.lines if name == event]

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        task = asyncio.create_task(self.bridge.run(self.stopping))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline, self.lines
            await asyncio.sleep(0.02)


NOBODY = Caller("http://127.0.0.1:9/token", "http://127.0.0.1:9", "bridge", "s3cret")
"""The discard port, where nobody listens."""


async def test_a_message_for_which_there_is_no_room_is_lost_and_said_at_once(legacy: Server) -> None:
    bridge = InProcess(legacy, NOBODY, queue_items_max=10)
    async with bridge.running():
        await bridge.until(lambda: listening(legacy))
        await asyncio.to_thread(publish, legacy, *(f"m{n}" for n in range(40)))
        await bridge.until(lambda: bridge.bridge.counts.messages == 40)
        # One batch may be under way and come back: what was accepted is never dropped to make room.
        assert 20 <= bridge.bridge.counts.lost <= 30
        line = bridge.said("lost")[0]
        assert (line["code"], line["note"]) == ("queue_full", "nothing makes up for it: use --keys")


async def test_a_scan_waits_for_room_and_loses_nothing(legacy: Server, service: KeyService) -> None:
    with legacy.client() as client:
        client.mset({f"blacklist:scan-{n}": "1" for n in range(500)})
    settings: dict[str, Any] = {"channels": (), "keys": KeyPattern.parse("blacklist:*"), "queue_items_max": 20}
    bridge = InProcess(legacy, service.caller, once=True, **settings)
    await asyncio.wait_for(bridge.bridge.run(bridge.stopping), 60)
    assert service.revoked() == {("jti", ISSUER, f"scan-{n}"): 1 for n in range(500)}
    assert (bridge.bridge.counts.lost, bridge.bridge.counts.keys) == (0, 500)


async def test_what_was_heard_while_the_primary_was_away_arrives_once(legacy: Server, service: KeyService) -> None:
    bridge = InProcess(legacy, service.caller)
    async with bridge.running():
        await bridge.until(lambda: listening(legacy))
        await asyncio.to_thread(publish, legacy, "before-that")
        await bridge.until(lambda: ("jti", ISSUER, "before-that") in service.revoked())
        with service.server.stopped():
            await asyncio.to_thread(publish, legacy, "while-away")
            # The key service refuses it for now, or has it on its keeper's disk and says pending.
            await bridge.until(lambda: bridge.said("trouble") or bridge.bridge.counts.stored >= 2)
        await bridge.until(lambda: ("jti", ISSUER, "while-away") in service.revoked())
        await bridge.until(lambda: bridge.bridge.counts.stored >= 2)
    assert len({entry.id for entry in service.entries()}) == 2


async def test_a_lost_message_is_found_by_the_scan_that_its_loss_asks_for(legacy: Server, service: KeyService) -> None:
    settings: dict[str, Any] = {"keys": KeyPattern.parse("blacklist:*"), "queue_items_max": 10, "rescan_s": 3600.0}
    bridge = InProcess(legacy, service.caller, **settings)
    async with bridge.running():
        await bridge.until(lambda: bridge.said("scanned"))
        with service.server.stopped(), legacy.client() as client:
            for n in range(60):
                client.set(f"blacklist:lost-{n}", "1")
            await asyncio.to_thread(publish, legacy, *(f"lost-{n}" for n in range(60)))
            await bridge.until(lambda: bridge.bridge.counts.messages == 60)
            assert bridge.bridge.counts.lost > 0
        await bridge.until(lambda: service.revoked() == {("jti", ISSUER, f"lost-{n}"): 1 for n in range(60)})


async def test_a_silent_server_has_to_prove_that_it_is_alive(legacy: Server) -> None:
    bridge = InProcess(legacy, NOBODY, ping_every_s=0.1, rules=Rules())
    async with bridge.running():
        await bridge.until(lambda: listening(legacy))
        await asyncio.sleep(0.5)  # five silences, each answered
        assert not bridge.said("trouble")
        with legacy.stopped():
            await bridge.until(lambda: bridge.said("trouble"))
        await bridge.until(lambda: bridge.said("pubsub_gap"))


async def test_a_user_that_may_not_listen_ends_the_bridge_by_name(legacy: Server) -> None:
    with legacy.client() as client:
        client.execute_command("ACL", "SETUSER", "bridge", "on", ">pw", "+ping")
    bridge = InProcess(legacy, NOBODY, redis_url=f"unix://bridge:pw@{legacy.socket}")
    with pytest.raises(StartError) as ended:
        await asyncio.wait_for(bridge.bridge.run(bridge.stopping), 60)
    assert ended.value.code == "legacy_no_permission"


# -- usage ------------------------------------------------------------------------------------------------------------

SOMEWHERE = {
    "KEYSERVICE_TOKEN_URL": "http://127.0.0.1:9/oauth2/token",
    "KEYSERVICE_ADMIN_URL": "http://127.0.0.1:9",
    "KEYSERVICE_CLIENT_ID": "bridge",
    "KEYSERVICE_CLIENT_SECRET": "hunter2",
}


@pytest.mark.parametrize(
    ("arguments", "changes", "code"),
    [
        ((), {}, "setting_missing"),
        (("--once", "--channel", "c"), {}, "setting_missing"),
        (("--keys", "blacklist"), {}, "setting_invalid"),
        (("--keys", "b:*", "--kind", "sub"), {}, "setting_invalid"),
        (("--redis", "http://u:hunter2@x", "--channel", "c"), {}, "setting_invalid"),
        (("--channel", "c"), {"KEYSERVICE_ADMIN_URL": ""}, "setting_missing"),
        (("--channel", "c"), {"KEYSERVICE_TOKEN_URL": "ftp://u:hunter2@x"}, "setting_invalid"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    start_bridge: StartBridge, arguments: tuple[str, ...], changes: dict[str, str], code: str
) -> None:
    line = start_bridge({**SOMEWHERE, **changes}, *arguments).complaint(2)
    assert f"[{code}]" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("redis_url", ["unix://x:hunter2@{}", "unix://{}"])
def test_wrong_credentials_of_the_old_server_are_named(
    start_server: Callable[..., Server], start_bridge: StartBridge, redis_url: str
) -> None:
    closed = start_server("closed", "--port", "0", "--requirepass", "right")
    line = start_bridge(SOMEWHERE, "--channel", "c", redis_url=redis_url.format(closed.socket)).complaint(4)
    assert "[legacy_wrong_password]" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"KEYSERVICE_CLIENT_SECRET": "hunter2"}, "invalid_client"),
        ({"KEYSERVICE_CLIENT_ID": "login"}, "scope"),
        ({"KEYSERVICE_CLIENT_ID": "web"}, "claim_invalid"),
    ],
)
def test_a_caller_that_may_not_revoke_ends_the_bridge_by_name(
    legacy: Server, service: KeyService, start_bridge: StartBridge, changes: dict[str, str], code: str
) -> None:
    with legacy.client() as client:
        client.set("blacklist:x", "1")
    child = start_bridge({**service.caller_environment, **changes}, "--keys", "blacklist:*")
    line = child.complaint(4)
    assert code in line.partition("]")[0]
    assert "hunter2" not in line
    assert not service.entries()
