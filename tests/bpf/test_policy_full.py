"""Maps that are full, with the real ones and the real programs: who doesn't fit is closed both ways, nobody
else is told apart from before, and with room it opens again."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest

from meshwire.agent.policy.model import CLOSED, Model, Surroundings
from meshwire.agent.policy.objects import Namespace, Pod, compact
from meshwire.agent.policy.write import write
from meshwire.api.meshendpointslice import Endpoint, MeshEndpointSlice, PodRef
from meshwire.api.meshpolicy import (
    CidrPeer,
    Direction,
    Kind,
    Operator,
    Policy,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
)
from meshwire.bpf import packets as p
from meshwire.bpf.layouts import Reason
from meshwire.bpf.loader import FROM_POD, POLICY_IN, POLICY_OBJECTS, TO_POD, Programs
from meshwire.bpf.policymaps import PolicyMaps
from meshwire.bpf.testrun import TC_ACT_SHOT, TC_ACT_UNSPEC, run

pytestmark = pytest.mark.bpf

HERE = 1
"""Test runs happen on the loopback device."""
A, B, NEW = (IPv4Address(f"10.1.1.{last}") for last in (5, 6, 7))
REMOTE, WORLD = IPv4Address("10.1.2.9"), IPv4Address("198.51.100.9")
CAPACITIES = {"policy": 16, "endpoints": 2, "cidrs": 4, "identities": 4}


class Node:
    """A model, the maps it is written to and the programs that read them."""

    def __init__(self, programs: Programs, maps: PolicyMaps) -> None:
        self.programs, self.maps = programs, maps
        self.model = Model()
        self.model.put_namespace(Namespace(uid="n", name="shop", labels={}))
        around = Surroundings(cluster=(ip_network("10.1.0.0/16"),), own=(ip_network("10.1.1.0/24"),))
        self.model.set_surroundings(around)
        remote = Endpoint(addresses=(REMOTE,), identity=300, node="b", pod=PodRef("shop", "far", "far"))
        self.model.put_slice(compact(MeshEndpointSlice(name="s", endpoints=(remote,))))
        self.counters = maps.metrics.read()

    def add(self, name: str, address: IPv4Address) -> None:
        self.model.put_pod(
            Pod(
                uid=name,
                namespace="shop",
                name=name,
                created="1",
                labels=(("app", name),),
                service_account="default",
                addresses=(address.packed,),
            )
        )
        self.model.set_device(name, HERE)

    def allow(self, app: str, count: int, *cidrs: str) -> None:
        """Its pods get TCP on so many single ports, the first of which is 1001, and send to `cidrs` alone if
        there are any."""
        ingress = Rule(
            direction=Direction.INGRESS,
            path="spec.ingress[0]",
            ports=tuple(PortRange(Protocol.TCP, port, port) for port in range(1001, 1001 + 2 * count, 2)),
        )
        egress = Rule(
            direction=Direction.EGRESS,
            path="spec.egress[0]",
            peers=tuple(CidrPeer(ip_network(each)) for each in cidrs),
        )
        self.model.put_policy(
            Policy(
                kind=Kind.MESH_POLICY,
                namespace="shop",
                name=app,
                uid=app,
                selector=Selector((Requirement("app", Operator.IN, (app,)),)),
                default_deny=frozenset({Direction.INGRESS, *([Direction.EGRESS] if cidrs else [])}),
                rules=(ingress, egress) if cidrs else (ingress,),
            )
        )

    def carry_out(self) -> None:
        self.model.update()
        self.model.fit(self.maps.capacities)
        write(self.model, self.maps, skips_stack=True)
        # What the model believes is what the maps hold.
        assert {each.packed for each in self.maps.endpoints.read()} == self.model.endpoints.actual.keys()
        assert len(self.maps.policies.read()) == len(self.model.entries.actual)
        assert self.maps.cidrs.read().keys() == self.model.cidrs.actual.keys()

    def send(self, program: str, packet: bytes) -> Reason:
        before = self.counters
        result = run(self.programs.get(program).fd, p.frame(packet))
        after = self.counters = self.maps.metrics.read()
        (reason,) = (key[0] for key in after if after[key].packets > before[key].packets)
        assert result.verdict == (TC_ACT_SHOT if reason.dropped else TC_ACT_UNSPEC)
        return reason

    def get(self, pod: IPv4Address, port: int = 1001, sport: int = 40000) -> Reason:
        """What becomes of the first packet of a connection from elsewhere to the pod."""
        return self.send(TO_POD, p.tcp(REMOTE, pod, flags=p.SYN, sport=sport, dport=port))

    def answer(self, pod: IPv4Address, sport: int = 40000) -> Reason:
        """Of the pod's answer to that."""
        return self.send(FROM_POD, p.tcp(pod, REMOTE, flags=p.SYN | p.ACK, sport=1001, dport=sport))

    def begin(self, pod: IPv4Address, dst: IPv4Address = WORLD, sport: int = 50000) -> Reason:
        """Of the first packet of a connection of the pod to elsewhere."""
        return self.send(FROM_POD, p.tcp(pod, dst, flags=p.SYN, sport=sport, dport=443))

    def verdicts(self, pod: IPv4Address, number: int) -> tuple[Reason, ...]:
        """Of connections that are there, and of ones that nobody has seen."""
        return (
            self.get(pod),
            self.answer(pod),
            self.get(pod, sport=number),
            self.get(pod, 1002, sport=number),
            self.begin(pod, sport=number),
        )

    def is_closed(self, pod: IPv4Address) -> bool:
        return self.maps.endpoints.read()[pod].set == CLOSED


