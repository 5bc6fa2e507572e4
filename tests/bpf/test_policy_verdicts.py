"""What the policy programs do with packets: a table of sentences, flows over several packets, and random
policies and packets against a slow evaluator of the rules in policy.h."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_uint32
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwire.bpf import packets as p
from meshwire.bpf import policylayouts
from meshwire.bpf._elements import items, update
from meshwire.bpf._libbpf import check as check_result
from meshwire.bpf._libbpf import library
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.loader import (
    FROM_POD,
    POLICY_IN,
    POLICY_IN_L3,
    POLICY_OUT,
    POLICY_OUT_L3,
    TO_POD,
    Programs,
)
from meshwire.bpf.maps import Counter
from meshwire.bpf.policylayouts import EVENTS_PER_SECOND, CidrFlag, EndpointFlag, FlowFlag, StateFlag
from meshwire.bpf.policymaps import (
    CidrEntry,
    EndpointEntry,
    Event,
    Events,
    FlowEntry,
    FlowKey,
    PolicyEntry,
    PolicyKey,
    PolicyMaps,
)
from meshwire.bpf.testrun import TC_ACT_SHOT, TC_ACT_UNSPEC, run
from meshwire.policy import identity

pytestmark = pytest.mark.bpf

Address = IPv4Address | IPv6Address

EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
ENFORCED = EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED
AUDITED = EndpointFlag.INGRESS_AUDITED | EndpointFlag.EGRESS_AUDITED
CIDRS = EndpointFlag.INGRESS_CIDRS | EndpointFlag.EGRESS_CIDRS
OPEN = EndpointFlag(0)

SLOW = 5
"""Seconds that an emulated machine may need from one step of a test to the next."""

HERE = 1
"""Test runs happen on the loopback device."""
ELSEWHERE = 4711
OURS, OTHER, REMOTE, SET, AUDIT_SET, OTHER_SET, BLOCK = 300, 301, 400, 7, 8, 9, 5

ADDRESSES = {
    "our pod": ("10.1.1.9", "fd00:1:0:1::9"),
    "our other pod": ("10.1.1.10", "fd00:1:0:1::a"),
    "pod at another device": ("10.1.1.11", "fd00:1:0:1::b"),
    "remote pod": ("10.1.2.9", "fd00:1:0:2::9"),
    "our node": ("192.168.0.1", "fd00:9::1"),
    "our node, an API server": ("192.168.0.4", "fd00:9::4"),
    "remote node": ("192.168.0.2", "fd00:9::2"),
    "API server in the world": ("198.51.100.6", "2001:db8:6::6"),
    "unknown pod": ("10.1.77.9", "fd00:1:0:77::9"),
    "new pod of ours": ("10.1.1.77", "fd00:1:0:1::77"),
    "bridge of our pods": ("10.1.1.1", "fd00:1:0:1::1"),
    "the world": ("203.0.113.9", "2001:db8::9"),
    "the world in a block": ("198.51.100.9", "2001:db8:6::9"),
    "service": ("10.96.0.10", "fd00:96::10"),
}
IDENTITIES = {
    "our pod": OURS,
    "our other pod": OTHER,
    "pod at another device": 302,
    "remote pod": REMOTE,
    "our node": identity.HOST,
    "bridge of our pods": identity.HOST,
    "our node, an API server": identity.APISERVER_HOST,
    "remote node": identity.REMOTE_NODE,
    "API server in the world": identity.APISERVER,
}
BLOCKS: dict[str, CidrEntry] = {
    "10.1.0.0/16": CidrEntry(0, CidrFlag.CLUSTER),
    "10.1.1.0/24": CidrEntry(0, CidrFlag.CLUSTER | CidrFlag.LOCAL),
    "fd00:1:0:1::/64": CidrEntry(0, CidrFlag.CLUSTER | CidrFlag.LOCAL),
    "10.96.0.0/16": CidrEntry(0, CidrFlag.CLUSTER),
    "fd00:1::/48": CidrEntry(0, CidrFlag.CLUSTER),
    "fd00:96::/64": CidrEntry(0, CidrFlag.CLUSTER),
    "198.51.100.0/24": CidrEntry(BLOCK, CidrFlag(0)),
    "2001:db8:6::/48": CidrEntry(BLOCK, CidrFlag(0)),
    "10.1.2.0/24": CidrEntry(BLOCK, CidrFlag.CLUSTER),
    "fd00:1:0:2::/64": CidrEntry(BLOCK, CidrFlag.CLUSTER),
}

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])

Entries = Mapping[PolicyKey, PolicyEntry]


def address(who: str, family: int) -> Address:
    return ip_address(ADDRESSES[who][family == 6])


@dataclass
class Node:
    """The programs, their maps, and a short way to say what is asked of them."""

    programs: Programs
    maps: PolicyMaps
    pins: Path
    events: Events
    family: int = 4
    counters: dict[tuple[Reason, Direction], Counter] = field(default_factory=dict)

    def reset(self, family: int) -> None:
        self.family = family
        self.counters = self.maps.metrics.read()
        self.maps.policies.delete_many(self.maps.policies.read())
        every = [ip_address(each) for pair in ADDRESSES.values() for each in pair]
        self.maps.flows.purge(every)
        assert not self.maps.flows.read()
        for who in ("our pod", "our other pod"):
            self.pod(who)
        self.pod("pod at another device", ifindex=ELSEWHERE)
        for who, number in IDENTITIES.items():
            self.identify(who, number)
        self.events.read()
        self.spend_events(0)
        self.renew()

    def renew(self) -> None:
        """As an agent does after each change."""
        self.maps.state.renew(StateFlag(0))

    def __getitem__(self, who: str) -> Address:
        return address(who, self.family)

    def identify(self, who: str, number: int) -> None:
        self.maps.identities.update(self[who], number)
        self.renew()

    def pod(
        self,
        who: str = "our pod",
        flags: EndpointFlag = OPEN,
        *,
        ifindex: int = HERE,
        number: int | None = None,
        audit: bool = False,
        revision: int = 1,
        born: int = 1,
    ) -> None:
        entry = EndpointEntry(
            ifindex,
            number or IDENTITIES[who],
            OTHER_SET if who == "our other pod" else SET,
            AUDIT_SET if audit else 0,
            revision,
            born,
            flags,
        )
        self.maps.endpoints.update(self[who], entry)
        self.renew()

    def rule(
        self,
        direction: Direction,
        peer: int = identity.ANY,
        protocol: int | None = None,
        port: int = 0,
        bits: int = 16,
        *,
        deny: bool = False,
        number: int = 1,
        rules: int = SET,
    ) -> None:
        key = PolicyKey(rules, peer, direction, protocol, port, bits if protocol else 0)
        self.maps.policies.update(key, PolicyEntry(number, deny))
        self.renew()

    def send(self, program: str, packet: bytes) -> Reason:
        return self.deliver(program, packet if program in (POLICY_OUT_L3, POLICY_IN_L3) else p.frame(packet))

    def deliver(self, program: str, data: bytes) -> Reason:
        reasons = self.counted(program, data)
        assert len(reasons) == 1
        return reasons[0][0]

    def counted(self, program: str, data: bytes) -> list[tuple[Reason, Direction]]:
        """What one packet counted as. The verdict has to fit."""
        before = self.counters
        result = run(self.programs.get(program).fd, data)
        after = self.counters = self.maps.metrics.read()
        found = [key for key in after for _ in range(after[key].packets - before[key].packets)]
        assert result.data == data
        dropped = any(reason.dropped for reason, _ in found)
        assert result.verdict == (TC_ACT_SHOT if dropped else TC_ACT_UNSPEC)
        return found

    def udp(self, src: str, dst: str, dport: int = 53, sport: int = 40000) -> bytes:
        return p.udp(self[src], self[dst], b"x" * 32, sport=sport, dport=dport)

    def tcp(self, src: str, dst: str, flags: int, dport: int = 80, sport: int = 40000) -> bytes:
        return p.tcp(self[src], self[dst], flags=flags, sport=sport, dport=dport)

    def echo(self, src: str, dst: str, *, reply: bool = False, identifier: int = 77) -> bytes:
        kinds = (0, 8) if self.family == 4 else (129, 128)
        rest = struct.pack("!HH", identifier, 1)
        return p.icmp(self[src], self[dst], kinds[not reply], rest=rest)

    def error(self, src: str, dst: str, about: bytes, kinds: tuple[int, int] = (3, 1)) -> bytes:
        return p.icmp(self[src], self[dst], kinds[self.family == 6], rest=bytes(4) + about)

    @property
    def icmp(self) -> int:
        return p.ICMP if self.family == 4 else p.ICMPV6

    def fragments(self, src: str, dst: str, number: int, dport: int = 53) -> tuple[bytes, bytes]:
        """A UDP datagram in two."""
        datagram = struct.pack("!HHHH", 40000, dport, 40, 0) + bytes(32)
        ends = (self[src], self[dst])
        if self.family == 4:
            return (
                p.ipv4(*ends, p.UDP, datagram[:24], more=True, identification=number),
                p.ipv4(*ends, p.UDP, datagram[24:], offset=24, identification=number),
            )
        return (
            p.ipv6(*ends, p.UDP, datagram[:24], extensions=((p.FRAGMENT, struct.pack("!xHI", 1, number)),)),
            p.ipv6(*ends, p.UDP, datagram[24:], extensions=((p.FRAGMENT, struct.pack("!xHI", 24, number)),)),
        )

    def flow(self) -> tuple[FlowKey, FlowEntry]:
        """The only one."""
        ((key, entry),) = self.maps.flows.read().items()
        return key, entry

    def lives(self, seconds: int) -> bool:
        """So long from now the only flow ends; a slow machine has taken some of that time already."""
        left = (self.flow()[1].expires_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) / 1e9
        return seconds - SLOW < left <= seconds

    def age(self, seconds: float) -> None:
        """Brings the end of all flows nearer."""
        fd = check_result(library().bpf_obj_get(os.fsencode(self.pins / "flows")), "opening flows")
        for key, value in list(items(fd, policylayouts.FlowKey, policylayouts.Flow)):
            # The clock began when the machine did, which may be less long ago.
            value.expires = max(0, value.expires - int(seconds * 1e9))
            update(fd, key, value, "ageing a flow")
        os.close(fd)
        # So much later, nothing of before would be remembered.
        self.renew()

    def spend_events(self, sent: int) -> None:
        """On every CPU, in the second that begins now."""
        fd = check_result(library().bpf_obj_get(os.fsencode(self.pins / "event_budget")), "opening a budget")
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        ((_, lost),) = items(
            fd,
            c_uint32,
            policylayouts.EventBudget * library().libbpf_num_possible_cpus(),
        )
        budgets = type(lost)(*(policylayouts.EventBudget(now, sent, each.lost) for each in lost))
        update(fd, c_uint32(0), budgets, "writing a budget")
        os.close(fd)


@pytest.fixture(scope="module")
def loaded(policy_programs: Programs, policy_maps: PolicyMaps, policy_pins: Path) -> Iterator[Node]:
    for block, entry in BLOCKS.items():
        policy_maps.cidrs.update(ip_network(block), entry)
    for each in ADDRESSES["service"]:
        policy_maps.services.update(ip_address(each))
    with policy_maps.open_events() as events:
        node = Node(policy_programs, policy_maps, policy_pins, events)
        for family in (4, 6):
            node.reset(family)
        yield node


@pytest.fixture
def node(loaded: Node, family: int) -> Node:
    loaded.reset(family)
    return loaded


@dataclass(frozen=True)
class Case:
    """A packet between `src` and `dst` with nothing known about it, after `given`."""

    sentence: str
    program: str
    src: str
    dst: str
    expected: Reason
    given: Callable[[Node], None] = lambda node: None


def enforced(node: Node) -> None:
    node.pod(flags=ENFORCED)
    node.pod("our other pod", ENFORCED)


def denying_world(node: Node) -> None:
    node.rule(EGRESS, identity.WORLD, deny=True)


def allowing(
    direction: Direction, peer: int, *args: int, flags: EndpointFlag = ENFORCED
) -> Callable[[Node], None]:
    def given(node: Node) -> None:
        node.pod(flags=flags)
        node.rule(direction, peer, *args)

    return given


def the_sender_may(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, OURS, rules=OTHER_SET)


def denying_port_53(node: Node) -> None:
    node.pod(flags=ENFORCED)
    node.rule(EGRESS, REMOTE)
    node.rule(EGRESS, REMOTE, p.UDP, 53, deny=True)


def denying_anybody(node: Node) -> None:
    node.pod(flags=ENFORCED)
    node.rule(EGRESS, REMOTE, p.UDP, 53)
    node.rule(EGRESS, identity.ANY, deny=True)


def denying_block(number: int) -> Callable[[Node], None]:
    def given(node: Node) -> None:
        node.pod(flags=ENFORCED | CIDRS)
        node.rule(EGRESS)
        node.rule(EGRESS, number | BLOCK, deny=True)

    return given


ALLOWED, NONE, DEFERRED = Reason.POLICY_ALLOWED, Reason.POLICY_NONE, Reason.POLICY_DEFERRED
NO_EGRESS, NO_INGRESS = Reason.DROP_POLICY_EGRESS, Reason.DROP_POLICY_INGRESS

CASES = (
    Case("a pod without policy sends", FROM_POD, "our pod", "remote pod", NONE),
    Case("a pod without policy gets", TO_POD, "remote pod", "our pod", NONE),
    Case("a pod without policy sends out of the node", POLICY_OUT, "our pod", "remote pod", NONE),
    Case("the same without L2 header", POLICY_OUT_L3, "our pod", "remote pod", NONE),
    Case("denied by default on its way out", FROM_POD, "our pod", "remote pod", NO_EGRESS, enforced),
    Case("denied by default on its way in", TO_POD, "remote pod", "our pod", NO_INGRESS, enforced),
    Case("denied where it leaves the node", POLICY_OUT, "our pod", "remote pod", NO_EGRESS, enforced),
    Case("the same through a tunnel", POLICY_OUT_L3, "our pod", "remote pod", NO_EGRESS, enforced),
    Case(
        "only ingress is denied by default, and it sends",
        FROM_POD,
        "our pod",
        "remote pod",
        NONE,
        lambda node: node.pod(flags=EndpointFlag.INGRESS_ENFORCED),
    ),
    Case("an identity is allowed", FROM_POD, "our pod", "remote pod", ALLOWED, allowing(EGRESS, REMOTE)),
    Case(
        "an allowed identity where nothing is denied",
        FROM_POD,
        "our pod",
        "remote pod",
        ALLOWED,
        allowing(EGRESS, REMOTE, flags=OPEN),
    ),
    Case("another identity is", FROM_POD, "our pod", "remote pod", NO_EGRESS, allowing(EGRESS, OTHER)),
    Case("the other direction is", FROM_POD, "our pod", "remote pod", NO_EGRESS, allowing(INGRESS, REMOTE)),
    Case("anybody is allowed", FROM_POD, "our pod", "the world", ALLOWED, allowing(EGRESS, identity.ANY)),
    Case("the world is", FROM_POD, "our pod", "the world", ALLOWED, allowing(EGRESS, identity.WORLD)),
    Case(
        "the world, but this is an unknown pod",
        FROM_POD,
        "our pod",
        "unknown pod",
        NO_EGRESS,
        allowing(EGRESS, identity.WORLD),
    ),
    Case(
        "whoever is unknown is",
        FROM_POD,
        "our pod",
        "unknown pod",
        ALLOWED,
        allowing(EGRESS, identity.UNKNOWN),
    ),
    Case("a port is", FROM_POD, "our pod", "remote pod", ALLOWED, allowing(EGRESS, REMOTE, p.UDP, 53)),
    Case(
        "another port is", FROM_POD, "our pod", "remote pod", NO_EGRESS, allowing(EGRESS, REMOTE, p.UDP, 54)
    ),
    Case(
        "a range of ports is",
        FROM_POD,
        "our pod",
        "remote pod",
        ALLOWED,
        allowing(EGRESS, REMOTE, p.UDP, 48, 12),
    ),
    Case(
        "another range is",
        FROM_POD,
        "our pod",
        "remote pod",
        NO_EGRESS,
        allowing(EGRESS, REMOTE, p.UDP, 56, 13),
    ),
    Case("every port is", FROM_POD, "our pod", "remote pod", ALLOWED, allowing(EGRESS, REMOTE, p.UDP, 0, 0)),
    Case(
        "another protocol is",
        FROM_POD,
        "our pod",
        "remote pod",
        NO_EGRESS,
        allowing(EGRESS, REMOTE, p.TCP, 0, 0),
    ),
    Case(
        "a denied port of an allowed identity", FROM_POD, "our pod", "remote pod", NO_EGRESS, denying_port_53
    ),
    Case(
        "anybody is denied, an identity allowed",
        FROM_POD,
        "our pod",
        "remote pod",
        NO_EGRESS,
        denying_anybody,
    ),
    Case("denied where nothing is by default", FROM_POD, "our pod", "the world", NO_EGRESS, denying_world),
    Case("and somebody else", FROM_POD, "our pod", "remote pod", NONE, denying_world),
    Case(
        "a block of the world is allowed",
        FROM_POD,
        "our pod",
        "the world in a block",
        ALLOWED,
        allowing(EGRESS, identity.CIDR | BLOCK, flags=ENFORCED | CIDRS),
    ),
    Case(
        "an API server in it",
        FROM_POD,
        "our pod",
        "API server in the world",
        ALLOWED,
        allowing(EGRESS, identity.CIDR | BLOCK, flags=ENFORCED | CIDRS),
    ),
    Case(
        "the world outside of it",
        FROM_POD,
        "our pod",
        "the world",
        NO_EGRESS,
        allowing(EGRESS, identity.CIDR | BLOCK, flags=ENFORCED | CIDRS),
    ),
    Case(
        "a pod in a block that is meant without pods",
        FROM_POD,
        "our pod",
        "remote pod",
        NO_EGRESS,
        allowing(EGRESS, identity.CIDR | BLOCK, flags=ENFORCED | CIDRS),
    ),
    Case(
        "a pod in a block that is meant with pods",
        TO_POD,
        "remote pod",
        "our pod",
        ALLOWED,
        allowing(INGRESS, identity.CIDR_INSIDE | BLOCK, flags=ENFORCED | CIDRS),
    ),
    Case(
        "a block where the pod has no rules on any",
        TO_POD,
        "remote pod",
        "our pod",
        NO_INGRESS,
        allowing(INGRESS, identity.CIDR_INSIDE | BLOCK),
    ),
    Case(
        "a denied block",
        FROM_POD,
        "our pod",
        "the world in a block",
        NO_EGRESS,
        denying_block(identity.CIDR),
    ),
    Case(
        "a denied block with pods",
        FROM_POD,
        "our pod",
        "remote pod",
        NO_EGRESS,
        denying_block(identity.CIDR_INSIDE),
    ),
    Case("the pod's own node", TO_POD, "our node", "our pod", ALLOWED, enforced),
    Case("the same as an API server", TO_POD, "our node, an API server", "our pod", ALLOWED, enforced),
    Case(
        "the pod's own node, which is denied",
        TO_POD,
        "our node",
        "our pod",
        ALLOWED,
        lambda node: node.rule(INGRESS, deny=True),
    ),
    Case("another node", TO_POD, "remote node", "our pod", NO_INGRESS, enforced),
    Case("to the pod's own node", FROM_POD, "our pod", "our node", NO_EGRESS, enforced),
    Case("a service address", FROM_POD, "our pod", "service", DEFERRED, enforced),
    Case("a service address that nobody translated", POLICY_OUT, "our pod", "service", NO_EGRESS, enforced),
    Case(
        "another pod's address", FROM_POD, "pod at another device", "remote pod", Reason.DROP_SPOOFED_SOURCE
    ),
    Case("the node's address", FROM_POD, "our node", "remote pod", Reason.DROP_SPOOFED_SOURCE),
    Case("nobody's address", FROM_POD, "the world", "remote pod", Reason.DROP_SPOOFED_SOURCE),
    Case("for another pod", TO_POD, "remote pod", "pod at another device", Reason.DROP_WRONG_POD),
    Case("for no pod", TO_POD, "remote pod", "the world", Reason.DROP_WRONG_POD),
    Case("masqueraded traffic", POLICY_OUT, "our node", "the world", Reason.NOT_OURS, enforced),
    Case("the world's through us", POLICY_OUT, "the world", "remote pod", Reason.NOT_OURS, enforced),
    Case("between our pods by the wire", POLICY_OUT, "our pod", "our other pod", Reason.NOT_OURS, enforced),
    Case(
        "between our pods: the sender's policy is first",
        TO_POD,
        "our other pod",
        "our pod",
        NO_EGRESS,
        enforced,
    ),
    Case(
        "between our pods: the sender may",
        TO_POD,
        "our other pod",
        "our pod",
        NO_INGRESS,
        the_sender_may,
    ),
)


@families
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sentence)
def test_a_first_packet(node: Node, case: Case) -> None:
    case.given(node)
    packet = node.udp(case.src, case.dst)
    data = packet if case.program == POLICY_OUT_L3 else p.frame(packet)
    direction = INGRESS if case.program == TO_POD else EGRESS
    if case.expected is NO_EGRESS:
        direction = EGRESS
    assert node.counted(case.program, data) == [(case.expected, direction)]
    events = node.events.read()
    if not case.expected.dropped:
        assert not events
        return
    (event,) = events
    ifindex = HERE
    assert (event.src, event.dst) == (node[case.src], node[case.dst])
    assert (event.sport, event.dport, event.protocol) == (40000, 53, p.UDP) or case.expected in (
        Reason.DROP_SPOOFED_SOURCE,
        Reason.DROP_WRONG_POD,
    )
    assert (event.reason, event.direction, event.ifindex) == (case.expected, direction, ifindex)
    assert event.length == len(packet)


@pytest.mark.parametrize("family", [4])
@pytest.mark.parametrize("program", [FROM_POD, TO_POD, POLICY_OUT])
def test_what_is_not_ip_passes(node: Node, program: str) -> None:
    enforced(node)
    assert node.deliver(program, p.ethernet(bytes(28), p.ETH_P_ARP)) is Reason.NOT_OURS
    assert (
        node.deliver(program, p.ethernet(bytes(28), p.ETH_P_ARP, tags=(p.ETH_P_8021Q,))) is Reason.NOT_OURS
    )


def malformed(node: Node) -> dict[str, bytes]:
    ends = (node["our pod"], node["remote pod"])
    tcp = p.tcp_segment(*ends, flags=p.SYN)
    found = {
        "TCP flags are cut off": p.ip(*ends, p.TCP, tcp[:13]),
        "UDP ports are cut off": p.ip(*ends, p.UDP, bytes(3)),
        "ICMP is cut off": p.ip(*ends, node.icmp, bytes(4)),
    }
    if node.family == 6:
        headers = ((p.DESTINATION_OPTIONS, bytes(7)),)
        found["too many extension headers"] = p.ipv6(*ends, p.UDP, bytes(8), extensions=headers * 9)
        found["a chain that is cut off"] = p.ipv6(*ends, p.ROUTING, b"\x11")
    return found


@families
def test_what_can_not_be_read_is_dropped(node: Node) -> None:
    for program in (FROM_POD, POLICY_OUT):
        for name, packet in malformed(node).items():
            assert node.send(program, packet) is Reason.DROP_MALFORMED, name
    truncated = p.ethernet(b"\x45" + bytes(40), p.ETH_P_IPV6 if node.family == 6 else p.ETH_P_IP)
    if node.family == 6:
        assert node.deliver(FROM_POD, truncated) is Reason.DROP_MALFORMED
        assert node.deliver(TO_POD, truncated) is Reason.DROP_MALFORMED
        assert node.deliver(POLICY_OUT, truncated) is Reason.NOT_OURS
        assert {event.src for event in node.events.read()[-2:]} == {None}


@families
def test_extension_headers_and_vlan_tags_are_no_disguise(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.TCP, 80)
    packet = node.udp("our pod", "remote pod")
    assert node.deliver(FROM_POD, p.frame(packet, tags=(p.ETH_P_8021Q,))) is NO_EGRESS
    if node.family == 6:
        chain = ((p.HOP_BY_HOP, bytes(7)), (p.DESTINATION_OPTIONS, bytes(7)))
        tcp = p.tcp_segment(node["our pod"], node["remote pod"], flags=p.SYN)
        hidden = p.ipv6(node["our pod"], node["remote pod"], p.TCP, tcp, extensions=chain)
        assert node.send(FROM_POD, hidden) is ALLOWED
        hidden = p.ipv6(node["our pod"], node["remote pod"], p.UDP, tcp, extensions=chain)
        assert node.send(FROM_POD, hidden) is NO_EGRESS


LINK_LOCAL, ROUTERS, NEIGHBOUR = "fe80::9", "ff02::2", "ff02::1:ff00:a"


def control(src: str, dst: str, kind: int, *, hops: int = 255) -> bytes:
    ends = (ip_address(src), ip_address(dst))
    return p.ipv6(*ends, p.ICMPV6, p.icmp_message(*ends, kind, 0, bytes(20)), hop_limit=hops)


@pytest.mark.parametrize("family", [6])
@pytest.mark.parametrize(
    ("sentence", "packet", "expected"),
    [
        ("a router solicitation", (LINK_LOCAL, ROUTERS, 133, 255), Reason.NOT_OURS),
        ("a neighbour solicitation", (LINK_LOCAL, NEIGHBOUR, 135, 255), Reason.NOT_OURS),
        ("the same from the pod's address", ("fd00:1:0:1::9", NEIGHBOUR, 135, 255), Reason.NOT_OURS),
        ("an advertisement to its node", ("fd00:1:0:1::9", "fd00:9::1", 136, 255), Reason.NOT_OURS),
        ("duplicate address detection", ("::", NEIGHBOUR, 135, 255), Reason.NOT_OURS),
        ("a listener report", ("::", "ff02::16", 143, 1), Reason.NOT_OURS),
        ("a forwarded solicitation", ("fd00:1:0:1::9", "fd00:9::1", 135, 254), NO_EGRESS),
        ("an advertisement to the world", ("fd00:1:0:1::9", "2001:db8::9", 136, 255), NO_EGRESS),
        ("a router advertisement", ("fd00:1:0:1::9", "ff02::1", 134, 255), NO_EGRESS),
        ("the same link-local", (LINK_LOCAL, "ff02::1", 134, 255), Reason.DROP_SPOOFED_SOURCE),
        ("a redirect", (LINK_LOCAL, "fd00:9::1", 137, 255), Reason.DROP_SPOOFED_SOURCE),
        ("another pod's solicitation", ("fd00:1:0:1::b", NEIGHBOUR, 135, 255), Reason.DROP_SPOOFED_SOURCE),
        ("an echo request", (LINK_LOCAL, "fe80::1", 128, 255), Reason.DROP_SPOOFED_SOURCE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_link_control_of_a_pod(
    node: Node, sentence: str, packet: tuple[str, str, int, int], expected: Reason
) -> None:
    enforced(node)
    src, dst, kind, hops = packet
    assert node.send(FROM_POD, control(src, dst, kind, hops=hops)) is expected


@pytest.mark.parametrize("family", [6])
def test_link_control_to_a_pod(node: Node) -> None:
    enforced(node)
    for kind in (133, 134, 135, 136, 137):
        assert node.send(TO_POD, control("fe80::1", NEIGHBOUR, kind)) is Reason.NOT_OURS
        assert node.send(TO_POD, control("fe80::1", NEIGHBOUR, kind, hops=64)) is Reason.DROP_WRONG_POD
    assert node.send(TO_POD, control("fe80::1", "ff02::1", 130, hops=1)) is Reason.NOT_OURS
    assert node.send(TO_POD, control("fe80::1", "ff02::1", 128)) is Reason.DROP_WRONG_POD


@pytest.mark.parametrize("family", [4])
def test_igmp_stays_on_the_link(node: Node) -> None:
    enforced(node)
    group = ip_address("224.0.0.22")
    assert isinstance(group, IPv4Address)
    report = p.ipv4(node["our pod"], group, p.IGMP, bytes(8), ttl=1)
    assert node.send(FROM_POD, report) is Reason.NOT_OURS
    assert node.send(FROM_POD, p.ipv4(node["our pod"], group, p.IGMP, bytes(8), ttl=2)) is NO_EGRESS
    query = p.ipv4(node["our node"], ip_address("224.0.0.1"), p.IGMP, bytes(8), ttl=1)
    assert node.send(TO_POD, query) is Reason.NOT_OURS


@families
def test_replies_of_what_the_pod_began_pass(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.UDP, 53)
    answer = p.udp(node["remote pod"], node["our pod"], b"", sport=53, dport=40000)
    assert node.send(TO_POD, answer) is NO_INGRESS
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    assert node.send(TO_POD, answer) is Reason.POLICY_REPLY
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    for other in ({"sport": 54, "dport": 40000}, {"sport": 53, "dport": 40001}):
        assert node.send(TO_POD, p.udp(node["remote pod"], node["our pod"], b"", **other)) is NO_INGRESS
    key, entry = node.flow()
    assert key == FlowKey(node["our pod"], node["remote pod"], p.UDP, 40000, 53, EGRESS)
    assert (entry.revision, entry.peer, entry.flags, entry.reason) == (1, REMOTE, FlowFlag.REPLIED, ALLOWED)


@families
def test_replies_of_what_others_began_pass(node: Node) -> None:
    enforced(node)
    node.rule(INGRESS, REMOTE, p.UDP, 53)
    answer = node.udp("our pod", "remote pod", 40000, 53)
    assert node.send(FROM_POD, answer) is NO_EGRESS
    assert node.send(TO_POD, node.udp("remote pod", "our pod")) is ALLOWED
    assert node.send(FROM_POD, answer) is Reason.POLICY_REPLY
    assert node.send(POLICY_OUT, answer) is Reason.POLICY_REPLY
    assert node.send(POLICY_OUT_L3, answer) is Reason.POLICY_REPLY


@families
def test_the_nodes_probes_are_answered(node: Node) -> None:
    enforced(node)
    assert node.send(FROM_POD, node.tcp("our pod", "our node", p.SYN | p.ACK, 40000, 80)) is NO_EGRESS
    assert node.send(TO_POD, node.tcp("our node", "our pod", p.SYN)) is ALLOWED
    answer = node.tcp("our pod", "our node", p.SYN | p.ACK, 40000, 80)
    assert node.send(FROM_POD, answer) is Reason.POLICY_REPLY


@families
def test_between_two_pods_of_ours_both_policies_count(node: Node) -> None:
    enforced(node)
    there, back = node.udp("our pod", "our other pod"), node.udp("our other pod", "our pod", 40000, 53)
    node.rule(EGRESS, OTHER, p.UDP, 53)
    assert node.send(FROM_POD, there) is ALLOWED
    assert node.send(TO_POD, there) is NO_INGRESS
    node.rule(INGRESS, OURS, p.UDP, 53, rules=OTHER_SET)
    assert node.send(TO_POD, there) is ALLOWED
    assert node.send(FROM_POD, back) is Reason.POLICY_REPLY
    assert node.send(TO_POD, back) is Reason.POLICY_REPLY


@families
def test_behind_a_service_the_real_destination_is_judged(node: Node) -> None:
    """kube-proxy is played by hand."""
    enforced(node)
    asked, answered = node.udp("our pod", "service"), node.udp("service", "our pod", 40000, 53)
    assert node.send(TO_POD, answered) is NO_INGRESS
    assert node.send(FROM_POD, asked) is DEFERRED
    assert node.send(FROM_POD, asked) is DEFERRED
    assert node.send(POLICY_OUT, node.udp("our pod", "remote pod")) is NO_EGRESS
    assert node.send(TO_POD, node.udp("our pod", "our other pod")) is NO_EGRESS
    node.rule(EGRESS, REMOTE, p.UDP, 53)
    assert node.send(POLICY_OUT, node.udp("our pod", "remote pod")) is ALLOWED
    assert node.send(TO_POD, answered) is Reason.POLICY_REPLY
    # Without kube-proxy, an address of a service is one like any other.
    assert node.send(POLICY_OUT, asked) is NO_EGRESS
    assert node.send(FROM_POD, asked) is DEFERRED


@families
def test_a_service_that_is_gone_is_judged_as_what_is_left(node: Node) -> None:
    enforced(node)
    asked = node.udp("our pod", "service")
    assert node.send(FROM_POD, asked) is DEFERRED
    node.maps.services.delete(node["service"])
    try:
        node.pod(flags=ENFORCED, revision=2)
        assert node.send(FROM_POD, asked) is NO_EGRESS
    finally:
        node.maps.services.update(node["service"])


@families
def test_a_new_revision_judges_known_flows_anew(node: Node) -> None:
    enforced(node)
    node.rule(INGRESS, REMOTE, p.TCP, 80, number=11)
    there, back = (
        node.tcp("remote pod", "our pod", p.ACK),
        node.tcp("our pod", "remote pod", p.ACK, 40000, 80),
    )
    assert node.send(TO_POD, there) is ALLOWED
    assert node.send(FROM_POD, back) is Reason.POLICY_REPLY
    # The rules say something else: no flow is judged by them before the revision says so.
    node.rule(INGRESS, REMOTE, p.TCP, 80, deny=True, number=12)
    assert node.send(TO_POD, there) is ALLOWED
    node.pod(flags=ENFORCED, revision=2)
    assert node.send(FROM_POD, back) is NO_INGRESS
    (event,) = node.events.read()
    assert (event.src, event.dst, event.dport) == (node["remote pod"], node["our pod"], 80)
    assert (event.rule, event.direction, event.src_identity, event.dst_identity) == (
        12,
        INGRESS,
        REMOTE,
        OURS,
    )
    assert node.send(TO_POD, there) is NO_INGRESS
    # A denied flow does not come back by what the other side still sends.
    node.pod(flags=EndpointFlag.INGRESS_ENFORCED, revision=2)
    assert node.send(FROM_POD, back) is NO_INGRESS
    assert node.send(TO_POD, there) is NO_INGRESS
    node.rule(INGRESS, REMOTE, p.TCP, 80)
    node.pod(flags=ENFORCED, revision=3)
    assert node.send(FROM_POD, back) is Reason.POLICY_REPLY
    assert node.send(TO_POD, there) is ALLOWED


@families
def test_what_is_remembered_lasts_a_second_at_most(node: Node) -> None:
    """A flow that nobody has said anything about since is looked at again."""
    node.pod(flags=ENFORCED)
    node.rule(EGRESS, REMOTE)
    packet = node.udp("our pod", "remote pod")
    assert [node.send(FROM_POD, packet) for _ in range(3)] == [ALLOWED] * 3
    entry = EndpointEntry(HERE, OURS, OTHER_SET, 0, 2, 1, ENFORCED)
    node.maps.endpoints.update(node["our pod"], entry)
    time.sleep(1.1)
    assert node.send(FROM_POD, packet) is NO_EGRESS


@families
def test_a_flow_of_an_earlier_pod_is_unknown(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE)
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    node.pod(flags=ENFORCED, revision=2, born=2)
    assert node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53)) is NO_INGRESS
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    assert node.flow()[1].revision == 2


@families
def test_a_peer_of_another_identity_is_judged_anew(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE)
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    node.identify("remote pod", REMOTE + 1)
    assert node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53)) is NO_EGRESS
    node.identify("remote pod", REMOTE)
    assert node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53)) is Reason.POLICY_REPLY


@families
def test_flows_are_kept_without_any_policy(node: Node) -> None:
    """So that a policy that comes later cuts no connection that it allows."""
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.SYN)) is NONE
    node.pod(flags=EndpointFlag.INGRESS_ENFORCED, revision=2)
    assert node.send(TO_POD, node.tcp("remote pod", "our pod", p.ACK, 40000, 80)) is Reason.POLICY_REPLY


@families
def test_an_expired_flow_is_unknown(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE)
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is ALLOWED
    node.age(58)
    assert node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53)) is Reason.POLICY_REPLY
    node.age(181)
    assert node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53)) is NO_INGRESS


@families
def test_how_long_flows_live(node: Node) -> None:
    there = node.udp("our pod", "remote pod")
    node.send(FROM_POD, there)
    assert node.lives(60)
    node.age(0.5)
    before = node.flow()[1].expires_ns
    node.send(FROM_POD, there)
    assert node.flow()[1].expires_ns == before, "half a second is not worth a write"
    node.age(10)
    node.send(FROM_POD, there)
    assert node.lives(60)
    node.send(TO_POD, node.udp("remote pod", "our pod", 40000, 53))
    assert node.lives(180)

    node.reset(node.family)
    node.send(FROM_POD, p.ip(node["our pod"], node["remote pod"], 47, bytes(8)))
    assert node.lives(30)


@families
@pytest.mark.parametrize("end", ["FIN of both", "RST of the peer", "RST of the pod"])
def test_how_long_connections_live(node: Node, end: str) -> None:
    node.send(FROM_POD, node.tcp("our pod", "remote pod", p.SYN))
    assert node.lives(60)
    node.send(TO_POD, node.tcp("remote pod", "our pod", p.SYN | p.ACK, 40000, 80))
    assert node.lives(86400)
    if end == "FIN of both":
        node.send(FROM_POD, node.tcp("our pod", "remote pod", p.FIN | p.ACK))
        assert node.lives(86400)
        node.send(TO_POD, node.tcp("remote pod", "our pod", p.FIN | p.ACK, 40000, 80))
    elif end == "RST of the peer":
        node.send(TO_POD, node.tcp("remote pod", "our pod", p.RST, 40000, 80))
    else:
        node.send(FROM_POD, node.tcp("our pod", "remote pod", p.RST))
    assert node.lives(10)
    node.send(TO_POD, node.tcp("remote pod", "our pod", p.ACK, 40000, 80))
    assert node.lives(10)
    # The same ports once more.
    node.send(FROM_POD, node.tcp("our pod", "remote pod", p.SYN))
    assert node.lives(60)
    assert node.flow()[1].flags == FlowFlag(0)


@families
def test_both_pods_of_a_node_know_how_their_connection_ends(node: Node) -> None:
    """Also where the connection's own packets are remembered, and cost one lookup."""
    there = [node.tcp("our other pod", "our pod", flags) for flags in (p.SYN, p.ACK, p.FIN | p.ACK)]
    answers = (p.SYN | p.ACK, p.FIN | p.ACK)
    back = [node.tcp("our pod", "our other pod", flags, 40000, 80) for flags in answers]

    def flags() -> dict[Direction, FlowFlag]:
        found = {key.direction: entry.flags for key, entry in node.maps.flows.read().items()}
        return {direction: found[direction] & ~(FlowFlag.DIRECT | FlowFlag.STACK) for direction in found}

    def get(*packets: bytes) -> None:
        for packet in packets:
            assert not any(reason.dropped for reason, _ in node.counted(TO_POD, p.frame(packet)))

    # At one device, so that nothing changes meanwhile.
    node.pod("our pod")
    node.pod("our other pod")
    get(there[0], there[1])
    assert flags() == {EGRESS: FlowFlag(0), INGRESS: FlowFlag(0)}
    get(back[0], there[2])
    assert flags() == dict.fromkeys((EGRESS, INGRESS), FlowFlag.REPLIED | FlowFlag.FIN)
    get(back[1])
    ended = FlowFlag.REPLIED | FlowFlag.FIN | FlowFlag.FIN_REPLY | FlowFlag.CLOSING
    assert flags() == dict.fromkeys((EGRESS, INGRESS), ended)


