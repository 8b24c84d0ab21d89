"""Whose tokens a verifier takes: each issuer with its own rules and its own keys, none of which counts for another.

:class:`Issuer` is the setting; :class:`IssuerKeys` is what a running verifier holds for one: its rules, the client that
fetches its keys, and the :class:`~verifier.decision.Trust` made of both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .decision import Rules, Trust
from .errors import ConfigurationError
from .jwk import KeySet
from .jwks_client import JwksClient
from .keys import KeysView
from .settings import Secret, build_rules, check_jwks_urls, invalid, local_keys, seconds
from .status import IssuerStatus

__all__ = ["Issuer", "IssuerKeys", "IssuerSettings", "check_issuer", "named_issuers"]

_FAR = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """One of several issuers of a :class:`~verifier.Verifier`; the parameters are those of the verifier.

    ``issuer`` is the exact ``iss`` of its tokens (None, any, only where it is the one issuer). ``audience`` and
    ``jwks_urls`` must be named; None skips one.
    """

    issuer: str | None
    audience: str | Sequence[str] | None
    jwks_urls: Sequence[str] | None
    jwks: Mapping[str, Any] | bytes | None = None
    algorithms: Sequence[str] = ("RS256",)
    hs256_secrets: Sequence[Secret] = field(default=(), repr=False)
    hs256_until: float | None = None


def named_issuers(issuers: Sequence[Issuer] | None, alone: Mapping[str, Any]) -> list[Issuer]:
    """``issuers``, or the one that ``alone`` describes; raises :class:`ConfigurationError`."""
    if issuers is None:
        for name in ("issuer", "audience", "jwks_urls"):
            if name not in alone:
                message = f"{name}: name it (None said aloud does without), or give issuers=[Issuer(...)]"
                raise ConfigurationError("setting_missing", message, setting=name)
        return [Issuer(**alone)]
    twice = sorted(name for name, value in alone.items() if value and value != ("RS256",))
    if twice:
        raise invalid(twice[0], "is said in each Issuer(...) of issuers, not beside them")
    if isinstance(issuers, Issuer) or not issuers or not all(isinstance(each, Issuer) for each in issuers):
        raise invalid("issuers", "expected a list of Issuer(...)")
    names = [each.issuer for each in issuers]
    if not all(isinstance(name, str) and name for name in names):
        raise invalid("issuers", "each needs the exact iss of its tokens")
    if len(set(names)) != len(names):
        raise invalid("issuers", "one iss is named twice; give its audiences and URLs in one Issuer(...)")
    return list(issuers)


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerSettings:
    """One issuer's rules and where its keys come from, checked."""

    rules: Rules
    urls: tuple[str, ...]
    initial: KeySet | None
    source_address: str | None
    keys_max_age_s: float


def check_issuer(
    issuer: Issuer, *, allow_insecure_http: bool, source_address: str | None, keys_max_age_s: float, **times: Any
) -> IssuerSettings:
    """Check one issuer's settings with those that all share; raises :class:`ConfigurationError`."""
    rules = build_rules(
        issuer=issuer.issuer,
        audience=issuer.audience,
        algorithms=issuer.algorithms,
        hs256_secrets=issuer.hs256_secrets,
        hs256_until=issuer.hs256_until,
        **times,
    )
    urls = check_jwks_urls(issuer.jwks_urls, allow_insecure_http)
    initial = local_keys(issuer.jwks)
    if not urls and initial is None and not rules.hs256_keys:
        message = "no source of keys: name jwks_urls, jwks or hs256_secrets"
        raise ConfigurationError("setting_missing", message, setting="jwks_urls")
    return IssuerSettings(
        rules=rules,
        urls=urls,
        initial=initial,
        source_address=source_address,
        keys_max_age_s=seconds("keys_max_age_s", keys_max_age_s),
    )


class IssuerKeys:
    """One issuer at run time. ``client`` is None where no URL is named; ``on_change()`` follows every fetch."""

    def __init__(self, settings: IssuerSettings, on_change: Callable[[], None]) -> None:
        self.rules = settings.rules
        self._keys_max_age_s = settings.keys_max_age_s
        self._local = self._seen = KeysView(settings.initial)
        self._trust = Trust(settings.rules, settings.initial)
        self._refreshing: asyncio.Task[None] | None = None
        self.client: JwksClient | None = None
        if settings.urls:
            self.client = JwksClient(
                settings.urls,
                initial=settings.initial,
                source_address=settings.source_address,
                on_change=lambda _view: on_change(),
            )

    @property
    def view(self) -> KeysView:
        """The keys held now, and how old they are."""
        return self._local if self.client is None else self.client.view

    @property
    def is_behind(self) -> bool:
        """True if a fetch succeeded since :meth:`renew`."""
        return self.view is not self._seen

    def renew(self) -> Trust:
        """The trust of the keys held now: the same one as long as they are. One thread at a time."""
        view = self._seen = self.view
        if view.keys is not self._trust.keys:
            self._trust = Trust(self.rules, view.keys)
        if self.client is not None:
            self._trust.until_mono = 0.0 if view.fetched_mono is None else view.fetched_mono + self._keys_max_age_s
        return self._trust

    def too_old(self, view: KeysView, mono: float) -> bool:
        """True if no fetch succeeded for longer than ``keys_max_age_s``."""
        return view.fetched_mono is None or mono >= view.fetched_mono + self._keys_max_age_s

    @property
    def until_mono(self) -> float:
        """When the keys held become too old, monotonic seconds."""
        return _FAR if self.client is None else self._trust.until_mono

    async def refresh_off_loop(self, timeout_s: float) -> None:
        """Wait for newer keys together with whoever else on this loop does: forged kids must not use its threads up."""
        loop, waiting = asyncio.get_running_loop(), self._refreshing
        if self.client is not None and (waiting is None or waiting.done() or waiting.get_loop() is not loop):
            waiting = self._refreshing = loop.create_task(asyncio.to_thread(self.client.refresh, timeout_s))
        if waiting is not None:
            await asyncio.shield(waiting)

    def status(self, mono: float) -> IssuerStatus:
        """What is held now, at monotonic time ``mono``."""
        view = self.view
        return IssuerStatus(
            issuer=self.rules.issuer,
            keys=() if view.keys is None else view.keys.kids,
            age_s=None if view.fetched_mono is None else mono - view.fetched_mono,
            generation=None if view.generation is None else str(view.generation),
        )
