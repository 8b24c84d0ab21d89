"""One call of a running key service's admin API, as a client named in the environment.

``KEYSERVICE_ADMIN_URL``, ``KEYSERVICE_TOKEN_URL``, ``KEYSERVICE_CLIENT_ID``, ``KEYSERVICE_CLIENT_SECRET``; and
``KEYSERVICE_ISSUER``, where the client may ask for other audiences than the admin API's too.
"""

from __future__ import annotations

import os
from typing import Any, Final

from .errors import SettingError, StartError

__all__ = ["call_admin"]

HTTP_TIMEOUT_S: Final = 10.0


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise SettingError("setting_missing", f"{name} is not set")
    return value


def call_admin(method: str, path: str, body: object = None) -> Any:
    """One call of the admin API with a token of our own; raises :class:`StartError` with the server's code."""
    import httpx

    token_url, admin_url = _environment("KEYSERVICE_TOKEN_URL"), _environment("KEYSERVICE_ADMIN_URL").rstrip("/")
    credentials = (_environment("KEYSERVICE_CLIENT_ID"), _environment("KEYSERVICE_CLIENT_SECRET"))
    form = {"grant_type": "client_credentials"}
    if os.environ.get("KEYSERVICE_ISSUER"):
        form["audience"] = f"{os.environ['KEYSERVICE_ISSUER'].rstrip('/')}/admin"
    try:
        with httpx.Client(timeout=HTTP_TIMEOUT_S, trust_env=False) as http:
            token = _answer(http.post(token_url, data=form, auth=credentials))["access_token"]
            return _answer(
                http.request(method, admin_url + path, json=body, headers={"Authorization": f"Bearer {token}"})
            )
    except httpx.InvalidURL:
        raise SettingError("setting_invalid", "KEYSERVICE_TOKEN_URL or KEYSERVICE_ADMIN_URL is not a URL") from None
    except httpx.HTTPError as error:
        message = f"no answer from KEYSERVICE_TOKEN_URL or KEYSERVICE_ADMIN_URL: {type(error).__name__}"
        raise StartError("keyservice_unreachable", message) from None


def _answer(response: Any) -> Any:
    try:
        body = response.json()
    except ValueError:
        body = {}
    if response.is_success and isinstance(body, dict):
        return body
    code = body.get("code") or body.get("error") or f"http_{response.status_code}"
    detail = body.get("detail") or body.get("error_description") or "the key service refused"
    raise StartError(str(code), str(detail))
