"""How API objects of policy read, and why some are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.api import fields, meshidentity, names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import EXCLUDED_LABELS, MeshConfig, PolicySettings
from meshwire.api.meshendpointslice import Endpoint, MeshEndpointSlice, NamedPort, PodRef
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    NAMESPACE_LABELS_PREFIX,
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
from meshwire.api.policyobjects import mesh_policy, network_policy
from meshwire.policy import identity

CRDS = Path(__file__).parents[2] / "crds"
OWN = Requirement(NAMESPACE_LABEL, Operator.IN, ("shop",))
SHOP = Selector((OWN,))
BOTH = frozenset(Direction)
IN, OUT = frozenset({Direction.INGRESS}), frozenset({Direction.EGRESS})


def mesh(spec: Any, *, kind: str = "MeshPolicy", **metadata: Any) -> dict[str, Any]:
    own = {"namespace": "shop"} if kind == "MeshPolicy" else {}
    return {
        "apiVersion": names.API_VERSION,
        "kind": kind,
        "metadata": {"name": "p", **own, **metadata},
        "spec": {"endpointSelector": {}, **spec},
    }


def net(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": "shop"}, "spec": {"podSelector": {}, **spec}}


def select(*requirements: Requirement, **labels: str) -> Selector:
    pairs = [Requirement(key, Operator.IN, (value,)) for key, value in labels.items()]
    return Selector(tuple(sorted({*requirements, *pairs})))


def ingress(path: str, peers: tuple[Peer, ...] | None = None, *ports: Any, deny: bool = False) -> Rule:
    return Rule(direction=Direction.INGRESS, path=path, deny=deny, peers=peers, ports=ports or None)


def egress(path: str, peers: tuple[Peer, ...] | None = None, *ports: Any, deny: bool = False) -> Rule:
    return Rule(direction=Direction.EGRESS, path=path, deny=deny, peers=peers, ports=ports or None)


def policy(
    *rules: Rule,
    deny: frozenset[Direction] = IN,
    kind: Kind = Kind.MESH_POLICY,
    selector: Selector = SHOP,
    mode: PolicyMode = PolicyMode.ENFORCE,
) -> Policy:
    return Policy(
        kind=kind,
        namespace="" if kind is Kind.CLUSTER_MESH_POLICY else "shop",
        name="p",
        mode=mode,
        selector=selector,
        default_deny=deny,
        rules=rules,
    )


def cidr(block: str, *excepts: str, pods: bool = False) -> CidrPeer:
    return CidrPeer(ip_network(block), tuple(ip_network(each) for each in excepts), pods)


def in_items(**item: Any) -> dict[str, Any]:
    return {"ingress": [item]}


def ports(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"ports": list(items)}]


READ: dict[str, tuple[dict[str, Any], Policy]] = {
    "an item of nothing allows nothing and denies the rest": (mesh({"ingress": [{}]}), policy()),
    "so does an empty list": (mesh({"ingress": []}), policy()),
    "of deny rules too": (mesh({"egressDeny": [{}]}), policy(deny=OUT)),
    "default deny can be left off": (
        mesh({"ingress": [{"fromEntities": ["world"]}], "enableDefaultDeny": {"ingress": False}}),
        policy(ingress("spec.ingress[0]", (Entity.WORLD,)), deny=frozenset()),
    ),
    "default deny of the other direction is its own": (
        mesh({"ingress": [], "enableDefaultDeny": {"egress": True}}),
        policy(deny=BOTH),
    ),
    "null is absent": (
        mesh({"ingress": [{"fromEntities": ["host"], "toPorts": None}], "egress": None, "description": "x"}),
        policy(ingress("spec.ingress[0]", (Entity.HOST,))),
    ),
    "an empty list of peers is nobody": (
        mesh(in_items(fromEndpoints=[])),
        policy(ingress("spec.ingress[0]", ())),
    ),
    "a selector selects in the policy's namespace": (
        mesh(in_items(fromEndpoints=[{}, {"matchLabels": {"app": "a"}}])),
        policy(ingress("spec.ingress[0]", (SHOP, select(OWN, app="a")))),
    ),
    "unless it says which": (
        mesh(
            in_items(
                fromEndpoints=[
                    {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "pay", "any:app": "a"}},
                    {"matchExpressions": [{"key": NAMESPACE_LABEL, "operator": "Exists"}]},
                    {"matchLabels": {"io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "x"}},
                ]
            )
        ),
        policy(
            ingress(
                "spec.ingress[0]",
                (
                    select(**{NAMESPACE_LABEL: "pay", "app": "a"}),
                    select(Requirement(NAMESPACE_LABEL, Operator.EXISTS)),
                    select(**{f"{NAMESPACE_LABELS_PREFIX}kubernetes.io/metadata.name": "x"}),
                ),
            )
        ),
    ),
    "a cluster's policy selects in all": (
        mesh(
            {"endpointSelector": {"matchLabels": {"app": "b"}}, "egress": [{"toEndpoints": [{}]}]},
            kind="ClusterMeshPolicy",
        ),
        policy(
            egress("spec.egress[0]", (Selector(),)),
            deny=OUT,
            kind=Kind.CLUSTER_MESH_POLICY,
            selector=select(app="b"),
        ),
    ),
    "equal requirements are one, values are sorted": (
        mesh(
            {
                "ingress": [],
                "endpointSelector": {
                    "matchLabels": {"app": "a", "k8s:app": "a"},
                    "matchExpressions": [
                        {"key": "app", "operator": "In", "values": ["a"]},
                        {"key": "any:tier", "operator": "NotIn", "values": ["c", "b", "c"]},
                        {"key": "x/y", "operator": "DoesNotExist", "values": []},
                        {"key": NAMESPACE_LABEL, "operator": "NotIn", "values": ["pay"]},
                    ],
                },
            }
        ),
        policy(
            selector=select(
                OWN,
                Requirement("tier", Operator.NOT_IN, ("b", "c")),
                Requirement("x/y", Operator.DOES_NOT_EXIST),
                Requirement(NAMESPACE_LABEL, Operator.NOT_IN, ("pay",)),
                app="a",
            )
        ),
    ),
    "addresses and blocks": (
        mesh(
            {
                "egress": [
                    {"toCIDR": ["192.0.2.1", "2001:DB8::/32"]},
                    {"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.0.0.0/8"]}]},
                ],
                "egressDeny": [{"toCIDR": ["2001:db8::1"]}],
            }
        ),
        policy(
            egress("spec.egress[0]", (cidr("192.0.2.1/32"), cidr("2001:db8::/32"))),
            egress("spec.egress[1]", (cidr("10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"),)),
            egress("spec.egressDeny[0]", (cidr("2001:db8::1/128"),), deny=True),
            deny=OUT,
        ),
    ),
    "every entity": (
        mesh({"ingressDeny": [{"fromEntities": [str(each) for each in Entity]}]}),
        policy(ingress("spec.ingressDeny[0]", tuple(Entity), deny=True)),
    ),
    "ports, ranges and names, of several groups": (
        mesh(
            in_items(
                toPorts=[
                    {"ports": [{"port": "80", "protocol": "TCP"}, {"port": "0", "protocol": "UDP"}, {}]},
                    {
                        "ports": [
                            {"port": "1", "endPort": 65535},
                            {"port": "https"},
                            {"port": "9", "endPort": 0},
                        ]
                    },
                ]
            )
        ),
        policy(
            ingress(
                "spec.ingress[0]",
                None,
                PortRange(Protocol.TCP, 80, 80),
                PortRange(Protocol.UDP),
                PortRange(Protocol.ANY),
                PortRange(Protocol.ANY, 1, 65535),
                PortRange(Protocol.ANY, 0, 0, "https"),
                PortRange(Protocol.ANY, 9, 9),
            )
        ),
    ),
    "types of ICMP": (
        mesh(
            in_items(
                icmps=[
                    {"fields": [{"type": 255}, {"type": "EchoRequest"}, {"type": "11", "family": "IPv4"}]},
                    {"fields": [{"family": "IPv6", "type": "EchoRequest"}, {"family": "IPv6", "type": 0}]},
                ]
            )
        ),
        policy(
            ingress(
                "spec.ingress[0]",
                None,
                *(IcmpType(4, 255), IcmpType(4, 8), IcmpType(4, 11), IcmpType(6, 128), IcmpType(6, 0)),
            )
        ),
    ),
    "Services by name and by labels": (
        mesh(
            {
                "egress": [
                    {
                        "toServices": [
                            {"k8sService": {"serviceName": "web", "namespace": "pay"}},
                            {"k8sServiceSelector": {"selector": {"matchLabels": {"any:a": "b"}}}},
                        ]
                    }
                ],
                "mode": "Audit",
            }
        ),
        policy(
            egress("spec.egress[0]", (ServicePeer("pay", "web"), ServicePeer(labels=select(a="b")))),
            deny=OUT,
            mode=PolicyMode.AUDIT,
        ),
    ),
    "rules keep their place and its number": (
        mesh(
            {"ingress": [{}, {"toPorts": ports({"port": "1"})}], "egressDeny": [{}, {"toEntities": ["all"]}]}
        ),
        policy(
            ingress("spec.ingress[1]", None, PortRange(Protocol.ANY, 1, 1)),
            egress("spec.egressDeny[1]", (Entity.ALL,), deny=True),
            deny=BOTH,
        ),
    ),
}


@pytest.mark.parametrize(("source", "expected"), READ.values(), ids=READ)
def test_a_mesh_policy_reads_as_it_is_meant(source: dict[str, Any], expected: Policy) -> None:
    assert mesh_policy(source) == expected


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no spec": ({"kind": "MeshPolicy", "metadata": {"namespace": "a"}}, "spec", "must be an object"),
    "no kind": ({**mesh({}), "kind": "Pod"}, "kind", "must be MeshPolicy or ClusterMeshPolicy"),
    "no namespace": (mesh({"ingress": []}, namespace=""), "metadata.namespace", "must be given"),
    "no selector": (
        mesh({"endpointSelector": None, "ingress": []}),
        "spec.endpointSelector",
        "must be given; {} selects every pod",
    ),
    "nothing said": (
        mesh({"mode": "Audit"}),
        "spec",
        "says nothing: give it ingress, ingressDeny, egress or egressDeny",
    ),
    "several policies": (
        {**mesh({"ingress": []}), "specs": []},
        "specs",
        "is not supported: an object holds one policy, under spec",
    ),
    "a policy for nodes": (
        mesh({"nodeSelector": {}, "ingress": []}),
        "spec.nodeSelector",
        "is not supported",
    ),
    "an unknown mode": (mesh({"mode": "Deny", "ingress": []}), "spec.mode", "must be one of Enforce, Audit"),
    "rules that are no list": (mesh({"ingress": {}}), "spec.ingress", "must be a list"),
    "a rule that is no object": (mesh({"ingress": ["all"]}), "spec.ingress[0]", "must be an object"),
    "default deny by a word": (
        mesh({"enableDefaultDeny": {"ingress": "no"}}),
        "spec.enableDefaultDeny.ingress",
        "must be true or false",
    ),
    "pods of another namespace": (
        mesh({"endpointSelector": {"matchLabels": {NAMESPACE_LABEL: "pay"}}, "ingress": []}),
        "spec.endpointSelector",
        "a MeshPolicy is for pods of its own namespace, shop, only",
    ),
    "pods of no namespace": (
        mesh(
            {
                "endpointSelector": {
                    "matchExpressions": [{"key": NAMESPACE_LABEL, "operator": "DoesNotExist"}]
                },
                "ingress": [],
            }
        ),
        "spec.endpointSelector",
        "a MeshPolicy is for pods of its own namespace, shop, only",
    ),
    "two kinds of peers": (
        mesh(in_items(fromEndpoints=[], fromCIDRSet=[])),
        "spec.ingress[0].fromCIDRSet",
        "can't be in one item with fromEndpoints: write an item for each",
    ),
    "ports and ICMP": (
        mesh({"egressDeny": [{"toPorts": ports({}), "icmps": [{"fields": [{"type": 8}]}]}]}),
        "spec.egressDeny[0].icmps",
        "can't be in one item with toPorts: write an item for each",
    ),
    "peers of the other direction": (
        mesh(in_items(toEndpoints=[{}])),
        "spec.ingress[0].toEndpoints",
        "is not supported",
    ),
    "names of the DNS": (
        mesh({"egress": [{"toFQDNs": [{"matchName": "example.com"}]}]}),
        "spec.egress[0].toFQDNs",
        "is not supported",
    ),
    "HTTP rules": (
        mesh(in_items(toPorts=[{**ports({"port": "80"})[0], "rules": {"http": [{}]}}])),
        "spec.ingress[0].toPorts[0].rules",
        "HTTP rules are not supported yet",
    ),
    "TLS": (
        mesh(in_items(toPorts=[{**ports({"port": "80"})[0], "serverNames": ["a"]}])),
        "spec.ingress[0].toPorts[0].serverNames",
        "is not supported",
    ),
    "an empty list of ports": (
        mesh(in_items(toPorts=[])),
        "spec.ingress[0].toPorts",
        "is empty: leave it out to mean all ports and protocols",
    ),
    "a group of no ports": (
        mesh(in_items(toPorts=[{}])),
        "spec.ingress[0].toPorts[0].ports",
        "must have 1 to 40 items",
    ),
    "too many ports": (
        mesh(in_items(toPorts=ports(*[{"port": "1"}] * 41))),
        "spec.ingress[0].toPorts[0].ports",
        "must have 1 to 40 items",
    ),
    "a port that is no string": (
        mesh(in_items(toPorts=ports({"port": 80}))),
        "spec.ingress[0].toPorts[0].ports[0].port",
        "must be a string",
    ),
    "a range that ends before it starts": (
        mesh(in_items(toPorts=ports({"port": "80", "endPort": 79}))),
        "spec.ingress[0].toPorts[0].ports[0].endPort",
        "79 is below port 80, where the range starts",
    ),
    "a range that starts at a name": (
        mesh(in_items(toPorts=ports({"port": "http", "endPort": 90}))),
        "spec.ingress[0].toPorts[0].ports[0].endPort",
        "a range starts at a number, not at a name",
    ),
    "a range that starts nowhere": (
        mesh(in_items(toPorts=ports({"endPort": 90}))),
        "spec.ingress[0].toPorts[0].ports[0].endPort",
        "needs a port, 1 to 65535, where the range starts",
    ),
    "ICMP as a protocol": (
        mesh(in_items(toPorts=ports({"protocol": "ICMP"}))),
        "spec.ingress[0].toPorts[0].ports[0].protocol",
        "must be one of ANY, TCP, UDP, SCTP",
    ),
    "a type of the other family's ICMP": (
        mesh(in_items(icmps=[{"fields": [{"type": "PacketTooBig"}]}])),
        "spec.ingress[0].icmps[0].fields[0].type",
        "must be a number from 0 to 255 or the name of a type of IPv4's ICMP",
    ),
    "a type too high": (
        mesh(in_items(icmps=[{"fields": [{"type": 256, "family": "IPv6"}]}])),
        "spec.ingress[0].icmps[0].fields[0].type",
        "must be a number from 0 to 255 or the name of a type of IPv6's ICMP",
    ),
    "an unknown family": (
        mesh(in_items(icmps=[{"fields": [{"type": 8, "family": "ipv4"}]}])),
        "spec.ingress[0].icmps[0].fields[0].family",
        "must be one of IPv4, IPv6",
    ),
    "an unknown entity": (
        mesh(in_items(fromEntities=["host", "init"])),
        "spec.ingress[0].fromEntities[1]",
        "must be one of all, cluster, host, kube-apiserver, remote-node, world",
    ),
    "no address": (
        mesh(in_items(fromCIDR=["10.0.0.0/8", "example.com"])),
        "spec.ingress[0].fromCIDR[1]",
        "'example.com' is neither a CIDR block such as 10.0.0.0/8 nor an address",
    ),
    "a netmask": (
        mesh(in_items(fromCIDR=["10.0.0.0/255.0.0.0"])),
        "spec.ingress[0].fromCIDR[0]",
        "'10.0.0.0/255.0.0.0' is neither a CIDR block such as 10.0.0.0/8 nor an address",
    ),
    "bits beyond the prefix": (
        mesh(in_items(fromCIDR=["10.0.0.1/8"])),
        "spec.ingress[0].fromCIDR[0]",
        "'10.0.0.1/8' has address bits set beyond its prefix: write 10.0.0.0/8",
    ),
    "IPv4 in IPv6": (
        mesh(in_items(fromCIDR=["::ffff:10.0.0.0/104"])),
        "spec.ingress[0].fromCIDR[0]",
        "'::ffff:10.0.0.0/104' is an IPv4 address in IPv6 form: write it as IPv4",
    ),
    "an address where a block belongs": (
        mesh(in_items(fromCIDRSet=[{"cidr": "10.0.0.1"}])),
        "spec.ingress[0].fromCIDRSet[0].cidr",
        "'10.0.0.1' is not a CIDR block",
    ),
    "a block that comes by reference": (
        mesh(in_items(fromCIDRSet=[{"cidrGroupRef": "a"}])),
        "spec.ingress[0].fromCIDRSet[0].cidrGroupRef",
        "is not supported",
    ),
    "an exception outside": (
        mesh(in_items(fromCIDRSet=[{"cidr": "10.0.0.0/8", "except": ["10.0.0.0/16", "11.0.0.0/16"]}])),
        "spec.ingress[0].fromCIDRSet[0].except[1]",
        "11.0.0.0/16 is not inside of 10.0.0.0/8",
    ),
    "an exception larger than the block": (
        mesh(in_items(fromCIDRSet=[{"cidr": "10.0.0.0/8", "except": ["10.0.0.0/7"]}])),
        "spec.ingress[0].fromCIDRSet[0].except[0]",
        "10.0.0.0/7 is not inside of 10.0.0.0/8",
    ),
    "an exception of the other family": (
        mesh(in_items(fromCIDRSet=[{"cidr": "0.0.0.0/0", "except": ["::/0"]}])),
        "spec.ingress[0].fromCIDRSet[0].except[0]",
        "::/0 is not inside of 0.0.0.0/0",
    ),
    "an entity as a label": (
        mesh(in_items(fromEndpoints=[{"matchLabels": {"reserved:host": ""}}])),
        "spec.ingress[0].fromEndpoints[0].matchLabels",
        "'reserved:host': labels are written with k8s: or any: before the key, or nothing",
    ),
    "two prefixes": (
        mesh(in_items(fromEndpoints=[{"matchLabels": {"k8s:any:a": ""}}])),
        "spec.ingress[0].fromEndpoints[0].matchLabels",
        "'k8s:any:a': labels are written with k8s: or any: before the key, or nothing",
    ),
    "labels outside of matchLabels": (
        mesh(in_items(fromEndpoints=[{"matchLabels": None, "role": "frontend"}])),
        "spec.ingress[0].fromEndpoints[0].role",
        "is not supported",
    ),
    "no label's value": (
        mesh(in_items(fromEndpoints=[{"matchLabels": {"a": "b c"}}])),
        "spec.ingress[0].fromEndpoints[0].matchLabels.a",
        "'b c' is not a label's value",
    ),
    "no label's key": (
        mesh(
            in_items(
                fromEndpoints=[{"matchExpressions": [{"key": "a/b/c", "operator": "Exists"}]}],
            )
        ),
        "spec.ingress[0].fromEndpoints[0].matchExpressions[0].key",
        "'a/b/c' is not a label's key",
    ),
    "no operator": (
        mesh({"endpointSelector": {"matchExpressions": [{"key": "a", "values": ["b"]}]}, "ingress": []}),
        "spec.endpointSelector.matchExpressions[0].operator",
        "must be one of In, NotIn, Exists, DoesNotExist",
    ),
    "values that mean nothing": (
        mesh(
            {
                "endpointSelector": {
                    "matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]
                },
                "ingress": [],
            }
        ),
        "spec.endpointSelector.matchExpressions[0].values",
        "Exists takes no values",
    ),
    "values left out": (
        mesh({"endpointSelector": {"matchExpressions": [{"key": "a", "operator": "NotIn"}]}, "ingress": []}),
        "spec.endpointSelector.matchExpressions[0].values",
        "NotIn needs values",
    ),
    "a Service twice": (
        mesh({"egress": [{"toServices": [{"k8sService": {}, "k8sServiceSelector": {}}]}]}),
        "spec.egress[0].toServices[0]",
        "must have either k8sService or k8sServiceSelector",
    ),
    "a Service without name": (
        mesh({"egress": [{"toServices": [{"k8sService": {"namespace": "a"}}]}]}),
        "spec.egress[0].toServices[0].k8sService.serviceName",
        "must be given",
    ),
    "Services by nothing": (
        mesh({"egress": [{"toServices": [{"k8sServiceSelector": {"namespace": "a"}}]}]}),
        "spec.egress[0].toServices[0].k8sServiceSelector.selector",
        "must be given; {} selects every Service",
    ),
    **{
        f"port {port!r}": (
            mesh(in_items(toPorts=ports({"port": port}))),
            "spec.ingress[0].toPorts[0].ports[0].port",
            "must be a number from 1 to 65535"
            if port == "65536"
            else f"{port!r} is neither a number, 0 to 65535, nor a port's name (1 to 15 of a-z, 0-9 and -)",
        )
        for port in ("65536", "080", "-1", "", "HTTP", "1-2", "a--b", "a" * 16, "http/1", "۸۰")
    },
}


@pytest.mark.parametrize(("source", "path", "problem"), REFUSED.values(), ids=REFUSED)
def test_a_mesh_policy_is_refused_with_a_reason(source: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        mesh_policy(source)
    assert (refusal.value.path, refusal.value.problem) == (path, problem)


def test_the_kind_may_come_from_elsewhere() -> None:
    source = mesh({"ingress": []})
    del source["kind"]
    assert mesh_policy(source, Kind.MESH_POLICY) == policy()
    assert mesh_policy(source, Kind.CLUSTER_MESH_POLICY).namespace == ""


def test_metadata_and_conditions_are_read() -> None:
    source = mesh({"ingress": []}, uid="u", resourceVersion="7", generation=3)
    source["status"] = {"conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}]}
    found = mesh_policy(source)
    assert (found.uid, found.resource_version, found.generation) == ("u", "7", 3)
    assert [condition.type for condition in found.conditions] == ["Ready"]


# Policies of Cilium's documentation: nothing but apiVersion and kind differs.
CILIUM: dict[str, tuple[str, Policy]] = {
    "access of one class of pods to another (the Star Wars demo)": (
        """
        description: "L3-L4 policy to restrict deathstar access to empire ships only"
        endpointSelector:
          matchLabels: {org: empire, class: deathstar}
        ingress:
        - fromEndpoints:
          - matchLabels: {org: empire}
          toPorts:
          - ports:
            - port: "80"
              protocol: TCP
        """,
        policy(
            ingress("spec.ingress[0]", (select(OWN, org="empire"),), PortRange(Protocol.TCP, 80, 80)),
            selector=select(OWN, **{"org": "empire", "class": "deathstar"}),
        ),
    ),
    "addresses outside of the cluster": (
        """
        endpointSelector:
          matchLabels: {app: myService}
        egress:
        - toCIDR:
          - 20.1.1.1/32
        - toCIDRSet:
          - cidr: 10.0.0.0/8
            except:
            - 10.96.0.0/12
        """,
        policy(
            egress("spec.egress[0]", (cidr("20.1.1.1/32"),)),
            egress("spec.egress[1]", (cidr("10.0.0.0/8", "10.96.0.0/12"),)),
            deny=OUT,
            selector=select(OWN, app="myService"),
        ),
    ),
    "the cluster's DNS": (
        """
        endpointSelector:
          {}
        egress:
        - toEndpoints:
          - matchLabels:
              k8s:io.kubernetes.pod.namespace: kube-system
              k8s-app: kube-dns
          toPorts:
          - ports:
            - port: '53'
              protocol: UDP
        """,
        policy(
            egress(
                "spec.egress[0]",
                (select(**{NAMESPACE_LABEL: "kube-system", "k8s-app": "kube-dns"}),),
                PortRange(Protocol.UDP, 53, 53),
            ),
            deny=OUT,
        ),
    ),
    "ping": (
        """
        endpointSelector:
          matchLabels: {app: myService}
        egress:
        - icmps:
          - fields:
            - type: 8
              family: IPv4
            - type: EchoRequest
              family: IPv6
        """,
        policy(
            egress("spec.egress[0]", None, IcmpType(4, 8), IcmpType(6, 128)),
            deny=OUT,
            selector=select(OWN, app="myService"),
        ),
    ),
    "all but some": (
        """
        endpointSelector:
          matchLabels: {role: frontend}
        egress:
        - toEntities:
          - all
        egressDeny:
        - toEndpoints:
          - matchLabels: {role: backend}
        """,
        policy(
            egress("spec.egress[0]", (Entity.ALL,)),
            egress("spec.egressDeny[0]", (select(OWN, role="backend"),), deny=True),
            deny=OUT,
            selector=select(OWN, role="frontend"),
        ),
    ),
    "namespaces by their labels": (
        """
        endpointSelector:
          matchLabels: {name: rebel-base}
        ingress:
        - fromEndpoints:
          - matchLabels:
              io.cilium.k8s.namespace.labels.faction: "alliance"
        """,
        policy(
            ingress("spec.ingress[0]", (select(**{f"{NAMESPACE_LABELS_PREFIX}faction": "alliance"}),)),
            selector=select(OWN, name="rebel-base"),
        ),
    ),
}


@pytest.mark.parametrize(("spec", "expected"), CILIUM.values(), ids=CILIUM)
def test_policies_of_ciliums_documentation_read_alike(spec: str, expected: Policy) -> None:
    assert mesh_policy(mesh(yaml.safe_load(spec))) == expected


def np(*rules: Rule, deny: frozenset[Direction] = IN, selector: Selector = SHOP) -> Policy:
    return policy(*rules, deny=deny, kind=Kind.NETWORK_POLICY, selector=selector)


TO_OWN_NODE = egress("spec.policyTypes", (Entity.HOST,))
NAMESPACE_X = select(**{f"{NAMESPACE_LABELS_PREFIX}name": "x"})

NETWORK: dict[str, tuple[dict[str, Any], Policy]] = {
    "no rules isolate ingress": (net(), np()),
    "an item of nothing allows everything": (net(ingress=[{}]), np(ingress("spec.ingress[0]"))),
    "empty lists mean everybody and everything": (
        net(ingress=[{"from": [], "ports": []}]),
        np(ingress("spec.ingress[0]")),
    ),
    "egress rules isolate egress too": (
        net(egress=[{}]),
        np(egress("spec.egress[0]"), TO_OWN_NODE, deny=BOTH),
    ),
    "an empty list of egress rules doesn't": (net(egress=[]), np()),
    "types said isolate alone, and rules of others mean nothing": (
        net(policyTypes=["Egress"], ingress=[{}]),
        np(TO_OWN_NODE, deny=OUT),
    ),
    "peers of one item": (
        net(
            podSelector={"matchLabels": {"app": "a"}},
            ingress=[
                {
                    "from": [
                        {"podSelector": {"matchLabels": {"app": "b"}}},
                        {"namespaceSelector": {}},
                        {"namespaceSelector": {"matchLabels": {"name": "x"}}},
                        {"namespaceSelector": {"matchLabels": {"name": "x"}}, "podSelector": {}},
                        {
                            "namespaceSelector": {
                                "matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["dev"]}]
                            },
                            "podSelector": {"matchLabels": {"app": "b"}},
                        },
                        {"ipBlock": {"cidr": "10.0.0.1/8", "except": ["10.1.2.3/16"]}},
                    ]
                }
            ],
        ),
        np(
            ingress(
                "spec.ingress[0]",
                (
                    select(OWN, app="b"),
                    Selector(),
                    NAMESPACE_X,
                    NAMESPACE_X,
                    select(Requirement(f"{NAMESPACE_LABELS_PREFIX}env", Operator.NOT_IN, ("dev",)), app="b"),
                    cidr("10.0.0.0/8", "10.1.0.0/16", pods=True),
                ),
            ),
            selector=select(OWN, app="a"),
        ),
    ),
    "ports": (
        net(
            policyTypes=["Ingress", "Egress"],
            egress=[
                {
                    "ports": [
                        {},
                        {"protocol": "UDP"},
                        {"port": 53, "protocol": "UDP"},
                        {"port": "http"},
                        {"port": 8000, "endPort": 8080, "protocol": "SCTP"},
                    ]
                }
            ],
        ),
        np(
            egress(
                "spec.egress[0]",
                None,
                PortRange(Protocol.TCP),
                PortRange(Protocol.UDP),
                PortRange(Protocol.UDP, 53, 53),
                PortRange(Protocol.TCP, 0, 0, "http"),
                PortRange(Protocol.SCTP, 8000, 8080),
            ),
            TO_OWN_NODE,
            deny=BOTH,
        ),
    ),
}


@pytest.mark.parametrize(("source", "expected"), NETWORK.values(), ids=NETWORK)
def test_a_network_policy_reads_as_it_is_meant(source: dict[str, Any], expected: Policy) -> None:
    assert network_policy(source) == expected


NETWORK_REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a peer of nothing": (
        net(ingress=[{"from": [{}]}]),
        "spec.ingress[0].from[0]",
        "must have podSelector, namespaceSelector or ipBlock",
    ),
    "a block with a selector": (
        net(ingress=[{"from": [{"podSelector": {}, "ipBlock": {"cidr": "::/0"}}]}]),
        "spec.ingress[0].from[0].ipBlock",
        "can't be in one peer with a selector",
    ),
    "a peer of a newer API": (
        net(ingress=[{"from": [{"podSelector": {}, "serviceSelector": {}}]}]),
        "spec.ingress[0].from[0].serviceSelector",
        "is not supported",
    ),
    "an unknown type": (net(policyTypes=["Both"]), "spec.policyTypes[0]", "must be one of Ingress, Egress"),
    "a label that no pod can have": (
        net(podSelector={"matchLabels": {NAMESPACE_LABEL: "a"}}),
        "spec.podSelector.matchLabels",
        f"{NAMESPACE_LABEL!r} is a label that Meshwire derives: no NetworkPolicy can select by it",
    ),
    "a prefix": (
        net(podSelector={"matchLabels": {"k8s:app": "a"}}),
        "spec.podSelector.matchLabels",
        "'k8s:app' is not a label's key",
    ),
    "any protocol": (
        net(ingress=[{"ports": [{"protocol": "ANY"}]}]),
        "spec.ingress[0].ports[0].protocol",
        "must be one of TCP, UDP, SCTP",
    ),
    "port 0": (
        net(ingress=[{"ports": [{"port": 0}]}]),
        "spec.ingress[0].ports[0].port",
        "must be a number from 1 to 65535",
    ),
    "a number in quotes": (
        net(ingress=[{"ports": [{"port": "80"}]}]),
        "spec.ingress[0].ports[0].port",
        "'80' is neither a number, 0 to 65535, nor a port's name (1 to 15 of a-z, 0-9 and -)",
    ),
    "a range from nowhere": (
        net(ingress=[{"ports": [{"endPort": 80}]}]),
        "spec.ingress[0].ports[0].endPort",
        "needs a port, 1 to 65535, where the range starts",
    ),
}


@pytest.mark.parametrize(("source", "path", "problem"), NETWORK_REFUSED.values(), ids=NETWORK_REFUSED)
def test_a_network_policy_is_refused_with_a_reason(source: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        network_policy(source)
    assert (refusal.value.path, refusal.value.problem) == (path, problem)


JUNK: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    70000,
    1.5,
    "",
    "x y",
    "::",
    [],
    {},
    [None],
    [[]],
    [""],
    {"a": None},
    {"a": 1},
)


def broken(source: Any) -> Iterator[Any]:
    """`source` with one of its parts, at any depth, replaced by junk, for each of them."""
    yield from JUNK
    for key, value in list(source.items() if isinstance(source, dict) else enumerate(source)):
        for other in broken(value) if isinstance(value, dict | list) else JUNK:
            source[key] = other
            yield source
        source[key] = value


@pytest.mark.parametrize("read", [mesh_policy, network_policy])
def test_whatever_is_written_reads_or_is_refused(read: Callable[[Any], Policy]) -> None:
    refused = accepted = 0
    for source, _ in (READ if read is mesh_policy else NETWORK).values():
        for spec in broken(deepcopy(source["spec"])):
            try:
                read({**source, "spec": spec})
                accepted += 1
            except InvalidSpec as refusal:
                assert refusal.path.startswith("spec")
                refused += 1
    assert refused > accepted > 0


labels = st.dictionaries(
    st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8})?(/[a-z]{1,8})?", fullmatch=True),
    st.from_regex(r"([a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?)?", fullmatch=True),
    max_size=6,
)


@settings(deadline=None)
@given(st.integers(meshidentity.FIRST, meshidentity.LAST), labels)
def test_an_identity_reads_as_it_is_written(number: int, pairs: dict[str, str]) -> None:
    found = MeshIdentity(number=number, labels=tuple(sorted(pairs.items())))
    assert MeshIdentity.from_object(found.to_dict()) == found


@pytest.mark.parametrize("name", ["", "255", "0256", "16777216", "1e3", "٣٠٠", "-300", "9" * 400])
def test_an_identity_is_refused_whose_name_is_no_number_of_one(name: str) -> None:
    with pytest.raises(InvalidSpec, match=r"metadata.name: .* is not a number from 256 to 16777215"):
        MeshIdentity.from_object({"metadata": {"name": name}, "spec": {"labels": {}}})


name = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
endpoint = st.builds(
    Endpoint,
    addresses=st.one_of(
        st.tuples(st.ip_addresses(v=4)),
        st.tuples(st.ip_addresses(v=6)),
        st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    ),
    identity=st.integers(meshidentity.FIRST, meshidentity.LAST),
    node=name,
    pod=st.builds(PodRef, name, name, name),
    ports=st.lists(
        st.builds(
            NamedPort,
            name,
            st.sampled_from([Protocol.TCP, Protocol.UDP, Protocol.SCTP]),
            st.integers(1, 65535),
        ),
        max_size=3,
    ).map(tuple),
)


@settings(deadline=None)
@given(name, st.lists(endpoint, max_size=5))
def test_a_slice_reads_as_it_is_written(title: str, endpoints: list[Endpoint]) -> None:
    found = MeshEndpointSlice(name=title, endpoints=tuple(endpoints))
    written = found.to_dict()
    assert MeshEndpointSlice.from_object(written) == found
    assert written["spec"]["count"] == len(endpoints)


ENDPOINT: Mapping[str, Any] = Endpoint(
    addresses=(ip_address("10.0.0.1"),), identity=300, node="n", pod=PodRef("shop", "web", "u")
).to_dict()


@pytest.mark.parametrize(
    ("change", "path", "problem"),
    [
        ({"addresses": []}, "addresses", "must be one address, or one of each family"),
        ({"addresses": ["10.0.0.1", "10.0.0.2"]}, "addresses", "must be one address, or one of each family"),
        ({"addresses": ["pod"]}, "addresses[0]", "'pod' is not an IP address"),
        ({"identity": 7}, "identity", "must be a whole number from 256 to 16777215"),
        ({"identity": None}, "identity", "must be a whole number from 256 to 16777215"),
        ({"node": ""}, "node", "must be given"),
        ({"pod": {"namespace": "shop", "name": "web"}}, "pod.uid", "must be given"),
        (
            {"ports": [{"name": "a", "protocol": "ANY", "port": 1}]},
            "ports[0].protocol",
            "must be one of TCP, UDP, SCTP",
        ),
        ({"ports": [{"name": "a", "port": 0}]}, "ports[0].port", "must be a whole number from 1 to 65535"),
    ],
)
def test_a_slice_is_refused_with_a_reason(change: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        MeshEndpointSlice.from_object({"spec": {"endpoints": [{**ENDPOINT, **change}]}})
    assert (refusal.value.path, refusal.value.problem) == (f"spec.endpoints[0].{path}", problem)


def test_a_slice_is_bounded() -> None:
    with pytest.raises(InvalidSpec, match="has more than 100 items"):
        MeshEndpointSlice.from_object({"spec": {"endpoints": [ENDPOINT] * 101}})


def test_policy_is_off_until_somebody_says_so() -> None:
    assert (
        MeshConfig.from_object({"spec": {}}).policy
        == PolicySettings()
        == PolicySettings(enabled=False, network_policies=True, excluded_labels=EXCLUDED_LABELS)
    )


def test_policy_settings_are_read() -> None:
    spec = {"policy": {"enabled": True, "networkPolicies": False, "excludedLabels": ["a", "b/c"]}}
    assert MeshConfig.from_object({"spec": spec}).policy == PolicySettings(
        enabled=True, network_policies=False, excluded_labels=frozenset({"a", "b/c"})
    )
    assert (
        MeshConfig.from_object({"spec": {"policy": {"excludedLabels": []}}}).policy.excluded_labels == set()
    )
    with pytest.raises(InvalidSpec, match="spec.policy.sameNodePath"):
        MeshConfig.from_object({"spec": {"policy": {"sameNodePath": "Fast"}}})
    with pytest.raises(InvalidSpec, match=r"spec.policy.excludedLabels\[0\]: 'k8s:a' is not a label's key"):
        MeshConfig.from_object({"spec": {"policy": {"excludedLabels": ["k8s:a"]}}})


@pytest.mark.parametrize(
    ("policy", "skips"),
    [
        ({}, True),
        ({"networkPolicies": False}, False),
        ({"networkPolicies": False, "sameNodePath": "Direct"}, True),
        ({"sameNodePath": "Stack"}, False),
        ({"sameNodePath": "Auto"}, True),
    ],
)
def test_others_policies_see_what_they_may_need_to(policy: dict[str, Any], skips: bool) -> None:
    assert MeshConfig.from_object({"spec": {"policy": policy}}).policy.skips_stack is skips


def schema(kind: str) -> Any:
    [version] = yaml.safe_load((CRDS / f"{kind}.yaml").read_text())["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]["properties"]


def test_defaults_and_bounds_are_the_same_wherever_they_are_written() -> None:
    excluded = schema("meshconfig")["spec"]["properties"]["policy"]["properties"]["excludedLabels"]
    assert set(excluded["default"]) == EXCLUDED_LABELS == identity.HIGH_CARDINALITY
    assert (meshidentity.FIRST, meshidentity.LAST) == (identity.FIRST_POD, identity.LAST_POD)


def test_both_kinds_of_mesh_policies_have_one_schema() -> None:
    one, other = schema("meshpolicy"), schema("clustermeshpolicy")
    assert one["spec"] == other["spec"] and one["status"] == other["status"]


@settings(max_examples=500)
@given(
    text=st.ip_addresses().map(str)
    | st.text(alphabet="0129af.:%", max_size=18)
    | st.sampled_from(
        ["fe80::1%eth0", "::ffff:10.1.2.3", "1:2:3:4:5:6:7::", "010.1.1.1", "10.1.1.1\0", "\udc80"]
    )
)
def test_addresses_read_as_the_standard_library_reads_them(text: str) -> None:
    try:
        expected: Any = ip_address(text)
    except ValueError:
        with pytest.raises(InvalidSpec):
            fields.address(text, "it")
    else:
        found = fields.address(text, "it")
        assert (found, type(found), str(found)) == (expected, type(expected), str(expected))
