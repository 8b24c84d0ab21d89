"""What a service pays to have a verifier: time to import it, and time and memory until it is ready in a real region.

Each round is a fresh interpreter. Time counts from the interpreter's first line; memory is the largest resident size,
less that of an interpreter that only says so. Ready means: keys fetched over HTTP, revocations read from the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from benchmarks.form import Result, figure, measured
from benchmarks.region import verifier_environment
from benchmarks.serving import ROOT
from benchmarks.tools import run_cluster

__all__ = ["measure"]

ROUNDS = 9
_PREAMBLE = "import time; started = time.perf_counter()\n"
_REPORT = """
took = time.perf_counter() - started
import resource, sys
if sys.platform == "linux":  # where ru_maxrss begins with that of the process that started this one
    with open("/proc/self/status") as status:
        memory = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
else:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(took * 1000, memory / 1e6)
"""
PROGRAMS = {
    "bare interpreter": "",
    "import verifier": "import verifier",
    "started and ready, HTTP and Redis": """
from verifier import Verifier
verifier = Verifier.from_env().start()
assert verifier.wait_ready(30)
""",
}
BARE, IMPORTED, READY = PROGRAMS


class _Run(msgspec.Struct, frozen=True):
    ms: float
    megabytes: float


def measure(*, quick: bool = False) -> Result:
    runs: dict[str, list[_Run]] = {name: [] for name in PROGRAMS}
    with run_cluster("one-region") as cluster:
        environment = verifier_environment(cluster.file)
        for program in PROGRAMS.values():
            _run(program, environment)  # compiles what it imports
        for _ in range(3 if quick else ROUNDS):
            for name, program in PROGRAMS.items():
                runs[name].append(_run(program, environment))
    times = {name: [run.ms for run in found] for name, found in runs.items() if name != BARE}
    memory = {f"{name}, memory": [run.megabytes for run in found] for name, found in runs.items()}
    above = [run.megabytes - bare.megabytes for run, bare in zip(runs[READY], runs[BARE], strict=True)]
    return Result(
        title="Start-up: a fresh interpreter each time",
        measurements=measured(times, "ms") + measured(memory, "MB"),
        figures=(
            figure("import verifier", times[IMPORTED], "ms", "lower", 100.0),
            figure("started and ready", times[READY], "ms", "lower", 220.0),
            figure("memory above the bare interpreter", above, "MB", "lower", 48.0),
        ),
    )


def _run(program: str, environment: Mapping[str, str]) -> _Run:
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + program + _REPORT],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    ms, megabytes = done.stdout.split()
    return _Run(float(ms), float(megabytes))
