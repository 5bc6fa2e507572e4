"""Routes as the kernel tells them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from pyroute2 import netns

from meshwire.encryption.netlink import observe_routes

pytestmark = pytest.mark.netns

NODE = f"mwt-{os.getpid()}-routes"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", "-n", NODE, *arguments], check=True)


@pytest.fixture
def node() -> Iterator[dict[str, int]]:
    """Indexes of the devices of a network of its own that the test is in: `one` and `two`."""
    if os.geteuid() != 0:
        pytest.skip("needs root: creates network namespaces")
    netns.create(NODE)
    ip("link", "add", "one", "index", "11", "type", "veth", "peer", "name", "two", "index", "12")
    for number, name in enumerate(("one", "two"), start=1):
        ip("link", "set", name, "up")
        ip("address", "add", f"192.0.{number}.1/24", "dev", name)
        ip("address", "add", f"fd00:{number}::1/64", "dev", name, "nodad")
    netns.pushns(NODE)
    try:
        yield {"one": 11, "two": 12}
    finally:
        netns.popns()
        netns.remove(NODE)


def found() -> dict[str, set[tuple[int, ...]]]:
    """By destination, link-local ones aside."""
    routes: dict[str, set[tuple[int, ...]]] = {}
    for route in observe_routes():
        if not route.destination.is_link_local:
            routes.setdefault(str(route.destination), set()).add(route.interfaces)
    return routes


def test_unicast_routes_of_both_families_with_their_devices(node: dict[str, int]) -> None:
    one, two = (node["one"],), (node["two"],)
    connected = {"192.0.1.0/24": {one}, "192.0.2.0/24": {two}, "fd00:1::/64": {one}, "fd00:2::/64": {two}}
    assert found() == connected

    ip("route", "add", "default", "via", "192.0.1.2")
    ip("route", "add", "default", "via", "fd00:2::2")
    ip("route", "add", "10.1.0.0/16", "via", "192.0.2.2", "table", "1000")
    ip("route", "add", "10.2.3.4/32", "dev", "one")
    ip("route", "add", "blackhole", "10.3.0.0/16")
    ip("route", "add", "unreachable", "fd00:3::/64")
    assert found() == connected | {
        "0.0.0.0/0": {one},
        "::/0": {two},
        "10.1.0.0/16": {two},
        "10.2.3.4/32": {one},
    }


@pytest.mark.parametrize(
    ("block", "gateways"),
    [("10.4.0.0/16", ("192.0.1.2", "192.0.2.2")), ("fd00:4::/64", ("fd00:1::2", "fd00:2::2"))],
    ids=["IPv4", "IPv6"],
)
def test_a_route_with_several_ways_uses_all_of_their_devices(
    node: dict[str, int], block: str, gateways: tuple[str, str]
) -> None:
    hops = [word for gateway in gateways for word in ("nexthop", "via", gateway)]
    ip("route", "add", block, *hops)
    assert {index for interfaces in found()[block] for index in interfaces} == {11, 12}


def test_more_routes_than_one_message_holds(node: dict[str, int]) -> None:
    blocks = [str(block) for block in ip_network("10.64.0.0/10").subnets(new_prefix=22)]
    lines = "\n".join(f"route add {block} dev one" for block in blocks)
    subprocess.run(["ip", "-n", NODE, "-batch", "-"], input=lines, text=True, check=True)
    assert found().keys() >= set(blocks) and len(blocks) == 4096
