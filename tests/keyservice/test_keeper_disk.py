"""A keeper's disk: one promise for both kinds, and what the real one adds: locks, crashes, and disks that are full."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from keyservice.core.evidence import EpochKey, key_of
from keyservice.core.keepers import Disk, MemoryDisk
from keyservice.core.rotation import prepare
from keyservice.errors import KeeperUnavailable, StartError
from keyservice.keeper_disk import FILE, SqliteDisk
from verifier.log import NEVER_EXPIRES, Entry, EpochLink
from verifier.testing import make_key

EPOCH = EpochKey(5, "5" * 16)


def entry(name: str, **changes: object) -> Entry:
    return msgspec.structs.replace(
        Entry(name, "jti", "https://id.test", name, None, 2_000_000_000, "", 0, "eu"), **changes
    )


def link(number: int, *, opened: bool = False) -> EpochLink:
    return EpochLink(number, f"{number:016x}", None, {"eu": "k"}, opened)


# -- what holds for every disk ----------------------------------------------------------------------------------------

Reopen = Callable[[Disk], Disk]


@pytest.fixture(params=["memory", "sqlite"])
def disk_and_reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Disk, Reopen]]:
    """A new disk, and what gives the same one after its keeper was started again."""
    if request.param == "memory":
        yield MemoryDisk("eu-1"), lambda disk: disk
        return
    opened = [SqliteDisk(tmp_path / "keeper", region="eu")]

    def reopen(disk: Disk) -> Disk:
        assert disk is opened[-1]
        opened[-1].close()
        opened.append(SqliteDisk(tmp_path / "keeper", region="eu"))
        return opened[-1]

    yield opened[0], reopen
    opened[-1].close()


@pytest.fixture
def disk(disk_and_reopen: tuple[Disk, Reopen]) -> Disk:
    return disk_and_reopen[0]


def held(disk: Disk) -> list[Entry]:
    return list(disk.get(list(disk.digests())))


def test_an_entry_is_kept_once_whoever_brings_it(disk: Disk) -> None:
    disk.store([entry("a"), entry("b")], ())
    disk.store([entry("b"), entry("c"), entry("c")], ())
    assert [e.id for e in held(disk)] == ["a", "b", "c"]


def test_two_different_entries_under_one_id_are_both_kept(disk: Disk) -> None:
    one, other = entry("a"), entry("a", value="other")
    disk.store([one], ())
    disk.store([other], ())
    assert held(disk) == [one, other]


def test_when_a_log_took_an_entry_is_filled_in_once_and_stays(disk: Disk) -> None:
    disk.store([entry("a")], ())
    disk.store([entry("a", at=7)], ())
    disk.store([entry("a", at=9), entry("b", at=3)], ())
    disk.store([entry("b")], ())
    assert [(e.id, e.at) for e in held(disk)] == [("a", 7), ("b", 3)]


def test_entries_come_back_as_they_are_and_in_the_order_that_they_came(disk: Disk) -> None:
    strange = Entry("i", "sub", "ß", " ünïcode\n\0'\"\\", 7, 2_000_000_000, "…", 12, "eu")
    never = entry("k", kind="kid", expires_at=NEVER_EXPIRES)
    many = [entry(f"m{n}") for n in range(1_001)]
    disk.store([strange, never, *many], ())
    assert set(held(disk)) == {strange, never, *many}
    assert [e.id for e in disk.get([d.digest() for d in many[:3]])] == ["m0", "m1", "m2"]
    assert list(disk.digests()) == [e.digest() for e in (strange, never, *many)]
    assert list(disk.get([entry("unknown").digest()])) == []


def test_an_epoch_once_known_to_have_opened_stays_so(disk: Disk) -> None:
    disk.store((), [link(1), link(2)])
    disk.store((), [link(1, opened=True)])
    disk.store((), [link(1), link(3)])
    assert {key.number: known.opened for key, known in disk.links.items()} == {1: True, 2: False, 3: False}
    assert all(key == key_of(known) for key, known in disk.links.items())


def test_a_promise_only_moves_forward(disk: Disk) -> None:
    later = EpochKey(5, "6" * 16)
    promises = [disk.promise]
    for epoch in (EPOCH, EpochKey(4, "f" * 16), EpochKey(5, "4" * 16), later):
        disk.make_promise(epoch)
        promises.append(disk.promise)
    assert promises == [None, EPOCH, EPOCH, EPOCH, later]


def test_only_what_changes_anything_is_counted(disk: Disk) -> None:
    commits = [disk.commit]
    writes: list[Callable[[], None]] = [
        lambda: disk.store([entry("a"), entry("b")], [link(1)]),
        lambda: disk.store([entry("a")], [link(1)]),
        lambda: disk.store((), ()),
        lambda: disk.store([entry("a", at=7)], ()),
        lambda: disk.store((), [link(1, opened=True)]),
        lambda: disk.make_promise(EPOCH),
        lambda: disk.make_promise(EPOCH),
    ]
    for write in writes:
        write()
        commits.append(disk.commit)
    steps = [after - before for before, after in pairwise(commits)]
    assert steps == [1, 0, 0, 1, 1, 1, 0]


def test_everything_is_there_when_the_keeper_is_started_again(disk_and_reopen: tuple[Disk, Reopen]) -> None:
    disk, reopen = disk_and_reopen
    disk.store([entry("a", at=7), entry("b")], [link(1, opened=True), link(2)])
    disk.make_promise(EPOCH)
    before = (disk.keeper_id, disk.promise, dict(disk.links), disk.commit, held(disk))
    disk = reopen(disk)
    assert (disk.keeper_id, disk.promise, dict(disk.links), disk.commit, held(disk)) == before


# -- the real disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SqliteDisk]:
    with closing(SqliteDisk(tmp_path / "keeper", region="eu")) as disk:
        yield disk


def test_only_this_user_can_read_it(sqlite: SqliteDisk, tmp_path: Path) -> None:
    sqlite.store([entry("a")], ())
    assert (tmp_path / "keeper").stat().st_mode & 0o777 == 0o700
    files = list((tmp_path / "keeper").iterdir())
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    assert {"keeper.lock", FILE, f"{FILE}-wal"} <= {path.name for path in files}


def test_two_keepers_never_share_a_disk(sqlite: SqliteDisk, tmp_path: Path) -> None:
    with pytest.raises(StartError) as refused:
        SqliteDisk(tmp_path / "keeper", region="eu")
    assert refused.value.code == "keeper_already_running"
    sqlite.close()
    SqliteDisk(tmp_path / "keeper", region="eu").close()


def refusal(directory: Path, region: str = "eu") -> StartError:
    with pytest.raises(StartError) as refused:
        SqliteDisk(directory, region=region)
    assert "KEYSERVICE_KEEPER_DIR" in str(refused.value)
    return refused.value


def test_the_disk_of_another_region_is_refused_by_name(sqlite: SqliteDisk, tmp_path: Path) -> None:
    keeper_id = sqlite.keeper_id
    sqlite.close()
    error = refusal(tmp_path / "keeper", "us")
    assert error.code == "keeper_of_another_region"
    assert "eu" in str(error)
    with closing(SqliteDisk(tmp_path / "keeper", region="eu")) as again:
        assert again.keeper_id == keeper_id


def test_the_disk_of_a_newer_release_is_refused_by_name(sqlite: SqliteDisk, tmp_path: Path) -> None:
    sqlite.close()
    with closing(sqlite3.connect(tmp_path / "keeper" / FILE, isolation_level=None)) as db:
        db.execute("UPDATE facts SET value = 2 WHERE name = 'format'")
    assert refusal(tmp_path / "keeper").code == "keeper_format_newer"


def test_a_file_that_is_no_database_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "keeper" / FILE
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1_000)
    for _ in range(2):  # and the lock is let go
        assert refusal(tmp_path / "keeper").code == "keeper_disk_invalid"
    assert path.read_bytes() == b"no database" * 1_000


def test_a_directory_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "keeper").touch()
    assert refusal(tmp_path / "keeper").code == "keeper_disk_invalid"


def test_of_a_write_that_does_not_fit_nothing_is_stored(sqlite: SqliteDisk) -> None:
    sqlite.store([entry("a")], [link(1)])
    before = (sqlite.commit, sqlite.count, dict(sqlite.links), held(sqlite))
    pages = sqlite._db.execute("PRAGMA page_count").fetchone()[0]
    sqlite._db.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(KeeperUnavailable) as refused:
        sqlite.store([entry(f"b{n}", reason="r" * 256) for n in range(200)], [link(2)])
    assert refused.value.code == "keeper_disk"
    assert (sqlite.commit, sqlite.count, dict(sqlite.links), held(sqlite)) == before
    sqlite._db.execute("PRAGMA max_page_count=1000000")
    sqlite.store([entry("b0")], [link(2)])
    assert (sqlite.commit, sqlite.count, len(sqlite.links)) == (before[0] + 1, 2, 2)


WRITER = """
import resource, sys
from pathlib import Path
from keyservice.errors import KeeperUnavailable
from keyservice.keeper_disk import SqliteDisk
from verifier.log import Entry

