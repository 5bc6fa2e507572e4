"""Identities, endpoints and what is said about policies: tables, and the operator against an API server that
is always a little ahead of what the operator has seen, pods that come, go and change, and a leader that
crashes between any two writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshwire.api import conditions
from meshwire.api.meshconfig import PolicySettings
from meshwire.api.meshendpointslice import Endpoint, NamedPort, PodRef
from meshwire.api.meshnode import MeshNode, Spec
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    Kind,
    Operator,
    PolicyMode,
    Protocol,
    Requirement,
    Selector,
)
from meshwire.api.meshpolicyreport import Failure, InForce, MapPressure, MeshPolicyReport
from meshwire.operator import identities, policyreconcile, policystatus, slices
from meshwire.operator.identities import GRACE, CreateIdentity, DeleteIdentity, MarkIdentity
from meshwire.operator.objects import Identity, Namespace, Node, Pod, PolicyObject, PolicyStatus, Slice
from meshwire.operator.policyreconcile import (
    Action,
    CreateReport,
    DeleteReport,
    DeleteUnused,
    Inputs,
    reconcile,
)
from meshwire.operator.policystatus import Selections, WritePolicyStatus
from meshwire.operator.policyworld import Watch
from meshwire.operator.slices import CreateSlice, DeleteSlice, WriteSlice
from meshwire.operator.store import Overlay
from meshwire.policy.identity import FIRST_POD

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ON = PolicySettings(enabled=True)
WEB, API, DB = ((NAMESPACE_LABEL, "shop"), ("app", "web")), ((NAMESPACE_LABEL, "shop"), ("app", "api")), ()


def identity(number: int, labels: Any = WEB, unused: datetime | None = None) -> Identity:
    return Identity(name=str(number), uid=f"identity-{number}", labels=labels, unused_since=unused)


def endpoint(uid: str, address: str, number: int = 256, node: str = "a") -> Endpoint:
    return Endpoint(
        addresses=(ip_address(address),), identity=number, node=node, pod=PodRef("shop", uid, uid)
    )


def slice_of(name: str, *endpoints: Endpoint) -> Slice:
    return Slice(name=name, uid=f"uid-{name}", resource_version="1", endpoints=endpoints)


# Identities.


def plan(**changes: Any) -> list[identities.IdentityAction]:
    known: dict[str, Any] = {
        "wanted": set(),
        "referred": set(),
        "identities": [],
        "recent": {},
        "now": NOW,
    } | changes
    return identities.plan(**known)


def test_a_label_set_gets_the_lowest_number_that_nobody_had_lately() -> None:
    taken = [identity(256, API), identity(258, (("x", "y"),))]
    actions = plan(
        wanted={WEB, API},
        referred={257, 258},
        identities=taken,
        recent={259: NOW - GRACE + timedelta(seconds=1), 260: NOW - GRACE},
    )
    assert actions == [CreateIdentity(260, WEB)]


def test_numbers_end() -> None:
    assert plan(wanted={WEB}, recent=dict.fromkeys(range(FIRST_POD, 2**24), NOW)) == []


@pytest.mark.parametrize(
    ("wanted", "referred", "known", "expected"),
    [
        pytest.param({WEB}, set(), [identity(256)], [], id="in use"),
        pytest.param(set(), {256}, [identity(256)], [], id="endpoints have it still"),
        pytest.param(set(), set(), [identity(256)], [MarkIdentity(identity(256), NOW)], id="unused"),
        pytest.param(
            {WEB},
            set(),
            [identity(256, unused=NOW)],
            [MarkIdentity(identity(256, unused=NOW), None)],
            id="used again",
        ),
        pytest.param(set(), set(), [identity(256, unused=NOW - GRACE / 2)], [], id="not long enough"),
        pytest.param(
            set(),
            set(),
            [identity(256, unused=NOW - GRACE)],
            [DeleteIdentity(identity(256, unused=NOW - GRACE))],
            id="long enough",
        ),
        pytest.param(
            set(),
            set(),
            [identity(256, unused=NOW + GRACE)],
            [MarkIdentity(identity(256, unused=NOW + GRACE), NOW)],
            id="marked in the future",
        ),
        pytest.param(
            {WEB},
            set(),
            [identity(300), identity(256)],
            [MarkIdentity(identity(300), NOW)],
            id="of two the lower counts",
        ),
        pytest.param(
            {WEB}, {300}, [identity(300), identity(256)], [], id="and the higher stays while it is used"
        ),
    ],
)
def test_marks(wanted: Any, referred: Any, known: Any, expected: Any) -> None:
    assert plan(wanted=wanted, referred=referred, identities=known) == expected


def test_an_identity_is_read_from_its_object() -> None:
    source = {
        "metadata": {
            "name": "256",
            "uid": "u",
            "resourceVersion": "7",
            "annotations": {"meshwire.dev/unused-since": "2026-01-01T00:00:00Z"},
        },
        "spec": {"labels": {"app": "web", NAMESPACE_LABEL: "shop"}},
    }
    read = Identity.from_object(source)
    assert (read.number, dict(read.labels), read.unused_since) == (256, dict(WEB), NOW)
    source["metadata"]["annotations"] = {"meshwire.dev/unused-since": "yesterday"}  # type: ignore[index]
    source["spec"] = {"labels": {"app": 1}}
    assert Identity.from_object(source) == Identity(name="256", uid="u")


# Pods.


def pod_object(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "uid": "u",
            "labels": {"app": "web"},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "nodeName": "a",
            "serviceAccountName": "web",
            "containers": [
                {
                    "ports": [
                        {"name": "http", "containerPort": 8080},
                        {"containerPort": 1, "protocol": "UDP"},
                    ]
                },
                {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
            ],
            "initContainers": [
                {"ports": [{"name": "once", "containerPort": 1}]},
                {"restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 2}]},
            ],
        },
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.1.1"}, {"ip": "fd00::1"}]} | status,
    }


def test_a_pod_is_read_from_its_object() -> None:
    assert Pod.from_object(pod_object()) == Pod(
        uid="u",
        namespace="shop",
        name="web-1",
        created="2026-01-01T00:00:00Z",
        labels=(("app", "web"),),
        service_account="web",
        node="a",
        addresses=(ip_address("10.0.1.1"), ip_address("fd00::1")),
        ports=(
            NamedPort("dns", Protocol.UDP, 53),
            NamedPort("http", Protocol.TCP, 8080),
            NamedPort("proxy", Protocol.TCP, 2),
        ),
    )


@pytest.mark.parametrize(
    ("status", "addresses"),
    [
        ({"podIPs": None, "podIP": "10.0.1.1"}, ("10.0.1.1",)),
        ({"podIPs": None}, ()),
        ({"podIPs": [{"ip": "nonsense"}, {"ip": "fd00::1"}, {"ip": "fd00::2"}]}, ("fd00::1",)),
    ],
)
def test_odd_addresses_are_left_out(status: Any, addresses: tuple[str, ...]) -> None:
    read = Pod.from_object(pod_object(**status))
    assert read and read.addresses == tuple(map(ip_address, addresses))


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_none(phase: str) -> None:
    assert Pod.from_object(pod_object(phase=phase)) is None


def test_a_pod_of_the_nodes_network_is_none() -> None:
    source = pod_object()
    source["spec"]["hostNetwork"] = True
    assert Pod.from_object(source) is None


# Slices.


def pack(*current: Slice, wanted: tuple[Endpoint, ...] = (), undecided: frozenset[str] = frozenset()) -> Any:
    return slices.pack(
        {each.name: each for each in current}, {each.pod.uid: each for each in wanted}, undecided
    )


def test_a_new_endpoint_goes_where_there_is_room() -> None:
    one, two, three = (endpoint(str(n), f"10.0.0.{n}") for n in (1, 2, 3))
    assert pack(wanted=(one, two)) == [CreateSlice("meshwire-0", (one, two))]
    assert pack(slice_of("meshwire-0", one), wanted=(one, two)) == [
        WriteSlice(slice_of("meshwire-0", one), (one, two))
    ]
    # Into the slice that changes anyway, because a pod of it is gone, rather than into a fuller one.
    full = slice_of("meshwire-1", *(endpoint(f"f{n}", f"10.0.1.{n}") for n in range(50)))
    assert pack(full, slice_of("meshwire-0", one, two), wanted=(one, three, *full.endpoints)) == [
        WriteSlice(slice_of("meshwire-0", one, two), (one, three))
    ]


def test_many_new_endpoints_change_few_slices() -> None:
    packed = [
        slice_of(f"meshwire-{n}", *(endpoint(f"{n}-{m}", f"10.{n}.0.{m}") for m in range(99)))
        for n in range(10)
    ]
    new = tuple(endpoint(f"new-{n}", f"10.20.0.{n}") for n in range(50))
    old = tuple(each for current in packed for each in current.endpoints)
    (action,) = pack(*packed, wanted=(*old, *new))
    assert isinstance(action, CreateSlice) and len(action.endpoints) == 50
    (action,) = pack(*packed, wanted=(*old, new[0]))
    assert isinstance(action, WriteSlice) and len(action.endpoints) == 100
    assert pack(*packed, wanted=old) == []


def test_who_takes_an_address_over_takes_the_place_too() -> None:
    gone, heir = endpoint("gone", "10.0.0.1"), endpoint("heir", "10.0.0.1")
    other = slice_of("meshwire-0", *(endpoint(f"f{n}", f"10.0.1.{n}") for n in range(90)))
    current = slice_of("meshwire-1", gone)
    assert pack(other, current, wanted=(heir, *other.endpoints)) == [WriteSlice(current, (heir,))]


def test_who_takes_addresses_over_from_two_slices_waits() -> None:
    dual = Endpoint(
        addresses=(ip_address("10.0.0.1"), ip_address("fd00::1")),
        identity=256,
        node="a",
        pod=PodRef("shop", "heir", "heir"),
    )
    one, two = slice_of("one", endpoint("x", "10.0.0.1")), slice_of("two", endpoint("y", "fd00::1"))
    assert pack(one, two, wanted=(dual,)) == [DeleteSlice(one), DeleteSlice(two)]
    assert pack(one, wanted=(dual,)) == [WriteSlice(one, (dual,))]


def test_what_is_undecided_stays_and_keeps_its_address() -> None:
    known, claimant = endpoint("known", "10.0.0.1"), endpoint("claimant", "10.0.0.1")
    current = slice_of("meshwire-0", known)
    assert pack(current, undecided=frozenset({"known"})) == []
    assert pack(current, wanted=(claimant,), undecided=frozenset({"known"})) == []


def test_small_slices_are_merged_in_two_steps() -> None:
    few, many = endpoint("few", "10.0.0.1"), tuple(endpoint(f"m{n}", f"10.0.1.{n}") for n in range(30))
    small, large = slice_of("meshwire-0", few), slice_of("meshwire-1", *many)
    (copied,) = pack(small, large, wanted=(few, *many))
    assert copied == WriteSlice(large, (*many, few))
    merged = slice_of("meshwire-1", *copied.endpoints)
    changed = replace(few, identity=257)
    # What changes meanwhile waits until it is in one slice again.
    assert pack(small, merged, wanted=(changed, *many)) == [DeleteSlice(small)]
    assert pack(merged, wanted=(changed, *many)) == [WriteSlice(merged, (*many, changed))]


# The whole.


def pod(uid: str, address: str = "", *, node: str = "a", app: str = "web", created: str = "1") -> Pod:
    return Pod(
        uid=uid,
        namespace="shop",
        name=uid,
        created=created,
        labels=(("app", app),),
        service_account="default",
        node=node,
        addresses=(ip_address(address),) if address else (),
    )


def mesh_node(name: str, number: int) -> MeshNode:
    return MeshNode(
        name=name,
        owner=f"node-{name}",
        spec=Spec(
            id=number,
            addresses=(ip_address(f"192.0.2.{number}"),),
            pod_cidrs=(ip_network(f"10.0.{number}.0/24"),),
        ),
    )


MESH_NODES = {"a": mesh_node("a", 1), "b": mesh_node("b", 2)}
SHOP = Namespace(name="shop", labels=(("team", "x"),))


def inputs(*pods: Pod, **changes: Any) -> Inputs:
    known: dict[str, Any] = {
        "settings": ON,
        "mesh_nodes": {},
        "namespaces": {"shop": SHOP},
        "pods": {each.uid: each for each in pods},
        "identities": {},
        "slices": {},
        "reports": {},
        "recent": {},
        "now": NOW,
    } | changes
    return Inputs(**known)


def numbered(*pods: Pod) -> dict[str, Identity]:
    labels = sorted({policyreconcile.pod_labels(each, SHOP, ON.excluded_labels) for each in pods})
    return {str(number): identity(number, each) for number, each in enumerate(labels, FIRST_POD)}


def published(actions: tuple[Action, ...]) -> dict[str, tuple[str, ...]]:
    return {
        each.pod.uid: tuple(map(str, each.addresses))
        for action in actions
        if isinstance(action, CreateSlice | WriteSlice)
        for each in action.endpoints
    }


def test_an_identity_comes_first_even_before_the_pod_has_an_address() -> None:
    one = pod("one")
    (create,) = reconcile(inputs(one)).actions
    assert isinstance(create, CreateIdentity) and dict(create.labels) == {
        "app": "web",
        NAMESPACE_LABEL: "shop",
        "io.cilium.k8s.namespace.labels.team": "x",
        "io.cilium.k8s.policy.serviceaccount": "default",
    }
    assert reconcile(inputs(one, identities=numbered(one))).actions == ()
    there = pod("one", "10.0.1.1")
    assert published(reconcile(inputs(there, identities=numbered(one))).actions) == {"one": ("10.0.1.1",)}


def test_an_identity_that_may_be_deleted_any_moment_is_not_used() -> None:
    one = pod("one", "10.0.1.1")
    marked = {name: replace(each, unused_since=NOW) for name, each in numbered(one).items()}
    (action,) = reconcile(inputs(one, identities=marked)).actions
    assert isinstance(action, MarkIdentity) and action.unused_since is None


def test_a_pod_whose_namespace_is_not_known_yet_keeps_what_it_has() -> None:
    one = pod("one", "10.0.1.1")
    current = slice_of("meshwire-0", endpoint("one", "10.0.1.1"))
    plan = reconcile(
        inputs(one, namespaces={}, slices={"meshwire-0": current}, identities={"256": identity(256)})
    )
    assert plan.actions == ()


@pytest.mark.parametrize(
    ("pods", "holder", "winner"),
    [
        pytest.param(
            (pod("old", "10.9.0.1"), pod("new", "10.9.0.1", created="2")), "old", "new", id="same node"
        ),
        pytest.param(
            (pod("old", "10.9.0.1"), pod("new", "10.9.0.1", node="b", created="2")),
            "new",
            "new",
            id="holder",
        ),
        pytest.param(
            (pod("old", "10.9.0.1"), pod("new", "10.9.0.1", node="b", created="2")), "", "old", id="older"
        ),
        pytest.param(
            (pod("old", "10.0.2.1"), pod("new", "10.0.2.1", node="b", created="2")),
            "old",
            "new",
            id="pod CIDR",
        ),
        pytest.param((pod("old", "192.0.2.2"),), "old", None, id="a node's own"),
    ],
)
def test_an_address_is_one_pods(pods: tuple[Pod, ...], holder: str, winner: str | None) -> None:
    address = str(pods[0].addresses[0])
    current = {"meshwire-0": slice_of("meshwire-0", endpoint(holder, address))} if holder else {}
    plan = reconcile(inputs(*pods, identities=numbered(*pods), slices=current, mesh_nodes=MESH_NODES))
    assert plan.contested == 1
    actions = [action for action in plan.actions if not isinstance(action, CreateReport)]
    if winner is None:
        assert [type(action) for action in actions] == [DeleteSlice]
    else:
        assert published(tuple(actions)) == {winner: (address,)}


def test_every_node_gets_a_report_to_fill() -> None:
    plan = reconcile(inputs(mesh_nodes=MESH_NODES, reports={"a": MeshPolicyReport(name="a")}))
    assert plan.actions == (CreateReport("b", "node-b"),)


def test_where_policy_is_off_nothing_is_left() -> None:
    one = pod("one", "10.0.1.1")
    current, report = (
        slice_of("meshwire-0", endpoint("one", "10.0.1.1")),
        MeshPolicyReport(name="a", uid="r"),
    )
    known: dict[str, Any] = {
        "identities": {"256": identity(256)},
        "slices": {"meshwire-0": current},
        "reports": {"a": report},
    }
    assert reconcile(inputs(one, settings=PolicySettings(), **known)).actions == (
        DeleteSlice(current),
        DeleteUnused(identity(256)),
        DeleteReport(report),
    )
    assert reconcile(inputs(one, settings=None, **known)).actions == ()


# What is said about policies.


def selector(**labels: str) -> Selector:
    return Selector(tuple(Requirement(key, Operator.IN, (value,)) for key, value in sorted(labels.items())))


def policy(**changes: Any) -> PolicyObject:
    known: dict[str, Any] = {
        "kind": Kind.MESH_POLICY,
        "namespace": "shop",
        "key": "shop/p",
        "uid": "p",
        "generation": 2,
        "selector": selector(app="web"),
    } | changes
    return PolicyObject(**known)


def report(node: str, *policies: InForce, failed: tuple[Failure, ...] = (), enabled: bool = True) -> Any:
    return MeshPolicyReport(name=node, enabled=enabled, policies=policies, failed=failed)


def statuses(
    *policies: PolicyObject,
    reports: tuple[MeshPolicyReport, ...] = (),
    pods: tuple[Pod, ...] = (),
    **changes: Any,
) -> list[WritePolicyStatus]:
    known: dict[str, Any] = {
        "settings": ON,
        "nodes": {name: Node(name=name, uid=name, live=name != "dead") for name in ("a", "b", "dead")},
        "namespaces": {"shop": SHOP},
        "pods": {each.uid: each for each in pods},
        "policies": {each.uid: each for each in policies},
        "reports": {each.name: each for each in reports},
        "counters": False,
        "now": NOW,
    } | changes
    return policystatus.plan(policystatus.Inputs(**known), Selections())


PODS = (
    pod("1", "10.0.1.1"),
    pod("2", "10.0.2.1", node="b"),
    pod("3", "10.0.3.1", node="dead"),
    pod("4", "10.0.1.2", app="api"),
    pod("5", node="b"),
)
A, B, LATE = report("a", InForce("p", 2, 3)), report("b", InForce("p", 2, 4)), report("b", InForce("p", 1))


@pytest.mark.parametrize(
    ("changes", "known", "ready", "enforced", "nodes"),
    [
        pytest.param({}, {"reports": (A, B)}, "True Enforced", "True Enforced", "2/2", id="everywhere"),
        pytest.param(
            {}, {"reports": (A, LATE)}, "False NodesPending", "False NodesPending", "1/2", id="late"
        ),
        pytest.param({}, {"reports": (A,)}, "False NodesPending", "False NodesPending", "1/2", id="silent"),
        pytest.param(
            {},
            {"reports": (A, report("b", InForce("p", 2), enabled=False))},
            "False NodesPending",
            "False NodesPending",
            "1/2",
            id="off there",
        ),
        pytest.param(
            {},
            {"reports": (A, report("b", failed=(Failure("p", 2, "TooLarge", "too many"),)))},
            "False NodesFailed",
            "False NodesFailed",
            "1/2",
            id="failed",
        ),
        pytest.param(
            {},
            {
                "reports": (
                    report("a", failed=(Failure("p", 2, "TooLarge", "too many"),)),
                    report("b", failed=(Failure("p", 2, "MapFull", "map policy, which holds 8"),)),
                )
            },
            "False MapFull",
            "False MapFull",
            "0/2",
            id="no room",
        ),
        pytest.param(
            {"selector": selector(app="none")},
            {"reports": (A, B)},
            "True NoPodsSelected",
            "True NoPodsSelected",
            "0/0",
            id="nobody",
        ),
        pytest.param(
            {"mode": PolicyMode.AUDIT},
            {"reports": (A, B)},
            "True Audited",
            "False Audit",
            "2/2",
            id="audited",
        ),
        pytest.param(
            {"mode": PolicyMode.AUDIT},
            {"reports": (A,)},
            "False NodesPending",
            "False NodesPending",
            "1/2",
            id="not yet audited",
        ),
        pytest.param(
            {"selector": None, "problem": "spec.ingress[0]: no"},
            {"reports": (A, B)},
            "False Invalid",
            "False Invalid",
            "0/0",
            id="invalid",
        ),
        pytest.param(
            {},
            {"reports": (A, B), "settings": PolicySettings()},
            "False PolicyDisabled",
            "False PolicyDisabled",
            "0/0",
            id="disabled",
        ),
    ],
)
def test_conditions(changes: Any, known: Any, ready: str, enforced: str, nodes: str) -> None:
    one = policy(**changes)
    (action,) = statuses(one, pods=PODS, **known)
    status = action.status
    found = {each.type: f"{each.status} {each.reason}" for each in status.conditions}
    assert (found["Ready"], found["Enforced"], status.nodes) == (ready, enforced, nodes)
    assert status.observed_generation == 2
    assert all(each.observed_generation == 2 for each in status.conditions)
    stalled = conditions.find(status.conditions, conditions.STALLED)
    assert stalled and stalled.status is (ready.split()[1] in ("Invalid", "NodesFailed", "MapFull"))
    if stalled.reason == "MapFull":
        assert stalled.message == "a (TooLarge: too many), b (MapFull: map policy, which holds 8)"
    # What has been written is not written again.
    assert statuses(replace(one, status=status), pods=PODS, counters=True, **known) == []


def test_numbers_are_written_only_when_it_is_their_time() -> None:
    (first,) = statuses(policy(), pods=PODS, reports=(A, B))
    assert first.status.would_deny == 7
    known, more = policy(status=first.status), report("b", InForce("p", 2, 5))
    assert statuses(known, pods=PODS, reports=(A, more)) == []
    (later,) = statuses(known, pods=PODS, reports=(A, more), counters=True)
    assert later.status.would_deny == 8
    # A pod that comes to another node: soon in force there too, or else it is said.
    assert statuses(known, pods=PODS, reports=(A,)) == []
    (pending,) = statuses(known, pods=PODS, reports=(A,), counters=True)
    assert pending.status.nodes == "1/2"
    (again,) = statuses(policy(status=pending.status), pods=PODS, reports=(A, B))
    assert again.status.nodes == "2/2"
    (changed,) = statuses(policy(status=first.status, generation=3), pods=PODS, reports=(A, B))
    assert changed.status.observed_generation == 3 and changed.status.nodes == "0/2"


def test_without_settings_nothing_is_said() -> None:
    assert statuses(policy(), pods=PODS, settings=None) == []


def test_selections_remember_and_forget() -> None:
    web, everything = selector(app="web"), Selector()
    memory = Selections()
    assert memory.update([web], frozenset({WEB, API})) == {web: {WEB}}
    assert memory.update([web, everything], frozenset({API})) == {web: frozenset(), everything: {API}}
    assert memory.update([everything], frozenset({WEB, DB})) == {everything: {WEB, DB}}
    assert memory.update([web], frozenset({WEB, DB})) == {web: {WEB}}


def test_a_policys_projection() -> None:
    source: dict[str, Any] = {
        "metadata": {"name": "p", "namespace": "shop", "uid": "u", "resourceVersion": "3", "generation": 2},
        "spec": {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [], "mode": "Audit"},
        "status": {"nodes": "1/2", "wouldDeny": 4, "observedGeneration": 1},
    }
    read = PolicyObject.from_object(source, Kind.MESH_POLICY)
    assert read.selector == selector(app="web", **{NAMESPACE_LABEL: "shop"})
    assert (read.mode, read.key, read.problem) == (PolicyMode.AUDIT, "shop/p", "")
    assert read.status == PolicyStatus(observed_generation=1, nodes="1/2", would_deny=4)
    source["spec"]["ingress"] = [{"fromMoon": []}]
    refused = PolicyObject.from_object(source, Kind.MESH_POLICY)
    assert refused.selector is None and refused.problem.startswith("spec.ingress[0]")


def test_a_report_is_read_as_it_was_written() -> None:
    one = replace(
        report("a", InForce("p", 2, 3), failed=(Failure("q", 1, "MapFull", "too many"),)),
        pressure=(MapPressure("cidrs", 90, 100), MapPressure("policy", 100, 100, True, 7)),
    )
    owner = {"ownerReferences": [{"kind": "Node", "uid": "n"}]}
    read = MeshPolicyReport.from_object({"metadata": {"name": "a", **owner}, "status": one.to_dict()})
    assert read == replace(one, owner="n")
    assert MeshPolicyReport.from_object({"metadata": {"name": "a"}}) == MeshPolicyReport(name="a")


# Watches.


def test_a_list_tells_what_is_gone() -> None:
    seen: list[tuple[str, str]] = []
    woken: list[None] = []
    watch = Watch[Pod](
        "/api/v1/pods",
        Pod.from_object,
        key=lambda metadata: str(metadata["name"]),
        gone=lambda key, uid: seen.append((key, uid)),
        changed=lambda: woken.append(None),
    )
    one = watch._entry(pod_object())
    watch._replace([one])
    assert watch.complete and watch.items == {"web-1": one[2]} and woken
    woken.clear()
    watch._put(*one)
    assert not woken
    # The same name, another object.
    watch._replace([("web-1", "other", one[2])])
    assert seen == [("web-1", "u")] and watch.items == {"web-1": one[2]}
    # The end of the first one comes late.
    watch._put("web-1", "u", None, gone=True)
    assert watch.items
    # It has ended, and counts as absent.
    watch._put("web-1", "other", None)
    assert not watch.items and seen == [("web-1", "u")] * 2


# The operator in a world that changes under its hands.

KINDS = ("pods", "namespaces", "identities", "slices")
PODS_OF = ("p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8", "p9")
APPS = ("web", "api", "db")
CAPACITY = 4


class Conflict(Exception):
    """What the API server answers with 404 or 409."""


@dataclass
class Server:
    """Every version there ever was of each kind, by name."""

    history: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [{}] for kind in KINDS})
    version: int = 0
    writes: int = 0

    def now(self, kind: str) -> dict[str, Any]:
        return self.history[kind][-1]

    def write(self, kind: str, key: str, item: Any) -> Any:
        self.version += 1
        if kind in ("identities", "slices"):
            item = replace(item, resource_version=str(self.version))
        self.history[kind].append({**self.now(kind), key: item})
        return item

    def remove(self, kind: str, key: str) -> None:
        self.version += 1
        self.history[kind].append({name: item for name, item in self.now(kind).items() if name != key})


class PolicyMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(slices, "MAX_ENDPOINTS", CAPACITY)
        self.patch.setattr(slices, "SMALL", 2)
        self.patch.setattr(slices, "MERGED", 3)
        self.server = Server()
        self.seen = dict.fromkeys(KINDS, 0)
        self.overlays: dict[str, Overlay[Any]] = {"identities": Overlay(), "slices": Overlay()}
        self.clock = NOW
        self.serial = 0
        self.recent: dict[int, datetime] = {}
        self.meaning: dict[int, tuple[Any, datetime]] = {}
        """Of each number: the labels it last stood for, and when an endpoint had it last."""
        self.tampered: set[int] = set()
        self.server.write("namespaces", "shop", SHOP)
        self.relist()

    def teardown(self) -> None:
        self.patch.undo()

    # What happens to the cluster.

    @initialize(count=st.integers(0, 10), settled=st.booleans())
    def begin(self, count: int, settled: bool) -> None:
        self.add_pods(count)
        if settled:
            self.settle()

    @rule(count=st.integers(1, 10))
    def add_pods(self, count: int) -> None:
        for number in range(count):
            self.add_pod(PODS_OF[number], APPS[number % 3], number + 1, "a")

    @rule(first=st.integers(0, 9), count=st.integers(1, 5))
    def replace_pods(self, first: int, count: int) -> None:
        """Others come with the very same addresses."""
        for name in PODS_OF[first : first + count]:
            for each in self.named(name):
                self.server.remove("pods", each.uid)
                self.serial += 1
                uid = f"{name}-{self.serial}"
                self.server.write("pods", uid, replace(each, uid=uid, labels=(("app", "db"),)))

    @rule(
        name=st.sampled_from(PODS_OF),
        app=st.sampled_from(APPS),
        address=st.integers(0, 14),
        node=st.sampled_from("ab"),
    )
    def add_pod(self, name: str, app: str, address: int, node: str) -> None:
        """Addresses are few: pods claim the same, or have it one after another. 0: none yet."""
        if any(each.name == name for each in self.server.now("pods").values()):
            return
        self.serial += 1
        self.clock += timedelta(seconds=1)
        new = pod(
            f"{name}-{self.serial}",
            f"10.9.0.{address}" if address else "",
            node=node,
            app=app,
            created=self.clock.isoformat(),
        )
        self.server.write("pods", new.uid, replace(new, name=name))

    @rule(name=st.sampled_from(PODS_OF))
    def remove_pod(self, name: str) -> None:
        for each in self.named(name):
            self.server.remove("pods", each.uid)

    @rule(names=st.sets(st.sampled_from(PODS_OF), min_size=3))
    def remove_pods(self, names: set[str]) -> None:
        for name in sorted(names):
            self.remove_pod(name)

    @rule(name=st.sampled_from(PODS_OF), app=st.integers(0, 30), claimed=st.booleans())
    def relabel_pod(self, name: str, app: int, claimed: bool) -> None:
        """`claimed`: while it waits for its new identity, another pod claims its address."""
        for each in self.named(name):
            self.server.write("pods", each.uid, replace(each, labels=(("app", f"app-{app}"),)))
            if claimed and each.addresses and not self.named("claimant"):
                self.serial += 1
                claimant = replace(each, uid=f"claimant-{self.serial}", name="claimant", created="9")
                self.server.write("pods", claimant.uid, claimant)
                self.watch_brings_news("pods", len(self.server.history["pods"]))

    @rule()
    def claimant_goes(self) -> None:
        self.remove_pod("claimant")

    @rule(count=st.integers(1, 5))
    def all_go_and_come_back(self, count: int) -> None:
        for name in (*PODS_OF, "claimant"):
            self.remove_pod(name)
        self.settle()
        self.add_pods(count)
        self.watch_brings_news("pods", len(self.server.history["pods"]))

    @rule(name=st.sampled_from(PODS_OF), address=st.integers(1, 12))
    def address_pod(self, name: str, address: int) -> None:
        for each in self.named(name):
            if not each.addresses:
                addresses = (ip_address(f"10.9.0.{address}"),)
                self.server.write("pods", each.uid, replace(each, addresses=addresses))

    @rule(team=st.sampled_from("xy"))
    def relabel_namespace(self, team: str) -> None:
        self.server.write("namespaces", "shop", Namespace(name="shop", labels=(("team", team),)))

    @rule(seconds=st.sampled_from((1, 60, 400, 1000)))
    def time_passes(self, seconds: int) -> None:
        self.clock += timedelta(seconds=seconds)

    @rule(choice=st.integers(0, 5))
    def delete_slice_by_hand(self, choice: int) -> None:
        names = sorted(self.server.now("slices"))
        if choice < len(names):
            self.server.remove("slices", names[choice])

    @rule(choice=st.integers(0, 5))
    def delete_identity_by_hand(self, choice: int) -> None:
        names = sorted(self.server.now("identities"))
        if choice < len(names):
            self.tampered.add(int(names[choice]))
            self.server.remove("identities", names[choice])

    @rule(choice=st.integers(0, 5), number=st.integers(256, 300))
    def another_operator_allocated_too(self, choice: int, number: int) -> None:
        known = self.server.now("identities")
        names = sorted(known)
        if choice < len(names) and str(number) not in known:
            self.tampered.add(number)
            self.write_identity(identity(number, known[names[choice]].labels))

    def named(self, name: str) -> list[Pod]:
        return [each for each in self.server.now("pods").values() if each.name == name]

    # What the operator sees and does.

    @rule(kind=st.sampled_from(KINDS), versions=st.integers(1, 5))
    def watch_brings_news(self, kind: str, versions: int) -> None:
        for _ in range(versions):
            if self.seen[kind] == len(self.server.history[kind]) - 1:
                return
            before = self.watched(kind)
            self.seen[kind] += 1
            for name in before.keys() - self.watched(kind).keys():
                if kind in self.overlays:
                    self.overlays[kind].deletion_seen(name, before[name].uid)
                if kind == "identities":
                    self.recent[int(name)] = self.clock

    @rule()
    def another_leader_takes_over(self) -> None:
        self.overlays = {"identities": Overlay(), "slices": Overlay()}
        self.recent = {}
        self.relist()

    @rule()
    def everything_is_seen_and_written(self) -> None:
        for kind in KINDS:
            self.watch_brings_news(kind, len(self.server.history[kind]))
        for action in reconcile(self.inputs()).actions:
            self.try_to(action)

    @rule(writes=st.integers(0, 4), order=st.randoms(use_true_random=False), unheard=st.booleans())
    def look_and_write(self, writes: int, order: Any, unheard: bool) -> None:
        """One round, cut short after some writes, in any order; the answer to the last one may be lost."""
        actions = list(reconcile(self.inputs()).actions)
        order.shuffle(actions)
        for number, action in enumerate(actions[:writes], 1):
            self.try_to(action, heard=not (unheard and number == writes))

    def relist(self) -> None:
        for kind in self.overlays:
            self.overlays[kind].listed(
                self.server.now(kind).values(), self.watched(kind), str(self.server.version)
            )

    def watched(self, kind: str) -> dict[str, Any]:
        return self.server.history[kind][self.seen[kind]]

    def inputs(self) -> Inputs:
        return inputs(
            namespaces=self.watched("namespaces"),
            pods=self.watched("pods"),
            identities=self.overlays["identities"].over(self.watched("identities")),
            slices=self.overlays["slices"].over(self.watched("slices")),
            recent=dict(self.recent),
            now=self.clock,
        )

    def try_to(self, action: Action, *, heard: bool = True) -> None:
        before = self.published()
        try:
            self.apply(action, heard=heard)
        except Conflict:
            self.relist()
            return
        if not heard:
            self.relist()
        self.check_nobody_was_lost(before)

    def apply(self, action: Action, *, heard: bool) -> None:
        """As the API server would: writes to what has changed since are refused."""
        known, packed = self.server.now("identities"), self.server.now("slices")
        self.server.writes += 1
        match action:
            case CreateIdentity(number, labels):
                if str(number) in known:
                    raise Conflict
                self.serial += 1
                created = self.write_identity(
                    Identity(name=str(number), uid=f"identity-{self.serial}", labels=labels)
                )
                if heard:
                    self.overlays["identities"].wrote(created)
            case MarkIdentity(identity=old):
                self.check_version(known, old)
                written = self.server.write(
                    "identities", old.name, replace(known[old.name], unused_since=action.unused_since)
                )
                if heard:
                    self.overlays["identities"].wrote(written)
            case DeleteIdentity(old):
                self.check_version(known, old)
                used = {each.identity for current in packed.values() for each in current.endpoints}
                assert old.number not in used, "deleted while endpoints had it"
                self.server.remove("identities", old.name)
                if heard:
                    self.recent[old.number] = self.clock
                    self.overlays["identities"].deleted(old.name, old.uid)
            case CreateSlice(name, endpoints):
                if name in packed:
                    raise Conflict
                self.serial += 1
                self.write_slice(
                    Slice(name=name, uid=f"slice-{self.serial}", endpoints=endpoints), heard=heard
                )
            case WriteSlice(slice=current, endpoints=endpoints):
                self.check_version(packed, current)
                self.write_slice(replace(packed[current.name], endpoints=endpoints), heard=heard)
            case DeleteSlice(current):
                self.check_version(packed, current)
                self.server.remove("slices", current.name)
                if heard:
                    self.overlays["slices"].deleted(current.name, current.uid)
            case _:
                raise AssertionError(action)

    def check_version(self, known: Mapping[str, Any], old: Any) -> None:
        found = known.get(old.name)
        if found is None or found.uid != old.uid or found.resource_version != old.resource_version:
            raise Conflict

    def write_identity(self, new: Identity) -> Identity:
        labels, last = self.meaning.get(new.number, (new.labels, None))
        if labels != new.labels and new.number not in self.tampered:
            assert last is None or self.clock - last >= GRACE, "a number was given to others too soon"
        self.meaning[new.number] = (new.labels, self.meaning.get(new.number, (None, None))[1])  # type: ignore[assignment]
        written: Identity = self.server.write("identities", new.name, new)
        return written

    def write_slice(self, new: Slice, *, heard: bool) -> None:
        known = self.server.now("identities")
        old = self.published()
        for each in new.endpoints:
            if each.identity not in old.get(each.pod.uid, {}) and each.identity not in self.tampered:
                used = known.get(str(each.identity))
                assert used is not None, "an endpoint before its identity"
                assert used.unused_since is None, "an endpoint whose identity may go any moment"
        written = self.server.write("slices", new.name, new)
        if heard:
            self.overlays["slices"].wrote(written)

    def published(self) -> dict[str, dict[int, set[str]]]:
        """Slices by pod and identity."""
        result: dict[str, dict[int, set[str]]] = {}
        for name, current in self.server.now("slices").items():
            for each in current.endpoints:
                result.setdefault(each.pod.uid, {}).setdefault(each.identity, set()).add(name)
        return result

    # What must hold.

    def check_nobody_was_lost(self, before: Mapping[str, object]) -> None:
        """But for those who lose their address to another pod."""
        there, live = self.published(), self.server.now("pods")
        claims = [each.addresses for each in self.watched("pods").values()]
        for uid in before:
            if uid in live and uid not in there:
                assert claims.count(live[uid].addresses) > 1, f"{uid} was unpublished for a moment"

    @invariant()
    def numbers_in_use_are_remembered(self) -> None:
        for current in self.server.now("slices").values():
            for each in current.endpoints:
                if each.identity in self.meaning:
                    self.meaning[each.identity] = (self.meaning[each.identity][0], self.clock)

    @invariant()
    def an_address_is_one_pods(self) -> None:
        owners: dict[Any, str] = {}
        for current in self.server.now("slices").values():
            assert 0 < len(current.endpoints) <= CAPACITY
            for each in current.endpoints:
                for address in each.addresses:
                    assert owners.setdefault(address, each.pod.uid) == each.pod.uid

    @rule()
    def left_in_peace_all_comes_right(self) -> None:
        self.settle()
        live = self.server.now("pods")
        known = self.server.now("identities")
        namespace = self.server.now("namespaces")["shop"]
        there = self.published()
        assert there.keys() <= live.keys()
        published = {
            address
            for current in self.server.now("slices").values()
            for each in current.endpoints
            for address in each.addresses
        }
        assert published == {address for each in live.values() for address in each.addresses}
        numbers: dict[Any, int] = {}
        for uid, found in there.items():
            ((number, names),) = found.items()
            assert len(names) == 1, "an endpoint in two slices"
            labels = policyreconcile.pod_labels(live[uid], namespace, ON.excluded_labels)
            assert known[str(number)].labels == labels
            assert numbers.setdefault(labels, number) == number, "two numbers for one label set"
            assert number == min(int(name) for name, each in known.items() if each.labels == labels)
        sizes = sorted(len(current.endpoints) for current in self.server.now("slices").values())
        assert len(sizes) < 2 or sizes[0] + sizes[1] > 3 or sizes[0] > 2, "nearly empty slices stay"

    @rule(app=st.sampled_from(APPS))
    def one_more_pod_changes_one_slice(self, app: str) -> None:
        self.settle()
        self.add_pod("one-more", app, 100, "a")
        before, writes = self.server.now("slices"), self.server.writes
        for kind in KINDS:
            self.watch_brings_news(kind, len(self.server.history[kind]))
        for _ in range(2):
            for action in reconcile(self.inputs()).actions:
                self.try_to(action)
        after = self.server.now("slices")
        assert len([name for name in after if before.get(name) != after[name]]) <= 1
        # Its identity is made, or found again, and the slice is written.
        assert self.server.writes - writes <= 2
        self.remove_pod("one-more")

    def settle(self) -> None:
        for _ in range(40):
            for kind in KINDS:
                self.watch_brings_news(kind, len(self.server.history[kind]))
            actions = reconcile(self.inputs()).actions
            if not actions:
                return
            for action in actions:
                self.try_to(action)
        raise AssertionError(f"never at rest: {actions}")


TestPolicyMachine = PolicyMachine.TestCase
TestPolicyMachine.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
