"""MeshIdentity: a number that stands for a set of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from meshwire.api import fields, names

FIRST: Final = 256
"""The lowest number of pods' labels; those below have fixed meanings."""
LAST: Final = 2**24 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshIdentity:
    """`labels` are sorted pairs, so that equal label sets are equal values. They never change."""

    number: int
    labels: tuple[tuple[str, str], ...] = ()
    uid: str = ""
    resource_version: str = field(default="", compare=False)
    created: str = ""

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshIdentity:
        """Reads a MeshIdentity as the API server gives it. Raises InvalidSpec."""
        metadata = fields.child(source, "metadata", "")
        labels = fields.child(fields.child(source, "spec", ""), "labels", "spec")
        return cls(
            number=number(fields.text(metadata, "name", "metadata"), "metadata.name"),
            labels=tuple(sorted((key, fields.text(labels, key, "spec.labels")) for key in labels)),
            uid=fields.text(metadata, "uid", "metadata"),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
            created=fields.text(metadata, "creationTimestamp", "metadata"),
        )

    @property
    def name(self) -> str:
        return str(self.number)

    def to_dict(self) -> dict[str, Any]:
        """The object to create."""
        return {
            "apiVersion": names.API_VERSION,
            "kind": "MeshIdentity",
            "metadata": {"name": self.name},
            "spec": {"labels": dict(self.labels)},
        }


def number(name: str, path: str) -> int:
    """The number that a MeshIdentity's name is. Raises InvalidSpec."""
    found = int(name) if name.isascii() and name.isdecimal() and len(name) <= 8 else 0
    if not FIRST <= found <= LAST or str(found) != name:
        raise fields.InvalidSpec(path, f"{name!r} is not a number from {FIRST} to {LAST}")
    return found
