"""The admin API as the bridge uses it: bulk revocations, with a token that is renewed in time.

No answer raises but one that is final: what to do after each of the others is decided in
:func:`keyservice.core.bridge.after_answer`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from .core.bridge import Item, Step, after_answer, body_of
from .errors import SettingError, StartError

__all__ = ["AdminApi", "Answer", "Caller"]

HTTP_TIMEOUT_S: Final = 30.0
"""A full request is appended in ten scripts on a primary that may be a continent away."""

RENEW_AT: Final = 0.8
"""The share of a token's life after which another one is asked for."""

RETRY_AFTER_MAX_S: Final = 30.0
"""However long a server asks to be left alone, it is asked again after this."""

RENEWALS_MAX: Final = 3
"""Tokens refused in a row before the bridge gives up: one may have met a key that was just revoked."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and where. Hidden in ``repr`` is what could hold a secret."""

    token_url: str = field(repr=False)
    admin_url: str = field(repr=False)
    client_id: str
    client_secret: str = field(repr=False)
    audience: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Caller:
        """``KEYSERVICE_TOKEN_URL``, ``_ADMIN_URL``, ``_CLIENT_ID``, ``_CLIENT_SECRET``, and ``_ISSUER`` if it is set.

        Raises :class:`SettingError`.
        """
        names = [f"KEYSERVICE_{name}" for name in ("TOKEN_URL", "ADMIN_URL", "CLIENT_ID", "CLIENT_SECRET")]
        for name in names:
            if not environ.get(name):
                raise SettingError("setting_missing", f"{name} is not set")
        token_url, admin_url, client_id, client_secret = (environ[name] for name in names)
        for name, url in zip(names, (token_url, admin_url), strict=False):
            if not url.startswith(("http://", "https://")):
                raise SettingError("setting_invalid", f"{name} is not an http:// or https:// URL")
        issuer = environ.get("KEYSERVICE_ISSUER")
        audience = f"{issuer.rstrip('/')}/admin" if issuer else None
        return cls(token_url, admin_url.rstrip("/"), client_id, client_secret, audience)


@dataclass(frozen=True, slots=True)
class Answer:
    """What to do next, why, and not before when."""

    step: Step
    code: str = ""
    detail: str = ""
    results: Any = None
    retry_after_s: float = 0.0


class AdminApi:
    """One caller's connection to the admin API."""

    def __init__(self, caller: Caller, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._caller = caller
        self._http = httpx.AsyncClient(timeout=HTTP_TIMEOUT_S, trust_env=False, transport=transport)
        self._token: str | None = None
        self._renew_at = 0.0
        self._refused_tokens = 0

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def revoke(self, items: Sequence[Item]) -> Answer:
        """One bulk request. Raises :class:`StartError` if a token is refused again and again, SettingError for URLs."""
        try:
            if self._token is None or time.monotonic() >= self._renew_at:
                refusal = await self._renew()
                if refusal is not None:
                    return refusal
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            url = f"{self._caller.admin_url}/admin/revocations"
            response = await self._http.post(url, headers=headers, content=body_of(items))
        except httpx.InvalidURL:
            message = "KEYSERVICE_TOKEN_URL or KEYSERVICE_ADMIN_URL is not a URL"
            raise SettingError("setting_invalid", message) from None
        except httpx.HTTPError:
            return Answer(Step.RETRY, "keyservice_unreachable", "no answer from the key service")
        return self._read(response)

    def _read(self, response: httpx.Response) -> Answer:
        answer = _answer(response)
        if answer.step is Step.RENEW:
            self._token = None
            self._refused_tokens += 1
            if self._refused_tokens >= RENEWALS_MAX:
                return Answer(Step.GIVE_UP, answer.code, answer.detail)
        else:
            self._refused_tokens = 0
        return answer

    async def _renew(self) -> Answer | None:
        """A new token; if there is none, what to do. Raises :class:`StartError` if our credentials are refused."""
        caller = self._caller
        form = {"grant_type": "client_credentials"}
        if caller.audience is not None:
            form["audience"] = caller.audience
        asked_at = time.monotonic()
        credentials = (caller.client_id, caller.client_secret)
        response = await self._http.post(caller.token_url, data=form, auth=credentials)
        body = _object(response)
        if response.status_code == 200 and isinstance(body.get("access_token"), str):
            life_s = body.get("expires_in")
            self._token = body["access_token"]
            self._renew_at = asked_at + RENEW_AT * (life_s if isinstance(life_s, int | float) else 60)
            return None
        answer = _answer(response)
        if answer.step in (Step.RETRY, Step.RESULTS):
            return Answer(Step.RETRY, answer.code or "token_missing", answer.detail, None, answer.retry_after_s)
        raise StartError(answer.code, answer.detail)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _answer(response: httpx.Response) -> Answer:
    body = _object(response)
    code = str(body.get("code") or body.get("error") or f"http_{response.status_code}")
    detail = str(body.get("detail") or body.get("error_description") or "the key service refused")
    return Answer(
        after_answer(response.status_code, code),
        code,
        detail,
        body.get("results"),
        _seconds(response.headers.get("retry-after")),
    )


def _seconds(retry_after: str | None) -> float:
    return min(float(retry_after), RETRY_AFTER_MAX_S) if retry_after is not None and retry_after.isdigit() else 0.0
