"""MeshPolicy, ClusterMeshPolicy and NetworkPolicy as the API server gives them, read into a Policy.

What can't be carried out exactly is refused, unknown fields too: dropping one could only make a policy wider
than it is written. A field that is null reads as absent, as the API server stores it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv6Address, ip_interface
from typing import Any, Final

from meshwire.api import conditions, fields
from meshwire.api.fields import InvalidSpec, Network
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    NAMESPACE_LABELS_PREFIX,
    SERVICE_ACCOUNT_LABEL,
    CidrPeer,
    Direction,
    Entity,
    IcmpType,
    Kind,
    Operator,
    Peer,
    Policy,
    PolicyMode,
    PortRange,
    Protocol,
    Requirement,
    Rule,
    Selector,
    ServicePeer,
)

MAX_PORTS: Final = 40
"""Of one entry of `toPorts`, and ICMP types of one entry of `icmps`."""

_BLOCK: Final = re.compile(r"[0-9A-Fa-f:.]+(?P<length>/(0|[1-9][0-9]{0,2}))?")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")

_ICMP_FAMILIES: Final[Mapping[str, int]] = {"IPv4": 4, "IPv6": 6}
_ICMP_NAMES: Final[Mapping[int, Mapping[str, int]]] = {
    4: {
        "EchoReply": 0,
        "DestinationUnreachable": 3,
        "Redirect": 5,
        "Echo": 8,
        "EchoRequest": 8,
        "RouterAdvertisement": 9,
        "RouterSelection": 10,
        "TimeExceeded": 11,
        "ParameterProblem": 12,
        "Timestamp": 13,
        "TimestampReply": 14,
        "Photuris": 40,
        "ExtendedEchoRequest": 42,
        "ExtendedEchoReply": 43,
    },
    6: {
        "DestinationUnreachable": 1,
        "PacketTooBig": 2,
        "TimeExceeded": 3,
        "ParameterProblem": 4,
        "EchoRequest": 128,
        "EchoReply": 129,
        "MulticastListenerQuery": 130,
        "MulticastListenerReport": 131,
        "MulticastListenerDone": 132,
        "RouterSolicitation": 133,
        "RouterAdvertisement": 134,
        "NeighborSolicitation": 135,
        "NeighborAdvertisement": 136,
        "RedirectMessage": 137,
        "RouterRenumbering": 138,
        "ICMPNodeInformationQuery": 139,
        "ICMPNodeInformationResponse": 140,
        "InverseNeighborDiscoverySolicitation": 141,
        "InverseNeighborDiscoveryAdvertisement": 142,
        "HomeAgentAddressDiscoveryRequest": 144,
        "HomeAgentAddressDiscoveryReply": 145,
        "MobilePrefixSolicitation": 146,
        "MobilePrefixAdvertisement": 147,
        "DuplicateAddressRequestCodeSuffix": 157,
        "DuplicateAddressConfirmationCodeSuffix": 158,
        "ExtendedEchoRequest": 160,
        "ExtendedEchoReply": 161,
    },
}
"""As CiliumNetworkPolicy names them."""


def mesh_policy(source: Mapping[str, Any], kind: Kind | None = None) -> Policy:
    """Reads a MeshPolicy or a ClusterMeshPolicy; `kind` says which, or the object itself. Raises
    InvalidSpec."""
    kind = kind or _kind(source)
    metadata = fields.child(source, "metadata", "")
    namespace = _namespace(metadata) if kind is Kind.MESH_POLICY else ""
    if source.get("specs") is not None:
        raise InvalidSpec("specs", "is not supported: an object holds one policy, under spec")
    sections = {
        (direction, deny): f"{direction}Deny" if deny else str(direction)
        for direction in Direction
        for deny in (False, True)
    }
    spec = _object(
        source.get("spec"),
        "spec",
        {"description", "endpointSelector", "mode", "enableDefaultDeny", *sections.values()},
    )
    if spec.get("endpointSelector") is None:
        raise InvalidSpec("spec.endpointSelector", "must be given; {} selects every pod")
    present = {key for key, name in sections.items() if spec.get(name) is not None}
    if not present and spec.get("enableDefaultDeny") is None:
        raise InvalidSpec("spec", "says nothing: give it ingress, ingressDeny, egress or egressDeny")
    switch = _object(
        fields.child(spec, "enableDefaultDeny", "spec"), "spec.enableDefaultDeny", set(Direction)
    )
    selector = _selector(spec["endpointSelector"], "spec.endpointSelector", _label_key)
    return Policy(
        kind=kind,
        namespace=namespace,
        name=fields.text(metadata, "name", "metadata"),
        uid=fields.text(metadata, "uid", "metadata"),
        resource_version=fields.text(metadata, "resourceVersion", "metadata"),
        generation=fields.integer(metadata, "generation", "metadata", default=0),
        mode=fields.choice(spec, "mode", "spec", default=PolicyMode.ENFORCE),
        selector=_of_namespace(selector, namespace, "spec.endpointSelector") if namespace else selector,
        default_deny=frozenset(
            direction
            for direction in Direction
            if fields.boolean(
                switch,
                str(direction),
                "spec.enableDefaultDeny",
                default=bool({(direction, False), (direction, True)} & present),
            )
        ),
        rules=tuple(
            rule
            for (direction, deny), name in sections.items()
            for rule in fields.listed(spec, name, "spec", _item(direction, deny, namespace))
            if rule.peers is not None or rule.ports is not None
        ),
        conditions=conditions.parse(fields.child(source, "status", "")),
    )


def network_policy(source: Mapping[str, Any]) -> Policy:
    """Reads a NetworkPolicy of networking.k8s.io/v1. Raises InvalidSpec."""
    metadata = fields.child(source, "metadata", "")
    namespace = _namespace(metadata)
    spec = _object(source.get("spec"), "spec", {"podSelector", "policyTypes", *Direction})
    isolated = set(fields.listed(spec, "policyTypes", "spec", _policy_type))
    if not isolated:
        isolated = {Direction.INGRESS} | ({Direction.EGRESS} if spec.get("egress") else set())
    rules = {
        direction: fields.listed(spec, str(direction), "spec", _network_item(direction, namespace))
        for direction in Direction
    }
    if Direction.EGRESS in isolated:
        rules[Direction.EGRESS] += (
            Rule(direction=Direction.EGRESS, path="spec.policyTypes", peers=(Entity.HOST,)),
        )
    selector = _selector(fields.child(spec, "podSelector", "spec"), "spec.podSelector", _pod_key)
    return Policy(
        kind=Kind.NETWORK_POLICY,
        namespace=namespace,
        name=fields.text(metadata, "name", "metadata"),
        uid=fields.text(metadata, "uid", "metadata"),
        resource_version=fields.text(metadata, "resourceVersion", "metadata"),
        generation=fields.integer(metadata, "generation", "metadata", default=0),
        selector=_in_namespace(selector, namespace),
        default_deny=frozenset(isolated),
        # Rules of a direction that the policy doesn't isolate mean nothing.
        rules=tuple(rule for direction in Direction if direction in isolated for rule in rules[direction]),
    )


def _kind(source: Mapping[str, Any]) -> Kind:
    for kind in (Kind.MESH_POLICY, Kind.CLUSTER_MESH_POLICY):
        if source.get("kind") == kind:
            return kind
    raise InvalidSpec("kind", f"must be {Kind.MESH_POLICY} or {Kind.CLUSTER_MESH_POLICY}")


def _namespace(metadata: Mapping[str, Any]) -> str:
    namespace = fields.text(metadata, "namespace", "metadata")
    if not namespace:
        raise InvalidSpec("metadata.namespace", "must be given")
    return namespace


def _object(value: Any, path: str, known: Collection[str]) -> Mapping[str, Any]:
    """An object that has `known` fields only."""
    if not isinstance(value, Mapping):
        raise InvalidSpec(path, "must be an object")
    for name, field in value.items():
        if name not in known and field is not None:
            raise InvalidSpec(f"{path}.{name}", "is not supported")
    return value


# Items of MeshPolicy and ClusterMeshPolicy


def _item(direction: Direction, deny: bool, namespace: str) -> Callable[[Any, str], Rule]:
    side = "from" if direction is Direction.INGRESS else "to"

    def selector(value: Any, path: str) -> Peer:
        found = _selector(value, path, _label_key)
        return found if not namespace or _names_namespace(found) else _in_namespace(found, namespace)

    kinds: dict[str, Callable[[Any, str], Peer]] = {
        f"{side}Endpoints": selector,
        f"{side}CIDR": lambda value, path: CidrPeer(_block(value, path, single=True)),
        f"{side}CIDRSet": _cidr_set,
        f"{side}Entities": _entity,
    }
    if direction is Direction.EGRESS:
        kinds["toServices"] = _service

    def item(value: Any, path: str) -> Rule:
        source = _object(value, path, {*kinds, "toPorts", "icmps"})
        given = [name for name in kinds if source.get(name) is not None]
        if len(given) > 1:
            raise InvalidSpec(
                f"{path}.{given[1]}", f"can't be in one item with {given[0]}: write an item for each"
            )
        return Rule(
            direction=direction,
            path=path,
            deny=deny,
            peers=fields.listed(source, given[0], path, kinds[given[0]]) if given else None,
            ports=_ports(source, path),
        )

    return item


def _ports(source: Mapping[str, Any], path: str) -> tuple[PortRange | IcmpType, ...] | None:
    given = [name for name in ("toPorts", "icmps") if source.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidSpec(f"{path}.icmps", "can't be in one item with toPorts: write an item for each")
    [name] = given
    groups = fields.listed(source, name, path, _port_group if name == "toPorts" else _icmp_group)
    if not groups:
        raise InvalidSpec(f"{path}.{name}", "is empty: leave it out to mean all ports and protocols")
    return tuple(port for group in groups for port in group)


def _port_group(value: Any, path: str) -> tuple[PortRange | IcmpType, ...]:
    if isinstance(value, Mapping) and value.get("rules") is not None:
        raise InvalidSpec(f"{path}.rules", "HTTP rules are not supported yet")
    return _group(_object(value, path, {"ports"}), "ports", path, _port)


def _icmp_group(value: Any, path: str) -> tuple[PortRange | IcmpType, ...]:
    return _group(_object(value, path, {"fields"}), "fields", path, _icmp)


def _group(
    source: Mapping[str, Any], name: str, path: str, parse: Callable[[Any, str], PortRange | IcmpType]
) -> tuple[PortRange | IcmpType, ...]:
    found = fields.listed(source, name, path, parse)
    if not 1 <= len(found) <= MAX_PORTS:
        raise InvalidSpec(f"{path}.{name}", f"must have 1 to {MAX_PORTS} items")
    return found


def _port(value: Any, path: str) -> PortRange:
    source = _object(value, path, {"port", "endPort", "protocol"})
    protocol = fields.choice(source, "protocol", path, default=Protocol.ANY)
    port = fields.text(source, "port", path, default="0")
    last = _end_port(source, path)
    if not _NUMBER.fullmatch(port):
        return _named_port(port, last, protocol, path)
    if port == "0":
        if last:
            raise InvalidSpec(f"{path}.endPort", "needs a port, 1 to 65535, where the range starts")
        return PortRange(protocol)
    return _range(int(port), last, protocol, path)


def _end_port(source: Mapping[str, Any], path: str) -> int:
    """0: none."""
    return fields.integer(source, "endPort", path, default=0, high=65535)


def _named_port(name: str, last: int, protocol: Protocol, path: str) -> PortRange:
    if len(name) > 15 or not _PORT_NAME.fullmatch(name):
        raise InvalidSpec(
            f"{path}.port",
            f"{name!r} is neither a number, 0 to 65535, nor a port's name (1 to 15 of a-z, 0-9 and -)",
        )
    if last:
        raise InvalidSpec(f"{path}.endPort", "a range starts at a number, not at a name")
    return PortRange(protocol, 0, 0, name)


def _range(first: int, last: int, protocol: Protocol, path: str) -> PortRange:
    if not 1 <= first <= 65535:
        raise InvalidSpec(f"{path}.port", "must be a number from 1 to 65535")
    if last and last < first:
        raise InvalidSpec(f"{path}.endPort", f"{last} is below port {first}, where the range starts")
    return PortRange(protocol, first, last or first)


def _icmp(value: Any, path: str) -> IcmpType:
    source = _object(value, path, {"family", "type"})
    family = _ICMP_FAMILIES.get(fields.text(source, "family", path, default="IPv4"))
    if family is None:
        raise InvalidSpec(f"{path}.family", "must be one of IPv4, IPv6")
    number = source.get("type")
    if isinstance(number, str):
        number = int(number) if _NUMBER.fullmatch(number) else _ICMP_NAMES[family].get(number)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 255:
        raise InvalidSpec(
            f"{path}.type", f"must be a number from 0 to 255 or the name of a type of IPv{family}'s ICMP"
        )
    return IcmpType(family, number)


def _entity(value: Any, path: str) -> Entity:
    try:
        return Entity(value)
    except ValueError:
        raise InvalidSpec(path, f"must be one of {', '.join(Entity)}") from None


def _cidr_set(value: Any, path: str) -> CidrPeer:
    return _except(_object(value, path, {"cidr", "except"}), path, _block, pods=False)


def _except(
    source: Mapping[str, Any], path: str, block: Callable[[Any, str], Network], *, pods: bool
) -> CidrPeer:
    cidr = block(source.get("cidr"), f"{path}.cidr")

    def inside(value: Any, path: str) -> Network:
        found = block(value, path)
        if found.network_address not in cidr or found.prefixlen < cidr.prefixlen:
            raise InvalidSpec(path, f"{found} is not inside of {cidr}")
        return found

    return CidrPeer(cidr, fields.listed(source, "except", path, inside), pods)


def _block(value: Any, path: str, *, single: bool = False, host_bits: bool = False) -> Network:
    """A CIDR block; `single`: or one address. With `host_bits`, address bits beyond the prefix are ignored,
    as NetworkPolicy has it."""
    text = value if isinstance(value, str) else ""
    written = _BLOCK.fullmatch(text)
    try:
        interface = ip_interface(text) if written and (written["length"] or single) else None
    except ValueError:
        interface = None
    if interface is None:
        what = "neither a CIDR block such as 10.0.0.0/8 nor an address" if single else "not a CIDR block"
        raise InvalidSpec(path, f"{value!r} is {what}")
    if isinstance(interface, IPv6Address) and interface.ipv4_mapped is not None:
        raise InvalidSpec(path, f"{value!r} is an IPv4 address in IPv6 form: write it as IPv4")
    network = interface.network
    if interface.ip != network.network_address and not host_bits:
        raise InvalidSpec(path, f"{value!r} has address bits set beyond its prefix: write {network}")
    return network


def _service(value: Any, path: str) -> ServicePeer:
    source = _object(value, path, {"k8sService", "k8sServiceSelector"})
    given = [name for name in ("k8sService", "k8sServiceSelector") if source.get(name) is not None]
    if len(given) != 1:
        raise InvalidSpec(path, "must have either k8sService or k8sServiceSelector")
    [kind] = given
    path = f"{path}.{kind}"
    if kind == "k8sService":
        source = _object(source[kind], path, {"serviceName", "namespace"})
        name = fields.text(source, "serviceName", path)
        if not name:
            raise InvalidSpec(f"{path}.serviceName", "must be given")
        return ServicePeer(namespace=fields.text(source, "namespace", path), name=name)
    source = _object(source[kind], path, {"selector", "namespace"})
    if source.get("selector") is None:
        raise InvalidSpec(f"{path}.selector", "must be given; {} selects every Service")
    return ServicePeer(
        namespace=fields.text(source, "namespace", path),
        labels=_selector(source["selector"], f"{path}.selector", _label_key),
    )


# Items of NetworkPolicy


def _policy_type(value: Any, path: str) -> Direction:
    for direction in Direction:
        if value == direction.capitalize():
            return direction
    raise InvalidSpec(path, "must be one of Ingress, Egress")


def _network_item(direction: Direction, namespace: str) -> Callable[[Any, str], Rule]:
    side = "from" if direction is Direction.INGRESS else "to"

    def peer(value: Any, path: str) -> Peer:
        return _network_peer(value, path, namespace)

    def item(value: Any, path: str) -> Rule:
        source = _object(value, path, {side, "ports"})
        return Rule(
            direction=direction,
            path=path,
            # Here, an empty list means everybody, or everything.
            peers=fields.listed(source, side, path, peer) or None,
            ports=fields.listed(source, "ports", path, _network_port) or None,
        )

    return item


def _network_peer(value: Any, path: str, namespace: str) -> Peer:
    source = _object(value, path, {"podSelector", "namespaceSelector", "ipBlock"})
    pods, namespaces, block = (source.get(name) for name in ("podSelector", "namespaceSelector", "ipBlock"))
    if block is not None:
        if pods is not None or namespaces is not None:
            raise InvalidSpec(f"{path}.ipBlock", "can't be in one peer with a selector")
        block = _object(block, f"{path}.ipBlock", {"cidr", "except"})
        return _except(block, f"{path}.ipBlock", _loose_block, pods=True)
    if pods is None and namespaces is None:
        raise InvalidSpec(path, "must have podSelector, namespaceSelector or ipBlock")
    selector = _selector(pods, f"{path}.podSelector", _pod_key) if pods is not None else Selector()
    if namespaces is None:
        return _in_namespace(selector, namespace)
    return _joined(selector, _selector(namespaces, f"{path}.namespaceSelector", _namespace_key))


def _loose_block(value: Any, path: str) -> Network:
    return _block(value, path, host_bits=True)


def _network_port(value: Any, path: str) -> PortRange:
    source = _object(value, path, {"port", "endPort", "protocol"})
    protocol = fields.choice(source, "protocol", path, default=Protocol.TCP)
    if protocol is Protocol.ANY:
        raise InvalidSpec(f"{path}.protocol", "must be one of TCP, UDP, SCTP")
    port = source.get("port")
    last = _end_port(source, path)
    if port is None:
        if last:
            raise InvalidSpec(f"{path}.endPort", "needs a port, 1 to 65535, where the range starts")
        return PortRange(protocol)
    if isinstance(port, str):
        return _named_port(port, last, protocol, path)
    return _range(fields.integer(source, "port", path, default=0), last, protocol, path)


# Selectors


def _selector(value: Any, path: str, key: Callable[[str, str], str]) -> Selector:
    """A label selector; `key(written, path)` gives the identity's label that a key stands for."""
    source = _object(value, path, {"matchLabels", "matchExpressions"})
    found = {
        Requirement(
            key(name, f"{path}.matchLabels"),
            Operator.IN,
            (fields.label_value(text, f"{path}.matchLabels.{name}"),),
        )
        for name, text in fields.child(source, "matchLabels", path).items()
    }
    found.update(
        fields.listed(source, "matchExpressions", path, lambda item, path: _requirement(item, path, key))
    )
    return Selector(tuple(sorted(found)))


