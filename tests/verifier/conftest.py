"""Keys are slow to make: each test process makes each of them once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from verifier.testing import SigningKey, make_key


@pytest.fixture(scope="session")
def key() -> SigningKey:
    return make_key()


@pytest.fixture(scope="session")
def other_key() -> SigningKey:
    return make_key()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A private directory whose path leaves room for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)
