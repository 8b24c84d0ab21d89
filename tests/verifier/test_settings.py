"""A setting that is missing or wrong is named; nothing is guessed."""

from __future__ import annotations

import inspect
import time
from typing import Any

import pytest

from tests.verifier.support import AUDIENCE, ISSUER, SECRET, Source, live_token, make_verifier
from verifier import ConfigurationError, Verifier
from verifier.freshness import Freshness
from verifier.mirroring import View
from verifier.revocations import Snapshot
from verifier.settings import _READERS, environment_settings
from verifier.testing import SigningKey

ENV = {
    "VERIFIER_ISSUER": ISSUER,
    "VERIFIER_AUDIENCE": AUDIENCE,
    "VERIFIER_JWKS_URLS": "none",
    "VERIFIER_REDIS_URL": "none",
}


def misuse(**settings: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        make_verifier(**{"hs256_secrets": [SECRET], **settings})
    return caught.value


NAMED: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_urls": None, "hs256_secrets": [SECRET]}


@pytest.mark.parametrize("missing", ["issuer", "audience", "jwks_urls"])
def test_what_must_be_named_is_asked_for_by_name(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=missing) as caught:
        Verifier(redis_url=None, **{name: value for name, value in NAMED.items() if name != missing})
    assert (caught.value.code, caught.value.setting) == ("setting_missing", missing)


def test_the_source_of_revocations_must_be_named() -> None:
    with pytest.raises(TypeError, match="redis_url"):
        Verifier(**NAMED)


SECONDS = [
    "max_staleness_s", "leeway_s", "token_cache_ttl_s", "keys_max_age_s", "min_position_wait_s",
    "max_token_lifetime_s", "max_skew_s", "drop_grace_s", "hs256_until",
]  # fmt: skip


@pytest.mark.parametrize("setting", SECONDS)
@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), "5", True, [5]])
def test_a_time_is_a_finite_number_of_seconds_that_is_not_negative(setting: str, value: Any) -> None:
    error = misuse(**{setting: value})
    assert (error.code, error.setting) == ("setting_invalid", setting)
    assert setting in str(error)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"on_stale": "open"}, "on_stale"),
        ({"on_stale": None}, "on_stale"),
        ({"on_unsynced": "open"}, "on_unsynced"),
        ({"on_unsynced": True}, "on_unsynced"),
        ({"issuer": ""}, "issuer"),
        ({"audience": ""}, "audience"),
        ({"audience": []}, "audience"),
        ({"audience": ["orders", ""]}, "audience"),
        ({"algorithms": []}, "algorithms"),
        ({"algorithms": ["none"]}, "algorithms"),
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": ["RS256", "HS256"]}, "algorithms"),
        ({"algorithms": "RS256"}, "algorithms"),
        ({"token_cache_size": -1}, "token_cache_size"),
        ({"jwks": {"keys": []}}, "jwks"),
        ({"jwks": b"not JSON"}, "jwks"),
        ({"jwks_urls": "https://id.test/jwks"}, "jwks_urls"),
        ({"jwks_urls": ["ftp://id.test/jwks"]}, "jwks_urls"),
        ({"jwks_urls": ["id.test/jwks"]}, "jwks_urls"),
        ({"jwks_urls": [""]}, "jwks_urls"),
        ({"jwks_urls": ["https://"]}, "jwks_urls"),
        ({"jwks_urls": ["https://user:pw@id.test/"]}, "jwks_urls"),
        ({"jwks_urls": ["http://[::1"]}, "jwks_urls"),
        ({"jwks_urls": ["http://127.0.0.1:99999/"]}, "jwks_urls"),
        ({"jwks_urls": ["http://127.0.0.1:x/"]}, "jwks_urls"),
        ({"redis_url": []}, "redis_url"),
        ({"redis_url": "localhost:6379"}, "redis_url"),
        ({"redis_url": "http://localhost"}, "redis_url"),
        ({"redis_url": "redis://localhost:port"}, "redis_url"),
        ({"redis_url": ["redis://127.0.0.1:1", "nonsense"]}, "redis_url"),
    ],
)
def test_an_impossible_value_is_named(settings: dict[str, Any], setting: str) -> None:
    assert misuse(**settings).setting == setting


def test_a_verifier_without_any_source_of_keys_is_refused() -> None:
    error = misuse(hs256_secrets=[])
    assert (error.code, error.setting) == ("setting_missing", "jwks_urls")


