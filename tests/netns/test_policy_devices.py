"""The host's end of a pod's veth, however the CNI has connected it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from pyroute2 import netns
from pyroute2.iproute import IPRoute

from meshwire.agent.policy.devices import find_pod_device
from meshwire.encryption import netlink

pytestmark = pytest.mark.netns

NODE, POD = f"mwt-{os.getpid()}-node", f"mwt-{os.getpid()}-pod"
FAMILIES = pytest.mark.parametrize("address", ["10.1.1.5", "fd00:1::5"], ids=["IPv4", "IPv6"])


def ip(*arguments: str, inside: str = NODE) -> None:
    subprocess.run(["ip", "-n", inside, *arguments], check=True)


@pytest.fixture
def node() -> Iterator[IPRoute]:
    """A node and a pod, a veth between them, and the test in the node's network."""
    if os.geteuid() != 0:
        pytest.skip("needs root: creates network namespaces")
    for name in (NODE, POD):
        netns.create(name)
    ip("link", "add", "veth1", "type", "veth", "peer", "name", "eth0", "netns", POD)
    ip("link", "add", "uplink", "type", "veth", "peer", "name", "far")
    for name in ("lo", "veth1", "uplink", "far"):
        ip("link", "set", name, "up")
    ip("link", "set", "eth0", "up", inside=POD)
    netns.pushns(NODE)
    try:
        with IPRoute() as ipr:
            yield ipr
    finally:
        netns.popns()
        for name in (NODE, POD):
            netns.remove(name)


def find(ipr: IPRoute, address: str) -> str | None:
    links = netlink.observe_links(ipr)
    by_index = {link.index: link for link in links.values()}
    found = find_pod_device(ipr, ip_address(address).packed, by_index)
    return by_index[found].name if found is not None else None


@FAMILIES
def test_a_route_leads_to_the_veth(node: IPRoute, address: str) -> None:
    assert find(node, address) is None
    ip("route", "add", address, "dev", "veth1")
    assert find(node, address) == "veth1"


@FAMILIES
def test_the_default_route_leads_to_no_pod(node: IPRoute, address: str) -> None:
    gateway = "192.0.2.1" if ":" not in address else "fd00:2::1"
    ip("address", "add", f"{gateway[:-1]}9/24" if ":" not in address else "fd00:2::9/64", "dev", "uplink")
    ip("route", "add", "default", "via", gateway, "dev", "uplink")
    assert find(node, address) is None


@FAMILIES
def test_behind_a_bridge_it_is_the_port_that_leads_to_the_pod(node: IPRoute, address: str) -> None:
    length = "24" if ":" not in address else "64"
    ip("link", "add", "cni0", "type", "bridge")
    ip("link", "set", "cni0", "up")
    ip("link", "set", "veth1", "master", "cni0")
    ip("address", "add", f"{address[:-1]}1/{length}", "dev", "cni0", "nodad")
    ip("address", "add", f"{address}/{length}", "dev", "eth0", "nodad", inside=POD)
    deadline = time.monotonic() + 10
    # The first look makes the node ask who has the address.
    while (found := find(node, address)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == "veth1"


def test_an_address_of_the_node_itself_is_no_pods(node: IPRoute) -> None:
    ip("address", "add", "10.1.1.1/24", "dev", "veth1")
    assert find(node, "10.1.1.1") is None
