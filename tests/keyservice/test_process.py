"""``python -m keyservice`` as a process: it serves, ends when told, and says in one line why it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keyservice import cli
from keyservice.clients import Authenticator, hash_secret, load_clients
from keyservice.errors import SettingError
from keyservice.settings import Settings
from tests.keyservice.support import Server, http, is_ready, until
from verifier.limits import JWKS_KEYS_MAX

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn(environment: dict[str, str]) -> Iterator[Spawn]:
    children: list[subprocess.Popen[str]] = []

    def start(*arguments: str, pass_fds: tuple[int, ...] = (), **changes: str | None) -> subprocess.Popen[str]:
        env = {name: value for name, value in {**environment, **changes}.items() if value is not None}
        child = subprocess.Popen(
            [sys.executable, "-m", "keyservice", *(arguments or ("serve",))],
            env=env,
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def complaint(child: subprocess.Popen[str], exit_code: int, timeout_s: float = 60) -> str:
    """The one line with which a process gave up."""
    _, errors = child.communicate(timeout=timeout_s)
    assert child.returncode == exit_code, errors
    lines = [line for line in errors.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("keyservice: error [")
    assert "Traceback" not in errors
    return lines[0]


def test_it_serves_and_ends_on_sigterm(server: Server, spawn: Spawn, environment: dict[str, str]) -> None:
    child = spawn()
    public, admin = Path(environment["KEYSERVICE_UDS"]), Path(environment["KEYSERVICE_ADMIN_UDS"])
    with http(public) as client, http(admin) as admin_client:
        until(lambda: is_ready(client, public), 60)
        assert public.stat().st_mode & 0o777 == 0o600
        answer = client.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=("orders", "s3cret"))
        token = answer.json()["access_token"]
        assert client.get("/.well-known/jwks.json").status_code == 200
        assert client.get("/admin/keys").status_code == 404
        assert admin_client.get("/admin/keys").status_code == 401
        child.send_signal(signal.SIGTERM)
        out, errors = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "")
    assert not public.exists()
    logged = [json.loads(line) for line in errors.splitlines()]
    assert {"listening", "epoch begun", "epoch opened"} <= {line["event"] for line in logged}
    assert token not in errors
    assert "s3cret" not in errors


def test_it_ends_with_its_parent(server: Server, spawn: Spawn, environment: dict[str, str]) -> None:
    public = Path(environment["KEYSERVICE_UDS"])
    reading, writing = os.pipe()
    try:
        child = spawn(pass_fds=(reading,), KEYSERVICE_PARENT_FD=str(reading))
        with http(public) as client:
            until(lambda: is_ready(client, public), 60)
    finally:
        os.close(reading)
        os.close(writing)
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_a_killed_one_leaves_nothing_that_stops_the_next(
    server: Server, spawn: Spawn, environment: dict[str, str]
) -> None:
    public = Path(environment["KEYSERVICE_UDS"])
    first = spawn()
    with http(public) as client:
        until(lambda: is_ready(client, public), 60)
        until(lambda: len(client.get("/.well-known/jwks.json").json()["keys"]) == 2)
        before = client.get("/.well-known/jwks.json").content
    first.kill()
    first.communicate()
    spawn()
    with http(public) as client:
        until(lambda: is_ready(client, public), 60)
        assert client.get("/.well-known/jwks.json").content == before


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"KEYSERVICE_ISSUER": None}, "setting_missing", "KEYSERVICE_ISSUER"),
        ({"KEYSERVICE_REDIS_URL": None}, "setting_missing", "KEYSERVICE_REDIS_URL"),
        ({"KEYSERVICE_KEK": None}, "setting_missing", "KEYSERVICE_KEK"),
        ({"KEYSERVICE_KEK": "hunter2"}, "setting_invalid", "KEYSERVICE_KEK"),
        ({"KEYSERVICE_KEK_FILE": "/nowhere"}, "setting_invalid", "KEYSERVICE_KEK"),
        ({"KEYSERVICE_KEK": None, "KEYSERVICE_KEK_FILE": "/nowhere"}, "setting_invalid", "KEYSERVICE_KEK_FILE"),
        ({"KEYSERVICE_CLIENTS_FILE": None}, "setting_missing", "KEYSERVICE_CLIENTS_FILE"),
        ({"KEYSERVICE_CLIENTS_FILE": "/nowhere"}, "clients_file_invalid", "/nowhere"),
        ({"KEYSERVICE_PORT": "hunter2"}, "setting_invalid", "KEYSERVICE_PORT"),
        ({"KEYSERVICE_PORT": "65536"}, "setting_invalid", "KEYSERVICE_PORT"),
        ({"KEYSERVICE_ISSUER": "i" * 257}, "setting_invalid", "KEYSERVICE_ISSUER"),
        ({"KEYSERVICE_RECEIPT_WAIT_MS": "60001"}, "setting_invalid", "KEYSERVICE_RECEIPT_WAIT_MS"),
        ({"KEYSERVICE_ROLE": "hunter2"}, "setting_invalid", "KEYSERVICE_ROLE"),
        ({"KEYSERVICE_KEEPER_DIR": None}, "setting_missing", "KEYSERVICE_KEEPER_DIR"),
        ({"KEYSERVICE_ROLE": "keeper"}, "setting_missing", "KEYSERVICE_KEEPER_PORT"),
        ({"KEYSERVICE_ROLE": "api"}, "setting_missing", "KEYSERVICE_KEEPER_URL"),
        ({"KEYSERVICE_KEEPER_URL": "http://u:hunter2@x"}, "setting_invalid", "KEYSERVICE_KEEPER_URL"),
        ({"KEYSERVICE_KEEPER_PORT": "0"}, "setting_missing", "KEYSERVICE_KEEPER_SECRET"),
        ({"KEYSERVICE_KEEPER_SECRET": "hunter2"}, "setting_invalid", "KEYSERVICE_KEEPER_SECRET"),
        ({"KEYSERVICE_KEEPER_SECRET": "hunter2 " * 9}, "setting_invalid", "KEYSERVICE_KEEPER_SECRET"),
        ({"KEYSERVICE_KEEPER_SECRET": "hunter2é" * 9}, "setting_invalid", "KEYSERVICE_KEEPER_SECRET"),
        ({"KEYSERVICE_PROFILE": "hunter2"}, "setting_invalid", "KEYSERVICE_PROFILE"),
        ({"KEYSERVICE_PROT": "1"}, "setting_unknown", "KEYSERVICE_PROT"),
        ({"KEYSERVICE_REDIS_URL": "http://u:hunter2@x"}, "setting_invalid", "KEYSERVICE_REDIS_URL"),
        ({"KEYSERVICE_REDIS_URL": "redis://u:hunter2@x:port"}, "setting_invalid", "KEYSERVICE_REDIS_URL"),
        (
            {"KEYSERVICE_REDIS_URL": "rediss://u:hunter2@x?ssl_cert_reqs=none"},
            "setting_invalid",
            "KEYSERVICE_REDIS_URL",
        ),
        ({"KEYSERVICE_REDIS_TLS_CA": "/etc/hosts"}, "setting_invalid", "KEYSERVICE_REDIS_TLS_CA is set"),
        (
            {"KEYSERVICE_REDIS_URL": "rediss://x", "KEYSERVICE_REDIS_TLS_CA": "/nowhere/hunter2"},
            "setting_invalid",
            "KEYSERVICE_REDIS_TLS_CA",
        ),
        ({"KEYSERVICE_SOURCE_ADDRESS": "hunter2"}, "setting_invalid", "KEYSERVICE_SOURCE_ADDRESS"),
        ({"KEYSERVICE_REGIONS": "a,b"}, "setting_invalid", "KEYSERVICE_REGIONS"),
        ({"KEYSERVICE_REGION": "no spaces"}, "setting_invalid", "KEYSERVICE_REGION"),
        ({"KEYSERVICE_REGIONS": "eu-west-1,b"}, "setting_missing", "KEYSERVICE_BOOTSTRAP_REGION"),
        ({"KEYSERVICE_BOOTSTRAP_REGION": "b"}, "setting_invalid", "KEYSERVICE_BOOTSTRAP_REGION"),
        ({"JWT_SECRET": "hunter2"}, "setting_invalid", "JWT_SECRET"),
        ({"JWT_SECRET": "hunter2" * 9 + "\udcff"}, "setting_invalid", "JWT_SECRET is not UTF-8"),
        ({"KEYSERVICE_ISSUER": "hunter2\udcff"}, "setting_invalid", "KEYSERVICE_ISSUER is not UTF-8"),
        ({"JWT_SECRET": None}, "setting_missing", "JWT_SECRET"),
        ({"KEYSERVICE_LEEWAY_S": "1.9"}, "setting_invalid", "KEYSERVICE_MAX_SKEW_S"),
        ({"KEYSERVICE_PUBLISH_LEAD_S": "4.74"}, "setting_invalid", "KEYSERVICE_JWKS_MAX_AGE_S"),
        ({"KEYSERVICE_DROP_GRACE_S": "30.9"}, "setting_invalid", "KEYSERVICE_LEEWAY_S"),
        ({"KEYSERVICE_ROTATION_INTERVAL_S": "4.9"}, "setting_invalid", "KEYSERVICE_PUBLISH_LEAD_S"),
        ({"KEYSERVICE_ACCESS_TOKEN_TTL_S": "86401"}, "setting_invalid", "KEYSERVICE_MAX_TOKEN_LIFETIME_S"),
        ({"KEYSERVICE_ACCESS_TOKEN_TTL_S": "459"}, "setting_invalid", "KEYSERVICE_PUBLISH_LEAD_S"),
        ({"KEYSERVICE_ACCESS_TOKEN_TTL_S": "459"}, "setting_invalid", "KEYSERVICE_ACCESS_TOKEN_TTL_S"),
        (
            {
                "KEYSERVICE_REGIONS": ",".join(["eu-west-1", *(f"r{n}" for n in range(49))]),
                "KEYSERVICE_BOOTSTRAP_REGION": "r1",
            },
            "setting_invalid",
            "KEYSERVICE_REGIONS",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_not_its_value(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    changes: dict[str, str | None],
    code: str,
    named: str,
) -> None:
    """In this process, because it has to end before anything is opened."""
    for name in [name for name in os.environ if name.startswith(("KEYSERVICE_", "REDIS_", "JWT_"))]:
        monkeypatch.delenv(name)
    for name, value in {**environment, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("keyservice.telemetry.configure_logging", lambda *_: None)
    assert cli.run(lambda: cli.app(["serve"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"keyservice: error [{code}]")
    assert named in line
    assert "hunter2" not in line


def test_a_wrong_setting_ends_a_process(spawn: Spawn) -> None:
    line = complaint(spawn(KEYSERVICE_PORT="hunter2"), 2)
    assert "[setting_invalid]" in line
    assert "KEYSERVICE_PORT" in line
    assert "hunter2" not in line


def test_at_the_limits_the_settings_hold(spawn: Spawn) -> None:
    exact = {
        "KEYSERVICE_START_TIMEOUT_S": "0.5",
        "KEYSERVICE_LEEWAY_S": "2",
        "KEYSERVICE_PUBLISH_LEAD_S": "4.75",
        "KEYSERVICE_DROP_GRACE_S": "3",
        "KEYSERVICE_ROTATION_INTERVAL_S": "4.75",
    }
    assert "[redis_unreachable]" in complaint(spawn(**exact), 4)
    assert "[redis_unreachable]" in complaint(
        spawn(KEYSERVICE_START_TIMEOUT_S="0.5", KEYSERVICE_ACCESS_TOKEN_TTL_S="458"), 4
    )
    longest = {
        "KEYSERVICE_START_TIMEOUT_S": "0.5",
        "KEYSERVICE_ACCESS_TOKEN_TTL_S": "86400",
        "KEYSERVICE_PUBLISH_LEAD_S": "1000",
    }
    assert "[redis_unreachable]" in complaint(spawn(**longest), 4)


@pytest.mark.parametrize("regions", [1, 3, 4, 6, 7, 16])
def test_the_demo_profile_suits_every_number_of_regions(make_settings: Callable[..., Settings], regions: int) -> None:
    names = ("eu-west-1", *(f"r{n}" for n in range(1, regions)))
    given = {"regions": ",".join(names), "bootstrap_region": "eu-west-1"}
    settings = make_settings("unix:///nowhere", **given)
    retiring = settings.rotation_policy.removal_delay_s / settings.publish_lead_s
    assert regions * (retiring + 2) <= JWKS_KEYS_MAX
    assert settings.publish_lead_s == 5 or regions > 3


def test_without_redis_it_gives_up_after_a_bounded_wait(spawn: Spawn) -> None:
    line = complaint(spawn(KEYSERVICE_START_TIMEOUT_S="0.5"), 4)
    assert "[redis_unreachable]" in line
    assert "KEYSERVICE_REDIS_URL" in line


@pytest.mark.parametrize("password", ["wrong-hunter2", None])
def test_a_wrong_password_is_said_at_once(
    start_server: Callable[..., Server], spawn: Spawn, password: str | None
) -> None:
    start_server("redis", "--port", "0", "--requirepass", "right")
    line = complaint(spawn(KEYSERVICE_START_TIMEOUT_S="60", REDIS_PASSWORD=password), 4)
    assert "[redis_wrong_password]" in line
    assert "hunter2" not in line


def test_the_wrong_kek_is_named_and_makes_no_new_keys(
    server: Server, spawn: Spawn, environment: dict[str, str]
) -> None:
    public = Path(environment["KEYSERVICE_UDS"])
    first = spawn()
    with http(public) as client:
        until(lambda: is_ready(client, public), 60)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    with server.client() as client:
        keys = client.hgetall("{trust}:keys")
        line = complaint(spawn(KEYSERVICE_KEK="o" * 43), 4)
        assert "[kek_mismatch]" in line
        assert client.hgetall("{trust}:keys") == keys


def test_a_port_in_use_is_named(server: Server, spawn: Spawn) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        line = complaint(spawn(KEYSERVICE_ADMIN_UDS=None, KEYSERVICE_ADMIN_PORT=port), 4)
    assert "[port_in_use]" in line
    assert "KEYSERVICE_ADMIN_PORT" in line


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "127.0.0.1:8080", "x" * 64 + ".test"])
@pytest.mark.parametrize("prefix", ["KEYSERVICE_", "KEYSERVICE_ADMIN_"])
def test_a_host_to_listen_on_that_is_none_of_this_machine_is_named(spawn: Spawn, prefix: str, host: str) -> None:
    line = complaint(spawn(**{f"{prefix}UDS": None, f"{prefix}HOST": host, f"{prefix}PORT": "0"}), 4)
    assert "[cannot_listen]" in line
    assert f"{prefix}HOST" in line
    assert f"{prefix}PORT" not in line


def test_a_socket_in_use_is_named(server: Server, spawn: Spawn, environment: dict[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(environment["KEYSERVICE_UDS"])
        sock.listen()
        line = complaint(spawn(), 4)
    assert "[port_in_use]" in line
    assert "KEYSERVICE_UDS" in line


def test_hashing_a_secret_for_the_clients_file(spawn: Spawn) -> None:
    out, _ = spawn("clients", "hash", "s3cret", "--json").communicate(timeout=60)
    assert json.loads(out)["secret_hash"].startswith("$argon2id$")


def test_wrong_usage_is_exit_2(spawn: Spawn) -> None:
    for arguments in (("serve", "--role", "x"), ("nonsense",), ("keys", "list")):
        child = spawn(*arguments)
        child.communicate(timeout=60)
        assert child.returncode == 2


def test_listing_and_rotating_keys_from_the_command_line(
    server: Server, spawn: Spawn, environment: dict[str, str]
) -> None:
    ports = {}
    for name in ("KEYSERVICE_PORT", "KEYSERVICE_ADMIN_PORT"):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            ports[name] = str(sock.getsockname()[1])
    spawn(KEYSERVICE_UDS=None, KEYSERVICE_ADMIN_UDS=None, KEYSERVICE_PUBLISH_LEAD_S="3600", **ports)
    url = f"http://127.0.0.1:{ports['KEYSERVICE_PORT']}"
    with httpx.Client(base_url=url, timeout=60) as client:
        until(lambda: is_ready(client), 60)
    caller = {
        "KEYSERVICE_TOKEN_URL": f"{url}/oauth2/token",
        "KEYSERVICE_ADMIN_URL": f"http://127.0.0.1:{ports['KEYSERVICE_ADMIN_PORT']}",
        "KEYSERVICE_CLIENT_ID": "ops",
        "KEYSERVICE_CLIENT_SECRET": "s3cret",
    }
    out, errors = spawn("keys", "list", "--json", **caller).communicate(timeout=60)
    assert not errors
    assert sorted(key["state"] for key in json.loads(out)["keys"]) == ["active", "published"]
    out, _ = spawn("keys", "list", **caller).communicate(timeout=60)
    assert "eu-west-1" in out
    out, _ = spawn("keys", "rotate", "--json", **caller).communicate(timeout=60)
    assert json.loads(out)["activates_at"] > 0
    out, _ = spawn("clients", "add", "billing", "--audience", "orders", "--json", **caller).communicate(timeout=60)
    made = json.loads(out)
    with httpx.Client(base_url=url) as client:
        auth = ("billing", made["client_secret"])
        assert client.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=auth).status_code == 200
    out, _ = spawn("clients", "list", **caller).communicate(timeout=60)
    assert "billing" in out
    assert made["client_secret"] not in out
    assert "[client_exists]" in complaint(spawn("clients", "add", "billing", "--audience", "orders", **caller), 4)
    out, _ = spawn("clients", "remove", "billing", **caller).communicate(timeout=60)
    assert out == "billing is deleted\n"
    out, _ = spawn("clients", "list", "--json", **caller).communicate(timeout=60)
    assert "billing" not in [client["client_id"] for client in json.loads(out)["clients"]]
    line = complaint(spawn("keys", "list", **{**caller, "KEYSERVICE_CLIENT_SECRET": "hunter2"}), 4)
    assert "[invalid_client]" in line


# -- the clients file -------------------------------------------------------------------------------------------------

GOOD = f'[[clients]]\nclient_id = "a"\nsecret_hash = "{hash_secret("x")}"\naudiences = ["o"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[clients", "not TOML"),
        ("", "clients"),
        ("x = 1", "`x`"),
        (GOOD + "surprise = 1\n", "surprise"),
        (GOOD + "scopes = 7\n", "scopes"),
        (GOOD + 'token_alg = "none"\n', "token_alg"),
        (GOOD + 'scopes = ["a b"]\n', "scope"),
        (GOOD + GOOD, "twice"),
        (GOOD.replace('"a"', '""'), "client_id"),
        (GOOD.replace('["o"]', "[]"), "audiences"),
        ('[[clients]]\nclient_id = "a"\nsecret_hash = "hunter2"\naudiences = ["o"]\n', "secret_hash"),
    ],
)
def test_a_bad_clients_file_is_named_with_what_is_wrong(run_dir: Path, text: str, said: str) -> None:
    path = run_dir / "c.toml"
    path.write_text(text)
    with pytest.raises(SettingError) as refused:
        load_clients(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_a_right_secret_is_remembered_for_a_while_and_a_wrong_one_never(run_dir: Path) -> None:
    path = run_dir / "c.toml"
    path.write_text(GOOD)
    mono = 0.0
    hashed: list[Any] = []
    clients = Authenticator(load_clients(path), mono=lambda: mono)
    matches = clients._matches

    async def counting(expected: str, secret: str) -> bool:
        hashed.append(secret)
        return await matches(expected, secret)

    clients._matches = counting  # type: ignore[method-assign]
    for now, secret, found in (
        (0, "x", True),
        (299, "x", True),
        (299, "y", False),
        (299, "y", False),
        (300, "x", True),
    ):
        mono = now
        assert (await clients.authenticate("a", secret) is not None) is found
    assert await clients.authenticate("b", "x") is None
    assert hashed == ["x", "y", "y", "x", "x"]
    assert await clients.authenticate("a", "x" * 1025) is None
    clients.close()
