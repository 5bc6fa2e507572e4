"""MeshPolicy, ClusterMeshPolicy and NetworkPolicy as one kind of value: whom a policy selects, and what it
lets them do. `from_object` of each kind is in `meshwire.api.policyobjects`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from meshwire.api.conditions import Condition
from meshwire.api.fields import Network

NAMESPACE_LABEL: Final = "io.kubernetes.pod.namespace"
"""Of every pod identity: its namespace. A selector may write it with the prefix `k8s:`."""
NAMESPACE_LABELS_PREFIX: Final = "io.cilium.k8s.namespace.labels."
"""Followed by the key of a label of the pod's namespace."""
SERVICE_ACCOUNT_LABEL: Final = "io.cilium.k8s.policy.serviceaccount"


class Kind(StrEnum):
    MESH_POLICY = "MeshPolicy"
    CLUSTER_MESH_POLICY = "ClusterMeshPolicy"
    NETWORK_POLICY = "NetworkPolicy"


class PolicyMode(StrEnum):
    ENFORCE = "Enforce"
    AUDIT = "Audit"


class Direction(StrEnum):
    """Seen from the selected pods."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Entity(StrEnum):
    ALL = "all"
    CLUSTER = "cluster"
    HOST = "host"
    KUBE_APISERVER = "kube-apiserver"
    REMOTE_NODE = "remote-node"
    WORLD = "world"


class Protocol(StrEnum):
    ANY = "ANY"
    """TCP, UDP and SCTP."""
    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class Operator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """On one label. `key` has no source prefix any more (`k8s:`, `any:`); `values` are sorted, and empty for
    Exists and DoesNotExist."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selector:
    """All requirements hold; none at all selects every pod identity. A matchLabels pair is an In of one
    value. Sorted, without duplicates, so that equal selectors are equal values. It selects pods alone, never
    entities or addresses. What a namespace means for it is in it already, as requirements on
    NAMESPACE_LABEL."""

    requirements: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True)
class CidrPeer:
    """Addresses in `cidr` that are in none of `excepts`. `pods`: of pods and nodes as well (NetworkPolicy's
    ipBlock); otherwise only addresses outside of the cluster match."""

    cidr: Network
    excepts: tuple[Network, ...] = ()
    pods: bool = False


@dataclass(frozen=True, slots=True)
class ServicePeer:
    """The endpoints of a Service: what its selector selects in its namespace, or, without selector, the
    addresses of its EndpointSlices. `labels` empty: the one of that name; otherwise those whose labels the
    selector matches (then `name` is empty). `namespace` empty: in all of them."""

    namespace: str = ""
    name: str = ""
    labels: Selector = field(default_factory=Selector)


Peer = Selector | CidrPeer | Entity | ServicePeer


@dataclass(frozen=True, slots=True)
class PortRange:
    """`first` to `last`, both included; 0 to 65535 is every port. `name` not empty: the port that the
    receiving pod's containers give this name, and `first` and `last` are 0."""

    protocol: Protocol = Protocol.ANY
    first: int = 0
    last: int = 65535
    name: str = ""


@dataclass(frozen=True, slots=True)
class IcmpType:
    """`family` 4: ICMP, 6: ICMPv6; `type` 0 to 255."""

    family: int
    type: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One item of a policy's rule lists. It holds for a packet whose other end is one of `peers` (None:
    whoever it is) and that goes to one of `ports` (None: whatever it is, ICMP and others too). An empty
    tuple matches nothing. `path` is where it is written, e.g. `spec.ingress[0]`."""

    direction: Direction
    path: str
    deny: bool = False
    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortRange | IcmpType, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`namespace` is empty for a ClusterMeshPolicy. `default_deny` are the directions in which the selected
    pods are allowed nothing but what some policy allows them."""

    kind: Kind
    namespace: str
    name: str
    uid: str = ""
    resource_version: str = field(default="", compare=False)
    generation: int = 0
    mode: PolicyMode = PolicyMode.ENFORCE
    selector: Selector
    default_deny: frozenset[Direction]
    rules: tuple[Rule, ...] = ()
    conditions: tuple[Condition, ...] = field(default=(), compare=False)

    @property
    def title(self) -> str:
        """As people name it, e.g. `MeshPolicy shop/frontend`."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
