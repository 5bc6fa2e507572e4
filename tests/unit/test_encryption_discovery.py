"""Uplinks and overlays, found from links and routes as CNIs make them."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest

from meshwire.api.fields import Network
from meshwire.encryption.discovery import Paths, find_paths
from meshwire.encryption.model import Link, Route

LINKS = [
    Link(index=1, name="lo"),
    Link(index=2, name="eth0", addresses=frozenset({ip_address("198.18.0.1")})),
    Link(index=3, name="eth1"),
    Link(index=4, name="flannel.1", kind="vxlan"),
    Link(index=5, name="tunl0", kind="ipip", ethernet=False),
    Link(index=6, name="wg0", kind="wireguard", ethernet=False),
    Link(index=7, name="vethpod", kind="veth"),
    Link(index=8, name="cni0", kind="bridge"),
    Link(index=9, name="meshwire_wg0", kind="wireguard", ethernet=False),
]
REMOTE = ("198.18.0.2/32", "10.244.2.0/24", "fd00:10:244:2::/64")


@dataclass(frozen=True)
class Case:
    name: str
    routes: dict[str, tuple[int, ...]]
    uplinks: tuple[str, ...]
    overlays: tuple[str, ...] = ()


CASES = [
    Case("the device with the node's address, without any route", {}, ("eth0",)),
    Case("a default route by another device", {"0.0.0.0/0": (3,)}, ("eth0", "eth1")),
    Case("an IPv6 default route", {"::/0": (3,)}, ("eth0", "eth1")),
    Case("host-gw: a route to a pod CIDR", {"10.244.2.0/24": (3,)}, ("eth0", "eth1")),
    Case("flannel: pod CIDRs by VXLAN", {"10.244.2.0/24": (4,)}, ("eth0",), ("flannel.1",)),
    Case("Calico: blocks inside of a pod CIDR by IPIP", {"10.244.2.64/26": (5,)}, ("eth0",), ("tunl0",)),
    Case("an overlay that nothing is routed by", {"192.0.2.0/24": (4,)}, ("eth0",)),
    Case("own pods by a bridge", {"10.244.1.0/24": (8,), "10.244.1.9/32": (7,)}, ("eth0",)),
    Case("a route to another node", {"198.18.0.0/24": (3,)}, ("eth0", "eth1")),
    Case("the longest match counts", {"198.18.0.0/16": (6,), "198.18.0.0/24": (3,)}, ("eth0", "eth1")),
    Case("both hops of a multipath route", {"10.244.2.0/24": (3, 4)}, ("eth0", "eth1"), ("flannel.1",)),
    Case("a foreign WireGuard device that carries none of it", {"10.9.0.0/16": (6,)}, ("eth0",)),
    Case("a foreign WireGuard device that carries pod traffic", {"10.244.2.0/24": (6,)}, ("eth0", "wg0")),
    Case("loopback and our own never", {"0.0.0.0/0": (1,), "10.244.2.0/24": (9,)}, ("eth0",)),
    Case("an IPv6 pod CIDR", {"fd00:10:244:2::/64": (4,)}, ("eth0",), ("flannel.1",)),
    Case("a route to an index that is gone", {"10.244.2.0/24": (99,)}, ("eth0",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_paths(case: Case) -> None:
    found = find_paths(
        {link.name: link for link in LINKS},
        [Route(ip_network(destination), interfaces) for destination, interfaces in case.routes.items()],
        own_addresses=[ip_address("198.18.0.1")],
        remote=[ip_network(text) for text in REMOTE],
    )
    assert found == Paths(case.uplinks, case.overlays)


def test_a_thousand_routes_and_nodes_are_judged_one_by_one() -> None:
    """Each remote network finds its own route and no other's."""
    remote: list[Network] = [ip_network(f"10.{n // 256}.{n % 256}.0/24") for n in range(1000)]
    routes = [Route(network, (3 if n % 2 else 4,)) for n, network in enumerate(remote)]
    links = {link.name: link for link in LINKS}
    odd = find_paths(links, routes, own_addresses=[], remote=remote[1::2])
    even = find_paths(links, routes, own_addresses=[], remote=remote[::2])
    assert (odd, even) == (Paths(("eth1",), ()), Paths((), ("flannel.1",)))
