"""A child process of a started verifier believes nothing before it has read it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.http_server import JwksServer
from tests.verifier.support import AUDIENCE, ISSUER, live_token
from tests.verifier.valkey import Primary, live, running
from verifier.testing import SigningKey

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_over_never_synced_and_then_works(key: SigningKey, run_dir: Path) -> None:
    tokens = {"good": live_token(key), "revoked": live_token(key, jti="revoked")}
    jwks = JwksServer(key)
    try:
        with running(run_dir) as server:
            with server.client() as client:
                Primary(client).append(*live("jti", ["revoked"]))
            settings = {
                "issuer": ISSUER,
                "audience": AUDIENCE,
                "jwks_urls": [jwks.url],
                "redis_url": server.url,
                "tokens": tokens,
            }
            command = [sys.executable, "-m", "tests.verifier.fork_program", json.dumps(settings)]
            with subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                stdin, stdout = process.stdin, process.stdout

                def hear() -> dict[str, Any]:
                    heard: dict[str, Any] = json.loads(stdout.readline())
                    return heard

                def go_on() -> None:
                    stdin.write("\n")
                    stdin.flush()

                try:
                    assert hear() == {"ready": True, "good": "ada", "revoked": "token_revoked"}
                    server.stop()
                    go_on()
                    assert hear() == {"cached": 0, "staleness_s": None, "good": "never_synced"}
                    server.start()
                    go_on()
                    child, parent = hear(), hear()
                    assert child == {"ready": True, "good": "ada", "revoked": "token_revoked"}
                    assert parent == {"good": "ada", "revoked": "token_revoked"}
                    assert process.wait(60) == 0
                finally:
                    process.kill()
    finally:
        jwks.close()


FORKING = """
import os, sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("httpx", "httpcore"):
            time.sleep(0.005)

sys.meta_path.insert(0, Slow())
from verifier.feed import FeedMirror
from verifier.feed_tokens import GivenToken
from verifier.jwks_client import JwksClient

part = {part}
part.start()
child = os.fork()
if child == 0:
    import httpcore, httpx
    os._exit(0 if hasattr(httpx, "HTTPTransport") and hasattr(httpcore, "ConnectionPool") else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
part.close()
sys.exit(status)
"""
PARTS = ["JwksClient(['http://127.0.0.1:1/'])", "FeedMirror(['http://127.0.0.1:1/'], GivenToken('x'))"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("part", PARTS)
def test_a_fork_at_once_leaves_no_import_half_done(part: str) -> None:
    """As under gunicorn --preload. The import is made to last, so that the fork would fall into it."""
    command = [sys.executable, "-c", FORKING.format(part=part)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