def _requirement(value: Any, path: str, key: Callable[[str, str], str]) -> Requirement:
    source = _object(value, path, {"key", "operator", "values"})
    # Without a default: an absent operator is refused like an unknown one.
    operator = fields.choice({"operator": None, **source}, "operator", path, default=Operator.IN)
    values = fields.listed(source, "values", path, fields.label_value)
    if bool(values) is not (operator in (Operator.IN, Operator.NOT_IN)):
        problem = "takes no values" if values else "needs values"
        raise InvalidSpec(f"{path}.values", f"{operator} {problem}")
    return Requirement(
        key(fields.text(source, "key", path), f"{path}.key"), operator, tuple(sorted(set(values)))
    )


def _label_key(key: str, path: str) -> str:
    """Of a MeshPolicy's selector: with the label's source before a colon, or without."""
    source, colon, name = key.rpartition(":")
    if colon and source not in ("k8s", "any"):
        raise InvalidSpec(path, f"{key!r}: labels are written with k8s: or any: before the key, or nothing")
    return fields.label_key(name, path)


def _pod_key(key: str, path: str) -> str:
    """Of a NetworkPolicy's podSelector: a label of the pod itself."""
    if key in (NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL) or key.startswith(NAMESPACE_LABELS_PREFIX):
        raise InvalidSpec(
            path, f"{key!r} is a label that Meshwire derives: no NetworkPolicy can select by it"
        )
    return fields.label_key(key, path)


