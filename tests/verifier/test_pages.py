"""docs/testing.md and docs/observing.md: their programs run, and the list of metrics is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import verifier.metrics
from tests.verifier.support import ISSUER, SECRET, Mirrored, token_of
from verifier.metrics import VerifierMetrics
from verifier.testing import SigningKey

DOCS = Path(__file__).parents[2] / "docs"


def programs(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_page_about_testing_runs() -> None:
    (program,) = programs("testing.md")
    exec(compile(program, "testing.md", "exec"), {"__name__": "testing"})


def test_the_page_about_observing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ISSUER": ISSUER, "AUDIENCE": "orders", "JWKS_URLS": "none", "REDIS_URL": "none"}.items():
        monkeypatch.setenv(f"VERIFIER_{name}", value)
    monkeypatch.setenv("JWT_SECRET", SECRET)
    for program in programs("observing.md"):
        fresh = CollectorRegistry()
        monkeypatch.setattr(verifier.metrics.VerifierMetrics, "__defaults__", (fresh,), raising=False)
        monkeypatch.setattr(VerifierMetrics.__init__, "__defaults__", (fresh,))
        exec(compile(program, "observing.md", "exec"), {"__name__": "observing"})


def test_the_page_names_every_metric_with_its_labels_and_no_other(key: SigningKey) -> None:
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    mirrored = Mirrored(key, observer=metrics, hs256_secrets=[SECRET])
    metrics.watch(mirrored.verifier)
    mirrored.revoke("jti", "x")
    for token in (token_of(key), token_of(SECRET)):
        mirrored.verifier.verify(token)
    shown: dict[str, set[str]] = {}
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        shown[name] = {label for sample in family.samples for label in sample.labels if label != "le"}
    named: dict[str, set[str]] = {}
    for names, labels in re.findall(r"^\| (`verifier_[^|]*) \| ([^|]*) \|", (DOCS / "observing.md").read_text(), re.M):
        for name in re.findall(r"`([a-z0-9_]+)`", names):
            named[name] = set(re.findall(r"`([a-z_]+)`", labels))
    assert named.keys() == shown.keys()
    assert {name: labels for name, labels in named.items() if shown[name] and shown[name] != labels} == {}


def test_the_page_names_every_event_that_is_counted_and_no_other() -> None:
    counted = set()
    for path in Path(verifier.metrics.__file__).parent.glob("*.py"):
        for key in re.findall(r"counters\[(.+?)\] \+= ", path.read_text()):
            counted |= {re.sub(r"\{\w+\}", "…", name) for name in re.findall(r'f?"([^"]+)"', key)}
    (listed,) = re.findall(r"^Events: (.*?)\n\n", (DOCS / "observing.md").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", listed)) == counted
    assert {"decided", "revoked", "fetch_…", "reread_…"} <= counted
