"""The suite itself: what a result looks like, what counts as worse, what is drawn. Never how fast anything is."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks import compare, picture, report
from benchmarks.__main__ import SPEED, main
from benchmarks.form import RATIO, Figure, Result, figure, measured, ratio, take_turns
from benchmarks.generator import _is_whole
from benchmarks.machine import Machine, this_machine
from benchmarks.report import Report

MACHINE = Machine("a processor", 2, "Linux x86_64", "CPython 3.11", "OpenSSL 3")


def result_of(*figures: Figure) -> Result:
    return Result(title="a title", measurements=measured({"one": [1.0, 2.0, 3.0]}, "µs"), figures=figures)


def report_of(**figures: float) -> Report:
    """Each figure is a ratio; of those named `more`, more is better."""
    made = [
        figure(f"verifier {name} ÷ raw check", [value], RATIO, "higher" if name == "more" else "lower")
        for name, value in figures.items()
    ]
    return Report(MACHINE, {"cold": result_of(*made)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cold", "warm", "threads", "http_share"])
def test_a_quick_run_gives_a_result_of_the_common_form(name: str) -> None:
    result = import_module(f"benchmarks.{name}").measure(quick=True)
    assert isinstance(result, Result)
    assert all(m.value > 0 and m.rounds >= 7 and m.spread >= 0 for m in result.measurements)
    assert any(f.goal is not None for f in result.figures)
    assert any(f.unit == RATIO for f in result.figures)
    assert len({m.name for m in result.measurements}) == len(result.measurements)
    assert len({f.name for f in result.figures}) == len(result.figures)


@pytest.mark.slow
def test_node_peers_are_measured_or_named_as_left_out() -> None:
    result = import_module("benchmarks.warm").measure(quick=True)
    assert ("fast-jwt, cached" in {m.name for m in result.measurements}) != bool(result.left_out)
    assert all("make bench" in text for text in result.left_out)


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    found = ratio("a ÷ b", [1.0, 10.0, 3.0], [1.0, 5.0, 10.0], "lower", 1.0)
    assert found.value == 1.0
    assert found.met
    assert ratio("a ÷ b", [1.0, 10.0, 31.0], [1.0, 5.0, 10.0], "lower", 1.0).met is False


def test_contestants_take_turns_at_going_first() -> None:
    order: list[str] = []

    def contestant(name: str) -> Callable[[], float]:
        def one_round() -> float:
            order.append(name)
            return 1.0

        return one_round

    rounds = take_turns({name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert rounds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


# -- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "worsened"),
    [
        ({"less": 1.0}, {"less": 1.25}, False),
        ({"less": 1.0}, {"less": 1.26}, True),
        ({"more": 1.0}, {"more": 0.80}, False),
        ({"more": 1.0}, {"more": 0.79}, True),
        ({"less": 1.0}, {"less": 0.1}, False),
        ({"more": 1.0}, {"more": 9.0}, False),
    ],
)
def test_a_ratio_is_worse_from_a_quarter_on(before: dict[str, float], now: dict[str, float], worsened: bool) -> None:
    found, unmatched = compare.compare(report_of(**before), [report_of(**now)] * 3)
    assert [c.worsened for c in found] == [worsened]
    assert unmatched == []


def test_one_bad_run_of_three_counts_for_nothing_and_two_do() -> None:
    good, bad = report_of(less=1.0), report_of(less=9.0)
    assert not compare.compare(good, [good, bad, good])[0][0].worsened
    assert compare.compare(good, [bad, good, bad])[0][0].worsened


def test_what_only_one_side_has_is_named_and_times_are_not_compared() -> None:
    absolute = Report(MACHINE, {"cold": result_of(figure("same object", [9.0], "µs", "lower", 0.4))})
    found, unmatched = compare.compare(report_of(less=1.0), [absolute] * 3)
    assert found == []
    assert unmatched == ["cold: verifier less ÷ raw check"]


def test_what_only_others_can_change_is_not_compared() -> None:
    peer = Report(MACHINE, {"cold": result_of(figure("joserfc, key object ÷ raw check", [2.0], RATIO, "lower"))})
    assert compare.compare(peer, [peer] * 3) == ([], [])


def test_the_table_names_what_worsened(capsys: pytest.CaptureFixture[str]) -> None:
    found, unmatched = compare.compare(report_of(less=1.0), [report_of(less=2.0)] * 3)
    compare.show(found, unmatched, Console(width=200))
    assert "verifier less ÷ raw check" in capsys.readouterr().out


# -- what is written -------------------------------------------------------------------------------------------------


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert report.read(path) is None
    report.write(report_of(less=1.5), path)
    assert report.read(path) == report_of(less=1.5)


def test_a_run_of_some_keeps_the_others_of_the_same_machine_and_no_other() -> None:
    earlier = Report(MACHINE, {"warm": result_of()})
    assert set(report_of(less=1.0).merged_into(earlier).benchmarks) == {"cold", "warm"}
    elsewhere = Report(Machine("another", 64, "Linux", "", ""), {"warm": result_of()})
    assert set(report_of(less=1.0).merged_into(elsewhere).benchmarks) == {"cold"}


def test_the_machine_is_described_without_its_name_and_without_paths() -> None:
    described = repr(this_machine())
    assert platform.node() not in described
    assert str(Path.home()) not in described


def test_the_picture_is_well_formed_and_readable_on_both_pages(tmp_path: Path) -> None:
    drawn = Report(MACHINE, {"cold": result_of(figure("verifier ÷ raw check", [1.2], RATIO, "lower", 1.25))})
    path = tmp_path / "bench.svg"
    picture.write(drawn, path)
    root = ElementTree.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"verifier", "1.20 ×", "goal 1.25 ×"} <= set(texts)
    assert "prefers-color-scheme: dark" in path.read_text()


def test_a_quick_run_writes_nothing_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    before = report.RESULTS.read_bytes() if report.RESULTS.exists() else None
    assert main(["threads", "--quick", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["benchmarks"]) == {"threads"}
    assert (report.RESULTS.read_bytes() if report.RESULTS.exists() else None) == before


def test_every_benchmark_named_exists() -> None:
    assert all(callable(import_module(f"benchmarks.{name}").measure) for name in SPEED)


# -- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ],
)
def test_an_answer_counts_when_all_of_it_is_there(answer: bytes, whole: bool) -> None:
    assert _is_whole(answer) is whole
