"""A keeper's disk: SQLite in WAL mode with ``synchronous=FULL``, one write transaction a call.

What is here outlives every server: entries by digest, every epoch heard of, the promise, the furthest record of each
key and this region's wrapped private keys. ``commit`` counts the transactions that changed anything, so that a copy
that is put back in its place can be told from the original.

The directory is locked: two keepers never share a disk. The file system must be local (WAL does not work over NFS or
EFS). Safe to use from several threads, one call at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from verifier.log import NEVER_EXPIRES, Entry, EpochLink

from .core.evidence import EpochKey, key_of
from .core.keepers import news_of
from .core.rotation import KeyRecord
from .errors import KeeperUnavailable, StartError

__all__ = ["SqliteDisk"]

FILE: Final = "keeper.sqlite3"
LOCK: Final = "keeper.lock"
FORMAT: Final = 1

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
    n INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, id TEXT NOT NULL, kind TEXT NOT NULL, issuer TEXT NOT NULL,
    value TEXT NOT NULL, before INTEGER, expires_at INTEGER NOT NULL, reason TEXT NOT NULL, at INTEGER NOT NULL,
    region TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS entries_by_id ON entries (id);
CREATE INDEX IF NOT EXISTS entries_by_end ON entries (expires_at);
CREATE TABLE IF NOT EXISTS links (
    number INTEGER NOT NULL, nonce TEXT NOT NULL, link BLOB NOT NULL, PRIMARY KEY (number, nonce)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (kid TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS private (kid TEXT PRIMARY KEY, envelope BLOB NOT NULL) WITHOUT ROWID;
"""

_INSERT: Final = (
    "INSERT INTO entries (digest, id, kind, issuer, value, before, expires_at, reason, at, region) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (digest) DO UPDATE SET at = excluded.at WHERE entries.at = 0 AND excluded.at != 0"
)
_SELECT: Final = "SELECT id, kind, issuer, value, before, expires_at, reason, at, region FROM entries "
_BY_DIGEST: Final = _SELECT + "WHERE digest = ?"
_BY_ID: Final = _SELECT + "WHERE id = ? ORDER BY n LIMIT 1"