# -- plain HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["id.test", "10.0.0.1", "169.254.169.254", "localhost.evil.test", "[fe80::1]", "0.0.0.0"]
)
def test_plain_http_off_loopback_is_refused_unless_said_aloud(host: str) -> None:
    error = misuse(jwks_urls=[f"http://{host}/jwks"])
    assert (error.code, error.setting) == ("insecure_url", "jwks_urls")
    make_verifier(jwks_urls=[f"http://{host}/jwks"], allow_insecure_http=True)
    make_verifier(jwks_urls=[f"https://{host}/jwks"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.2.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080"])
def test_plain_http_on_loopback_is_allowed(host: str) -> None:
    make_verifier(jwks_urls=[f"http://{host}/jwks"])


# -- inequalities ----------------------------------------------------------------------------------------------------


def test_the_leeway_covers_the_skew_and_a_second_and_no_less() -> None:
    make_verifier(hs256_secrets=[SECRET], leeway_s=6, max_skew_s=5)
    error = misuse(leeway_s=5.9, max_skew_s=5)
    assert error.setting == "leeway_s"
    assert "max_skew_s" in str(error)


def test_the_drop_grace_covers_leeway_and_skew_and_no_less() -> None:
    make_verifier(hs256_secrets=[SECRET], leeway_s=30, max_skew_s=5, drop_grace_s=35)
    error = misuse(leeway_s=30, max_skew_s=5, drop_grace_s=34.9)
    assert error.setting == "drop_grace_s"
    assert {"leeway_s", "max_skew_s"} <= set(str(error).replace(",", " ").split())


# -- before start ----------------------------------------------------------------------------------------------------


def test_verify_before_start_is_misuse_where_something_has_to_be_started(key: SigningKey) -> None:
    verifier = make_verifier(key, redis_url=Source(View(Snapshot(), Freshness(5.0))))
    with pytest.raises(ConfigurationError) as caught:
        verifier.verify("any")
    assert caught.value.code == "not_started"
    assert not verifier.status().ready


def test_a_verifier_with_nothing_to_start_needs_no_start(key: SigningKey) -> None:
    assert make_verifier(key, clock=time).verify(live_token(key))


# -- the environment -------------------------------------------------------------------------------------------------


def test_from_env_builds_a_verifier() -> None:
    verifier = Verifier.from_env({**ENV, "JWT_SECRET": SECRET, "VERIFIER_REGION": "eu-west-1", "PATH": "/bin"})
    assert verifier.region == "eu-west-1"
    assert verifier.verify(live_token(SECRET))["sub"] == "ada"


def test_from_env_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENV, "JWT_SECRET": SECRET}.items():
        monkeypatch.setenv(name, value)
    assert Verifier.from_env().verify(live_token(SECRET))


def test_a_secret_that_is_not_utf8_in_the_environment_is_taken_byte_for_byte() -> None:
    raw = b"\xff\xfe" * 20
    verifier = Verifier.from_env({**ENV, "JWT_SECRET": raw.decode("utf-8", "surrogateescape")})
    assert verifier.verify(live_token(raw))


def test_the_well_known_names_are_read() -> None:
    found = environment_settings(
        {**ENV, "REDIS_ADDR": "r:1", "REDIS_USERNAME": "u", "REDIS_PASSWORD": "p", "JWT_SECRET": SECRET}
    )
    assert (found["redis_username"], found["redis_password"], found["hs256_secrets"]) == ("u", "p", [SECRET])
    without = {name: value for name, value in ENV.items() if name != "VERIFIER_REDIS_URL"}
    assert environment_settings({**without, "REDIS_ADDR": "cache:6379"})["redis_url"] == ["redis://cache:6379"]


def test_what_is_said_about_the_verifier_wins_over_the_well_known_name() -> None:
    found = environment_settings({**ENV, "REDIS_ADDR": "cache:6379", "VERIFIER_REDIS_URL": "redis://a, redis://b"})
    assert found["redis_url"] == ["redis://a", "redis://b"]


@pytest.mark.parametrize("missing", sorted(ENV))
def test_a_missing_variable_is_named(missing: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Verifier.from_env({name: value for name, value in ENV.items() if name != missing})
    assert caught.value.code == "setting_missing"
    assert missing in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VERIFIER_MAX_STALENESS_S", "soon"),
        ("VERIFIER_MAX_STALENESS_S", ""),
        ("VERIFIER_MAX_STALENESS_S", "nan"),
        ("VERIFIER_TOKEN_CACHE_SIZE", "1e3"),
        ("VERIFIER_REQUIRE_IAT", "maybe"),
        ("VERIFIER_ALLOW_INSECURE_HTTP", "yes please"),
        ("VERIFIER_ON_STALE", "open"),
        ("VERIFIER_LEEWAY_S", "-1"),
        ("VERIFIER_MAX_STALENESS", "5"),
        ("VERIFIER_", "5"),
        ("VERIFIER_CLOCK", "x"),
        ("REDIS_ADDR", "redis://cache:6379"),
        ("REDIS_ADDR", "user:pw@cache:6379"),
    ],
)
def test_a_variable_that_is_misspelt_or_unreadable_is_no_default(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Verifier.from_env({**ENV, "JWT_SECRET": SECRET, variable: value})
    assert caught.value.code == "setting_invalid"
    name = variable.removeprefix("VERIFIER_")
    assert name in str(caught.value) or name.lower() in str(caught.value)
    assert not value or len(value) < 6 or value not in str(caught.value)


def test_every_parameter_can_be_set_from_the_environment_or_is_named_here() -> None:
    parameters = set(inspect.signature(Verifier).parameters)
    assert set(_READERS) <= parameters
    assert parameters - set(_READERS) == {"hs256_secrets", "jwks", "clock", "issuers", "observer"}


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_flags_are_words(text: str, value: bool) -> None:
    assert environment_settings({**ENV, "VERIFIER_REQUIRE_IAT": text})["require_iat"] is value


def test_none_said_aloud_skips_a_setting_in_the_environment() -> None:
    found = environment_settings({**ENV, "VERIFIER_ISSUER": "None", "VERIFIER_AUDIENCE": "NONE"})
    assert [found[name] for name in ("issuer", "audience", "jwks_urls", "redis_url")] == [None] * 4


# -- the feed --------------------------------------------------------------------------------------------------------

FEED = {"redis_url": None, "feed_url": "https://id.test/revocations/feed"}
CLIENT = {"feed_client_id": "orders", "feed_client_secret": "s3cret-of-orders"}


@pytest.mark.parametrize("credentials", [CLIENT, {"feed_token": "t"}, {"feed_token": lambda: "t"}])
@pytest.mark.parametrize("url", ["https://id.test/feed", ["https://a.test/", "https://b.test/"], "http://127.0.0.1:1/"])
def test_a_feed_takes_the_place_of_redis(key: SigningKey, credentials: dict[str, Any], url: Any) -> None:
    verifier = make_verifier(key, redis_url=None, feed_url=url, **credentials)
    assert (verifier.status().connection, verifier.status().reason) == ("connecting", "never_synced")
    assert "s3cret-of-orders" not in repr(verifier)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({**FEED, **CLIENT, "redis_url": "redis://cache"}, "feed_url"),
        ({"redis_url": "redis://cache", "feed_token": "t"}, "feed_url"),
        ({"redis_url": None, **CLIENT}, "feed_url"),
        ({**FEED, **CLIENT, "feed_url": []}, "feed_url"),
        ({**FEED, **CLIENT, "feed_url": "id.test/feed"}, "feed_url"),
        ({**FEED, **CLIENT, "feed_url": "https://user:pw@id.test/feed"}, "feed_url"),
        ({**FEED, **CLIENT, "feed_url": "http://id.test/feed"}, "feed_url"),
        ({**FEED, **CLIENT, "feed_token_url": "http://id.test/oauth2/token"}, "feed_token_url"),
        (FEED, "feed_token"),
        ({**FEED, **CLIENT, "feed_token": "t"}, "feed_token"),
        ({**FEED, "feed_client_id": "orders"}, "feed_client_secret"),
        ({**FEED, "feed_client_secret": "s3cret-of-orders"}, "feed_client_secret"),
        ({**FEED, "feed_token": "t", "feed_token_url": "https://id.test/"}, "feed_token_url"),
    ],
)
def test_settings_of_a_feed_that_do_not_fit_are_named(settings: dict[str, Any], setting: str) -> None:
    error = misuse(**settings)
    assert error.setting == setting
    assert "s3cret-of-orders" not in str(error)


