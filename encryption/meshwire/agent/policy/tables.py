"""A map of the kernel's beside what it should hold. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from enum import Enum
from typing import Final, Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Absent(Enum):
    ABSENT = 0


_ABSENT: Final = _Absent.ABSENT
_Held = Literal[_Absent.ABSENT]


class Table(Generic[K, V]):
    """What a map should hold, and where that differs from what it was last known to hold: the cost of an
    update, and of knowing, is that of what differs, whatever the size of the map."""

    def __init__(self) -> None:
        self.desired: dict[K, V] = {}
        self._differing: dict[K, V | _Held] = {}
        """Key -> what the map holds there; of all others it holds what it should."""
        self._size = 0

    def set(self, key: K, value: V) -> None:
        if key in self.desired and self.desired[key] == value:
            return
        held = self._held(key)
        self.desired[key] = value
        self._compare(key, held)

    def discard(self, key: K) -> None:
        if key in self.desired:
            held = self._held(key)
            del self.desired[key]
            self._compare(key, held)

    def replace(self, desired: Mapping[K, V]) -> None:
        """All of what it should hold."""
        for key in self.desired.keys() - desired.keys():
            self.discard(key)
        for key, value in desired.items():
            self.set(key, value)

    def found(self, actual: Mapping[K, V]) -> None:
        """All of what the map holds, as it was read."""
        desired = self.desired
        self._size = len(actual)
        self._differing = {
            key: value for key, value in actual.items() if key not in desired or desired[key] != value
        }
        self._differing.update((key, _ABSENT) for key in desired if key not in actual)

    def held(self, key: K) -> V | None:
        """What the map was last known to hold; None: nothing."""
        held = self._held(key)
        return None if held is _ABSENT else held

    @property
    def size(self) -> int:
        """Entries that the map was last known to hold."""
        return self._size

    @property
    def differing(self) -> int:
        """Keys in which the two differ."""
        return len(self._differing)

    @property
    def is_settled(self) -> bool:
        return not self._differing

    def writes(self) -> list[tuple[K, V]]:
        return [(key, self.desired[key]) for key in self._differing if key in self.desired]

    def deletes(self) -> list[K]:
        return [key for key in self._differing if key not in self.desired]

    def wrote(self, items: Iterable[tuple[K, V]]) -> None:
        for key, value in items:
            self._size += self._held(key) is _ABSENT
            self._compare(key, value)

    def deleted(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._size -= self._held(key) is not _ABSENT
            self._compare(key, _ABSENT)

    def _held(self, key: K) -> V | _Held:
        if key in self._differing:
            return self._differing[key]
        return self.desired.get(key, _ABSENT)

    def _compare(self, key: K, held: V | _Held) -> None:
        """Takes note of what the map holds."""
        if held == self.desired.get(key, _ABSENT):
            if self._differing.pop(key, None) is not None and not self._differing:
                # An empty dictionary keeps the room that it ever had.
                self._differing = {}
        else:
            self._differing[key] = held