@families
def test_the_end_of_a_connection_is_judged_where_nothing_is_remembered(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.TCP, 80)
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.SYN)) is ALLOWED
    node.pod(flags=ENFORCED, revision=2, born=2)
    node.rule(EGRESS, REMOTE, p.TCP, 80, deny=True)
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.RST)) is NO_EGRESS
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.FIN | p.ACK)) is NO_EGRESS


@families
def test_a_syn_is_no_reply(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.TCP, 80)
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.SYN)) is ALLOWED
    assert node.send(TO_POD, node.tcp("remote pod", "our pod", p.SYN, 40000, 80)) is NO_INGRESS
    assert (
        node.send(TO_POD, node.tcp("remote pod", "our pod", p.SYN | p.ACK, 40000, 80)) is Reason.POLICY_REPLY
    )


@families
def test_a_connection_is_taken_up_in_the_middle(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.TCP, 80)
    assert node.send(FROM_POD, node.tcp("our pod", "remote pod", p.ACK)) is ALLOWED
    assert node.send(TO_POD, node.tcp("remote pod", "our pod", p.ACK, 40000, 80)) is Reason.POLICY_REPLY


@families
def test_echo(node: Node) -> None:
    enforced(node)
    request = 8 << 8 if node.family == 4 else 128 << 8
    node.rule(EGRESS, REMOTE, node.icmp, request)
    assert node.send(TO_POD, node.echo("remote pod", "our pod", reply=True)) is NO_INGRESS
    assert node.send(FROM_POD, node.echo("our pod", "remote pod")) is ALLOWED
    assert node.send(TO_POD, node.echo("remote pod", "our pod", reply=True)) is Reason.POLICY_REPLY
    other = node.echo("remote pod", "our pod", reply=True, identifier=78)
    assert node.send(TO_POD, other) is NO_INGRESS
    assert node.send(TO_POD, node.echo("remote pod", "our pod")) is NO_INGRESS, "a request is no reply"
    assert node.send(FROM_POD, node.echo("our pod", "remote pod", reply=True)) is NO_EGRESS
    key, _ = node.flow()
    assert (key.sport, key.dport) == (77, request)


