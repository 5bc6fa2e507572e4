"""Identities and endpoints: from what is known of the cluster to what is to be written next. Pure: inputs
in, actions out, as in `meshwire.operator.reconcile`. What becomes of policies themselves is in
`meshwire.operator.policystatus`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache

from meshwire.api.fields import Address
from meshwire.api.meshconfig import PolicySettings
from meshwire.api.meshendpointslice import Endpoint, PodRef
from meshwire.api.meshnode import MeshNode
from meshwire.api.meshpolicyreport import MeshPolicyReport
from meshwire.operator import identities, slices
from meshwire.operator.identities import IdentityAction
from meshwire.operator.objects import Identity, Namespace, Pod, Slice
from meshwire.operator.slices import DeleteSlice, SliceAction
from meshwire.policy.identity import Labels, identity_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything by name, but pods by uid. `settings` None: what is wanted can't be told. `recent`:
    numbers of identities that were deleted, and when. `without_cidr` are nodes that encryption needs pods'
    single addresses of."""

    settings: PolicySettings | None
    mesh_nodes: Mapping[str, MeshNode]
    namespaces: Mapping[str, Namespace]
    pods: Mapping[str, Pod]
    identities: Mapping[str, Identity]
    slices: Mapping[str, Slice]
    reports: Mapping[str, MeshPolicyReport]
    recent: Mapping[int, datetime]
    now: datetime
    without_cidr: Set[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class CreateReport:
    """An empty MeshPolicyReport, which the node's agent then fills. It goes with the Node."""

    node: str
    owner: str
    """uid of the Node"""


@dataclass(frozen=True, slots=True)
class DeleteReport:
    report: MeshPolicyReport


@dataclass(frozen=True, slots=True)
class DeleteUnused:
    """An identity, in whatever state: policy is off."""

    identity: Identity


Action = IdentityAction | SliceAction | CreateReport | DeleteReport | DeleteUnused


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`contested`: addresses that several pods claim, one of which has it. `families`: IP versions of pods
    on nodes without pod CIDR."""

    actions: tuple[Action, ...] = ()
    endpoints: int = 0
    contested: int = 0
    families: frozenset[int] = frozenset()


def reconcile(inputs: Inputs) -> Plan:
    """The next writes."""
    if inputs.settings is None:
        return Plan()
    if not inputs.settings.enabled and not inputs.without_cidr:
        return Plan(actions=tuple(_clean_up(inputs)))
    # Encryption alone needs no identities. Endpoints have them nevertheless: what is published then is the
    # same whatever it is for, and turning policy on rewrites none of it.
    labels = {
        uid: pod_labels(pod, inputs.namespaces[pod.namespace], inputs.settings.excluded_labels)
        for uid, pod in inputs.pods.items()
        if pod.namespace in inputs.namespaces
    }
    chosen = identities.by_labels(inputs.identities.values())
    # What is marked as unused may be deleted any moment: an endpoint that needs it waits until it isn't.
    usable = {each: identity.number for each, identity in chosen.items() if identity.unused_since is None}
    wanted: dict[str, Endpoint] = {}
    undecided: set[str] = set()
    for uid, pod in inputs.pods.items():
        number = usable.get(labels[uid]) if uid in labels else None
        if number is None:
            undecided.add(uid)
        elif pod.node and pod.addresses:
            wanted[uid] = endpoint(pod, number)
    contested = _settle(wanted, inputs)
    referred = {each.identity for current in inputs.slices.values() for each in current.endpoints}
    actions: list[Action] = [
        *identities.plan(
            wanted=set(labels.values()),
            referred=referred,
            identities=inputs.identities.values(),
            recent=inputs.recent,
            now=inputs.now,
        ),
        *slices.pack(inputs.slices, wanted, undecided),
        *_report_actions(inputs),
    ]
    families = frozenset(
        address.version
        for each in wanted.values()
        if each.node in inputs.without_cidr
        for address in each.addresses
    )
    return Plan(actions=tuple(actions), endpoints=len(wanted), contested=contested, families=families)


def _report_actions(inputs: Inputs) -> Iterable[Action]:
    if inputs.settings and inputs.settings.enabled:
        for name, node in sorted(inputs.mesh_nodes.items()):
            if node.owner and name not in inputs.reports:
                yield CreateReport(name, node.owner)
    else:
        yield from (DeleteReport(report) for _, report in sorted(inputs.reports.items()))


def pod_labels(pod: Pod, namespace: Namespace, excluded: frozenset[str]) -> Labels:
    """What the pod's identity stands for."""
    return _labels(namespace.name, namespace.labels, pod.service_account, pod.labels, excluded)


@lru_cache(maxsize=16384)
def _labels(
    namespace: str, namespace_labels: Labels, account: str, labels: Labels, excluded: frozenset[str]
) -> Labels:
    return identity_labels(
        namespace=namespace,
        namespace_labels=dict(namespace_labels),
        service_account=account,
        pod_labels=dict(labels),
        excluded=excluded,
    )


def endpoint(pod: Pod, number: int) -> Endpoint:
    return Endpoint(
        addresses=pod.addresses,
        identity=number,
        node=pod.node,
        pod=PodRef(pod.namespace, pod.name, pod.uid),
        ports=pod.ports,
    )


def _clean_up(inputs: Inputs) -> Iterable[Action]:
    yield from (DeleteSlice(current) for _, current in sorted(inputs.slices.items()))
    yield from (DeleteUnused(identity) for _, identity in sorted(inputs.identities.items()))
    yield from (DeleteReport(report) for _, report in sorted(inputs.reports.items()))


def _settle(wanted: dict[str, Endpoint], inputs: Inputs) -> int:
    """Leaves every address with one pod, and none with a pod that is a node's own; tells how many were
    claimed by several."""
    nodes = {address for node in inputs.mesh_nodes.values() for address in node.spec.addresses}
    owners: dict[Address, str] = {}
    claims: dict[Address, set[str]] = {}
    for uid, each in wanted.items():
        for address in each.addresses:
            if address in nodes:
                claims[address] = set()
            elif (other := owners.setdefault(address, uid)) != uid:
                claims.setdefault(address, {other}).add(uid)
    if not claims:
        return 0
    holders = _holders(inputs.slices, claims.keys())
    for address, claimants in claims.items():
        winner = _winner(address, claimants, holders.get(address, ""), inputs) if claimants else ""
        for uid in claimants or [uid for uid, each in wanted.items() if address in each.addresses]:
            if uid != winner:
                left = tuple(kept for kept in wanted[uid].addresses if kept != address)
                wanted[uid] = replace(wanted[uid], addresses=left)
    for uid in [uid for uid, each in wanted.items() if not each.addresses]:
        del wanted[uid]
    return len(claims)


def _holders(current: Mapping[str, Slice], addresses: Set[Address]) -> dict[Address, str]:
    return {
        address: each.pod.uid
        for _, old in sorted(current.items())
        for each in old.endpoints
        for address in each.addresses
        if address in addresses
    }


def _winner(address: Address, claimants: Set[str], holder: str, inputs: Inputs) -> str:
    """No node can take another's address: the node whose pod CIDR it is comes first, then the one that has
    it, then the one of the oldest pod. On that node the youngest pod has it: it was given out again."""
    pods = [inputs.pods[uid] for uid in claimants]

    def rank(pod: Pod) -> tuple[bool, bool, str, str]:
        node = inputs.mesh_nodes.get(pod.node)
        inside = node is not None and any(address in cidr for cidr in node.spec.pod_cidrs)
        return not inside, pod.uid != holder, pod.created, pod.uid

    node = min(pods, key=rank).node
    return max((pod for pod in pods if pod.node == node), key=lambda pod: (pod.created, pod.uid)).uid
