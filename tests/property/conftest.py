"""Property tests share their keys."""

from __future__ import annotations

import pytest

from verifier.testing import SigningKey, make_key


@pytest.fixture(scope="session")
def key() -> SigningKey:
    return make_key()
