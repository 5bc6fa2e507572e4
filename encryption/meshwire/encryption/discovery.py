"""Which devices pod traffic can leave the node by, judged from links, addresses and routes. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshwire.api.fields import Address, Network
from meshwire.encryption.model import DEVICES, Link, Route

OVERLAY_KINDS: Final = frozenset(
    {
        "vxlan",
        "geneve",
        "ipip",
        "sit",
        "gre",
        "gretap",
        "ip6gre",
        "ip6gretap",
        "ip6tnl",
        "erspan",
        "ip6erspan",
    }
)


@dataclass(frozen=True, slots=True)
class Paths:
    """Names of devices, sorted."""

    uplinks: tuple[str, ...]
    overlays: tuple[str, ...]


def find_paths(
    links: Mapping[str, Link],
    routes: Iterable[Route],
    *,
    own_addresses: Iterable[Address],
    remote: Iterable[Network],
) -> Paths:
    """Uplinks hold one of the node's `own_addresses`, carry a default route, or a route that packets to one
    of the `remote` networks (other nodes' addresses and pod CIDRs) take; overlays are those of them that
    encapsulate. Loopback and Meshwire's own devices are neither."""
    own = frozenset(own_addresses)
    used = _indexes_towards(tuple(routes), tuple(remote))
    found = [
        link
        for link in links.values()
        if link.name != "lo" and link.name not in DEVICES and (link.index in used or link.addresses & own)
    ]
    return Paths(
        uplinks=tuple(sorted(link.name for link in found if link.kind not in OVERLAY_KINDS)),
        overlays=tuple(sorted(link.name for link in found if link.kind in OVERLAY_KINDS)),
    )


def _indexes_towards(routes: tuple[Route, ...], remote: tuple[Network, ...]) -> set[int]:
    """Interface indexes of default routes, of each remote network's longest match, and of routes inside
    one."""
    found: set[int] = set()
    # (family, prefix length) -> first address of the route as a number -> interfaces
    tables: dict[tuple[int, int], dict[int, set[int]]] = {}
    for route in routes:
        destination = route.destination
        if destination.prefixlen == 0:
            found.update(route.interfaces)
            continue
        table = tables.setdefault((destination.version, destination.prefixlen), {})
        table.setdefault(int(destination.network_address), set()).update(route.interfaces)

    lengths = sorted(tables, reverse=True)
    for network in remote:
        number = int(network.network_address)
        for version, length in lengths:
            if version != network.version or length > network.prefixlen:
                continue
            shift = network.max_prefixlen - length
            if interfaces := tables[version, length].get(number >> shift << shift):
                found |= interfaces
                break

    for version in (4, 6):
        specific = [
            route for route in routes if route.destination.version == version and route.destination.prefixlen
        ]
        if not specific:
            continue
        spans = sorted(_span(network) for network in set(remote) if network.version == version)
        starts = [first for first, _ in spans]
        for route in specific:
            first, last = _span(route.destination)
            position = bisect_right(starts, first) - 1
            if position >= 0 and last <= spans[position][1]:
                found.update(route.interfaces)
    return found


def _span(network: Network) -> tuple[int, int]:
    first = int(network.network_address)
    return first, first + (1 << (network.max_prefixlen - network.prefixlen)) - 1
