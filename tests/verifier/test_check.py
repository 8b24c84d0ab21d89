"""``explain`` and ``python -m verifier check``: the decision's own verdict, told step by step, with nothing leaked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.verifier.http_server import JwksServer, free_port
from tests.verifier.support import AUDIENCE, ISSUER, NOW, SECRET, Mirrored, live_token, make_verifier, token_of
from verifier import InvalidToken
from verifier.check import STEPS, explain
from verifier.decision import Trust
from verifier.errors import CODES
from verifier.testing import SigningKey, StaticKeys


def tokens(key: SigningKey, other: SigningKey) -> dict[str, str]:
    good = token_of(key)
    return {
        "accepted": good,
        "token_malformed": "a.b",
        "token_not_canonical": good + "=",
        "alg_not_allowed": token_of(SECRET),
        "typ_not_allowed": token_of(key, header={"typ": "logout+jwt"}),
        "crit_not_supported": token_of(key, header={"crit": ["b64"]}),
        "kid_unknown": token_of(other),
        "signature_invalid": good[:-8] + "AAAAAAAA",
        "claim_invalid": token_of(key, aud="elsewhere"),
        "claim_missing": token_of(key, iss=None),
        "token_expired": token_of(key, iat=NOW - 2000, exp=NOW - 1000),
        "token_revoked": token_of(key, jti="revoked"),
    }


def test_the_verdict_is_that_of_verify_and_the_step_that_refused_says_why(
    key: SigningKey, other_key: SigningKey
) -> None:
    mirrored = Mirrored(key)
    mirrored.revoke("jti", "revoked")
    for code, token in tokens(key, other_key).items():
        told = mirrored.verifier.explain(token)
        try:
            mirrored.verifier.verify(token)
            verdict = "accepted"
        except InvalidToken as error:
            verdict = error.code
        assert told.code == verdict == code
        assert told.accepted is (code == "accepted")
        assert tuple(step.name for step in told.steps) == STEPS
        refused = [step for step in told.steps if step.verdict == "refused"]
        assert (code in {step.code for step in refused}) is (code != "accepted")
        assert all(step.meaning == CODES[step.code or ""] for step in refused)


def test_what_nothing_vouches_for_is_labelled(key: SigningKey) -> None:
    told = make_verifier(key).explain(token_of(key, aud="elsewhere")[:-8] + "AAAAAAAA")
    verdicts = {step.name: (step.verdict, step.unverified) for step in told.steps}
    assert verdicts["signature"] == ("refused", False)
    assert verdicts["claims"] == ("refused", True)
    assert not told.claims_verified
    assert make_verifier(key).explain(token_of(key)).claims_verified


def test_an_explanation_prints_nothing_of_the_token(key: SigningKey) -> None:
    token = token_of(key, sub="somebody-in-particular")
    told = make_verifier(key).explain(token)
    assert "somebody" not in repr(told)
    assert token not in repr(told)


@given(token=st.text() | st.lists(st.text(alphabet="ab-_.=", max_size=20), max_size=4).map(".".join))
def test_anything_is_explained(token: str) -> None:
    trust = Trust(make_verifier(hs256_secrets=[SECRET])._settings[0].rules, None)
    assert not explain(token, trust, None, NOW).accepted


# -- the command ------------------------------------------------------------------------------------------------------


def check(*arguments: str, token: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verifier", "check", *arguments]
    return subprocess.run(
        command,
        check=False,
        input=token,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def jwks_file(tmp_path: Path, key: SigningKey) -> str:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(StaticKeys(key).jwks))
    return str(path)


def common(jwks: str) -> list[str]:
    return ["--jwks", jwks, "--issuer", ISSUER, "--audience", AUDIENCE]


def test_a_good_token_exits_0_with_a_line_a_step(key: SigningKey, jwks_file: str) -> None:
    token = live_token(key)
    told = check("-", *common(jwks_file), token=token + "\n")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:5]] == [
        ["✓", str(number), name] for number, name in enumerate(STEPS[:5], 1)
    ]
    assert lines[-1] == "accepted"
    assert token not in told.stdout


def test_a_refused_token_exits_1_and_names_the_code(key: SigningKey, jwks_file: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(live_token(key, aud="elsewhere"))
    told = check(f"@{path}", *common(jwks_file))
    assert told.returncode == 1
    assert "✗ 5 claims" in told.stdout
    assert told.stdout.splitlines()[-1].startswith("refused: claim_invalid")
    assert "elsewhere" not in told.stdout


def test_json_has_the_same_and_claims_only_when_asked_for(key: SigningKey, jwks_file: str) -> None:
    told = check("-", *common(jwks_file), "--json", token=live_token(key))
    document: dict[str, Any] = json.loads(told.stdout)
    assert (document["format"], document["outcome"], document["code"]) == (1, "accepted", "accepted")
    assert [step["verdict"] for step in document["steps"]] == ["passed"] * 5 + ["not judged"]
    assert "claims" not in document
    shown = json.loads(check("-", *common(jwks_file), "--json", "--claims", token=live_token(key)).stdout)
    assert (shown["claims"]["sub"], shown["claims_verified"]) == ("ada", True)


def test_keys_come_over_http_too(key: SigningKey) -> None:
    server = JwksServer(key)
    try:
        assert check("-", *common(server.url), "--timeout-s", "60", token=live_token(key)).returncode == 0
    finally:
        server.close()


def test_keys_and_revocations_that_cannot_be_had_are_undecidable(key: SigningKey, jwks_file: str) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    told = check("-", *common(f"http://{nowhere}/jwks.json"), "--timeout-s", "2", token=live_token(key))
    assert (told.returncode, "undecidable" in told.stdout) == (3, True)
    redis = check("-", *common(jwks_file), "--redis", f"redis://{nowhere}", "--timeout-s", "1", token=live_token(key))
    assert (redis.returncode, "never" in redis.stdout) == (3, True)


def test_wrong_usage_exits_2_with_one_line(jwks_file: str) -> None:
    for arguments in (["-", "--jwks", "/does/not/exist"], ["@/does/not/exist", "--jwks", jwks_file]):
        told = check(*arguments)
        assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert check().returncode == 2
    assert "standard input" in check("--help").stdout


def test_a_legacy_token_is_checked_with_a_secret_from_a_file(jwks_file: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    told = check("-", *common(jwks_file), "--hs256-secret-file", str(path), token=live_token(SECRET))
    assert told.returncode == 0, told.stdout
    assert SECRET not in told.stdout + told.stderr
