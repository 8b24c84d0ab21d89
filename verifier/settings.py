"""The verifier's settings: checked once, with errors that name the setting and the fix."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from .decision import PUBLIC_KEY_ALGORITHMS, Rules
from .errors import ConfigurationError
from .jwk import HmacKey, JwksError, KeySet

__all__ = ["build_rules", "check_http_urls", "check_jwks_urls", "environment_settings", "local_keys", "seconds"]

Secret = str | bytes | tuple[str, str | bytes]
"""An HS256 secret, or a pair of its ``kid`` and it."""

SECONDS_MAX: Final = 1e15
"""More than thirty million years: a longer time is a mistake, and arithmetic with it stays exact enough."""

SECRET_ADVICE: Final = (
    "use at least 32 random bytes; to move, add a longer secret beside this one, let the issuer sign with it, and "
    "drop this one when its last token has expired"
)


def invalid(setting: str, expected: str) -> ConfigurationError:
    """The error for a setting with an impossible value; the value itself is not repeated."""
    return ConfigurationError("setting_invalid", f"{setting}: {expected}", setting=setting)


def hmac_keys(secrets: Iterable[Secret]) -> tuple[HmacKey, ...]:
    """Check and wrap HS256 secrets; raises :class:`ConfigurationError`."""
    given: Any = secrets
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise invalid("hs256_secrets", "expected a list of secrets")
    keys = []
    for given in secrets:
        kid, secret = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
        if not isinstance(secret, str | bytes) or not isinstance(kid, str | None):
            raise invalid("hs256_secrets", "expected secrets as text or bytes, or pairs of a kid and a secret")
        try:
            # surrogateescape: an environment variable that is not UTF-8 gives its very bytes
            raw = secret.encode("utf-8", "surrogateescape") if isinstance(secret, str) else secret
        except UnicodeEncodeError:
            raise invalid("hs256_secrets", "a secret is not Unicode text; give it as bytes") from None
        try:
            keys.append(HmacKey.from_secret(raw, kid))
        except ValueError as error:
            code = str(error)
            text = SECRET_ADVICE if code == "secret_too_short" else "a public key is known to everyone; use a secret"
            raise ConfigurationError(code, f"hs256_secrets: {text}", setting="hs256_secrets") from None
    return tuple(keys)


def seconds(name: str, value: Any) -> float:
    """A setting in seconds; raises :class:`ConfigurationError`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= SECONDS_MAX:
        raise invalid(name, f"expected a number of seconds from 0 to {SECONDS_MAX:.0e}")
    return float(value)


def texts(value: Any) -> tuple[str, ...]:
    """A text, or a list of texts, as a tuple; empty for anything else."""
    if isinstance(value, str):
        return (value,)
    listed = tuple(value) if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray) else ()
    return listed if all(isinstance(item, str) for item in listed) else ()


def build_rules(
    *,
    issuer: str | None,
    audience: str | Sequence[str] | None,
    algorithms: Iterable[str],
    leeway_s: float,
    max_skew_s: float,
    drop_grace_s: float,
    max_token_lifetime_s: float,
    require_iat: bool,
    hs256_secrets: Iterable[Secret],
    hs256_until: float | None,
) -> Rules:
    """Check what concerns tokens; raises :class:`ConfigurationError`."""
    if issuer is not None and not (issuer and texts(issuer) == (issuer,)):
        raise invalid("issuer", "expected the iss of your tokens, or None to accept any issuer")
    audiences = None if audience is None else texts(audience)
    if audiences is not None and not (audiences and all(audiences)):
        raise invalid("audience", "expected this service's aud, a list of them, or None to accept any audience")
    allowed = frozenset(() if isinstance(algorithms, str) else texts(algorithms))
    if not allowed or not allowed <= set(PUBLIC_KEY_ALGORITHMS):
        raise invalid("algorithms", f"expected some of {', '.join(PUBLIC_KEY_ALGORITHMS)}")
    if seconds("leeway_s", leeway_s) < seconds("max_skew_s", max_skew_s) + 1:
        raise invalid("leeway_s", "must be at least max_skew_s + 1, or a fast clock's new tokens are refused")
    if seconds("drop_grace_s", drop_grace_s) < leeway_s + max_skew_s:
        raise invalid("drop_grace_s", "must be at least leeway_s + max_skew_s, or revocations are forgotten too early")
    return Rules(
        issuer=issuer,
        audiences=None if audiences is None else frozenset(audiences),
        algorithms=allowed,
        leeway_s=float(leeway_s),
        max_token_lifetime_s=seconds("max_token_lifetime_s", max_token_lifetime_s),
        require_iat=require_iat,
        hs256_keys=hmac_keys(hs256_secrets),
        hs256_until=None if hs256_until is None else seconds("hs256_until", hs256_until),
    )


def is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ip_address(host).is_loopback
    except ValueError:
        return False


def check_source_address(address: str | None) -> str | None:
    """An address of this machine to call from; raises :class:`ConfigurationError` if it is none at all."""
    if address is not None:
        try:
            ip_address(address)
        except ValueError:
            raise invalid("source_address", "expected an IP address of this machine, such as 10.0.0.5") from None
    return address


def check_jwks_urls(urls: Sequence[str] | None, allow_insecure_http: bool) -> tuple[str, ...]:
    """Check the list of sources; raises :class:`ConfigurationError`."""
    given: Any = () if urls is None else urls
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(url, str) for url in given):
        raise invalid("jwks_urls", "expected a list of URLs, the own region's first")
    if any(url[:5].lower() == "file:" for url in given):
        return (_check_file_url(given),)
    return check_http_urls("jwks_urls", given, allow_insecure_http)


