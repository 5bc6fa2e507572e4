"""A map of the kernel's beside what it should hold. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import Enum
from heapq import nsmallest
from typing import Final, Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Absent(Enum):
    ABSENT = 0


_ABSENT: Final = _Absent.ABSENT
_Held = Literal[_Absent.ABSENT]


class Table(Generic[K, V]):
    """What a map should hold, and where that differs from what it was last known to hold: the cost of an
    update, and of knowing, is that of what differs, whatever the size of the map. `left_out` is what it
    should hold as well, and has no room for."""

    def __init__(self) -> None:
        self.desired: dict[K, V] = {}
        self.left_out: dict[K, V] = {}
        self._differing: dict[K, V | _Held] = {}
        """Key -> what the map holds there; of all others it holds what it should."""
        self._refused: set[K] = set()
        self._size = 0

    def set(self, key: K, value: V) -> None:
        if key in self.left_out:
            self.left_out[key] = value
        elif key not in self.desired or self.desired[key] != value:
            self._want(key, value)

    def discard(self, key: K) -> None:
        if key in self.left_out:
            del self.left_out[key]
            self._refused.discard(key)
        elif key in self.desired:
            self._unwant(key)

    def refuse(self, key: K) -> None:
        """The kernel has no room for it, whatever was planned: left out until `forgive`."""
        if key in self.desired:
            self._refused.add(key)
            self._leave_out(key)

    def forgive(self) -> None:
        self._refused.clear()

    def _leave_out(self, key: K) -> None:
        self.left_out[key] = self._unwant(key)

    def _take_back(self, key: K) -> None:
        self._want(key, self.left_out.pop(key))

    def _want(self, key: K, value: V) -> None:
        held = self._held(key)
        self.desired[key] = value
        self._compare(key, held)

    def _unwant(self, key: K) -> V:
        held = self._held(key)
        value = self.desired.pop(key)
        self._compare(key, held)
        return value

    def replace(self, desired: Mapping[K, V]) -> None:
        """All of what it should hold."""
        for key in (self.desired.keys() | self.left_out.keys()) - desired.keys():
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
    def actual(self) -> dict[K, V]:
        """All that the map was last known to hold, put together anew each time."""
        found = ((key, self.held(key)) for key in self.desired.keys() | self._differing.keys())
        return {key: value for key, value in found if value is not None}

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


class AddressTable(Table[bytes, V]):
    """By addresses (packed), each of which can be left out without harm to another."""

    def fit(self, capacity: int, is_first: Callable[[bytes], bool] = lambda address: False) -> bool:
        """Leaves out what is too much for `capacity` entries, or takes back what there is room for again;
        whether that was anything. What is in the map stays rather than what is new, but those that
        `is_first` go before all others. The same choice each time, as long as nothing changes."""
        waiting = self.left_out.keys() - self._refused
        back = {address for address in waiting if is_first(address)}
        room = capacity - len(self.desired) - len(back)
        if room > 0 and len(back) < len(waiting):
            back |= set(nsmallest(room, waiting - back))
        for address in back:
            self._take_back(address)
        if (excess := len(self.desired) - capacity) <= 0:
            return bool(back)
        # First of those that are new: they are few.
        new = [each for each, held in self._differing.items() if held is _ABSENT]
        out = sorted((address for address in new if not is_first(address)), reverse=True)[:excess]
        if len(out) < excess:
            rest = self.desired.keys() - set(out)
            ranked = sorted(rest, key=lambda each: (not is_first(each), self.held(each) is None, each))
            out += ranked[len(out) - excess :]
        for address in out:
            self._leave_out(address)
        return back != set(out)
