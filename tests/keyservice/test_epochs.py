"""What a writer does after a refusal, and who may start the trust log."""

from __future__ import annotations

import pytest

from keyservice.core.epochs import Step, after_refusal, founders


@pytest.mark.parametrize(
    ("code", "step"),
    [
        ("TRUST_REPLID", Step.BUMP),
        ("TRUST_NO_EPOCH", Step.WAIT),
        ("TRUST_EPOCH", Step.REREAD),
        ("TRUST_NOT_PRIMARY", Step.UNREACHABLE),
        ("TRUST_REV", Step.GIVE_UP),
        ("TRUST_STATE", Step.GIVE_UP),
        ("OOM", Step.GIVE_UP),
    ],
)
def test_a_refusal_says_what_to_do_next(code: str, step: Step) -> None:
    assert after_refusal(code) is step


@pytest.mark.parametrize(
    ("region", "regions", "bootstrap_region", "registered", "voters"),
    [
        ("a", ("a",), None, {"a": "k"}, {"a": "k"}),
        ("a", ("a",), None, {}, None),
        ("a", ("a", "b"), "a", {"a": "k", "b": "l", "c": "m"}, {"a": "k", "b": "l"}),
        ("a", ("a", "b"), "a", {"a": "k"}, None),
        ("a", ("a", "b"), None, {"a": "k", "b": "l"}, None),
        ("b", ("a", "b"), "a", {"a": "k", "b": "l"}, None),
    ],
)
def test_one_region_begins_the_log_once_every_seat_has_a_keeper_that_holds_nothing(
    region: str,
    regions: tuple[str, ...],
    bootstrap_region: str | None,
    registered: dict[str, str],
    voters: dict[str, str] | None,
) -> None:
    assert founders(region, regions, bootstrap_region, registered) == voters
