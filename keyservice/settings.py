"""Settings: ``KEYSERVICE_<NAME>`` in the environment, plus ``JWT_SECRET`` and ``REDIS_*`` where they mean the same.

Checked once, before anything is opened. Every error is one line that names the variable and the fix and never repeats
a value. A variable that starts with ``KEYSERVICE_`` and is none of ours is refused: a misspelt setting is no default.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from verifier.errors import ConfigurationError
from verifier.jwk import HmacKey
from verifier.limits import ENTRY_VALUE_BYTES_MAX, JWKS_KEYS_MAX
from verifier.redis_connecting import url_options
from verifier.redis_tls import RedisTls
from verifier.sentinel import is_sentinel_url, parse_sentinel_url

from .core.revocation import RevocationPolicy
from .core.rotation import Policy
from .envelope import Kek
from .errors import SettingError
from .limits import KEEPER_SECRET_CHARS_MIN, KEYS_POLL_S, KEYS_SILENCE_MAX_S

__all__ = ["CLIENT_VARIABLES", "Settings", "load_settings"]

PREFIX: Final = "KEYSERVICE_"
CLIENT_VARIABLES: Final = frozenset(
    {
        "KEYSERVICE_ADMIN_URL",
        "KEYSERVICE_BRIDGE_REDIS_URL",
        "KEYSERVICE_CLIENT_ID",
        "KEYSERVICE_CLIENT_SECRET",
        "KEYSERVICE_TOKEN_URL",
    }
)
"""What the commands read that talk to a running key service; no settings of the service itself."""

DEMO: Final[dict[str, Any]] = {
    "jwks_max_age_s": 2,
    "max_skew_s": 1,
    "replication_lag_s": 0.5,
    "rotator_tick_s": 1,
    "access_token_ttl_s": 120,
    "jwks_client_cache_max_s": 0,
}
"""What the profile ``demo`` shortens, all of it consistently; a variable that is set wins."""

DEMO_LEADS_S: Final = {3: 5, 6: 11, 16: 36}
"""The publish lead of the profile ``demo``, by the highest number of regions for which it does: more regions together
must rotate more slowly, so that a key set stays within what verifiers take."""

REGION: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}\Z")
_SECRET: Final = re.compile(rf"[!-~]{{{KEEPER_SECRET_CHARS_MIN},}}\Z")
"""It travels in an HTTP header."""

_HINTS: Final = {
    "missing": "is not set",
    "bool_parsing": "is neither true nor false",
    "int_parsing": "is not a whole number",
    "float_parsing": "is not a number",
    "string_unicode": "is not UTF-8",
}


class _Named(ValueError):
    """A wrong setting, found by a check of ours. The message repeats no value."""

    def __init__(self, variable: str, problem: str) -> None:
        self.variable = variable
        super().__init__(problem)


class Settings(BaseSettings):
    """Everything that ``keyservice serve`` can be told. Durations are in the unit that ends the name."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True, populate_by_name=True
    )

    role: Literal["all", "api", "keeper"] = "all"
    profile: Literal["default", "demo"] = "default"

    issuer: str = Field(min_length=1)
    region: str
    regions: Annotated[tuple[str, ...], NoDecode] = ()
    bootstrap_region: str | None = None

    redis_url: str = Field("", validation_alias=AliasChoices("KEYSERVICE_REDIS_URL", "REDIS_ADDR"))
    redis_username: str | None = Field(
        None, validation_alias=AliasChoices("KEYSERVICE_REDIS_USERNAME", "REDIS_USERNAME")
    )
    redis_password: SecretStr | None = Field(
        None, validation_alias=AliasChoices("KEYSERVICE_REDIS_PASSWORD", "REDIS_PASSWORD")
    )
    redis_tls_ca: str | None = None
    redis_tls_cert: str | None = None
    redis_tls_key: str | None = None
    primary_url: str = ""
    sentinel_username: str | None = None
    sentinel_password: SecretStr | None = None
    source_address: str | None = None
    start_timeout_s: float = Field(10, gt=0, le=600)

    kek: SecretStr | None = None
    kek_file: Path | None = None
    clients_file: Path | None = None
    jwt_secret: SecretStr | None = Field(None, validation_alias="JWT_SECRET")

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65_535)
    uds: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int = Field(8081, ge=0, le=65_535)
    admin_uds: Path | None = None

    keeper_dir: Path | None = None
    keeper_url: str | None = None
    keeper_secret: SecretStr | None = None
    keeper_host: str = "127.0.0.1"
    keeper_port: int | None = Field(None, ge=0, le=65_535)
    keeper_uds: Path | None = None
    receipt_wait_ms: int = Field(1_000, ge=0, le=60_000)

    parent_fd: int | None = Field(None, ge=0)

    access_token_ttl_s: int = Field(900, ge=1)
    session_ttl_s: int = Field(43_200, ge=1)
    refresh_grace_s: float = Field(30, ge=0, le=300)
    introspect_on_stale: Literal["deny", "allow"] = "deny"
    max_staleness_s: float = Field(5, gt=0)
    max_token_lifetime_s: int = Field(86_400, ge=1)
    drop_grace_s: float = Field(300, ge=0)
    max_skew_s: float = Field(5, ge=0)
    leeway_s: float = Field(30, ge=0)
    replication_lag_s: float = Field(10, ge=0)
    beat_interval_ms: int = Field(200, ge=50, le=1_000)

    jwks_max_age_s: int = Field(300, ge=0)
    jwks_client_cache_max_s: int = Field(43_200, ge=0)
    rotation_interval_s: float = Field(30 * 86_400, gt=0)
    publish_lead_s: float = Field(86_400, gt=0)
    rotator_tick_s: float = Field(30, ge=0.1)
    partition_budget_s: float = Field(3_600, gt=0)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment; no .env file is ever read."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("profile") != "demo":
            return given
        regions = len(cls._split(given.get("regions", ())))
        lead_s = next((lead_s for most, lead_s in DEMO_LEADS_S.items() if regions <= most), max(DEMO_LEADS_S.values()))
        return {**DEMO, "publish_lead_s": lead_s, **given}

    @field_validator("regions", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("redis_url", "primary_url")
    @classmethod
    def _as_url(cls, value: str) -> str:
        """``host:port`` is short for ``redis://host:port``."""
        if value and "://" not in value:
            value = f"redis://{value}"
        if is_sentinel_url(value):
            parse_sentinel_url(value)
            return value
        try:
            if value:
                url_options(value)
        except ValueError:
            raise ValueError("is not redis://host:port, rediss://host:port or unix:///path") from None
        return value

    @field_validator("source_address")
    @classmethod
    def _as_address(cls, value: str | None) -> str | None:
        try:
            return value and str(ip_address(value))
        except ValueError:
            raise ValueError("is not an IP address of this machine") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_places()
        self._check_tls()
        self._check_keeper()
        self._check_secrets()
        self._check_times()
        return self

    def _check_places(self) -> None:
        if len(self.issuer.encode()) > ENTRY_VALUE_BYTES_MAX:
            raise _Named(
                "KEYSERVICE_ISSUER", f"is longer than {ENTRY_VALUE_BYTES_MAX} bytes: no revocation can name it"
            )
        if not self.redis_url:
            raise _Named("KEYSERVICE_REDIS_URL", "is not set (or REDIS_ADDR): name this region's Redis")
        if is_sentinel_url(self.redis_url):
            raise _Named("KEYSERVICE_REDIS_URL", "names Sentinels: name this region's own server")
        for name in (self.region, *self.regions):
            if not REGION.match(name):
                raise _Named("KEYSERVICE_REGIONS", "has a name that is not of a-z, 0-9 and -")
        if self.regions and self.region not in self.regions:
            raise _Named("KEYSERVICE_REGIONS", "does not list KEYSERVICE_REGION")
        if self.bootstrap_region is not None and self.bootstrap_region not in self.all_regions:
            raise _Named("KEYSERVICE_BOOTSTRAP_REGION", "is not one of KEYSERVICE_REGIONS")
        if len(self.all_regions) > 1 and self.bootstrap_region is None:
            raise _Named("KEYSERVICE_BOOTSTRAP_REGION", "is not set: with several regions one starts the trust log")

    def _check_tls(self) -> None:
        urls = (self.redis_url, self.primary)
        if self.redis_tls and not any(url.startswith("rediss") for url in urls):
            name = next(name for name in ("ca", "cert", "key") if getattr(self.redis_tls, name) is not None)
            problem = "is set, and neither KEYSERVICE_REDIS_URL nor KEYSERVICE_PRIMARY_URL begins with rediss"
            raise _Named(f"KEYSERVICE_REDIS_TLS_{name.upper()}", problem)
        try:
            self.redis_tls.check()
        except ConfigurationError as error:
            setting, _, problem = str(error).partition(": ")
            raise _Named(PREFIX + setting.upper(), problem) from None

    def _check_keeper(self) -> None:
        """Each role needs its own; whatever it has no use for is more than it should be told."""
        if self.role != "api" and self.keeper_dir is None:
            raise _Named("KEYSERVICE_KEEPER_DIR", "is not set: name a local directory for the region's keeper")
        if self.role == "api" and self.keeper_url is None:
            raise _Named("KEYSERVICE_KEEPER_URL", "is not set: with --role api, name the region's keeper")
        if self.role == "keeper" and not self.keeper_listens:
            raise _Named("KEYSERVICE_KEEPER_PORT", "is not set (or _UDS): where API instances reach it")
        if self.role != "keeper" and self.clients_file is None:
            raise _Named("KEYSERVICE_CLIENTS_FILE", "is not set: name the file of clients and their secrets' hashes")
        if self.keeper_url is not None and not re.match(r"(https?://[^\s/@]+|unix:///\S+)\Z", self.keeper_url):
            raise _Named("KEYSERVICE_KEEPER_URL", "is not http(s)://host:port or unix:///path")
        secret = self.keeper_secret
        if (self.role == "api" or self.keeper_listens) and secret is None:
            raise _Named("KEYSERVICE_KEEPER_SECRET", "is not set: API instances and the keeper share one")
        if secret is not None and not _SECRET.match(secret.get_secret_value()):
            problem = f"must have {KEEPER_SECRET_CHARS_MIN} characters or more, of printable ASCII without spaces"
            raise _Named("KEYSERVICE_KEEPER_SECRET", problem)

    def _check_secrets(self) -> None:
        if self.role == "keeper":
            return
        if (self.kek is None) == (self.kek_file is None):
            problem = (
                "is not set (or KEYSERVICE_KEK_FILE)" if self.kek is None else "and KEYSERVICE_KEK_FILE are both set"
            )
            raise _Named("KEYSERVICE_KEK", f"{problem}: give one key-encryption key of 32 random bytes in base64")
        if self.jwt_secret is not None:
            try:
                HmacKey.from_secret(self.jwt_secret.get_secret_value().encode())
            except UnicodeEncodeError:
                raise _Named("JWT_SECRET", "is not UTF-8: give it as text") from None
            except ValueError as error:
                raise _Named("JWT_SECRET", f"cannot be used ({error}): HS256 needs 32 random bytes or more") from None

    def _check_times(self) -> None:
        """The inequalities of the design; each error names both settings."""
        lead_s = (
            self.replication_lag_s
            + KEYS_POLL_S
            + self.jwks_max_age_s
            + self.max_skew_s
            + self.rotator_tick_s
            + self.jwks_client_cache_max_s
        )
        keys_each = JWKS_KEYS_MAX / len(self.all_regions) - 2  # one active, one standby; the others are retiring
        removal_s = self.rotation_policy.removal_delay_s
        rules = (
            (
                self.publish_lead_s >= lead_s,
                "PUBLISH_LEAD_S",
                f"must be at least {lead_s:g}: replication_lag_s + poll + KEYSERVICE_JWKS_MAX_AGE_S + max_skew_s + "
                "rotator_tick_s + KEYSERVICE_JWKS_CLIENT_CACHE_MAX_S; raise it or lower one of those",
            ),
            (
                self.rotation_interval_s >= self.publish_lead_s,
                "ROTATION_INTERVAL_S",
                "must be at least KEYSERVICE_PUBLISH_LEAD_S, or the next key is never ready in time; raise it",
            ),
            (
                self.leeway_s >= self.max_skew_s + 1,
                "LEEWAY_S",
                "must be at least KEYSERVICE_MAX_SKEW_S + 1, or a fast clock's new tokens are refused; raise it",
            ),
            (
                self.drop_grace_s >= self.leeway_s + self.max_skew_s,
                "DROP_GRACE_S",
                "must be at least KEYSERVICE_LEEWAY_S + KEYSERVICE_MAX_SKEW_S, or revocations are forgotten too early; "
                "raise it",
            ),
            (
                self.access_token_ttl_s <= self.max_token_lifetime_s,
                "ACCESS_TOKEN_TTL_S",
                "must be at most KEYSERVICE_MAX_TOKEN_LIFETIME_S, or every token is refused; lower it",
            ),
            (
                self.max_staleness_s * 1000 >= 10 * self.beat_interval_ms,
                "MAX_STALENESS_S",
                "must be at least ten times KEYSERVICE_BEAT_INTERVAL_MS, or a late beat makes it stale; raise it",
            ),
            (
                keys_each > 0,
                "REGIONS",
                f"has more regions than a key set of {JWKS_KEYS_MAX} keys has room for; name fewer",
            ),
            (
                removal_s <= keys_each * min(self.rotation_interval_s, self.publish_lead_s),
                "PUBLISH_LEAD_S",
                f"is so short against KEYSERVICE_ACCESS_TOKEN_TTL_S (keys verify for {removal_s:g} s more) that "
                f"{len(self.all_regions)} regions could publish more than {JWKS_KEYS_MAX} keys; raise it or lower that",
            ),
        )
        for holds, name, problem in rules:
            if not holds:
                raise _Named(PREFIX + name, problem)

    @property
    def all_regions(self) -> tuple[str, ...]:
        """Every region, this one included."""
        return self.regions or (self.region,)

    @property
    def keeper_listens(self) -> bool:
        """Whether this process's keeper takes intents of other processes."""
        return self.role != "api" and (self.keeper_port is not None or self.keeper_uds is not None)

    @property
    def admin_audience(self) -> str:
        """The audience of tokens for the admin API."""
        return f"{self.issuer.rstrip('/')}/admin"

    @property
    def primary(self) -> str:
        """The URL of the primary: the region's own server where no other is named."""
        return self.primary_url or self.redis_url

    @property
    def redis_tls(self) -> RedisTls:
        """What connections to rediss:// URLs trust and show."""
        return RedisTls(self.redis_tls_ca, self.redis_tls_cert, self.redis_tls_key)

    @property
    def rotation_policy(self) -> Policy:
        """When keys move on; a key goes when the last token it can have signed has expired everywhere."""
        return Policy(
            rotation_interval_s=self.rotation_interval_s,
            publish_lead_s=self.publish_lead_s,
            serve_lead_s=KEYS_SILENCE_MAX_S + self.jwks_max_age_s + self.max_skew_s + self.jwks_client_cache_max_s,
            partition_budget_s=self.partition_budget_s,
            max_skew_s=self.max_skew_s,
            removal_delay_s=self.access_token_ttl_s
            + self.leeway_s
            + self.max_skew_s
            + self.replication_lag_s
            + KEYS_POLL_S,
        )

    @property
    def revocation_policy(self) -> RevocationPolicy:
        """What an entry is made with."""
        return RevocationPolicy(
            self.issuer, self.region, self.max_token_lifetime_s, self.session_life_s, self.max_skew_s
        )

    @property
    def session_life_s(self) -> int:
        """The longest that a session and its last token can live."""
        return self.session_ttl_s + self.access_token_ttl_s

    def read_kek(self) -> Kek:
        """The key-encryption key; raises :class:`SettingError`."""
        if self.kek is not None:
            return _kek("KEYSERVICE_KEK", self.kek.get_secret_value().encode())
        path = self.kek_file or Path()
        try:
            return _kek("KEYSERVICE_KEK_FILE", path.read_bytes())
        except OSError as error:
            problem = error.strerror or "cannot be read"
            raise SettingError("setting_invalid", f"KEYSERVICE_KEK_FILE: {path}: {problem}") from None


def _kek(variable: str, raw: bytes) -> Kek:
    text = raw.strip().rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        key = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise SettingError("setting_invalid", f"{variable} is not 32 bytes in base64 or base64url")
    return Kek(key)


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; raises :class:`SettingError` with one line for the first thing that is wrong."""
    _refuse_misspelt(os.environ)
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise _first_problem(error) from None


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in known:
            raise SettingError("setting_unknown", f"{variable} is not a setting of the key service")


def _first_problem(error: ValidationError) -> SettingError:
    first = error.errors(include_input=False, include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _Named):
        return SettingError("setting_invalid" if "is not set" not in str(cause) else "setting_missing", _line(cause))
    name = str(first["loc"][0]) if first["loc"] else ""
    variable = name if name.isupper() else PREFIX + name.upper()
    problem = str(cause) if cause is not None else _HINTS.get(first["type"], first["msg"])
    code = "setting_missing" if first["type"] == "missing" else "setting_invalid"
    return SettingError(code, f"{variable} {problem}")


def _line(cause: _Named) -> str:
    return f"{cause.variable} {cause}"
