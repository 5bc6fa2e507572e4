"""What policies mean, as a table: who reaches whom once they are there. Upstream's NetworkPolicy as its e2e
suite and cyclonus have it, and the language of MeshPolicy.

Nothing here is computed by Meshwire: what is expected is written beside each case. tests/unit holds the
table against the evaluator, tests/lab against packets.

The town: namespaces x, y and z, in each the pods a, b and c. Namespaces are labelled `ns`, pods `pod`, with
their names. All serve TCP, UDP and SCTP on 80 and 81, which they name serve-80-tcp and so on. Three nodes, a
Service for each pod (called like it), and a machine outside of the cluster, `world`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from meshwire.api.names import API_VERSION

Object = dict[str, Any]

NAMESPACES: Final = ("x", "y", "z")
PODS: Final = ("a", "b", "c")
PORTS: Final = (80, 81)
TRANSPORTS: Final = ("TCP", "UDP", "SCTP")
ICMP: Final = "ICMP"
FAMILIES: Final = ("v4", "v6")
MAX_ROWS: Final = 60
"""Of a table of differences."""


@dataclass(frozen=True, slots=True, order=True)
class End:
    """A pod; without `ns` a node, or the world."""

    ns: str
    pod: str

    @property
    def name(self) -> str:
        return f"{self.ns}/{self.pod}" if self.ns else self.pod

    @property
    def is_pod(self) -> bool:
        return bool(self.ns)

    @property
    def node(self) -> str:
        """Where it is; "" for the world."""
        return NODE_OF[self] if self.ns else "" if self == WORLD else self.pod


WORLD: Final = End("", "world")
TOWN: Final = tuple(End(ns, pod) for ns in NAMESPACES for pod in PODS)
NODES: Final[Mapping[str, str]] = {
    "node1": "x/a x/b y/a",
    "node2": "y/b y/c z/b",
    "node3": "z/c z/a x/c",
}
"""On each node there are two pods of one namespace, two of one name, and two that have neither in common."""
NODE_OF: Final[Mapping[End, str]] = {
    end: node for node, pods in NODES.items() for end in TOWN if end.name in pods.split()
}
OUTSIDE: Final = (*(End("", node) for node in NODES), WORLD)


@dataclass(frozen=True, slots=True)
class Flow:
    """`port` is 0 for ICMP (echo requests)."""

    src: End
    dst: End
    protocol: str
    port: int
    family: str

    @property
    def on_own_node(self) -> bool:
        """One end is the node that the other one is on."""
        return self.src.is_pod != self.dst.is_pod and self.src.node == self.dst.node

    def __str__(self) -> str:
        port = f"/{self.port}" if self.port else ""
        return f"{self.src.name} -> {self.dst.name} {self.protocol}{port} {self.family}"


Expectation = Callable[[Flow], bool]
Labels = Mapping[str, Mapping[str, str | None]]
"""Namespace, or pod as NAMESPACE/POD -> labels it gets (None: loses)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Changes, and which flows pass afterwards."""

    expect: Expectation
    apply: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()
    namespaces: Labels = field(default_factory=dict)
    pods: Labels = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`outside`: also about nodes and the world. `by_service`: it holds for pods asked by the ClusterIPs of
    their Services too, which have the pods' ports (and no ICMP)."""

    name: str
    steps: tuple[Step, ...]
    outside: bool = False
    by_service: bool = True

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def flows(*, outside: bool, transports: Sequence[str] = TRANSPORTS) -> list[Flow]:
    """Every flow between two different ends, at least one of them a pod. A pod's packets to itself never
    leave it."""
    ends = (*TOWN, *OUTSIDE) if outside else TOWN
    kinds = [(protocol, port) for protocol in transports for port in PORTS] + [(ICMP, 0)]
    return [
        Flow(src, dst, protocol, port, family)
        for src in ends
        for dst in ends
        if src != dst and (src.is_pod or dst.is_pod)
        for protocol, port in kinds
        for family in FAMILIES
    ]


def differences(found: Iterable[tuple[Flow, bool, str]]) -> str:
    """A table of flows that are not as they should be: (flow, whether by a Service, what happens)."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for flow, by_service, outcome in found:
        src, dst = (f"{end.name} ({end.node or 'outside'})" for end in (flow.src, flow.dst))
        port = f"/{flow.port}" if flow.port else ""
        way = " by Service" if by_service else ""
        rows.setdefault((src, dst, outcome), []).append(f"{flow.protocol}{port} {flow.family}{way}")
    cells = [(src, "->", dst, outcome, ", ".join(kinds)) for (src, dst, outcome), kinds in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(
        [*lines[:MAX_ROWS], *([f"and {len(lines) - MAX_ROWS} more"] if lines[MAX_ROWS:] else [])]
    )


def key(item: Object) -> tuple[str, str, str]:
    """Kind, namespace, name."""
    metadata = item["metadata"]
    return item["kind"], metadata.get("namespace", ""), metadata["name"]


def resolve(value: Any, addresses: Mapping[str, Mapping[str, str]]) -> Any:
    """An object with addresses in place of `$(END FAMILY)`. `addresses`: end's name -> family -> address."""
    if isinstance(value, Mapping):
        return {name: resolve(each, addresses) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(each, addresses) for each in value]
    if isinstance(value, str):
        return re.sub(r"\$\((\S+) (v4|v6)\)", lambda match: addresses[match[1]][match[2]], value)
    return value


# The town's objects


def port_name(protocol: str, port: int) -> str:
    return f"serve-{port}-{protocol.lower()}"


def container_ports(transports: Sequence[str]) -> list[Object]:
    return [
        {"name": port_name(protocol, port), "protocol": protocol, "containerPort": port}
        for protocol in transports
        for port in PORTS
    ]


def service(end: End, transports: Sequence[str], families: Sequence[str] = FAMILIES) -> Object:
    """The Service of a pod; labelled `svc` with its name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": end.pod, "namespace": end.ns, "labels": {"svc": end.pod}},
        "spec": {
            "selector": {"pod": end.pod},
            "ipFamilyPolicy": "RequireDualStack" if len(families) > 1 else "SingleStack",
            "ports": [
                {"name": port_name(protocol, port), "protocol": protocol, "port": port}
                for protocol in transports
                for port in PORTS
            ],
        },
    }


def namespace_labels(ns: str) -> dict[str, str]:
    """What it has from the start; the second label is the API server's."""
    return {"ns": ns, "kubernetes.io/metadata.name": ns}


