"""What the operator orders, and says, where nodes have no pod CIDR."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from meshwire.api import conditions
from meshwire.api.meshconfig import Encryption, MeshConfig, NetworkSettings
from meshwire.api.meshnode import MeshNode, Phase, Spec
from meshwire.operator.cidrs import Published
from meshwire.operator.objects import Config, Node
from meshwire.operator.reconcile import Inputs, PatchSpec, Plan, reconcile


def node(name: str, *cidrs: str, live: bool = True) -> Node:
    return Node(
        name=name,
        uid=f"node-{name}",
        live=live,
        addresses=(ip_address(f"192.0.2.{ord(name) - 96}"),),
        pod_cidrs=tuple(map(ip_network, cidrs)),
    )


def plan(*nodes: Node, phase: Phase = Phase.OFF, cidrs: tuple[str, ...] = (), **changes: Any) -> Plan:
    config = MeshConfig(
        generation=1,
        encryption=Encryption(enabled=True),
        network=NetworkSettings(cluster_cidrs=tuple(map(ip_network, cidrs))),
    )
    known: dict[str, Any] = {
        "nodes": {each.name: each for each in nodes},
        "mesh_nodes": {
            each.name: MeshNode(
                name=each.name,
                owner=each.uid,
                spec=Spec(
                    id=ord(each.name) - 96,
                    addresses=each.addresses,
                    pod_cidrs=each.pod_cidrs,
                    phase=phase,
                    epoch=0 if phase is Phase.OFF else 1,
                ),
            )
            for each in nodes
        },
        "secrets": {},
        "config": Config(uid="c", resource_version="1", generation=1, config=config),
        "status": None,
        "found_cidrs": (),
        "recent_ids": (),
        "now": datetime(2026, 1, 1, tzinfo=UTC),
    } | changes
    return reconcile(Inputs(**known))


def ordered(found: Plan) -> set[Phase]:
    return {action.spec.phase for action in found.actions if isinstance(action, PatchSpec)}


ALL = Published(complete=True, families=frozenset({4}))


def test_encryption_begins_when_all_pods_are_published() -> None:
    nodes = (node("a"), node("b", "10.0.2.0/24"))
    assert ordered(plan(*nodes)) <= {Phase.OFF}
    assert ordered(plan(*nodes, published=ALL)) == {Phase.ENABLING}


def test_nodes_with_cidrs_wait_for_nobody() -> None:
    assert ordered(plan(node("a", "10.0.1.0/24"), node("b", "10.0.2.0/24"))) == {Phase.ENABLING}


def test_encryption_that_is_on_stays_on_whatever_is_published() -> None:
    found = plan(node("a"), node("b"), phase=Phase.ENFORCING)
    assert Phase.DISABLING not in ordered(found)


@pytest.mark.parametrize(
    ("cidrs", "families", "reason", "missing"),
    [
        ((), {4}, "ClusterCIDRMissing", "of IPv4 is"),
        ((), {4, 6}, "ClusterCIDRMissing", "of IPv4 or of IPv6 is"),
        ((), (), "ClusterCIDRMissing", "of IPv4 or of IPv6 is"),
        (("10.0.0.0/8",), {4, 6}, "ClusterCIDRMissing", "of IPv6 is"),
        (("10.0.0.0/8",), {4}, "ClusterCIDRsKnown", ""),
        (("10.0.0.0/8",), (), "ClusterCIDRsKnown", ""),
        (("10.0.0.0/8", "fd00::/64"), {4, 6}, "ClusterCIDRsKnown", ""),
    ],
)
def test_strict_scope_says_which_cluster_cidr_is_missing(
    cidrs: tuple[str, ...], families: Any, reason: str, missing: str
) -> None:
    found = plan(
        node("a"),
        node("b", "10.0.2.0/24"),
        phase=Phase.ENFORCING,
        cidrs=cidrs,
        published=Published(True, frozenset(families)),
    )
    scope = conditions.find(found.status.conditions, conditions.STRICT_SCOPE)
    assert scope and scope.reason == reason and missing in scope.message
    assert scope.status is (reason == "ClusterCIDRsKnown")
    if missing:
        assert "without pod CIDR (a)" in scope.message and "spec.network.clusterCIDRs" in scope.message
