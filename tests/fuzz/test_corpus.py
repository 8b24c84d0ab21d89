"""The fuzzers' invariants hold for every seed and every finding, and for the published JSON suite; without atheris."""

from __future__ import annotations

import ast
import importlib
import json
from base64 import b64decode, urlsafe_b64decode
from pathlib import Path

import pytest

from tests.fuzz import fuzz_json, fuzz_jwks, fuzz_token
from verifier.jwk import KeySet
from verifier.testing import b64url
from verifier.token import strict_json_object

HERE = Path(__file__).parent
TARGETS = ("json", "jwks", "token")
SEEDS = [path for name in TARGETS for path in sorted((HERE / "corpus" / name).iterdir())]


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_seed_keeps_every_invariant(path: Path) -> None:
    data = path.read_bytes()
    for name in TARGETS:  # each is worth a try as input of the others
        importlib.import_module(f"tests.fuzz.fuzz_{name}").check(data)


def test_the_published_json_suite_keeps_the_invariant() -> None:
    packed = json.loads((HERE.parent / "vectors" / "json_test_suite.json").read_bytes())
    texts = [b64decode(text) for text in packed.values() if isinstance(text, str)]
    assert len(texts) == 316
    for text in texts:
        for raw in (text, b'{"x":' + text + b"}"):
            fuzz_json.check(raw)
            fuzz_jwks.check(raw)
            fuzz_token.check(b"p" + raw)


def test_the_seeds_reach_both_sides() -> None:
    """An invariant over inputs that are all refused, or all accepted, would say little."""
    accepted = {"json": 0, "jwks": 0, "token": 0}
    for path in SEEDS:
        name, data = path.parent.name, path.read_bytes()
        if name == "json":
            accepted[name] += fuzz_json.attempt(strict_json_object, data) is not None
        elif name == "jwks":
            accepted[name] += fuzz_jwks.attempt(data) is not None
        elif data[:1] == b"p":
            accepted[name] += fuzz_token.verified(fuzz_token.signed(fuzz_token.HS256, b64url(data[1:]))) is not None
    for name, number in accepted.items():
        of_it = sum(path.parent.name == name for path in SEEDS)
        assert 3 <= number <= of_it - 3, name


@pytest.mark.parametrize("name", TARGETS)
def test_a_fuzzer_says_its_invariant_in_its_first_line(name: str) -> None:
    text = (HERE / f"fuzz_{name}.py").read_text()
    assert text.splitlines()[0].startswith('"""Invariant: ')
    assert ast.get_docstring(ast.parse(text))


def test_a_broken_reader_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_json, "strict_json_object", json.loads)
    with pytest.raises(AssertionError):
        fuzz_json.check(b'{"a":1,"a":2}')
    monkeypatch.setattr(fuzz_token, "decode_segment", lambda data, _name: urlsafe_b64decode(data + b"=="))
    with pytest.raises(AssertionError):
        fuzz_token.check(b"tAB")

    def broken(_document: object) -> KeySet:
        raise KeyError

    monkeypatch.setattr(KeySet, "from_document", broken)
    with pytest.raises(KeyError):
        fuzz_jwks.check(b"{}")