@pytest.fixture
def node(bpffs: Path, objects: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    pins = bpffs / f"full-{abs(hash(request.node.name))}"
    with (
        Programs.load(pins, objects=POLICY_OBJECTS, capacities=CAPACITIES) as programs,
        PolicyMaps.open(pins) as maps,
    ):
        assert {name: maps.capacities[name] for name in CAPACITIES} == CAPACITIES
        yield Node(programs, maps)


OPEN = (
    Reason.POLICY_ALLOWED,
    Reason.POLICY_REPLY,
    Reason.POLICY_ALLOWED,
    Reason.DROP_POLICY_INGRESS,
    Reason.POLICY_NONE,
)
SHUT = (
    Reason.DROP_POLICY_INGRESS,
    # A reply goes by the policy of its flow.
    Reason.DROP_POLICY_INGRESS,
    Reason.DROP_POLICY_INGRESS,
    Reason.DROP_POLICY_INGRESS,
    Reason.DROP_POLICY_EGRESS,
)


def test_rules_that_do_not_fit(node: Node) -> None:
    node.add("a", A)
    node.add("b", B)
    node.allow("a", 8)
    node.allow("b", 4)
    node.carry_out()
    assert node.verdicts(A, 41000) == OPEN == node.verdicts(B, 42000)
    before = node.maps.endpoints.read()[A]

    node.allow("b", 9)
    node.carry_out()
    assert node.is_closed(B) and node.model.closed_pods() == {"b"}
    # Open connections and replies to them among it; the other pod's are not even judged again.
    assert node.verdicts(B, 42001) == SHUT
    assert node.verdicts(A, 41001) == OPEN and node.maps.endpoints.read()[A] == before

    node.allow("a", 6)
    node.carry_out()
    assert not node.is_closed(B) and not node.model.closed_pods()
    assert node.verdicts(B, 42002) == OPEN == node.verdicts(A, 41002)


def test_a_kernel_that_has_less_room_than_it_says(node: Node) -> None:
    """As where an LPM trie gets no memory: the plan takes everything to fit."""
    node.maps.capacities = {**node.maps.capacities, "policy": 1000}
    node.add("a", A)
    node.allow("a", 12)
    node.carry_out()
    node.add("b", B)
    node.allow("b", 9)
    node.carry_out()
    assert node.is_closed(B) and not node.is_closed(A)
    assert node.get(A) is Reason.POLICY_ALLOWED and node.get(B) is Reason.DROP_POLICY_INGRESS
    assert len(node.maps.policies.read()) == 12, "nothing is left of the set that wasn't finished"
    node.allow("a", 1)
    node.model.forgive()
    node.carry_out()
    assert not node.is_closed(B) and node.get(B, sport=1) is Reason.POLICY_ALLOWED


def test_blocks_that_do_not_fit(node: Node) -> None:
    """Of four, one stays free and two are the cluster's own."""
    node.add("a", A)
    node.add("b", B)
    node.allow("a", 1, "198.51.100.0/24")
    node.carry_out()
    node.allow("b", 1, "198.51.0.0/16")
    node.carry_out()
    assert node.is_closed(B) and not node.is_closed(A)
    assert node.begin(A) is Reason.POLICY_ALLOWED
    assert node.begin(B) is Reason.DROP_POLICY_EGRESS and node.get(B) is Reason.DROP_POLICY_INGRESS
    node.model.remove_policy("a")
    node.carry_out()
    assert not node.is_closed(B)
    assert node.begin(B, sport=1) is Reason.POLICY_ALLOWED and node.get(B, sport=1) is Reason.POLICY_ALLOWED
    assert node.begin(B, IPv4Address("203.0.113.1"), sport=2) is Reason.DROP_POLICY_EGRESS


def test_a_pod_without_a_place_is_out_of_reach(node: Node) -> None:
    node.add("a", A)
    node.add("b", B)
    node.carry_out()
    node.add("new", NEW)
    node.carry_out()
    assert NEW not in node.maps.endpoints.read() and node.model.closed_pods() == {"new"}
    assert node.begin(NEW) is Reason.DROP_SPOOFED_SOURCE
    assert node.get(NEW) is Reason.DROP_WRONG_POD
    from_afar = p.tcp(REMOTE, NEW, flags=p.SYN, sport=1, dport=1001)
    assert node.send(POLICY_IN, from_afar) is Reason.DROP_UNKNOWN_POD
    assert node.get(A) is Reason.POLICY_NONE and node.begin(B) is Reason.POLICY_NONE
    node.model.remove_pod("a")
    node.carry_out()
    assert node.get(NEW, sport=2) is Reason.POLICY_NONE and node.begin(NEW, sport=2) is Reason.POLICY_NONE


def test_an_address_without_a_place_is_nobodys(node: Node) -> None:
    def remote(last: int) -> Endpoint:
        address = IPv4Address(f"10.1.3.{last}")
        return Endpoint(
            addresses=(address,), identity=300, node="b", pod=PodRef("shop", str(last), str(last))
        )

    node.model.put_slice(
        compact(MeshEndpointSlice(name="t", endpoints=tuple(remote(last) for last in range(1, 7))))
    )
    node.add("a", A)
    node.carry_out()
    known = node.maps.identities.read()
    assert len(known) == CAPACITIES["identities"] and A in known
    assert node.model.fills(node.maps.capacities)["identities"].left_out == 4
    node.model.remove_slice("t")
    node.carry_out()
    assert node.maps.identities.read().keys() == {A, REMOTE}
