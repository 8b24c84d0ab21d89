"""docs/oauth.md says what is true of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from keyservice.clients import load_clients
from keyservice.introspection import _TOLD
from keyservice.settings import Settings
from keyservice.telemetry import Metrics
from tests.keyservice.support import SECRET_HASH
from tests.keyservice.test_client_auth import public

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "oauth.md").read_text()
SOURCE = "\n".join(path.read_text() for path in (ROOT / "keyservice").rglob("*.py"))


def test_every_setting_exists_and_has_the_default_that_is_shown() -> None:
    named = set(re.findall(r"KEYSERVICE_([A-Z_]+)", TEXT))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)
    shown = re.findall(r"`KEYSERVICE_([A-Z_]+)` \((\d+)\)", TEXT)
    assert len(shown) >= 3
    for name, default in shown:
        assert float(default) == Settings.model_fields[name.lower()].default, name


def test_every_metric_and_every_code_exists() -> None:
    metrics = Metrics("eu").render().decode()
    for name in set(re.findall(r"\bkeyservice_([a-z_]+)_total", TEXT)):
        assert f"keyservice_{name}" in metrics
    rows = re.findall(r"(?:40[0-9]|422|503) ((?:`[a-z_]+`(?:, | \([^)]*\), )?)+)", TEXT)
    codes = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    assert {"client_exists", "revocation_pending", "unauthorized_client"} <= codes
    for code in codes:
        assert f'"{code}"' in SOURCE, code


def test_the_clients_file_of_the_documentation_has_the_fields_there_are(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    jwk = public("ES256")
    block = block.replace("$argon2id$…", SECRET_HASH)
    for name in ("x", "y"):
        block = block.replace(f'{name} = "…"', f'{name} = "{jwk[name]}"')
    path = tmp_path / "clients.toml"
    path.write_text(block)
    assert set(load_clients(path)) == {"orders", "robot"}


def test_the_introspection_shown_has_the_members_there_are() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert set(json.loads(block)) - {"active", "token_type"} <= set(_TOLD)
