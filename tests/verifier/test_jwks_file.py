"""Keys from a file: picked up when it is replaced, and a bad one never takes a good set's place."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.support import AUDIENCE, ISSUER, code_of, live_token, until
from verifier import ConfigurationError, Undecidable, Verifier
from verifier.jwk import JwksError
from verifier.jwks_sources import FileSource
from verifier.limits import JWKS_BYTES_MAX, JWKS_FILE_MAX_AGE_S
from verifier.testing import SigningKey, StaticKeys


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter times, so that a test sees many looks at the file."""
    monkeypatch.setattr("verifier.keys.JWKS_COOLDOWN_S", 0.1)
    monkeypatch.setattr("verifier.keys.JWKS_MAX_AGE_FLOOR_S", 0.05)
    monkeypatch.setattr("verifier.jwks_sources.JWKS_FILE_MAX_AGE_S", 0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a set with spaces.json"


def put(path: Path, *keys: SigningKey) -> None:
    """Replace the file as a deployment does: as a whole."""
    replace(path, json.dumps(StaticKeys(*keys).jwks).encode())


def replace(path: Path, body: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(body)
    os.replace(beside, path)


def verifier_of(path: Path, **settings: Any) -> Verifier:
    defaults: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "redis_url": None}
    return Verifier(**{**defaults, "jwks_urls": [path.as_uri()], **settings})


def counters(verifier: Verifier) -> dict[str, int]:
    return verifier.status().counters


def test_a_token_verifies_with_a_key_from_a_file_and_a_replaced_file_is_picked_up(
    path: Path, key: SigningKey, other_key: SigningKey, attentive: None
) -> None:
    put(path, key)
    with verifier_of(path) as verifier:
        assert verifier.wait_ready(60)
        token = live_token(key)
        assert verifier.verify(token)
        put(path, other_key)
        until(lambda: verifier.status().keys == (other_key.kid,), "the file is looked at again, unasked")
        assert verifier.verify(live_token(other_key))
        now = int(time.time())
        assert code_of(verifier, live_token(key, iat=now - 60)) == "kid_unknown"
        with pytest.raises(Undecidable):  # a key of just now may be on its way
            verifier.verify(token)


def test_a_fresh_key_in_the_file_is_accepted_at_once(path: Path, key: SigningKey, other_key: SigningKey) -> None:
    put(path, key)
    with verifier_of(path) as verifier:
        assert verifier.wait_ready(60)
        put(path, key, other_key)
        assert verifier.verify(live_token(other_key))


def test_keys_from_a_file_are_configured_from_the_environment(path: Path, key: SigningKey) -> None:
    put(path, key)
    env = {
        "VERIFIER_ISSUER": ISSUER,
        "VERIFIER_AUDIENCE": AUDIENCE,
        "VERIFIER_JWKS_URLS": path.as_uri(),
        "VERIFIER_REDIS_URL": "none",
    }
    with Verifier.from_env(env) as verifier:
        assert verifier.wait_ready(60)
        assert verifier.verify(live_token(key))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "the_document_is_not_a_strict_JSON_object"),
        (b'{"keys": [', "the_document_is_not_a_strict_JSON_object"),
        (b'{"keys": []}', "keys_is_not_a_list_of_1_to_100"),
        (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "the_set_has_no_usable_key"),
        (b" " * (JWKS_BYTES_MAX + 1), "too_large"),
    ],
)
def test_a_bad_file_never_replaces_a_good_set_and_is_named(
    path: Path, key: SigningKey, other_key: SigningKey, attentive: None, body: bytes, problem: str
) -> None:
    put(path, key)
    with verifier_of(path) as verifier:
        assert verifier.wait_ready(60)
        replace(path, body)
        until(lambda: counters(verifier).get(f"fetch_{problem}"), problem)
        assert verifier.status().keys == (key.kid,)
        assert verifier.verify(live_token(key))
        put(path, other_key)
        until(lambda: verifier.status().keys == (other_key.kid,), "a good file again")


