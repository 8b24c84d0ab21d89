"""`python -m benchmarks [NAME …] [--json]`: every benchmark, or those named, one after the other.

With `--json` each prints one line, wrapped as {"benchmark": NAME, "result": …}.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

BENCHMARKS = (
    "verify_speed",
    "http_share",
    "link_accuracy",
    "revocation_lag",
    "receipts",
    "staleness",
    "trust_appends",
    "http_revocations",
    "blocked_readers",
    "failover_time",
)


def run(name: str, as_json: bool) -> int:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    if not as_json:
        print(f"\n== {name}", flush=True)
        return subprocess.run(command, check=False).returncode
    done = subprocess.run([*command, "--json"], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        print(f'{{"benchmark": "{name}", "result": {done.stdout.strip()}}}', flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which to run; default: all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    codes = [run(name, arguments.json) for name in arguments.names or BENCHMARKS]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