@families
def test_types_of_icmp_are_apart(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, node.icmp, 13 << 8, 8)
    ends = (node["our pod"], node["remote pod"])
    assert node.send(FROM_POD, p.icmp(*ends, 13)) is ALLOWED
    assert node.send(FROM_POD, p.icmp(*ends, 13, code=2)) is ALLOWED
    assert node.send(FROM_POD, p.icmp(*ends, 5)) is NO_EGRESS
    assert node.send(TO_POD, p.icmp(ends[1], ends[0], 13)) is NO_INGRESS


@families
def test_icmp_errors_about_known_flows_pass(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.UDP, 53)
    node.rule(INGRESS, REMOTE, p.TCP, 80)
    sent, got = node.udp("our pod", "remote pod"), node.tcp("remote pod", "our pod", p.SYN)
    answer = node.tcp("our pod", "remote pod", p.SYN | p.ACK, 40000, 80)
    about_sent = node.error("the world", "our pod", sent)
    about_answer = node.error("the world", "our pod", answer[:-12])
    about_got = node.error("our pod", "remote pod", got)
    for program, error, expected in (
        (TO_POD, about_sent, NO_INGRESS),
        (TO_POD, about_answer, NO_INGRESS),
        (FROM_POD, about_got, NO_EGRESS),
    ):
        assert node.send(program, error) is expected
    assert node.send(FROM_POD, sent) is ALLOWED
    assert node.send(TO_POD, got) is ALLOWED
    for program, error in (
        (TO_POD, about_sent),
        (TO_POD, about_answer),
        (FROM_POD, about_got),
        (POLICY_OUT, about_got),
        (TO_POD, node.error("the world", "our pod", sent, (11, 3))),
        (TO_POD, node.error("the world", "our pod", sent, (12, 4))),
        (TO_POD, node.error("the world", "our pod", sent, (4, 2))),
    ):
        assert node.send(program, error) is Reason.POLICY_REPLY
    # Somebody else's flow, one with other ports, a redirect, and a quote too short to tell.
    assert node.send(TO_POD, node.error("the world", "our other pod", sent)) is NO_INGRESS
    other = node.error("the world", "our pod", node.udp("our pod", "remote pod", 54))
    assert node.send(TO_POD, other) is NO_INGRESS
    assert node.send(TO_POD, node.error("the world", "our pod", sent, (5, 137))) is NO_INGRESS
    assert node.send(TO_POD, node.error("the world", "our pod", sent[:22])) is NO_INGRESS
    assert node.send(FROM_POD, node.error("our pod", "remote pod", sent)) is NO_EGRESS
    node.age(86400)
    assert node.send(TO_POD, about_sent) is NO_INGRESS


