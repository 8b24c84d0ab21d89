"""A verifier that was started before the fork: under gunicorn --preload, and in a parent full of threads.

Every child reads the log and the keys by itself, enforces what is revoked afterwards, ends cleanly, and has nothing to
do with the parent's thread and sockets.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.verifier.http_server import JwksServer
from tests.verifier.support import AUDIENCE, ISSUER, live_token, until
from tests.verifier.valkey import Primary, Server, live, running
from verifier.testing import SigningKey

ROOT = Path(__file__).parents[2]
WORKERS = 3
WITHIN_S = 60.0

_forks = pytest.mark.skipif(
    not (hasattr(os, "fork") and Path("/proc/self/fd").exists()), reason="needs fork, and /proc to see sockets"
)
pytestmark = [pytest.mark.slow, _forks]

APPLICATION = """
import json, os, threading, time
from verifier import Verifier
from verifier.errors import VerifierError

verifier = Verifier.from_env().start()  # in the parent, which goes on to fork
PARENT = os.getpid()


def links(pid):
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            pass
    return {link for link in found.values() if link.startswith("socket:")}


def verdict(token):
    try:
        return verifier.verify(token).subject
    except VerifierError as error:
        return error.code


def app(environ, start_response):
    start_response("200 OK", [("content-type", "application/json")])
    time.sleep(0.05)  # busy, so that what is asked at the same time goes to the others
    token = environ["HTTP_AUTHORIZATION"].partition(" ")[2]
    status = verifier.status()
    line = verifier._mirror._line._socket
    told = {
        "pid": os.getpid(), "verdict": verdict(token), "connection": status.connection, "ready": status.ready,
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("verifier")),
        "shared": line is not None and os.readlink(f"/proc/self/fd/{line.fileno()}") in links(PARENT),
    }
    return [json.dumps(told).encode()]
"""


@pytest.fixture
def redis_server(run_dir: Path) -> Iterator[Server]:
    place = run_dir / "redis"
    place.mkdir()
    with running(place) as server:
        yield server


@pytest.fixture
def keys(key: SigningKey) -> Iterator[JwksServer]:
    keys = JwksServer(key)
    yield keys
    keys.close()


def environment(keys: JwksServer, server: Server) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VERIFIER_ISSUER": ISSUER,
        "VERIFIER_AUDIENCE": AUDIENCE,
        "VERIFIER_JWKS_URLS": keys.url,
        "VERIFIER_REDIS_URL": server.url,
    }


@pytest.fixture
def gunicorn(run_dir: Path, redis_server: Server, keys: JwksServer) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    (run_dir / "program.py").write_text(APPLICATION)
    listener = socket.create_server(("127.0.0.1", 0))
    descriptor = listener.fileno()
    argv = [sys.executable, "-W", "ignore", "-m", "gunicorn", "--preload", "--workers", str(WORKERS)]
    argv += ["--no-control-socket", "--bind", f"fd://{descriptor}", "--chdir", str(run_dir), "program:app"]
    env = {**environment(keys, redis_server), "GUNICORN_FD": str(descriptor)}
    with (run_dir / "errors").open("wb") as errors:
        process = subprocess.Popen(argv, env=env, pass_fds=[descriptor], stderr=errors)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    listener.close()
    try:
        yield process, url
    finally:
        process.kill()
        process.wait(WITHIN_S)


def ask(url: str, token: str) -> dict[str, Any]:
    try:
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}", "Connection": "close"}, timeout=WITHIN_S)
    except httpx.TransportError:
        return {}
    told: dict[str, Any] = json.loads(answer.text)
    return told


def until_all(url: str, token: str, right: Callable[[dict[str, Any]], bool], what: str) -> list[dict[str, Any]]:
    """Ask many times at once, until every worker's last answer is right; gives those."""
    last: dict[int, dict[str, Any]] = {}
    with ThreadPoolExecutor(2 * WORKERS) as crowd:

        def asked() -> bool:
            for told in crowd.map(lambda _: ask(url, token), range(2 * WORKERS)):
                if told:
                    last[told["pid"]] = told
            return len(last) == WORKERS and all(right(one) for one in last.values())

        until(asked, what, WITHIN_S)
    return list(last.values())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_preforked_worker_reads_enforces_and_ends_cleanly(
    gunicorn: tuple[subprocess.Popen[bytes], str], redis_server: Server, key: SigningKey, run_dir: Path
) -> None:
    process, url = gunicorn
    good, bad = live_token(key, jti="good"), live_token(key, jti="bad")
    with redis_server.client() as client:
        log = Primary(client)
        told = until_all(url, good, lambda one: bool(one["ready"]) and one["verdict"] == "ada", "every worker verifies")
        for one in told:
            assert one["connection"] == "tailing"
            assert one["threads"] == ["verifier-jwks", "verifier-replica"]
            assert not one["shared"]
            assert one["pid"] != process.pid
        log.append(*live("jti", ["bad"]))
        until_all(url, bad, lambda one: bool(one["verdict"] == "token_revoked"), "every worker refuses it")
        assert {one["verdict"] for one in until_all(url, good, lambda _: True, "all")} == {"ada"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN_S) == 0
    until(lambda: all(gone(one["pid"]) for one in told), "no worker is left")
    assert "Traceback" not in (run_dir / "errors").read_text()


CROWDED = """
import json, os, sys, threading, time, warnings

warnings.simplefilter("ignore")  # Python 3.12 and later warn about a fork beside threads
from verifier import Verifier
from verifier.errors import VerifierError

good, bad = sys.argv[1:]


def verdict(token):
    try:
        return verifier.verify(token).subject
    except VerifierError as error:
        return error.code


def sockets():
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass


def busy():
    while not stop.is_set():
        verdict(good), verdict(bad), verifier.status()


verifier = Verifier.from_env().start()
stop = threading.Event()
crowd = [threading.Thread(target=busy) for _ in range(24)]
for thread in crowd:
    thread.start()
assert verifier.wait_ready(60)
children = []
for _ in range(6):
    time.sleep(0.02)
    parents = os.readlink(f"/proc/self/fd/{verifier._mirror._line._socket.fileno()}")
    assert parents in sockets()
    child = os.fork()
    if not child:
        right = parents not in sockets() and verdict(good) in ("never_synced", "keys_unavailable", "ada")
        ready = verifier.wait_ready(60)
        told = (verdict(good), verdict(bad))
        verifier.close()
        left = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
        os._exit(0 if right and ready and told == ("ada", "token_revoked") and not left else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
told = (verdict(good), verdict(bad))
stop.set()
for thread in crowd:
    thread.join()
lost = verifier.status().counters.get("disconnects", 0)
verifier.close()
print(json.dumps({"children": codes, "parent": told, "lost": lost}))
"""


def test_children_of_a_parent_full_of_busy_threads_work_and_disturb_it_not(
    redis_server: Server, keys: JwksServer, key: SigningKey
) -> None:
    good, bad = live_token(key, jti="good"), live_token(key, jti="bad")
    with redis_server.client() as client:
        Primary(client).append(*live("jti", ["bad"]))
    command = [sys.executable, "-c", CROWDED, good, bad]
    told = subprocess.run(
        command, env=environment(keys, redis_server), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == {"children": [0] * 6, "parent": ["ada", "token_revoked"], "lost": 0}