# Policies


def network_policy(
    ns: str,
    name: str,
    pods: Object | None = None,
    *,
    ingress: list[Object] | None = None,
    egress: list[Object] | None = None,
    types: Sequence[str] | None = None,
) -> Object:
    """`types`: by default those of the rule lists that are given."""
    sections = {"ingress": ingress, "egress": egress}
    given = {section: rules for section, rules in sections.items() if rules is not None}
    spec: Object = {"podSelector": pods or {}, **given}
    spec["policyTypes"] = list(types if types is not None else [section.capitalize() for section in given])
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": ns},
        "spec": spec,
    }


def mesh_policy(ns: str, name: str, pods: Object | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "MeshPolicy",
        "metadata": {"name": name, "namespace": ns},
        "spec": {"endpointSelector": pods or {}, **spec},
    }


def cluster_policy(name: str, pods: Object | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "ClusterMeshPolicy",
        "metadata": {"name": name},
        "spec": {"endpointSelector": pods or {}, **spec},
    }


def labels(**pairs: str) -> Object:
    return {"matchLabels": pairs}


def where(key: str, operator: str, *values: str) -> Object:
    """A selector with one requirement."""
    return {
        "matchExpressions": [{"key": key, "operator": operator, **({"values": values} if values else {})}]
    }


def pod(name: str) -> Object:
    return labels(pod=name)


def pods_of(ns: str, **pairs: str) -> Object:
    """As MeshPolicy's language names another namespace."""
    return {"matchLabels": {"k8s:io.kubernetes.pod.namespace": ns, **pairs}}


def tcp(*ports: int | str) -> list[Object]:
    """Of a NetworkPolicy."""
    return [{"protocol": "TCP", "port": port} for port in ports]


def udp(*ports: int | str) -> list[Object]:
    return [{"protocol": "UDP", "port": port} for port in ports]


def to_ports(*ports: Object) -> list[Object]:
    """Of a MeshPolicy."""
    return [{"ports": list(ports)}]


def blocks(end: str) -> list[Object]:
    """An end's addresses, one block for each family, as peers of a NetworkPolicy."""
    return [{"ipBlock": {"cidr": cidr}} for cidr in cidrs(end)]


def cidrs(end: str) -> list[str]:
    return [f"$({end} v4)/32", f"$({end} v6)/128"]


EVERYWHERE: Final = ("0.0.0.0/0", "::/0")


def everywhere_except(end: str) -> list[Object]:
    return [{"cidr": cidr, "except": [own]} for cidr, own in zip(EVERYWHERE, cidrs(end), strict=True)]


# Cases


def case(
    name: str,
    policies: Sequence[Object],
    expect: Expectation,
    *,
    outside: bool = False,
    by_service: bool = True,
) -> Case:
    """Of one step."""
    return Case(
        name=name,
        steps=(Step(apply=tuple(policies), expect=expect),),
        outside=outside,
        by_service=by_service,
    )


def steps(name: str, *steps: Step) -> Case:
    return Case(name=name, steps=steps)


def to(
    name: str,
    ns: str = "x",
    pods: Object | None = None,
    *,
    from_: list[Object] | None = None,
    ports: list[Object] | None = None,
) -> Object:
    """A NetworkPolicy by which pods (all of x, if nothing else is said) receive from `from_` on `ports`."""
    return network_policy(ns, name, pods, ingress=[_rule({"from": from_, "ports": ports})])


def out_of(
    name: str,
    ns: str = "x",
    pods: Object | None = None,
    *,
    to: list[Object] | None = None,
    ports: list[Object] | None = None,
) -> Object:
    """The same for what they send."""
    return network_policy(ns, name, pods, egress=[_rule({"to": to, "ports": ports})])


def _rule(fields: Mapping[str, list[Object] | None]) -> Object:
    return {name: value for name, value in fields.items() if value is not None}


def everything(f: Flow) -> bool:
    return True


DENY_INGRESS: Final = network_policy("x", "deny-ingress", ingress=[])
DENY_EGRESS: Final = network_policy("x", "deny-egress", egress=[])
UPDATED: Final = network_policy("x", "updated", pod("a"), ingress=[{"from": [{"podSelector": pod("b")}]}])
DNS: Final = network_policy("x", "dns", pod("a"), egress=[{"ports": udp(81)}])
ALLOW_ALL: Final = {"fromEntities": ["all"]}