@families
def test_fragments_follow_their_first(node: Node) -> None:
    enforced(node)
    node.rule(EGRESS, REMOTE, p.UDP, 53)
    first, later = node.fragments("our pod", "remote pod", 100)
    assert node.send(FROM_POD, later) is Reason.DROP_FRAGMENT_UNKNOWN
    assert node.send(FROM_POD, first) is ALLOWED
    assert node.send(FROM_POD, later) is ALLOWED
    assert node.send(POLICY_OUT, first) is ALLOWED
    assert node.send(POLICY_OUT, later) is ALLOWED
    _, others = node.fragments("our pod", "remote pod", 101)
    assert node.send(FROM_POD, others) is Reason.DROP_FRAGMENT_UNKNOWN
    first, later = node.fragments("our pod", "remote pod", 102, 54)
    assert node.send(FROM_POD, first) is NO_EGRESS
    assert node.send(FROM_POD, later) is Reason.DROP_FRAGMENT_UNKNOWN
    # Its first was let through by the sender's policy only.
    node.rule(EGRESS, OTHER, p.UDP, 53)
    first, later = node.fragments("our pod", "our other pod", 103)
    assert node.send(FROM_POD, first) is ALLOWED
    assert node.send(TO_POD, first) is NO_INGRESS
    assert node.send(TO_POD, later) is NO_INGRESS


