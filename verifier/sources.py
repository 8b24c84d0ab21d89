"""Which mirror a verifier reads its revocations from: a region's Redis, a key service's feed, or one that is given.

Settings are checked here, once; what is returned makes a new mirror each time, because a fork needs another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from .errors import ConfigurationError
from .feed import FeedMirror
from .feed_tokens import ClientCredentials, FeedTokens, GivenToken
from .mirroring import View
from .redis_connecting import warn_if_plain
from .replica import ReplicaMirror
from .settings import check_http_urls, invalid, texts

__all__ = ["FeedToken", "RevocationSource", "mirror_maker"]

FeedToken = str | Callable[[], str]
"""A bearer token, or a function that gives the one to use now."""


@runtime_checkable
class RevocationSource(Protocol):
    """What the verifier needs of a mirror: :class:`~verifier.replica.ReplicaMirror` or a stand-in for tests."""

    counters: Counter[str]

    @property
    def view(self) -> View:
        """Everything known, in one immutable object."""

    def start(self) -> None:
        """Begin reading; does nothing if it has begun."""

    def close(self) -> None:
        """Stop reading."""

    def wait_synced(self, timeout_s: float) -> bool:
        """Wait for the first complete read; False if not in time."""

    def wait_position(self, reached: Callable[[View], bool], timeout_s: float) -> bool:
        """Wait until ``reached(view)``; False if not in time."""

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        """Call ``on_change(view)`` after each new view is in place."""


def mirror_maker(
    redis_url: str | Sequence[str] | RevocationSource | None,
    feed_url: str | Sequence[str] | None,
    *,
    redis: dict[str, Any],
    feed: dict[str, Any],
    allow_insecure_http: bool,
    audience: str | None,
    **settings: Any,
) -> Callable[[], RevocationSource | None]:
    """A function that makes the mirror, or None where both URLs are None; raises :class:`ConfigurationError`.

    ``redis`` and ``feed`` are the credentials of each, ``audience`` the one of the key service's API.
    """
    if feed_url is not None:
        if redis_url is not None:
            raise invalid("feed_url", "takes the place of redis_url: name one of them, and the other as None")
        return _feed_maker(feed_url, allow_insecure_http, audience, settings, **feed)
    if any(value is not None for value in feed.values()):
        raise invalid("feed_url", "credentials of a feed are given, and no feed_url")
    if redis_url is None:
        return lambda: None
    if isinstance(redis_url, RevocationSource):
        source = redis_url
        return lambda: source
    urls = texts(redis_url)
    if not urls and redis_url != []:
        raise invalid("redis_url", "expected a URL, a list of URLs, or None to do without revocations")
    ReplicaMirror(urls, **redis, **settings)  # checks the settings now rather than after a fork
    return lambda: ReplicaMirror(urls, **redis, **settings)


def _feed_maker(
    feed_url: str | Sequence[str],
    allow_insecure_http: bool,
    audience: str | None,
    settings: dict[str, Any],
    *,
    token: FeedToken | None,
    client_id: str | None,
    client_secret: str | None,
    token_url: str | None,
) -> Callable[[], RevocationSource]:
    if not texts(feed_url) and feed_url != []:
        raise invalid("feed_url", "expected a URL or a list of URLs")
    urls = check_http_urls("feed_url", texts(feed_url), allow_insecure_http)
    _warn("feed_url", urls)
    if not urls:
        raise ConfigurationError("setting_missing", "feed_url: name at least one key service", setting="feed_url")
    if (token is None) == (client_id is None and client_secret is None):
        raise invalid("feed_token", "give either feed_token, or feed_client_id and feed_client_secret")
    if token is not None:
        if token_url is not None:
            raise invalid("feed_token_url", "is for feed_client_id and feed_client_secret, not for feed_token")
        given = token
        return lambda: FeedMirror(urls, GivenToken(given), **settings)
    if not client_id or not client_secret:
        raise invalid("feed_client_secret", "feed_client_id and feed_client_secret belong together")
    name, secret = client_id, client_secret
    asked = token_url if token_url is not None else _token_url(urls[0])
    _warn("feed_token_url", check_http_urls("feed_token_url", [asked], allow_insecure_http))

    def tokens() -> FeedTokens:
        return ClientCredentials(asked, name, secret, audience)

    return lambda: FeedMirror(urls, tokens(), **settings)


def _warn(setting: str, urls: Sequence[str]) -> None:
    """Allowing plain HTTP does not make it harmless."""
    for url in urls:
        parts = urlsplit(url)
        warn_if_plain(setting, parts.scheme, parts.hostname, parts.port)


def _token_url(feed_url: str) -> str:
    """The token endpoint of the key service that has the feed."""
    parts = urlsplit(feed_url)
    return urlunsplit((parts.scheme, parts.netloc, "/oauth2/token", "", ""))
