"""The table of tests/policy_cases against the reference evaluator, every flow of every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

import pytest
from tests.policy_cases import (
    CASES,
    FAMILIES,
    ICMP,
    NAMESPACES,
    NODE_OF,
    NODES,
    OUTSIDE,
    PORTS,
    TOWN,
    TRANSPORTS,
    WORLD,
    Case,
    End,
    Flow,
    Labels,
    Object,
    Step,
    container_ports,
    differences,
    flows,
    key,
    namespace_labels,
    resolve,
    service,
)

from meshwire.api import names
from meshwire.api.meshpolicy import Policy
from meshwire.api.policyobjects import mesh_policy, network_policy
from meshwire.cli.schema import refusals, schema_of
from meshwire.policy.evaluate import Packet, Party, decide, services_of
from meshwire.policy.identity import FIRST_POD, HOST, REMOTE_NODE, identity_labels
from meshwire.policy.identity import WORLD as WORLD_IDENTITY
from meshwire.policy.model import ICMP_FAMILIES, ServiceInfo

NUMBERS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132}
ECHO_REQUEST: Final = {"v4": 8, "v6": 128}
ADDRESSES: Final[Mapping[str, Mapping[str, str]]] = {
    **{
        end.name: {
            "v4": f"10.244.{NODE_OF[end][-1]}.{number}",
            "v6": f"fd00:10:244:{NODE_OF[end][-1]}::{number:x}",
        }
        for number, end in enumerate(TOWN, 2)
    },
    **{node: {"v4": f"198.18.0.1{node[-1]}", "v6": f"fd00:198:18::1{node[-1]}"} for node in NODES},
    WORLD.name: {"v4": "198.18.0.200", "v6": "fd00:198:18::200"},
}
NAMED_PORTS: Final = {
    item["name"]: frozenset({(NUMBERS[item["protocol"]], item["containerPort"])})
    for item in container_ports(TRANSPORTS)
}
SERVICES: Final = {
    (end.ns, end.pod): ServiceInfo(item["metadata"]["labels"], item["spec"]["selector"])
    for end in TOWN
    for item in [service(end, TRANSPORTS)]
}


class Town:
    """What there is after some steps."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.namespaces = {ns: namespace_labels(ns) for ns in NAMESPACES}
        self.pods = {end.name: {"pod": end.pod} for end in TOWN}
        self._parties: dict[tuple[End, str, bool], Party] = {}

    def change(self, step: Step) -> None:
        self._parties.clear()
        self.objects |= {key(item): resolve(item, ADDRESSES) for item in step.apply}
        for item in step.delete:
            del self.objects[key(item)]
        relabel(self.namespaces, step.namespaces)
        relabel(self.pods, step.pods)

    def policies(self) -> list[Policy]:
        return [
            (network_policy if item["kind"] == "NetworkPolicy" else mesh_policy)(item)
            for item in self.objects.values()
        ]

    def packet(self, flow: Flow) -> Packet:
        protocol = ICMP_FAMILIES[4 if flow.family == "v4" else 6]
        return Packet(
            source=self.party(flow.src, flow.family, flow.on_own_node),
            destination=self.party(flow.dst, flow.family, flow.on_own_node),
            protocol=protocol if flow.protocol == ICMP else NUMBERS[flow.protocol],
            port=flow.port,
            icmp_type=ECHO_REQUEST[flow.family] if flow.protocol == ICMP else None,
        )

    def party(self, end: End, family: str, on_own_node: bool) -> Party:
        """An end as the other one sees it."""
        known = end, family, on_own_node
        if known not in self._parties:
            self._parties[known] = self._make_party(end, family, on_own_node)
        return self._parties[known]

    def _make_party(self, end: End, family: str, on_own_node: bool) -> Party:
        address = ip_address(ADDRESSES[end.name][family])
        if not end.is_pod:
            of_node = HOST if on_own_node else REMOTE_NODE
            return Party(identity=WORLD_IDENTITY if end == WORLD else of_node, address=address)
        labels = dict(
            identity_labels(
                namespace=end.ns,
                namespace_labels=self.namespaces[end.ns],
                service_account="",
                pod_labels=self.pods[end.name],
            )
        )
        identity = FIRST_POD + TOWN.index(end)
        services = services_of(SERVICES, identity=identity, labels=labels, address=address)
        return Party(
            identity=identity, labels=labels, address=address, named_ports=NAMED_PORTS, services=services
        )


