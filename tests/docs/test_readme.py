"""The README says what is true of the code."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from regions import cluster as cluster_module
from regions.cluster import SERVICES, Cluster
from regions.ports import pick_free_ports
from regions.topology import DEFAULT_PORTS, load_topology
from verifier import Verifier
from verifier.asgi import AuthMiddleware

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def keywords(name: str) -> set[str]:
    """Keywords that the README's code passes to calls of `name`, or to `add_middleware(name, …)`."""
    found: set[str] = set()
    for block in PYTHON:
        tree = ast.parse(block)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            named = [call.func, *call.args]
            if any(isinstance(node, ast.Name) and node.id == name for node in named):
                found |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    return found


def test_code_of_the_readme_names_real_parameters() -> None:
    assert {"issuer", "audience", "jwks_urls", "redis_url"} <= keywords("Verifier")
    assert keywords("Verifier") <= set(inspect.signature(Verifier).parameters)
    assert keywords("AuthMiddleware") <= set(inspect.signature(AuthMiddleware).parameters)
    assert keywords("AuthMiddleware")


def test_table_of_settings_has_the_code_s_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, re.MULTILINE)
    parameters = inspect.signature(Verifier).parameters
    assert len(rows) >= 7
    for name, shown in rows:
        default = parameters[name].default
        expected = "none" if default == () else f'`"{default}"`' if isinstance(default, str) else f"{default:g}"
        assert shown.strip() in (expected, str(int(default)) if isinstance(default, float) else expected), name


def test_readme_opens_with_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in SHELL[0].splitlines()] == ["make demo", "make test"]


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join([*SHELL, *re.findall(r"`([^`\n]+)`", README)])))
    assert named
    assert named <= targets


def test_no_figure_is_left_to_be_filled_in() -> None:
    assert not re.search(r"^[A-Z_]{4,}$", README, re.MULTILINE)


def test_every_file_linked_from_the_readme_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.system
def test_hands_on_commands_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs bash and curl. The commands as they stand, with the ports and the directory of a cluster of this test.

    Whoever types them gives the other region's verifier time to hear of the log-out; a script asks again.
    """
    inherited = cluster_module._base_environment()
    monkeypatch.setattr(cluster_module, "_base_environment", lambda: inherited | {"KEYSERVICE_RECEIPT_WAIT_MS": "4000"})
    assert shutil.which("curl"), "install curl, or run `make test`, which needs Python only"
    topology = load_topology("default")
    ports = pick_free_ports([region.address for region in topology.regions], SERVICES)
    (script,) = [block for block in SHELL if "--interface" in block]
    for service, port in DEFAULT_PORTS.items():
        script = script.replace(f":{port}/", f":{ports[service]}/")
    commands = [line.split("#")[0] for line in script.splitlines()]
    for command, shows in ((commands[-2], '"code":"token_revoked"'), (commands[-1], '"fresh":true')):
        script += f"\nuntil {command} | tee /dev/stderr | grep '{shows}'; do sleep 0.2; done"
    with Cluster(topology.with_ports(ports), tmp_path / "var"):
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
        )
    assert '"customer":"user-ada"' in done.stdout
    assert '"durability":"replicated"' in done.stdout
    assert '"code":"token_revoked"' in done.stdout
    assert '"epoch_open":true' in done.stdout
    assert '"fresh":true' in done.stdout
