"""What an API instance has and a keeper has not: keys to sign with, tokens, sessions, and the HTTP routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.types import ASGIApp

from verifier.log import Entry

from .api import admin_keepers, admin_keys, admin_revocations, admin_sessions, feed, oauth
from .api.jwks import JwksFirst
from .bearer import AdminBearer
from .clients import Authenticator, Clients
from .envelope import Kek
from .errors import SigningUnavailable, StartError
from .evidence import Evidence, read_evidence
from .feed import Feed
from .granting import Granting
from .issuing import Issuer, SharedSecret
from .jobs import RotationJob
from .keyring import Keyring
from .revoking import Revoker
from .rotator import Rotator
from .sessions import SessionStore
from .trust import read_keys

if TYPE_CHECKING:
    from .app import Service

__all__ = ["Frontend"]


class Frontend:
    """Signs, publishes, and takes revocations, on the parts of ``service``."""

    def __init__(self, service: Service, kek: Kek, clients: Clients) -> None:
        self._service = service
        self._settings = settings = service.settings
        self.ring = Keyring(kek, settings.region, is_revoked=self._kid_revoked, executor=service.executor)
        self.rotator = Rotator(
            service.primary,
            service.trust,
            self.ring,
            kek,
            settings.rotation_policy,
            region=settings.region,
            clock=service.clock,
            is_revoked=self._kid_revoked,
            executor=service.executor,
        )
        self._rotation = RotationJob(self.rotator, service.metrics, tick_s=settings.rotator_tick_s)
        self.revoker = Revoker(
            service.trust,
            service.intents,
            service.index,
            service.receipts,
            settings.revocation_policy,
            receipt_wait_s=settings.receipt_wait_ms / 1000,
            clock=service.clock,
            check_clock=service.beats.check_clock,
            enforce=service.enforce,
            metrics=service.metrics,
        )
        self.feed = Feed(service.own, service.metrics)
        self._build_tokens(clients)

    def _build_tokens(self, clients: Clients) -> None:
        service, settings = self._service, self._settings
        secret = settings.jwt_secret
        issuer = Issuer(
            settings.issuer,
            settings.access_token_ttl_s,
            clock=service.clock,
            signing_key=self.ring.signing_key,
            gate=self._may_sign,
            shared_secret=SharedSecret(secret.get_secret_value()) if secret is not None else None,
        )
        self._sessions = SessionStore(service.primary)
        self._authenticator = Authenticator(clients)
        self._granting = Granting(
            issuer,
            self._sessions,
            service.metrics,
            issuer_name=settings.issuer,
            session_ttl_s=settings.session_ttl_s,
            clock=service.clock,
            snapshot=service.revocations,
        )
        self._bearer = AdminBearer(
            issuer=settings.issuer,
            audience=settings.admin_audience,
            leeway_s=settings.leeway_s,
            max_token_lifetime_s=settings.max_token_lifetime_s,
            clock=service.clock,
            keys=lambda: self.ring.document.keys if self.ring.document is not None else None,
            snapshot=service.revocations,
        )

    # -- routes -----------------------------------------------------------------------------------------------------

    def public_routers(self) -> tuple[APIRouter, ...]:
        """For anybody."""
        return (
            oauth.router(self._authenticator, self._granting, self._service.metrics),
            feed.router(self._bearer, self.feed),
        )

    def admin_routers(self) -> tuple[APIRouter, ...]:
        """For administration."""
        settings = self._settings
        return (
            admin_sessions.router(
                self._bearer,
                self._authenticator,
                self._granting,
                self._sessions,
                self.revoker,
                settings.revocation_policy,
                session_life_s=settings.session_life_s,
                clock=self._service.clock,
            ),
            admin_revocations.router(self._bearer, self.revoker),
            admin_keys.router(self._bearer, self.ring, self.rotator, self._rotation.wake),
            admin_keepers.router(self._bearer, self._service.trust, self._own_evidence, self._primary_evidence),
        )

    def in_front(self, app: ASGIApp) -> ASGIApp:
        """The key set is answered before any routing."""
        return JwksFirst(app, lambda: self.ring.document, self._settings.jwks_max_age_s)

    async def _own_evidence(self) -> Evidence:
        return await read_evidence(self._service.own, self._service.receipts.regions())

    async def _primary_evidence(self) -> Evidence:
        return await read_evidence(self._service.primary, self._service.receipts.regions())

    # -- life -------------------------------------------------------------------------------------------------------

    async def check_kek(self) -> None:
        """Raises :class:`StartError` if this region's keys are wrapped under another KEK."""
        view = await read_keys(self._service.own, self._settings.region)
        foreign = self.ring.foreign_kek(view)
        if foreign is not None:
            message = (
                f"KEYSERVICE_KEK is not the one (kek id {foreign}) that this region's private keys are wrapped under"
            )
            raise StartError("kek_mismatch", message)

    def start(self) -> None:
        """Begin to rotate; to be called on the event loop."""
        self._rotation.start()

    async def stop(self) -> None:
        """End what runs."""
        await self.feed.close()
        await self._rotation.stop()
        await self.revoker.stop()
        self._authenticator.close()

    # -- what others ask --------------------------------------------------------------------------------------------

    def _may_sign(self) -> None:
        self._service.revocations()
        self._service.beats.check_clock()

    def _kid_revoked(self, kid: str) -> bool:
        return self._service.mirror.snapshot.find(issuer=self._settings.issuer, kid=kid) is not None

    def look_for_kids(self, entries: list[Entry]) -> None:
        """A revoked key of this region is replaced at once, not at the next tick."""
        mine = {kid for kid, record in self.ring.records.items() if record.region == self._settings.region}
        if any(entry.kind == "kid" and entry.value in mine for entry in entries):
            self._rotation.wake()

    def reasons(self) -> dict[str, bool]:
        """What keeps this instance from signing or serving keys, by name."""
        found = {"keys_unavailable": self.ring.document is None}
        try:
            self.ring.signing_key()
        except SigningUnavailable as error:
            found[error.code] = True
        return found

    def warnings(self) -> dict[str, bool]:
        """What is wrong and keeps this instance from nothing, by name."""
        return {
            "private_key_missing": bool(self.ring.missing_private),
            "key_set_not_taken": self.ring.refused is not None,
            self.rotator.problem or "": self.rotator.problem is not None,
        }
