"""The cluster's pod CIDRs, as kubeadm's and kube-proxy's configurations tell them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import combinations
from typing import Any, Final

import yaml

from meshwire.api.fields import Network
from meshwire.operator.objects import Node

NAMESPACE: Final = "kube-system"
SOURCES: Final = ("kubeadm-config", "kube-proxy")
"""ConfigMaps, the first that tells something wins."""


class UnreadableCIDRs(Exception):
    """A ConfigMap holds something that is no list of CIDR blocks."""


def cluster_cidrs(name: str, data: Mapping[str, str]) -> tuple[Network, ...]:
    """What the data of ConfigMap `name` tells; empty where it tells nothing. Raises UnreadableCIDRs."""
    document, *path = {
        "kubeadm-config": ("ClusterConfiguration", "networking", "podSubnet"),
        "kube-proxy": ("config.conf", "clusterCIDR"),
    }[name]
    try:
        value: Any = yaml.safe_load(data.get(document, "")) or {}
        for field in path:
            value = (value.get(field) if isinstance(value, Mapping) else None) or {}
        if not value:
            return ()
        blocks = tuple(ip_network(text.strip()) for text in str(value).split(","))
    except (yaml.YAMLError, ValueError) as error:
        raise UnreadableCIDRs(f"ConfigMap {NAMESPACE}/{name}: {error}") from None
    if any(one.overlaps(other) for one, other in combinations(blocks, 2)):
        raise UnreadableCIDRs(f"ConfigMap {NAMESPACE}/{name}: {value} overlap")
    return blocks


@dataclass(frozen=True, slots=True)
class Published:
    """What MeshEndpointSlices tell of the pods on nodes without CIDR. `complete`: all that there were when
    encryption was asked for. `families`: their IP versions."""

    complete: bool = False
    families: frozenset[int] = frozenset()


def without_cidr(nodes: Iterable[Node], *, also_dead: bool = False) -> frozenset[str]:
    """Names of those that have no pod CIDR; of live ones only, or of dead ones too."""
    return frozenset(node.name for node in nodes if not node.pod_cidrs and (node.live or also_dead))


def covers(cidrs: Iterable[Network], block: Network) -> bool:
    return any(cidr.version == block.version and block.subnet_of(cidr) for cidr in cidrs)  # type: ignore[arg-type]
