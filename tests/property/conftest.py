"""Property tests share their keys, and look for the same examples in every run of one commit."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from verifier.testing import SigningKey, make_key

settings.register_profile(
    "project",
    deadline=None,  # two shared cores: time says nothing
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def key() -> SigningKey:
    return make_key()
