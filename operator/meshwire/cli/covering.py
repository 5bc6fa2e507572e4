"""Whether whatever one selector, peer, port or rule matches, another one matches too. Sound, not complete:
True is certain, False may be for want of a proof. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from meshwire.api.fields import Network
from meshwire.api.meshpolicy import (
    CidrPeer,
    Entity,
    IcmpType,
    Operator,
    Peer,
    PortRange,
    Requirement,
    Rule,
    Selector,
    ServicePeer,
)
from meshwire.policy.identity import ENTITIES
from meshwire.policy.model import PROTOCOLS


def rule_covers(wide: Rule, narrow: Rule) -> bool:
    """Both of one direction; whom their policies select is not looked at."""
    return (
        wide.direction is narrow.direction
        and all(
            any(peer_covers(outer, inner) for outer in _peers(wide.peers)) for inner in _peers(narrow.peers)
        )
        and _ports_cover(wide.ports, narrow.ports)
    )


def selector_covers(wide: Selector, narrow: Selector) -> bool:
    return is_contradiction(narrow) or all(
        _implied(requirement, [each for each in narrow.requirements if each.key == requirement.key])
        for requirement in wide.requirements
    )


def is_contradiction(selector: Selector) -> bool:
    """Whether no set of labels at all meets the requirements."""
    for key in {requirement.key for requirement in selector.requirements}:
        same = [requirement for requirement in selector.requirements if requirement.key == key]
        absent = any(each.operator is Operator.DOES_NOT_EXIST for each in same)
        present = any(each.operator in (Operator.IN, Operator.EXISTS) for each in same)
        if (absent and present) or _values(same) == set():
            return True
    return False


def peer_covers(wide: Peer, narrow: Peer) -> bool:
    if wide is Entity.ALL or wide == narrow:
        return True
    match wide, narrow:
        case Selector(), Selector():
            return selector_covers(wide, narrow)
        case Entity(), Selector():
            return wide is Entity.CLUSTER
        case Entity(), Entity():
            # `cluster` has every pod, which no other entity but `all` has.
            return narrow not in (Entity.ALL, Entity.CLUSTER) and ENTITIES[narrow] <= ENTITIES[wide]
        case Entity(), CidrPeer():
            return wide is Entity.WORLD and not narrow.pods
        case CidrPeer(), CidrPeer():
            return _cidr_covers(wide, narrow)
        case ServicePeer(), ServicePeer():
            return not wide.namespace and (wide.name, wide.labels) == (narrow.name, narrow.labels)
    return False


def port_covers(wide: PortRange | IcmpType, narrow: PortRange | IcmpType) -> bool:
    if wide == narrow:
        return True
    if isinstance(wide, IcmpType) or isinstance(narrow, IcmpType):
        return False
    if not set(PROTOCOLS[narrow.protocol]) <= set(PROTOCOLS[wide.protocol]):
        return False
    if wide.name:
        return wide.name == narrow.name
    if narrow.name:
        # Whatever its number is.
        return (wide.first, wide.last) == (0, 65535)
    return wide.first <= narrow.first and narrow.last <= wide.last


def _peers(peers: tuple[Peer, ...] | None) -> tuple[Peer, ...]:
    return (Entity.ALL,) if peers is None else peers


def _ports_cover(
    wide: tuple[PortRange | IcmpType, ...] | None, narrow: tuple[PortRange | IcmpType, ...] | None
) -> bool:
    if wide is None or narrow is None:
        return wide is None
    return all(any(port_covers(outer, inner) for outer in wide) for inner in narrow)


def _cidr_covers(wide: CidrPeer, narrow: CidrPeer) -> bool:
    if narrow.pods and not wide.pods:
        return False
    return _is_inside(narrow.cidr, wide.cidr) and all(
        not hole.overlaps(narrow.cidr) or any(_is_inside(hole, other) for other in narrow.excepts)
        for hole in wide.excepts
    )


def _is_inside(inner: Network, outer: Network) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and inner.network_address in outer
    )


def _values(same: Iterable[Requirement]) -> set[str] | None:
    """What a label may be by requirements on it; None: anything."""
    found: set[str] | None = None
    for each in same:
        if each.operator is Operator.IN:
            found = set(each.values) if found is None else found & set(each.values)
    if found is not None:
        for each in same:
            if each.operator is Operator.NOT_IN:
                found -= set(each.values)
    return found


def _implied(wanted: Requirement, given: list[Requirement]) -> bool:
    """Whether requirements on a label imply another one on it."""
    values = _values(given)
    operators = {each.operator for each in given}
    match wanted.operator:
        case Operator.IN:
            return values is not None and values <= set(wanted.values)
        case Operator.NOT_IN:
            if values is not None:
                return not values & set(wanted.values)
            forbidden = {
                value for each in given if each.operator is Operator.NOT_IN for value in each.values
            }
            return Operator.DOES_NOT_EXIST in operators or set(wanted.values) <= forbidden
        case Operator.EXISTS:
            return values is not None or Operator.EXISTS in operators
        case Operator.DOES_NOT_EXIST:
            return Operator.DOES_NOT_EXIST in operators
