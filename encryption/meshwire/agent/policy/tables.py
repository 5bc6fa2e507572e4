"""A map of the kernel's beside what it should hold. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Table(Generic[K, V]):
    """What a map should hold, what it was last known to hold, and the keys in which the two may differ: the
    cost of an update is that of what has changed, whatever the size of the map."""

    def __init__(self) -> None:
        self.desired: dict[K, V] = {}
        self.actual: dict[K, V] = {}
        self._dirty: set[K] = set()

    def set(self, key: K, value: V) -> None:
        if key not in self.desired or self.desired[key] != value:
            self.desired[key] = value
            self._dirty.add(key)

    def discard(self, key: K) -> None:
        if key in self.desired:
            del self.desired[key]
            self._dirty.add(key)

    def replace(self, desired: Mapping[K, V]) -> None:
        """All of what it should hold."""
        for key in self.desired.keys() - desired.keys():
            self.discard(key)
        for key, value in desired.items():
            self.set(key, value)

    def found(self, actual: dict[K, V]) -> None:
        """All of what the map holds, as it was read."""
        self._dirty |= {
            key for key in actual.keys() | self.desired.keys() if actual.get(key) != self.desired.get(key)
        }
        self.actual = actual

    @property
    def is_settled(self) -> bool:
        return not self.writes() and not self.deletes()

    def writes(self) -> list[tuple[K, V]]:
        return [
            (key, self.desired[key])
            for key in self._dirty
            if key in self.desired and (key not in self.actual or self.actual[key] != self.desired[key])
        ]

    def deletes(self) -> list[K]:
        return [key for key in self._dirty if key not in self.desired and key in self.actual]

    def wrote(self, items: Iterable[tuple[K, V]]) -> None:
        for key, value in items:
            self.actual[key] = value
            self._settle(key)

    def deleted(self, keys: Iterable[K]) -> None:
        for key in keys:
            self.actual.pop(key, None)
            self._settle(key)

    def _settle(self, key: K) -> None:
        if (key in self.desired) == (key in self.actual) and self.desired.get(key) == self.actual.get(key):
            self._dirty.discard(key)
