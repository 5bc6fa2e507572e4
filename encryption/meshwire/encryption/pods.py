"""Who has which pod address, where nodes have no pod CIDR: kept up to date slice by slice. Pure.

There are as many addresses as the cluster has pods, so they are bytes (packed, 4 or 16), and every set of
them that nothing has changed in stays the same object: who compares two moments compares nodes, not pods."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

NOBODY = ""
"""The node of an address that two nodes' pods claim: nobody can say which of them has it."""

Pods = Mapping[str, frozenset[bytes]]
"""Node's name -> addresses of its pods."""


_Content = tuple[str | bytes, ...]
"""A slice's: a node's name, its addresses, the next node's name and so on. Tuples in tuples would take three
times as much."""


class PodAddresses:
    """What MeshEndpointSlices say. An address may be in two slices for a while, as its pod moves between
    them."""

    def __init__(self) -> None:
        self._slices: dict[str, _Content] = {}
        self._holders: dict[bytes, str | tuple[str, ...]] = {}
        self._by_node: dict[str, frozenset[bytes]] = {}
        self._gained: dict[str, set[bytes]] = {}
        self._lost: dict[str, set[bytes]] = {}

    def put_slice(self, name: str, pods: Iterable[tuple[str, tuple[bytes, ...]]]) -> None:
        """(node, addresses) of each pod."""
        old = self._slices.get(name, ())
        # One object of each address: a slice is written anew for each of its pods.
        known = {address: address for _, address in _pairs(old)}
        by_node: dict[str, list[bytes]] = {}
        for node, addresses in pods:
            by_node.setdefault(sys.intern(node), []).extend(known.get(each, each) for each in addresses)
        flat: list[str | bytes] = []
        for node, of_node in by_node.items():
            flat += [node, *of_node]
        new = self._slices[name] = tuple(flat)
        before, after = _pairs(old), _pairs(new)
        # First what is new: an address that only changes slices is never nobody's.
        for node, address in after - before:
            self._hold(address, (*self._holders_of(address), node))
        for node, address in before - after:
            self._release(address, node)

    def remove_slice(self, name: str) -> None:
        for node, address in _pairs(self._slices.pop(name, ())):
            self._release(address, node)

    def snapshot(self) -> Pods:
        """As it is now; what is returned never changes."""
        if changed := self._gained.keys() | self._lost.keys():
            by_node = dict(self._by_node)
            for node in changed:
                lost, gained = self._lost.get(node, ()), self._gained.get(node, ())
                addresses = by_node.get(node, frozenset()).difference(lost).union(gained)
                if addresses:
                    by_node[node] = addresses
                else:
                    by_node.pop(node, None)
            self._by_node = by_node
            self._gained.clear()
            self._lost.clear()
        return self._by_node

    def _holders_of(self, address: bytes) -> tuple[str, ...]:
        """One node's name as often as slices have the address."""
        held = self._holders.get(address, ())
        return (held,) if isinstance(held, str) else held

    def _release(self, address: bytes, node: str) -> None:
        left = list(self._holders_of(address))
        left.remove(node)
        self._hold(address, tuple(left))

    def _hold(self, address: bytes, nodes: tuple[str, ...]) -> None:
        before, after = _owner(self._holders_of(address)), _owner(nodes)
        if not nodes:
            del self._holders[address]
        else:
            self._holders[address] = nodes[0] if len(nodes) == 1 else nodes
        if before == after:
            return
        if before is not None:
            self._gained.get(before, set()).discard(address)
            self._lost.setdefault(before, set()).add(address)
        if after is not None:
            self._lost.get(after, set()).discard(address)
            self._gained.setdefault(after, set()).add(address)


def _pairs(content: _Content) -> set[tuple[str, bytes]]:
    node, found = NOBODY, set()
    for each in content:
        if isinstance(each, str):
            node = each
        else:
            found.add((node, each))
    return found


def _owner(nodes: tuple[str, ...]) -> str | None:
    if not nodes:
        return None
    return nodes[0] if all(node == nodes[0] for node in nodes) else NOBODY
