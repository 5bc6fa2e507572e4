"""What each program does with a packet, by who sends it to whom, how it is wrapped, and which settings are
in force.

First a table of cases in words, then random packets against a slow evaluator of the rules in verdict.h."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from meshwire.bpf import packets as p
from meshwire.bpf.layouts import QUARANTINED, AddressFlag, Direction, Reason, SettingsFlag
from meshwire.bpf.loader import (
    FROM_NETDEV,
    FROM_NETDEV_L3,
    FROM_WIREGUARD,
    TO_NETDEV,
    TO_NETDEV_L3,
    Programs,
)
from meshwire.bpf.maps import AddressEntry, Maps, Network, SettingsEntry
from meshwire.bpf.testrun import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, run

pytestmark = pytest.mark.bpf

Address = IPv4Address | IPv6Address

POD, HOST, CLUSTER = AddressFlag.POD, AddressFlag.HOST, AddressFlag.CLUSTER
LOCAL, WITH_TUNNEL, WITHOUT_TUNNEL, OUTCAST = 1, 2, 3, 4
IFINDEX = 7777

# Node 1 is this one; node 2 has a tunnel, node 3 none, node 4 is quarantined; the rest of the cluster CIDR
# is nobody's yet. Node 2's bridge address lies inside its pod CIDR.
WORLD: dict[Network, AddressEntry] = {
    ip_network(prefix): AddressEntry(0, node, flags)
    for prefix, node, flags in (
        ("10.1.0.0/16", 0, CLUSTER),
        ("10.1.1.0/24", LOCAL, POD),
        ("10.1.2.0/24", WITH_TUNNEL, POD),
        ("10.1.2.1/32", WITH_TUNNEL, HOST),
        ("10.1.3.0/24", WITHOUT_TUNNEL, POD),
        ("10.1.4.0/24", OUTCAST, POD),
        ("192.168.0.1/32", LOCAL, HOST),
        ("192.168.0.2/32", WITH_TUNNEL, HOST),
        ("192.168.0.3/32", WITHOUT_TUNNEL, HOST),
        ("192.168.0.4/32", OUTCAST, HOST),
        ("fd00:1::/48", 0, CLUSTER),
        ("fd00:1:0:1::/64", LOCAL, POD),
        ("fd00:1:0:2::/64", WITH_TUNNEL, POD),
        ("fd00:1:0:2::1/128", WITH_TUNNEL, HOST),
        ("fd00:1:0:3::/64", WITHOUT_TUNNEL, POD),
        ("fd00:1:0:4::/64", OUTCAST, POD),
        ("fd00:9::1/128", LOCAL, HOST),
        ("fd00:9::2/128", WITH_TUNNEL, HOST),
        ("fd00:9::3/128", WITHOUT_TUNNEL, HOST),
        ("fd00:9::4/128", OUTCAST, HOST),
    )
}
NODES = {WITH_TUNNEL: IFINDEX, OUTCAST: QUARANTINED}

ADDRESSES = {
    "our pod": ("10.1.1.9", "fd00:1:0:1::9"),
    "our other pod": ("10.1.1.10", "fd00:1:0:1::a"),
    "our node": ("192.168.0.1", "fd00:9::1"),
    "pod behind a tunnel": ("10.1.2.9", "fd00:1:0:2::9"),
    "other pod behind a tunnel": ("10.1.2.10", "fd00:1:0:2::a"),
    "node with a tunnel": ("192.168.0.2", "fd00:9::2"),
    "bridge of the node with a tunnel": ("10.1.2.1", "fd00:1:0:2::1"),
    "pod without a tunnel": ("10.1.3.9", "fd00:1:0:3::9"),
    "node without a tunnel": ("192.168.0.3", "fd00:9::3"),
    "pod of a quarantined node": ("10.1.4.9", "fd00:1:0:4::9"),
    "quarantined node": ("192.168.0.4", "fd00:9::4"),
    "pod of an unknown node": ("10.1.77.9", "fd00:1:0:77::9"),
    "other pod of an unknown node": ("10.1.78.9", "fd00:1:0:78::9"),
    "the world": ("203.0.113.9", "2001:db8::9"),
    "another part of the world": ("203.0.113.10", "2001:db8::a"),
}

OFF = SettingsFlag(0)
PERMISSIVE = SettingsFlag.ENFORCING
STRICT = SettingsFlag.ENFORCING | SettingsFlag.STRICT
MODES = {"off": OFF, "permissive": PERMISSIVE, "strict": STRICT}


def addresses(who: str, family: int) -> Address:
    return ip_address(ADDRESSES[who][family == 6])


def drop_or_count(reason: Reason) -> dict[SettingsFlag, Reason]:
    return {OFF: Reason.CLEAR_ALLOWED, PERMISSIVE: Reason.CLEAR_LEAKED, STRICT: reason}


def always(reason: Reason) -> dict[SettingsFlag, Reason]:
    return {OFF: reason, PERMISSIVE: reason, STRICT: reason}


NOT_OURS = always(Reason.NOT_OURS)
ENCRYPTED = always(Reason.ENCRYPTED)
CLEAR_HOST = always(Reason.CLEAR_HOST)
QUARANTINE = always(Reason.DROP_QUARANTINED)
NO_TUNNEL = drop_or_count(Reason.DROP_NO_TUNNEL)
BAD_SOURCE = drop_or_count(Reason.DROP_BAD_SOURCE)
UNKNOWN_NODE = drop_or_count(Reason.DROP_UNKNOWN_NODE)
NO_SUCH_POD = drop_or_count(Reason.DROP_NO_SUCH_POD)
ENCAPSULATED = drop_or_count(Reason.DROP_ENCAPSULATED)
ARRIVED = {
    OFF: Reason.CLEAR_ALLOWED,
    PERMISSIVE: Reason.CLEAR_ARRIVED,
    STRICT: Reason.DROP_CLEAR_ARRIVED,
}
MALFORMED = {OFF: Reason.NOT_OURS, PERMISSIVE: Reason.NOT_OURS, STRICT: Reason.DROP_MALFORMED}


@dataclass(frozen=True)
class Case:
    """A packet from `src` to `dst` (see ADDRESSES), and what it counts as under each settings flags."""

    sentence: str
    src: str
    dst: str
    expected: Mapping[SettingsFlag, Reason]


EGRESS = (
    Case("our pod to a quarantined pod", "our pod", "pod of a quarantined node", QUARANTINE),
    Case("our node to a quarantined pod", "our node", "pod of a quarantined node", QUARANTINE),
    Case("our pod to a quarantined node", "our pod", "quarantined node", QUARANTINE),
    Case("our node to a quarantined node is left alone", "our node", "quarantined node", NOT_OURS),
    Case("a third pod to a quarantined pod", "pod behind a tunnel", "pod of a quarantined node", QUARANTINE),
    Case("another node to a quarantined pod", "node with a tunnel", "pod of a quarantined node", QUARANTINE),
    Case("the world to a quarantined pod is not ours", "the world", "pod of a quarantined node", NOT_OURS),
    Case("our pod to a pod behind a tunnel", "our pod", "pod behind a tunnel", ENCRYPTED),
    Case("our node to a pod behind a tunnel", "our node", "pod behind a tunnel", ENCRYPTED),
    Case("our pod to a node with a tunnel", "our pod", "node with a tunnel", ENCRYPTED),
    Case("our pod to a bridge inside a pod CIDR", "our pod", "bridge of the node with a tunnel", ENCRYPTED),
    Case("our pod to a pod without a tunnel", "our pod", "pod without a tunnel", NO_TUNNEL),
    Case(
        "our node to a pod without a tunnel is no pod traffic",
        "our node",
        "pod without a tunnel",
        CLEAR_HOST,
    ),
    Case(
        "our pod to a node without a tunnel isn't promised", "our pod", "node without a tunnel", CLEAR_HOST
    ),
    Case("node to node is left alone, WireGuard is among it", "our node", "node with a tunnel", NOT_OURS),
    Case("node to node without a tunnel", "our node", "node without a tunnel", NOT_OURS),
    Case("our pod to one of ours that isn't there", "our pod", "our other pod", NO_SUCH_POD),
    Case("what a tunnel brought for a pod that isn't there", "pod behind a tunnel", "our pod", NO_SUCH_POD),
    Case("the same from an unknown node", "pod of an unknown node", "our pod", NO_SUCH_POD),
    Case("the same from another node's own address", "node with a tunnel", "our pod", NO_SUCH_POD),
    Case("our node to a pod that isn't there", "our node", "our pod", NO_SUCH_POD),
    Case("a client in the world to a pod that isn't there", "the world", "our pod", NOT_OURS),
    Case("our pod to our node", "our pod", "our node", NOT_OURS),
    Case("our pod to the world", "our pod", "the world", NOT_OURS),
    Case("the world through us", "the world", "another part of the world", NOT_OURS),
    Case("a client of a NodePort whose pod is elsewhere", "the world", "pod behind a tunnel", NOT_OURS),
    Case("the same without a tunnel", "the world", "pod without a tunnel", NOT_OURS),
    Case("a third node's pod routed through us", "pod without a tunnel", "pod behind a tunnel", BAD_SOURCE),
    Case(
        "an unknown node's pod routed through us",
        "pod of an unknown node",
        "pod behind a tunnel",
        BAD_SOURCE,
    ),
    Case(
        "a pod's own node sending to it by us",
        "other pod behind a tunnel",
        "pod behind a tunnel",
        BAD_SOURCE,
    ),
    Case("a third node to a pod through us", "node without a tunnel", "pod behind a tunnel", CLEAR_HOST),
    Case(
        "a third node's pod to a node through us", "pod without a tunnel", "node with a tunnel", CLEAR_HOST
    ),
    Case("a third node to a node through us", "node without a tunnel", "node with a tunnel", NOT_OURS),
    Case("the world to a node through us", "the world", "node with a tunnel", NOT_OURS),
    Case("our pod to a pod of an unknown node", "our pod", "pod of an unknown node", UNKNOWN_NODE),
    Case(
        "an unknown pod to another", "other pod of an unknown node", "pod of an unknown node", UNKNOWN_NODE
    ),
    Case("our node to a pod of an unknown node", "our node", "pod of an unknown node", NOT_OURS),
    Case("the world to a pod of an unknown node", "the world", "pod of an unknown node", NOT_OURS),
)

INGRESS = (
    Case("a quarantined pod to our pod", "pod of a quarantined node", "our pod", QUARANTINE),
    Case("a quarantined node to our pod", "quarantined node", "our pod", QUARANTINE),
    Case("a quarantined pod to our node", "pod of a quarantined node", "our node", QUARANTINE),
    Case("a quarantined node to our node is left alone", "quarantined node", "our node", NOT_OURS),
    Case("a pod behind a tunnel in clear", "pod behind a tunnel", "our pod", ARRIVED),
    Case("a pod without a tunnel in clear", "pod without a tunnel", "our pod", ARRIVED),
    Case("a pod of an unknown node in clear", "pod of an unknown node", "our pod", ARRIVED),
    Case("a pod to a pod of an unknown node", "pod behind a tunnel", "pod of an unknown node", ARRIVED),
    Case("a node to our pod", "node with a tunnel", "our pod", CLEAR_HOST),
    Case("a pod to our node", "pod behind a tunnel", "our node", CLEAR_HOST),
    Case(
        "a pod to somebody else's pod, seen by flooding",
        "pod behind a tunnel",
        "pod without a tunnel",
        NOT_OURS,
    ),
    Case("node to node", "node with a tunnel", "our node", NOT_OURS),
    Case("the world to our pod", "the world", "our pod", NOT_OURS),
    Case("a pod to the world through us", "pod behind a tunnel", "the world", NOT_OURS),
    Case("our own pod's address from outside", "our pod", "our other pod", NOT_OURS),
    Case("the world to itself", "the world", "another part of the world", NOT_OURS),
)

TUNNEL = (
    Case("a pod to our pod", "pod behind a tunnel", "our pod", always(Reason.DECRYPTED)),
    Case("a node to our pod", "node with a tunnel", "our pod", always(Reason.DECRYPTED)),
    Case("a pod to our node", "pod without a tunnel", "our node", always(Reason.DECRYPTED)),
    Case("our own pod's address", "our pod", "our other pod", always(Reason.DROP_BAD_SOURCE)),
    Case("our node's address", "our node", "our pod", always(Reason.DROP_BAD_SOURCE)),
    Case("the world", "the world", "our pod", always(Reason.DROP_BAD_SOURCE)),
    Case("a pod of an unknown node", "pod of an unknown node", "our pod", always(Reason.DROP_BAD_SOURCE)),
    Case("to the world", "pod behind a tunnel", "the world", always(Reason.DROP_BAD_DESTINATION)),
    Case(
        "to a third node", "pod behind a tunnel", "pod without a tunnel", always(Reason.DROP_BAD_DESTINATION)
    ),
    Case(
        "to nobody known",
        "pod behind a tunnel",
        "pod of an unknown node",
        always(Reason.DROP_BAD_DESTINATION),
    ),
)

# Between pods of two nodes, inside of an overlay's packet.
ENCAPSULATED_EGRESS = (
    Case("pod to pod", "our pod", "pod behind a tunnel", ENCAPSULATED),
    Case("pod to pod without a tunnel", "our pod", "pod without a tunnel", ENCAPSULATED),
    Case("pod to a pod of an unknown node", "our pod", "pod of an unknown node", ENCAPSULATED),
    Case("two unknown nodes' pods", "pod of an unknown node", "other pod of an unknown node", ENCAPSULATED),
    Case("other nodes' pods", "pod without a tunnel", "pod behind a tunnel", ENCAPSULATED),
    Case("two pods of ours", "our pod", "our other pod", NOT_OURS),
    Case("two pods of another node", "pod behind a tunnel", "other pod behind a tunnel", NOT_OURS),
    Case("node to pod", "our node", "pod behind a tunnel", NOT_OURS),
    Case("pod to node", "our pod", "node with a tunnel", NOT_OURS),
    Case("pod to the world", "our pod", "the world", NOT_OURS),
    Case("the world to a pod", "the world", "pod behind a tunnel", NOT_OURS),
)


@dataclass(frozen=True)
class Outcome:
    verdict: int
    data: bytes
    reasons: dict[tuple[Reason, Direction], int]


class Datapath:
    def __init__(self, programs: Programs, maps: Maps) -> None:
        self.programs = programs
        self.maps = maps

    def set(self, flags: SettingsFlag, *, tunnel_mtu: int = 0) -> None:
        self.maps.settings.write(SettingsEntry(flags, LOCAL, tunnel_mtu))

    def run(self, program: str, data: bytes) -> Outcome:
        before = self.maps.metrics.read()
        result = run(self.programs.get(program).fd, data)
        after = self.maps.metrics.read()
        reasons = {key: after[key].packets - before[key].packets for key in after}
        return Outcome(result.verdict, result.data, {key: count for key, count in reasons.items() if count})


@pytest.fixture(scope="module")
def datapath(programs: Programs, maps: Maps) -> Iterator[Datapath]:
    for network, entry in WORLD.items():
        maps.ipcache.update(network, entry)
    for node, ifindex in NODES.items():
        maps.nodes.update(node, ifindex)
    yield Datapath(programs, maps)


def verdict_of(reason: Reason) -> int:
    if reason.dropped:
        return TC_ACT_SHOT
    return TC_ACT_REDIRECT if reason is Reason.ENCRYPTED else TC_ACT_UNSPEC


def packet_between(src: str, dst: str, family: int) -> bytes:
    return p.udp(addresses(src, family), addresses(dst, family), b"x" * 32)


def check(datapath: Datapath, program: str, data: bytes, reason: Reason) -> None:
    direction = Direction.EGRESS if program in (TO_NETDEV, TO_NETDEV_L3) else Direction.INGRESS
    outcome = datapath.run(program, data)
    assert outcome.reasons == {(reason, direction): 1}
    assert outcome.verdict == verdict_of(reason)
    assert outcome.data == data


def sentences(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.sentence)


modes = pytest.mark.parametrize("mode", MODES)
families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
wirings = pytest.mark.parametrize("bare", [False, True], ids=["Ethernet", "no L2 header"])


@wirings
@families
@modes
@sentences(EGRESS)
def test_on_its_way_out(datapath: Datapath, case: Case, mode: str, family: int, bare: bool) -> None:
    datapath.set(MODES[mode])
    packet = packet_between(case.src, case.dst, family)
    program, data = (TO_NETDEV_L3, packet) if bare else (TO_NETDEV, p.frame(packet))
    check(datapath, program, data, case.expected[MODES[mode]])


@wirings
@families
@modes
@sentences(INGRESS)
def test_on_its_way_in(datapath: Datapath, case: Case, mode: str, family: int, bare: bool) -> None:
    datapath.set(MODES[mode])
    packet = packet_between(case.src, case.dst, family)
    program, data = (FROM_NETDEV_L3, packet) if bare else (FROM_NETDEV, p.frame(packet))
    check(datapath, program, data, case.expected[MODES[mode]])


@families
@modes
@sentences(TUNNEL)
def test_out_of_a_tunnel(datapath: Datapath, case: Case, mode: str, family: int) -> None:
    datapath.set(MODES[mode])
    packet = packet_between(case.src, case.dst, family)
    check(datapath, FROM_WIREGUARD, packet, case.expected[MODES[mode]])


Wrap = Callable[[Address, Address, bytes], bytes]

OVERLAYS: dict[str, Wrap] = {
    "VXLAN": lambda src, dst, inner: p.vxlan(src, dst, p.frame(inner)),
    "VXLAN on flannel's port": lambda src, dst, inner: p.vxlan(
        src, dst, p.frame(inner), port=p.VXLAN_PORT_LINUX
    ),
    "VXLAN with tags inside": lambda src, dst, inner: p.vxlan(
        src, dst, p.frame(inner, tags=(p.ETH_P_8021AD, p.ETH_P_8021Q))
    ),
    "Geneve": lambda src, dst, inner: p.geneve(src, dst, p.frame(inner)),
    "Geneve with options": lambda src, dst, inner: p.geneve(src, dst, p.frame(inner), options=bytes(44)),
    "Geneve without frames": lambda src, dst, inner: p.geneve(
        src, dst, inner, kind=p.ETH_P_IPV6 if inner[0] >> 4 == 6 else p.ETH_P_IP
    ),
    "IP in IP": p.ipip,
}


@pytest.mark.parametrize("outer_family", [4, 6], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("overlay", OVERLAYS)
@families
@modes
@sentences(ENCAPSULATED_EGRESS)
def test_encapsulated_on_its_way_out(
    datapath: Datapath, case: Case, mode: str, family: int, overlay: str, outer_family: int
) -> None:
    datapath.set(MODES[mode])
    ends = addresses("our node", outer_family), addresses("node with a tunnel", outer_family)
    packet = OVERLAYS[overlay](*ends, packet_between(case.src, case.dst, family))
    check(datapath, TO_NETDEV, p.frame(packet), case.expected[MODES[mode]])
    check(datapath, TO_NETDEV_L3, packet, case.expected[MODES[mode]])


@pytest.mark.parametrize("overlay", OVERLAYS)
@families
@modes
@sentences(INGRESS)
def test_encapsulated_on_its_way_in(
    datapath: Datapath, case: Case, mode: str, family: int, overlay: str
) -> None:
    datapath.set(MODES[mode])
    ends = addresses("node with a tunnel", family), addresses("our node", family)
    packet = OVERLAYS[overlay](*ends, packet_between(case.src, case.dst, family))
    check(datapath, FROM_NETDEV, p.frame(packet), case.expected[MODES[mode]])


@families
def test_an_overlay_to_anywhere_is_looked_into(datapath: Datapath, family: int) -> None:
    datapath.set(STRICT)
    inner = p.frame(packet_between("our pod", "pod behind a tunnel", family))
    packet = p.vxlan(addresses("our node", family), addresses("the world", family), inner)
    check(datapath, TO_NETDEV, p.frame(packet), Reason.DROP_ENCAPSULATED)


@families
def test_a_pods_own_overlay_to_a_node_without_tunnel_is_looked_into(datapath: Datapath, family: int) -> None:
    datapath.set(STRICT)
    inner = p.frame(packet_between("our pod", "pod without a tunnel", family))
    packet = p.vxlan(addresses("our pod", family), addresses("node without a tunnel", family), inner)
    check(datapath, TO_NETDEV, p.frame(packet), Reason.DROP_ENCAPSULATED)


@families
def test_what_goes_into_the_tunnel_anyway_may_be_an_overlay(datapath: Datapath, family: int) -> None:
    datapath.set(STRICT)
    inner = p.frame(packet_between("our pod", "pod without a tunnel", family))
    packet = p.vxlan(addresses("our pod", family), addresses("pod behind a tunnel", family), inner)
    check(datapath, TO_NETDEV, p.frame(packet), Reason.ENCRYPTED)


NOT_OVERLAYS: dict[str, tuple[Wrap, Reason]] = {
    "a port next to VXLAN's": (
        lambda src, dst, inner: p.vxlan(src, dst, p.frame(inner), port=4790),
        Reason.NOT_OURS,
    ),
    "VXLAN's port without a VXLAN header": (
        lambda src, dst, inner: p.vxlan(src, dst, p.frame(inner), flags=0),
        Reason.NOT_OURS,
    ),
    "Geneve of a later version": (
        lambda src, dst, inner: p.geneve(src, dst, p.frame(inner), version=1),
        Reason.NOT_OURS,
    ),
    "Geneve with something else inside": (
        lambda src, dst, inner: p.geneve(src, dst, inner, kind=p.ETH_P_ARP),
        Reason.NOT_OURS,
    ),
    "ARP inside VXLAN": (
        lambda src, dst, inner: p.vxlan(src, dst, p.ethernet(inner, p.ETH_P_ARP)),
        Reason.NOT_OURS,
    ),
    "VXLAN cut off in its header": (
        lambda src, dst, inner: p.udp(src, dst, b"\x08\0\0\0", dport=p.VXLAN_PORT),
        Reason.DROP_MALFORMED,
    ),
    "VXLAN cut off in the inner packet": (
        lambda src, dst, inner: p.vxlan(src, dst, p.frame(inner)[:30]),
        Reason.DROP_MALFORMED,
    ),
    "IP in IP with nothing inside": (
        lambda src, dst, inner: p.ipip(src, dst, inner[:8]),
        Reason.DROP_MALFORMED,
    ),
    "IP in IP of the wrong version": (
        lambda src, dst, inner: p.ip(src, dst, p.IPIP, b"\x65" + inner[1:]),
        Reason.DROP_MALFORMED,
    ),
    "three VLAN tags inside VXLAN": (
        lambda src, dst, inner: p.vxlan(src, dst, p.frame(inner, tags=(p.ETH_P_8021Q,) * 3)),
        Reason.DROP_MALFORMED,
    ),
    "UDP cut off in its ports": (
        lambda src, dst, inner: p.ip(src, dst, p.UDP, b"\0\0\x12"),
        Reason.NOT_OURS,
    ),
}


@families
@pytest.mark.parametrize("what", NOT_OVERLAYS)
def test_what_only_looks_like_an_overlay(datapath: Datapath, what: str, family: int) -> None:
    wrap, reason = NOT_OVERLAYS[what]
    packet = wrap(
        addresses("our node", family),
        addresses("node with a tunnel", family),
        packet_between("our pod", "pod behind a tunnel", family),
    )
    datapath.set(STRICT)
    check(datapath, TO_NETDEV, p.frame(packet), reason)
    check(datapath, FROM_NETDEV, p.frame(packet), reason)
    datapath.set(OFF)
    check(datapath, TO_NETDEV, p.frame(packet), Reason.NOT_OURS)


@families
def test_an_overlays_later_fragment_passes_and_its_first_does_not(datapath: Datapath, family: int) -> None:
    datapath.set(STRICT)
    src, dst = addresses("our node", family), addresses("node with a tunnel", family)
    whole = p.vxlan(src, dst, p.frame(packet_between("our pod", "pod behind a tunnel", family)))
    payload = whole[20 if family == 4 else 40 :]
    if family == 4:
        first = p.ipv4(src, dst, p.UDP, payload[:80], more=True)
        later = p.ipv4(src, dst, p.UDP, payload, offset=80)
    else:
        first = p.ipv6(
            src, dst, p.UDP, payload[:96], extensions=((p.FRAGMENT, bytes.fromhex("00000100000001")),)
        )
        later = p.ipv6(src, dst, p.UDP, payload, extensions=((p.FRAGMENT, bytes.fromhex("00006000000001")),))
    check(datapath, TO_NETDEV, p.frame(first), Reason.DROP_ENCAPSULATED)
    check(datapath, TO_NETDEV, p.frame(later), Reason.NOT_OURS)


EXTENSIONS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "hop-by-hop": ((p.HOP_BY_HOP, bytes(7)),),
    "routing": ((p.ROUTING, bytes([2]) + bytes(22)),),
    "destination options": ((p.DESTINATION_OPTIONS, bytes([1]) + bytes(14)),),
    "authentication": ((p.AUTHENTICATION, bytes([4]) + bytes(22)),),
    "first fragment": ((p.FRAGMENT, bytes(7)),),
    "all of them": (
        (p.HOP_BY_HOP, bytes(7)),
        (p.DESTINATION_OPTIONS, bytes([1]) + bytes(14)),
        (p.ROUTING, bytes([2]) + bytes(22)),
        (p.FRAGMENT, bytes(7)),
        (p.AUTHENTICATION, bytes([4]) + bytes(22)),
        (p.DESTINATION_OPTIONS, bytes(7)),
    ),
}


@pytest.mark.parametrize("extensions", EXTENSIONS.values(), ids=EXTENSIONS)
def test_extension_headers_hide_neither_addresses_nor_overlays(
    datapath: Datapath, extensions: tuple[tuple[int, bytes], ...]
) -> None:
    datapath.set(STRICT)
    direct = p.ipv6(
        addresses("our pod", 6),
        addresses("pod without a tunnel", 6),
        p.UDP,
        bytes(16),
        extensions=extensions,
    )
    check(datapath, TO_NETDEV, p.frame(direct), Reason.DROP_NO_TUNNEL)
    src, dst = addresses("our node", 6), addresses("node with a tunnel", 6)
    whole = p.vxlan(src, dst, p.frame(packet_between("our pod", "pod behind a tunnel", 6)))
    wrapped = p.ipv6(src, dst, p.UDP, whole[40:], extensions=extensions)
    check(datapath, TO_NETDEV, p.frame(wrapped), Reason.DROP_ENCAPSULATED)


@families
@pytest.mark.parametrize(
    "tags", [(p.ETH_P_8021Q,), (p.ETH_P_8021AD,), (p.ETH_P_8021AD, p.ETH_P_8021Q)], ids=str
)
def test_tagged_frames_are_judged_but_have_no_tunnel(
    datapath: Datapath, tags: tuple[int, ...], family: int
) -> None:
    datapath.set(STRICT)
    to_pod = p.frame(packet_between("our pod", "pod behind a tunnel", family), tags=tags)
    check(datapath, TO_NETDEV, to_pod, Reason.DROP_NO_TUNNEL)
    to_node = p.frame(packet_between("our pod", "node with a tunnel", family), tags=tags)
    check(datapath, TO_NETDEV, to_node, Reason.CLEAR_HOST)
    to_world = p.frame(packet_between("our pod", "the world", family), tags=tags)
    check(datapath, TO_NETDEV, to_world, Reason.NOT_OURS)
    arrived = p.frame(packet_between("pod behind a tunnel", "our pod", family), tags=tags)
    check(datapath, FROM_NETDEV, arrived, Reason.DROP_CLEAR_ARRIVED)
    datapath.set(PERMISSIVE)
    check(datapath, TO_NETDEV, to_pod, Reason.CLEAR_LEAKED)


@families
def test_ipv4_options_and_fragments_are_judged_by_address(datapath: Datapath, family: int) -> None:
    datapath.set(STRICT)
    src, dst = addresses("our pod", family), addresses("pod behind a tunnel", family)
    if family == 4:
        forms = [
            p.ipv4(src, dst, p.UDP, bytes(24), options=bytes([1] * 40)),
            p.ipv4(src, dst, p.UDP, bytes(24), more=True),
            p.ipv4(src, dst, p.UDP, bytes(24), offset=1480),
        ]
    else:
        forms = [
            p.ipv6(src, dst, p.UDP, bytes(24), extensions=((p.FRAGMENT, bytes.fromhex("00000100000001")),)),
            p.ipv6(src, dst, p.UDP, bytes(24), extensions=((p.FRAGMENT, bytes.fromhex("0005c800000001")),)),
        ]
    for form in forms:
        check(datapath, TO_NETDEV, p.frame(form), Reason.ENCRYPTED)


UNREADABLE = {
    "no IP header at all": p.frame(b"\x45", tags=(p.ETH_P_8021Q,)),
    "IPv4 cut off": p.frame(
        packet_between("our pod", "pod without a tunnel", 4)[:19], tags=(p.ETH_P_8021Q,)
    ),
    "IPv6 cut off": p.frame(
        packet_between("our pod", "pod without a tunnel", 6)[:39], tags=(p.ETH_P_8021Q,)
    ),
    "IPv4 announced, version 6": p.ethernet(
        packet_between("our pod", "pod without a tunnel", 6), p.ETH_P_IP
    ),
    "IPv6 announced, version 4": p.ethernet(
        packet_between("our pod", "pod without a tunnel", 4), p.ETH_P_IPV6
    ),
    "IPv4 header of 16 bytes": p.frame(b"\x44" + packet_between("our pod", "pod without a tunnel", 4)[1:]),
    "IPv4 header longer than the packet": p.frame(
        b"\x4f" + packet_between("our pod", "pod without a tunnel", 4)[1:48]
    ),
    "three VLAN tags": p.frame(
        packet_between("our pod", "pod without a tunnel", 4), tags=(p.ETH_P_8021Q,) * 3
    ),
    "a VLAN tag cut off": p.ethernet(b"\0", p.ETH_P_8021Q),
}


@modes
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_fails_closed(datapath: Datapath, what: str, mode: str) -> None:
    datapath.set(MODES[mode])
    check(datapath, TO_NETDEV, UNREADABLE[what], MALFORMED[MODES[mode]])
    check(datapath, FROM_NETDEV, UNREADABLE[what], MALFORMED[MODES[mode]])


@modes
def test_what_is_not_ip_passes(datapath: Datapath, mode: str) -> None:
    datapath.set(MODES[mode])
    for data in (
        p.ethernet(bytes(28), p.ETH_P_ARP),
        p.ethernet(bytes(28), p.ETH_P_ARP, tags=(p.ETH_P_8021Q,)),
    ):
        check(datapath, TO_NETDEV, data, Reason.NOT_OURS)
        check(datapath, FROM_NETDEV, data, Reason.NOT_OURS)
    check(datapath, TO_NETDEV_L3, bytes(28), Reason.NOT_OURS)
    check(datapath, FROM_NETDEV_L3, bytes(28), Reason.NOT_OURS)


@modes
def test_nothing_but_ip_comes_out_of_a_tunnel(datapath: Datapath, mode: str) -> None:
    datapath.set(MODES[mode])
    check(datapath, FROM_WIREGUARD, bytes(28), Reason.DROP_MALFORMED)
    cut_off = packet_between("pod behind a tunnel", "our pod", 6)[:39]
    check(datapath, FROM_WIREGUARD, cut_off, Reason.DROP_MALFORMED)


def test_counters_count_the_whole_packet(datapath: Datapath) -> None:
    datapath.set(STRICT)
    data = p.frame(packet_between("our pod", "pod without a tunnel", 4))
    key = Reason.DROP_NO_TUNNEL, Direction.EGRESS
    before = datapath.maps.metrics.read()[key]
    run(datapath.programs.get(TO_NETDEV).fd, data, repeat=5)
    after = datapath.maps.metrics.read()[key]
    assert (after.packets - before.packets, after.bytes - before.bytes) == (5, 5 * len(data))


def test_before_settings_are_written_no_address_is_this_nodes(datapath: Datapath) -> None:
    """Least of all one whose node nobody knows: both have the number 0."""
    to_pod = p.frame(packet_between("our pod", "pod behind a tunnel", 4))
    datapath.maps.settings.write(SettingsEntry(OFF, 0, 0))
    check(datapath, TO_NETDEV, to_pod, Reason.CLEAR_ALLOWED)
    datapath.maps.settings.write(SettingsEntry(STRICT, 0, 0))
    check(datapath, TO_NETDEV, to_pod, Reason.DROP_BAD_SOURCE)
    to_world = packet_between("pod behind a tunnel", "the world", 4)
    check(datapath, FROM_WIREGUARD, to_world, Reason.DROP_BAD_DESTINATION)


class Evaluator:
    """The rules of verdict.h over again, without any regard for speed. Answers with the reason."""

    def __init__(self, flags: SettingsFlag) -> None:
        self.flags = flags

    def who(self, address: Address) -> AddressEntry:
        """The entry of the longest prefix."""
        found = [each for each in WORLD if each.version == address.version and address in each]
        if not found:
            return AddressEntry(0, 0, AddressFlag(0))
        return WORLD[max(found, key=lambda each: each.prefixlen)]

    def clear(self, reason: Reason) -> Reason:
        if SettingsFlag.STRICT in self.flags:
            return reason
        return Reason.CLEAR_LEAKED if SettingsFlag.ENFORCING in self.flags else Reason.CLEAR_ALLOWED

    def unreadable(self) -> Reason:
        return Reason.DROP_MALFORMED if SettingsFlag.STRICT in self.flags else Reason.NOT_OURS

    def to_netdev(self, data: bytes, bare: bool) -> Reason:
        try:
            packet = Parsed.bare(data) if bare else Parsed.frame(data)
            if packet is None:
                return Reason.NOT_OURS
            reason = self.leaving(packet)
            if reason in (Reason.NOT_OURS, Reason.CLEAR_HOST) and (inner := packet.carried()):
                src, dst = self.who(inner.src), self.who(inner.dst)
                both_pods = all(each.flags & (POD | CLUSTER) for each in (src, dst))
                if both_pods and not (src.node == dst.node != 0):
                    return self.clear(Reason.DROP_ENCAPSULATED)
            return reason
        except Unreadable:
            return self.unreadable()

    def from_netdev(self, data: bytes, bare: bool) -> Reason:
        try:
            packet = Parsed.bare(data) if bare else Parsed.frame(data)
            if packet is None:
                return Reason.NOT_OURS
            reason = self.arriving(packet)
            if reason in (Reason.NOT_OURS, Reason.CLEAR_HOST) and (inner := packet.carried()):
                inside = self.arriving(inner)
                return reason if inside is Reason.NOT_OURS else inside
            return reason
        except Unreadable:
            return self.unreadable()

    def from_wireguard(self, data: bytes) -> Reason:
        try:
            packet = Parsed.bare(data)
        except Unreadable:
            return Reason.DROP_MALFORMED
        if packet is None:
            return Reason.DROP_MALFORMED
        if self.who(packet.src).node in (0, LOCAL):
            return Reason.DROP_BAD_SOURCE
        return Reason.DECRYPTED if self.who(packet.dst).node == LOCAL else Reason.DROP_BAD_DESTINATION

    def leaving(self, packet: Parsed) -> Reason:
        src, dst = self.who(packet.src), self.who(packet.dst)
        tunnel = dst.node in NODES and not packet.tagged and dst.node != OUTCAST
        from_pod = bool(src.flags & (POD | CLUSTER))
        if dst.node == LOCAL and dst.flags & POD and (from_pod or src.flags & HOST):
            return self.clear(Reason.DROP_NO_SUCH_POD)
        if dst.flags == AddressFlag(0) or dst.node == LOCAL:
            return Reason.NOT_OURS
        if dst.node == OUTCAST and (from_pod or (dst.flags == POD and src.flags == HOST)):
            return Reason.DROP_QUARANTINED
        if dst.flags == POD:
            if src.node == LOCAL:
                if tunnel:
                    return Reason.ENCRYPTED
                return self.clear(Reason.DROP_NO_TUNNEL) if from_pod else Reason.CLEAR_HOST
            if from_pod:
                return self.clear(Reason.DROP_BAD_SOURCE)
            return Reason.CLEAR_HOST if src.flags == HOST else Reason.NOT_OURS
        if dst.flags == HOST:
            if not from_pod:
                return Reason.NOT_OURS
            return Reason.ENCRYPTED if src.node == LOCAL and tunnel else Reason.CLEAR_HOST
        return self.clear(Reason.DROP_UNKNOWN_NODE) if from_pod else Reason.NOT_OURS

    def arriving(self, packet: Parsed) -> Reason:
        src, dst = self.who(packet.src), self.who(packet.dst)
        if not src.flags or src.node == LOCAL or not dst.flags or dst.node not in (0, LOCAL):
            return Reason.NOT_OURS
        pods = sum(bool(each.flags & (POD | CLUSTER)) for each in (src, dst))
        if pods and src.node == OUTCAST:
            return Reason.DROP_QUARANTINED
        if pods == 2:
            if SettingsFlag.STRICT in self.flags:
                return Reason.DROP_CLEAR_ARRIVED
            return Reason.CLEAR_ARRIVED if SettingsFlag.ENFORCING in self.flags else Reason.CLEAR_ALLOWED
        return Reason.CLEAR_HOST if pods else Reason.NOT_OURS


class Unreadable(Exception):
    pass


@dataclass(frozen=True)
class Parsed:
    src: Address
    dst: Address
    protocol: int
    payload: bytes | None
    tagged: bool = False

    @classmethod
    def frame(cls, data: bytes) -> Parsed | None:
        kinds = [int.from_bytes(data[at : at + 2], "big") for at in (12, 16, 20)]
        ends = [at + 2 <= len(data) for at in (12, 16, 20)]
        for depth, kind in enumerate(kinds):
            if not ends[depth]:
                raise Unreadable
            if kind in (p.ETH_P_IP, p.ETH_P_IPV6):
                rest = data[14 + 4 * depth :]
                return cls.ip(rest, 4 if kind == p.ETH_P_IP else 6, tagged=depth > 0)
            if kind not in (p.ETH_P_8021Q, p.ETH_P_8021AD):
                return None
        raise Unreadable

    @classmethod
    def bare(cls, data: bytes) -> Parsed | None:
        if not data:
            raise Unreadable
        version = data[0] >> 4
        return cls.ip(data, version) if version in (4, 6) else None

    @classmethod
    def ip(cls, data: bytes, version: int, *, tagged: bool = False) -> Parsed:
        if len(data) < (20 if version == 4 else 40) or data[0] >> 4 != version:
            raise Unreadable
        if version == 4:
            length = (data[0] & 15) * 4
            if length < 20 or length > len(data):
                raise Unreadable
            later = int.from_bytes(data[6:8], "big") & 0x1FFF
            payload = None if later else data[length:]
            return cls(ip_address(data[12:16]), ip_address(data[16:20]), data[9], payload, tagged)
        src, dst = ip_address(data[8:24]), ip_address(data[24:40])
        protocol, rest = data[6], data[40:]
        for _ in range(8):
            if protocol in (0, 43, 60, 135) and len(rest) >= 2:
                protocol, rest = rest[0], rest[(rest[1] + 1) * 8 :]
            elif protocol == 51 and len(rest) >= 2:
                protocol, rest = rest[0], rest[(rest[1] + 2) * 4 :]
            elif protocol == 44 and len(rest) >= 8:
                later = int.from_bytes(rest[2:4], "big") & 0xFFF8
                protocol, rest = rest[0], rest[8:]
                if later:
                    return cls(src, dst, protocol, None, tagged)
            elif protocol in (0, 43, 44, 51, 60, 135):
                return cls(src, dst, protocol, None, tagged)
            else:
                return cls(src, dst, protocol, rest, tagged)
        return cls(src, dst, protocol, None, tagged)

    def carried(self) -> Parsed | None:
        data = self.payload
        if data is None:
            return None
        if self.protocol == p.IPIP:
            return Parsed.ip(data, 4)
        if self.protocol == p.IPV6:
            return Parsed.ip(data, 6)
        if self.protocol != p.UDP or len(data) < 4:
            return None
        port = int.from_bytes(data[2:4], "big")
        if port not in (p.VXLAN_PORT, p.VXLAN_PORT_LINUX, p.GENEVE_PORT):
            return None
        if len(data) < 16:
            raise Unreadable
        if port != p.GENEVE_PORT:
            return Parsed.frame(data[16:]) if data[8] & 0x08 else None
        if data[8] >> 6:
            return None
        inner, kind = data[16 + (data[8] & 0x3F) * 4 :], int.from_bytes(data[10:12], "big")
        if kind == p.ETH_P_TEB:
            return Parsed.frame(inner)
        return (
            Parsed.ip(inner, 4 if kind == p.ETH_P_IP else 6) if kind in (p.ETH_P_IP, p.ETH_P_IPV6) else None
        )


def some_address(family: int) -> st.SearchStrategy[Address]:
    return st.sampled_from([ip_address(each[family == 6]) for each in ADDRESSES.values()])


@st.composite
def some_packet(draw: st.DrawFn, depth: int = 1) -> bytes:
    """IP that mostly makes sense."""
    family = draw(st.sampled_from([4, 6]))
    src, dst = draw(some_address(family)), draw(some_address(family))
    form = draw(st.sampled_from(["udp", "any", "tcp", *(["overlay"] * 3 if depth else [])]))
    if form == "overlay":
        inner = draw(some_packet(depth=depth - 1))
        packet = OVERLAYS[draw(st.sampled_from(sorted(OVERLAYS)))](src, dst, inner)
    elif form == "udp":
        packet = p.udp(
            src, dst, draw(st.binary(max_size=40)), dport=draw(st.sampled_from([53, 4789, 8472, 6081]))
        )
    elif form == "tcp":
        packet = p.tcp(src, dst, flags=p.SYN, options=bytes.fromhex("020405b4"))
    else:
        packet = p.ip(src, dst, draw(st.integers(0, 255)), draw(st.binary(max_size=60)))
    if family == 6 and draw(st.booleans()):
        kinds = st.sampled_from([0, 43, 44, 51, 60])
        headers = draw(st.lists(st.tuples(kinds, st.binary(min_size=7, max_size=7)), max_size=9))
        padded = tuple(
            (kind, rest[:0] + bytes([draw(st.integers(0, 1))]) + rest[1:]) for kind, rest in headers
        )
        packet = p.ipv6(src, dst, packet[6], packet[40:], extensions=padded)
    return packet


@st.composite
def some_data(draw: st.DrawFn) -> bytes:
    """Frames and bare packets, damaged ones among them, and garbage."""
    data = draw(some_packet())
    if draw(st.booleans()):
        tags = draw(st.lists(st.sampled_from([p.ETH_P_8021Q, p.ETH_P_8021AD]), max_size=3))
        data = p.frame(data, tags=tuple(tags))
    if draw(st.integers(0, 3)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if draw(st.integers(0, 3)) == 0:
        damaged = bytearray(data)
        for at, value in draw(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4)):
            if at < len(damaged):
                damaged[at] = value
        data = bytes(damaged)
    return data


def can_be_run(data: bytes) -> bool:
    """A test run wants something behind the Ethernet header, since 6.18 a whole IP header where IP is
    announced."""
    announced = {p.ETH_P_IP: 20, p.ETH_P_IPV6: 40}.get(int.from_bytes(data[12:14], "big"), 1)
    return len(data) >= p.ETHERNET_BYTES + announced


@settings(
    max_examples=1500 // int(os.environ.get("MESHWIRE_SAMPLE", "1")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.one_of(some_data(), st.binary(max_size=200)), mode=st.sampled_from(sorted(MODES)))
@example(data=p.frame(p.ipip(ip_address("fd00:9::1"), ip_address("fd00:9::2"), b"\x45")), mode="strict")
def test_any_packet_gets_the_evaluators_verdict(datapath: Datapath, data: bytes, mode: str) -> None:
    assume(can_be_run(data))
    flags = MODES[mode]
    datapath.set(flags)
    evaluator = Evaluator(flags)
    check(datapath, TO_NETDEV, data, evaluator.to_netdev(data, False))
    check(datapath, TO_NETDEV_L3, data, evaluator.to_netdev(data, True))
    check(datapath, FROM_NETDEV, data, evaluator.from_netdev(data, False))
    check(datapath, FROM_NETDEV_L3, data, evaluator.from_netdev(data, True))
    check(datapath, FROM_WIREGUARD, data, evaluator.from_wireguard(data))
