"""A map of the kernel's beside what it should hold. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from heapq import nsmallest
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Table(Generic[K, V]):
    """What a map should hold, what it was last known to hold, and the keys in which the two may differ: the
    cost of an update is that of what has changed, whatever the size of the map. `left_out` is what it should
    hold as well, and has no room for."""

    def __init__(self) -> None:
        self.desired: dict[K, V] = {}
        self.actual: dict[K, V] = {}
        self.left_out: dict[K, V] = {}
        self._dirty: set[K] = set()
        self._refused: set[K] = set()

    def set(self, key: K, value: V) -> None:
        if key in self.left_out:
            self.left_out[key] = value
        elif key not in self.desired or self.desired[key] != value:
            self.desired[key] = value
            self._dirty.add(key)

    def discard(self, key: K) -> None:
        if key in self.left_out:
            del self.left_out[key]
            self._refused.discard(key)
        elif key in self.desired:
            del self.desired[key]
            self._dirty.add(key)

    def refuse(self, key: K) -> None:
        """The kernel has no room for it, whatever was planned: left out until `forgive`."""
        if key in self.desired:
            self._refused.add(key)
            self._leave_out(key)

    def forgive(self) -> None:
        self._refused.clear()

    def _leave_out(self, key: K) -> None:
        self.left_out[key] = self.desired.pop(key)
        self._dirty.add(key)

    def replace(self, desired: Mapping[K, V]) -> None:
        """All of what it should hold."""
        for key in (self.desired.keys() | self.left_out.keys()) - desired.keys():
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
            self.desired[address] = self.left_out.pop(address)
            self._dirty.add(address)
        if (excess := len(self.desired) - capacity) <= 0:
            return bool(back)
        # First of those that are new: they are few.
        new = [address for address in self._dirty if address in self.desired and address not in self.actual]
        out = sorted((address for address in new if not is_first(address)), reverse=True)[:excess]
        if len(out) < excess:
            rest = self.desired.keys() - set(out)
            ranked = sorted(rest, key=lambda each: (not is_first(each), each not in self.actual, each))
            out += ranked[len(out) - excess :]
        for address in out:
            self._leave_out(address)
        return back != set(out)
