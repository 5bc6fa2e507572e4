"""Policies read word by word: slow, and plain enough to check the compiler against. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from meshwire.api.fields import Address
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    NAMESPACE_LABELS_PREFIX,
    SERVICE_ACCOUNT_LABEL,
    CidrPeer,
    Direction,
    Entity,
    IcmpType,
    Operator,
    Peer,
    Policy,
    PolicyMode,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
)
from meshwire.policy.identity import (
    APISERVER,
    APISERVER_HOST,
    ENTITIES,
    HOST,
    NAMES,
    WORLD,
    is_pod,
)
from meshwire.policy.model import (
    ICMP,
    ICMP_FAMILIES,
    ICMPV6,
    PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    NamedPorts,
    ServiceInfo,
    names_service,
    rank,
)
from meshwire.policy.selectors import matches

_PROTOCOL_NAMES: Final = {ICMP: "ICMP", TCP: "TCP", UDP: "UDP", ICMPV6: "ICMPv6", SCTP: "SCTP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One end of a packet. `labels` are those of a pod's identity, `named_ports` what its containers name;
    both empty for anyone else. `services`: (namespace, name) -> those whose endpoint it is (services_of)."""

    identity: int
    labels: Mapping[str, str] = field(default_factory=dict)
    address: Address | None = None
    named_ports: NamedPorts = field(default_factory=dict)
    services: Mapping[tuple[str, str], ServiceInfo] = field(default_factory=dict)

    @property
    def is_pod(self) -> bool:
        return is_pod(self.identity)

    @property
    def name(self) -> str:
        """As people call it: `host`, `pod identity 300`."""
        return f"pod identity {self.identity}" if self.is_pod else NAMES.get(self.identity, "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """The first one of a flow. `protocol` is an IPPROTO number; `port` the destination's, `icmp_type` that
    of an ICMP packet."""

    source: Party
    destination: Party
    protocol: int
    port: int = 0
    icmp_type: int | None = None


class Reason(StrEnum):
    OWN_NODE = "OwnNode"
    """From the pod's own node: always let in."""
    RULE_DENIES = "RuleDenies"
    RULE_ALLOWS = "RuleAllows"
    DEFAULT_DENY = "DefaultDeny"
    """Some policy isolates the pod, and none allows it."""
    NOT_ISOLATED = "NotIsolated"
    """No policy isolates the pod in this direction."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` is the one that decided; None: it was the default. Of several the first by `model.rank`."""

    allowed: bool
    reason: Reason
    rule: tuple[Policy, Rule] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of both ends; None: that end is no pod, nobody asks it."""

    egress: Decision | None
    ingress: Decision | None

    @property
    def allowed(self) -> bool:
        return all(decision.allowed for decision in (self.egress, self.ingress) if decision is not None)


def services_of(
    services: Mapping[tuple[str, str], ServiceInfo],
    *,
    identity: int,
    labels: Mapping[str, str],
    address: Address | None,
) -> dict[tuple[str, str], ServiceInfo]:
    """Those of the cluster's Services whose endpoint a party is."""
    found = {}
    for (namespace, name), service in services.items():
        selector = service.pods(namespace)
        if selector is None:
            belongs = address in service.addresses
        else:
            belongs = is_pod(identity) and matches(selector, labels)
        if belongs:
            found[namespace, name] = service
    return found


def judge(
    policies: Iterable[Policy], packet: Packet, direction: Direction, *, audit: bool = False
) -> Decision:
    """By the rules of one end: the destination's for INGRESS, the source's for EGRESS. `audit`: as if
    policies in mode Audit were enforced."""
    _, peer = _ends(packet, direction)
    if direction is Direction.INGRESS and peer.identity in (HOST, APISERVER_HOST):
        return Decision(True, Reason.OWN_NODE)
    selecting = _selecting(policies, packet, direction, audit)
    for deny in (True, False):
        deciding = [
            (policy, rule)
            for policy in selecting
            for rule in policy.rules
            if rule.direction is direction and rule.deny is deny and holds(rule, packet)
        ]
        if deciding:
            reason = Reason.RULE_DENIES if deny else Reason.RULE_ALLOWS
            return Decision(not deny, reason, min(deciding, key=lambda pair: rank(*pair)))
    if any(direction in policy.default_deny for policy in selecting):
        return Decision(False, Reason.DEFAULT_DENY)
    return Decision(True, Reason.NOT_ISOLATED)


def decide(policies: Iterable[Policy], packet: Packet, *, audit: bool = False) -> Verdict:
    """By the rules of both ends, as far as they are pods."""
    policies = tuple(policies)
    return Verdict(
        judge(policies, packet, Direction.EGRESS, audit=audit) if packet.source.is_pod else None,
        judge(policies, packet, Direction.INGRESS, audit=audit) if packet.destination.is_pod else None,
    )


def holds(rule: Rule, packet: Packet) -> bool:
    """Whether a rule's peers and ports match; whose rule it is doesn't matter here."""
    _, other = _ends(packet, rule.direction)
    for peer in (Entity.ALL,) if rule.peers is None else rule.peers:
        found = _find(peer, other)
        if found is None:
            continue
        if rule.ports is None:
            return True
        for port in rule.ports:
            if _port_matches(port, packet, rule.direction, found):
                return True
    return False


class MissKind(StrEnum):
    LABEL = "Label"
    PORT = "Port"
    PROTOCOL = "Protocol"
    PEER = "Peer"
    NOTHING = "Nothing"
    """The rule lists no peers, or no ports: it matches nothing at all."""


@dataclass(frozen=True, slots=True)
class Miss:
    kind: MissKind
    text: str
    """What the packet is and what the rule wants, e.g. `label app is web, not db`."""


@dataclass(frozen=True, slots=True)
class NearMiss:
    """An allow rule that would have let the packet through but for `misses`; of its peers and ports the
    nearest ones."""

    policy: Policy
    rule: Rule
    misses: tuple[Miss, ...]

    @property
    def distance(self) -> int:
        return sum(_DISTANCE[miss.kind] for miss in self.misses)


_DISTANCE: Final = {
    MissKind.LABEL: 2,
    MissKind.PORT: 2,
    MissKind.PROTOCOL: 3,
    MissKind.PEER: 5,
    MissKind.NOTHING: 20,
}
"""One label or port is easily mistaken; somebody else's kind of peer is hardly meant."""


def near_misses(
    policies: Iterable[Policy], packet: Packet, direction: Direction, *, audit: bool = False
) -> list[NearMiss]:
    """Every allow rule of the policies that select the end which `judge` asks, unless it matches; the
    nearest first."""
    found = [
        NearMiss(policy, rule, _misses(rule, packet))
        for policy in _selecting(policies, packet, direction, audit)
        for rule in policy.rules
        if rule.direction is direction and not rule.deny and not holds(rule, packet)
    ]
    return sorted(found, key=lambda near: (near.distance, rank(near.policy, near.rule)))


class _Found(StrEnum):
    """By what a peer was found."""

    IDENTITY = "identity"
    ADDRESS = "address"


def _ends(packet: Packet, direction: Direction) -> tuple[Party, Party]:
    """Whose rules are asked, and who the other one is."""
    if direction is Direction.INGRESS:
        return packet.destination, packet.source
    return packet.source, packet.destination


def _selecting(
    policies: Iterable[Policy], packet: Packet, direction: Direction, audit: bool
) -> list[Policy]:
    subject, _ = _ends(packet, direction)
    return [
        policy
        for policy in policies
        if (audit or policy.mode is PolicyMode.ENFORCE)
        and subject.is_pod
        and matches(policy.selector, subject.labels)
    ]


def _find(peer: Peer, party: Party) -> _Found | None:
    """Whether `party` is one of those that `peer` means."""
    if isinstance(peer, Selector):
        return _Found.IDENTITY if party.is_pod and matches(peer, party.labels) else None
    if isinstance(peer, Entity):
        return _Found.IDENTITY if _is_of(peer, party) else None
    if isinstance(peer, CidrPeer):
        inside = (
            party.address is not None
            and party.address in peer.cidr
            and not any(party.address in hole for hole in peer.excepts)
        )
        return _Found.ADDRESS if inside and (peer.pods or _is_outside(party)) else None
    ways = {
        _Found.ADDRESS if service.pods(namespace) is None else _Found.IDENTITY
        for (namespace, name), service in party.services.items()
        if names_service(peer, namespace, name, service.labels)
    }
    return _Found.IDENTITY if _Found.IDENTITY in ways else _Found.ADDRESS if ways else None


def _is_of(entity: Entity, party: Party) -> bool:
    if entity is Entity.ALL:
        return True
    return party.identity in ENTITIES[entity] or (entity is Entity.CLUSTER and party.is_pod)


def _is_outside(party: Party) -> bool:
    return party.identity in (WORLD, APISERVER)


def _port_matches(wanted: PortRange | IcmpType, packet: Packet, direction: Direction, found: _Found) -> bool:
    if isinstance(wanted, IcmpType):
        return packet.protocol == ICMP_FAMILIES[wanted.family] and packet.icmp_type == wanted.type
    if packet.protocol not in PROTOCOLS[wanted.protocol]:
        return False
    if wanted.name:
        receiver = packet.destination
        if direction is Direction.EGRESS and (found is _Found.ADDRESS or not receiver.is_pod):
            # A block of addresses has no containers that could name a port.
            return False
        return (packet.protocol, packet.port) in receiver.named_ports.get(wanted.name, frozenset())
    return wanted.first <= packet.port <= wanted.last


def _misses(rule: Rule, packet: Packet) -> tuple[Miss, ...]:
    """What keeps a rule from matching, for the pair of a peer and a port that comes nearest."""
    if rule.peers == ():
        return (Miss(MissKind.NOTHING, "the rule names no peers: it matches nothing"),)
    if rule.ports == ():
        return (Miss(MissKind.NOTHING, "the rule names no ports: it matches nothing"),)
    _, other = _ends(packet, rule.direction)
    return min(
        (
            (*_peer_misses(peer, other), *_port_misses(port, packet, rule.direction, _find(peer, other)))
            for peer in rule.peers or (Entity.ALL,)
            for port in rule.ports or (None,)
        ),
        key=lambda misses: sum(_DISTANCE[miss.kind] for miss in misses),
    )


def _peer_misses(peer: Peer, party: Party) -> list[Miss]:
    if _find(peer, party) is not None:
        return []
    if isinstance(peer, Selector):
        if not party.is_pod:
            return [Miss(MissKind.PEER, f"{party.name} is no pod: label selectors match pods only")]
        return [
            Miss(MissKind.LABEL, _label_miss(requirement, party.labels.get(requirement.key)))
            for requirement in peer.requirements
            if not matches(Selector((requirement,)), party.labels)
        ]
    if isinstance(peer, Entity):
        return [Miss(MissKind.PEER, f"{party.name} is not of entity {peer}")]
    if isinstance(peer, CidrPeer):
        return [Miss(MissKind.PEER, _cidr_miss(peer, party))]
    place = f"namespace {peer.namespace}" if peer.namespace else "any namespace"
    what = f"Service {peer.name}" if peer.name else "the Services selected by their labels"
    return [Miss(MissKind.PEER, f"{party.name} is no endpoint of {what} in {place}")]


def _label_miss(requirement: Requirement, value: str | None) -> str:
    label = _label_name(requirement.key)
    wanted = " or ".join(requirement.values)
    if requirement.operator is Operator.EXISTS:
        return f"{label} is missing"
    if requirement.operator is Operator.DOES_NOT_EXIST:
        return f"{label} is {value}, and must not be there"
    if requirement.operator is Operator.NOT_IN:
        return f"{label} is {value}, and must not be"
    return f"{label} is missing, not {wanted}" if value is None else f"{label} is {value}, not {wanted}"


def _label_name(key: str) -> str:
    if key == NAMESPACE_LABEL:
        return "namespace"
    if key == SERVICE_ACCOUNT_LABEL:
        return "service account"
    if key.startswith(NAMESPACE_LABELS_PREFIX):
        return f"namespace label {key.removeprefix(NAMESPACE_LABELS_PREFIX)}"
    return f"label {key}"


def _cidr_miss(peer: CidrPeer, party: Party) -> str:
    if party.address is None:
        return f"{party.name} has no known address, {peer.cidr} is one of addresses"
    if party.address not in peer.cidr:
        return f"{party.address} is not in {peer.cidr}"
    for hole in peer.excepts:
        if party.address in hole:
            return f"{party.address} is in {hole}, which {peer.cidr} excepts"
    return f"{party.address} is of the cluster ({party.name}), {peer.cidr} means addresses outside of it"


def _port_misses(
    wanted: PortRange | IcmpType | None, packet: Packet, direction: Direction, found: _Found | None
) -> list[Miss]:
    if wanted is None or _port_matches(wanted, packet, direction, found or _Found.IDENTITY):
        return []
    protocol = _PROTOCOL_NAMES.get(packet.protocol, str(packet.protocol))
    if isinstance(wanted, IcmpType):
        name = _PROTOCOL_NAMES[ICMP_FAMILIES[wanted.family]]
        if packet.protocol != ICMP_FAMILIES[wanted.family]:
            return [Miss(MissKind.PROTOCOL, f"protocol is {protocol}, not {name}")]
        return [Miss(MissKind.PORT, f"{name} type is {packet.icmp_type}, not {wanted.type}")]
    if packet.protocol not in PROTOCOLS[wanted.protocol]:
        name = "TCP, UDP or SCTP" if wanted.protocol is Protocol.ANY else wanted.protocol
        return [Miss(MissKind.PROTOCOL, f"protocol is {protocol}, not {name}")]
    return [
        Miss(MissKind.PORT, f"port is {packet.port}, not {_port_name(wanted, packet, direction, found)}")
    ]


def _port_name(wanted: PortRange, packet: Packet, direction: Direction, found: _Found | None) -> str:
    if not wanted.name:
        return str(wanted.first) if wanted.first == wanted.last else f"{wanted.first} to {wanted.last}"
    if direction is Direction.EGRESS and (found is _Found.ADDRESS or not packet.destination.is_pod):
        return f"{wanted.name}: only pods have named ports"
    numbers = sorted(
        port
        for protocol, port in packet.destination.named_ports.get(wanted.name, ())
        if protocol == packet.protocol
    )
    if not numbers:
        return f"{wanted.name}: no container gives a port this name"
    return f"{wanted.name} ({', '.join(map(str, numbers))})"
