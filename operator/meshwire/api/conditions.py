"""Conditions as Kubernetes (metav1.Condition) and kstatus know them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from meshwire.api import fields

READY: Final = "Ready"
RECONCILING: Final = "Reconciling"
STALLED: Final = "Stalled"
ACCEPTED: Final = "Accepted"
STRICT_SCOPE: Final = "StrictScope"
POLICY_MAP_PRESSURE: Final = "PolicyMapPressure"
PAIRS_HEALTHY: Final = "PairsHealthy"
QUARANTINE: Final = "Quarantine"
BOOT_GUARD: Final = "BootGuard"

MAX_MESSAGE: Final = 1024
"""Characters of a condition's message; longer ones are cut. metav1.Condition would allow 32768."""

_STATUSES: Final[Mapping[str, bool | None]] = {"True": True, "False": False, "Unknown": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`status` None is Unknown; `since` is RFC 3339 in UTC, the moment `status` last changed."""

    type: str
    status: bool | None
    reason: str
    message: str = ""
    observed_generation: int = 0
    since: str = ""


def parse(source: Mapping[str, Any], path: str = "status") -> tuple[Condition, ...]:
    """The conditions of a status. Raises InvalidSpec."""

    def condition(item: Any, path: str) -> Condition:
        if not isinstance(item, Mapping):
            raise fields.InvalidSpec(path, "must be an object")
        return Condition(
            type=fields.text(item, "type", path),
            status=_STATUSES.get(fields.text(item, "status", path)),
            reason=fields.text(item, "reason", path),
            message=fields.text(item, "message", path),
            observed_generation=fields.integer(item, "observedGeneration", path, default=0),
            since=fields.text(item, "lastTransitionTime", path),
        )

    return fields.listed(source, "conditions", path, condition)


def to_list(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    """What goes into `status.conditions`."""
    return [
        {
            "type": condition.type,
            "status": {True: "True", False: "False", None: "Unknown"}[condition.status],
            "reason": condition.reason,
            "message": condition.message,
            "observedGeneration": condition.observed_generation,
            "lastTransitionTime": condition.since,
        }
        for condition in conditions
    ]


def find(conditions: Iterable[Condition], type: str) -> Condition | None:
    return next((condition for condition in conditions if condition.type == type), None)


def is_true(conditions: Iterable[Condition], type: str, *, generation: int) -> bool:
    """The condition holds, and was judged on `generation` or a later one."""
    condition = find(conditions, type)
    return condition is not None and condition.status is True and condition.observed_generation >= generation


def set_condition(
    conditions: Sequence[Condition],
    *,
    type: str,
    status: bool | None,
    reason: str,
    message: str = "",
    observed_generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """`conditions` with this one put in place of the one of its type, or added at the end. `since` moves to
    `now` only where `status` changed, so setting what is already set gives an equal tuple."""
    old = find(conditions, type)
    new = Condition(
        type=type,
        status=status,
        reason=reason,
        message=shortened(message),
        observed_generation=observed_generation,
        since=timestamp(now),
    )
    if old is None:
        return (*conditions, new)
    if old.status == status and old.since:
        new = replace(new, since=old.since)
    return tuple(new if condition is old else condition for condition in conditions)


def without(conditions: Iterable[Condition], type: str) -> tuple[Condition, ...]:
    """All but that of the type, if there is one."""
    return tuple(condition for condition in conditions if condition.type != type)


def shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds, as metav1.Time prints it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
