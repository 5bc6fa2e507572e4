"""When policies are in force, by what nodes report."""

from __future__ import annotations

import pytest

from meshwire.api.meshpolicy import Kind, Operator, Policy, Requirement, Selector
from meshwire.api.meshpolicyreport import Failure, InForce, MeshPolicyReport
from meshwire.lab.exercise import find_unenforced

WEB = (("app", "web"),)
DB = (("app", "db"),)
POLICY = Policy(
    kind=Kind.MESH_POLICY,
    namespace="shop",
    name="web",
    uid="p",
    generation=2,
    selector=Selector((Requirement("app", Operator.IN, ("web",)),)),
    default_deny=frozenset(),
)
PODS = [("node1", WEB), ("node1", DB), ("node2", DB), ("node3", WEB)]


def report(node: str, *in_force: tuple[str, int], failed: tuple[Failure, ...] = ()) -> MeshPolicyReport:
    policies = tuple(InForce(uid, generation) for uid, generation in in_force)
    return MeshPolicyReport(name=node, enabled=True, policies=policies, failed=failed)


@pytest.mark.parametrize(
    ("policies", "reports", "problem"),
    [
        ([POLICY], [report("node1", ("p", 2)), report("node2"), report("node3", ("p", 2))], ""),
        ([POLICY], [report("node1", ("p", 2)), report("node3")], "web is not in force on node3"),
        ([POLICY], [report("node1", ("p", 2))], "web is not in force on node3"),
        (
            [POLICY],
            [report("node1", ("p", 2)), report("node3", ("p", 1))],
            "node3 judges by generation 1",
        ),
        ([], [report("node1", ("p", 2))], "node1 judges by generation 2 of p"),
        ([], [report("node1"), report("node2")], ""),
        (
            [POLICY],
            [report("node1", failed=(Failure("p", 2, "TooLarge"),)), report("node3", ("p", 2))],
            "TooLarge",
        ),
    ],
)
def test_nodes_with_pods_of_a_policy_have_to_judge_by_it(
    policies: list[Policy], reports: list[MeshPolicyReport], problem: str
) -> None:
    found = find_unenforced(policies, PODS, {each.name: each for each in reports})
    assert problem in found and bool(problem) is bool(found)
