"""The checkers turn red on real servers: recorders whose verifier is wrong on purpose, in a cluster of one region."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from regions.checkers import Violation
from regions.cluster import Cluster
from tests.faults.harness import FaultCluster

MUTANT = Path(__file__).with_name("mutant_recorder.py")
BOUNDS: dict[str, Any] = {"max_staleness_s": 1.0, "max_skew_s": 0.5, "leeway_s": 2.0}
"""Short ones, so that `acknowledged + max_staleness_s + max_skew_s` is soon over."""


async def kinds_found(mutant: str, cluster: Cluster, directory: Path) -> dict[str, list[Violation]]:
    program = (sys.executable, str(MUTANT), mutant)
    async with FaultCluster(cluster, directory, program=program, **BOUNDS) as faults:
        (revoked, valid) = await faults.mint(2)
        if mutant != "strict":
            await faults.accepted_everywhere([revoked, valid])
        await faults.revoke(revoked)
        await faults.replicated_everywhere()
        violations = await faults.violations(within_s=10.0)
    by_kind: dict[str, list[Violation]] = {}
    for violation in violations:
        by_kind.setdefault(f"{violation.promise} {violation.kind}", []).append(violation)
    return by_kind


async def test_verifier_that_ignores_revocations_breaks_p2_and_p3(small_cluster: Cluster, directory: Path) -> None:
    found = await kinds_found("deaf", small_cluster, directory)
    assert {kind: len(violations) for kind, violations in found.items()} == {
        "P2 acknowledged and lost": 1,
        "P3 fresh and fooled": 1,
    }
    assert "token-0" in str(found["P3 fresh and fooled"][0])


async def test_verifier_that_forgets_a_revocation_breaks_p2(small_cluster: Cluster, directory: Path) -> None:
    found = await kinds_found("forgetful", small_cluster, directory)
    found.pop("P3 fresh and fooled", None)  # if it was watched for long enough
    assert {kind: len(violations) for kind, violations in found.items()} == {
        "P2 acknowledged and lost": 1,
        "P2 un-revoked": 1,
    }


async def test_verifier_that_refuses_valid_tokens_breaks_p4(small_cluster: Cluster, directory: Path) -> None:
    found = await kinds_found("strict", small_cluster, directory)
    assert set(found) == {"P4 valid and refused"}
    assert any("token-1," in str(violation) for violation in found["P4 valid and refused"])


async def test_right_verifier_with_the_same_bounds_breaks_nothing(small_cluster: Cluster, directory: Path) -> None:
    async with FaultCluster(small_cluster, directory, **BOUNDS) as faults:
        (revoked, valid) = await faults.mint(2)
        await faults.accepted_everywhere([revoked, valid])
        await faults.revoke(revoked)
        await faults.replicated_everywhere()
        await faults.assert_promises()