NETWORK_POLICY_CASES: Final = (
    case("Without policies everybody reaches everybody", [], everything, outside=True),
    case(
        "A default deny of ingress lets nobody in, and its pods out",
        [DENY_INGRESS],
        lambda f: f.dst.ns != "x",
    ),
    case(
        "A default deny of egress lets nobody out, and others in",
        [DENY_EGRESS],
        lambda f: f.src.ns != "x",
    ),
    case(
        "A default deny of both directions shuts a namespace",
        [network_policy("x", "deny-all", ingress=[], egress=[])],
        lambda f: "x" not in (f.src.ns, f.dst.ns),
    ),
    case(
        "Default deny in two namespaces leaves those that are in neither",
        [DENY_INGRESS, network_policy("y", "deny-ingress", ingress=[])],
        lambda f: f.dst.ns == "z",
    ),
    case(
        "Without rules, policyTypes Ingress denies ingress",
        [network_policy("x", "typed", types=["Ingress"])],
        lambda f: f.dst.ns != "x",
    ),
    case(
        "Without policyTypes, a policy isolates ingress, and egress if it has egress rules",
        [network_policy("x", "untyped", pod("a"), egress=[{"to": [{"podSelector": pod("b")}]}], types=[])],
        lambda f: f.dst.name != "x/a" and (f.src.name != "x/a" or f.dst.name == "x/b"),
    ),
    case(
        "Without policyTypes and egress rules, egress is not isolated",
        [network_policy("x", "untyped", ingress=[], types=[])],
        lambda f: f.dst.ns != "x",
    ),
    case(
        "An empty ingress rule allows everything",
        [network_policy("x", "open", ingress=[{}])],
        everything,
        outside=True,
    ),
    case(
        "An empty egress rule allows everything",
        [network_policy("x", "open", egress=[{}])],
        everything,
        outside=True,
    ),
    case(
        "Allow-all beside default deny allows all",
        [DENY_INGRESS, network_policy("x", "open", ingress=[{}])],
        everything,
    ),
    case(
        "Allow-all of ingress leaves egress denied",
        [DENY_EGRESS, network_policy("x", "open", ingress=[{}])],
        lambda f: f.src.ns != "x",
    ),
    case(
        "A pod selector means pods of the policy's own namespace",
        [to("from-b", pods=pod("a"), from_=[{"podSelector": pod("b")}])],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b",
    ),
    case(
        "A namespace selector means all pods of those namespaces",
        [to("from-y", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y")}])],
        lambda f: f.dst.name != "x/a" or f.src.ns == "y",
    ),
    case(
        "A namespace is selected by its name",
        [
            to(
                "from-y",
                pods=pod("a"),
                from_=[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "y"}}}],
            )
        ],
        lambda f: f.dst.name != "x/a" or f.src.ns == "y",
    ),
    case(
        "Both selectors in one peer have to match",
        [to("and", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y"), "podSelector": pod("b")}])],
        lambda f: f.dst.name != "x/a" or f.src.name == "y/b",
    ),
    case(
        "Of selectors in two peers one has to match",
        [to("or", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y")}, {"podSelector": pod("b")}])],
        lambda f: f.dst.name != "x/a" or f.src.ns == "y" or f.src.name == "x/b",
    ),
    case(
        "In means one of the values",
        [to("in", pods=pod("a"), from_=[{"podSelector": where("pod", "In", "b", "d")}])],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b",
    ),
    case(
        "NotIn means any other value",
        [to("not-in", pods=pod("a"), from_=[{"namespaceSelector": where("ns", "NotIn", "x", "y")}])],
        lambda f: f.dst.name != "x/a" or f.src.ns == "z",
    ),
    case(
        "NotIn holds for a label that is absent",
        [to("not-in", pods=pod("a"), from_=[{"podSelector": where("tier", "NotIn", "front")}])],
        lambda f: f.dst.name != "x/a" or f.src.ns == "x",
    ),
    case(
        "Exists means any value",
        [to("exists", pods=pod("a"), from_=[{"namespaceSelector": where("ns", "Exists")}])],
        everything,
    ),
    case(
        "Exists doesn't hold for a label that is absent",
        [to("exists", pods=pod("a"), from_=[{"podSelector": where("tier", "Exists")}])],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "DoesNotExist means no value at all",
        [
            to(
                "absent",
                pods=pod("a"),
                from_=[
                    {"namespaceSelector": where("ns", "DoesNotExist")},
                    {"podSelector": where("tier", "DoesNotExist")},
                ],
            )
        ],
        lambda f: f.dst.name != "x/a" or f.src.ns == "x",
    ),
    case(
        "All requirements of a selector have to hold",
        [
            to(
                "both",
                pods=pod("a"),
                from_=[
                    {
                        "namespaceSelector": {
                            "matchLabels": {"kubernetes.io/metadata.name": "y"},
                            "matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["z"]}],
                        },
                        "podSelector": where("pod", "In", "a", "c"),
                    }
                ],
            )
        ],
        lambda f: f.dst.name != "x/a" or f.src.name in ("y/a", "y/c"),
    ),
    case(
        "A policy is for the pods its selector's expressions select",
        [network_policy("x", "subjects", where("pod", "NotIn", "c"), ingress=[])],
        lambda f: f.dst.name not in ("x/a", "x/b"),
    ),
    case(
        "A policy that selects no pod does nothing",
        [network_policy("x", "nobody", pod("d"), ingress=[], egress=[])],
        everything,
    ),
    case(
        "Two policies of one pod add up",
        [
            to("from-b", pods=pod("a"), from_=[{"podSelector": pod("b")}]),
            to("from-y", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y")}]),
        ],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b" or f.src.ns == "y",
    ),
    case(
        "Two policies add up, not their peers with each other's ports",
        [
            to("80", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y")}], ports=tcp(80)),
            to("81", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="z")}], ports=tcp(81)),
        ],
        lambda f: (
            f.dst.name != "x/a" or (f.protocol == "TCP" and (f.src.ns, f.port) in (("y", 80), ("z", 81)))
        ),
    ),
    case(
        "Two rules of one policy add up, not their peers with each other's ports",
        [
            network_policy(
                "x",
                "rules",
                pod("a"),
                ingress=[
                    {"from": [{"namespaceSelector": labels(ns="y")}], "ports": tcp(80)},
                    {"from": [{"namespaceSelector": labels(ns="z")}], "ports": tcp(81)},
                ],
            )
        ],
        lambda f: (
            f.dst.name != "x/a" or (f.protocol == "TCP" and (f.src.ns, f.port) in (("y", 80), ("z", 81)))
        ),
    ),
    case(
        "A port without a protocol is TCP's",
        [to("81", ports=[{"port": 81}])],
        lambda f: f.dst.ns != "x" or (f.protocol, f.port) == ("TCP", 81),
    ),
    case(
        "Ports and peers have to match both",
        [to("81", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="x")}], ports=tcp(81))],
        lambda f: f.dst.name != "x/a" or (f.src.ns == "x" and (f.protocol, f.port) == ("TCP", 81)),
    ),
    case(
        "A rule for UDP allows UDP alone",
        [to("udp", pods=pod("a"), ports=udp(80))],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("UDP", 80),
    ),
    case(
        "A rule with only a protocol allows all its ports, and no ICMP",
        [to("udp", pods=pod("a"), ports=[{"protocol": "UDP"}])],
        lambda f: f.dst.name != "x/a" or f.protocol == "UDP",
    ),
    case(
        "Protocol SCTP is not mistaken for TCP",
        [to("sctp", pods=pod("a"), ports=[{"protocol": "SCTP", "port": 81}])],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("SCTP", 81),
    ),
    case(
        "Protocol TCP is not mistaken for SCTP on egress",
        [out_of("tcp", pods=pod("a"), ports=tcp(80))],
        lambda f: f.src.name != "x/a" or (f.protocol, f.port) == ("TCP", 80),
    ),
    case(
        "A named port is that which the container calls so",
        [to("named", pods=pod("a"), ports=tcp("serve-81-tcp"))],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("TCP", 81),
    ),
    case(
        "A port name that no container has allows nothing",
        [to("named", pods=pod("a"), ports=tcp("serve-82-tcp"))],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "A named port of another protocol allows nothing",
        [to("named", pods=pod("a"), ports=tcp("serve-80-udp"))],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "A named port of egress is the receiver's",
        [
            out_of(
                "named", pods=pod("a"), to=[{"namespaceSelector": labels(ns="y")}], ports=udp("serve-80-udp")
            )
        ],
        lambda f: f.src.name != "x/a" or (f.dst.ns == "y" and (f.protocol, f.port) == ("UDP", 80)),
    ),
    case(
        "A range of ports includes both its ends",
        [to("range", pods=pod("a"), ports=[{"port": 80, "endPort": 81}])],
        lambda f: f.dst.name != "x/a" or f.protocol == "TCP",
    ),
    case(
        "A range of ports allows none below it",
        [to("range", pods=pod("a"), ports=[{"protocol": "UDP", "port": 81, "endPort": 65535}])],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("UDP", 81),
    ),
    case(
        "A range of ports allows none above it, on egress too",
        [out_of("range", pods=pod("a"), ports=[{"port": 1, "endPort": 80}])],
        lambda f: f.src.name != "x/a" or (f.protocol, f.port) == ("TCP", 80),
    ),
    case(
        "Egress to pods by their labels",
        [out_of("to-b", pods=pod("a"), to=[{"podSelector": pod("b")}])],
        lambda f: f.src.name != "x/a" or f.dst.name == "x/b",
    ),
    case(
        "Egress to namespaces by their labels",
        [out_of("to-y", pods=pod("a"), to=[{"namespaceSelector": labels(ns="y")}])],
        lambda f: f.src.name != "x/a" or f.dst.ns == "y",
    ),
    case(
        "Egress to pods of namespaces, by the labels of both",
        [out_of("to-y-b", to=[{"namespaceSelector": labels(ns="y"), "podSelector": pod("b")}])],
        lambda f: f.src.ns != "x" or f.dst.name == "y/b",
    ),
    case(
        "Egress rules of several policies add up",
        [
            out_of("to-y", pods=pod("a"), to=[{"namespaceSelector": labels(ns="y")}]),
            out_of("to-b", pods=pod("a"), to=[{"namespaceSelector": {}, "podSelector": pod("b")}]),
        ],
        lambda f: f.src.name != "x/a" or f.dst.ns == "y" or f.dst.pod == "b",
    ),
    case(
        "Egress to a block of addresses that a pod has",
        [out_of("block", pods=pod("a"), to=blocks("y/b"))],
        lambda f: f.src.name != "x/a" or f.dst.name == "y/b",
    ),
    case(
        "Egress to everywhere means pods too",
        [out_of("block", to=[{"ipBlock": {"cidr": cidr}} for cidr in EVERYWHERE])],
        everything,
        outside=True,
    ),
    case(
        "A block is of one family",
        [out_of("block", pods=pod("a"), to=[{"ipBlock": {"cidr": "0.0.0.0/0"}}])],
        lambda f: f.src.name != "x/a" or f.family == "v4",
    ),
    case(
        "What a block excepts is not allowed",
        [out_of("block", pods=pod("a"), to=[{"ipBlock": block} for block in everywhere_except("y/b")])],
        lambda f: (f.src.name, f.dst.name) != ("x/a", "y/b"),
    ),
    steps(
        "What a block excepts can be allowed by another policy",
        Step(
            apply=(out_of("hole", pods=pod("a"), to=[{"ipBlock": b} for b in everywhere_except("y/b")]),),
            expect=lambda f: (f.src.name, f.dst.name) != ("x/a", "y/b"),
        ),
        Step(apply=(out_of("filled", pods=pod("a"), to=blocks("y/b")),), expect=everything),
    ),
    case(
        "Ingress from a block of addresses that a pod has",
        [to("block", pods=pod("a"), from_=blocks("y/b"))],
        lambda f: f.dst.name != "x/a" or f.src.name == "y/b",
    ),
    case(
        "Ingress from a block with a hole, and a port",
        [
            to(
                "block",
                pods=pod("a"),
                from_=[{"ipBlock": block} for block in everywhere_except("x/c")],
                ports=tcp(80),
            )
        ],
        lambda f: f.dst.name != "x/a" or (f.src.name != "x/c" and (f.protocol, f.port) == ("TCP", 80)),
    ),
    case(
        "A block or a selector, in one list",
        [to("mixed", pods=pod("a"), from_=[*blocks("y/b"), {"podSelector": pod("c")}])],
        lambda f: f.dst.name != "x/a" or f.src.name in ("y/b", "x/c"),
    ),
    case(
        "Ingress and egress of one policy are two things",
        [
            network_policy(
                "x",
                "both",
                pod("a"),
                ingress=[{"from": [{"podSelector": pod("b")}]}],
                egress=[{"to": [{"namespaceSelector": labels(ns="z")}], "ports": tcp(80)}],
            )
        ],
        lambda f: (
            (f.dst.name != "x/a" or f.src.name == "x/b")
            and (f.src.name != "x/a" or (f.dst.ns == "z" and (f.protocol, f.port) == ("TCP", 80)))
        ),
    ),
    case(
        "Both ends have to allow it",
        [
            network_policy("y", "out", egress=[{"to": [{"namespaceSelector": labels(ns="x")}]}]),
            to("in", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="z")}]),
        ],
        lambda f: (f.src.ns != "y" or f.dst.ns == "x") and (f.dst.name != "x/a" or f.src.ns == "z"),
    ),
    case(
        "An empty pod selector in a peer means all pods of the own namespace",
        [to("own", pods=pod("a"), from_=[{"podSelector": {}}])],
        lambda f: f.dst.name != "x/a" or f.src.ns == "x",
    ),
    case(
        "An empty namespace selector means all pods, and nobody else",
        [to("pods", pods=pod("a"), from_=[{"namespaceSelector": {}}])],
        lambda f: f.dst.name != "x/a" or f.src.is_pod or f.on_own_node,
        outside=True,
    ),
    case(
        "An empty list of peers means everybody",
        [to("anybody", pods=pod("a"), from_=[], ports=tcp(80))],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("TCP", 80) or f.on_own_node,
        outside=True,
    ),
    case(
        "An empty list of ports means all of them",
        [to("any-port", pods=pod("a"), from_=[{"podSelector": pod("b")}], ports=[])],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b",
    ),
    case(
        "Egress open to one port is open to nothing else, as for DNS",
        [DNS],
        lambda f: f.src.name != "x/a" or (f.protocol, f.port) == ("UDP", 81),
    ),
    case(
        "Egress for DNS beside egress to a namespace",
        [DNS, out_of("to-y", pods=pod("a"), to=[{"namespaceSelector": labels(ns="y")}], ports=tcp(80))],
        lambda f: (
            f.src.name != "x/a"
            or (f.protocol, f.port) == ("UDP", 81)
            or (f.dst.ns == "y" and (f.protocol, f.port) == ("TCP", 80))
        ),
    ),
    case(
        "Rules of a direction that policyTypes leaves out mean nothing",
        [network_policy("x", "one-side", pod("a"), ingress=[], egress=[], types=["Egress"])],
        lambda f: f.src.name != "x/a",
    ),
    case(
        "A policy is for pods of its own namespace only",
        [network_policy("y", "elsewhere", pod("a"), ingress=[])],
        lambda f: f.dst.name != "y/a",
    ),
    case(
        "Isolated from the outside, but for the own node",
        [DENY_INGRESS],
        lambda f: f.dst.ns != "x" or f.on_own_node,
        outside=True,
    ),
    case(
        "Without egress, only the own node is reached",
        [DENY_EGRESS],
        lambda f: f.src.ns != "x" or f.on_own_node,
        outside=True,
    ),
    case(
        "Ingress from an address of the world",
        [to("block", pods=pod("a"), from_=blocks("world"))],
        lambda f: f.dst.name != "x/a" or f.src == WORLD or f.on_own_node,
        outside=True,
    ),
    case(
        "Egress to everywhere but an address of the world",
        [out_of("block", pods=pod("a"), to=[{"ipBlock": b} for b in everywhere_except("world")])],
        lambda f: (f.src.name, f.dst) != ("x/a", WORLD),
        outside=True,
    ),
    steps(
        "A policy that is updated allows what it says now",
        Step(apply=(UPDATED,), expect=lambda f: f.dst.name != "x/a" or f.src.name == "x/b"),
        Step(
            apply=(
                network_policy("x", "updated", pod("a"), ingress=[{"from": [{"podSelector": pod("c")}]}]),
            ),
            expect=lambda f: f.dst.name != "x/a" or f.src.name == "x/c",
        ),
        Step(
            apply=(
                network_policy("x", "updated", pod("b"), ingress=[{"from": [{"podSelector": pod("c")}]}]),
            ),
            expect=lambda f: f.dst.name != "x/b" or f.src.name == "x/c",
        ),
    ),
    steps(
        "A policy that is deleted is gone",
        Step(apply=(DENY_INGRESS, DENY_EGRESS), expect=lambda f: "x" not in (f.src.ns, f.dst.ns)),
        Step(delete=(DENY_EGRESS,), expect=lambda f: f.dst.ns != "x"),
        Step(delete=(DENY_INGRESS,), expect=everything),
    ),
    steps(
        "A namespace's labels count as they are",
        Step(
            apply=(to("blue", pods=pod("a"), from_=[{"namespaceSelector": labels(team="blue")}]),),
            expect=lambda f: f.dst.name != "x/a",
        ),
        Step(
            namespaces={"y": {"team": "blue"}},
            expect=lambda f: f.dst.name != "x/a" or f.src.ns == "y",
        ),
        Step(
            namespaces={"y": {"team": None}, "z": {"team": "blue"}},
            expect=lambda f: f.dst.name != "x/a" or f.src.ns == "z",
        ),
    ),
    steps(
        "A sending pod's labels count as they are",
        Step(
            apply=(to("front", from_=[{"namespaceSelector": {}, "podSelector": labels(tier="front")}]),),
            expect=lambda f: f.dst.ns != "x",
        ),
        Step(
            pods={"y/b": {"tier": "front"}},
            expect=lambda f: f.dst.ns != "x" or f.src.name == "y/b",
        ),
        Step(pods={"y/b": {"tier": "back"}}, expect=lambda f: f.dst.ns != "x"),
    ),
    steps(
        "A receiving pod's labels count as they are, on egress",
        Step(
            apply=(out_of("back", to=[{"namespaceSelector": {}, "podSelector": labels(tier="back")}]),),
            expect=lambda f: f.src.ns != "x",
        ),
        Step(
            pods={"y/b": {"tier": "back"}, "x/c": {"tier": "back"}},
            expect=lambda f: f.src.ns != "x" or f.dst.name in ("y/b", "x/c"),
        ),
        Step(pods={"y/b": {"tier": None}}, expect=lambda f: f.src.ns != "x" or f.dst.name == "x/c"),
    ),
    steps(
        "A pod that gets the labels of a policy is isolated, and one that loses them is not",
        Step(apply=(network_policy("x", "jail", labels(jail="yes"), ingress=[]),), expect=everything),
        Step(pods={"x/b": {"jail": "yes"}}, expect=lambda f: f.dst.name != "x/b"),
        Step(pods={"x/b": {"jail": None}}, expect=everything),
    ),
)

