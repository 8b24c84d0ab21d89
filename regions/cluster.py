"""A cluster of regions on this machine: who is started, with which settings, in which order, and how it ends.

Per region: one Redis server, one Sentinel (unless the region is alone), one key service with a signing key and
key-encryption key of its own, one order service that embeds the verifier. In the first primary's region also a login
service. One link proxy owns every public address. Everything listens on unix sockets and binds its region's address
when it calls others.

A cluster always starts empty: its secrets are made anew, and what an earlier one left in its directory is removed.
"""

from __future__ import annotations

import base64
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import msgspec

from keyservice.clients import hash_secret
from regions.cluster_file import ClientSecret, ClusterFile, DemoUser, RegionUrls
from regions.deaths import Deaths, Service
from regions.embedded import Server, find_server, runtime_directory, start_servers
from regions.errors import ClusterRunning, DirectoryRefused, NotReady, RegionsError
from regions.link_control import LinkControl
from regions.link_rules import Lag, LinkConfig, Listener
from regions.nursery import Child, Nursery
from regions.sentinel_config import GROUP, sentinel_regions
from regions.sentinels import Sentinels
from regions.topology import Region, Topology

__all__ = ["SERVICES", "Cluster"]

SERVICES = ("redis", "sentinel", "keyservice", "admin", "orders", "login")
"""What has a public address in a region; `login` in the first primary's region only, `sentinel` unless it is alone."""

ISSUER = "https://id.regions.test"
AUDIENCE = "orders"
READY_WITHIN_S = 120.0
"""A server, a key service or an order service that takes longer on this machine is not going to be ready."""

LOCK = ".cluster.lock"
"""Marks a directory as a cluster's; what else a cluster makes in one is `OWN`, and goes when the next one starts."""

OWN = ("data", "logs", "run")

LOCKED_WITHIN_S = 5.0
"""A guard ends its children within its grace of 3 s; a cluster that still runs after this is meant to run."""