def relabel(labels: dict[str, dict[str, str]], changes: Labels) -> None:
    for name, pairs in changes.items():
        for label, value in pairs.items():
            labels[name].pop(label, None)
            if value is not None:
                labels[name][label] = value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_a_case_is_as_the_evaluator_has_it(case: Case) -> None:
    town = Town()
    for number, step in enumerate(case.steps):
        town.change(step)
        policies = town.policies()
        wrong = [
            (flow, False, "dropped" if step.expect(flow) else "passes")
            for flow in flows(outside=case.outside)
            if decide(policies, town.packet(flow)).allowed is not step.expect(flow)
        ]
        assert not wrong, f"step {number}: {len(wrong)} flows:\n{differences(wrong)}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.slug)
def test_policies_of_a_case_fit_their_schemas(case: Case) -> None:
    """What the lab's API server would refuse, but for rules in CEL."""
    plurals = {"MeshPolicy": names.MESHPOLICIES, "ClusterMeshPolicy": names.CLUSTERMESHPOLICIES}
    for step in case.steps:
        for item in resolve(step.apply, ADDRESSES):
            if plural := plurals.get(item["kind"]):
                assert not list(refusals(schema_of(plural), item))


def test_every_case_has_a_name_of_its_own() -> None:
    names = Counter(case.slug for case in CASES)
    assert not [name for name, count in names.items() if count > 1]


def test_a_case_that_expects_everything_has_a_reason() -> None:
    """Most cases forbid something, and none forbids everything: either would pass with half of it broken."""
    for case in CASES:
        expected = {step.expect(flow) for step in case.steps for flow in flows(outside=case.outside)}
        assert True in expected, case.name
    forbidding = [
        case
        for case in CASES
        if not all(step.expect(flow) for step in case.steps for flow in flows(outside=case.outside))
    ]
    assert len(forbidding) > len(CASES) * 0.85


def test_the_town_has_pairs_of_every_kind_on_one_node_and_across() -> None:
    kinds = {
        (src.ns == dst.ns, src.pod == dst.pod, src.node == dst.node)
        for src in TOWN
        for dst in TOWN
        if src != dst
    }
    assert kinds == {
        (same_ns, same_pod, same_node)
        for same_ns, same_pod in ((True, False), (False, True), (False, False))
        for same_node in (True, False)
    }
    assert len(NODE_OF) == len(TOWN) and {end.node for end in TOWN} == set(NODES)


def test_flows_are_all_pairs_in_both_families() -> None:
    kinds = (len(TRANSPORTS) * len(PORTS) + 1) * len(FAMILIES)
    assert len(flows(outside=False)) == 9 * 8 * kinds
    assert len(flows(outside=True)) == (9 * 8 + 2 * 9 * len(OUTSIDE)) * kinds


def test_a_node_is_on_its_own_node_only() -> None:
    flow = Flow(End("", "node1"), End("x", "a"), "TCP", 80, "v4")
    assert flow.on_own_node and not Flow(flow.src, End("x", "c"), "TCP", 80, "v4").on_own_node
    assert not Flow(WORLD, End("x", "a"), "TCP", 80, "v4").on_own_node
    assert not Flow(End("x", "b"), End("x", "a"), "TCP", 80, "v4").on_own_node


def test_addresses_are_put_where_they_are_asked_for() -> None:
    value = {"a": ["$(x/a v4)/32", {"b": "$(world v6)/128"}], "c": 1, "d": "plain"}
    assert resolve(value, ADDRESSES) == {
        "a": [ADDRESSES["x/a"]["v4"] + "/32", {"b": "fd00:198:18::200/128"}],
        "c": 1,
        "d": "plain",
    }


def test_differences_are_a_table() -> None:
    flow = Flow(TOWN[0], TOWN[2], "TCP", 80, "v4")
    ping = Flow(WORLD, TOWN[1], ICMP, 0, "v6")
    found = differences([(flow, False, "passes"), (flow, True, "passes"), (ping, False, "timeout")])
    assert found.splitlines() == [
        "x/a (node1)      ->  x/c (node3)  passes   TCP/80 v4, TCP/80 v4 by Service",
        "world (outside)  ->  x/b (node1)  timeout  ICMP v6",
    ]
    many = [(Flow(src, dst, "TCP", 80, "v4"), False, "passes") for src in TOWN for dst in TOWN]
    assert differences(many).endswith("and 21 more")
