"""Certificates made on the spot, and Debian's Redis with TLS: the embedded server has none."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.verifier.http_server import free_port
from tests.verifier.support import until

PASSWORD = "correct-horse-battery-staple"
HOST = "127.0.0.1"
FETCHED = Path(__file__).parents[2] / ".cache" / "servers" / "redis-server"


def tls_server() -> str:
    """The program: TLS_SERVER, what `make test-tls` fetched, or one on PATH."""
    named = os.environ.get("TLS_SERVER") or (str(FETCHED) if FETCHED.exists() else shutil.which("redis-server"))
    assert named is not None, "no redis-server with TLS: run `make test-tls`, or name one with TLS_SERVER="
    return named


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM files."""

    cert: Path
    key: Path

    @property
    def names(self) -> tuple[str, str]:
        return str(self.cert), str(self.key)


class Authority:
    """A CA, as strict as Python 3.13 asks for."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory, self._name = directory, name
        self._private = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.pair = self._issue(name, self._private, authority=True)
        self.file = str(self.pair.cert)

    def issue(self, name: str, *, address: str = HOST, days: tuple[int, int] = (-1, 1)) -> Pair:
        """For this address, valid from and until that many days from now."""
        return self._issue(f"{self._name}-{name}", ec.generate_private_key(ec.SECP256R1()), address=address, days=days)

    def _issue(
        self,
        name: str,
        private: ec.EllipticCurvePrivateKey,
        *,
        authority: bool = False,
        address: str = HOST,
        days: tuple[int, int] = (-1, 1),
    ) -> Pair:
        now = datetime.datetime.now(datetime.UTC)
        start, end = (now + datetime.timedelta(days=count) for count in days)
        own = self._private.public_key()
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        use = {
            "digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority,
            "content_commitment": False, "key_encipherment": False, "data_encipherment": False,
            "key_agreement": False, "encipher_only": False, "decipher_only": False,
        }  # fmt: skip
        built = (
            x509.CertificateBuilder(
                self._subject, subject, private.public_key(), x509.random_serial_number(), start, end
            )
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**use), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
        )
        if not authority:
            named = [x509.IPAddress(ipaddress.ip_address(address))]
            built = built.add_extension(x509.SubjectAlternativeName(named), critical=False)
        pair = Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        pair.cert.write_bytes(built.sign(self._private, hashes.SHA256()).public_bytes(Encoding.PEM))
        pair.key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair


@dataclass
class TlsServer:
    """One that runs; ``socket`` is for the test's own hand."""

    port: int
    socket: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"rediss://:{PASSWORD}@{HOST}:{self.port}"

    @property
    def plain_url(self) -> str:
        return f"redis://:{PASSWORD}@{HOST}:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), password=PASSWORD)


@contextlib.contextmanager
def serving(directory: Path, pair: Pair | None, authority: Authority, *, clients: bool = False) -> Iterator[TlsServer]:
    """Redis with this certificate, or without TLS; ``clients``: whoever connects has to show one too."""
    directory.mkdir()
    port, socket = free_port(), directory / "s"
    lines = [f"unixsocket {socket}", f"requirepass {PASSWORD}", f"dir {directory}", 'save ""', f"bind {HOST}"]
    lines += [f"port {port}"] if pair is None else ["port 0", f"tls-port {port}", *tls_lines(pair, authority)]
    lines += [f"tls-auth-clients {'yes' if clients else 'no'}"]
    with _running(directory, lines) as process:
        server = TlsServer(port, socket, process)
        until(lambda: _answers(server.client()), "the server answers")
        yield server


@contextlib.contextmanager
def sentinel(directory: Path, pair: Pair, authority: Authority, server: TlsServer) -> Iterator[str]:
    """A Sentinel that speaks TLS alone and watches this server; gives its URL for a verifier."""
    directory.mkdir()
    port = free_port()
    lines = ["port 0", f"tls-port {port}", "tls-replication yes", "tls-auth-clients no", f"bind {HOST}"]
    lines += [*tls_lines(pair, authority), f"requirepass {PASSWORD}", f"dir {directory}"]
    lines += [f"sentinel monitor trust {HOST} {server.port} 1", f"sentinel auth-pass trust {PASSWORD}"]
    with _running(directory, lines, "--sentinel"):
        yield f"rediss+sentinel://:{PASSWORD}@{HOST}:{port}/trust"


def tls_lines(pair: Pair, authority: Authority) -> list[str]:
    cert, key = pair.names
    return [f"tls-cert-file {cert}", f"tls-key-file {key}", f"tls-ca-cert-file {authority.file}"]


@contextlib.contextmanager
def _running(directory: Path, lines: list[str], *options: str) -> Iterator[subprocess.Popen[bytes]]:
    config = directory / "conf"
    config.write_text("\n".join(lines) + "\n")
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen([tls_server(), str(config), *options], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


def _answers(client: redis.Redis) -> bool:
    with client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, OSError):
            return False


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "theirs")
