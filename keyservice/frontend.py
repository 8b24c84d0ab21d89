"""What an API instance has and a keeper has not: keys to sign with, tokens, sessions, and the HTTP routes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.types import ASGIApp

from verifier.jwk import HmacKey, KeySet
from verifier.log import Entry

from .api import (
    admin_clients,
    admin_keepers,
    admin_keys,
    admin_revocations,
    admin_sessions,
    discovery,
    feed,
    oauth,
    tokens,
)
from .api.client_auth import ClientAuth
from .api.jwks import JwksFirst
from .assertions import Assertions
from .bearer import AdminBearer
from .clients import Authenticator, Clients
from .compromising import Compromiser
from .ending import SessionEnd
from .envelope import Kek
from .errors import KeySetUnavailable, SigningUnavailable, StartError
from .evidence import Evidence, read_evidence
from .feed import Feed
from .granting import Granting
from .introspection import Introspector
from .issuing import Issuer, SharedSecret
from .jobs import RotationJob
from .keyring import Document, Keyring
from .limits import KEYS_SILENCE_MAX_S
from .own_tokens import OwnTokens
from .registry import ClientRegistry
from .revoking import Revoker
from .rotator import Rotator
from .sessions import SessionStore
from .token_revocation import TokenRevocation
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
            regions=service.receipts.regions,
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
        self._compromiser = Compromiser(
            service.own,
            service.trust,
            self.revoker,
            region=settings.region,
            regions=service.receipts.regions,
            tick=self.rotator.tick,
            refresh=self._rotation.wake,
            clock=service.clock,
        )
        self.feed = Feed(service.own, service.metrics)
        self.registry = ClientRegistry(clients, service.primary, service.own, clock=service.clock)
        self._authenticator = Authenticator(self.registry)
        self._build_tokens()
        self._build_shown_tokens()

    def _build_tokens(self) -> None:
        service, settings = self._service, self._settings
        secret = settings.jwt_secret
        issuer = Issuer(
            settings.issuer,
            settings.access_token_ttl_s,
            clock=service.clock,
            signing_key=self.ring.signing_key,
            gate=self._may_sign,
            lifetime_max_s=self._lifetime_max_s,
            shared_secret=SharedSecret(secret.get_secret_value()) if secret is not None else None,
        )
        self._sessions = SessionStore(service.primary, service.own, grace_s=settings.refresh_grace_s)
        self._end = SessionEnd(
            self.revoker,
            self._sessions,
            settings.revocation_policy,
            session_life_s=settings.session_life_s,
            clock=service.clock,
        )
        self._granting = Granting(
            issuer,
            self._sessions,
            self._end,
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
            keys=self._keys,
            snapshot=service.revocations,
        )

    def _build_shown_tokens(self) -> None:
        """What takes tokens that others were given: to introspect and to revoke them."""
        service = self._service
        self._client_auth = ClientAuth(
            self._authenticator,
            Assertions(
                self.registry,
                self._assertion_audiences(),
                service.primary,
                service.metrics,
                leeway_s=self._settings.leeway_s,
                clock=service.clock,
                primary_answers=lambda: service.beats.problem is None,
            ),
        )
        self._introspector = Introspector(
            self._own_tokens(self._settings.max_skew_s),
            service.metrics,
            clock=service.clock,
            view=lambda: service.mirror.view,
            gate=self._may_judge,
            is_fresh=service.is_fresh,
            allow_stale=self._settings.introspect_on_stale == "allow",
        )
        self._token_revocation = TokenRevocation(
            self._own_tokens(self._settings.leeway_s),
            self._sessions,
            self._end,
            self.revoker,
            view=lambda: service.mirror.view,
        )

    def _own_tokens(self, leeway_s: float) -> OwnTokens:
        settings, secret = self._settings, self._settings.jwt_secret
        return OwnTokens(
            issuer=settings.issuer,
            leeway_s=leeway_s,
            max_token_lifetime_s=settings.max_token_lifetime_s,
            hs256_keys=() if secret is None else (HmacKey.from_secret(secret.get_secret_value().encode()),),
            clock=self._service.clock,
            keys=self._keys,
            is_fresh=self._service.is_fresh,
        )

    def _assertion_audiences(self) -> tuple[str, str]:
        issuer = self._settings.issuer
        return issuer, str(discovery.metadata(issuer)["token_endpoint"])

    def _keys(self) -> KeySet | None:
        return self.ring.document.keys if self.ring.document is not None else None

    # -- routes -----------------------------------------------------------------------------------------------------

    def public_routers(self) -> tuple[APIRouter, ...]:
        """For anybody."""
        settings = self._settings
        return (
            oauth.router(self._client_auth, self._granting, self._service.metrics),
            tokens.router(self._client_auth, self._introspector, self._token_revocation),
            discovery.router(settings.issuer, settings.jwks_max_age_s),
            feed.router(self._bearer, self.feed),
        )

    def admin_routers(self) -> tuple[APIRouter, ...]:
        """For administration."""
        return (
            admin_sessions.router(
                self._bearer,
                self.registry,
                self._granting,
                self._end,
                clock=self._service.clock,
            ),
            admin_clients.router(
                self._bearer,
                self.registry,
                self._authenticator,
                hs256=self._settings.jwt_secret is not None,
                clock=self._service.clock,
            ),
            admin_revocations.router(self._bearer, self.revoker),
            admin_keys.router(
                self._bearer, self.ring, self.rotator, self._compromiser, self._settings, refresh=self._rotation.wake
            ),
            admin_keepers.router(self._bearer, self._service.trust, self._own_evidence, self._primary_evidence),
        )

    def in_front(self, app: ASGIApp) -> ASGIApp:
        """The key set is answered before any routing."""
        first = JwksFirst(app, self.served, self._settings.jwks_max_age_s)
        return discovery.UnderIssuerPath(first, self._settings.issuer)

    def served(self) -> Document:
        """The key set to serve now; raises :class:`KeySetUnavailable`.

        None of an instance that may hold an older one than its region says it serves, nor of a region for which others
        no longer wait before they sign with a new key.
        """
        document, silence_s = self.ring.document, self._service.poll.silence_s
        if document is None:
            raise KeySetUnavailable("keys_unavailable", "no key has been published yet")
        if silence_s > KEYS_SILENCE_MAX_S:
            raise KeySetUnavailable("key_set_unconfirmed", f"the key set was last read {silence_s:.0f} s ago")
        if self._age_s() > self._settings.partition_budget_s:
            message = "this region has been cut off for longer than the partition budget; ask another one"
            raise KeySetUnavailable("partition_budget_exceeded", message)
        return document

    def _lifetime_max_s(self) -> float:
        """How long a token signed now may live: its key may have been retired since the key set was last read.

        A retired key is removed ``removal_delay_s`` later, and a token is accepted for the leeway after its ``exp``.
        """
        settings = self._settings
        longest_s = settings.rotation_policy.removal_delay_s - settings.leeway_s - settings.max_skew_s
        return longest_s - self._service.poll.silence_s

    def _age_s(self) -> float:
        """Age of the last beat that a majority of regions confirmed, or of any while none was; infinite without one."""
        now, mono = self._service.clock(), time.monotonic()
        freshness = self._service.mirror.view.freshness
        seconds = freshness.staleness(now=now, mono=mono, max_staleness_s=math.inf).seconds
        return math.inf if seconds is None else seconds

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
        self._may_judge()
        self._check_lease()

    def _may_judge(self) -> None:
        """Whether a token can be called good or expired at all: past the lease too."""
        self._service.revocations()
        self._service.beats.check_clock()

    def _check_lease(self) -> None:
        """A region that is cut off signs for the partition budget and no longer."""
        confirmed = self._service.mirror.view.freshness.confirmed is not None
        age_s, budget_s = self._age_s(), self._settings.partition_budget_s
        if not confirmed or age_s > budget_s:
            known = f"{age_s:.0f} s ago" if confirmed else "never"
            message = f"a majority of regions vouched for this one {known}, and the partition budget is {budget_s:g} s"
            raise SigningUnavailable("signing_lease_expired", message)

    def _kid_revoked(self, kid: str) -> bool:
        return self._service.mirror.snapshot.find(issuer=self._settings.issuer, kid=kid) is not None

    def look_for_kids(self, entries: list[Entry]) -> None:
        """A revoked key is served no more at once, and one of this region is replaced, not at the next tick."""
        hit = [r for e in entries if e.kind == "kid" and (r := self.ring.records.get(e.value)) is not None]
        if hit:
            self.ring.leave_out_revoked()
        if any(record.region == self._settings.region for record in hit):
            self._rotation.wake()

    def reasons(self) -> dict[str, bool]:
        """What keeps this instance from signing or serving keys, by name."""
        found: dict[str, bool] = {}
        for ask in (self.served, self.ring.signing_key, self._check_lease):
            try:
                ask()
            except (KeySetUnavailable, SigningUnavailable) as error:
                found[error.code] = True
        return found

    def warnings(self) -> dict[str, bool]:
        """What is wrong and keeps this instance from nothing, by name."""
        return {
            "private_key_missing": bool(self.ring.missing_private),
            "key_set_not_taken": self.ring.refused is not None,
            self.rotator.problem or "": self.rotator.problem is not None,
        }
