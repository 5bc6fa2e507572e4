"""Nodes without a kernel report what nodes with one would, and what the API server was asked for is counted
as it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import pytest
from bench.rotation import Counted, Request, figures, read_audit
from bench.simulated import Mesh, device_epochs, show
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_encryption_convergence import FakeKernel, make_kernel, public, secret

from meshwire.api.meshconfig import Encryption, MeshConfig
from meshwire.api.meshnode import Key, Phase, Spec, Status
from meshwire.api.names import device_name
from meshwire.encryption import report
from meshwire.encryption.desired import Inputs, desired
from meshwire.encryption.model import ClusterNode, Desired, HeldKey, Member, Observed
from meshwire.encryption.plan import plan

NAMES = ("a", "b", "c")

STEPS = (
    (Phase.OFF, 0, 0, (), ()),
    (Phase.ENABLING, 1, 0, (), ()),
    (Phase.ENABLING, 1, 0, (1,), ()),
    (Phase.ENABLING, 1, 0, (1,), (1,)),
    (Phase.ENFORCING, 1, 0, (1,), (1,)),
    (Phase.ENFORCING, 2, 1, (1,), (1,)),
    (Phase.ENFORCING, 2, 1, (1, 2), (1,)),
    (Phase.ENFORCING, 2, 1, (1, 2), (1, 2)),
    (Phase.ENFORCING, 2, 0, (2,), (2,)),
)
"""What one node is told, one after another, and has done: phase, epoch, retiring, epochs of its keys, and of
those that it has opened."""
TOGETHER = {4: 3, 5: 4, 8: 7}
"""Steps that the operator orders only when all have come that far."""


def key(name: str, epoch: int) -> HeldKey:
    private = secret(name, epoch)
    return HeldKey(epoch, public(private), private)


class Node:
    """With a kernel, and the agent's own decisions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step = 0
        self.kernel = make_kernel()
        self.status = Status()

    @property
    def held(self) -> dict[int, HeldKey]:
        return {epoch: key(self.name, epoch) for epoch in STEPS[self.step][4]}

    @property
    def member(self) -> Member:
        phase, epoch, retiring, epochs, _ = STEPS[self.step]
        number = NAMES.index(self.name) + 1
        spec = Spec(
            id=number,
            addresses=(ip_address(f"198.18.0.{number}"),),
            pod_cidrs=(ip_network(f"10.244.{number}.0/24"),),
            cluster_cidrs=(ip_network("10.244.0.0/16"),),
            keys=tuple(Key(epoch=each, public_key=key(self.name, each).public_key) for each in epochs),
            phase=phase,
            epoch=epoch,
            retiring=retiring,
        )
        return Member(name=self.name, created=f"{number}", generation=self.step + 1, spec=spec)

    def look(self, members: dict[str, Member]) -> tuple[Desired, Observed]:
        observed = self.kernel.observe()
        wanted = desired(
            Inputs(
                node=self.name,
                members=members,
                nodes={
                    name: ClusterNode(
                        name=name,
                        ready=True,
                        addresses=member.spec.addresses,
                        pod_cidrs=member.spec.pod_cidrs,
                    )
                    for name, member in members.items()
                },
                config=MeshConfig(encryption=Encryption(enabled=True)),
                held=self.held,
                links=observed.links,
                routes=observed.routes,
                in_place=observed.pinned,
                told=self.status,
            )
        )
        assert wanted is not None
        return wanted, observed

    def converge(self, members: dict[str, Member]) -> None:
        while todo := plan(*self.look(members)):
            for action in todo:
                self.kernel.apply(action)


def shake_hands(nodes: dict[str, Node]) -> None:
    """Each two that have one another as peers."""
    for epoch in (1, 2):
        device = device_name(epoch)
        for name, node in nodes.items():
            if (state := node.kernel.wireguard.get(device)) is None:
                continue
            peers = dict(state.peers)
            for other in nodes.values():
                theirs = key(other.name, epoch).public_key
                if theirs in peers and _knows(other.kernel, device, key(name, epoch).public_key):
                    peers[theirs] = replace(peers[theirs], handshake=node.kernel.now)
            node.kernel.wireguard[device] = replace(state, peers=peers)


def _knows(kernel: FakeKernel, device: str, public_key: str) -> bool:
    state = kernel.wireguard.get(device)
    return state is not None and public_key in state.peers