disk = SqliteDisk(Path(sys.argv[1]), region="eu")
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
for n in range(1_000_000):
    entries = [Entry(f"{n}-{i}", "jti", "i", "v", None, 2_000_000_000, "r" * 100, 0, "eu") for i in range(10)]
    try:
        disk.store(entries, ())
    except KeeperUnavailable as error:
        print(error.code, flush=True)
        break
    print(n, flush=True)
"""


def writer(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that says a number once ten entries of that number are stored."""
    command = [sys.executable, "-c", WRITER, str(directory), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def stored_numbers(directory: Path) -> list[int]:
    """Of every write that is there; each must be whole."""
    with closing(SqliteDisk(directory, region="eu")) as disk:
        ids = [e.id for e in held(disk)]
        assert disk.count == len(ids)
        numbers = list(dict.fromkeys(int(entry_id.partition("-")[0]) for entry_id in ids))
        assert ids == [f"{n}-{i}" for n in numbers for i in range(10)]
        assert disk.commit >= len(numbers)
        return numbers


@pytest.mark.parametrize("after", [1, 7, 40, 150])
def test_what_was_acknowledged_is_there_after_a_kill_in_the_middle_of_writing(tmp_path: Path, after: int) -> None:
    with writer(tmp_path) as child:
        assert child.stdout is not None
        said = [int(next(child.stdout)) for _ in range(after)]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout if line.endswith("\n")]
    stored = stored_numbers(tmp_path)
    assert stored[: len(said)] == said
    assert len(stored) <= len(said) + 1, "at most the one that was under way"


