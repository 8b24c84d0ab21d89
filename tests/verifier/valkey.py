"""A real server on a unix socket, and a hand that writes the trust log to it as verifier/log.py describes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from regions.embedded import find_server
from tests.verifier.support import NONCE, entry, until
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Entry

PASSWORD = "correct horse battery staple"


class Server:
    """Holds its data in ``directory``: started again it still has it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "s"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://:{quote(PASSWORD)}@{self.socket}"

    def client(self, password: str = PASSWORD) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), password=password)

    def start(self) -> None:
        config = self.directory / "conf"
        config.write_text(
            f'port 0\nunixsocket {self.socket}\nunixsocketperm 700\nrequirepass "{PASSWORD}"\ndir {self.directory}\n'
            'appendonly yes\nappendfsync always\nsave ""\ndaemonize no\n'
        )
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen([str(find_server().path), str(config)], stdout=log, stderr=log)
        with self.client() as client:
            until(lambda: _answers(client), "the server answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None


def command(client: redis.Redis, *words: str) -> Any:
    """Any command; redis-py leaves this one untyped."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, OSError):
        return False


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Server]:
    server = Server(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Primary:
    """Writes the log: dense positions in one epoch after the other, beats when asked."""

    def __init__(self, client: redis.Redis, *, number: int = 1, nonce: str = NONCE, incarnation: str = "first") -> None:
        self.client = client
        self.number, self.nonce, self.seq = number, nonce, -1
        self.chain: list[dict[str, Any]] = []
        self.beats = 0
        self.set_meta(incarnation=incarnation, trimmed_to="")
        self.open_epoch(number, nonce)

    def set_meta(self, **fields: Any) -> None:
        base: dict[Any, Any] = {"writer_format": "1", "min_reader_format": "1", "max_token_lifetime_s": "86400"}
        self.client.hset(META_KEY, mapping=base | fields)

    def open_epoch(
        self, number: int, nonce: str, *, opened: bool = True, holes: Sequence[tuple[str | None, str]] = ()
    ) -> None:
        """``holes`` are gaps that whoever opens it has found in the log."""
        previous = f"{self.number}-{self.seq}.{self.nonce}" if self.chain else None
        self.number, self.nonce, self.seq = number, nonce, -1
        self.chain.append({"number": number, "nonce": nonce, "previous": previous, "voters": {}, "opened": opened})
        with self.client.pipeline(transaction=True) as pipe:
            self.seq += 1
            first = entry("epoch", f"{nonce} {previous or '-'}", id=f"epoch-{number}", issuer="", expires_at=0)
            pipe.xadd(LOG_KEY, first.encode(), id=f"{number}-0")  # type: ignore[arg-type]
            fields: dict[Any, Any] = {"number": number, "nonce": nonce, "replid": "r", "open": int(opened), "keys_n": 0}
            if holes:
                fields["holes"] = json.dumps(holes)
            pipe.hset(EPOCH_KEY, mapping={**fields, "chain": json.dumps(self.chain)})
            pipe.execute()

    @property
    def position(self) -> str:
        return f"{self.number}-{self.seq}.{self.nonce}"

    def append(self, *entries: Entry) -> str:
        with self.client.pipeline(transaction=True) as pipe:
            for one in entries:
                self.seq += 1
                pipe.xadd(LOG_KEY, one.encode(), id=f"{self.number}-{self.seq}")  # type: ignore[arg-type]
            pipe.execute()
        return self.position

    def append_raw(self, fields: dict[bytes, bytes]) -> None:
        self.seq += 1
        self.client.xadd(LOG_KEY, fields, id=f"{self.number}-{self.seq}")  # type: ignore[arg-type]

    def beat(self, *, confirmed: bool = True, at: float | None = None) -> None:
        """A beat at the end of the log, which confirms itself unless told otherwise."""
        self.beats += 1
        at_ms = str(int((time.time() if at is None else at) * 1000))
        place = f"{self.number}-{self.seq}"
        fields: dict[Any, Any] = {
            "nonce": self.nonce, "n": str(self.beats), "at": at_ms, "position": place, "generation": f"{self.number}-0"
        }  # fmt: skip
        if confirmed:
            fields |= {"confirmed_n": str(self.beats), "confirmed_at": at_ms, "confirmed_position": place}
        with self.client.pipeline(transaction=True) as pipe:
            pipe.delete(BEAT_KEY)
            pipe.hset(BEAT_KEY, mapping=fields)
            pipe.execute()

    def trim(self, last: int) -> None:
        """Up to this seq of the current epoch, on purpose."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.xtrim(LOG_KEY, minid=f"{self.number}-{last + 1}", approximate=False)
            pipe.hset(META_KEY, "trimmed_to", f"{self.number}-{last}")
            pipe.execute()

    def remove(self, *seqs: int, number: int | None = None) -> None:
        self.client.xdel(LOG_KEY, *(f"{self.number if number is None else number}-{seq}" for seq in seqs))


def live(kind: str, values: Sequence[str]) -> list[Entry]:
    """Entries that are good for a day from now."""
    now = int(time.time())
    return [entry(kind, value, id=f"{kind}-{value}"[:64], expires_at=now + 86_400, at=now * 1000) for value in values]
