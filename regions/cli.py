"""The `regions` command. Errors are one line, `regions: error [code]: …`, and an exit code of `ExitCode`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import msgspec
import typer

from regions.cluster import SERVICES, Cluster
from regions.cluster_file import ClusterFile
from regions.console import Reporter
from regions.demo import run_demo
from regions.errors import ExitCode, RegionsError
from regions.failover import Failover
from regions.model.cli import model
from regions.ports import check_ports_free, pick_free_ports
from regions.status import read_status, status_doubts, status_lines
from regions.topology import Topology, load_topology

__all__ = ["main"]

INTERRUPTED = 130
"""What a shell reports for a command that Ctrl-C ended."""

CHECK_EVERY_S = 0.5

app = typer.Typer(
    help="Several regions on this machine: real servers, real lag.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(model)

TopologyOption = Annotated[str, typer.Option(help="A built-in topology (default, one-region) or a TOML file.")]
VarOption = Annotated[Path, typer.Option(help="Where to keep data, logs and cluster.json.")]
AutoPortsOption = Annotated[bool, typer.Option("--auto-ports", help="Take free ports, not the topology's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def _topology(name: str, auto_ports: bool) -> Topology:
    topology = load_topology(name)
    if auto_ports:
        return topology.with_ports(pick_free_ports([region.address for region in topology.regions], SERVICES))
    check_ports_free(topology, SERVICES)
    return topology


@app.command()
def demo(
    topology: TopologyOption = "default",
    var: VarOption = Path("var/demo"),
    as_json: JsonOption = False,
) -> None:
    """Run the main job on real servers and check every line of it."""
    reporter = Reporter(as_json=as_json)
    _interrupt_on_signals()
    held = run_demo(_topology(topology, auto_ports=True), var, reporter)
    if not held:
        raise typer.Exit(ExitCode.PROMISE_BROKEN)
    reporter.note(f"all {reporter.checks} lines held")


@app.command()
def up(
    topology: TopologyOption = "default",
    var: VarOption = Path("var"),
    auto_ports: AutoPortsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start the regions and keep them running until Ctrl-C."""
    reporter = Reporter(as_json=as_json)
    stop = threading.Event()
    cluster = Cluster(_topology(topology, auto_ports), var, progress=reporter.note)
    _stop_on_signals(stop, cluster)
    with cluster:
        _announce(cluster, reporter)
        while not stop.wait(CHECK_EVERY_S):
            cluster.check()
    reporter.note("stopped; nothing is left running")


@app.command()
def failover(
    to: Annotated[str, typer.Option("--to", help="The region whose server is to be the primary.")],
    var: VarOption = Path("var"),
    timeout_s: Annotated[float, typer.Option(min=1, max=120, help="How long to wait for its end.")] = 15.0,
    as_json: JsonOption = False,
) -> None:
    """Make another region's server the primary of a running cluster, losing no write."""
    report = Failover(ClusterFile.read(var / "cluster.json"), to, timeout_s=timeout_s).run()
    if as_json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stdout.write(
            f"primary: was {report.was}, is {report.now} ({report.how})\n"
            f"writes: away for {report.writes_away_ms:.0f} ms; {report.acknowledged} acknowledged, {report.lost} lost\n"
        )
    if report.lost:
        raise typer.Exit(ExitCode.PROMISE_BROKEN)


@app.command()
def status(var: VarOption = Path("var"), as_json: JsonOption = False) -> None:
    """What each region's server is now, and whom each Sentinel takes for the primary."""
    found = read_status(ClusterFile.read(var / "cluster.json"))
    if as_json:
        sys.stdout.write(msgspec.json.encode({"regions": found}).decode() + "\n")
    else:
        sys.stdout.write("\n".join([*status_lines(found), *status_doubts(found)]) + "\n")


def _interrupt_on_signals() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C: everything that was started is stopped in order."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


def _stop_on_signals(stop: threading.Event, cluster: Cluster) -> None:
    """A cluster that has started ends as it was asked to; while it starts, that is broken off."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        if not cluster.started:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


def _announce(cluster: Cluster, reporter: Reporter) -> None:
    rows = [
        (name, urls.keyservice_url, urls.admin_url, urls.orders_url, urls.login_url)
        for name, urls in cluster.file.regions.items()
    ]
    columns = ["region", "key service", "admin", "orders", "login"]
    reporter.table(f"primary: {cluster.file.primary}", columns, rows)
    reporter.note(f"passwords and URLs: {cluster.file_path} (mode 0600)")
    reporter.note("Ctrl-C stops everything")


def main() -> None:
    """Entry point; every error of this package becomes one line and an exit code."""
    try:
        result = app(standalone_mode=False)
    except RegionsError as error:
        _fail(error.code, str(error), error.exit_code)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.COULD_NOT_RUN)
    except Exception as error:  # noqa: BLE001 - the last one: it ends the process, by name
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of the command line
            _fail("usage", error.format_message(), ExitCode.USAGE)
        traceback.print_exc()  # a mistake of ours: not exit code 1, which says that a promise is broken
        _fail("internal", f"{type(error).__name__}: please report this", ExitCode.COULD_NOT_RUN)
    sys.exit(result if isinstance(result, int) else ExitCode.OK)


def _fail(code: str, message: str, exit_code: ExitCode) -> NoReturn:
    if "--json" in sys.argv:
        sys.stdout.write(msgspec.json.encode({"type": "error", "code": code, "message": message}).decode() + "\n")
    sys.stderr.write(f"regions: error [{code}]: {message}\n")
    sys.exit(exit_code)
