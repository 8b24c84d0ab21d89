"""The token cache beside a verifier without one: whatever happens, in any order, they answer alike."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.verifier.support import ISSUER, NOW, SECRET, make_verifier, members
from verifier import RevokedToken, Verifier
from verifier.errors import VerifierError
from verifier.testing import ManualClock, SigningKey, StaticKeys, StaticRevocations, make_key, sign

KEYS: list[SigningKey] = []
TOKENS: list[tuple[str, dict[str, Any]]] = []


def tokens() -> list[tuple[str, dict[str, Any]]]:
    """Made once a process: signing is slow."""
    if not TOKENS:
        KEYS.append(make_key())
        for number, (sub, iat, exp) in enumerate(
            [("ada", 0, 60), ("ada", 0, 900), ("eve", 20, 300), ("eve", -40, 25), ("bob", 0, 5)]
        ):
            claims = members(jti=f"t-{number}", sub=sub, sid=f"s-{sub}", iat=NOW + iat, exp=NOW + exp)
            TOKENS.append((sign(KEYS[0], claims), {**claims, "kid": KEYS[0].kid}))
        legacy = members(jti="t-9", sub="ada")
        TOKENS.append((sign(SECRET, legacy), {**legacy, "kid": "legacy"}))
    return TOKENS


def outcome(verifier: Verifier, token: str, **arguments: Any) -> str:
    try:
        verifier.verify(token, **arguments)
    except RevokedToken:
        return "token_revoked"
    except VerifierError as error:
        return error.code
    return "good"


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        on_stale=st.sampled_from(["allow", "deny"]),
        on_unsynced=st.sampled_from(["allow", "deny"]),
        synced=st.booleans(),
        size=st.sampled_from([1, 2, 3, 100]),
        ttl_s=st.sampled_from([None, 0, 7.0]),
        hs256_until=st.sampled_from([None, NOW + 30.0]),
    )
    def begin(
        self, on_stale: str, on_unsynced: str, synced: bool, size: int, ttl_s: float | None, hs256_until: float | None
    ) -> None:
        self.tokens = tokens()
        self.clock = ManualClock(NOW)
        self.revocations = StaticRevocations(clock=self.clock, synced=synced)
        settings_: dict[str, Any] = {
            "redis_url": self.revocations, "clock": self.clock, "on_stale": on_stale, "on_unsynced": on_unsynced,
            "hs256_secrets": [("legacy", SECRET)], "hs256_until": hs256_until, "jwks": StaticKeys(*KEYS).jwks,
        }  # fmt: skip
        self.cached = make_verifier(token_cache_size=size, token_cache_ttl_s=ttl_s, **settings_).start()
        self.plain = make_verifier(token_cache_size=0, **settings_).start()
        self.revoked: list[tuple[str, str, int | None]] = []

    @rule(number=st.integers(0, 5))
    def verify(self, number: int) -> None:
        token, claims = self.tokens[number]
        answer = outcome(self.cached, token)
        assert answer == outcome(self.plain, token)
        if answer == "good":
            assert not self._is_revoked(claims)

    def _is_revoked(self, claims: dict[str, Any]) -> bool:
        named = {"jti": claims["jti"], "sid": claims.get("sid"), "sub": claims["sub"], "kid": claims["kid"], "all": ""}
        return any(
            named[kind] == value and (before is None or claims["iat"] <= before) for kind, value, before in self.revoked
        )

    @rule(number=st.integers(0, 5), bound=st.sampled_from([0.0, 2.0, 60.0]))
    def verify_with_a_bound(self, number: int, bound: float) -> None:
        token, _ = self.tokens[number]
        assert outcome(self.cached, token, max_staleness_s=bound) == outcome(self.plain, token, max_staleness_s=bound)

    @rule(
        what=st.sampled_from(
            [
                ("jti", "t-1"),
                ("jti", "t-9"),
                ("jti", "nobody"),
                ("sid", "s-eve"),
                ("sub", "ada"),
                ("kid", "legacy"),
                ("all", ""),
            ]
        ),
        before=st.sampled_from([NOW - 10, NOW, NOW + 10]),
    )
    def revoke(self, what: tuple[str, str], before: int) -> None:
        kind, value = what
        cutoff = before if kind in ("sub", "all") else None
        self.revocations.revoke(kind, value, issuer=ISSUER, before=cutoff)
        self.revoked.append((kind, value, cutoff))

    @rule(seconds=st.sampled_from([0.5, 3.0, 5.0, 5.5, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(seconds=st.sampled_from([-31.0, -3.0, 3.0]))
    def the_wall_clock_steps(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(age_s=st.sampled_from([0.0, 4.0, 6.0]), confirmed=st.booleans())
    def a_beat_arrives(self, age_s: float, confirmed: bool) -> None:
        self.revocations.beat(age_s=age_s, confirmed=confirmed)

    @rule()
    def restart(self) -> None:
        self.cached.close()
        assert outcome(self.cached, self.tokens[1][0]) == "not_started"
        self.cached.start()

    @invariant()
    def the_cache_keeps_to_its_size(self) -> None:
        if hasattr(self, "cached"):
            assert self.cached.status().token_cache_entries <= 100


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
