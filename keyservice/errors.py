"""What can go wrong in the key service, split by what the caller can do about it.

    KeyserviceError
    ├── SettingError          a setting is missing or wrong: the process does not start (exit 2)
    ├── StartError            the settings are fine, but the process could not run (exit 4)
    ├── StoreError            Redis
    │   ├── PrimaryUnreachable    nothing was sent, so nothing happened: retry
    │   ├── OutcomeUnknown        sent, but no reply came: it may have happened; retry with the same id
    │   ├── Refused               a script's check said no, by name: nothing happened
    │   └── WaitingForBootstrap   there is no trust log yet: the keepers of all regions are to begin one
    ├── KeeperUnavailable     the region's keeper cannot store: nothing was done
    ├── EnvelopeError         a wrapped private key cannot be opened
    ├── SigningUnavailable    no token can be signed now, by name
    ├── KeySetUnavailable     no key set can be served now, by name
    ├── CannotVouch           neither yes nor no can be said of a token now, by name
    ├── RevocationPending     stored, and not known yet to be with a majority of regions
    ├── FeedUnavailable       the revocation feed cannot be served now, by name
    ├── ClockSkewed           this machine's clock is off: nothing that needs the time is done
    ├── RequestRefused        the request's fault: an HTTP 4xx
    └── OAuthError            the same on /oauth2/*, with a code of RFC 6749

Every error has a stable ``code``. No message ever holds a token, a secret, a password or a URL with one in it.
The HTTP shapes are made in :mod:`keyservice.api.problems`.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "EXIT_CANNOT_RUN",
    "EXIT_USAGE",
    "CannotVouch",
    "ClockSkewed",
    "EnvelopeError",
    "FeedUnavailable",
    "KeeperUnavailable",
    "KeySetUnavailable",
    "KeyserviceError",
    "OAuthError",
    "OutcomeUnknown",
    "PrimaryUnreachable",
    "Refused",
    "RequestRefused",
    "RevocationPending",
    "SettingError",
    "SigningUnavailable",
    "StartError",
    "StoreError",
    "WaitingForBootstrap",
]

EXIT_USAGE: Final = 2
"""Wrong usage, or a setting that is missing or wrong."""

EXIT_CANNOT_RUN: Final = 4
"""The settings are fine; something outside is not: Redis, a port, the key-encryption key."""


class KeyserviceError(Exception):
    """Base of everything that this package raises on purpose."""

    def __init__(self, code: str, message: str) -> None:
        self.code: str = code
        super().__init__(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(code={self.code!r})"


class SettingError(KeyserviceError):
    """A setting is missing or wrong; the message names the variable and the fix."""


class StartError(KeyserviceError):
    """The process could not run."""


class StoreError(KeyserviceError):
    """Redis did not do what was asked."""


class PrimaryUnreachable(StoreError):
    """Nothing was sent: the primary refused the connection, or is not one."""

    def __init__(
        self, message: str = "the primary Redis cannot be reached", *, code: str = "primary_unreachable"
    ) -> None:
        super().__init__(code, message)


class OutcomeUnknown(StoreError):
    """A write was sent and no reply came. Never to be reported as failed."""

    def __init__(self) -> None:
        super().__init__("outcome_unknown", "sent to the primary, but no reply came; a retry with the same id is safe")


class Refused(StoreError):
    """The server answered with an error; ``code`` is its first word (``TRUST_EPOCH``, ``NOPERM``, …)."""

    def __init__(self, code: str) -> None:
        super().__init__(code, f"refused by the server: {code}")


class WaitingForBootstrap(StoreError):
    """The server holds no trust log, and it is for the keepers to begin one or to bring theirs back."""

    def __init__(self) -> None:
        message = "the primary holds no trust log yet: it begins once every region's keeper runs"
        super().__init__("waiting_for_bootstrap", message)


class KeeperUnavailable(KeyserviceError):
    """The region's keeper did not store what has to be on disk first, so nothing was done: HTTP 503.

    ``keeper_unavailable`` (it does not answer) or ``keeper_disk`` (its disk cannot be written).
    """

    def __init__(self, code: str = "keeper_unavailable", message: str = "the region's keeper does not answer") -> None:
        super().__init__(code, f"{message}; nothing was done, a retry is safe")


class EnvelopeError(KeyserviceError):
    """``kek_mismatch`` (wrapped under another key-encryption key) or ``envelope_invalid`` (altered or foreign)."""


class SigningUnavailable(KeyserviceError):
    """No token can be signed now: HTTP 503."""


class KeySetUnavailable(KeyserviceError):
    """No key set can be served now, by name: HTTP 503."""


class CannotVouch(KeyserviceError):
    """Whether a token is good cannot be said now: HTTP 503. Nothing was done.

    ``keys_unavailable``, ``keys_behind`` (its key may be newer than those known here) or ``revocations_stale``.
    """


class RevocationPending(KeyserviceError):
    """Stored by this region's keeper, its outcome open: HTTP 503 where a protocol knows done and not done only."""

    def __init__(self) -> None:
        message = "stored and in force here; a majority of regions has not confirmed it yet; a retry is safe"
        super().__init__("revocation_pending", message)


class FeedUnavailable(KeyserviceError):
    """The revocation feed cannot be served now: HTTP 503, or the last event of a stream."""


class ClockSkewed(KeyserviceError):
    """This machine's clock differs from the primary's by more than ``max_skew_s``: HTTP 503."""

    def __init__(self, skew_s: float) -> None:
        super().__init__("clock_skew", f"this machine's clock is {skew_s:+.1f} s from the primary's")


class RequestRefused(KeyserviceError):
    """The request cannot be carried out as it is. ``status`` is the HTTP status (4xx)."""

    def __init__(self, code: str, message: str, *, status: int = 422) -> None:
        self.status: int = status
        super().__init__(code, message)


class OAuthError(KeyserviceError):
    """RFC 6749 section 5.2. ``code`` is its ``error``; ``status`` the HTTP status."""

    def __init__(self, code: str, description: str, *, status: int = 400) -> None:
        self.status: int = status
        super().__init__(code, description)
