"""What a writer does after a refusal, and who may start the trust log."""

from __future__ import annotations

import pytest

from keyservice.core.epochs import Step, after_refusal, bootstraps


@pytest.mark.parametrize(
    ("code", "step"),
    [
        ("TRUST_REPLID", Step.BUMP),
        ("TRUST_NO_EPOCH", Step.BUMP),
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
    ("region", "regions", "bootstrap_region", "may"),
    [
        ("a", ("a",), None, True),
        ("a", ("a", "b"), None, False),
        ("a", ("a", "b"), "a", True),
        ("b", ("a", "b"), "a", False),
    ],
)
def test_one_region_starts_the_log(
    region: str, regions: tuple[str, ...], bootstrap_region: str | None, may: bool
) -> None:
    assert bootstraps(region, regions, bootstrap_region) is may
