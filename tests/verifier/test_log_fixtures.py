"""Every released log format stays readable: what was on the wire then means the same now, and is written alike.

A fixture is never changed after the release that wrote it; a new format gets a folder of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from verifier.log import FORMAT, KIND_FORMATS, Beat, Entry, Epoch, Meta, Position

FIXTURES = Path(__file__).parent.parent / "fixtures"


def cases(name: str, number: int = 1) -> list[Any]:
    read: list[Any] = json.loads((FIXTURES / f"log_format_{number}" / f"{name}.json").read_bytes())
    return read


def wire(case: Any) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in case["wire"].items()}


def plain(value: Any) -> Any:
    """Positions and generations as the text that they are written as."""
    return str(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", cases("entries"), ids=lambda case: case["decoded"]["kind"])
def test_entries_of_format_1_mean_the_same_and_are_written_as_the_same_bytes(case: Any) -> None:
    entry = Entry.decode(wire(case))
    assert msgspec.structs.asdict(entry) == case["decoded"]
    assert list(entry.encode().items()) == list(case["wire"].items())
    assert entry.digest().hex() == case["digest_sha256"]


def test_there_is_an_entry_of_every_kind_of_format_1() -> None:
    kinds = {case["decoded"]["kind"] for case in cases("entries")}
    assert kinds == {kind for kind, needed in KIND_FORMATS.items() if needed == 1}


def test_the_epoch_of_format_1_means_the_same() -> None:
    for case in cases("epoch"):
        epoch = Epoch.decode(wire(case))
        told = {name: getattr(epoch, name) for name in ("number", "nonce", "replid", "open")}
        told |= {"generation": str(epoch.generation)}
        told |= {"chain": msgspec.to_builtins(epoch.chain), "known": msgspec.to_builtins(epoch.known)}
        assert json.loads(json.dumps(told)) == case["decoded"]
        assert msgspec.json.encode(epoch.chain).decode() == case["wire"]["chain"]
        assert msgspec.json.encode(epoch.known).decode() == case["wire"]["known"]


def test_beats_of_format_1_mean_the_same() -> None:
    for case in cases("beat"):
        beat = Beat.decode(wire(case))
        assert {name: plain(getattr(beat, name)) for name in case["decoded"]} == case["decoded"]


def test_meta_of_format_1_means_the_same() -> None:
    for case in cases("meta"):
        assert json.loads(json.dumps(asdict(Meta.decode(wire(case))))) == case["decoded"]


def test_positions_of_format_1_mean_the_same_and_are_written_alike() -> None:
    for case in cases("positions"):
        position = Position.parse(case["wire"])
        assert (list(position), position.stream_id, str(position)) == (
            case["decoded"],
            case["stream_id"],
            case["wire"],
        )


def test_every_format_has_its_fixtures() -> None:
    assert sorted(path.name for path in FIXTURES.glob("log_format_*")) == [
        f"log_format_{number}" for number in range(1, FORMAT + 1)
    ]
