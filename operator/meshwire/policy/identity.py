"""Identity numbers, and the labels that an identity stands for. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Final

from meshwire.api import meshidentity
from meshwire.api.meshconfig import EXCLUDED_LABELS
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    NAMESPACE_LABELS_PREFIX,
    SERVICE_ACCOUNT_LABEL,
    Entity,
)

Labels = tuple[tuple[str, str], ...]
"""Sorted pairs: equal label sets are equal values."""

UNKNOWN: Final = 0
"""An address of the cluster of which nobody knows yet whose it is. No label selector matches it."""
HOST: Final = 1
"""The node itself."""
WORLD: Final = 2
"""Whatever is not of this cluster."""
REMOTE_NODE: Final = 6
APISERVER: Final = 7
"""An API server outside of the cluster's nodes: part of the world, too."""
APISERVER_NODE: Final = 8
"""An API server on another node."""
APISERVER_HOST: Final = 9
"""An API server on this node."""
FIRST_POD: Final = meshidentity.FIRST
LAST_POD: Final = meshidentity.LAST
"""Pod identities are FIRST_POD to LAST_POD; the operator gives them out (MeshIdentity)."""

CIDR: Final = 1 << 24
"""Number of a CIDR block: CIDR plus the node's own number of the block. Stands for the addresses in it that
are outside of the cluster."""
CIDR_INSIDE: Final = CIDR | 1 << 25
"""The same for those addresses that are of the cluster: pods', nodes', and unknown ones."""
MAX_CIDRS: Final = 1 << 24

PROVISIONAL: Final = 1 << 27
"""PROVISIONAL plus the node's own number: labels of a pod of this node that the operator has not numbered
yet. Other nodes know such a pod as UNKNOWN; its own node doesn't have to wait."""

ANY: Final = 2**32 - 1
"""In the policy map only: whoever it is."""

ENTITIES: Final[Mapping[Entity, frozenset[int]]] = {
    Entity.ALL: frozenset({ANY}),
    Entity.CLUSTER: frozenset({UNKNOWN, HOST, REMOTE_NODE, APISERVER_NODE, APISERVER_HOST}),
    Entity.HOST: frozenset({HOST, APISERVER_HOST}),
    Entity.KUBE_APISERVER: frozenset({APISERVER, APISERVER_NODE, APISERVER_HOST}),
    Entity.REMOTE_NODE: frozenset({REMOTE_NODE, APISERVER_NODE}),
    Entity.WORLD: frozenset({WORLD, APISERVER}),
}
"""The reserved numbers of each entity. `cluster` also has every pod identity."""

NAMES: Final[Mapping[int, str]] = {
    UNKNOWN: "unknown",
    HOST: "host",
    WORLD: "world",
    REMOTE_NODE: "remote-node",
    APISERVER: "kube-apiserver (world)",
    APISERVER_NODE: "kube-apiserver (remote-node)",
    APISERVER_HOST: "kube-apiserver (host)",
}
"""What people call the reserved numbers."""

HIGH_CARDINALITY: Final = EXCLUDED_LABELS
"""Labels that tell one pod from its siblings. They are no part of identities unless the MeshConfig says so:
each would make an identity of its own for every pod or every rollout."""


def is_pod(number: int) -> bool:
    return FIRST_POD <= number <= LAST_POD or PROVISIONAL <= number < 2 * PROVISIONAL


def identity_labels(
    *,
    namespace: str,
    namespace_labels: Mapping[str, str],
    service_account: str,
    pod_labels: Mapping[str, str],
    excluded: Container[str] = HIGH_CARDINALITY,
) -> Labels:
    """What an identity stands for. A pod's own labels can't pass for those that Meshwire derives: a key with
    one of their names is left out."""
    labels = {
        key: value
        for key, value in pod_labels.items()
        if key not in excluded and key not in _DERIVED and not key.startswith(NAMESPACE_LABELS_PREFIX)
    }
    labels |= {f"{NAMESPACE_LABELS_PREFIX}{key}": value for key, value in namespace_labels.items()}
    labels[NAMESPACE_LABEL] = namespace
    labels[SERVICE_ACCOUNT_LABEL] = service_account or "default"
    return sorted_labels(labels.items())


def sorted_labels(pairs: Iterable[tuple[str, str]]) -> Labels:
    return tuple(sorted(pairs))


_DERIVED: Final = frozenset({NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL})
