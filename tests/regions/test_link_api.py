"""The control API speaks Toxiproxy's dialect: its shapes, its defaults and its errors."""

from __future__ import annotations

import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from regions.errors import LinkFailed
from regions.link import Proxy
from regions.link_rules import link_config
from regions.topology import Topology
from tests.regions.link_lab import LabFactory, echo

Api = Callable[[], Any]
LATENCY = {"name": "slow", "type": "latency", "stream": "upstream", "attributes": {"latency": 1000, "jitter": 10}}


@asynccontextmanager
async def client(lab: LabFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with lab(echo, default_ms=1) as links:
        transport = httpx.AsyncHTTPTransport(uds=str(links.control))
        async with httpx.AsyncClient(transport=transport, base_url="http://link") as http:
            yield http


async def test_every_ordered_pair_of_regions_is_a_proxy(lab: LabFactory) -> None:
    async with client(lab) as http:
        reply = await http.get("/proxies")
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        assert set(reply.json()) == {f"{a}:{b}" for a in "abc" for b in "abc"}
        one = (await http.get("/proxies/b:a")).json()
        assert one == reply.json()["b:a"]
        assert one.keys() == {"name", "listen", "upstream", "enabled", "toxics"}
        assert (one["name"], one["enabled"], one["toxics"]) == ("b:a", True, [])
        assert one["listen"].startswith("127.0.1.1:")
        assert (await http.get("/proxies/b%3Aa")).json() == one


async def test_a_toxic_is_added_shown_changed_and_removed(lab: LabFactory) -> None:
    async with client(lab) as http:
        reply = await http.post("/proxies/b:a/toxics", json=LATENCY)
        assert (reply.status_code, reply.json()) == (200, {**LATENCY, "toxicity": 1.0})
        assert (await http.get("/proxies/b:a/toxics")).json() == [reply.json()]
        assert (await http.get("/proxies/b:a/toxics/slow")).json() == reply.json()
        assert (await http.get("/proxies/b:a")).json()["toxics"] == [reply.json()]
        for method in ("POST", "PATCH"):
            changed = await http.request(method, "/proxies/b:a/toxics/slow", json={"attributes": {"latency": 5}})
            assert (changed.status_code, changed.json()["attributes"]) == (200, {"latency": 5, "jitter": 10})
        gone = await http.delete("/proxies/b:a/toxics/slow")
        assert (gone.status_code, gone.content) == (204, b"")
        assert (await http.get("/proxies/b:a/toxics")).json() == []


async def test_what_a_toxic_leaves_out_has_toxiproxys_defaults(lab: LabFactory) -> None:
    async with client(lab) as http:
        assert (await http.post("/proxies/b:a/toxics", json={"type": "timeout"})).json() == {
            "name": "timeout_downstream",
            "type": "timeout",
            "stream": "downstream",
            "toxicity": 1.0,
            "attributes": {"timeout": 0},
        }


async def test_upstream_toxics_are_listed_first(lab: LabFactory) -> None:
    async with client(lab) as http:
        for stream in ("downstream", "upstream"):
            await http.post("/proxies/b:a/toxics", json={"type": "timeout", "stream": stream})
        names = [toxic["name"] for toxic in (await http.get("/proxies/b:a/toxics")).json()]
        assert names == ["timeout_upstream", "timeout_downstream"]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_a_proxy_is_taken_down_and_up_also_by_sending_it_back_whole(lab: LabFactory, method: str) -> None:
    async with client(lab) as http:
        whole = (await http.get("/proxies/b:a")).json()
        reply = await http.request(method, "/proxies/b:a", json={**whole, "enabled": False})
        assert (reply.status_code, reply.json()) == (200, {**whole, "enabled": False})
        assert (await http.request(method, "/proxies/b:a", json={"enabled": True})).json() == whole


async def test_a_reset_enables_every_proxy_and_removes_every_toxic(lab: LabFactory) -> None:
    async with client(lab) as http:
        before = (await http.get("/proxies")).json()
        await http.post("/proxies/b:a/toxics", json=LATENCY)
        await http.post("/proxies/c:a", json={"enabled": False})
        assert (await http.get("/proxies")).json() != before
        reply = await http.post("/reset")
        assert (reply.status_code, reply.content) == (204, b"")
        assert (await http.get("/proxies")).json() == before


async def test_the_version_is_of_the_dialect(lab: LabFactory) -> None:
    async with client(lab) as http:
        major = (await http.get("/version")).json()["version"].split(".")[0]
        assert major == "2"


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/proxies/a:mars", None, 404, "proxy not found: 'a:mars'"),
    ("POST", "/proxies/a:mars", {"enabled": False}, 404, "proxy not found"),
    ("GET", "/proxies/a:mars/toxics", None, 404, "proxy not found"),
    ("POST", "/proxies/a:mars/toxics", LATENCY, 404, "proxy not found"),
    ("DELETE", "/proxies/a:mars/toxics/x", None, 404, "proxy not found"),
    ("GET", "/proxies/b:a/toxics/none", None, 404, "toxic not found: 'none'"),
    ("POST", "/proxies/b:a/toxics/none", {"attributes": {}}, 404, "toxic not found"),
    ("DELETE", "/proxies/b:a/toxics/none", None, 404, "toxic not found"),
    ("POST", "/proxies/b:a/toxics", LATENCY, 409, "toxic already exists: 'slow'"),
    ("POST", "/proxies/b:a/toxics", {**LATENCY, "stream": "downstream"}, 409, "toxic already exists"),
    ("POST", "/proxies/b:a/toxics", {"type": "explosion"}, 400, "invalid toxic type 'explosion'"),
    ("POST", "/proxies/b:a/toxics", {}, 400, "invalid toxic type"),
    ("POST", "/proxies/b:a/toxics", {"type": "timeout", "stream": "up"}, 400, "stream was invalid"),
    ("POST", "/proxies/b:a/toxics", {"type": "timeout", "toxicity": 0.5}, 400, "toxicity"),
    ("POST", "/proxies/b:a/toxics", {"type": "bandwidth", "attributes": {"rate": 0}}, 400, "bad request body"),
    ("POST", "/proxies/b:a/toxics", {"type": "timeout", "attributes": {"time": 0}}, 400, "bad request body"),
    ("POST", "/proxies/b:a/toxics", [], 400, "bad request body"),
    ("POST", "/proxies/b:a/toxics/slow", {"attributes": {"jitter": -1}}, 400, "bad request body"),
    ("POST", "/proxies/b:a/toxics/slow", {"toxicity": 0}, 400, "toxicity"),
    ("POST", "/proxies/b:a", {"enabled": "no"}, 400, "bad request body"),
    ("POST", "/proxies/b:a", {"listen": "127.0.0.1:1"}, 400, "bad request body"),
    ("POST", "/proxies", {"name": "x", "upstream": "y"}, 405, "method not allowed"),
    ("DELETE", "/proxies/b:a", None, 405, "method not allowed"),
    ("GET", "/nonsense", None, 404, "not found"),
    ("POST", "/links/a:b", {"one_way_ms": -1}, 400, "one_way_ms"),
    ("POST", "/links/a:b", {"one_way_ms": 10_001}, 400, "one_way_ms"),
    ("POST", "/links/a:mars", {"one_way_ms": 1}, 404, "mars"),
    ("POST", "/links/nonsense", {"one_way_ms": 1}, 404, "nonsense"),
    ("POST", "/proxies/a:mars/reset", None, 404, "proxy not found"),
    ("POST", "/addresses/a:1", {"closed": True}, 404, "nothing listens on port 1"),
    ("POST", "/addresses/a:x", {"closed": True}, 404, "nothing listens"),
    ("POST", "/addresses/a:1", {"shut": True}, 400, "shut"),
    ("POST", "/regions/mars", {"isolated": True}, 404, "mars"),
    ("POST", "/regions/a", {"isolated": 1}, 400, "isolated"),
    ("POST", "/changes", [{"proxy": "b:a", "colour": "red"}], 400, "colour"),
    ("POST", "/changes", [{"proxy": "b:a", "enabled": False}, {"proxy": "a:mars"}], 404, "proxy not found"),
]


