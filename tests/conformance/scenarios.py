"""What each script of the key service is called with, and what it then must have done.

A new script gets one :class:`Scenario` here, and is then checked as all of them are: it loads under the SHA-1 that we
compute, does its work as the key service's user, refuses by name and changes nothing, and runs on a cluster's node.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from keyservice.store import load_script
from tests.conformance.target import Names
from verifier.log import Beat, Entry, Epoch, Meta
from verifier.testing import make_key

NONCE = "0123456789abcdef"
KEEPER = "a-keeper"
KEY = make_key()
ENTRY = ("e1", "jti", "https://id.test", "x", "", "4000000000", "", "0", "eu")


class Bench:
    """A trust log of a test's own."""

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self.client = client
        self.names = names
        self.number = ""

    def over(self, client: redis.Redis) -> Bench:
        """The same log over another connection."""
        other = Bench(client, self.names)
        other.number = self.number
        return other

    def key(self, name: str) -> str:
        if name == "region":  # the scripts find a voter's record by the region's name
            return self.names.region()
        return self.names.private(name[3:]) if name.startswith("ks:") else self.names.trust(name)

    def run(self, script: str, keys: tuple[str, ...], args: list[str]) -> Any:
        text, sha1 = load_script(script)
        named = [self.key(name) for name in keys]
        try:
            return self.client.evalsha(sha1, len(named), *named, *args)
        except redis.exceptions.NoScriptError:
            return self.client.eval(text, len(named), *named, *args)

    def refusal(self, script: str, keys: tuple[str, ...], args: list[str]) -> str:
        return refusal(lambda: self.run(script, keys, args))

    def call(self, script: str) -> Any:
        """An ordinary call of a script."""
        scenario = SCENARIOS[script]
        return self.run(script, scenario.keys, scenario.args(self.number))

    def start(self) -> None:
        """Make the first epoch, with one voter."""
        voters = json.dumps({self.names.run: KEEPER})
        outcome, number = self.run("bump.lua", ("meta", "epoch", "log"), _bump("", "", voters=voters))
        assert outcome == b"bumped"
        self.number = number.decode()

    def open(self) -> None:
        assert self.call("open.lua") == [1]

    def epoch(self) -> Epoch:
        return Epoch.decode(self.hash("epoch"))

    def hash(self, name: str) -> dict[bytes, bytes]:
        held: dict[bytes, bytes] = self.client.hgetall(self.key(name))  # type: ignore[assignment]
        return held

    def log(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        held: list[tuple[bytes, dict[bytes, bytes]]] = self.client.xrange(self.key("log"))  # type: ignore[assignment]
        return held

    def everything(self, script: str) -> list[Any]:
        """What the script's keys hold."""
        return [self.log() if name == "log" else self.hash(name) for name in SCENARIOS[script].keys]


@dataclass(frozen=True)
class Scenario:
    """``keys`` by their short names (``ks:`` for private ones), ``args`` of an ordinary call, and its check.

    ``checks_epoch``: it refuses outside the epoch that it is called with; ``needs_primary``: also on a replica.
    """

    keys: tuple[str, ...]
    args: Callable[[str], list[str]]
    check: Callable[[Bench], None]
    checks_epoch: bool = True
    needs_primary: bool = True


def _bump(number: str, nonce: str, new: str = NONCE, voters: str = "") -> list[str]:
    meta = ["incarnation", "1", "1", "86400"]
    return [number, nonce, new, "0", f"epoch-{new}", "eu", voters, "", "0", *meta, "", ""]


def record(state: str = "prepared", rev: int = 0) -> str:
    return json.dumps({"kid": KEY.kid, "state": state, "rev": rev, "published_at": None})


def _append(bench: Bench) -> None:
    keys = SCENARIOS["append.lua"].keys
    first, last, at, beat = bench.run("append.lua", keys, [bench.number, NONCE, "", *ENTRY, *ENTRY])
    assert (first, last, beat) == (b"1", b"2", b"-1")
    ids = [stream_id.decode() for stream_id, _ in bench.log()]
    assert ids == [f"{bench.number}-{seq}" for seq in range(3)]
    written = Entry.decode(bench.log()[1][1])
    assert (written.id, written.kind, written.value, written.at) == ("e1", "jti", "x", int(at))
    seconds, _ = bench.client.time()
    assert abs(written.at / 1000 - seconds) < 60
    many = [bench.number, NONCE, "", *(field for n in range(1000) for field in (f"n{n}", *ENTRY[1:]))]
    assert bench.run("append.lua", keys, many)[:2] == [b"3", b"1002"]
    link = {"number": 7, "nonce": "a" * 16, "previous": None, "voters": {}, "opened": True}
    assert bench.run("append.lua", keys, [bench.number, NONCE, json.dumps([link])])[0] == b""
    assert json.loads(bench.hash("epoch")[b"known"]) == [link]
    unknown = [bench.number, NONCE, "", ENTRY[0], "unheard-of", *ENTRY[2:]]
    assert bench.refusal("append.lua", keys, unknown) == "TRUST_KIND"


def _beat(bench: Bench) -> None:
    written, at = bench.call("beat.lua")
    assert written == 1
    beat = Beat.decode(bench.hash("beat"))
    assert (beat.at_ms, beat.n, beat.position.stream_id) == (int(at), 0, f"{bench.number}-0")
    assert beat.confirmed_n is None
    keys = SCENARIOS["beat.lua"].keys
    assert bench.run("beat.lua", keys, [bench.number, NONCE, "600000"])[0] == 0
    bench.open()
    bench.call("report.lua")
    assert bench.run("beat.lua", keys, [bench.number, NONCE, "0"])[0] == 1
    beat = Beat.decode(bench.hash("beat"))
    assert (beat.n, beat.confirmed_n, beat.confirmed_at_ms) == (2, 0, 1000)


def _bumped(bench: Bench) -> None:
    first, keys = bench.epoch(), SCENARIOS["bump.lua"].keys
    assert Meta.decode(bench.hash("meta")).incarnation == "incarnation"
    again = _bump(bench.number, NONCE, "f" * 16)
    outcome, number = bench.run("bump.lua", keys, again)
    assert (outcome, int(number) > first.number) == (b"bumped", True)
    epoch = bench.epoch()
    assert [link.number for link in epoch.chain] == [first.number, int(number)]
    assert epoch.chain[-1].previous == f"{first.number}-0.{NONCE}"
    assert epoch.chain[-1].voters == {bench.names.run: KEEPER}
    assert bench.log()[-1][0] == number + b"-0"
    assert bench.run("bump.lua", keys, again) == [b"lost"]


def _open(bench: Bench) -> None:
    assert bench.call("open.lua") == [1]
    assert bench.call("open.lua") == [0]
    epoch = bench.epoch()
    assert epoch.open
    assert epoch.chain[-1].opened
    assert Beat.decode(bench.hash("beat")).n == 0


def _prune(bench: Bench) -> None:
    keys = SCENARIOS["prune.lua"].keys
    chain = bench.hash("epoch")[b"chain"].decode()
    assert bench.refusal("prune.lua", keys, [bench.number, NONCE, chain, chain, "[]", "[]"]) == "TRUST_CLOSED"
    bench.open()
    chain = bench.hash("epoch")[b"chain"].decode()
    for code, args in (("TRUST_REV", ["[]", chain]), ("TRUST_STATE", [chain, "[]"])):
        assert bench.refusal("prune.lua", keys, [bench.number, NONCE, *args, "[]", "[]"]) == code
    assert bench.run("prune.lua", keys, [bench.number, NONCE, chain, chain, "[]", "[]"]) == 1
    assert bench.hash("epoch")[b"chain"].decode() == chain


def _reader_format(bench: Bench) -> None:
    assert bench.call("reader_format.lua") == 2
    keys = SCENARIOS["reader_format.lua"].keys
    assert bench.run("reader_format.lua", keys, [bench.number, NONCE, "1"]) == 2
    meta = Meta.decode(bench.hash("meta"))
    assert (meta.min_reader_format, meta.writer_format) == (2, 2)


def _register(bench: Bench) -> None:
    assert bench.call("register.lua") == [b"exists"]
    bench.client.unlink(bench.key("meta"))
    assert bench.call("register.lua") == [b"registered"]
    assert bench.hash("region")[b"keeper_id"].decode() == KEEPER


def _report(bench: Bench) -> None:
    assert bench.call("report.lua") == [1]
    held = bench.hash("region")
    behind = [bench.number, NONCE, KEEPER, "0-0", "0", "-1", "0", "0-0", "v"]
    assert bench.run("report.lua", SCENARIOS["report.lua"].keys, behind) == [1]
    evidence = (b"held", b"commit", b"beat_n", b"beat_at", b"beat_position")
    assert all(bench.hash("region")[name] == held[name] for name in evidence)
    another = [bench.number, NONCE, "another", *behind[3:]]
    assert bench.refusal("report.lua", SCENARIOS["report.lua"].keys, another) == "TRUST_KEEPER"


def _trim(bench: Bench) -> None:
    """An expired entry goes, a live one is carried forward and never dropped."""
    dead = ("dead", *ENTRY[1:5], "1", *ENTRY[6:])
    live = ("live", *ENTRY[1:])
    last = ("last", *ENTRY[1:])
    bench.run("append.lua", SCENARIOS["append.lua"].keys, [bench.number, NONCE, "", *dead, *live, *last])
    ids = [stream_id.decode() for stream_id, _ in bench.log()]
    keys, now = SCENARIOS["trim.lua"].keys, str(bench.client.time()[0])
    cut = [bench.number, NONCE, "", ids[2], ids[0], ids[2], ids[3], "3", now, "300"]
    assert bench.refusal("trim.lua", keys, [*cut, "3"]) == "TRUST_CLOSED"
    bench.open()
    assert bench.refusal("trim.lua", keys, cut) == "TRUST_TRIM_LIVE"
    assert bench.refusal("trim.lua", keys, [*cut[:5], "9-9", *cut[6:], "3"]) == "TRUST_TRIMMED"
    assert len(bench.log()) == 4
    assert bench.run("trim.lua", keys, [*cut, "3"]) == [3, 1]
    kept = [Entry.decode(fields).id for _, fields in bench.log()]
    assert kept == ["last", "live"]
    assert Meta.decode(bench.hash("meta")).trimmed_to == (int(bench.number), 2)


def _keys_merge(bench: Bench) -> None:
    assert bench.call("keys_merge.lua") == [2]
    assert bench.call("keys_merge.lua") == [0]
    assert bench.hash("private")[KEY.kid.encode()] == b"envelope"
    keys = SCENARIOS["keys_merge.lua"].keys
    newer = [bench.number, NONCE, "1", KEY.kid, record("published", 1)]
    assert bench.run("keys_merge.lua", keys, newer) == [1]
    assert json.loads(bench.hash("keys")[KEY.kid.encode()])["state"] == "published"


def _keys_put(bench: Bench) -> None:
    assert bench.call("keys_put.lua") == [1]
    assert json.loads(bench.hash("keys")[KEY.kid.encode()])["rev"] == 0
    refusals = {
        "TRUST_REV": ["", KEY.kid, "-1", record(rev=1)],
        "TRUST_STATE": ["", KEY.kid, "0", record("unheard-of", 1)],
    }
    for code, change in refusals.items():
        before = bench.everything("keys_put.lua")
        args = [bench.number, NONCE, *change]
        assert bench.refusal("keys_put.lua", ("keys", "epoch"), args) == code
        assert bench.everything("keys_put.lua") == before
    stated = [bench.number, NONCE, "1", KEY.kid, "0", record("published", 1)]
    assert bench.run("keys_put.lua", ("keys", "epoch"), stated) == [2]


def _serving(bench: Bench) -> None:
    (first,) = bench.call("serving.lua")
    held = bench.hash("serving")
    assert held == {b"nonce": NONCE.encode(), b"kid:a": first, b"kid:b": first}
    assert bench.run("serving.lua", ("serving", "epoch"), [bench.number, NONCE, "b", "c"])
    now = bench.hash("serving")
    assert now.keys() == {b"nonce", b"kid:b", b"kid:c"}
    assert now[b"kid:b"] == first  # since when it was said first
    bench.client.hset(bench.key("serving"), mapping={"nonce": "e" * 16, "kid:b": "1"})  # said in another epoch
    bench.call("serving.lua")
    assert int(bench.hash("serving")[b"kid:b"]) >= int(first)


def _client_put(bench: Bench) -> None:
    assert bench.call("client_put.lua") == b"done"
    assert bench.call("client_put.lua") == b"changed"
    keys = SCENARIOS["client_put.lua"].keys
    assert bench.run("client_put.lua", keys, ["b", "", "{}", "r2", "1"]) == b"full"
    assert bench.run("client_put.lua", keys, ["a", "{}", "", "r3", "1"]) == b"done"
    assert bench.hash("ks:clients") == {}
    assert bench.client.get(bench.key("ks:clients-revision")) == b"r3"


def _refresh(bench: Bench) -> None:
    keys = SCENARIOS["refresh.lua"].keys
    assert bench.call("refresh.lua") == [b"unknown"]
    bench.call("session_start.lua")
    assert bench.run("refresh.lua", keys, ["old", "other", "new", "sealed", "60000"]) == [b"unknown"]
    assert bench.call("refresh.lua") == [b"fresh"]
    assert bench.call("refresh.lua") == [b"repeated", b"sealed"]
    assert bench.run("refresh.lua", keys, ["new", "family", "newer", "s", "0"]) == [b"fresh"]
    assert bench.run("refresh.lua", keys, ["new", "family", "newest", "s", "0"]) == [b"reused"]
    assert bench.run("refresh.lua", keys, ["newer", "family", "newest", "s", "0"]) == [b"reused"]


def _session_get(bench: Bench) -> None:
    assert bench.call("session_get.lua") == [None, None]
    bench.call("session_start.lua")
    assert bench.call("session_get.lua") == [b"{}", b"family"]


def _session_start(bench: Bench) -> None:
    assert bench.call("session_start.lua") == 1
    assert bench.hash("ks:session") == {b"data": b"{}", b"family": b"family", b"refresh": b"old"}
    assert bench.client.ttl(bench.key("ks:session")) > 0


SCENARIOS: dict[str, Scenario] = {
    "append.lua": Scenario(("log", "epoch", "beat", "meta"), lambda n: [n, NONCE, "", *ENTRY], _append),
    "beat.lua": Scenario(("beat", "epoch", "log"), lambda n: [n, NONCE, "100"], _beat),
    "bump.lua": Scenario(("meta", "epoch", "log"), lambda n: _bump(n, NONCE, "e" * 16), _bumped, checks_epoch=False),
    "client_put.lua": Scenario(
        ("ks:clients", "ks:clients-revision"),
        lambda _: ["a", "", "{}", "r1", "1"],
        _client_put,
        checks_epoch=False,
        needs_primary=False,
    ),
    "keys_merge.lua": Scenario(
        ("keys", "epoch", "private"),
        lambda n: [n, NONCE, "1", KEY.kid, record(), KEY.kid, "envelope"],
        _keys_merge,
    ),
    "keys_put.lua": Scenario(("keys", "epoch"), lambda n: [n, NONCE, "", KEY.kid, "-1", record()], _keys_put),
    "open.lua": Scenario(("epoch", "beat", "log"), lambda n: [n, NONCE], _open),
    "prune.lua": Scenario(("epoch",), lambda n: [n, NONCE, "[]", "[]", "[]", "[]"], _prune),
    "reader_format.lua": Scenario(("meta", "epoch"), lambda n: [n, NONCE, "2"], _reader_format),
    "refresh.lua": Scenario(
        ("ks:session", "ks:successor"),
        lambda _: ["old", "family", "new", "sealed", "60000"],
        _refresh,
        checks_epoch=False,
        needs_primary=False,
    ),
    "register.lua": Scenario(("meta", "region"), lambda _: [KEEPER], _register, checks_epoch=False),
    "report.lua": Scenario(
        ("region", "epoch"), lambda n: [n, NONCE, KEEPER, f"{n}-0", "1", "0", "1000", f"{n}-0", "v"], _report
    ),
    "serving.lua": Scenario(("serving", "epoch"), lambda n: [n, NONCE, "a", "b"], _serving),
    "session_get.lua": Scenario(("ks:session",), lambda _: [], _session_get, checks_epoch=False, needs_primary=False),
    "session_start.lua": Scenario(
        ("ks:session",),
        lambda _: ["{}", "family", "old", "4000000000"],
        _session_start,
        checks_epoch=False,
        needs_primary=False,
    ),
    "trim.lua": Scenario(
        ("log", "epoch", "meta"),
        lambda n: [n, NONCE, "", f"{n}-0", f"{n}-0", f"{n}-0", f"{n}-1", "1", "1", "300"],
        _trim,
    ),
}


def refusal(call: Callable[[], Any]) -> str:
    """The first word of the error that a call is answered with, or ``""``."""
    named = {"NoPermissionError": "NOPERM", "ReadOnlyError": "READONLY"}
    try:
        call()
    except redis.ResponseError as error:
        return named.get(type(error).__name__) or str(error).partition(" ")[0]
    return ""
