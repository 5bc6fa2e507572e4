"""What the operator takes for true: what the watches have brought, corrected by what it wrote or listed
itself.

A watch lags behind our own writes, so a decision taken from it alone could be taken twice. And kopf never
learns of an object that was deleted while a watch was interrupted for long: only a list tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Versioned(Protocol):
    """An object's projection."""

    @property
    def name(self) -> str: ...

    @property
    def uid(self) -> str: ...

    @property
    def resource_version(self) -> str: ...


T = TypeVar("T", bound=Versioned)


@dataclass(slots=True)
class Overlay(Generic[T]):
    """Corrections to one kind's watch, by name. Each is forgotten when the watch has caught up with it."""

    written: dict[str, T] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    """uid by name"""

    def wrote(self, item: T) -> None:
        """We wrote the object, or saw it so in a list."""
        self.gone.pop(item.name, None)
        self.written[item.name] = item

    def deleted(self, name: str, uid: str) -> None:
        self.written.pop(name, None)
        self.gone[name] = uid

    def deletion_seen(self, name: str, uid: str) -> None:
        """The watch has brought the object's end."""
        if name in self.written and self.written[name].uid == uid:
            del self.written[name]

    def listed(self, items: Iterable[T], watched: Mapping[str, T], version: str) -> None:
        """Everything there is, as of `version`, replaces all corrections."""
        self.written = {item.name: item for item in items}
        self.gone = {
            name: item.uid
            for name, item in watched.items()
            if name not in self.written and not _newer(item.resource_version, version)
        }

    def over(self, watched: Mapping[str, T]) -> dict[str, T]:
        """The objects as they are to the best of our knowledge."""
        result = dict(watched)
        for name, item in list(self.written.items()):
            seen = watched.get(name)
            if seen is not None and not _newer(item.resource_version, seen.resource_version):
                del self.written[name]
            else:
                result[name] = item
        for name, uid in list(self.gone.items()):
            if name not in watched or watched[name].uid != uid:
                del self.gone[name]
            else:
                del result[name]
        return result


def _newer(one: str, other: str) -> bool:
    """Resource versions of one resource are numbers that grow:
    kubernetes.io/docs/reference/using-api/api-concepts, "Resource versions", guaranteed since 1.35 and so
    before."""
    return int(one or 0) > int(other or 0)
