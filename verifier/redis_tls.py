"""TLS to Redis: what a connection trusts and shows, and a short name for what went wrong.

Certificate and host name are verified, always: there is no setting that switches either off. With a CA of one's own
that one alone is trusted, without one the system's. The files are read again at each new connection, so renewing a
certificate needs no restart.

    tls_unknown_ca           the server's certificate is not of a CA that is trusted here
    tls_expired              it has expired, or is not valid yet
    tls_wrong_host           it is for another name or address
    tls_certificate          it is refused for another reason
    tls_client_certificate   the server wants a certificate of ours, or refuses the one that it got
    tls_handshake            no handshake came about: the server speaks no TLS there, or does not answer
    tls_files                a file of ours can no longer be read
    tls_expected             the URL is redis://, and the server speaks TLS

redis-py has no public way to give a connection a context. Overridden here is a private hook of its asyncio connection;
that of the blocking one is in :mod:`verifier.redis_connecting`. Tests pin that the installed redis-py still calls them.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from .errors import ConfigurationError

__all__ = ["PROBLEMS", "RedisTls", "TlsProblem", "async_tls_kwargs", "tls_problem"]

PROBLEMS: Final = {
    "tls_unknown_ca": "its certificate is not of a CA that is trusted here",
    "tls_expired": "its certificate has expired, or is not valid yet",
    "tls_wrong_host": "its certificate is for another name or address",
    "tls_certificate": "its certificate is refused",
    "tls_client_certificate": "it wants a client certificate, or refuses ours",
    "tls_handshake": "no TLS handshake came about: a port without TLS, perhaps",
    "tls_files": "the TLS files cannot be read any more",
    "tls_expected": "it speaks TLS: the URL is to begin with rediss",
}

# OpenSSL's verification results (x509_vfy.h).
_EXPIRED: Final = frozenset({9, 10})
_UNKNOWN_CA: Final = frozenset({2, 18, 19, 20, 21})
_WRONG_HOST: Final = frozenset({62, 63, 64})


class TlsProblem(OSError):
    """TLS is why there is no connection; ``code`` is one of :data:`PROBLEMS`."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(PROBLEMS[code])


@dataclass(frozen=True, slots=True)
class RedisTls:
    """Files in PEM: the CAs to trust instead of the system's, and a certificate and its key to show to the server."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def __bool__(self) -> bool:
        return any(path is not None for path in (self.ca, self.cert, self.key))

    def check(self) -> None:
        """Raises :class:`ConfigurationError`, which names the setting, unless the files can be used."""
        for name, path in (("redis_tls_ca", self.ca), ("redis_tls_cert", self.cert), ("redis_tls_key", self.key)):
            if path == "":  # to OpenSSL the same as none, which would trust the system's CAs
                raise _invalid(name, "is empty; name a PEM file, or leave it out")
        if self.key is not None and self.cert is None:
            raise _invalid("redis_tls_key", "belongs to redis_tls_cert, which is not given")
        try:
            self._trusting()
        except (OSError, TypeError, ValueError):  # SSLError is an OSError
            raise _invalid("redis_tls_ca", "is no readable file of CA certificates in PEM") from None
        try:
            self.context()
        except (OSError, TypeError, ValueError):
            message = "with redis_tls_key, is no readable PEM certificate with its unencrypted private key"
            raise _invalid("redis_tls_cert", message) from None

    def _trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)  # verifies certificate and host name, TLS 1.2 and later

    def context(self) -> ssl.SSLContext:
        """What one connection is made with; raises :class:`OSError` if a file cannot be used."""
        context = self._trusting()
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key, password="")  # or an encrypted key would be asked for at a tty
        return context


def _invalid(setting: str, problem: str) -> ConfigurationError:
    return ConfigurationError("setting_invalid", f"{setting}: {problem}", setting=setting)


def tls_problem(error: BaseException | None) -> str | None:
    """The code of the TLS failure behind an error of redis-py, which wraps it; None if there is none."""
    while error is not None:
        if isinstance(error, TlsProblem):
            return error.code
        if isinstance(error, ssl.SSLError):
            return _name(error)
        error = error.__cause__ or error.__context__
    return None


def _name(error: ssl.SSLError) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        named = ((_EXPIRED, "tls_expired"), (_UNKNOWN_CA, "tls_unknown_ca"), (_WRONG_HOST, "tls_wrong_host"))
        return next((code for codes, code in named if error.verify_code in codes), "tls_certificate")
    reason = str(error.reason)
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return "tls_client_certificate"
    return None if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) else "tls_handshake"


def async_tls_kwargs(base: type[Any], tls: RedisTls) -> dict[str, Any]:
    """Keyword arguments for a ``redis.asyncio`` pool whose connections are ``base``, one of its TLS classes."""
    make: Any = _async_class  # a class can be hashed, which mypy doubts of type[Any]
    return {"connection_class": make(base), "tls": tls}


@cache
def _async_class(base: type[Any]) -> type[Any]:
    class Trusting(base):  # type: ignore[misc]  # any of redis-py's classes
        def __init__(self, *, tls: RedisTls, **kwargs: Any) -> None:
            self._tls = tls
            super().__init__(**kwargs)

        def _connection_arguments(self) -> Any:
            self.ssl_context.context = self._tls.context()
            return super()._connection_arguments()

    return Trusting