@families
def test_what_audit_would_deny_passes_and_is_told(node: Node) -> None:
    node.pod(flags=AUDITED, audit=True)
    node.rule(EGRESS, REMOTE, p.UDP, 53, rules=AUDIT_SET, number=21)
    node.rule(EGRESS, identity.WORLD, deny=True, rules=AUDIT_SET, number=22)
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is NONE
    assert not node.events.read()
    for dst, rule in (("the world", 22), ("unknown pod", 0)):
        assert node.send(FROM_POD, node.udp("our pod", dst)) is Reason.POLICY_WOULD_DENY
        (event,) = node.events.read()
        assert (event.reason, event.rule, event.dst) == (Reason.POLICY_WOULD_DENY, rule, node[dst])
        assert node.send(FROM_POD, node.udp("our pod", dst)) is NONE, "flows are told of once"
        assert node.send(TO_POD, node.udp(dst, "our pod", 40000, 53)) is Reason.POLICY_REPLY
    assert node.send(TO_POD, node.udp("our node", "our pod")) is ALLOWED
    node.pod(flags=ENFORCED | AUDITED, audit=True)
    assert node.send(FROM_POD, node.udp("our pod", "the world", 54)) is NO_EGRESS


@families
def test_a_pod_that_nothing_guards_yet_is_out_of_reach(node: Node) -> None:
    node.rule(EGRESS)
    node.rule(INGRESS)
    new, unknown = "new pod of ours", Reason.DROP_UNKNOWN_POD
    assert node.send(FROM_POD, node.udp("our pod", new)) is unknown
    assert node.send(TO_POD, node.udp(new, "our pod")) is unknown
    for program in (POLICY_OUT, POLICY_OUT_L3):
        assert node.send(program, node.udp(new, "remote pod")) is unknown
    for program in (POLICY_IN, POLICY_IN_L3):
        assert node.send(program, node.udp("remote pod", new)) is unknown
    (*_, event) = node.events.read()
    assert (event.reason, event.src, event.dst, event.direction) == (
        unknown,
        node["remote pod"],
        node[new],
        INGRESS,
    )
    assert not node.maps.flows.read()
    # Somebody's word that it has an identity does not make it guarded.
    node.maps.identities.update(node[new], OTHER)
    assert node.send(POLICY_IN, node.udp("remote pod", new)) is unknown
    node.maps.identities.delete(node[new])
    node.maps.endpoints.update(node[new], EndpointEntry(HERE, OTHER, OTHER_SET, 0, 1, 1, OPEN))
    assert node.send(POLICY_IN, node.udp("remote pod", new)) is Reason.NOT_OURS
    assert node.send(POLICY_OUT, node.udp(new, "remote pod")) is NONE
    node.maps.endpoints.delete(node[new])


