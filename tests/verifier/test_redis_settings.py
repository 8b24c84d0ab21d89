"""Settings of the connection to Redis: what a URL may say, the files for TLS, and the warning about plain text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.support import SECRET, make_verifier
from tests.verifier.tls_lab import Authority, authority, stranger
from verifier import ConfigurationError
from verifier.redis_connecting import URL_OPTIONS, warn_if_plain
from verifier.redis_tls import PROBLEMS, RedisTls
from verifier.replica import ReplicaMirror

__all__ = ["authority", "stranger"]

PASSWORD = "swordfish-and-chips"


@pytest.fixture(autouse=True)
def nothing_warned_of_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.redis_connecting._warned", set())


def misuse(url: str, **files: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        ReplicaMirror(url, tls=RedisTls(**files))
    assert PASSWORD not in str(caught.value)
    return caught.value


# -- the URL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "ssl_cert_reqs=none", "ssl_check_hostname=false", "ssl_ca_certs=/other", "socket_timeout=900",
        "socket_connect_timeout=900", "retry_on_timeout=true", "health_check_interval=1", "db=0&ssl_cert_reqs=none",
        "ssl_min_version=768", "nonsense=1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_url_switches_no_check_off_and_moves_no_bound(scheme: str, option: str) -> None:
    error = misuse(f"{scheme}://:{PASSWORD}@127.0.0.1:1/?{option}")
    assert (error.code, error.setting) == ("setting_invalid", "redis_url")
    assert "redis_tls_ca" in str(error)


def test_a_url_may_say_which_data_and_who() -> None:
    assert {"db", "username", "password", "client_name"} <= URL_OPTIONS
    ReplicaMirror("unix:///run/redis.sock?db=1&username=me&password=pw&client_name=orders")


# -- the files for TLS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["rediss", "rediss+sentinel"])
def test_files_that_can_be_used_are_taken(scheme: str, authority: Authority) -> None:
    cert, key = authority.issue("one").names
    place = "127.0.0.1:1/trust" if "sentinel" in scheme else "127.0.0.1:1"
    ReplicaMirror(f"{scheme}://{place}", tls=RedisTls(authority.file, cert, key))
    both = Path(cert).with_name("both.pem")
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    ReplicaMirror(f"{scheme}://{place}", tls=RedisTls(cert=str(both)))


@pytest.mark.parametrize(
    "wrong", [{"ca": "/nowhere"}, {"ca": ""}, {"ca": "{key}"}, {"ca": 5}, {"cert": ""}, {"cert": "/nowhere"},
              {"cert": "{cert}"}, {"cert": "{cert}", "key": "{ca_key}"}, {"cert": "{cert}", "key": "/nowhere"},
              {"key": "{key}"}]
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_at_once(wrong: dict[str, Any], authority: Authority) -> None:
    cert, key = authority.issue("one").names
    names = {"cert": cert, "key": key, "ca_key": str(authority.pair.key)}
    files = {name: path.format(**names) if isinstance(path, str) else path for name, path in wrong.items()}
    error = misuse("rediss://127.0.0.1:1", **files)
    assert error.code == "setting_invalid"
    assert error.setting == f"redis_tls_{'key' if wrong == {'key': '{key}'} else next(iter(wrong))}"


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/g", "unix:///run/redis.sock"])
def test_files_for_tls_without_tls_are_refused_rather_than_ignored(name: str, url: str, authority: Authority) -> None:
    error = misuse(url, **{name: authority.file})
    assert error.setting == f"redis_tls_{name}"
    assert "rediss" in str(error)


def test_the_verifier_passes_them_on() -> None:
    for name in ("redis_tls_ca", "redis_tls_cert"):
        with pytest.raises(ConfigurationError, match=name):
            make_verifier(hs256_secrets=[SECRET], redis_url="rediss://127.0.0.1:1", **{name: "/nowhere"})
    with pytest.raises(ConfigurationError, match="redis_breaker_failures"):
        make_verifier(hs256_secrets=[SECRET], redis_url="redis://127.0.0.1:1", redis_breaker_failures=0)


def test_host_name_and_certificate_are_verified_and_old_protocols_refused(authority: Authority) -> None:
    import ssl

    for tls in (RedisTls(), RedisTls(authority.file)):
        context = tls.context()
        assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert len(RedisTls(authority.file).context().get_ca_certs()) == 1  # and none of the system's


# -- credentials in plain text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "password", "place"),
    [
        (f"redis://:{PASSWORD}@cache.test:6380/0", None, "cache.test:6380"),
        (f"redis://me:{PASSWORD}@10.0.0.1", None, "10.0.0.1:6379"),
        ("redis://cache.test", PASSWORD, "cache.test:6379"),
        (f"redis+sentinel://me:{PASSWORD}@s1.test,s2.test:5/trust", None, "s2.test:5"),
        ("redis+sentinel://s1.test/trust", PASSWORD, "s1.test:26379"),
    ],
)
def test_a_password_in_plain_text_to_another_machine_is_warned_of_once_and_not_repeated(
    url: str, password: str | None, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        ReplicaMirror(url, password=password)
    said = [record.getMessage() for record in caplog.records]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(said)
    assert len([text for text in said if place in text]) == 1
    assert PASSWORD not in caplog.text
    assert url.partition("://")[0].replace("redis", "rediss") in caplog.text


@pytest.mark.parametrize(
    ("url", "password"),
    [
        (f"redis://:{PASSWORD}@127.0.0.1:1", None),
        (f"redis://:{PASSWORD}@localhost:1", None),
        (f"redis://:{PASSWORD}@[::1]:1", None),
        (f"rediss://:{PASSWORD}@cache.test", None),
        (f"rediss+sentinel://:{PASSWORD}@s1.test/trust", PASSWORD),
        ("redis://cache.test", None),
        ("redis+sentinel://s1.test/trust", None),
        (f"unix://:{PASSWORD}@/run/redis.sock", None),
    ],
)
def test_on_loopback_with_tls_or_without_a_password_there_is_nothing_to_warn_of(
    url: str, password: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ReplicaMirror(url, password=password)
    assert caplog.text == ""


def test_a_feed_over_plain_http_that_was_allowed_is_warned_of_too(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        make_verifier(
            hs256_secrets=[SECRET], feed_url="http://ks.test/revocations/feed", feed_client_id="me",
            feed_client_secret=PASSWORD, allow_insecure_http=True,
        )  # fmt: skip
    assert caplog.text.count("feed_url: ") == 1
    assert PASSWORD not in caplog.text


def test_each_place_is_warned_of_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    for port in (1, 2, 1):
        warn_if_plain("redis_url", "redis", "cache.test", port)
    assert len(caplog.records) == 2


# -- the docs ---------------------------------------------------------------------------------------------------------


def test_the_docs_name_every_problem_and_every_setting() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verifier-redis.md").read_text()
    named = ["wrong_credentials", "no_permission", "timeout", "unreachable", "loading", "no_trust_log", "format"]
    settings = ["redis_tls_ca", "redis_tls_cert", "redis_tls_key", "redis_breaker_failures", "redis_breaker_open_s"]
    assert [name for name in (*PROBLEMS, *named, *settings) if f"`{name}`" not in text] == []
