"""MeshStatus: the one row people look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwire.api import conditions, fields, names
from meshwire.api.conditions import Condition
from meshwire.api.meshnode import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshStatus:
    """`epoch` is the highest ever used (0: none yet); `epoch_started_at` is RFC 3339, empty without keys."""

    encryption: str = "Off"
    phase: Phase = Phase.OFF
    epoch: int = 0
    epoch_started_at: str = ""
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
            "nodes": self.nodes,
            "nodesReady": self.nodes_ready,
            "nodesSummary": f"{self.nodes_ready}/{self.nodes}",
            "leaked": self.leaked,
            "conditions": conditions.to_list(self.conditions),
        }