def test_a_feed_over_plain_http_off_loopback_is_said_aloud(key: SigningKey) -> None:
    settings = {**FEED, **CLIENT, "feed_url": "http://id.test/feed"}
    assert misuse(**settings).code == "insecure_url"
    verifier = make_verifier(key, **settings, allow_insecure_http=True)
    assert verifier.status().connection == "connecting"


def test_a_feed_from_the_environment_leaves_the_services_own_redis_alone() -> None:
    env = {name: value for name, value in ENV.items() if name != "VERIFIER_REDIS_URL"}
    env |= {"REDIS_ADDR": "cache:6379", "REDIS_PASSWORD": "p", "VERIFIER_FEED_URL": "https://a.test/, https://b.test/"}
    env |= {"VERIFIER_FEED_CLIENT_ID": "orders", "VERIFIER_FEED_CLIENT_SECRET": "s3cret-of-orders"}
    found = environment_settings(env)
    assert (found["redis_url"], found["feed_url"]) == (None, ["https://a.test/", "https://b.test/"])
    assert "redis_password" not in found
    assert Verifier.from_env({**env, "JWT_SECRET": SECRET}).status().connection == "connecting"
    with pytest.raises(ConfigurationError):
        Verifier.from_env({**env, "JWT_SECRET": SECRET, "VERIFIER_REDIS_URL": "redis://cache"})