def told(node: Node, shown: tuple[Desired, Observed], *, drained: bool) -> Status:
    return report.report(
        *shown,
        previous=node.status,
        generation=node.member.generation,
        sealing_key="",
        problems=(),
        counts=report.Counts(),
        version="",
        drained=drained,
    )


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_simulated_node_reports_what_a_real_one_would(random: Random) -> None:
    nodes, mesh = {name: Node(name) for name in NAMES}, Mesh()
    while may_go_on := [
        node
        for node in nodes.values()
        if node.step + 1 < len(STEPS)
        and all(each.step >= TOGETHER.get(node.step + 1, 0) for each in nodes.values())
    ]:
        random.choice(may_go_on).step += 1
        drained = random.random() < 0.5
        members = {each.name: each.member for each in nodes.values()}
        for _ in range(2):
            for each in nodes.values():
                each.converge(members)
            shake_hands(nodes)
        for member in members.values():
            mesh.put(member)
        for each in nodes.values():
            mesh.set_up(each.name, device_epochs(each.member, each.held))
        for each in nodes.values():
            real = each.look(members)
            shown = show(each.member, each.held, mesh, each.kernel.now)
            expected = told(each, real, drained=drained)
            assert told(each, shown, drained=drained) == expected
            assert report.waits_for(*shown) == report.waits_for(*real)
            assert report.has_just_moved(*shown, each.status) == report.has_just_moved(*real, each.status)
            if each.member.spec.retiring:
                assert mesh.behind(each.member) == len(report.left_behind(*real))
            each.status = expected


def test_others_concern_a_node_when_few_are_left() -> None:
    mesh = Mesh()
    spec = Spec(phase=Phase.ENFORCING, epoch=2, retiring=1)
    members = [Member(name=f"n{n}", spec=replace(spec, id=n + 1)) for n in range(40)]
    for member in members:
        mesh.put(member)
    own = members[0]
    mesh.set_up("n0", {1, 2})
    assert mesh.behind(own) == 39
    for member in members[1:5]:
        mesh.set_up(member.name, {1, 2})
    assert not mesh.concerns(own, 39, counters_due=True), "a number is told of no more than 32"
    for member in members[5:11]:
        mesh.set_up(member.name, {1, 2})
    assert mesh.concerns(own, 35, counters_due=False), "it begins to name them"
    assert not mesh.concerns(own, 30, counters_due=False)
    assert mesh.concerns(own, 30, counters_due=True)
    for member in members[11:]:
        mesh.set_up(member.name, {1, 2})
    assert mesh.concerns(own, 29, counters_due=False), "all are there"
    assert not mesh.concerns(own, 0, counters_due=True)


def entry(
    who: str, verb: str, resource: str, *, at: str = "00:00:05", code: int = 200, **target: Any
) -> str:
    return (
        json.dumps(
            {
                "verb": verb,
                "user": {"username": f"system:serviceaccount:meshwire-system:meshwire-{who}"},
                "objectRef": {"resource": resource, **target},
                "requestReceivedTimestamp": f"2026-01-01T{at}.000000Z",
                "responseStatus": {"code": code},
            }
        )
        + "\n"
    )


AUDIT = [
    entry("agent", "patch", "meshnodes", subresource="status", at="00:00:01"),
    entry("agent", "patch", "meshnodes", subresource="status"),
    entry("agent", "get", "secrets", namespace="meshwire-system"),
    entry("operator", "patch", "meshnodes"),
    entry("operator", "patch", "meshnodes", code=409),
    entry("operator", "get", "secrets", namespace="meshwire-operator"),
    entry("operator", "update", "leases"),
    entry("operator", "watch", "nodes"),
    entry("person", "patch", "meshconfigs"),
    entry("operator", "patch", "meshnodes")[:-5],
]


def count(requests: Counter[Request], nodes: int = 2) -> Counted:
    return Counted(
        nodes=nodes,
        requests=requests,
        moved=8.0,
        ended=15.0,
        operator_cpu=1.0,
        operator_kib=1024,
        operator_peak_kib=2048,
        rounds=3,
        reconciling=0.1,
        simulation_cpu=1.0,
        apiserver_cpu=1.0,
        watched=1000,
        events=2,
        seconds=20.0,
    )


def test_what_was_asked_for_is_counted_by_who_asked() -> None:
    since = 1767225602.0
    counted = count(Counter(read_audit(AUDIT, since)))
    assert counted.writes == {"agents: patch meshnodes/status": 1, "operator: patch meshnodes": 1}
    assert counted.others == {
        "agents: get secrets": 1,
        "operator: patch meshnodes (409)": 1,
        "operator: get secrets (epoch)": 1,
    }
    assert counted.background == 1


@pytest.mark.parametrize(("writes", "expected"), [(40, 1.0), (400, 10.0)])
def test_in_proportion_means_one(writes: int, expected: float) -> None:
    request = Request("operator", "patch", "meshnodes", 200)
    read = Request("agents", "get", "secrets", 200)
    few = count(Counter({request: 4, read: 2}))
    found = figures([few, count(Counter({request: writes, read: 20}), nodes=20)])
    quotient = next(each for each in found if each.unit == "ratio" and each.name.startswith("objects"))
    assert quotient.value == pytest.approx(expected)
