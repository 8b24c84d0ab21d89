"""Invariant: strict_json_object raises ValueError, or gives exactly what its exact path and Python's reader give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from verifier.token import _exact_json_object, strict_json_object


def check(data: bytes) -> None:
    fast, exact = attempt(strict_json_object, data), attempt(_exact_json_object, data)
    assert same(fast, exact), "the fast and the exact path disagree"
    if fast is None:
        return
    assert same(fast, json.loads(data)), "another value than Python's reader"
    for ascii_only in (False, True):
        again = json.dumps(fast, ensure_ascii=ascii_only).encode()
        assert same(strict_json_object(again), fast), "what was accepted is refused in another spelling"


def attempt(read: Callable[[bytes], dict[str, Any]], data: bytes) -> dict[str, Any] | None:
    try:
        return read(data)
    except ValueError:
        return None


def same(a: Any, b: Any) -> bool:
    """Equal also in type and order: 1 is not 1.0, and not true."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
