"""The boot guard's rules and the kernel: nft takes them, and they are found and taken away without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from pyroute2 import netns

from meshwire.encryption import nftables
from meshwire.encryption.bootguard import TABLE, Scope, render

pytestmark = pytest.mark.netns

NODE = f"mwt-{os.getpid()}-guard"
SOMEBODYS = "table inet somebody { chain forward { type filter hook forward priority 0; }; }"


@pytest.fixture(autouse=True)
def node() -> Iterator[None]:
    """A network namespace that the test is in, with a table of somebody else's."""
    if os.geteuid() != 0:
        pytest.skip("needs root: creates network namespaces")
    netns.create(NODE)
    netns.pushns(NODE)
    try:
        nft(SOMEBODYS)
        yield
    finally:
        netns.popns()
        netns.remove(NODE)


def nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


def tables() -> list[str]:
    return subprocess.run(
        ["nft", "list", "tables"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def scope(pods: str, own: str) -> Scope:
    return Scope(*(frozenset(map(ip_network, each.split())) for each in (f"{pods} {own}", own)))


@pytest.mark.parametrize(
    ("pods", "own"),
    [
        ("10.244.0.0/16 10.244.2.0/24 fd00::/56", "10.244.1.0/24 fd00:0:0:1::/64"),
        ("10.244.0.0/16", ""),
        ("fd00::/56 fd00::1/128", ""),
        ("10.244.2.0/24 10.244.3.0/24 0.0.0.0/0", "10.244.1.0/32"),
        (" ".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(0, 4000, 2)), "10.255.1.0/24"),
    ],
    ids=["both families", "no own", "IPv6", "nested", "many"],
)
def test_rules_are_loaded_twice_found_and_taken_away(pods: str, own: str) -> None:
    assert nftables.has_table(TABLE) is False
    for _ in range(2):
        nft(render(scope(pods, own)))
    assert nftables.has_table(TABLE) is True
    nftables.delete_table(TABLE)
    assert nftables.has_table(TABLE) is False
    assert tables() == ["table inet somebody"]
    nftables.delete_table(TABLE)


def test_who_may_not_ask_is_told() -> None:
    script = f"from meshwire.encryption import nftables; nftables.has_table('{TABLE}')"
    command = ["setpriv", "--bounding-set=-net_admin", "--", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "PermissionError" in done.stderr, done.stderr


ENDS = {"own": 1, "sibling": 2, "remote": 129, "world": 200}
"""Who is around the node, by the last byte of its addresses; the node is in between."""
POD_RANGES = "192.0.2.0/25 192.0.2.128/26 fd00::/121 fd00::80/122"
OWN_RANGES = "192.0.2.0/25 fd00::/121"


@pytest.fixture
def ends() -> Iterator[dict[str, tuple[str, str]]]:
    """Addresses of both families. Each is a network namespace at the end of a veth."""
    addresses = {name: (f"192.0.2.{number}", f"fd00::{number:x}") for name, number in ENDS.items()}
    made = []
    try:
        for path in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            run("sysctl", "-qw", f"{path.replace('/', '.')}=1")
        for name, (v4, v6) in addresses.items():
            end = f"{NODE}-{name}"
            netns.create(end)
            made.append(end)
            run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", end)
            run("ip", "link", "set", name, "up")
            run("ip", "address", "add", "169.254.1.1/32", "dev", name)
            run("ip", "address", "add", "fe80::1/64", "dev", name, "nodad")
            run("ip", "route", "add", v4, "dev", name)
            run("ip", "route", "add", v6, "dev", name)
            for line in (
                "link set eth0 up",
                f"address add {v4}/32 dev eth0",
                f"address add {v6}/128 dev eth0 nodad",
                "route add 169.254.1.1 dev eth0",
                "route add default via 169.254.1.1 dev eth0",
                "route add default via fe80::1 dev eth0",
            ):
                run("ip", "-n", end, *line.split())
        yield addresses
    finally:
        for end in made:
            netns.remove(end)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def reaches(source: str, address: str) -> bool:
    # Several: the first ones of IPv6 may have to wait for a link-local address.
    command = ["ip", "netns", "exec", f"{NODE}-{source}", "ping", "-q", "-c4", "-i0.2", "-W1", address]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_what_it_lets_through(ends: dict[str, tuple[str, str]]) -> None:
    ways = [("own", "sibling"), ("own", "world"), ("own", "remote"), ("remote", "own")]

    def found() -> dict[tuple[str, str], list[bool]]:
        return {way: [reaches(way[0], address) for address in ends[way[1]]] for way in ways}

    assert found() == dict.fromkeys(ways, [True, True])
    nft(render(Scope(*(frozenset(map(ip_network, each.split())) for each in (POD_RANGES, OWN_RANGES)))))
    held = {("own", "remote"), ("remote", "own")}
    assert found() == {way: [way not in held] * 2 for way in ways}
    # A service's address, that kube-proxy has for a pod of another node.
    nft(
        "table inet service { chain prerouting { type nat hook prerouting priority dstnat;"
        f" ip daddr 198.51.100.1 dnat ip to {ends['remote'][0]}; }}; }}"
    )
    assert not reaches("own", "198.51.100.1")
    nftables.delete_table(TABLE)
    assert reaches("own", "198.51.100.1") and found() == dict.fromkeys(ways, [True, True])