def test_a_missing_file_is_named_and_picked_up_when_it_comes(path: Path, key: SigningKey, attentive: None) -> None:
    with verifier_of(path) as verifier:
        until(lambda: counters(verifier).get("fetch_file_missing"), "named")
        assert not verifier.status().ready
        put(path, key)
        assert verifier.wait_ready(60)
        path.unlink()
        missing = counters(verifier)["fetch_file_missing"]
        until(lambda: counters(verifier)["fetch_file_missing"] > missing, "missed")
        assert verifier.verify(live_token(key))


def test_an_unchanged_file_keeps_the_keys_young_without_being_read(
    path: Path, key: SigningKey, attentive: None
) -> None:
    put(path, key)
    with verifier_of(path, keys_max_age_s=1) as verifier:
        assert verifier.wait_ready(60)
        fetched = counters(verifier)["fetches"]
        until(lambda: counters(verifier)["fetches"] >= fetched + 30, "thirty looks")
        assert verifier.verify(live_token(key))
        age = verifier.status().keys_age_s
        assert age is not None
        assert counters(verifier).get("fetch_errors", 0) == 0


def test_only_a_file_is_read_and_what_is_none_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(JwksError, match="file_is_none"):
        FileSource(path.as_uri()).get(None, 1)
    with pytest.raises(JwksError, match=r"file_is_none|file_unreadable"):
        FileSource(path.parent.as_uri()).get(None, 1)


def test_a_file_that_may_not_be_read_is_named(path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    put(path, key)

    def refuse(*_: Any) -> int:  # as root every file may be read
        raise PermissionError

    monkeypatch.setattr("verifier.jwks_sources.os.open", refuse)
    with pytest.raises(JwksError, match="file_not_permitted"):
        FileSource(path.as_uri()).get(None, 1)


def test_what_is_read_is_the_whole_of_one_file_however_often_it_is_replaced(
    path: Path, key: SigningKey, other_key: SigningKey
) -> None:
    put(path, key)
    source, done = FileSource(path.as_uri()), threading.Event()
    bodies = {json.dumps(StaticKeys(each).jwks).encode() for each in (key, other_key)}

    def replace_often() -> None:
        while not done.is_set():
            put(path, other_key)
            put(path, key)

    writer = threading.Thread(target=replace_often)
    writer.start()
    try:
        etag, read = None, 0
        while read < 300:
            reply = source.get(etag, 1)
            etag = reply.etag
            assert reply.max_age_s == JWKS_FILE_MAX_AGE_S
            if reply.body is not None:
                assert reply.body in bodies
                read += 1
    finally:
        done.set()
        writer.join()


def test_a_file_that_is_rewritten_in_place_while_it_is_read_is_left_for_the_next_look(
    path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, key)
    source, whole = FileSource(path.as_uri()), path.read_bytes()
    stat_now = os.fstat

    def rewrite(descriptor: int) -> os.stat_result:
        found = stat_now(descriptor)
        path.write_bytes(path.read_bytes() + b" ")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("verifier.jwks_sources.os.fstat", rewrite)
        with pytest.raises(JwksError, match="file_changed_while_read"):
            source.get(None, 1)
    assert (source.get(None, 1).body or b"").rstrip() == whole


@pytest.mark.parametrize(
    "urls",
    [
        ["file:///a.json", "https://id.example/jwks.json"],
        ["https://id.example/jwks.json", "file:///a.json"],
        ["file:///a.json", "file:///b.json"],
        ["file://host/a.json"],
        ["file:a.json"],
        ["file:"],
        ["file:///a.json?x"],
        ["file:///a.json#x"],
        ["file://[/a.json"],
    ],
)
def test_a_file_stands_alone_and_is_named_absolutely(urls: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Verifier(issuer=ISSUER, audience=AUDIENCE, redis_url=None, jwks_urls=urls)
    assert (caught.value.code, caught.value.setting) == ("setting_invalid", "jwks_urls")


@pytest.mark.parametrize("urls", [5, True, [5], [None], b"https://id.test/", {"https://id.test/": 1}, "file:///a.json"])
def test_urls_of_any_other_kind_are_a_configuration_error(urls: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Verifier(issuer=ISSUER, audience=AUDIENCE, redis_url=None, jwks_urls=urls)
    assert (caught.value.code, caught.value.setting) == ("setting_invalid", "jwks_urls")
