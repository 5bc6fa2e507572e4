"""Who gets the room that a map has, and what is said about maps that fill up. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from meshwire.api.fields import Network
from meshwire.api.meshpolicyreport import MapPressure

PRESSURE_FROM: Final = 0.80
PRESSURE_UNTIL: Final = 0.75
"""Fill of a map from which it is told of, and below which no longer."""

LPM_SPARE: Final = 1
"""Entries of an LPM trie that stay free: kernels before 6.13 replace no entry of one that is full."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Rules are not in force, for want of room in `map`, which holds `capacity` entries. `wanted`: how many
    the rules need, as of when that began."""

    map: str
    capacity: int
    wanted: int

    def __str__(self) -> str:
        return f"map {self.map}, which holds {self.capacity} entries, has no room for {self.wanted} more"


class Claim(NamedTuple):
    """Entries that the set of a subject needs besides those that are in the map. Of several, the first in
    order come first."""

    entries: int
    subject: int


class BlockClaim(NamedTuple):
    """Blocks of addresses that the sets of a subject can't do without. `rank`: the lowest comes first."""

    rank: int
    subject: int
    blocks: frozenset[Network]


def admit(claims: Iterable[Claim], free: int) -> list[Claim]:
    """As many as there are `free` entries for, the smallest first."""
    admitted: list[Claim] = []
    for claim in sorted(claims):
        if claim.entries > free:
            break
        free -= claim.entries
        admitted.append(claim)
    return admitted


def admit_blocks(
    base: Collection[Network], claims: Iterable[BlockClaim], capacity: int
) -> tuple[frozenset[int], frozenset[Network]]:
    """The subjects whose blocks fit, and their blocks. `base` are the cluster's own, without which an
    address can't be told to be of the cluster: if they don't fit, nobody's do."""
    if len(base) > capacity:
        return frozenset(), frozenset()
    taken, admitted, named = set(base), set[int](), set[Network]()
    for claim in sorted(claims, key=lambda each: (each.rank, len(each.blocks), each.subject)):
        if len(taken) + len(claim.blocks - taken) <= capacity:
            taken |= claim.blocks
            named |= claim.blocks
            admitted.add(claim.subject)
    return frozenset(admitted), frozenset(named)


@dataclass(frozen=True, slots=True)
class Fill:
    """Of a map: what it holds, what it has room for, and what it should hold and can't."""

    entries: int
    capacity: int
    left_out: int = 0


def pressure(before: Iterable[MapPressure], fills: Mapping[str, Fill]) -> tuple[MapPressure, ...]:
    """The maps that are to be told of, by name. What was told and still holds stays word for word, so that
    not every entry is news: `entries` are those of when it began."""
    told = {each.map: each for each in before}
    found: list[MapPressure] = []
    for name, fill in sorted(fills.items()):
        old, full = told.get(name), fill.left_out > 0
        bound = PRESSURE_UNTIL if old else PRESSURE_FROM
        if not full and fill.entries < bound * fill.capacity:
            continue
        if old and (old.full, old.capacity) == (full, fill.capacity):
            found.append(old)
        else:
            found.append(MapPressure(name, fill.entries, fill.capacity, full, fill.left_out))
    return tuple(found)