@families
@pytest.mark.parametrize("dst", ["our pod", "our node", "bridge of our pods", "remote pod", "the world"])
def test_what_arrives_for_anybody_else_is_let_in(node: Node, dst: str) -> None:
    node.pod(flags=ENFORCED)
    assert node.send(POLICY_IN, node.udp("remote pod", dst)) is Reason.NOT_OURS
    assert node.send(POLICY_OUT, node.udp("bridge of our pods", dst)) is Reason.NOT_OURS


@families
def test_both_ends_are_audited(node: Node) -> None:
    node.pod(flags=AUDITED, audit=True)
    node.pod("our other pod", AUDITED, audit=True)
    data = p.frame(node.udp("our pod", "our other pod"))
    assert node.counted(TO_POD, data) == [
        (Reason.POLICY_WOULD_DENY, EGRESS),
        (Reason.POLICY_WOULD_DENY, INGRESS),
    ]
    assert [event.direction for event in node.events.read()] == [EGRESS, INGRESS]
    node.pod("our other pod")
    assert set(node.counted(TO_POD, p.frame(node.udp("our pod", "our other pod", 54)))) == {
        (Reason.POLICY_WOULD_DENY, EGRESS),
        (NONE, INGRESS),
    }


@families
def test_events_say_who_did_what(node: Node) -> None:
    node.rule(EGRESS, REMOTE, p.TCP, 80, deny=True, number=31)
    packet = node.tcp("our pod", "remote pod", p.SYN)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert node.send(FROM_POD, packet) is NO_EGRESS
    (event,) = node.events.read(timeout_s=1)
    assert before <= event.time_ns <= time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert event == Event(
        event.time_ns,
        node["our pod"],
        node["remote pod"],
        OURS,
        REMOTE,
        31,
        HERE,
        len(packet),
        40000,
        80,
        p.TCP,
        EGRESS,
        NO_EGRESS,
    )


