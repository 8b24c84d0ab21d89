"""`regions model`: run many seeds, or replay one. Exit codes: 0 nothing broken, 1 a promise broken, 2 usage."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import msgspec
import typer

from regions.errors import ExitCode
from regions.model.mutants import HEALTHY, MUTANTS, Mutant, by_name
from regions.model.schedule import Outcome, run_schedule

__all__ = ["main", "model"]

CHUNK = 25
"""How many seeds a process takes at a time."""

Found = tuple[int, str, str]
"""Seed, promise, message."""

SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="How many schedules.")]
FromOption = Annotated[int, typer.Option("--from", min=0, help="The first seed.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Replay this one and print what happens.")]
MutantOption = Annotated[str, typer.Option("--mutant", help="Leave a rule out: one of the mutants' names.")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, max=256, help="How many processes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def model(
    seeds: SeedsOption = 1000,
    first: FromOption = 0,
    seed: SeedOption = None,
    mutant: MutantOption = HEALTHY.name,
    jobs: JobsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Run the keeper rules through seeded schedules of faults; each seed can be replayed."""
    system = by_name(mutant)
    if system is None:
        names = ", ".join(known.name for known in MUTANTS)
        raise typer.BadParameter(f"no such mutant; there are {names}", param_hint="--mutant")
    held = (
        _replay(seed, system, as_json) if seed is not None else _run(range(first, first + seeds), system, jobs, as_json)
    )
    if not held:
        raise typer.Exit(ExitCode.PROMISE_BROKEN)


def _replay(seed: int, system: Mutant, as_json: bool) -> bool:
    outcome = run_schedule(seed, system, trace=True)
    if as_json:
        _emit("replay", **_summary(outcome), mutant=system.name, trace=outcome.trace)
    else:
        _say(f"seed {seed}, flavour {outcome.flavour}, {outcome.regions} regions; {system.name}: {system.rule}")
        _say("time in seconds; an epoch is named by its number (ms since the start) and nonce, an entry e1, e2, …")
        for line in outcome.trace:
            _say(line)
        ending = "nothing was broken" if outcome.violation is None else f"broken: {outcome.violation}"
        counts = f"{outcome.acknowledged} acknowledged, {outcome.epochs} epochs, {outcome.losses} disks lost"
        _say(f"{ending}; {counts}")
    return outcome.violation is None


def _summary(outcome: Outcome) -> dict[str, object]:
    promise = None if outcome.violation is None else outcome.violation.promise
    return {
        "seed": outcome.seed,
        "flavour": outcome.flavour,
        "regions": outcome.regions,
        "acknowledged": outcome.acknowledged,
        "epochs": outcome.epochs,
        "disks_lost": outcome.losses,
        "promise": promise,
        "message": None if outcome.violation is None else str(outcome.violation),
    }


def _run(seeds: range, system: Mutant, jobs: int, as_json: bool) -> bool:
    started, done, broken = time.monotonic(), 0, 0
    progress = sys.stderr.isatty() and not as_json
    for count, found in _results(seeds, system, jobs):
        done, broken = done + count, broken + len(found)
        for seed, promise, message in found:
            _report(seed, promise, message, system, as_json)
        if progress:
            sys.stderr.write(f"\r{done} of {len(seeds)} schedules, {broken} broken ")
            sys.stderr.flush()
    if progress:
        sys.stderr.write("\n")
    took = time.monotonic() - started
    if as_json:
        _emit("model", mutant=system.name, first=seeds.start, schedules=done, broken=broken, seconds=round(took, 3))
    else:
        each = f"{took:.1f} s, {took / done * 1000:.1f} ms each"
        _say(f"{done} schedules from seed {seeds.start}, {broken} broken, {each}")
    return broken == 0


def _report(seed: int, promise: str, message: str, system: Mutant, as_json: bool) -> None:
    left_out = "" if system is HEALTHY else f" --mutant {system.name}"
    replay = f"regions model --seed {seed}{left_out}"
    if as_json:
        _emit("violation", seed=seed, promise=promise, message=message, replay=replay)
    else:
        _say(f"seed {seed}: {message}; replay: {replay}")


def _results(seeds: range, system: Mutant, jobs: int) -> Iterator[tuple[int, list[Found]]]:
    """How many seeds each chunk had, and what was broken in it, as they come in."""
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    work = partial(_chunk, system.name)
    if jobs == 1:
        yield from map(work, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(work, chunks)


def _chunk(mutant: str, seeds: range) -> tuple[int, list[Found]]:
    system = by_name(mutant)
    assert system is not None
    violations = ((seed, run_schedule(seed, system).violation) for seed in seeds)
    return len(seeds), [(seed, broken.promise, str(broken)) for seed, broken in violations if broken is not None]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _emit(kind: str, **members: object) -> None:
    sys.stdout.write(msgspec.json.encode({"type": kind, **members}).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    """`python -m regions.model`."""
    typer.run(model)
