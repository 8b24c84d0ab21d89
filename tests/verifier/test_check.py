"""``explain`` and ``python -m verifier check``: the decision's own verdict, told step by step, with nothing leaked."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.verifier.feed_server import GOOD, feeding
from tests.verifier.http_server import JwksServer, free_port
from tests.verifier.support import (
    AUDIENCE,
    ISSUER,
    NOW,
    SECRET,
    Mirrored,
    live_token,
    make_verifier,
    raw_token,
    token_of,
)
from tests.verifier.valkey import PASSWORD, Primary, live, running
from verifier import InvalidToken, Issuer, RevokedToken, Undecidable, Verifier
from verifier.__main__ import main
from verifier.check import STEPS, explain
from verifier.decision import Trust
from verifier.errors import CODES
from verifier.testing import ManualClock, SigningKey, StaticKeys, StaticRevocations


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


# -- the same as verify, whatever the token ----------------------------------------------------------------------------

HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "alg": st.sampled_from([None, "none", 3, "HS256", "RS384"]),
        "typ": st.sampled_from(["JWT", "logout+jwt", 1]),
        "kid": st.sampled_from([None, "", "nobody's", 7, "k" * 300]),
        "crit": st.just(["b64"]),
    },
)
CLAIMS = st.fixed_dictionaries(
    {},
    optional={
        "iss": st.sampled_from([None, 1, "https://elsewhere.test", "https://nowhere.test"]),
        "aud": st.sampled_from([None, "elsewhere", [AUDIENCE], 3]),
        "exp": st.sampled_from([None, True, NOW - 1000, NOW + 10**6]),
        "iat": st.sampled_from([None, "x", NOW + 1000]),
        "nbf": st.just(NOW + 500),
        "jti": st.sampled_from(["revoked", 4, ""]),
        "after": st.just(3),
    },
)
DAMAGE: dict[str, Callable[[str], str]] = {
    "none": lambda token: token,
    "another signature": lambda token: token[:-8] + "AAAAAAAA",
    "padding": lambda token: token + "=",
    "no signature": lambda token: token.rpartition(".")[0],
}


def for_one(key: SigningKey, other: SigningKey) -> Verifier:
    mirrored = Mirrored(key, hs256_secrets=[SECRET])
    mirrored.revoke("jti", "revoked")
    return mirrored.verifier


def for_one_after_cut_offs(key: SigningKey, other: SigningKey) -> Verifier:
    mirrored = Mirrored(key, hs256_secrets=[SECRET], hs256_until=NOW - 5)
    mirrored.revoke("kid", other.kid)
    return mirrored.verifier


def for_several(key: SigningKey, other: SigningKey) -> Verifier:
    clock = ManualClock(NOW)
    revocations = StaticRevocations(clock=clock)
    revocations.revoke("jti", "revoked", issuer=ISSUER)
    issuers = [
        Issuer(issuer=issuer, audience=AUDIENCE, jwks_urls=None, jwks=StaticKeys(each).jwks, hs256_secrets=[SECRET])
        for issuer, each in ((ISSUER, key), ("https://elsewhere.test", other))
    ]
    return Verifier(issuers=issuers, redis_url=revocations, clock=clock).start()


def refusal_or_none(verifier: Verifier, token: str) -> InvalidToken | None:
    try:
        verifier.verify(token)
    except InvalidToken as error:
        return error
    return None


@pytest.mark.parametrize("made", [for_one, for_one_after_cut_offs, for_several])
@given(
    header=HEADERS, claims=CLAIMS, signer=st.sampled_from(["key", "other", "secret"]), damage=st.sampled_from([*DAMAGE])
)
def test_an_explanation_accepts_what_verify_accepts_and_refuses_at_its_step_with_its_code(
    key: SigningKey,
    other_key: SigningKey,
    made: Callable[[SigningKey, SigningKey], Verifier],
    header: dict[str, Any],
    claims: dict[str, Any],
    signer: str,
    damage: str,
) -> None:
    signers: dict[str, SigningKey | str] = {"key": key, "other": other_key, "secret": SECRET}
    token = DAMAGE[damage](token_of(signers[signer], header=header, **claims))
    verifier = made(key, other_key)
    told = verifier.explain(token)
    refused = [(step.step, step.code) for step in told.steps if step.verdict == "refused"]
    error = refusal_or_none(verifier, token)
    if error is None:
        assert (told.outcome, told.code, refused) == ("accepted", "accepted", [])
    else:
        assert (told.outcome, told.code) == ("refused", error.code)
        assert (error.step, error.code) in refused


def test_json_that_is_not_strict_is_refused_at_the_first_step(key: SigningKey) -> None:
    told = make_verifier(key).explain(raw_token(key, payload=b'{"a":1,"a":2}'))
    assert [(step.step, step.code) for step in told.steps if step.verdict == "refused"] == [(1, "token_json_invalid")]
    assert {step.verdict for step in told.steps[1:]} == {"not judged"}


def test_a_key_that_is_gone_because_it_was_revoked_is_told_at_the_last_step(
    key: SigningKey, other_key: SigningKey
) -> None:
    mirrored = Mirrored(key)
    mirrored.revoke("kid", other_key.kid)
    token = token_of(other_key)
    with pytest.raises(RevokedToken):
        mirrored.verifier.verify(token)
    told = mirrored.verifier.explain(token)
    assert (told.code, told.reason) == ("token_revoked", "kid")
    assert (told.steps[5].verdict, told.steps[5].code, told.steps[5].unverified) == ("refused", "token_revoked", True)


def test_what_is_undecidable_is_neither_passed_nor_refused(key: SigningKey) -> None:
    unsynced = Mirrored(key, synced=False)
    told = unsynced.verifier.explain(token_of(key))
    assert (told.outcome, told.code, told.accepted) == ("undecidable", "never_synced", False)
    assert [step.verdict for step in told.steps] == ["passed"] * 5 + ["not judged"]
    assert told.claims_verified
    expired = unsynced.verifier.explain(token_of(key, iat=NOW - 2000, exp=NOW - 1000))
    assert (expired.outcome, expired.code) == ("refused", "token_expired")

    stale = Mirrored(key, on_stale="deny")
    stale.clock.advance(600)
    with pytest.raises(Undecidable) as caught:
        stale.verifier.verify(token_of(key))
    told = stale.verifier.explain(token_of(key))
    assert (told.code, told.reason) == ("revocations_stale", caught.value.reason)


def test_without_keys_nothing_of_the_claims_is_verified(key: SigningKey) -> None:
    with make_verifier(jwks_urls=[f"http://127.0.0.1:{free_port()}/jwks.json"]) as verifier:
        told = verifier.explain(token_of(key))
    assert (told.outcome, told.code) == ("undecidable", "keys_unavailable")
    assert [step.verdict for step in told.steps] == ["passed"] * 2 + ["not judged"] * 2 + ["passed", "not judged"]
    assert (told.steps[4].unverified, told.claims_verified) == (True, False)


def test_no_observer_hears_of_an_explanation(key: SigningKey) -> None:
    heard: list[object] = []

    class Listening:
        def decided(self, decision: object) -> None:
            heard.append(decision)

    make_verifier(key, observer=Listening()).explain(token_of(key))
    assert heard == []


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


# -- the command, in this process -------------------------------------------------------------------------------------

Checked = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checked:
    """Exit code, standard output and standard error of the command, given a token on standard input."""

    def run(*arguments: str, token: str | bytes = b"") -> tuple[int, str, str]:
        raw = token if isinstance(token, bytes) else token.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        try:
            exited = main(arguments)
        except SystemExit as error:
            exited = int(error.code or 0)
        return exited, *capsys.readouterr()

    return run


def test_revocations_come_from_a_server_with_the_password_of_the_environment(
    key: SigningKey, jwks_file: str, run_dir: Path, checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
    with running(run_dir) as server, server.client() as client:
        primary = Primary(client)
        primary.append(*live("jti", ["t-1"]))
        primary.beat()
        redis = ["--redis", f"unix://{server.socket}", "--timeout-s", "60"]
        exited, out, err = checked("check", "-", *common(jwks_file), *redis, token=live_token(key))
        assert (exited, "✗ 6 revocation token_revoked" in out, "reason jti" in out) == (1, True, True), out + err
        assert "revocations: 1 held" in out
        exited, out, err = checked("check", "-", *common(jwks_file), *redis, token=live_token(key, jti="t-2"))
        assert (exited, "✓ 6 revocation passed" in out) == (0, True), out + err
        told = json.loads(checked("check", "-", *common(jwks_file), *redis, "--json", token=live_token(key))[1])
        assert (told["outcome"], told["code"], told["reason"]) == ("refused", "token_revoked", "jti")
        assert (told["revocations"]["source"], told["revocations"]["entries"]) == (True, 1)
        assert PASSWORD not in out + err


def test_revocations_come_from_a_feed_with_the_token_of_the_environment(
    key: SigningKey, jwks_file: str, run_dir: Path, checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERIFIER_FEED_TOKEN", GOOD)
    with running(run_dir) as server, server.client() as client:
        primary = Primary(client)
        primary.append(*live("sid", ["s-1"]))
        primary.beat()
        with feeding(server) as feed:
            source = ["--feed", feed.url, "--timeout-s", "60"]
            exited, out, err = checked("check", "-", *common(jwks_file), *source, token=live_token(key, sid="s-1"))
    assert (exited, "✗ 6 revocation token_revoked" in out) == (1, True), out + err
    assert GOOD not in out + err


def test_keys_that_do_not_come_decide_nothing(key: SigningKey, checked: Checked) -> None:
    server = JwksServer(key)
    server.gate.clear()  # connected, and no answer
    try:
        exited, out, _ = checked("check", "-", *common(server.url), "--timeout-s", "0.1", token=live_token(key))
    finally:
        server.close()
    assert (exited, out.splitlines()[-1].startswith("undecidable: keys_unavailable")) == (3, True), out


def test_what_needs_no_keys_is_decided_without_them(key: SigningKey, checked: Checked, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    nowhere = [*common(f"http://127.0.0.1:{free_port()}/jwks.json"), "--timeout-s", "0.1"]
    legacy = ["--hs256-secret-file", str(secret)]
    assert checked("check", "-", *nowhere, *legacy, token=live_token(SECRET))[0] == 0
    assert checked("check", "-", *nowhere, token="a.b")[0] == 1
    alone = ["--issuer", ISSUER, "--audience", AUDIENCE, *legacy]
    assert checked("check", "-", *alone, token=live_token(SECRET))[0] == 0


def test_a_key_that_may_be_newer_than_the_set_is_not_called_unknown(
    key: SigningKey, other_key: SigningKey, checked: Checked
) -> None:
    server = JwksServer(key)
    fresh = live_token(other_key, iat=int(time.time()) + 25)
    old = live_token(other_key, iat=int(time.time()) - 600)
    try:
        exited, out, _ = checked("check", "-", *common(server.url), "--timeout-s", "60", token=fresh)
        assert (exited, "– 3 key" in out, "undecidable: keys_behind" in out) == (3, True, True), out
        exited, out, _ = checked("check", "-", *common(server.url), "--timeout-s", "60", token=old)
        assert (exited, "✗ 3 key        kid_unknown" in out) == (1, True), out
    finally:
        server.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["{it}"],
        ["check"],
        ["check", "-", "{it}"],
        ["check", "-", "--jwks", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--unknown", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--leeway-s", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--algorithm", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--hs256-secret-file", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--redis", "{it}"],
        ["check", "-", "--jwks", "https://id.test", "--feed", "https://user:{it}@id.test"],
        ["check", "@{it}", "--jwks", "https://id.test"],
        ["check", "-", "--{it}"],
        ["check", "-", "--jwks={it}", "--claims=yes"],
    ],
)
def test_wrong_usage_repeats_nothing_that_could_be_a_token(arguments: list[str], checked: Checked) -> None:
    mistaken = token_of(SECRET)
    exited, out, err = checked(*(each.format(it=mistaken) for each in arguments))
    assert (exited, out) == (2, "")
    assert mistaken[:20] not in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(("python -m verifier", "verifier: error"))


@pytest.mark.parametrize("wait", ["inf", "nan", "-1"])
def test_an_impossible_wait_is_wrong_usage(jwks_file: str, checked: Checked, wait: str) -> None:
    exited, out, err = checked("check", "-", *common(jwks_file), f"--timeout-s={wait}", token="a.b")
    assert (exited, out, "timeout_s" in err) == (2, "", True)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe.\x00", b"a" * 100_000])
def test_whatever_comes_from_standard_input_is_a_token_that_is_refused(
    jwks_file: str, checked: Checked, raw: bytes
) -> None:
    assert checked("check", "-", *common(jwks_file), token=raw)[0] == 1


def test_a_strangers_claims_do_not_steer_a_terminal_and_are_labelled(
    key: SigningKey, jwks_file: str, checked: Checked
) -> None:
    token = live_token(key, sub="\u009b31m\u202e\u001b[2J")
    exited, out, _ = checked("check", "-", *common(jwks_file), "--claims", token=token)
    assert (exited, "\\u009b31m\\u202e\\u001b[2J" in out) == (0, True)
    assert not any(sign in out for sign in "\u009b\u202e\u001b")
    assert "UNVERIFIED" not in out
    exited, out, _ = checked("check", "-", *common(jwks_file), "--claims", token=token[:-8] + "AAAAAAAA")
    assert (exited, "claims, UNVERIFIED" in out) == (1, True)


def test_a_terminal_without_these_signs_gets_plain_ones(key: SigningKey, jwks_file: str) -> None:
    told = check("-", *common(jwks_file), token=live_token(key), PYTHONIOENCODING="ascii")
    assert (told.returncode, told.stdout[:9]) == (0, "+ 1 parse"), told.stderr
