"""The benchmarks: `python -m benchmarks [NAME …] [--json] [--quick] [--no-write]`.

Without names: all of `SPEED`. They print tables, and write `benchmarks/results.json` and `docs/images/bench.svg`.
Then `mirror_memory`, unless with --quick or --json.

`compare` instead of names runs the ratios three times and fails if one is a quarter worse than the committed file's.

The others, of `REGIONS`, measure a mirror or a cluster; each prints a table of its own, in a process of its own.
`regions`: all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import msgspec
from rich.console import Console

from benchmarks import compare, picture
from benchmarks.form import Result
from benchmarks.machine import this_machine
from benchmarks.report import Report, read, show, write

SPEED = ("cold", "warm", "threads", "observer_cost", "http_share", "start_up", "load")
REGIONS = (
    "mirror_memory",
    "link_accuracy",
    "revocation_lag",
    "receipts",
    "staleness",
    "trust_appends",
    "http_revocations",
    "blocked_readers",
    "failover_time",
)


def measure(name: str, quick: bool) -> Result:
    module: Any = import_module(f"benchmarks.{name}")
    result: Result = module.measure(quick=quick)
    return result


def run_speed(names: Sequence[str], options: argparse.Namespace) -> None:
    """Measures, shows, and writes unless `quick` made the numbers worthless."""
    console, results = Console(stderr=options.json), {}
    for name in names:
        results[name] = measure(name, options.quick)
        show(results[name], console)
    report = Report(this_machine(), results)
    if options.json:
        print(msgspec.json.encode(report).decode())
    if options.quick or options.no_write:
        return
    whole = report.merged_into(read())
    write(whole)
    picture.write(whole)
    console.print("\nWritten: benchmarks/results.json, docs/images/bench.svg")


def run_compare(options: argparse.Namespace) -> int:
    console, committed = Console(), read()
    if committed is None:
        console.print("There is no benchmarks/results.json to compare with: `make bench` writes it")
        return 2
    runs = []
    for number in range(compare.RUNS):
        console.print(f"run {number + 1} of {compare.RUNS}", style="dim")
        runs.append(Report(this_machine(), {name: measure(name, options.quick) for name in compare.COMPARED}))
    found, unmatched = compare.compare(committed, runs)
    compare.show(found, unmatched, console)
    worsened = [c for c in found if c.worsened]
    for c in worsened:
        console.print(f"{c.benchmark}: {c.name} worsened by {c.worse_by:.0%}", style="red")
    return 1 if worsened else 0


def run_region(name: str, as_json: bool) -> int:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if not as_json:
        print(f"\n== {name}", flush=True)
        return subprocess.run(command, check=False).returncode
    done = subprocess.run([*command, "--json"], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        print(f'{{"benchmark": "{name}", "result": {done.stdout.strip()}}}', flush=True)
    return done.returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SPEED, *REGIONS, "regions", "compare", []], help="which to run")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and tables on stderr")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; the numbers mean nothing")
    parser.add_argument("--no-write", action="store_true", help="leave results.json and the picture as they are")
    options = parser.parse_args(arguments)
    names = options.names or (SPEED if options.quick or options.json else (*SPEED, "mirror_memory"))
    if "compare" in names:
        return run_compare(options)
    speed = [name for name in names if name in SPEED]
    if speed:
        run_speed(speed, options)
    regions = REGIONS if "regions" in names else [name for name in names if name in REGIONS]
    return max((run_region(name, options.json) for name in regions), default=0)


if __name__ == "__main__":
    sys.exit(main())
