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
