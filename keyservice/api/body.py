"""Reading request bodies: bounded, typed, and strict about what is not expected."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from fastapi import Request

from keyservice.errors import OAuthError, RequestRefused
from keyservice.limits import BODY_BYTES_MAX, FORM_FIELDS_MAX

__all__ = ["read_form", "read_json"]

T = TypeVar("T")


async def _read(request: Request, bytes_max: int) -> bytes:
    """The body; raises :class:`RequestRefused` (413) as soon as it is too long, whatever its headers say."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if declared.isdigit() and int(declared) <= bytes_max:
        async for chunk in request.stream():
            body += chunk
            if len(body) > bytes_max:
                break
        else:
            return bytes(body)
    raise RequestRefused("body_too_large", f"the body is longer than {bytes_max} bytes", status=413)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, kind: type[T], bytes_max: int = BODY_BYTES_MAX) -> T:
    """A JSON body of exactly this form; raises :class:`RequestRefused`."""
    if _media_type(request) != "application/json":
        raise RequestRefused("content_type_unsupported", "the body must be application/json", status=415)
    body = await _read(request, bytes_max)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise RequestRefused("body_invalid", str(error)) from None
    except msgspec.DecodeError:
        raise RequestRefused("body_not_json", "the body is not JSON", status=400) from None


async def read_form(request: Request) -> dict[str, str]:
    """The parameters of an OAuth request, each at most once (RFC 6749 section 3.2); raises :class:`OAuthError`."""
    if _media_type(request) != "application/x-www-form-urlencoded":
        raise OAuthError("invalid_request", "the body must be application/x-www-form-urlencoded")
    try:
        body = await _read(request, BODY_BYTES_MAX)
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=FORM_FIELDS_MAX,
        )
    except RequestRefused as error:
        raise OAuthError("invalid_request", str(error), status=413) from None
    except ValueError:
        raise OAuthError("invalid_request", "the body is not a form") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthError("invalid_request", "a parameter is there twice")
    return {name: value for name, value in form.items() if value}  # empty means absent (RFC 6749 section 3.2)
