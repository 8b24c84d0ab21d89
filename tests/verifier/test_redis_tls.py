"""TLS to a real Redis, to data nodes and Sentinels: verified always, and whatever goes wrong is named.

Run by `make test-tls`, which fetches Debian's redis-server: the embedded server has no TLS.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.verifier.mirrors import holds, over_redis, reaches, short_rounds
from tests.verifier.support import AUDIENCE, ISSUER, SECRET, until
from tests.verifier.tls_lab import PASSWORD, Authority, Pair, TlsServer, authority, sentinel, serving, stranger
from tests.verifier.valkey import Primary, live
from verifier import Verifier
from verifier.redis_tls import RedisTls

__all__ = ["authority", "short_rounds", "stranger"]

pytestmark = pytest.mark.system

Serve = Callable[..., TlsServer]


@pytest.fixture
def serve(run_dir: Path, authority: Authority) -> Iterator[Serve]:
    """A server with a log that revokes "a"."""
    with contextlib.ExitStack() as stack:

        def start(pair: Pair | None, *, clients: bool = False) -> TlsServer:
            place = run_dir / str(len(list(run_dir.iterdir())))
            return stack.enter_context(serving(place, pair, authority, clients=clients))

        yield start


@pytest.fixture(params=[None, "127.0.0.1"], ids=["unbound", "bound"])
def source(request: pytest.FixtureRequest) -> str | None:
    """With and without a source address, which has connection classes of its own."""
    address: str | None = request.param
    return address


def test_a_mirror_reads_over_tls_with_a_ca_of_its_own(serve: Serve, authority: Authority, source: str | None) -> None:
    server = serve(authority.issue("server"))
    with server.client() as client, over_redis(server.url, tls=RedisTls(authority.file), source_address=source) as one:
        log = Primary(client)
        log.append(*live("jti", ["a"]))
        reaches(one, log.position)
        assert holds(one, "a")


def test_a_verifier_takes_the_files_from_its_environment(serve: Serve, authority: Authority) -> None:
    server = serve(authority.issue("server"), clients=True)
    cert, key = authority.issue("client").names
    environment = {
        "VERIFIER_ISSUER": ISSUER, "VERIFIER_AUDIENCE": AUDIENCE, "VERIFIER_JWKS_URLS": "none", "JWT_SECRET": SECRET,
        "VERIFIER_REDIS_URL": server.url, "VERIFIER_REDIS_TLS_CA": authority.file,
        "VERIFIER_REDIS_TLS_CERT": cert, "VERIFIER_REDIS_TLS_KEY": key,
    }  # fmt: skip
    with server.client() as client:
        Primary(client)
    with Verifier.from_env(environment) as verifier:
        assert verifier.wait_ready(60)


def is_named(
    server_url: str, tls: RedisTls, problem: str, caplog: pytest.LogCaptureFixture, source: str | None = None
) -> None:
    with caplog.at_level(logging.DEBUG), over_redis(server_url, tls=tls, source_address=source) as mirror:
        until(lambda: mirror.view.problem == problem, f"{problem}, not {mirror.view.problem}")
        assert not mirror.wait_synced(0)
    assert problem in caplog.text
    assert PASSWORD not in caplog.text + repr(mirror) + repr(mirror.view)


def test_a_certificate_of_another_ca_is_refused_and_named(
    serve: Serve, authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture, source: str | None
) -> None:
    server = serve(authority.issue("server"))
    is_named(server.url, RedisTls(stranger.file), "tls_unknown_ca", caplog, source)
    is_named(server.url, RedisTls(), "tls_unknown_ca", caplog, source)  # by the system's CAs


def test_an_expired_certificate_and_one_of_tomorrow_are_refused_and_named(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture, source: str | None
) -> None:
    for days in ((-3, -1), (1, 3)):
        server = serve(authority.issue(f"from{days[0]}", days=days))
        is_named(server.url, RedisTls(authority.file), "tls_expired", caplog, source)


def test_a_certificate_of_another_host_is_refused_and_named(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture, source: str | None
) -> None:
    server = serve(authority.issue("elsewhere", address="127.0.0.9"))
    is_named(server.url, RedisTls(authority.file), "tls_wrong_host", caplog, source)


def test_a_server_without_tls_behind_rediss_is_named_and_nothing_hangs(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture, source: str | None
) -> None:
    server = serve(None)
    is_named(server.url, RedisTls(authority.file), "tls_handshake", caplog, source)


def test_a_server_with_tls_behind_redis_is_named(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture, source: str | None
) -> None:
    server = serve(authority.issue("server"))
    is_named(server.plain_url, RedisTls(), "tls_expected", caplog, source)


@pytest.mark.parametrize("shown", [False, True], ids=["none", "another CA's"])
def test_a_missing_or_foreign_client_certificate_is_named(
    serve: Serve, authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture, shown: bool
) -> None:
    server = serve(authority.issue("server"), clients=True)
    files = stranger.issue("client").names if shown else (None, None)
    is_named(server.url, RedisTls(authority.file, *files), "tls_client_certificate", caplog)


def test_a_wrong_password_is_named_over_tls_too(
    serve: Serve, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(authority.issue("server"))
    url = server.url.replace(PASSWORD, "wrong")
    is_named(url, RedisTls(authority.file), "wrong_credentials", caplog)


def test_a_renewed_ca_file_counts_at_the_next_connection(
    serve: Serve, authority: Authority, stranger: Authority, run_dir: Path
) -> None:
    server = serve(authority.issue("server"))
    trusted = run_dir / "trusted.pem"
    trusted.write_text(Path(stranger.file).read_text())
    with server.client() as client, over_redis(server.url, tls=RedisTls(str(trusted))) as mirror:
        log = Primary(client)
        until(lambda: mirror.view.problem == "tls_unknown_ca", "refused")
        trusted.unlink()
        until(lambda: mirror.view.problem == "tls_files", "the missing file is named")
        trusted.write_text(Path(authority.file).read_text())
        reaches(mirror, log.position)


@pytest.mark.parametrize("trusting", [True, False])
def test_sentinels_and_their_servers_are_both_reached_over_tls(
    serve: Serve,
    authority: Authority,
    stranger: Authority,
    run_dir: Path,
    trusting: bool,
    caplog: pytest.LogCaptureFixture,
    source: str | None,
) -> None:
    pair = authority.issue("server")
    server = serve(pair)
    with sentinel(run_dir / "sentinel", pair, authority, server) as url:
        if not trusting:
            is_named(url, RedisTls(stranger.file), "tls_unknown_ca", caplog, source)
            return
        with server.client() as client:
            log = Primary(client)
        tls = RedisTls(authority.file)
        with over_redis(url, tls=tls, password=PASSWORD, source_address=source) as mirror:
            reaches(mirror, log.position)