@pytest.mark.parametrize("family", [4])
def test_events_have_a_budget(node: Node) -> None:
    enforced(node)
    lost = node.maps.lost_events()
    node.spend_events(EVENTS_PER_SECOND - 1)
    for _ in range(5):
        assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is NO_EGRESS
    assert len(node.events.read()) == 1
    assert node.maps.lost_events() == lost + 4
    time.sleep(1)
    assert node.send(FROM_POD, node.udp("our pod", "remote pod")) is NO_EGRESS
    assert len(node.events.read()) == 1


@dataclass(frozen=True)
class Step:
    """One packet of the random test. `reply`: back from `dst`, with the ports the other way round."""

    program: str
    peer: str
    protocol: int
    dport: int
    reply: bool
    flags: int
    revise: bool


PEERS = tuple(
    each for each in ADDRESSES if each not in ("our pod", "our other pod", "pod at another device")
)
NUMBERS = (
    REMOTE,
    identity.ANY,
    identity.WORLD,
    identity.UNKNOWN,
    identity.HOST,
    identity.APISERVER,
    identity.REMOTE_NODE,
    identity.CIDR | BLOCK,
    identity.CIDR_INSIDE | BLOCK,
)
PORTS = (52, 53, 54, 80, 32768)

some_key = st.builds(
    PolicyKey,
    st.sampled_from([SET, SET, AUDIT_SET]),
    st.sampled_from(NUMBERS),
    st.sampled_from(Direction),
    st.sampled_from([None, p.TCP, p.UDP, p.SCTP]),
    st.sampled_from(PORTS),
    st.sampled_from([0, 1, 8, 14, 15, 16]),
).map(
    lambda key: (
        replace(key, port=0, port_bits=0)
        if key.protocol is None
        else replace(key, port=key.port >> 16 - key.port_bits << 16 - key.port_bits)
    )
)
some_entries = st.dictionaries(
    some_key, st.builds(PolicyEntry, st.integers(1, 99), st.booleans()), max_size=10
)
some_step = st.builds(
    Step,
    st.sampled_from([FROM_POD, TO_POD, POLICY_OUT, POLICY_OUT_L3]),
    st.sampled_from(PEERS),
    st.sampled_from([p.TCP, p.UDP, p.SCTP, 47]),
    st.sampled_from(PORTS[1:4]),
    st.booleans(),
    st.sampled_from([p.SYN, p.SYN | p.ACK, p.ACK]),
    st.sampled_from([False, False, False, True]),
)


