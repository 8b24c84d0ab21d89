"""The errors of `regions` are an interface: stable codes, exit codes, and a tree that says so."""

from __future__ import annotations

import pytest

from regions import errors
from regions.errors import RegionsError

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RegionsError)]


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not RegionsError])
def test_the_tree_in_the_docstring_names_every_error_its_code_and_its_exit_code(kind: type[RegionsError]) -> None:
    rows = [line.split() for line in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in line]
    rows = [row[row.index(kind.__name__) :] for row in rows]
    assert [row[1:3] for row in rows] == [[kind.code, str(int(kind.exit_code))]]


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in ERRORS]
    assert len(set(codes)) == len(codes)


def test_every_error_is_exported() -> None:
    assert {kind.__name__ for kind in ERRORS} <= set(errors.__all__)
