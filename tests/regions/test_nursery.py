"""Children end with their user, however that ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regions.errors import ServerStartFailed
from regions.nursery import Child, Nursery
from regions.ports import pick_free_ports, probe

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]
"""Ignores TERM."""

PARENT_OF_SLEEPER = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(p.pid, flush=True); time.sleep(float(sys.argv[1]))",
]
"""Prints the pid of a child of its own, and ends after the given seconds, leaving that child behind."""

WAIT_S = 60.0


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # gone by now, or a system without /proc
        state = subprocess.run(
            ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
    return state[:1] not in ("", "Z")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def nursery(run_dir: Path) -> Iterator[Nursery]:
    with Nursery(run_dir / "logs", grace_s=2.0) as nursery:
        yield nursery


def test_a_child_runs_in_a_process_group_of_its_own(nursery: Nursery) -> None:
    child = nursery.spawn("sleeper", SLEEPER)
    assert child.poll() is None
    assert os.getpgid(child.pid) == child.pid != os.getpgrp()
    nursery.check()


def test_a_child_gets_the_given_environment_directory_and_a_private_umask(nursery: Nursery, run_dir: Path) -> None:
    program = "import os; print(os.environ['COLOUR'], 'HOME' in os.environ, os.getcwd()); open('made', 'w').close()"
    child = nursery.spawn("teller", [sys.executable, "-c", program], env={"COLOUR": "red"}, cwd=run_dir)
    assert child.wait(WAIT_S) == 0
    assert child.log_tail() == [f"red False {run_dir.resolve()}"]
    assert (run_dir / "made").stat().st_mode & 0o777 == 0o600
    assert child.log_path == run_dir / "logs" / "teller.log"
    assert child.log_path.stat().st_mode & 0o777 == 0o600


def test_a_child_that_dies_is_reported_with_its_name_code_and_the_end_of_its_log(nursery: Nursery) -> None:
    program = "import sys; print('first'); print('no space left', file=sys.stderr); sys.exit(7)"
    child = nursery.spawn("keyservice-2", [sys.executable, "-u", "-c", program])
    assert child.wait(WAIT_S) == 7
    with pytest.raises(ServerStartFailed) as caught:
        nursery.check()
    for part in ("keyservice-2", "exit code 7", "keyservice-2.log", "first", "no space left"):
        assert part in str(caught.value)


def test_a_child_that_dies_of_a_signal_is_reported_with_the_signal(nursery: Nursery) -> None:
    child = nursery.spawn("sleeper", SLEEPER)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(WAIT_S) == -signal.SIGKILL
    with pytest.raises(ServerStartFailed, match="signal 9"):
        nursery.check()


def test_a_child_that_was_told_to_end_is_no_error(nursery: Nursery) -> None:
    assert nursery.spawn("one", SLEEPER).terminate() == -signal.SIGTERM
    assert nursery.spawn("two", SLEEPER).kill() == -signal.SIGKILL
    nursery.check()


def test_a_death_stays_an_error_though_the_child_is_told_to_end_later(nursery: Nursery) -> None:
    child = nursery.spawn("short", [sys.executable, "-c", "raise SystemExit(3)"])
    assert child.wait(WAIT_S) == 3
    assert child.terminate() == 3
    with pytest.raises(ServerStartFailed, match="exit code 3"):
        nursery.check()


def test_a_child_that_ignores_term_is_killed_after_the_grace(nursery: Nursery) -> None:
    child = nursery.spawn("deaf", DEAF)
    child.wait_for_line("up", WAIT_S)
    assert child.terminate(grace_s=0.2) == -signal.SIGKILL


def test_a_stopped_child_can_be_continued_and_terminated(nursery: Nursery) -> None:
    child = nursery.spawn("sleeper", SLEEPER)
    child.send_signal(signal.SIGSTOP)
    assert child.terminate() == -signal.SIGTERM


def test_what_a_child_leaves_behind_ends_with_it(nursery: Nursery) -> None:
    child = nursery.spawn("parent", [*PARENT_OF_SLEEPER, "0.2"])
    assert child.wait(WAIT_S) == 0
    grandchild = int(child.log_tail()[0])
    until(lambda: not is_running(grandchild), "the grandchild is gone")


def test_a_program_that_is_not_there_is_named(nursery: Nursery) -> None:
    with pytest.raises(ServerStartFailed, match=r"ghost could not be started \(/nowhere/ghost\)"):
        nursery.spawn("ghost", ["/nowhere/ghost"])
    nursery.check()
    assert nursery.children == []


def test_a_line_is_waited_for_until_it_comes(nursery: Nursery) -> None:
    nursery.spawn("sleeper", SLEEPER).wait_for_line("up", WAIT_S)


def test_a_line_that_does_not_come_is_an_error(nursery: Nursery) -> None:
    child = nursery.spawn("sleeper", SLEEPER)
    with pytest.raises(ServerStartFailed, match="sleeper did not say 'ready'"):
        child.wait_for_line("ready", timeout_s=0.1)


def test_a_child_that_dies_before_its_line_is_an_error_at_once(nursery: Nursery) -> None:
    child = nursery.spawn("short", [sys.executable, "-c", "raise SystemExit('no licence')"])
    with pytest.raises(ServerStartFailed, match=r"(?s)short .*exit code 1.*no licence"):
        child.wait_for_line("ready", timeout_s=600)


def test_a_log_tail_is_that_of_this_process_not_of_an_earlier_one(nursery: Nursery) -> None:
    children = [nursery.spawn("same", [sys.executable, "-c", "print('first')"])]
    assert children[0].wait(WAIT_S) == 0
    children.append(nursery.spawn("same", [sys.executable, "-c", "print('second')"]))
    assert children[1].wait(WAIT_S) == 0
    assert children[1].log_tail() == ["second"]
    assert children[1].log_path.read_text() == "first\nsecond\n"


def test_leaving_the_with_ends_every_child_and_removes_what_it_was_told_to(run_dir: Path) -> None:
    (run_dir / "sockets").mkdir()
    (run_dir / "sockets" / "x").touch()
    with Nursery(run_dir / "logs", grace_s=0.3) as nursery:
        children = [
            nursery.spawn("a", SLEEPER),
            nursery.spawn("b", DEAF),
            nursery.spawn("c", [*PARENT_OF_SLEEPER, "600"]),
        ]
        children[0].send_signal(signal.SIGSTOP)
        until(lambda: bool(children[1].log_tail() and children[2].log_tail()), "all are up")
        grandchild = int(children[2].log_tail()[0])
        nursery.remove_at_end(run_dir / "sockets")
    assert [child.poll() for child in children] == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]
    assert not any(is_running(pid) for pid in [*(child.pid for child in children), grandchild])
    assert not (run_dir / "sockets").exists()


def test_an_exception_ends_every_child(run_dir: Path) -> None:
    children: list[Child] = []

    def fail(nursery: Nursery) -> None:
        children.append(nursery.spawn("sleeper", SLEEPER))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Nursery(run_dir / "logs") as nursery:
        fail(nursery)
    assert [child.poll() for child in children] == [-signal.SIGTERM]


def test_a_guard_that_is_killed_takes_every_child_with_it_and_is_reported(run_dir: Path) -> None:
    with Nursery(run_dir / "logs") as nursery:
        child = nursery.spawn("parent", [*PARENT_OF_SLEEPER, "600"])
        until(lambda: bool(child.log_tail()), "the child is up")
        grandchild = int(child.log_tail()[0])
        nursery._guard.kill()
        until(lambda: not is_running(child.pid) and not is_running(grandchild), "both are gone")
        assert child.wait(WAIT_S) == -signal.SIGKILL
        with pytest.raises(ServerStartFailed):
            nursery.check()


# A user in a process of its own

USER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from regions.nursery import Nursery

    listener = (
        "import signal, socket, sys, time;"
        "sys.argv[3] == 'deaf' and signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "s = socket.create_server((sys.argv[1], int(sys.argv[2])));"
        "print('up', flush=True); time.sleep(600)"
    )
    logs, address, port, how = sys.argv[1:]
    try:
        with Nursery(Path(logs), grace_s=0.5) as nursery:
            nursery.remove_at_end(Path(logs) / "sockets")
            child = nursery.spawn("listener", [sys.executable, "-c", listener, address, port, how])
            child.wait_for_line("up", 20)
            print(nursery._guard.pid, child.pid, flush=True)
            time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", child.poll(), flush=True)
        sys.exit(130)
    """
)


