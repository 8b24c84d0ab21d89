"""Verify access tokens inside a service, with revocations mirrored from the own region's Redis replica.

    from verifier import Verifier, InvalidToken, Undecidable

    with Verifier(issuer="https://id.example", audience="orders", jwks_urls=[…], redis_url="redis://…") as verifier:
        claims = verifier.verify(token)

Verification does no I/O. See :class:`Verifier` for settings and :mod:`verifier.errors` for outcomes.
"""

from . import errors
from .bearer import current_claims
from .claims import Claims
from .errors import ConfigurationError, InvalidToken, RevokedToken, Undecidable
from .issuers import Issuer
from .status import Status
from .verifier import Verifier

__all__ = [
    "Claims",
    "ConfigurationError",
    "InvalidToken",
    "Issuer",
    "RevokedToken",
    "Status",
    "Undecidable",
    "Verifier",
    "current_claims",
    "errors",
]
