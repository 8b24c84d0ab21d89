"""Settings of any kind are checked: whatever is wrong with one is a ConfigurationError that names it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.verifier.support import code_of, make_verifier, token_of
from verifier import ConfigurationError
from verifier.testing import SigningKey

WRONG: dict[str, list[Any]] = {
    "issuer": [5, ["https://id.test"], b"https://id.test", True],
    "audience": [5, True, b"orders", [5], [None], object()],
    "jwks_urls": [5, [5], [None], b"https://id.test/", True],
    "redis_url": [5, [5], [None], b"redis://localhost", True],
    "feed_url": [5, [5], b"https://id.test/", True],
    "hs256_secrets": [5, True, object()],
    "algorithms": [5, True, "RS256", [["RS256"]]],
    "token_cache_size": ["", None, [], b"5", 1.5],
    **{
        name: [10**400, "", None, [], float("nan"), float("inf"), -1, True]
        for name in ("max_staleness_s", "leeway_s", "keys_max_age_s", "min_position_wait_s", "max_token_lifetime_s",
                     "max_skew_s", "drop_grace_s")
    },
    "hs256_until": [10**400, "", [], float("nan")],
    "token_cache_ttl_s": [10**400, "", [], float("nan")],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_of_the_wrong_kind_is_a_configuration_error_that_names_it(key: SigningKey, name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ConfigurationError) as caught:
            make_verifier(key, **{name: value})
        assert caught.value.setting == name, value


class Text(str):
    """Not exactly a string, but equal to one."""


def test_what_only_equals_a_cached_token_is_refused_as_when_it_is_not_cached(key: SigningKey) -> None:
    verifier = make_verifier(key)
    token = token_of(key)
    assert code_of(verifier, Text(token)) == "token_malformed"
    verifier.verify(token)
    assert code_of(verifier, Text(token)) == "token_malformed"
