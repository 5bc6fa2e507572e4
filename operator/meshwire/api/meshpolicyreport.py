"""MeshPolicyReport: which policies one node carries out, in that node's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from meshwire.api import fields
from meshwire.api.fields import InvalidSpec

MAX_POLICIES: Final = 4096
"""Of each list. A node with more reports the first ones."""
MAX_MESSAGE: Final = 256
"""Characters of a failure's message; longer ones are cut."""
MAX_MAPS: Final = 16

INVALID: Final = "Invalid"
TOO_LARGE: Final = "TooLarge"
MAP_FULL: Final = "MapFull"
"""Reasons of a Failure: the policy can't be read; its entries are more than one pod may have; a map of the
node has no room for them."""


@dataclass(frozen=True, slots=True)
class InForce:
    """A policy that the node's datapath judges by, in that generation. `would_deny` counts packets that a
    policy in mode Audit would have dropped there."""

    uid: str
    generation: int
    would_deny: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A policy that the node can't carry out in that generation."""

    uid: str
    generation: int
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class MapPressure:
    """A map of the node's datapath that fills up: `entries` of `capacity`, as of when that began. `full`:
    there is something that it has no room for, `left_out` entries then."""

    map: str
    entries: int
    capacity: int
    full: bool = False
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPolicyReport:
    """`name` is the node's; `owner` the uid of the Node it stands for. `enabled`: the node judges packets by
    policies at all. `pressure`: maps that fill up; none while there is room."""

    name: str
    uid: str = ""
    owner: str = ""
    resource_version: str = field(default="", compare=False)
    enabled: bool = False
    policies: tuple[InForce, ...] = ()
    failed: tuple[Failure, ...] = ()
    pressure: tuple[MapPressure, ...] = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshPolicyReport:
        """Reads a MeshPolicyReport as the API server gives it; a status not written yet reads as its
        defaults. Raises InvalidSpec."""
        metadata, status = fields.child(source, "metadata", ""), fields.child(source, "status", "")
        return cls(
            name=fields.text(metadata, "name", "metadata"),
            uid=fields.text(metadata, "uid", "metadata"),
            owner=next(
                (
                    owner["uid"]
                    for owner in metadata.get("ownerReferences") or ()
                    if owner.get("kind") == "Node"
                ),
                "",
            ),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
            enabled=fields.boolean(status, "enabled", "status", default=False),
            policies=fields.listed(status, "policies", "status", _in_force),
            failed=fields.listed(status, "failed", "status", _failure),
            pressure=fields.listed(status, "mapPressure", "status", _pressure),
        )

    def to_dict(self) -> dict[str, Any]:
        """What goes into `status`."""
        return {
            "enabled": self.enabled,
            "count": len(self.policies),
            "policies": [
                {"uid": item.uid, "generation": item.generation, "wouldDeny": item.would_deny}
                for item in self.policies[:MAX_POLICIES]
            ],
            "failed": [
                {
                    "uid": item.uid,
                    "generation": item.generation,
                    "reason": item.reason,
                    "message": item.message[:MAX_MESSAGE],
                }
                for item in self.failed[:MAX_POLICIES]
            ],
            "mapPressure": [
                {
                    "map": item.map,
                    "entries": item.entries,
                    "capacity": item.capacity,
                    "full": item.full,
                    "leftOut": item.left_out,
                }
                for item in self.pressure[:MAX_MAPS]
            ],
        }


def _in_force(value: Any, path: str) -> InForce:
    source = _object(value, path)
    return InForce(
        uid=fields.text(source, "uid", path),
        generation=fields.integer(source, "generation", path, default=0),
        would_deny=fields.integer(source, "wouldDeny", path, default=0),
    )


def _failure(value: Any, path: str) -> Failure:
    source = _object(value, path)
    return Failure(
        uid=fields.text(source, "uid", path),
        generation=fields.integer(source, "generation", path, default=0),
        reason=fields.text(source, "reason", path),
        message=fields.text(source, "message", path),
    )


def _pressure(value: Any, path: str) -> MapPressure:
    source = _object(value, path)
    return MapPressure(
        map=fields.text(source, "map", path),
        entries=fields.integer(source, "entries", path, default=0),
        capacity=fields.integer(source, "capacity", path, default=0),
        full=fields.boolean(source, "full", path, default=False),
        left_out=fields.integer(source, "leftOut", path, default=0),
    )


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidSpec(path, "must be an object")
    return value
