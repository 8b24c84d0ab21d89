"""Fuzz one invariant with atheris: ``python -m tests.fuzz.run json|jwks|token [libFuzzer options]`` (``make fuzz``).

What is found is minimised by hand and stays as a file in ``corpus/``, which ``make test`` replays without atheris.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

HERE = Path(__file__).parent


def main(name: str, *options: str) -> None:
    with atheris.instrument_imports(include=["verifier", "tests.fuzz", "json"]):
        target = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    found = HERE.parents[1] / ".cache" / "fuzz-found" / name
    found.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-dict={HERE / 'words.dict'}",
        f"-artifact_prefix={found}/",
        "-max_len=4096",
        "-timeout=10",
        *options,
        str(found),  # what is new and interesting goes to the first directory
        str(HERE / "corpus" / name),
    ]
    atheris.Setup([sys.argv[0], *arguments], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