_ADMIN_SCOPE = "keyservice:admin"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Everything generated for one run. Nothing here has a default."""

    kek: Mapping[str, str] = field(repr=False)
    clients: Mapping[str, ClientSecret] = field(repr=False)
    user: DemoUser = field(repr=False)
    hs256_secret: str = field(repr=False)

    @classmethod
    def generate(cls, topology: Topology) -> Secrets:
        clients = ("admin", "login", "web", "worker", "legacy")
        return cls(
            kek={r.name: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode() for r in topology.regions},
            clients={name: ClientSecret(name, secrets.token_urlsafe(32)) for name in clients},
            user=DemoUser("ada", secrets.token_urlsafe(12), "user-ada"),
            hs256_secret=secrets.token_urlsafe(48),
        )


def _private_write(path: Path, text: str) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path


def _clients_toml(made: Secrets) -> str:
    lines = []
    wanted = {
        "admin": ([_ADMIN_SCOPE], [f"{ISSUER}/admin"], "RS256"),
        "login": (["keyservice:sessions:write"], [f"{ISSUER}/admin"], "RS256"),
        "web": (["orders:read"], [AUDIENCE], "RS256"),
        "worker": (["orders:read"], [AUDIENCE], "RS256"),
        "legacy": (["orders:read"], [AUDIENCE], "HS256"),
    }
    for name, (scopes, audiences, token_alg) in wanted.items():
        secret_hash = hash_secret(made.clients[name].client_secret)
        lines += ["[[clients]]", f'client_id = "{name}"', f'secret_hash = "{secret_hash}"']
        lines += [f"scopes = {scopes!r}", f"audiences = {audiences!r}", f'token_alg = "{token_alg}"', ""]
    return "\n".join(lines)


def _users_toml(made: Secrets) -> str:
    password_hash = hash_secret(made.user.password)
    user = f'username = "{made.user.username}"\nsub = "{made.user.sub}"\npassword_hash = "{password_hash}"\n'
    return f"[[users]]\n{user}"


def examples_directory() -> Path:
    """Where the example services are: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    for directory in (package.parent / "examples", package / "_examples"):
        if (directory / "orders_service.py").exists():
            return directory
    raise RegionsError("the example services are missing from this installation: reinstall multiregion-jwks[regions]")


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """One cluster a directory: two would remove each other's data. Gives the lock's file descriptor.

    It lasts as long as anybody has that open, so a cluster that was killed is waited for while its guard cleans up.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        deadline = time.monotonic() + LOCKED_WITHIN_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"another cluster runs in {directory}: stop it, or choose another directory with --var"
                    raise ClusterRunning(message) from None
            time.sleep(0.05)
        yield lock.fileno()


class Cluster(Deaths):
    """`with Cluster(topology, directory) as cluster:` starts everything, and ends everything however it is left.

    While it runs there are two files of mode 0600: `cluster.json` (`regions.cluster_file`), and `login.json` with the
    demo user's credentials as the login service takes them. `progress` is told one line a stage. Raises `RegionsError`.
    """

    def __init__(
        self, topology: Topology, directory: Path, *, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.topology = topology
        self.file_path = directory / "cluster.json"
        self.login_path = directory / "login.json"
        self._directory = directory
        self._progress = progress
        self.started = False
        self._exit = ExitStack()
        self._services: dict[str, Service] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except OSError as error:
            self._exit.close()
            where = error.filename or self._directory
            raise DirectoryRefused(f"{where}: {error.strerror}; choose another directory with --var") from error
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def check(self) -> None:
        """Raise `ServerStartFailed` if anything ended that should run."""
        self._nursery.check()

    def child(self, name: str) -> Child:
        """The process `link`, or `KIND-REGION` with the kinds redis, sentinel, keyservice, orders and login."""
        return next(child for child in reversed(self._nursery.children) if child.name == name)

    # -- starting -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours = (self._directory / LOCK).exists()
        taken = [name for name in OWN if (self._directory / name).exists()]
        if taken and not ours:
            message = f"{self._directory} holds {taken[0]}, which no cluster made: choose another directory with --var"
            raise DirectoryRefused(message)
        lock = self._exit.enter_context(_locked(self._directory))
        for name in OWN:
            shutil.rmtree(self._directory / name, ignore_errors=True)
        for path in (self.file_path, self.login_path):
            path.unlink(missing_ok=True)
        data = self._directory / "data"
        data.mkdir(mode=0o700)
        self._run = self._exit.enter_context(runtime_directory(self._directory))
        self._nursery = self._exit.enter_context(Nursery(self._directory / "logs", hold=[lock]))
        self._nursery.remove_at_end(self._run)
        for path in (self.file_path, self.login_path):
            self._exit.callback(path.unlink, missing_ok=True)
            self._nursery.remove_at_end(path)
        made = Secrets.generate(self.topology)
        self._stage("link proxy", self._start_link)
        self._stage("servers, replicated over the links", lambda: self._start_servers(data))
        clients_file = _private_write(data / "clients.toml", _clients_toml(made))
        users_file = _private_write(data / "users.toml", _users_toml(made))
        self._stage("key services", lambda: self._start_keyservices(made, clients_file, data))
        self._stage("order and login services", lambda: self._start_services(made, users_file))
        if self.sentinels.regions:
            wait = partial(self.sentinels.wait_ready, self.sentinels.regions, READY_WITHIN_S)
            self._stage("Sentinels, agreed on the primary", wait)
        self.file = self._describe(made)
        credentials = {"username": made.user.username, "password": made.user.password}
        _private_write(self.login_path, msgspec.json.encode(credentials).decode())
        self.started = True
        self.file.write(self.file_path)  # the last thing: whoever sees it may use everything

    def _stage(self, what: str, start: Callable[[], None]) -> None:
        started = time.monotonic()
        start()
        self._progress(f"{what}: {time.monotonic() - started:.1f} s")

    def _socket(self, region: Region, service: str) -> Path:
        return self._run / f"{service}-{region.index}.sock"

    def _has(self, region: Region, service: str) -> bool:
        if service == "sentinel":
            return region in sentinel_regions(self.topology)
        return service != "login" or region == self.topology.primary

    def _start_link(self) -> None:
        regions = self.topology.regions
        control = self._run / "link.sock"
        config = LinkConfig(
            listeners=[
                Listener(r.address, self.topology.ports[service], r.name, str(self._socket(r, service)))
                for r in regions
                for service in SERVICES
                if self._has(r, service)
            ],
            regions={r.name: r.address_prefix for r in regions},
            links=[Lag(from_=a, to=b, one_way_ms=lag) for (a, b), lag in self.topology.links.items()],
            control=str(control),
        )
        path = self._directory / "data" / "link.json"
        path.write_bytes(config.to_json())
        child = self._nursery.spawn("link", [sys.executable, "-m", "regions.link", str(path)])
        child.wait_for_line("ready", READY_WITHIN_S)
        self.link = LinkControl(control)

    def _start_servers(self, data: Path) -> None:
        self.servers: dict[str, Server] = start_servers(
            self.topology,
            self._nursery,
            directory=data,
            socket_of=lambda region: self._socket(region, "redis"),
            timeout_s=READY_WITHIN_S,
        )
        self.sentinels = Sentinels(
            self.topology,
            self._nursery,
            data,
            lambda region: self._socket(region, "sentinel"),
            find_server(),
            self.servers[self.topology.primary.name].passwords["sentinel"],
        )
        for region in self.sentinels.regions:
            self.sentinels.start(region, self.topology.primary)

    def _start_service(self, region: Region, service: str, argv: list[str], env: dict[str, str]) -> Service:
        """Start a process of a region, and remember how: it is started again when the region returns."""
        name = f"{service}-{region.name}"
        self._services[name] = Service(region, service, argv, env, self._nursery.spawn(name, argv, env=env))
        return self._services[name]

    def _start_keyservices(self, made: Secrets, clients_file: Path, data: Path) -> None:
        children = []
        for region in self.topology.regions:
            env = {
                **_base_environment(),
                "KEYSERVICE_PROFILE": "demo",
                "KEYSERVICE_ISSUER": ISSUER,
                "KEYSERVICE_REGION": region.name,
                "KEYSERVICE_REGIONS": ",".join(r.name for r in self.topology.regions),
                "KEYSERVICE_BOOTSTRAP_REGION": self.topology.primary.name,
                "KEYSERVICE_REDIS_URL": self._url(region, "redis", "redis"),
                **self._primary_environment(region),
                "REDIS_USERNAME": "keyservice",
                "REDIS_PASSWORD": self.servers[region.name].passwords["keyservice"],
                "KEYSERVICE_KEK": made.kek[region.name],
                "KEYSERVICE_CLIENTS_FILE": str(clients_file.absolute()),
                "KEYSERVICE_KEEPER_DIR": str((data / f"keeper-{region.index}").absolute()),
                "KEYSERVICE_UDS": str(self._socket(region, "keyservice")),
                "KEYSERVICE_ADMIN_UDS": str(self._socket(region, "admin")),
                "KEYSERVICE_SOURCE_ADDRESS": region.address,
                "JWT_SECRET": made.hs256_secret,
            }
            argv = [sys.executable, "-m", "keyservice", "serve"]
            children.append(self._start_service(region, "keyservice", argv, env))
        self._wait_ready(children, epoch_open=True)

    def _start_services(self, made: Secrets, users_file: Path) -> None:
        examples = examples_directory()
        children = []
        for region in self.topology.regions:
            env = self._verifier_environment(region, made)
            argv = [sys.executable, str(examples / "orders_service.py"), "--uds", str(self._socket(region, "orders"))]
            children.append(self._start_service(region, "orders", argv, env))
        home = self.topology.primary
        env = self._verifier_environment(home, made) | {
            "LOGIN_USERS_FILE": str(users_file.absolute()),
            "LOGIN_KEYSERVICE_URL": self._url(home, "keyservice"),
            "LOGIN_ADMIN_URL": self._url(home, "admin"),
            "LOGIN_CLIENT_ID": "login",
            "LOGIN_CLIENT_SECRET": made.clients["login"].client_secret,
            "LOGIN_AUDIENCE": AUDIENCE,
            "LOGIN_SOURCE_ADDRESS": home.address,
        }
        argv = [sys.executable, str(examples / "login_service.py"), "--uds", str(self._socket(home, "login"))]
        children.append(self._start_service(home, "login", argv, env))
        self._wait_ready(children)

    def _primary_environment(self, region: Region) -> dict[str, str]:
        """How a key service finds the primary."""
        if not self.sentinels.regions:
            return {"KEYSERVICE_PRIMARY_URL": self._url(self.topology.primary, "redis", "redis")}
        return {
            "KEYSERVICE_PRIMARY_URL": self._sentinel_url(region),
            "KEYSERVICE_SENTINEL_USERNAME": "watcher",
            "KEYSERVICE_SENTINEL_PASSWORD": self.sentinels.credentials.watcher,
        }

    def _verifier_environment(self, region: Region, made: Secrets) -> dict[str, str]:
        others = [r for r in self.topology.regions if r != region]
        return {
            **_base_environment(),
            "VERIFIER_ISSUER": ISSUER,
            "VERIFIER_AUDIENCE": AUDIENCE,
            "VERIFIER_REGION": region.name,
            "VERIFIER_JWKS_URLS": ",".join(
                f"{self._url(r, 'keyservice')}/.well-known/jwks.json" for r in (region, *others)
            ),
            "REDIS_ADDR": f"{region.address}:{self.topology.ports['redis']}",
            "REDIS_USERNAME": "verifier",
            "REDIS_PASSWORD": self.servers[region.name].passwords["verifier"],
            "VERIFIER_SOURCE_ADDRESS": region.address,
            "JWT_SECRET": made.hs256_secret,
        }

    def _wait_ready(self, services: Sequence[Service], *, epoch_open: bool = False) -> None:
        """Ask every service's /readyz, as a caller in its own region, until it says 200; and that the epoch is open."""
        deadline = time.monotonic() + READY_WITHIN_S
        for service in services:
            child = service.child
            transport = httpx.HTTPTransport(local_address=service.region.address)
            page = "livez" if service.kind == "login" else "readyz"
            url = f"{self._url(service.region, service.kind)}/{page}"
            with httpx.Client(transport=transport, trust_env=False, timeout=2.0) as http:
                while (problem := _not_ready(http, url, epoch_open)) is not None:
                    self._nursery.check()
                    if time.monotonic() > deadline:
                        tail = "".join(f"\n  {line}" for line in child.log_tail())
                        raise NotReady(f"{child.name} is not ready after {READY_WITHIN_S:.0f} s ({problem}){tail}")
                    time.sleep(0.05)

    # -- describing -----------------------------------------------------------------------------------------------

    def _url(self, region: Region, service: str, scheme: str = "http", user: str | None = None) -> str:
        credentials = "" if user is None else f"{user}:{self.servers[region.name].passwords[user]}@"
        return f"{scheme}://{credentials}{region.address}:{self.topology.ports[service]}"

    def _sentinel_url(self, region: Region, user: str = "", *, alone: bool = False) -> str:
        """Every Sentinel, the region's own first, or that one `alone`; empty where there is none."""
        port = self.topology.ports["sentinel"]
        others = [] if alone else [other for other in self.sentinels.regions if other != region]
        places = ",".join(f"{r.address}:{port}" for r in (region, *others))
        password = getattr(self.sentinels.credentials, user) if user else ""
        credentials = f"{user}:{password}@" if user else ""
        return f"redis+sentinel://{credentials}{places}/{GROUP}" if self.sentinels.regions else ""

    def _describe(self, made: Secrets) -> ClusterFile:
        home = self.topology.primary
        return ClusterFile(
            format=1,
            issuer=ISSUER,
            audience=AUDIENCE,
            primary=home.name,
            topology=self.topology.name,
            link_control=str(self._run / "link.sock"),
            regions={
                region.name: RegionUrls(
                    keyservice_url=self._url(region, "keyservice"),
                    admin_url=self._url(region, "admin"),
                    redis_url=self._url(region, "redis", "redis", "keyservice"),
                    verifier_redis_url=self._url(region, "redis", "redis", "verifier"),
                    observer_redis_url=self._url(region, "redis", "redis", "observer"),
                    orders_url=self._url(region, "orders"),
                    login_url=self._url(home, "login"),
                    bind_address=region.address,
                    sentinel_url=self._sentinel_url(region, "watcher"),
                    operator_sentinel_url=self._sentinel_url(region, "operator", alone=True),
                    operator_redis_url=self._url(region, "redis", "redis", "operator"),
                )
                for region in self.topology.regions
            },
            clients=dict(made.clients),
            demo_user=made.user,
            hs256_secret=made.hs256_secret,
        )


def _base_environment() -> dict[str, str]:
    """What a child needs of ours; settings of the caller's own services must not leak into the cluster's."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONUNBUFFERED": "1"}


def _not_ready(http: httpx.Client, url: str, epoch_open: bool) -> str | None:
    try:
        reply = http.get(url)
    except httpx.HTTPError as error:
        return type(error).__name__
    closed = epoch_open and "epoch_closed" in reply.text
    return None if reply.status_code == 200 and not closed else f"HTTP {reply.status_code} {reply.text[:200]}"