def _check_file_url(urls: Sequence[str]) -> str:
    """A file alone: beside other sources an old copy of it could bring a removed key back when they fail."""
    if len(urls) != 1:
        raise invalid("jwks_urls", "a file:// URL stands alone; for keys to start from, give a document as jwks")
    try:
        parts = urlsplit(urls[0])
    except ValueError:
        raise invalid("jwks_urls", "one is not a URL") from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise invalid("jwks_urls", "expected file:///absolute/path.json")
    return urls[0]


_OVER_HTTP: Final = {
    "jwks_urls": "keys over plain http:// can be replaced on the way",
    "feed_url": "revocations over plain http:// can be held back on the way, and the token read",
    "feed_token_url": "a client secret over plain http:// can be read on the way",
}


def check_http_urls(setting: str, urls: Sequence[str], allow_insecure_http: bool) -> tuple[str, ...]:
    """Check URLs of a setting; raises :class:`ConfigurationError`."""
    for url in urls:
        try:
            parts, _ = urlsplit(url), urlsplit(url).port
        except ValueError:
            raise invalid(setting, "one is not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise invalid(setting, "expected https:// URLs without credentials")
        if parts.scheme == "http" and not allow_insecure_http and not is_loopback(parts.hostname):
            message = f"{setting}: {_OVER_HTTP[setting]}; use https://, or say allow_insecure_http=True"
            raise ConfigurationError("insecure_url", message, setting=setting)
    return tuple(urls)


def local_keys(document: Mapping[str, Any] | bytes | None) -> KeySet | None:
    """Read a local JWK set; raises :class:`ConfigurationError`."""
    if document is None:
        return None
    try:
        return KeySet.from_document(document)
    except JwksError as error:
        raise ConfigurationError("jwks_invalid", f"jwks: {error.reason}", setting="jwks") from None


# -- the environment ------------------------------------------------------------------------------------------------


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "issuer": str,
    "audience": _list,
    "jwks_urls": _list,
    "redis_url": _list,
    "redis_username": str,
    "redis_password": str,
    "redis_tls_ca": str,
    "redis_tls_cert": str,
    "redis_tls_key": str,
    "redis_breaker_failures": int,
    "redis_breaker_open_s": float,
    "feed_url": _list,
    "feed_token": str,
    "feed_client_id": str,
    "feed_client_secret": str,
    "feed_token_url": str,
    "region": str,
    "on_stale": str,
    "on_unsynced": str,
    "algorithms": _list,
    "source_address": str,
    "require_iat": _flag,
    "allow_insecure_http": _flag,
    "token_cache_size": int,
    "max_staleness_s": float,
    "leeway_s": float,
    "token_cache_ttl_s": float,
    "keys_max_age_s": float,
    "min_position_wait_s": float,
    "max_token_lifetime_s": float,
    "max_skew_s": float,
    "drop_grace_s": float,
    "hs256_until": float,
}
_NULLABLE: Final = (
    "issuer", "audience", "jwks_urls", "redis_url", "feed_url", "token_cache_ttl_s", "hs256_until", "region"
)  # fmt: skip
_HOST_PORT: Final = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?\Z")
_REQUIRED: Final = ("issuer", "audience", "jwks_urls", "redis_url")


def environment_settings(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Constructor arguments from ``JWT_SECRET``, ``REDIS_*`` and ``VERIFIER_<PARAMETER>``.

    With ``VERIFIER_FEED_URL`` the ``REDIS_*`` are taken for the service's own and left alone. The word ``none`` skips a
    setting that must be named. Raises :class:`ConfigurationError` naming the variable, also for a ``VERIFIER_``
    variable that is none of ours: a misspelt setting is not a default.
    """
    env = os.environ if environ is None else environ
    found: dict[str, Any] = {}
    if env.get("JWT_SECRET"):
        found["hs256_secrets"] = [env["JWT_SECRET"]]
    feed = env.get("VERIFIER_FEED_URL", "none").lower() != "none"
    if env.get("REDIS_ADDR") and not feed:
        if not _HOST_PORT.match(env["REDIS_ADDR"]):
            raise invalid("redis_url", "REDIS_ADDR is host:port; for a URL set VERIFIER_REDIS_URL")
        found["redis_url"] = [f"redis://{env['REDIS_ADDR']}"]
    for variable, setting in (("REDIS_USERNAME", "redis_username"), ("REDIS_PASSWORD", "redis_password")):
        if env.get(variable) and not feed:
            found[setting] = env[variable]
    if feed:
        found["redis_url"] = None
    for variable in sorted(name for name in env if name.startswith("VERIFIER_")):
        found[variable.removeprefix("VERIFIER_").lower()] = _read_variable(variable, env[variable])
    for setting in _REQUIRED:
        if setting not in found:
            also = ", REDIS_ADDR or VERIFIER_FEED_URL" if setting == "redis_url" else ""
            message = f"set VERIFIER_{setting.upper()}{also} (or the word none to do without)"
            raise ConfigurationError("setting_missing", message, setting=setting)
    return found


def _read_variable(variable: str, text: str) -> Any:
    setting = variable.removeprefix("VERIFIER_").lower()
    reader = _READERS.get(setting)
    if reader is None:
        raise ConfigurationError("setting_invalid", f"{variable} is not a setting of the verifier", setting=setting)
    if setting in _NULLABLE and text.lower() == "none":
        return None
    try:
        return reader(text)
    except (ValueError, KeyError):
        message = f"{variable} cannot be read as {'true or false' if reader is _flag else reader.__name__.strip('_')}"
        raise ConfigurationError("setting_invalid", message, setting=setting) from None
