"""Where a feed's bearer token comes from: a text, a function, or the key service's own ``client_credentials`` grant.

A token is renewed while it still holds: a new stream with a new token goes on from the position, and nothing ages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from .limits import FEED_TOKEN_MARGIN_S, FEED_TOKEN_REPLY_BYTES_MAX

if TYPE_CHECKING:
    import httpx

__all__ = ["ClientCredentials", "FeedError", "FeedTokens", "GivenToken"]

FEED_SCOPE: Final = "keyservice:revocations:read"


class FeedError(Exception):
    """A session with a feed ended. ``code`` is stable and short, and never the server's own text."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(code)


class FeedTokens(Protocol):
    """Gives tokens. Called from one thread."""

    def get(self, client: httpx.Client) -> str:
        """A token that holds now; raises :class:`FeedError`, and ``httpx.HTTPError`` if asking failed."""

    def is_due(self) -> bool:
        """Whether the token given last should be replaced by now."""

    def refused(self) -> None:
        """The server did not accept the token given last."""


def _checked(token: object) -> str:
    """A token as it may stand in a header."""
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
        raise FeedError("token_unusable")
    return token


class GivenToken:
    """A token as text, or a function that gives the one to use now, called for each connection."""

    def __init__(self, token: str | Callable[[], str]) -> None:
        self._token = token

    def get(self, client: httpx.Client) -> str:
        """See :class:`FeedTokens`."""
        del client
        if isinstance(self._token, str):
            return _checked(self._token)
        try:
            token = self._token()
        except Exception:  # noqa: BLE001 - somebody else's function: whatever it raises, there is no token
            raise FeedError("token_unavailable") from None
        return _checked(token)

    def is_due(self) -> bool:
        """Whoever gave the token knows when it ends; the server ends the stream then."""
        return False

    def refused(self) -> None:
        """Nothing to forget."""


class _Reply(msgspec.Struct):
    access_token: str
    expires_in: float = 60.0


class ClientCredentials:
    """RFC 6749 section 4.4 against ``token_url``, with HTTP Basic; ``audience`` is the one of the key service's API."""

    def __init__(self, token_url: str, client_id: str, client_secret: str, audience: str | None) -> None:
        self._url = token_url
        self._auth = (client_id, client_secret)
        self._form = {"grant_type": "client_credentials", "scope": FEED_SCOPE}
        if audience is not None:
            self._form["audience"] = audience
        self._token: str | None = None
        self._renew_mono = 0.0

    def get(self, client: httpx.Client) -> str:
        """See :class:`FeedTokens`."""
        if self._token is None or self.is_due():
            asked_mono = time.monotonic()
            reply = self._ask(client)
            self._token = _checked(reply.access_token)
            left_s = max(reply.expires_in - FEED_TOKEN_MARGIN_S, reply.expires_in / 2)
            self._renew_mono = asked_mono + left_s
        return self._token

    def is_due(self) -> bool:
        """See :class:`FeedTokens`."""
        return time.monotonic() >= self._renew_mono

    def refused(self) -> None:
        """See :class:`FeedTokens`."""
        self._token = None

    def _ask(self, client: httpx.Client) -> _Reply:
        with client.stream("POST", self._url, data=self._form, auth=self._auth) as response:
            if response.status_code in (400, 401):
                raise FeedError("wrong_credentials")
            if response.status_code != 200:
                raise FeedError("token_unavailable")
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > FEED_TOKEN_REPLY_BYTES_MAX:
                    raise FeedError("token_unavailable")
        try:
            return msgspec.json.decode(body, type=_Reply)
        except msgspec.DecodeError:
            raise FeedError("token_unavailable") from None
