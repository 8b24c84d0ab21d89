"""The server under test: one that is started here with the product's own configuration, or somebody's, by URL.

Nothing of anybody's is touched: every key is under a name of the run's own (``{trust}:conformance-…``,
``{ks}:conformance-…``), users are named ``conformance-…``, and both are gone afterwards. Commands that would do harm if
they were allowed are only queued (MULTI), never executed, before the server has refused them.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from regions.embedded import find_server, write_server_config
from regions.server_config import Credentials, ServerVersion, acl_text
from regions.topology import Region
from verifier.log import region_key

ADMIN_PASSWORD = secrets.token_urlsafe(24)


def until(condition: Any, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result


def free_port() -> int:
    """Below 32768, where the system does not hand out ports to clients, and with room for a cluster's second one."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@dataclass
class Names:
    """Keys of a run's own, in the product's two slots; all of them are deleted at the end."""

    run: str = field(default_factory=lambda: f"conformance-{secrets.token_hex(4)}")
    given: set[str] = field(default_factory=set)

    def trust(self, name: str) -> str:
        self.given.add(key := f"{{trust}}:{self.run}:{name}")
        return key

    def region(self) -> str:
        """The evidence record of a region that is called like the run."""
        self.given.add(key := region_key(self.run))
        return key

    def private(self, name: str) -> str:
        self.given.add(key := f"{{ks}}:{self.run}:{name}")
        return key


class Target:
    """A server, and clients of it under each of the product's users."""

    def __init__(self, options: dict[str, Any], *, own: bool, users: dict[str, dict[str, Any]]) -> None:
        self._options = options
        self._users = users
        self._created: list[str] = []
        self.own = own
        info = self.client().info()
        product = "valkey" if "valkey_version" in info else "redis"
        number = tuple(map(int, str(info[f"{product}_version"]).split(".")))
        self.version = ServerVersion(product, number)  # type: ignore[arg-type]
        self.info: dict[str, Any] = info
        self.has_admin = self._make_users()

    def _connect(self, options: dict[str, Any]) -> redis.Redis:
        connection_class = options.get("connection_class", redis.Connection)
        if "path" in options:
            connection_class = redis.UnixDomainSocketConnection
        given = {
            **options,
            "connection_class": connection_class,
            "driver_info": None,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": 10,
            "protocol": 2,
        }
        pool = redis.ConnectionPool(**given)
        return redis.Redis.from_pool(pool)

    def client(self) -> redis.Redis:
        """As the user of the URL; of a server of our own, its administrator."""
        return self._connect(self._options)

    def admin(self) -> redis.Redis:
        if not self.has_admin:
            self.not_checked("needs admin")
        return self.client()

    def user(self, name: str) -> redis.Redis:
        """As one of the product's users; raises what marks a check as not made if there is none."""
        if name not in self._users:
            by_url = (
                f", or the URL of such a user as {name.upper()}_REDIS" if name in ("verifier", "keyservice") else ""
            )
            self.not_checked(f"needs admin{by_url}")
        return self._connect({**self._options, **self._users[name]})

    def stranger(self) -> redis.Redis:
        """Without a name or a password."""
        return self._connect({**self._options, "username": None, "password": None})

    def writer(self) -> redis.Redis:
        """As the key service's user where there is one, else as the user of the URL."""
        return self.user("keyservice") if "keyservice" in self._users else self.client()

    def reader(self) -> redis.Redis:
        return self.user("verifier") if "verifier" in self._users else self.client()

    def not_checked(self, why: str) -> NoReturn:
        """Said by name at the end of the run; with a server of our own there is no excuse."""
        if self.own:
            pytest.fail(f"a check that must be made was not: {why}")
        pytest.skip(f"not checked: {why}")

    def _make_users(self) -> bool:
        """Users with the product's rules, under names of the run's own; False if the URL's user may not make them."""
        credentials = Credentials.generate()
        with self.client() as client:
            for line in acl_text(credentials, self.version).splitlines():
                _, name, *rules = line.split()
                if name == "default" or name in self._users:
                    continue
                own_name = f"conformance-{name}-{secrets.token_hex(4)}"
                try:
                    client.execute_command("ACL", "SETUSER", own_name, *rules)
                except NoPermissionError:
                    return False
                self._created.append(own_name)
                self._users[name] = {"username": own_name, "password": credentials.as_dict()[name]}
        return True

    def close(self) -> None:
        with self.client() as client:
            for name in self._created:
                client.execute_command("ACL", "DELUSER", name)


class OwnServer:
    """The program that ``REGIONS_REDIS_SERVER`` names, or the embedded one, configured as the product does."""

    def __init__(self, directory: Path, name: str, *extra: tuple[str, str]) -> None:
        binary = find_server()
        self.socket = directory / f"{name}.sock"
        files = write_server_config(
            Region("local", 1, "127.0.0.1"),
            directory=directory / name,
            uds=self.socket,
            port=1,
            credentials=_CREDENTIALS,
            version=binary.version,
        )
        digest = hashlib.sha256(ADMIN_PASSWORD.encode()).hexdigest()
        with files.acl.open("a") as acl:
            acl.write(f"user admin reset on #{digest} ~* &* +@all\n")
        with files.config.open("a") as config:
            config.writelines(f"{setting} {value}\n" for setting, value in extra)
        with (directory / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [binary.path, files.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            until(self._answers)
        except BaseException:
            self.stop()
            raise

    def options(self, **more: Any) -> dict[str, Any]:
        return {"path": str(self.socket), "username": "admin", "password": ADMIN_PASSWORD, **more}

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server does not start with the product's configuration"
        try:
            with redis.Redis(unix_socket_path=str(self.socket), driver_info=None) as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def target(self) -> Target:
        users = {name: {"username": name, "password": password} for name, password in _CREDENTIALS.as_dict().items()}
        return Target(self.options(), own=True, users=users)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


_CREDENTIALS = Credentials.generate()
"""The same on every server of a run, so that one can follow another."""


def by_url(url: str, users: dict[str, str]) -> Target:
    """Somebody's server; ``users`` are URLs by the product's user."""
    named = {}
    for name, its_url in users.items():
        options = parse_url(its_url)  # type: ignore[no-untyped-call]
        named[name] = {part: options.get(part) for part in ("username", "password")}
    options = dict(parse_url(url))  # type: ignore[no-untyped-call]
    return Target(options, own=False, users=named)


@contextlib.contextmanager
def own_server(directory: Path, name: str, *extra: tuple[str, str]) -> Iterator[OwnServer]:
    server = OwnServer(directory, name, *extra)
    try:
        yield server
    finally:
        server.stop()