def _namespace_key(key: str, path: str) -> str:
    """Of a NetworkPolicy's namespaceSelector: a label of the pod's namespace."""
    return NAMESPACE_LABELS_PREFIX + fields.label_key(key, path)


def _names_namespace(selector: Selector) -> bool:
    return any(
        each.key == NAMESPACE_LABEL or each.key.startswith(NAMESPACE_LABELS_PREFIX)
        for each in selector.requirements
    )


def _of_namespace(selector: Selector, namespace: str, path: str) -> Selector:
    """Whom a policy of `namespace` is for. Selecting pods of another is refused: it would select none."""
    for each in selector.requirements:
        if (
            each.key == NAMESPACE_LABEL
            and not {
                Operator.IN: namespace in each.values,
                Operator.NOT_IN: namespace not in each.values,
                Operator.EXISTS: True,
                Operator.DOES_NOT_EXIST: False,
            }[each.operator]
        ):
            raise InvalidSpec(
                path, f"a {Kind.MESH_POLICY} is for pods of its own namespace, {namespace}, only"
            )
    return _in_namespace(selector, namespace)


def _in_namespace(selector: Selector, namespace: str) -> Selector:
    return _joined(selector, Selector((Requirement(NAMESPACE_LABEL, Operator.IN, (namespace,)),)))


def _joined(one: Selector, other: Selector) -> Selector:
    return Selector(tuple(sorted({*one.requirements, *other.requirements})))
