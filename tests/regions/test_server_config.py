"""The text of a server's configuration and access rules."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from regions.server_config import Credentials, ServerVersion, acl_text, config_text
from regions.topology import Region

VALKEY = ServerVersion("valkey", (9, 1, 2))
EU = Region("eu-west-1", 2, "127.0.2.1")
US = Region("us-east-1", 1, "127.0.1.1")


def rules_of(user: str, text: str) -> set[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"user {user} ")]
    return set(line.split())


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        (ServerVersion("redis", (6, 2, 14)), False),
        (ServerVersion("redis", (7, 0, 0)), True),
        (ServerVersion("redis", (8, 0)), True),
        (ServerVersion("valkey", (7, 2, 5)), False),
        (ServerVersion("valkey", (8, 0, 0)), True),
    ],
)
def test_redis_from_7_0_and_valkey_from_8_are_supported(version: ServerVersion, supported: bool) -> None:
    assert version.is_supported is supported


@pytest.mark.parametrize(
    ("version", "knows"),
    [
        (ServerVersion("redis", (7, 0, 15)), False),
        (ServerVersion("redis", (7, 2, 0)), True),
        (ServerVersion("valkey", (8, 0, 0)), True),
    ],
)
def test_client_setinfo_is_named_only_to_a_server_that_knows_it(version: ServerVersion, knows: bool) -> None:
    text = acl_text(Credentials.generate(), version)
    assert ("+client|setinfo" in text) is knows
    assert "+client|setinfo" not in rules_of("replication", text)


def test_passwords_differ_each_time_and_by_user_and_fit_a_url() -> None:
    made = [*Credentials.generate().as_dict().values(), *Credentials.generate().as_dict().values()]
    assert len(set(made)) == len(made)
    assert all(len(password) >= 32 and password.replace("-", "").replace("_", "").isalnum() for password in made)


def test_passwords_are_hidden_in_repr() -> None:
    credentials = Credentials.generate()
    assert not any(password in repr(credentials) for password in credentials.as_dict().values())


def test_access_rules_hold_hashes_and_no_password() -> None:
    credentials = Credentials.generate()
    text = acl_text(credentials, VALKEY)
    for user, password in credentials.as_dict().items():
        assert password not in text
        assert f"#{hashlib.sha256(password.encode()).hexdigest()}" in rules_of(user, text)


def test_the_default_user_is_off_and_every_user_starts_from_nothing() -> None:
    text = acl_text(Credentials.generate(), VALKEY)
    assert rules_of("default", text) == {"user", "default", "reset", "off"}
    assert all({"reset", "-@all"} <= rules_of(user, text) for user in Credentials.generate().as_dict())


def test_only_the_key_service_has_keys_it_may_write() -> None:
    text = acl_text(Credentials.generate(), VALKEY)

    def keys_of(user: str) -> set[str]:
        return {rule for rule in rules_of(user, text) if rule.startswith(("~", "%", "allkeys"))}

    assert keys_of("keyservice") == {"~{trust}:*", "~{ks}:*"}
    assert keys_of("verifier") == {"%R~{trust}:*"}
    assert keys_of("observer") == keys_of("replication") == set()


def config_of(replica_of: Region | None, data_dir: Path = Path("/var/data")) -> list[str]:
    return config_text(
        EU,
        data_dir=data_dir,
        acl_path=Path("/var/users.acl"),
        uds=Path("/run/redis-2.sock"),
        port=16379,
        credentials=Credentials.generate(),
        replica_of=replica_of,
    ).splitlines()


def test_a_server_listens_on_a_unix_socket_only_and_binds_its_region() -> None:
    config = config_of(US)
    for line in ('port "0"', 'unixsocket "/run/redis-2.sock"', 'unixsocketperm "700"', 'bind-source-addr "127.0.2.1"'):
        assert line in config


def test_a_replica_announces_its_public_address_and_follows_the_primarys() -> None:
    config = config_of(US)
    for line in (
        'replica-announce-ip "127.0.2.1"',
        'replica-announce-port "16379"',
        'replicaof "127.0.1.1" "16379"',
        'replica-read-only "yes"',
    ):
        assert line in config


def test_a_primary_follows_nobody_and_is_otherwise_configured_like_a_replica() -> None:
    names = [{line.split()[0] for line in config_of(primary)} for primary in (None, US)]
    assert names[1] - names[0] == {"replicaof"}
    assert names[0] < names[1]


def test_nothing_is_evicted_and_everything_is_on_disk() -> None:
    config = config_of(None)
    for line in ('maxmemory-policy "noeviction"', 'appendonly "yes"', 'save ""'):
        assert line in config


def test_a_path_with_blanks_and_quotes_is_quoted() -> None:
    assert r'dir "/var/my \"own\" \\ data"' in config_of(None, Path(r'/var/my "own" \ data'))