async def test_an_error_says_what_is_wrong_with_its_status_and_changes_nothing(
    lab: LabFactory, subtests: pytest.Subtests
) -> None:
    async with client(lab) as http:
        await http.post("/proxies/b:a/toxics", json=LATENCY)
        before = ((await http.get("/proxies")).json(), (await http.get("/links")).json())
        for method, path, body, status, said in REFUSED:
            with subtests.test(f"{method} {path} {body}"):
                reply = await http.request(method, path, json=body)
                assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
                assert reply.json().keys() == {"error", "status"}
                assert reply.json()["status"] == status
                assert said in reply.json()["error"]
                assert ((await http.get("/proxies")).json(), (await http.get("/links")).json()) == before


async def test_a_body_that_is_no_json_is_refused(lab: LabFactory) -> None:
    async with client(lab) as http:
        reply = await http.post("/proxies/b:a/toxics", content=b"nonsense")
        assert (reply.status_code, reply.json()["error"][:16]) == (400, "bad request body")


async def test_many_pairs_change_in_one_request(lab: LabFactory) -> None:
    async with client(lab) as http:
        await http.post("/proxies/b:a/toxics", json=LATENCY)
        changes = [
            {"proxy": "b:a", "remove": ["slow", "never_was"], "put": [{"type": "cut", "stream": "upstream"}]},
            {"proxy": "a:b", "put": [{"type": "cut"}], "enabled": False},
        ]
        assert (await http.post("/changes", json=changes)).status_code == 204
        proxies = (await http.get("/proxies")).json()
        assert [toxic["name"] for toxic in proxies["b:a"]["toxics"]] == ["cut_upstream"]
        assert [toxic["name"] for toxic in proxies["a:b"]["toxics"]] == ["cut_downstream"]
        assert (proxies["a:b"]["enabled"], proxies["b:a"]["enabled"]) == (False, True)


async def test_a_lag_is_set_for_a_way_and_shown_among_the_counters(lab: LabFactory) -> None:
    async with client(lab) as http:
        reply = await http.post("/links/b:a", json={"one_way_ms": 25})
        assert (reply.status_code, reply.json()) == (200, {"from": "b", "to": "a", "one_way_ms": 25})
        pairs = (await http.get("/links")).json()["pairs"]
        assert {(p["from"], p["to"]): p["one_way_ms"] for p in pairs}["b", "a"] == 25


async def test_the_socket_is_its_owners_alone_replaces_a_stale_one_and_goes_with_the_proxy(
    run_dir: Path, topology_with: Callable[..., Topology]
) -> None:
    control = run_dir / "control.sock"
    config = link_config(topology_with({}), {}, control)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(control))
        async with Proxy(config):
            assert stat.S_ISSOCK(control.stat().st_mode)
            assert control.stat().st_mode & 0o077 == 0
        assert not control.exists()


async def test_a_control_socket_that_cannot_be_bound_is_named(
    run_dir: Path, topology_with: Callable[..., Topology]
) -> None:
    config = link_config(topology_with({}), {}, run_dir / "absent" / "control.sock")
    with pytest.raises(LinkFailed, match=r"absent/control\.sock"):
        async with Proxy(config):
            pass
