"""Who owns what: no two nodes share an address, a pod CIDR, a key or a number. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshwire.api import names
from meshwire.api.fields import Address, Network
from meshwire.api.meshnode import Key, MeshNode
from meshwire.operator.objects import KeySecret, Node

OVERLAPPING_POD_CIDR: Final = "OverlappingPodCIDR"
DUPLICATE_ADDRESS: Final = "DuplicateAddress"
DUPLICATE_KEY: Final = "DuplicateKey"


@dataclass(frozen=True, slots=True, order=True)
class Conflict:
    """`loser` claims what `owner` had first."""

    reason: str
    loser: str
    owner: str
    message: str


@dataclass(slots=True)
class Share:
    """What a node may call its own."""

    addresses: list[Address] = field(default_factory=list)
    pod_cidrs: list[Network] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


_Span = tuple[int, int, int]
"""A range of addresses: IP version, first and last. With thousands of them, `ipaddress` itself would take
most of the time of a look."""


@dataclass(slots=True)
class _Spans:
    """Address ranges of one kind with their owners. No two overlap, so neighbours in order are enough to
    look at."""

    by_start: list[tuple[int, int, int, str]] = field(default_factory=list)

    def find(self, span: _Span) -> str | None:
        """The owner of a range that overlaps `span`."""
        version, first, last = span
        place = bisect_right(self.by_start, (version, last, 2**128, ""))
        if place:
            other_version, _, other_last, owner = self.by_start[place - 1]
            if other_version == version and other_last >= first:
                return owner
        return None

    def find_others(self, span: _Span, name: str) -> str | None:
        """The owner, other than `name`, of any range inside `span`."""
        version, first, last = span
        start = bisect_left(self.by_start, (version, first, 0, ""))
        for place in range(start, len(self.by_start)):
            other_version, other_first, _, owner = self.by_start[place]
            if (other_version, other_first) > (version, last):
                return None
            if owner != name:
                return owner
        return None

    def add(self, span: _Span, name: str) -> None:
        insort(self.by_start, (*span, name))


def _span(network: Network) -> _Span:
    first = int(network.network_address)
    return network.version, first, first + (1 << (network.max_prefixlen - network.prefixlen)) - 1


def settle(
    nodes: Mapping[str, Node], mesh_nodes: Mapping[str, MeshNode], secrets: Mapping[str, KeySecret]
) -> tuple[dict[str, Share], tuple[Conflict, ...]]:
    """Every node's share by name, and the claims refused. What a node was granted before stays its own as
    long as it claims it; after that the older node comes first."""
    shares = {name: Share() for name in nodes}
    addresses, pod_cidrs = _Spans(), _Spans()
    keys: dict[str, str] = {}
    conflicts: list[Conflict] = []

    def age(name: str) -> tuple[str, str, str]:
        mesh_node = mesh_nodes.get(name)
        # "~" sorts after any time: a node without a MeshNode has been granted nothing yet.
        return (mesh_node.created if mesh_node else "~", nodes[name].created, name)

    def claim_address(name: str, address: Address) -> None:
        span = (address.version, int(address), int(address))
        if owner := addresses.find(span):
            conflicts.append(
                Conflict(
                    DUPLICATE_ADDRESS,
                    name,
                    owner,
                    f"{name} has address {address} of {owner}, which keeps it",
                )
            )
        elif (owner := pod_cidrs.find(span)) and owner != name:
            conflicts.append(
                Conflict(
                    DUPLICATE_ADDRESS,
                    name,
                    owner,
                    f"{name}'s address {address} lies in a pod CIDR of {owner}, which keeps it",
                )
            )
        else:
            addresses.add(span, name)
            shares[name].addresses.append(address)

    def claim_pod_cidr(name: str, cidr: Network) -> None:
        span = _span(cidr)
        owner = pod_cidrs.find(span)
        if owner == name:
            # Its own blocks overlap: the one granted covers, or is, the other.
            return
        if owner := owner or addresses.find_others(span, name):
            conflicts.append(
                Conflict(
                    OVERLAPPING_POD_CIDR,
                    name,
                    owner,
                    f"{name}'s pod CIDR {cidr} overlaps what {owner} has, which keeps it",
                )
            )
        else:
            pod_cidrs.add(span, name)
            shares[name].pod_cidrs.append(cidr)

    def claim_key(name: str, key: Key) -> None:
        if (owner := keys.setdefault(key.public_key, name)) != name:
            conflicts.append(_duplicate_key(name, owner, key))
        else:
            shares[name].keys.append(key)

    by_age = sorted(nodes, key=age)
    for granted in (True, False):
        for name in by_age:
            spec = mesh_nodes[name].spec if name in mesh_nodes else None
            node = nodes[name]
            # Kubelet may report no address for a moment; what is known stays.
            wanted_addresses = node.addresses or (spec.addresses if spec else ())
            wanted_cidrs = node.pod_cidrs or (spec.pod_cidrs if spec else ())
            # A Secret that is gone is made anew, with another key; until then the one published stays.
            wanted_keys = secrets[name].keys if name in secrets else spec.keys if spec else ()
            for address in wanted_addresses:
                if (spec is not None and address in spec.addresses) is granted:
                    claim_address(name, address)
            for cidr in wanted_cidrs:
                if (spec is not None and cidr in spec.pod_cidrs) is granted:
                    claim_pod_cidr(name, cidr)
            for key in wanted_keys:
                if (spec is not None and key in spec.keys) is granted:
                    claim_key(name, key)
    for name in by_age:
        # Whoever put it into the spec, it wasn't us.
        for key in mesh_nodes[name].spec.keys if name in mesh_nodes else ():
            if (owner := keys.get(key.public_key, name)) != name:
                conflicts.append(_duplicate_key(name, owner, key))
    for name, share in shares.items():
        node = nodes[name]
        _in_order(share.addresses, node.addresses)
        _in_order(share.pod_cidrs, node.pod_cidrs)
        share.keys.sort(key=lambda key: key.epoch)
    return shares, tuple(sorted(set(conflicts)))


def _duplicate_key(name: str, owner: str, key: Key) -> Conflict:
    return Conflict(
        DUPLICATE_KEY,
        name,
        owner,
        f"{name} has the public key of {owner} for epoch {key.epoch}; {owner} keeps it",
    )


def _in_order(granted: list[Address] | list[Network], claimed: Collection[Address | Network]) -> None:
    """As the Node lists them: its first address is its main one."""
    places = {item: place for place, item in enumerate(claimed)}
    granted.sort(key=lambda item: places.get(item, 0))


def allocate_ids(
    names_by_age: Iterable[str], mesh_nodes: Mapping[str, MeshNode], *, recent: Collection[int]
) -> dict[str, int]:
    """A number for every node: the one it has, unless an older node has it too; else the lowest nobody
    has, one of the `recent`ly freed only when no other is left. Nodes beyond names.MAX_NODE_ID get
    none."""
    order = tuple(names_by_age)
    numbers: dict[str, int] = {}
    # Also those of MeshNodes about to be deleted: the agents still act on them.
    taken = {node.spec.id for name, node in mesh_nodes.items()}
    owners: dict[int, str] = {}
    for name in order:
        if (node := mesh_nodes.get(name)) and node.spec.id and owners.setdefault(node.spec.id, name) == name:
            numbers[name] = node.spec.id
    fresh = (number for number in range(1, names.MAX_NODE_ID + 1) if number not in taken | set(recent))
    freed = (number for number in recent if number not in taken)
    for name in order:
        if name not in numbers and (number := next(fresh, None) or next(freed, None)):
            numbers[name] = number
    return numbers
