"""What each program costs: nanoseconds per packet by BPF_PROG_TEST_RUN, in maps as a cluster of 1,000 nodes
fills them, and the instructions the kernel runs and had to verify. Nothing is sent: a redirect is decided,
not carried out. Stands by itself too: `python -m bench.programs` (root)."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final

from bench import isolated
from bench.figures import Figure, percentile

from meshwire.bpf import packets as p
from meshwire.bpf.layouts import AddressFlag, SettingsFlag
from meshwire.bpf.loader import (
    FROM_NETDEV,
    FROM_NETDEV_L3,
    FROM_WIREGUARD,
    TO_NETDEV,
    TO_NETDEV_L3,
    Programs,
    instructions,
)
from meshwire.bpf.maps import AddressEntry, Maps, SettingsEntry
from meshwire.bpf.testrun import run

NODES: Final = 1000
TUNNEL_MTU: Final = 1420
REPEAT: Final = 100_000
ROUNDS: Final = 7

LOCAL: Final = 1
REMOTE: Final = 777


def pods(node: int, family: int) -> IPv4Network | IPv6Network:
    """The pod CIDR of a node."""
    if family == 4:
        return IPv4Network((0x0A000000 + (node << 8), 24))
    return IPv6Network((0xFD000010 << 96 | node << 64, 64))


def host(node: int, family: int) -> p.Address:
    """The node's own address."""
    return ip_address(0xC0A80000 + node) if family == 4 else ip_address(0xFD000020 << 96 | node)


WORLD: Final = {4: ip_address("203.0.113.9"), 6: ip_address("2001:db8::9")}


@dataclass(frozen=True, slots=True)
class Kind:
    """One packet for one program."""

    program: str
    name: str
    data: bytes


def kinds() -> list[Kind]:
    """What passes the programs most, and what makes them look furthest."""
    found = []
    for family, label in ((4, "IPv4"), (6, "IPv6")):
        ours, theirs = pods(LOCAL, family)[9], pods(REMOTE, family)[9]
        here, there = host(LOCAL, family), host(REMOTE, family)
        out = p.tcp(ours, theirs, payload=bytes(1000))
        back = p.tcp(theirs, ours, payload=bytes(1000))
        wireguard_out = p.udp(here, there, bytes(1000), sport=51871, dport=51871)
        wireguard_in = p.udp(there, here, bytes(1000), sport=51871, dport=51871)
        # The ends of the inner packet are of one node: looked into, and passed.
        overlay = p.vxlan(here, there, p.frame(p.tcp(theirs, pods(REMOTE, family)[8], payload=bytes(1000))))
        overlay_in = p.vxlan(there, here, p.frame(p.tcp(ours, pods(LOCAL, family)[8], payload=bytes(1000))))
        found += [
            Kind(TO_NETDEV, f"pod to pod, TCP, redirected, {label}", p.frame(out)),
            Kind(TO_NETDEV_L3, f"pod to pod, TCP, redirected, {label}", out),
            Kind(TO_NETDEV, f"WireGuard's own packet, {label}", p.frame(wireguard_out)),
            Kind(
                TO_NETDEV,
                f"pod to the world, {label}",
                p.frame(p.tcp(ours, WORLD[family], payload=bytes(1000))),
            ),
            Kind(TO_NETDEV, f"VXLAN, looked into, {label}", p.frame(overlay)),
            Kind(FROM_NETDEV, f"WireGuard's own packet, {label}", p.frame(wireguard_in)),
            Kind(
                FROM_NETDEV,
                f"the world to a pod, {label}",
                p.frame(p.tcp(WORLD[family], ours, payload=bytes(1000))),
            ),
            Kind(FROM_NETDEV, f"VXLAN, looked into, {label}", p.frame(overlay_in)),
            Kind(FROM_NETDEV, f"pod to pod in clear, dropped, {label}", p.frame(back)),
            Kind(FROM_NETDEV_L3, f"pod to pod in clear, dropped, {label}", back),
            Kind(FROM_WIREGUARD, f"pod to pod, TCP, {label}", back),
        ]
    return found


def fill(maps: Maps) -> None:
    """As the agent of node 1 does among NODES nodes, all reached by tunnel."""
    for network in ("10.0.0.0/8", "fd00:10::/32"):
        maps.ipcache.update(ip_network(network), AddressEntry(0, 0, AddressFlag.CLUSTER))
    for node in range(1, NODES + 1):
        for family in (4, 6):
            maps.ipcache.update(pods(node, family), AddressEntry(0, node, AddressFlag.POD))
            maps.ipcache.update(ip_network(host(node, family)), AddressEntry(0, node, AddressFlag.HOST))
        maps.nodes.update(node, 0 if node == LOCAL else 7)
    maps.settings.write(SettingsEntry(SettingsFlag.STRICT | SettingsFlag.ENFORCING, LOCAL, TUNNEL_MTU))


def measure() -> list[Figure]:
    """Uses the bpffs at /sys/fs/bpf. Ten seconds. Raises what loading raises, and OSError."""
    with (
        tempfile.TemporaryDirectory(dir="/sys/fs/bpf") as pins,
        Programs.load(Path(pins)) as programs,
        Maps.open(Path(pins)) as maps,
    ):
        fill(maps)
        figures = [time_packet(programs, kind) for kind in kinds()]
        for name in sorted(programs.names()):
            run_by_kernel, verified = instructions(programs.get(name))
            figures += [
                Figure(name=f"{name}: size", value=run_by_kernel, unit="instructions"),
                Figure(
                    name=f"{name}: verified", value=verified, unit="instructions", spread="limit 1,000,000"
                ),
            ]
        for pin in Path(pins).iterdir():
            pin.unlink()
    return figures


def time_packet(programs: Programs, kind: Kind) -> Figure:
    """The median over ROUNDS of the mean over REPEAT packets."""
    fd = programs.get(kind.program).fd
    times = [run(fd, kind.data, repeat=REPEAT).duration_ns for _ in range(ROUNDS)]
    return Figure(
        name=f"{kind.program}: {kind.name}",
        value=percentile(times, 50),
        unit="ns",
        spread=f"median of {ROUNDS} runs of {REPEAT:,}, {min(times)} to {max(times)}",
    )


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("needs root: loads eBPF programs")
    for each in isolated.measure("bench.programs", seconds=120):
        print(f"{each['value']:>10,.0f} {each['unit']:<12}  {each['name']:<60}  {each['spread']}")
