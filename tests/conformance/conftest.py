"""``make conformance REDIS=redis://…`` checks a server; without one the embedded server is started and checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conformance.scenarios import Bench
from tests.conformance.target import Names, OwnServer, Target, by_url, own_server

URL = os.environ.get("CONFORMANCE_REDIS", "")
USER_URLS = {
    name: url for name in ("verifier", "keyservice") if (url := os.environ.get(f"CONFORMANCE_{name.upper()}_REDIS", ""))
}


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """Short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="cf-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def own(directory: Path) -> Iterator[OwnServer | None]:
    if URL:
        yield None
    else:
        with own_server(directory, "primary") as server:
            yield server


@pytest.fixture(scope="session")
def target(own: OwnServer | None) -> Iterator[Target]:
    if own is None:
        try:
            made = by_url(URL, USER_URLS)
        except (redis.RedisError, OSError, ValueError) as error:  # without its message, which may hold the URL
            pytest.exit(f"the server at REDIS cannot be asked for INFO: {type(error).__name__}", returncode=4)
    else:
        made = own.target()
    yield made
    made.close()


@pytest.fixture
def names(target: Target) -> Iterator[Names]:
    made = Names()
    yield made
    with target.client() as client:
        for key in made.given:
            client.unlink(key)


@pytest.fixture
def bench(target: Target, names: Names) -> Iterator[Bench]:
    """An empty trust log, written as the key service's user where there is one."""
    if target.info["role"] != "master":
        target.not_checked("needs a primary")
    with target.writer() as client:
        yield Bench(client, names)


def pytest_report_header() -> str:
    return f"conformance: {'the server at REDIS' if URL else 'a server of its own'}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which checks were not made, by name and reason."""
    skipped = [
        report for report in terminalreporter.stats.get("skipped", ()) if "not checked: " in str(report.longrepr)
    ]
    for report in skipped:
        reason = str(report.longrepr[2]).partition("not checked: ")[2]
        terminalreporter.write_line(f"not checked: {report.nodeid.partition('::')[2]}: {reason}")
