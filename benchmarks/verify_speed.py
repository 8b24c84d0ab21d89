"""How long one verification takes, beside other libraries and the bare signature check, in one run.

    python -m benchmarks.verify_speed [--json]

Everyone verifies the same token with every check they have: signature, exp, iat, iss, aud. Rounds are interleaved and
the median of the rounds is compared, so that a slow moment of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import jwt
import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import RSAKey

from verifier import Verifier
from verifier.testing import SigningKey, StaticKeys, StaticRevocations, make_key, sign
from verifier.token import parse

ISSUER, AUDIENCE = "https://id.bench.test", "orders"
ROUNDS = 9
ROUND_S = 0.15


def _token(key: SigningKey) -> str:
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "user-1234567890",
        "jti": "0192f0c1-7b0e-7cc3-98c4-dc0c0c07398f",
        "sid": "0192f0c1-7b0e-7cc3-98c4-dc0c0c07398e",
        "client_id": "web",
        "scope": "orders:read orders:write",
    }
    return sign(key, claims)


def _started(keys: StaticKeys, cache_size: int) -> Verifier:
    verifier = Verifier(
        issuer=ISSUER,
        audience=AUDIENCE,
        jwks_urls=None,
        jwks=keys.jwks,
        redis_url=StaticRevocations(),
        token_cache_size=cache_size,
    )
    return verifier.start()


def contestants() -> dict[str, Callable[[], object]]:
    """Name to one verification."""
    key = make_key()
    keys = StaticKeys(key)
    token = _token(key)
    public = key.private.public_key()
    parsed = parse(token)
    pkcs1, sha256 = padding.PKCS1v15(), hashes.SHA256()
    warm, cold = _started(keys, 10_000), _started(keys, 0)
    rsa_key = RSAKey.import_key(dict(key.jwk))
    registry = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": AUDIENCE}, exp={"essential": True}
    )
    raw_token = token.encode()

    def joserfc() -> None:
        registry.validate(joserfc_jwt.decode(token, rsa_key, algorithms=["RS256"]).claims)

    return {
        "bare signature check (pyca)": lambda: public.verify(parsed.signature, parsed.signing_input, pkcs1, sha256),
        "verifier, warm": lambda: warm.verify(token),
        "verifier, warm, fresh string": lambda: warm.verify(raw_token.decode()),
        "verifier, cold": lambda: cold.verify(token),
        "PyJWT, key object": lambda: jwt.decode(token, public, algorithms=["RS256"], audience=AUDIENCE, issuer=ISSUER),
        "joserfc, key object": joserfc,
    }


def _once(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats * 1e6


def measure() -> dict[str, float]:
    """Name to median microseconds."""
    calls = contestants()
    repeats = {name: max(10, int(ROUND_S * 1e6 / _once(call, 20))) for name, call in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(_once(call, repeats[name]))
    return {name: statistics.median(values) for name, values in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    medians = measure()
    pyjwt, raw = medians["PyJWT, key object"], medians["bare signature check (pyca)"]
    if as_json:
        sys.stdout.write(msgspec.json.encode({"median_us": medians}).decode() + "\n")
        return
    print(f"{'median of ' + str(ROUNDS) + ' rounds':32} {'µs':>9} {'× bare':>8} {'PyJWT ÷ it':>11}")
    for name, value in medians.items():
        print(f"{name:32} {value:9.2f} {value / raw:8.2f} {pyjwt / value:11.1f}")


if __name__ == "__main__":
    main()