class Evaluator:
    """The rules of policy.h for one pod, without the clock."""

    def __init__(self, node: Node, flags: EndpointFlag, audit: bool) -> None:
        self.node = node
        self.flags = flags
        self.audit = audit
        self.entries: Entries = {}
        self.revision = 1
        self.flows: dict[object, tuple[int, Reason]] = {}

    def who(self, name: str) -> int:
        if name in IDENTITIES:
            return IDENTITIES[name]
        return identity.UNKNOWN if name in ("unknown pod", "new pod of ours", "service") else identity.WORLD

    def block(self, name: str, direction: Direction) -> int | None:
        wanted = EndpointFlag.INGRESS_CIDRS if direction is INGRESS else EndpointFlag.EGRESS_CIDRS
        within = [net for net in BLOCKS if self.node[name] in ip_network(net)]
        if wanted not in self.flags or not within:
            return None
        number = BLOCKS[max(within, key=lambda net: ip_network(net).prefixlen)].number
        if not number:
            return None
        inside = self.who(name) not in (identity.WORLD, identity.APISERVER)
        return (identity.CIDR_INSIDE if inside else identity.CIDR) | number

    def ruling(self, rules: int, direction: Direction, peer: str, protocol: int, port: int) -> bool | None:
        """Whether the rules deny; None where they say nothing."""
        found = []
        for number in (self.who(peer), identity.ANY, self.block(peer, direction)):
            matching = [
                key
                for key in self.entries
                if (key.set, key.identity, key.direction) == (rules, number, direction)
                and (key.protocol is None or key.protocol == protocol)
                and key.port >> 16 - key.port_bits == port >> 16 - key.port_bits
            ]
            if matching:
                best = max(matching, key=lambda key: (key.protocol is not None, key.port_bits))
                found.append(self.entries[best].deny)
        return any(found) if found else None

    def judge(
        self, direction: Direction, peer: str, protocol: int, port: int, translated: bool
    ) -> tuple[Reason, bool]:
        """The judgement, and whether audit would deny."""
        if direction is INGRESS and self.who(peer) in (identity.HOST, identity.APISERVER_HOST):
            return ALLOWED, False
        if direction is EGRESS and peer == "service" and not translated:
            return DEFERRED, False
        if peer == "new pod of ours":
            return Reason.DROP_UNKNOWN_POD, False
        enforced, audited = (
            (EndpointFlag.INGRESS_ENFORCED, EndpointFlag.INGRESS_AUDITED)
            if direction is INGRESS
            else (EndpointFlag.EGRESS_ENFORCED, EndpointFlag.EGRESS_AUDITED)
        )
        denies = self.ruling(SET, direction, peer, protocol, port)
        if denies or (denies is None and enforced in self.flags):
            return (NO_INGRESS if direction is INGRESS else NO_EGRESS), False
        would = self.ruling(AUDIT_SET, direction, peer, protocol, port)
        deny = would or (would is None and audited in self.flags)
        return (NONE if denies is None else ALLOWED), self.audit and bool(deny)

    def follow(self, key: tuple[Direction, str, int, int, int], translated: bool) -> Reason | None:
        if key not in self.flows:
            return None
        direction, peer, protocol, _, dport = key
        revision, reason = self.flows[key]
        would = False
        if revision != self.revision or reason.dropped or (reason is DEFERRED and translated):
            reason, would = self.judge(direction, peer, protocol, dport, translated)
            self.flows[key] = (self.revision, reason)
        return Reason.POLICY_WOULD_DENY if would else reason

    def expect(self, step: Step) -> Reason:
        if step.program in (POLICY_OUT, POLICY_OUT_L3):
            translated = True
        else:
            translated = False
        direction = INGRESS if step.program == TO_POD else EGRESS
        opposite = EGRESS if direction is INGRESS else INGRESS
        sport, dport = (step.dport, 40000) if step.reply else (40000, step.dport)
        if step.protocol == 47:
            sport = dport = 0
        if not (step.protocol == p.TCP and step.flags == p.SYN):
            reason = self.follow((opposite, step.peer, step.protocol, dport, sport), translated)
            if reason is not None:
                return (
                    reason if reason.dropped or reason is Reason.POLICY_WOULD_DENY else Reason.POLICY_REPLY
                )
        key = (direction, step.peer, step.protocol, sport, dport)
        known = self.follow(key, translated)
        if known is not None:
            return known
        reason, would = self.judge(direction, step.peer, step.protocol, dport, translated)
        if not reason.dropped:
            self.flows[key] = (self.revision, reason)
        return Reason.POLICY_WOULD_DENY if would else reason


def packet_of(node: Node, step: Step) -> bytes:
    sport, dport = (step.dport, 40000) if step.reply else (40000, step.dport)
    src, dst = node["our pod"], node[step.peer]
    if step.program == TO_POD:
        src, dst = dst, src
    if step.protocol == p.TCP:
        return p.tcp(src, dst, flags=step.flags, sport=sport, dport=dport)
    if step.protocol == p.UDP:
        return p.udp(src, dst, b"", sport=sport, dport=dport)
    return p.ip(src, dst, step.protocol, struct.pack("!HH", sport, dport) + bytes(8))


@settings(
    max_examples=1000 // int(os.environ.get("MESHWIRE_SAMPLE", "1")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    entries=some_entries,
    later=some_entries,
    flags=st.integers(0, 63).map(EndpointFlag),
    audit=st.booleans(),
    family=st.sampled_from([4, 6]),
    steps=st.lists(some_step, min_size=1, max_size=12),
)
def test_any_policy_gets_the_evaluators_verdict(
    loaded: Node,
    entries: Entries,
    later: Entries,
    flags: EndpointFlag,
    audit: bool,
    family: int,
    steps: list[Step],
) -> None:
    loaded.reset(family)
    evaluator = Evaluator(loaded, flags, audit)
    loaded.maps.policies.update_many(entries)
    loaded.pod(flags=flags, audit=audit)
    evaluator.entries = entries
    assert loaded.maps.policies.read() == entries
    for step in steps:
        if step.revise:
            loaded.maps.policies.delete_many(loaded.maps.policies.read())
            loaded.maps.policies.update_many(later)
            evaluator.entries = later
            evaluator.revision += 1
            loaded.pod(flags=flags, audit=audit, revision=evaluator.revision)
        assert loaded.send(step.program, packet_of(loaded, step)) is evaluator.expect(step), step
