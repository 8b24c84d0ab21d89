"""What keepers have reported, read from one server in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from verifier.log import EPOCH_KEY, Epoch, FormatError, region_key

from .core.evidence import Report
from .errors import PrimaryUnreachable
from .store import Node

__all__ = ["Evidence", "read_evidence"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The epoch, None where there is no log, and every region's report. ``at_ms`` says when each was put in place.

    ``registered`` are keepers that have claimed a seat on a server without a log.
    """

    epoch: Epoch | None
    reports: Mapping[str, Report]
    at_ms: Mapping[str, int]
    versions: Mapping[str, str]


async def read_evidence(node: Node, regions: Sequence[str]) -> Evidence:
    """Raises :class:`PrimaryUnreachable` if the server does not answer. What cannot be read is left out."""
    try:
        async with node.redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(EPOCH_KEY)
            for region in regions:
                pipe.hgetall(region_key(region))
            raw, *records = await pipe.execute()
    except (RedisError, OSError):
        raise PrimaryUnreachable from None
    try:
        epoch = Epoch.decode(raw) if raw else None
    except FormatError:
        epoch = None
    reports, at_ms, versions = {}, {}, {}
    for region, record in zip(regions, records, strict=True):
        report = _report(region, record)
        if report is not None:
            reports[region] = report
            at_ms[region] = _integer(record, b"at")
            versions[region] = record.get(b"version", b"").decode("ascii", "replace")
    return Evidence(epoch, reports, at_ms, versions)


def _report(region: str, record: Mapping[bytes, bytes]) -> Report | None:
    try:
        return Report(
            region=region,
            keeper_id=record[b"keeper_id"].decode("ascii"),
            number=int(record[b"number"]),
            nonce=record[b"nonce"].decode("ascii"),
            held=record[b"held"].decode("ascii"),
            commit=int(record[b"commit"]),
            beat_n=int(record[b"beat_n"]),
            beat_at_ms=int(record[b"beat_at"]),
            beat_position=record[b"beat_position"].decode("ascii"),
        )
    except (KeyError, ValueError):
        return None


def _integer(record: Mapping[bytes, Any], name: bytes) -> int:
    try:
        return int(record.get(name, b"0"))
    except ValueError:
        return 0