def test_a_disk_that_takes_no_more_says_so_and_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    with writer(tmp_path, "300000") as child:
        out, _ = child.communicate(timeout=60)
    *said, last = out.split()
    assert last == "keeper_disk"
    assert said
    assert stored_numbers(tmp_path) == [int(n) for n in said]


def test_a_copy_that_finds_the_original_ahead_becomes_another_keeper_that_promised_nothing(sqlite: SqliteDisk) -> None:
    sqlite.store([entry("a")], [link(1)])
    sqlite.make_promise(EPOCH)
    before = sqlite.keeper_id
    sqlite.become_another()
    assert sqlite.keeper_id != before
    assert sqlite.promise is None
    assert [e.id for e in held(sqlite)] == ["a"]
    sqlite.make_promise(EpochKey(1, "1" * 16))
    assert sqlite.promise == EpochKey(1, "1" * 16)


def test_only_what_can_matter_no_more_is_dropped(sqlite: SqliteDisk) -> None:
    lives = entry("b", expires_at=1_000)
    key = entry("c", kind="kid", expires_at=NEVER_EXPIRES)
    sqlite.store([entry("a", expires_at=999), lives, key], ())
    assert sqlite.drop_expired(1_000.0) == 1
    assert held(sqlite) == [lives, key]
    assert sqlite.count == 2
    assert sqlite.find_all(["a", "b", "c"]) == {"b": lives, "c": key}


def test_an_id_is_answered_with_its_first_entry(sqlite: SqliteDisk) -> None:
    many = [entry(f"m{n}") for n in range(1_001)]
    sqlite.store([*many, entry("m0", value="other")], ())
    assert sqlite.find_all([e.id for e in many] + ["none"]) == {e.id: e for e in many}


def test_keys_and_their_wrapped_halves_are_kept_until_they_are_over(sqlite: SqliteDisk, tmp_path: Path) -> None:
    key = make_key()
    record = prepare(key.kid, "eu", "RS256", dict(key.jwk), 1.0)
    sqlite.store_keys([record], {key.kid: b"wrapped"}, ())
    sqlite.raise_min_reader_format(3)
    sqlite.raise_min_reader_format(2)
    sqlite.close()
    with closing(SqliteDisk(tmp_path / "keeper", region="eu")) as again:
        assert (again.keys(), again.private(), again.min_reader_format) == ({key.kid: record}, {key.kid: b"wrapped"}, 3)
        removed = msgspec.structs.replace(record, state="removed", rev=1)
        again.store_keys([removed], {}, [key.kid])
        assert (again.keys(), again.private()) == ({key.kid: removed}, {})
