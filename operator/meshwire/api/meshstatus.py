"""MeshStatus: the one row people look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from meshwire.api import conditions, fields, names
from meshwire.api.conditions import Condition
from meshwire.api.meshnode import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A change of keys that was decided upon. `from_epoch` is the epoch that ends, so that nobody begins the
    same change twice. `moved_at`: since when all live nodes send by the new keys; empty: they don't.
    `request` is what asked for it; empty: its time had come. All times are RFC 3339."""

    from_epoch: int
    started_at: str
    moved_at: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRotation:
    """The latest change of keys that came to its end, at which only `epoch` was left."""

    epoch: int
    started_at: str
    finished_at: str

    @property
    def seconds(self) -> int:
        """From the decision to the end of the old keys."""
        return max(0, int((_time(self.finished_at) - _time(self.started_at)).total_seconds()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """One node's quarantine. `revocation` tells it from the node's others. `asked_at`: when the operator saw
    it; `revoked_at`: when the last of the live nodes had said that the node is no peer of its any more;
    empty: not yet. `waiting` live nodes haven't said so, `waiting_for` names the first of them. Times are
    RFC 3339, with milliseconds."""

    node: str
    revocation: int
    asked_at: str
    revoked_at: str = ""
    waiting: int = 0
    waiting_for: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """From the quarantine to the last peer's word; 0.0 without."""
        if not self.revoked_at:
            return 0.0
        return max(0.0, (_time(self.revoked_at) - _time(self.asked_at)).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshStatus:
    """`epoch` is the highest ever used (0: none yet); `epoch_started_at` is RFC 3339, empty without keys:
    since when the keys are in force that carry the traffic of all. `handled_request` is the latest value of
    names.ROTATE_ANNOTATION that was taken up, `rotations` how many came to their end."""

    encryption: str = "Off"
    phase: Phase = Phase.OFF
    epoch: int = 0
    epoch_started_at: str = ""
    rotation: Rotation | None = None
    last_rotation: LastRotation | None = None
    rotations: int = 0
    handled_request: str = ""
    quarantines: tuple[Quarantine, ...] = ()
    nodes: int = 0
    nodes_ready: int = 0
    leaked: int = 0
    conditions: tuple[Condition, ...] = ()
    uid: str = field(default="", compare=False)
    resource_version: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return names.STATUS_NAME

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshStatus:
        """Reads a MeshStatus as the API server gives it. Raises InvalidSpec."""
        metadata, status = fields.child(source, "metadata", ""), fields.child(source, "status", "")
        return cls(
            encryption=fields.text(status, "encryption", "status", default="Off"),
            phase=fields.choice(status, "phase", "status", default=Phase.OFF),
            epoch=fields.integer(status, "epoch", "status", default=0),
            epoch_started_at=fields.text(status, "epochStartedAt", "status"),
            rotation=_rotation(fields.child(status, "rotation", "status")),
            last_rotation=_last_rotation(fields.child(status, "lastRotation", "status")),
            rotations=fields.integer(status, "rotations", "status", default=0),
            handled_request=fields.text(status, "handledRotate", "status"),
            quarantines=fields.listed(status, "quarantines", "status", _quarantine),
            nodes=fields.integer(status, "nodes", "status", default=0),
            nodes_ready=fields.integer(status, "nodesReady", "status", default=0),
            leaked=fields.integer(status, "leaked", "status", default=0),
            conditions=conditions.parse(status),
            uid=fields.text(metadata, "uid", "metadata"),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
        )

    def to_dict(self) -> dict[str, Any]:
        """What goes into `status`."""
        return {
            "encryption": self.encryption,
            "phase": str(self.phase),
            "epoch": self.epoch,
            # null takes the field away where the status is merge-patched.
            "epochStartedAt": self.epoch_started_at or None,
            "rotation": {
                "fromEpoch": self.rotation.from_epoch,
                "startedAt": self.rotation.started_at,
                "movedAt": self.rotation.moved_at or None,
                "request": self.rotation.request or None,
            }
            if self.rotation
            else None,
            "lastRotation": {
                "epoch": self.last_rotation.epoch,
                "startedAt": self.last_rotation.started_at,
                "finishedAt": self.last_rotation.finished_at,
                "seconds": self.last_rotation.seconds,
            }
            if self.last_rotation
            else None,
            "rotations": self.rotations,
            "handledRotate": self.handled_request,
            "quarantines": [
                {
                    "node": each.node,
                    "revocation": each.revocation,
                    "askedAt": each.asked_at,
                    **({"revokedAt": each.revoked_at} if each.revoked_at else {}),
                    "waiting": each.waiting,
                    "waitingFor": list(each.waiting_for),
                }
                for each in self.quarantines
            ],
            "nodes": self.nodes,
            "nodesReady": self.nodes_ready,
            "nodesSummary": f"{self.nodes_ready}/{self.nodes}",
            "leaked": self.leaked,
            "conditions": conditions.to_list(self.conditions),
        }


def _rotation(source: Mapping[str, Any]) -> Rotation | None:
    path = "status.rotation"
    if not source:
        return None
    return Rotation(
        from_epoch=fields.integer(source, "fromEpoch", path, default=0),
        started_at=_moment(source, "startedAt", path),
        moved_at=_moment(source, "movedAt", path),
        request=fields.text(source, "request", path),
    )


def _last_rotation(source: Mapping[str, Any]) -> LastRotation | None:
    path = "status.lastRotation"
    if not source:
        return None
    return LastRotation(
        epoch=fields.integer(source, "epoch", path, default=0),
        started_at=_moment(source, "startedAt", path),
        finished_at=_moment(source, "finishedAt", path),
    )


def _quarantine(source: Any, path: str) -> Quarantine:
    if not isinstance(source, Mapping):
        raise fields.InvalidSpec(path, "must be an object")
    return Quarantine(
        node=fields.text(source, "node", path),
        revocation=fields.integer(source, "revocation", path, default=0),
        asked_at=_moment(source, "askedAt", path),
        revoked_at=_moment(source, "revokedAt", path),
        waiting=fields.integer(source, "waiting", path, default=0),
        waiting_for=fields.listed(source, "waitingFor", path, _name),
    )


def _name(item: Any, path: str) -> str:
    return fields.text({"item": item}, "item", path)


def _moment(source: Mapping[str, Any], name: str, path: str) -> str:
    value = fields.text(source, name, path)
    try:
        _time(value or "2000-01-01T00:00:00Z")
    except ValueError:
        raise fields.InvalidSpec(f"{path}.{name}", f"{value!r} is no time") from None
    return value


def _time(value: str) -> datetime:
    return datetime.fromisoformat(value)
