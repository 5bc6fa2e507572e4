"""Values that both the evaluator and the compiler of policies work on. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshwire.api.fields import Address
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    Operator,
    Policy,
    Protocol,
    Requirement,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.policy.selectors import matches

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
SCTP: Final = 132

PROTOCOLS: Final[Mapping[Protocol, tuple[int, ...]]] = {
    Protocol.ANY: (TCP, UDP, SCTP),
    Protocol.TCP: (TCP,),
    Protocol.UDP: (UDP,),
    Protocol.SCTP: (SCTP,),
}
"""IPPROTO numbers."""
ICMP_FAMILIES: Final[Mapping[int, int]] = {4: ICMP, 6: ICMPV6}
"""IP version -> IPPROTO number of its ICMP."""

NamedPorts = Mapping[str, frozenset[tuple[int, int]]]
"""Name of a container port -> (IPPROTO number, port). Containers may give one name to several."""


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """`labels` are the Service's own. `selector` None: it has none; then `addresses`, those of its
    EndpointSlices, are its endpoints."""

    labels: Mapping[str, str] = field(default_factory=dict)
    selector: Mapping[str, str] | None = None
    addresses: frozenset[Address] = frozenset()

    def pods(self, namespace: str) -> Selector | None:
        """What selects its endpoints. A selector that is empty counts as none, as in Kubernetes."""
        if not self.selector:
            return None
        pairs = {**self.selector, NAMESPACE_LABEL: namespace}
        return Selector(tuple(Requirement(key, Operator.IN, (pairs[key],)) for key in sorted(pairs)))


def names_service(peer: ServicePeer, namespace: str, name: str, labels: Mapping[str, str]) -> bool:
    """Whether a rule's peer means the Service."""
    if peer.namespace and peer.namespace != namespace:
        return False
    return peer.name == name if peer.name else matches(peer.labels, labels)


def rank(policy: Policy, rule: Rule) -> tuple[str, ...]:
    """Of several rules that decide the same, the first by this is the one that is named."""
    return policy.kind, policy.namespace, policy.name, policy.uid, rule.path
