"""The recording verifier as a process: what it is told, what it tells, and that it never outlives its harness."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from regions.errors import NotReady, ServerStartFailed
from regions.recorder import Recorder
from regions.recorder.events import Command, Stop, Watch
from regions.recorder.process import read_commands
from verifier.testing import sign

SECRET = "a secret of the tests that has more than 32 bytes"
WITHIN_S = 60.0


def environment(**changes: str) -> dict[str, str]:
    """A verifier of HS256 tokens alone, without any server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VERIFIER_", "REDIS_", "JWT_"))}
    return {
        **kept,
        "VERIFIER_ISSUER": "https://id.test",
        "VERIFIER_AUDIENCE": "orders",
        "VERIFIER_JWKS_URLS": "none",
        "VERIFIER_REDIS_URL": "none",
        "VERIFIER_REGION": "eu",
        "JWT_SECRET": SECRET,
        **changes,
    }


def token(**claims: object) -> str:
    return sign(SECRET, {"iss": "https://id.test", "aud": "orders", "sub": "ada", "jti": "1", **claims})


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    with Recorder("eu#1", "eu", environment(), tmp_path / "recorder.log") as running:
        running.wait_ready(WITHIN_S)
        yield running


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    listing = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False).stdout
    return listing.strip() != "" and not listing.startswith("Z")


def test_recorder_tells_each_token_s_verdict_with_times_of_this_machine_s_clock(recorder: Recorder) -> None:
    before, wall = time.monotonic(), time.time()
    recorder.watch("good", token())
    recorder.watch("bad", token(aud="other"))
    good = recorder.wait_for("good", "accepted", WITHIN_S)
    bad = recorder.wait_for("bad", "invalid", WITHIN_S)
    assert before < good.first_mono < time.monotonic()
    assert wall - 1 < good.first_wall < time.time() + 1
    assert (bad.code, bad.reason) == ("claim_invalid", "aud")
    assert recorder.started is not None
    assert (recorder.started.region, recorder.started.on_stale, recorder.started.pid) == ("eu", "allow", recorder.pid)


def test_report_brings_the_last_acceptance_up_to_date(recorder: Recorder) -> None:
    recorder.watch("good", token())
    recorder.wait_for("good", "accepted", WITHIN_S)
    since = time.monotonic()

    def accepted_since() -> bool:
        recorder.report(WITHIN_S)
        return (recorder.last_accept("good") or 0.0) > since

    wait_until(accepted_since)
    assert recorder.first_refusal("good") is None
    assert [run.name for run in recorder.events] == ["good"]


def test_token_that_is_not_watched_any_more_is_not_verified(recorder: Recorder) -> None:
    recorder.watch("good", token())
    recorder.wait_for("good", "accepted", WITHIN_S)
    recorder.unwatch("good")
    recorder.report(WITHIN_S)
    (ended,) = recorder.runs["good"]
    recorder.watch("other", token(jti="2"))
    recorder.wait_for("other", "accepted", WITHIN_S)
    recorder.report(WITHIN_S)
    assert recorder.runs["good"] == (ended,)


def test_policy_bounds_staleness_at_each_verification(recorder: Recorder) -> None:
    recorder.watch("good", token())
    recorder.wait_for("good", "accepted", WITHIN_S)
    recorder.policy(2.0)
    stale = recorder.wait_for("good", "undecidable", WITHIN_S)
    assert (stale.code, stale.reason, stale.may_deny) == ("revocations_stale", "no_mirror", True)
    recorder.policy(None)
    assert recorder.wait_for("good", "accepted", WITHIN_S).may_deny is False


def test_pace_bounds_the_verifications(recorder: Recorder) -> None:
    recorder.pace(20.0, 10.0)
    for number in range(50):
        recorder.watch(f"token-{number}", token(jti=str(number)))
    recorder.report(WITHIN_S)
    started, seen = time.monotonic(), sum(run.count for run in recorder.events)
    recorder.wait_for("token-49", "accepted", WITHIN_S)
    recorder.report(WITHIN_S)
    took_s, count = time.monotonic() - started, sum(run.count for run in recorder.events) - seen
    assert count + seen >= 49
    assert count <= 20.0 * took_s + 4  # what two rounds were owed


def test_name_belongs_to_one_token(recorder: Recorder) -> None:
    recorder.watch("good", token())
    with pytest.raises(ValueError, match="good"):
        recorder.watch("good", token(jti="2"))


def test_wait_for_says_what_it_found_instead(recorder: Recorder) -> None:
    recorder.watch("good", token())
    recorder.wait_for("good", "accepted", WITHIN_S)
    with pytest.raises(NotReady, match=r"eu#1 does not find good revoked .*verdict='accepted'"):
        recorder.wait_for("good", "revoked", 0.1)


def test_close_tells_everything_first(tmp_path: Path) -> None:
    with Recorder("eu#1", "eu", environment(), tmp_path / "recorder.log") as recorder:
        recorder.watch("good", token())
        first = recorder.wait_for("good", "accepted", WITHIN_S)
        samples = len(recorder.samples)
        wait_until(lambda: len(recorder.samples) > samples + 1)  # rounds went by
    assert recorder.runs["good"][0].count > first.count
    assert recorder.stopped is not None
    assert recorder.stopped.verifications == recorder.runs["good"][0].count
    recorder.close()
    recorder.check()


def test_recorder_that_dies_by_itself_is_an_error_with_the_end_of_its_log(recorder: Recorder) -> None:
    os.kill(recorder.pid, signal.SIGKILL)
    wait_until(lambda: not recorder.running)
    with pytest.raises(ServerStartFailed, match="eu#1 ended"):
        recorder.watch("good", token())


def test_wrong_setting_is_named_in_the_error(tmp_path: Path) -> None:
    wrong = environment(VERIFIER_MAX_STALENESS_S="soon")
    with (
        Recorder("eu#1", "eu", wrong, tmp_path / "recorder.log") as recorder,
        pytest.raises(ServerStartFailed, match="VERIFIER_MAX_STALENESS_S"),
    ):
        recorder.wait_ready(WITHIN_S)


def test_recorder_ends_when_its_harness_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from regions.recorder import Recorder; import os\n"
        "recorder = Recorder('eu#1', 'eu', dict(os.environ), Path(sys.argv[1])).start(); recorder.wait_ready()\n"
        "print(recorder.pid, flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", program, str(tmp_path / "recorder.log")]
    harness = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, text=True)
    assert harness.stdout is not None
    pid = int(harness.stdout.readline())
    assert runs(pid)
    harness.kill()
    harness.wait()
    harness.stdout.close()
    wait_until(lambda: not runs(pid))


def test_line_that_is_no_command_ends_the_commands_and_shows_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    good, bad = (b'{"op":"watch","name":%s,"token":"eyJ0.secret"}\n' % name for name in (b'"t"', b"7"))
    read_commands(BytesIO(good + bad + b'{"op":"stop"}\n'), commands)
    assert commands.get() == Watch("t", "eyJ0.secret")
    assert commands.get() is None
    assert commands.empty()
    assert "secret" not in capsys.readouterr().err + repr(Watch("t", "eyJ0.secret"))
    read_commands(BytesIO(b'{"op":"stop"}\n'), commands)
    assert commands.get() == Stop()
