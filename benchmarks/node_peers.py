"""JWT libraries on Node, in one process that measures a round whenever it is told to (`node/peers.mjs`)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from benchmarks.configuration import AUDIENCE, ISSUER
from verifier.testing import StaticKeys

__all__ = ["NODE_RAW", "NodeMissing", "NodePeers", "node_peers"]

NODE_RAW = "raw check (node:crypto)"
LIBRARIES = "fast-jwt, jose and aws-jwt-verify on Node"
HERE = Path(__file__).parent / "node"


class NodeMissing(Exception):
    """Why the Node peers are left out, and how to get them."""


class NodePeers:
    """`names` to measure, each through `microseconds(name, seconds)`. Raises `NodeMissing`, before anything starts."""

    def __init__(self, keys: StaticKeys, tokens: list[str]) -> None:
        node = shutil.which("node")
        if node is None:
            raise NodeMissing(f"{LIBRARIES}: install Node.js 20 or newer with npm, then `make bench`")
        if not (HERE / "node_modules").is_dir():
            raise NodeMissing(f"{LIBRARIES}: `make bench` installs them, or `npm ci` in benchmarks/node")
        self._process = subprocess.Popen(
            [node, "--no-warnings", str(HERE / "peers.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        hello = self._ask({"jwks": keys.jwks, "tokens": tokens, "issuer": ISSUER, "audience": AUDIENCE})
        self.names: list[str] = hello["names"]
        self.versions: dict[str, str] = hello["versions"]

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(command).decode() + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the Node peers ended with {self._process.wait()}: see above")
        return msgspec.json.decode(answer)

    def microseconds(self, name: str, seconds: float) -> float:
        """A token, in a round of at least that long."""
        return float(self._ask({"name": name, "seconds": seconds})["us"])

    def contestants(self, names: list[str], seconds: float) -> dict[str, Callable[[], float]]:
        return {name: lambda name=name: self.microseconds(name, seconds) for name in names}  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


@contextmanager
def node_peers(keys: StaticKeys, tokens: list[str], left_out: list[str]) -> Iterator[NodePeers | None]:
    """The peers; or None, and `left_out` says why."""
    try:
        peers = NodePeers(keys, tokens)
    except NodeMissing as missing:
        left_out.append(str(missing))
        yield None
        return
    with peers:
        yield peers