class User:
    """A process that holds a nursery with one child, which listens on a port."""

    def __init__(self, run_dir: Path, how: str) -> None:
        (run_dir / "logs" / "sockets").mkdir(parents=True)
        self.run_dir = run_dir
        self.port = pick_free_ports(["127.0.1.1"], ["x"])["x"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(run_dir / "logs"), "127.0.1.1", str(self.port), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a foreground process group, as a terminal would make
        )
        assert self.process.stdout is not None
        self.guard_pid, self.child_pid = map(int, self.process.stdout.readline().split())

    def assert_nothing_is_left(self) -> None:
        until(lambda: not is_running(self.child_pid), "the child is gone")
        until(lambda: not is_running(self.guard_pid), "the guard is gone")
        probe("127.0.1.1", self.port)
        assert not (self.run_dir / "logs" / "sockets").exists()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["obedient", "deaf"])
def user(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[User]:
    user = User(run_dir, request.param)
    yield user
    user.close()


def test_a_user_that_is_killed_leaves_no_child_and_no_port(user: User) -> None:
    with pytest.raises(OSError, match="in use"):
        probe("127.0.1.1", user.port)
    user.process.kill()
    user.assert_nothing_is_left()


def test_a_user_that_is_terminated_leaves_no_child_and_no_port(user: User) -> None:
    user.process.terminate()
    user.assert_nothing_is_left()


def test_ctrl_c_reaches_the_user_who_ends_the_child(user: User) -> None:
    os.killpg(user.process.pid, signal.SIGINT)
    out, err = user.process.communicate(timeout=WAIT_S)
    # The child ended by the nursery's TERM or KILL, not by the SIGINT of the foreground group.
    assert out.split() in (["interrupted", "-15"], ["interrupted", "-9"]), err
    assert user.process.returncode == 130
    user.assert_nothing_is_left()


def test_a_fork_of_the_user_that_lives_on_does_not_keep_the_children(run_dir: Path) -> None:
    program = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from regions.nursery import Nursery
        nursery = Nursery(Path(sys.argv[1])).__enter__()
        child = nursery.spawn("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
        fork = os.fork()
        if fork:
            print(child.pid, fork, flush=True)
        time.sleep(600)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child_pid, fork_pid = map(int, process.stdout.readline().split())
    try:
        process.kill()
        until(lambda: not is_running(child_pid), "the child is gone")
        assert is_running(fork_pid)
    finally:
        os.kill(fork_pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def test_a_free_port_is_free_again_at_once(nursery: Nursery) -> None:
    port = pick_free_ports(["127.0.1.1"], ["x"])["x"]
    listen = f"import socket; s = socket.create_server(('127.0.1.1', {port}))"
    serve = "print('up', flush=True); s.accept()[0].recv(1)"
    child = nursery.spawn("listener", [sys.executable, "-c", f"{listen}; {serve}"])
    child.wait_for_line("up", WAIT_S)
    with socket.create_connection(("127.0.1.1", port)):
        child.kill()
        probe("127.0.1.1", port)
