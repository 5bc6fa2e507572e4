"""Which replica acts: the rules of a coordination.k8s.io Lease. Pure.

As in client-go: nobody compares clocks. A replica measures by its own clock how long it has seen the record
unchanged, and takes over after that; a holder that could not renew for a shorter time stops by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, Final

DURATION: Final = 15.0
"""Seconds an unchanged record keeps others from taking over."""
RENEW_DEADLINE: Final = 10.0
"""Seconds after its last renewal, counted from before the request, in which a holder may act."""
RETRY: Final = 2.0
"""Seconds between attempts."""


class Move(Enum):
    CREATE = auto()
    TAKE = auto()
    RENEW = auto()
    WAIT = auto()


@dataclass(frozen=True, slots=True)
class Record:
    """`version` is the Lease's resource version, `raw` its spec."""

    holder: str
    version: str
    raw: Mapping[str, Any]

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Record:
        spec = source.get("spec") or {}
        return cls(spec.get("holderIdentity") or "", source["metadata"]["resourceVersion"], spec)


def decide(record: Record | None, *, me: str, unchanged_for: float) -> Move:
    """What to do about the record, which was seen unchanged for so many seconds."""
    if record is None:
        return Move.CREATE
    if record.holder == me:
        return Move.RENEW
    if not record.holder or unchanged_for >= DURATION:
        return Move.TAKE
    return Move.WAIT


def taken(record: Record | None, *, me: str, now: datetime) -> dict[str, Any]:
    """The Lease's spec by which `me` creates, takes or renews it."""
    old = record.raw if record else {}
    renews = record is not None and record.holder == me
    return {
        "holderIdentity": me,
        "leaseDurationSeconds": int(DURATION),
        "acquireTime": old.get("acquireTime") if renews else _micro_time(now),
        "renewTime": _micro_time(now),
        "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if renews or record is None else 1),
    }


def released(record: Record, *, now: datetime) -> dict[str, Any]:
    """The Lease's spec by which its holder lets go: the next replica need not wait."""
    return {**record.raw, "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_time(now)}


def _micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