class SqliteDisk:
    """A :class:`~keyservice.core.keepers.Disk` in a directory of its own, made if need be (mode 0700).

    Raises :class:`StartError` if it cannot be opened or another process has it, and
    :class:`KeeperUnavailable` (``keeper_disk``) from every read and every write that could not be made.
    """

    def __init__(self, directory: Path, *, region: str) -> None:
        with contextlib.ExitStack() as opened:
            self._lock = _lock(directory)
            opened.callback(os.close, self._lock)
            try:
                self._db = sqlite3.connect(
                    _made(directory / FILE), isolation_level=None, check_same_thread=False, timeout=0
                )
                opened.callback(self._db.close)
                self._load(region)
            except (sqlite3.Error, msgspec.DecodeError, OSError, KeeperUnavailable) as error:
                message = f"KEYSERVICE_KEEPER_DIR: {directory / FILE} cannot be used: {error}"
                raise StartError("keeper_disk_invalid", message) from None
            opened.pop_all()

    def _load(self, region: str) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._facts: dict[str, Any] = dict(self._db.execute("SELECT name, value FROM facts"))
        self._first_use(region)
        self._links = {key_of(link): link for link in self._read_links()}
        self._count = self._counted()
        self.opened_commit = self.commit
        """``commit`` as it was found."""

    def _first_use(self, region: str) -> None:
        if "keeper_id" not in self._facts:
            with self._transaction():
                self._put(keeper_id=new_keeper_id(region), region=region, format=FORMAT, commit=0)
        if self._facts["region"] != region:
            message = f"KEYSERVICE_KEEPER_DIR holds the keeper of region {self._facts['region']}, not of {region}"
            raise StartError("keeper_of_another_region", message)
        if self._facts["format"] > FORMAT:
            message = "KEYSERVICE_KEEPER_DIR was written by a newer release: run that one"
            raise StartError("keeper_format_newer", message)

    def close(self) -> None:
        """Close the file and let another process have it; a second time does nothing."""
        self._db.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    # -- what is held ---------------------------------------------------------------------------------------------

    @property
    def keeper_id(self) -> str:
        """Whose disk this is."""
        return str(self._facts["keeper_id"])

    @property
    def commit(self) -> int:
        """How many transactions changed anything."""
        return int(self._facts["commit"])

    @property
    def promise(self) -> EpochKey | None:
        """The epoch that was promised last."""
        nonce = self._facts.get("promise_nonce")
        return None if nonce is None else EpochKey(self._facts["promise_number"], nonce)

    @property
    def links(self) -> Mapping[EpochKey, EpochLink]:
        """Every epoch heard of."""
        return self._links

    @property
    def min_reader_format(self) -> int:
        """The highest that any log asked for."""
        return int(self._facts.get("min_reader_format", 1))

    @property
    def readable(self) -> bool:
        """Whether entries can be read now."""
        try:
            self._rows("SELECT digest FROM entries LIMIT 1")
        except KeeperUnavailable:
            return False
        return True

    def digests(self) -> Iterable[bytes]:
        """Of all entries, the oldest first."""
        return [digest for (digest,) in self._rows("SELECT digest FROM entries ORDER BY n")]

    def get(self, digests: Sequence[bytes]) -> list[Entry]:
        """The entries with these digests, less those that were dropped meanwhile."""
        rows = (row for digest in digests for row in self._rows(_BY_DIGEST, (digest,)))
        return [Entry(*row) for row in rows]

    def find_all(self, entry_ids: Sequence[str]) -> dict[str, Entry]:
        """The first entry under each of these ids."""
        rows = (row for entry_id in entry_ids for row in self._rows(_BY_ID, (entry_id,)))
        return {row[0]: Entry(*row) for row in rows}

    @property
    def count(self) -> int:
        """How many entries there are, as of the last write."""
        return self._count

    def keys(self) -> dict[str, KeyRecord]:
        """The furthest record of each key, by kid."""
        rows = self._rows("SELECT kid, record FROM keys")
        return {kid: msgspec.json.decode(record, type=KeyRecord) for kid, record in rows}

    def private(self) -> dict[str, bytes]:
        """This region's wrapped private keys, by kid."""
        return dict(self._rows("SELECT kid, envelope FROM private"))

    # -- writes ---------------------------------------------------------------------------------------------------

    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        """Keep what is new; an epoch once known to have opened stays so."""
        rows = [(entry.digest(), *_row(entry)) for entry in entries]
        changed = news_of(links, self._links)
        if not rows and not changed:
            return
        with self._transaction():
            last = self._last_n()
            self._db.executemany(_INSERT, rows)
            added = self._last_n() - last
            self._put_links(changed.values())
        self._links.update(changed)
        self._count += added

    def make_promise(self, epoch: EpochKey) -> None:
        """A promise only moves forward."""
        if self.promise is None or epoch > self.promise:
            with self._transaction():
                self._put(promise_number=epoch.number, promise_nonce=epoch.nonce)

    def store_keys(self, records: Iterable[KeyRecord], private: Mapping[str, bytes], over: Iterable[str]) -> None:
        """Put these records in place, keep these wrapped private keys, and forget those of keys that are over."""
        with self._transaction():
            rows = [(record.kid, msgspec.json.encode(record)) for record in records]
            self._db.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", rows)
            self._db.executemany("INSERT OR REPLACE INTO private VALUES (?, ?)", list(private.items()))
            self._db.executemany("DELETE FROM private WHERE kid = ?", [(kid,) for kid in over])

    def raise_min_reader_format(self, min_reader_format: int) -> None:
        """Remember what a log asks of its readers, should the log be lost."""
        if min_reader_format > self.min_reader_format:
            with self._transaction():
                self._put(min_reader_format=min_reader_format)

    def drop_expired(self, limit: float) -> int:
        """Forget entries whose ``expires_at`` lies before ``limit`` (Unix seconds); how many."""
        with self._transaction():
            query = "DELETE FROM entries WHERE expires_at != ? AND expires_at < ?"
            dropped = self._db.execute(query, (NEVER_EXPIRES, limit)).rowcount
            count = self._counted()
        self._count = count
        return dropped

    def drop_links(self, keys: Iterable[EpochKey]) -> None:
        """Forget epochs that nobody can ask for any more."""
        gone = [key for key in keys if key in self._links]
        if gone:
            with self._transaction():
                self._db.executemany("DELETE FROM links WHERE number = ? AND nonce = ?", gone)
            for key in gone:
                del self._links[key]

    def become_another(self) -> None:
        """Take a new id: this disk is a copy, and the one that it was copied from has gone on."""
        with self._transaction():
            self._put(keeper_id=new_keeper_id(str(self._facts["region"])), promise_number=0, promise_nonce=None)

    # -- parts ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, on disk when it is left; counted if it changed anything."""
        facts = dict(self._facts)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            before = self._db.total_changes
            yield
            if self._db.total_changes != before:
                self._put(commit=self._facts.get("commit", 0) + 1)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._facts = facts
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise KeeperUnavailable("keeper_disk", f"the keeper's disk cannot be written ({error})") from None

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise KeeperUnavailable("keeper_disk", f"the keeper's disk cannot be read ({error})") from None

    def _last_n(self) -> int:
        (last,) = self._db.execute("SELECT max(n) FROM entries").fetchone()
        return int(last or 0)

    def _counted(self) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM entries").fetchone()
        return int(count)

    def _put(self, **facts: object) -> None:
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))
        self._facts |= facts

    def _put_links(self, links: Iterable[EpochLink]) -> None:
        rows = [(link.number, link.nonce, msgspec.json.encode(link)) for link in links]
        self._db.executemany("INSERT OR REPLACE INTO links VALUES (?, ?, ?)", rows)

    def _read_links(self) -> list[EpochLink]:
        rows = self._db.execute("SELECT link FROM links ORDER BY number, nonce")
        return [msgspec.json.decode(link, type=EpochLink) for (link,) in rows]


def new_keeper_id(region: str) -> str:
    """A name that no other keeper ever had."""
    return f"{region}-{secrets.token_hex(8)}"


def _row(entry: Entry) -> tuple[object, ...]:
    return (
        entry.id,
        entry.kind,
        entry.issuer,
        entry.value,
        entry.before,
        entry.expires_at,
        entry.reason,
        entry.at,
        entry.region,
    )


def _lock(directory: Path) -> int:
    """The directory's lock, held as long as the file descriptor is open; raises :class:`StartError`."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"KEYSERVICE_KEEPER_DIR: {directory} cannot be used: {error.strerror}"
        raise StartError("keeper_disk_invalid", message) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        message = f"KEYSERVICE_KEEPER_DIR: another keeper runs on {directory}; a region has exactly one"
        raise StartError("keeper_already_running", message) from None
    return lock


def _made(path: Path) -> Path:
    """The file, made for this user alone if need be."""
    path.touch(mode=0o600)
    return path