FROM_B: Final = {"fromEndpoints": [pod("b")]}
NO_DEFAULT_DENY: Final = {"ingress": False, "egress": False}
AUDITED: Final = mesh_policy("x", "audited", ingress=[], mode="Audit")

MESH_POLICY_CASES: Final = (
    case(
        "A MeshPolicy's endpoints are of its own namespace",
        [mesh_policy("x", "from-b", pod("a"), ingress=[FROM_B])],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b",
    ),
    case(
        "An empty endpoint selector means all pods of the own namespace",
        [mesh_policy("x", "own", ingress=[{"fromEndpoints": [{}]}])],
        lambda f: f.dst.ns != "x" or f.src.ns == "x",
    ),
    case(
        "Another namespace is named by a label",
        [mesh_policy("x", "from-y", pod("a"), ingress=[{"fromEndpoints": [pods_of("y", pod="b")]}])],
        lambda f: f.dst.name != "x/a" or f.src.name == "y/b",
    ),
    case(
        "Any namespace is one whose label exists",
        [
            mesh_policy(
                "x",
                "from-b",
                pod("a"),
                ingress=[
                    {
                        "fromEndpoints": [
                            {
                                "matchLabels": {"any:pod": "b"},
                                "matchExpressions": [
                                    {"key": "k8s:io.kubernetes.pod.namespace", "operator": "Exists"}
                                ],
                            }
                        ]
                    }
                ],
            )
        ],
        lambda f: f.dst.name != "x/a" or f.src.pod == "b",
    ),
    case(
        "A namespace is named by its labels",
        [
            mesh_policy(
                "x",
                "to-y",
                pod("a"),
                egress=[{"toEndpoints": [{"matchLabels": {"k8s:io.cilium.k8s.namespace.labels.ns": "y"}}]}],
            )
        ],
        lambda f: f.src.name != "x/a" or f.dst.ns == "y",
    ),
    case(
        "A service account is a label",
        [
            mesh_policy(
                "x",
                "account",
                ingress=[
                    {"fromEndpoints": [{"matchLabels": {"io.cilium.k8s.policy.serviceaccount": "default"}}]}
                ],
            )
        ],
        lambda f: f.dst.ns != "x" or f.src.ns == "x",
    ),
    case(
        "No endpoints at all are nobody",
        [mesh_policy("x", "nobody", pod("a"), ingress=[{"fromEndpoints": []}])],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "An empty item allows nothing, and denies the rest",
        [mesh_policy("x", "empty", pod("a"), egress=[{}])],
        lambda f: f.src.name != "x/a",
    ),
    case(
        "An empty list of rules denies",
        [mesh_policy("x", "empty", pod("a"), ingress=[])],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "A MeshPolicy isolates the direction that it has rules for",
        [mesh_policy("x", "to-b", egress=[{"toEndpoints": [pod("b")]}])],
        lambda f: f.src.ns != "x" or f.dst.name == "x/b",
    ),
    case(
        "Deny beats allow",
        [mesh_policy("x", "both", pod("a"), ingress=[ALLOW_ALL], ingressDeny=[FROM_B])],
        lambda f: (f.src.name, f.dst.name) != ("x/b", "x/a"),
    ),
    case(
        "Deny of one policy beats allow of another",
        [
            mesh_policy("x", "allow", pod("a"), egress=[{"toEndpoints": [pods_of("y")]}]),
            mesh_policy("x", "deny", egressDeny=[{"toEndpoints": [pods_of("y", pod="b")]}]),
        ],
        lambda f: f.src.ns != "x" or (f.src.pod == "a" and f.dst.ns == "y" and f.dst.pod != "b"),
    ),
    case(
        "Deny alone is default deny too",
        [mesh_policy("x", "deny", pod("a"), ingressDeny=[FROM_B])],
        lambda f: f.dst.name != "x/a",
    ),
    case(
        "Deny without default deny denies what it names",
        [mesh_policy("x", "deny", ingressDeny=[FROM_B], enableDefaultDeny=NO_DEFAULT_DENY)],
        lambda f: f.dst.ns != "x" or f.src.name != "x/b",
    ),
    case(
        "Deny of a port leaves the others",
        [
            mesh_policy(
                "x",
                "deny-80",
                pod("a"),
                ingress=[ALLOW_ALL],
                ingressDeny=[{"toPorts": to_ports({"port": "80", "protocol": "TCP"})}],
            )
        ],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) != ("TCP", 80),
    ),
    case(
        "Deny of a port within a range that is allowed",
        [
            mesh_policy(
                "x",
                "hole",
                pod("a"),
                ingress=[{"toPorts": to_ports({"port": "1", "endPort": 1024, "protocol": "TCP"})}],
                ingressDeny=[{"toPorts": to_ports({"port": "81", "protocol": "ANY"})}],
            )
        ],
        lambda f: f.dst.name != "x/a" or (f.protocol, f.port) == ("TCP", 80),
    ),
    case(
        "Deny of a wide range beats allow of one port in it",
        [
            mesh_policy(
                "x",
                "narrow",
                pod("a"),
                ingress=[{"toPorts": to_ports({"port": "80", "protocol": "TCP"})}],
                ingressDeny=[
                    {
                        "fromEndpoints": [pods_of("y")],
                        "toPorts": to_ports({"port": "1", "endPort": 1024, "protocol": "TCP"}),
                    }
                ],
            )
        ],
        lambda f: f.dst.name != "x/a" or (f.src.ns != "y" and (f.protocol, f.port) == ("TCP", 80)),
    ),
    case(
        "Without default deny, allow rules change nothing",
        [mesh_policy("x", "idle", ingress=[FROM_B], egress=[], enableDefaultDeny=NO_DEFAULT_DENY)],
        everything,
    ),
    case(
        "Default deny can be asked for without rules",
        [mesh_policy("x", "shut", pod("a"), enableDefaultDeny={"egress": True})],
        lambda f: f.src.name != "x/a",
    ),
    case(
        "Default deny of another policy is none of enableDefaultDeny's",
        [
            mesh_policy("x", "idle", ingress=[FROM_B], enableDefaultDeny={"ingress": False}),
            mesh_policy("x", "shut", ingress=[]),
        ],
        lambda f: f.dst.ns != "x" or f.src.name == "x/b",
    ),
    case(
        "A port without a protocol is that of TCP, UDP and SCTP",
        [mesh_policy("x", "80", pod("a"), ingress=[{"toPorts": to_ports({"port": "80"})}])],
        lambda f: f.dst.name != "x/a" or f.port == 80,
    ),
    case(
        "Port 0 is every port of its protocol",
        [
            mesh_policy(
                "x", "udp", pod("a"), ingress=[{"toPorts": to_ports({"port": "0", "protocol": "UDP"})}]
            )
        ],
        lambda f: f.dst.name != "x/a" or f.protocol == "UDP",
    ),
    case(
        "Named ports and numbers, of several groups",
        [
            mesh_policy(
                "x",
                "ports",
                pod("a"),
                egress=[
                    {
                        "toEndpoints": [pods_of("y"), pod("c")],
                        "toPorts": [
                            *to_ports({"port": "serve-80-udp", "protocol": "UDP"}),
                            *to_ports({"port": "81", "protocol": "TCP"}, {"port": "82"}),
                        ],
                    }
                ],
            )
        ],
        lambda f: (
            f.src.name != "x/a"
            or (
                (f.dst.ns == "y" or f.dst.name == "x/c")
                and (f.protocol, f.port) in (("UDP", 80), ("TCP", 81))
            )
        ),
    ),
    case(
        "Echo requests, and nothing else",
        [
            mesh_policy(
                "x",
                "ping",
                ingress=[
                    {
                        "icmps": [
                            {
                                "fields": [
                                    {"family": "IPv4", "type": "EchoRequest"},
                                    {"family": "IPv6", "type": 128},
                                ]
                            }
                        ]
                    }
                ],
            )
        ],
        lambda f: f.dst.ns != "x" or f.protocol == ICMP,
    ),
    case(
        "An ICMP type is of one family",
        [
            mesh_policy(
                "x",
                "ping",
                pod("a"),
                egress=[
                    {"toEndpoints": [pods_of("y")], "icmps": [{"fields": [{"family": "IPv6", "type": 128}]}]}
                ],
            )
        ],
        lambda f: f.src.name != "x/a" or (f.dst.ns == "y" and (f.protocol, f.family) == (ICMP, "v6")),
    ),
    case(
        "Denied echo requests leave TCP and UDP",
        [
            mesh_policy(
                "x",
                "no-ping",
                ingressDeny=[{"icmps": [{"fields": [{"type": 8}, {"family": "IPv6", "type": 128}]}]}],
                enableDefaultDeny=NO_DEFAULT_DENY,
            )
        ],
        lambda f: f.dst.ns != "x" or f.protocol != ICMP,
    ),
    case(
        "Entity all is everybody",
        [mesh_policy("x", "all", ingress=[ALLOW_ALL], egress=[{"toEntities": ["all"]}])],
        everything,
        outside=True,
    ),
    case(
        "Entity cluster is pods and nodes",
        [mesh_policy("x", "cluster", ingress=[{"fromEntities": ["cluster"]}])],
        lambda f: f.dst.ns != "x" or f.src != WORLD,
        outside=True,
    ),
    case(
        "Entity cluster is pods and nodes on egress",
        [mesh_policy("x", "cluster", egress=[{"toEntities": ["cluster"]}])],
        lambda f: f.src.ns != "x" or f.dst != WORLD,
        outside=True,
    ),
    case(
        "Entity world is what is outside of the cluster",
        [mesh_policy("x", "world", ingress=[{"fromEntities": ["world"]}])],
        lambda f: f.dst.ns != "x" or f.src == WORLD or f.on_own_node,
        outside=True,
    ),
    case(
        "Entity world on egress is no node",
        [mesh_policy("x", "world", egress=[{"toEntities": ["world"]}])],
        lambda f: f.src.ns != "x" or f.dst == WORLD,
        outside=True,
    ),
    case(
        "Entity host is the own node",
        [mesh_policy("x", "host", ingress=[{"fromEntities": ["host"]}], egress=[{"toEntities": ["host"]}])],
        lambda f: "x" not in (f.src.ns, f.dst.ns) or f.on_own_node,
        outside=True,
    ),
    case(
        "Entity remote-node is the other nodes",
        [
            mesh_policy(
                "x",
                "nodes",
                ingress=[{"fromEntities": ["remote-node"]}],
                egress=[{"toEntities": ["remote-node"]}],
            )
        ],
        lambda f: (
            (f.dst.ns != "x" or f.src.pod.startswith("node"))
            and (f.src.ns != "x" or (f.dst.pod.startswith("node") and not f.on_own_node))
        ),
        outside=True,
    ),
    case(
        "The own node gets in whatever denies it",
        [mesh_policy("x", "shut", ingressDeny=[ALLOW_ALL])],
        lambda f: f.dst.ns != "x" or f.on_own_node,
        outside=True,
    ),
    case(
        "Denied to the world, and to nobody else",
        [
            mesh_policy(
                "x", "inside", egressDeny=[{"toEntities": ["world"]}], enableDefaultDeny=NO_DEFAULT_DENY
            )
        ],
        lambda f: f.src.ns != "x" or f.dst != WORLD,
        outside=True,
    ),
    case(
        "A CIDR block of everything means the world, no pods and no nodes",
        [mesh_policy("x", "cidr", ingress=[{"fromCIDR": list(EVERYWHERE)}])],
        lambda f: f.dst.ns != "x" or f.src == WORLD or f.on_own_node,
        outside=True,
    ),
    case(
        "A CIDR block of a pod's address doesn't mean the pod",
        [mesh_policy("x", "cidr", pod("a"), egress=[{"toCIDR": cidrs("y/b")}])],
        lambda f: f.src.name != "x/a",
    ),
    case(
        "A CIDR block with a hole where the world is means nobody here",
        [mesh_policy("x", "hole", pod("a"), egress=[{"toCIDRSet": everywhere_except("world")}])],
        lambda f: f.src.name != "x/a",
        outside=True,
    ),
    case(
        "Denied by a CIDR block, allowed by an entity",
        [
            mesh_policy(
                "x",
                "cidr",
                pod("a"),
                egress=[{"toEntities": ["all"]}],
                egressDeny=[{"toCIDR": cidrs("world"), "toPorts": to_ports({"port": "80"})}],
            )
        ],
        lambda f: (f.src.name, f.dst) != ("x/a", WORLD) or f.port != 80,
        outside=True,
    ),
    case(
        "A Service is its pods",
        [
            mesh_policy(
                "x",
                "service",
                pod("a"),
                egress=[{"toServices": [{"k8sService": {"serviceName": "b", "namespace": "y"}}]}],
            )
        ],
        lambda f: f.src.name != "x/a" or f.dst.name == "y/b",
    ),
    case(
        "Services are selected by their labels, with a port",
        [
            mesh_policy(
                "x",
                "services",
                egress=[
                    {
                        "toServices": [
                            {
                                "k8sServiceSelector": {
                                    "selector": where("svc", "In", "b", "c"),
                                    "namespace": "z",
                                }
                            }
                        ],
                        "toPorts": to_ports({"port": "80", "protocol": "TCP"}),
                    }
                ],
            )
        ],
        lambda f: f.src.ns != "x" or (f.dst.name in ("z/b", "z/c") and (f.protocol, f.port) == ("TCP", 80)),
    ),
    case(
        "A ClusterMeshPolicy's selectors select pods of all namespaces",
        [cluster_policy("from-b", pod("a"), ingress=[FROM_B])],
        lambda f: f.dst.pod != "a" or f.src.pod == "b",
    ),
    case(
        "A ClusterMeshPolicy is for namespaces by label",
        [
            cluster_policy(
                "shut",
                where("io.kubernetes.pod.namespace", "In", "x", "y"),
                egress=[{"toEndpoints": [pods_of("z")]}],
            )
        ],
        lambda f: f.src.ns == "z" or f.dst.ns == "z",
    ),
    case(
        "A cluster-wide baseline, and namespaces that open more",
        [
            cluster_policy("baseline", ingress=[{"fromEndpoints": [pods_of("z")]}]),
            mesh_policy("x", "own", ingress=[{"fromEndpoints": [{}]}]),
            to("y-80", ns="y", from_=[{"namespaceSelector": labels(ns="x")}], ports=tcp(80)),
        ],
        lambda f: (
            f.src.ns == "z"
            or (f.src.ns == f.dst.ns == "x")
            or (f.src.ns == "x" and f.dst.ns == "y" and (f.protocol, f.port) == ("TCP", 80))
        ),
    ),
    case(
        "A cluster-wide deny beats a NetworkPolicy's allow",
        [
            cluster_policy(
                "no-y",
                {"matchExpressions": [{"key": "pod", "operator": "NotIn", "values": ["c"]}]},
                ingressDeny=[{"fromEndpoints": [pods_of("y")]}],
                enableDefaultDeny=NO_DEFAULT_DENY,
            ),
            network_policy("x", "open", ingress=[{}]),
        ],
        lambda f: f.src.ns != "y" or f.dst.pod == "c",
    ),
    case(
        "NetworkPolicy and MeshPolicy add up",
        [
            to("from-y", pods=pod("a"), from_=[{"namespaceSelector": labels(ns="y")}]),
            mesh_policy("x", "from-b", pod("a"), ingress=[FROM_B]),
        ],
        lambda f: f.dst.name != "x/a" or f.src.ns == "y" or f.src.name == "x/b",
    ),
    case(
        "A policy in mode Audit changes nothing",
        [AUDITED, cluster_policy("audited", ingressDeny=[ALLOW_ALL], egressDeny=[{}], mode="Audit")],
        everything,
        outside=True,
    ),
    case(
        "What a policy in mode Audit allows is not allowed by it",
        [
            mesh_policy("x", "real", pod("a"), ingress=[FROM_B]),
            mesh_policy("x", "audited", pod("a"), ingress=[ALLOW_ALL], mode="Audit"),
        ],
        lambda f: f.dst.name != "x/a" or f.src.name == "x/b",
    ),
    steps(
        "A policy leaves mode Audit and returns to it",
        Step(apply=(AUDITED,), expect=everything),
        Step(
            apply=(mesh_policy("x", "audited", ingress=[], mode="Enforce"),),
            expect=lambda f: f.dst.ns != "x",
        ),
        Step(apply=(AUDITED,), expect=everything),
    ),
    steps(
        "A MeshPolicy is narrowed, widened and deleted",
        Step(
            apply=(mesh_policy("x", "changing", ingress=[{"fromEndpoints": [pods_of("y")]}]),),
            expect=lambda f: f.dst.ns != "x" or f.src.ns == "y",
        ),
        Step(
            apply=(
                mesh_policy(
                    "x",
                    "changing",
                    ingress=[{"fromEndpoints": [pods_of("y")]}],
                    ingressDeny=[{"fromEndpoints": [pods_of("y", pod="c")]}],
                ),
            ),
            expect=lambda f: f.dst.ns != "x" or f.src.name in ("y/a", "y/b"),
        ),
        Step(
            apply=(mesh_policy("x", "changing", pod("c"), ingress=[{"fromEntities": ["cluster"]}]),),
            expect=everything,
        ),
        Step(delete=(mesh_policy("x", "changing"),), expect=everything),
    ),
    steps(
        "Labels of namespaces count as they are for a ClusterMeshPolicy",
        Step(
            apply=(
                cluster_policy(
                    "tenants",
                    {"matchLabels": {"io.cilium.k8s.namespace.labels.tenant": "one"}},
                    ingress=[
                        {
                            "fromEndpoints": [
                                {"matchLabels": {"io.cilium.k8s.namespace.labels.tenant": "one"}}
                            ]
                        }
                    ],
                ),
            ),
            expect=everything,
        ),
        Step(
            namespaces={"x": {"tenant": "one"}, "y": {"tenant": "one"}},
            expect=lambda f: f.dst.ns == "z" or f.src.ns != "z",
        ),
        Step(
            namespaces={"y": {"tenant": "two"}},
            expect=lambda f: f.dst.ns != "x" or f.src.ns == "x",
        ),
    ),
)

CASES: Final = (*NETWORK_POLICY_CASES, *MESH_POLICY_CASES)
