"""Which endpoint is in which MeshEndpointSlice. Pure.

Every change of a slice goes to every node, so an endpoint stays where it is, and a new one goes where
there is room, preferably into a slice that changes anyway. What is published is all the memory there is:
after a restart nothing moves.

The writes of one plan may be carried out in any order, and each may get lost; nevertheless
- an address is never published for two pods: whoever takes it over waits until the former entry is gone, or
  takes its place in the same slice, in one write;
- an endpoint that moves is never missing: it is published in its new slice first, and only when it is seen
  there taken out of the old one. Until then neither entry changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Final

from meshwire.api.fields import Address
from meshwire.api.meshendpointslice import MAX_ENDPOINTS, Endpoint
from meshwire.operator.objects import Slice

PREFIX: Final = "meshwire-"
SMALL: Final = 20
"""Endpoints of a slice that is worth merging into another."""
MERGED: Final = 80
"""Endpoints that the other has afterwards, at most: the next pods must not need a new slice again."""


@dataclass(frozen=True, slots=True)
class CreateSlice:
    name: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class WriteSlice:
    slice: Slice
    """As it was read."""
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class DeleteSlice:
    slice: Slice


SliceAction = CreateSlice | WriteSlice | DeleteSlice


def pack(
    current: Mapping[str, Slice], wanted: Mapping[str, Endpoint], undecided: Set[str]
) -> list[SliceAction]:
    """`wanted` by the pods' uids; no two have an address in common. Of the pods that are `undecided`, what
    is published stays."""
    homes, twice = _homes(current)
    contents: dict[str, dict[str, Endpoint]] = {}
    changing: set[str] = set()
    frozen: set[str] = set(twice)
    moved: list[tuple[str, Endpoint, Endpoint]] = []
    for name, old in current.items():
        content = contents[name] = {}
        for endpoint in old.endpoints:
            uid = endpoint.pod.uid
            new = wanted.get(uid)
            if homes[uid] != name or uid in content:
                changing.add(name)
            elif uid in twice and (new or uid in undecided):
                content[uid] = endpoint
            elif uid in undecided:
                frozen.add(uid)
                content[uid] = endpoint
            elif new is None:
                changing.add(name)
            else:
                content[uid] = endpoint
                if new != endpoint:
                    moved.append((name, endpoint, new))
    fresh = [wanted[uid] for uid in sorted(wanted.keys() - homes.keys())]
    elsewhere = _Published(
        current, (new.addresses for new in (*fresh, *(new for _, _, new in moved))), frozen
    )
    for name, old_endpoint, new in moved:
        uid = new.pod.uid
        addresses = tuple(address for address in new.addresses if not elsewhere.blocks(address, uid, name))
        if addresses:
            contents[name][uid] = replace(new, addresses=addresses)
        else:
            del contents[name][uid]
        if contents[name].get(uid) != old_endpoint:
            changing.add(name)
    homeless: list[Endpoint] = []
    for endpoint in fresh:
        places = {name for address in endpoint.addresses for name in elsewhere.slices(address)}
        if not places:
            homeless.append(endpoint)
        elif len(places) == 1:
            name = places.pop()
            free = not any(
                elsewhere.blocks(address, endpoint.pod.uid, name) for address in endpoint.addresses
            )
            if free and len(contents[name]) < MAX_ENDPOINTS:
                contents[name][endpoint.pod.uid] = endpoint
                changing.add(name)
    _place(homeless, contents, changing)
    if not changing:
        _merge(contents, changing)
    return list(_actions(current, contents, changing))


def _homes(current: Mapping[str, Slice]) -> tuple[dict[str, str], frozenset[str]]:
    """The slice that each pod stays in, and the pods that are in several. Of these the fullest counts: to
    take an endpoint out of the smaller one is how a merge ends."""
    homes: dict[str, str] = {}
    twice: set[str] = set()
    for name in sorted(current, key=lambda name: (-len(current[name].endpoints), name)):
        for endpoint in current[name].endpoints:
            if homes.setdefault(endpoint.pod.uid, name) != name:
                twice.add(endpoint.pod.uid)
    return homes, frozenset(twice)


class _Published:
    """Where some addresses are published now. `frozen` are pods whose entries stay as they are."""

    def __init__(
        self, current: Mapping[str, Slice], interest: Iterable[tuple[Address, ...]], frozen: Set[str]
    ) -> None:
        self._frozen = frozen
        self._places: dict[Address, set[tuple[str, str]]] = defaultdict(set)
        if wanted := {address for addresses in interest for address in addresses}:
            for name, old in current.items():
                for endpoint in old.endpoints:
                    for address in endpoint.addresses:
                        if address in wanted:
                            self._places[address].add((name, endpoint.pod.uid))

    def slices(self, address: Address) -> Iterator[str]:
        return (name for name, _ in self._places.get(address, ()))

    def blocks(self, address: Address, uid: str, slice: str) -> bool:
        """A write of `slice` can't give the address to the pod: another has it somewhere else, or keeps
        it."""
        return any(
            other != uid and (name != slice or other in self._frozen)
            for name, other in self._places.get(address, ())
        )


def _place(endpoints: list[Endpoint], contents: dict[str, dict[str, Endpoint]], changing: set[str]) -> None:
    """With as few more slices changed as can be."""

    def room(name: str) -> int:
        return MAX_ENDPOINTS - len(contents[name])

    def put(name: str, count: int) -> None:
        for endpoint in endpoints[:count]:
            contents[name][endpoint.pod.uid] = endpoint
        del endpoints[:count]
        changing.add(name)

    for name in sorted(changing, key=lambda name: (-room(name), name)):
        if endpoints and room(name):
            put(name, room(name))
    while endpoints:
        enough = [name for name in contents if room(name) >= len(endpoints)]
        if enough:
            put(min(enough, key=lambda name: (room(name), name)), len(endpoints))
        else:
            name = next(name for name in _names() if name not in contents)
            contents[name] = {}
            put(name, MAX_ENDPOINTS)


def _names() -> Iterator[str]:
    number = 0
    while True:
        yield f"{PREFIX}{number}"
        number += 1


def _merge(contents: dict[str, dict[str, Endpoint]], changing: set[str]) -> None:
    """One small slice's endpoints into the fullest that has room, when there is nothing else to do."""
    by_size = sorted(contents, key=lambda name: (len(contents[name]), name))
    if len(by_size) < 2 or not contents[by_size[0]]:
        return
    small = by_size[0]
    size = len(contents[small])
    fits = [name for name in by_size[1:] if len(contents[name]) + size <= MERGED]
    if size <= SMALL and fits:
        contents[fits[-1]].update(contents[small])
        changing.add(fits[-1])


def _actions(
    current: Mapping[str, Slice], contents: Mapping[str, Mapping[str, Endpoint]], changing: Set[str]
) -> Iterator[SliceAction]:
    for name, content in sorted(contents.items()):
        old = current.get(name)
        if old is None:
            yield CreateSlice(name, tuple(content.values()))
        elif not content:
            yield DeleteSlice(old)
        elif name in changing:
            yield WriteSlice(old, tuple(content.values()))
