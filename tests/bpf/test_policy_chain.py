"""From objects as the API server has them to the verdicts of the loaded programs: random pods, namespaces,
policies and packets, by way of the agent's own feed, model, compiler and writer, against the evaluator. What
follows from the objects, i.e. whose an address is and what labels it has, is worked out here once more."""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from meshwire.agent.policy.feed import NETWORK_POLICIES, Feed, News, sources
from meshwire.agent.policy.kernel import PolicyKernel
from meshwire.agent.policy.model import Model, Surroundings
from meshwire.agent.settings import Settings
from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshpolicy import (
    NAMESPACE_LABEL,
    NAMESPACE_LABELS_PREFIX,
    SERVICE_ACCOUNT_LABEL,
    Policy,
    PortRange,
)
from meshwire.api.meshpolicy import Direction as Side
from meshwire.api.policyobjects import mesh_policy, network_policy
from meshwire.bpf import packets as p
from meshwire.bpf.layouts import Direction, Reason
from meshwire.bpf.loader import (
    FROM_POD,
    POLICY_IN,
    POLICY_IN_L3,
    POLICY_OUT,
    POLICY_OUT_L3,
    TO_POD,
    Programs,
)
from meshwire.bpf.policymaps import Event, Events, PolicyMaps
from meshwire.bpf.testrun import TC_ACT_SHOT, run
from meshwire.policy import identity
from meshwire.policy.evaluate import Decision, Packet, Party, holds, judge, services_of
from meshwire.policy.evaluate import Reason as Why
from meshwire.policy.model import NamedPorts, ServiceInfo

pytestmark = pytest.mark.bpf

Address = IPv4Address | IPv6Address
Object = dict[str, Any]
Labels = frozenset[tuple[str, str]]

SAMPLE: Final = int(os.environ.get("MESHWIRE_SAMPLE", "1"))
CLUSTERS: Final = 200
PACKETS: Final = 60
"""Of each stage of a cluster, apart from those on open flows."""

DEVICE: Final = 1
"""Test runs happen on the loopback device."""
HERE: Final = "here"
OWN: Final = tuple(map(ip_network, ("10.1.1.0/24", "fd00:1:0:1::/64")))
CLUSTER: Final = tuple(map(ip_network, ("10.1.0.0/16", "fd00:1::/48")))
LOCAL: Final = ("192.168.0.1", "fd00:9::1", "10.1.1.1", "fd00:1:0:1::1")
NODES: Final = ("192.168.0.2", "fd00:9::2", "192.168.0.3", "fd00:9::3")
APISERVERS: Final = ("192.168.0.1", "fd00:9::1", "192.168.0.2", "fd00:9::2", "198.51.100.6", "2001:db8:6::6")
NOBODYS: Final = (
    "10.1.77.9",
    "fd00:1:0:77::9",
    "10.1.2.200",
    "fd00:1:0:2::c8",
    "10.1.1.77",
    "fd00:1:0:1::4d",
)
WORLD: Final = (
    *("203.0.113.9", "198.51.100.9", "198.51.100.130", "198.51.100.6", "8.8.8.8"),
    *("2001:db8::9", "2001:db8:6::9", "2001:db8:6:8000::9", "2001:db8:6::6", "2600::1"),
)
CLUSTER_IPS: Final = ("10.96.0.10", "fd00:96::a")
SLOTS: Final = 4
"""Addresses of each family that pods here, and pods elsewhere, have: few, so that they change hands."""

BLOCKS: Final = (
    *("0.0.0.0/0", "203.0.113.0/24", "198.51.100.0/24", "198.51.100.128/25", "198.51.100.9/32"),
    *("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.10/31", "10.1.1.0/24", "192.168.0.0/30"),
    *("::/0", "2001:db8::/32", "2001:db8:6::/48", "2001:db8:6:8000::/49", "2001:db8:6::9/128"),
    *("fd00::/16", "fd00:1::/48", "fd00:1:0:2::/64", "fd00:1:0:2::a/127", "fd00:9::/64"),
)
PORTS: Final = (1, 52, 53, 79, 80, 81, 443, 444, 8000, 8080, 8081, 16384)
NAMED: Final = ("http", "dns")
ICMP_TYPES: Final = {4: (8, 13, 17), 6: (128, 139, 200)}
ECHO: Final = {4: 8, 6: 128}
GRE: Final = 47
FIRST_PORT: Final = 20000
"""Every packet that begins a flow has a source port of its own, above the ports that are asked for."""

VALUES: Final = ("a", "b")
SPACES: Final = ("a", "b")
TEAM: Final = f"{NAMESPACE_LABELS_PREFIX}team"


# Objects, as people and controllers write them


def but_none(fields: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Object]:
    """An object, each field of which may be left out."""
    return st.fixed_dictionaries({}, optional=dict(fields))


def few(of: st.SearchStrategy[Any], least: int = 0, most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, min_size=least, max_size=most)


values = st.sampled_from(VALUES)
names_of_pods = st.sampled_from(("app", "tier"))


def selectors(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Object]:
    expressions = st.one_of(
        st.fixed_dictionaries(
            {
                "key": keys,
                "operator": st.sampled_from(("In", "NotIn")),
                "values": few(values, 1, 1),
            }
        ),
        st.fixed_dictionaries({"key": keys, "operator": st.sampled_from(("Exists", "DoesNotExist"))}),
    )
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"matchLabels": st.fixed_dictionaries({"app": values})}),
        st.fixed_dictionaries({"matchLabels": st.dictionaries(keys, values, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"matchExpressions": few(expressions, 1)}),
    )


of_mesh = selectors(
    st.one_of(
        names_of_pods,
        st.sampled_from((f"k8s:{NAMESPACE_LABEL}", TEAM, SERVICE_ACCOUNT_LABEL, "any:app")),
    )
)
of_pods = selectors(names_of_pods)
of_namespaces = selectors(st.sampled_from(("team", "kubernetes.io/metadata.name")))


def with_holes(block: str) -> st.SearchStrategy[Object]:
    network = ip_network(block)
    inside = [
        each
        for each in BLOCKS
        if ip_network(each).version == network.version
        and network.supernet_of(ip_network(each))  # type: ignore[arg-type]
        and each != block
    ]
    if not inside:
        return st.just({"cidr": block})
    return st.fixed_dictionaries(
        {"cidr": st.just(block)}, optional={"except": few(st.sampled_from(inside), 1)}
    )


cidr_sets = st.sampled_from(BLOCKS).flatmap(with_holes)
numbers = st.sampled_from(PORTS)
ranges = st.tuples(numbers, numbers).map(lambda ends: {"port": str(min(ends)), "endPort": max(ends)})
mesh_ports = st.builds(
    lambda port, protocol: {**port, **protocol},
    st.one_of(
        st.sampled_from(NAMED).map(lambda name: {"port": name}),
        numbers.map(lambda port: {"port": str(port)}),
        ranges,
        st.sampled_from(NAMED).map(lambda name: {"port": name}),
        st.just({"port": "0"}),
    ),
    but_none({"protocol": st.sampled_from(("ANY", "TCP", "UDP", "SCTP"))}),
)
icmp_types = st.sampled_from(
    [
        {"family": f"IPv{family}", "type": kind}
        for family, kinds in ICMP_TYPES.items()
        for kind in (*kinds[:2], "EchoRequest")
    ]
)
services_named = st.one_of(
    st.fixed_dictionaries(
        {
            "k8sService": st.sampled_from(
                [
                    {"serviceName": name, "namespace": space}
                    for space, name in (("a", "x"), ("b", "x"), ("default", "kubernetes"))
                ]
            )
        }
    ),
    st.fixed_dictionaries({"k8sServiceSelector": st.fixed_dictionaries({"selector": of_pods})}),
)


def mesh_items(side: str) -> st.SearchStrategy[Object]:
    kinds = {
        f"{side}Endpoints": few(of_mesh),
        f"{side}CIDR": few(st.sampled_from(BLOCKS), 1),
        f"{side}CIDRSet": few(cidr_sets, 1),
        f"{side}Entities": few(
            st.sampled_from(("all", "cluster", "host", "kube-apiserver", "remote-node", "world")), 1
        ),
        **({"toServices": few(services_named, 1)} if side == "to" else {}),
    }
    peers = st.one_of(
        st.just({}),
        *(st.fixed_dictionaries({name: listed}) for name, listed in kinds.items()),
        *([st.just({"toServices": [{"k8sService": {"serviceName": "x"}}]})] if side == "to" else ()),
    )
    what = st.one_of(
        st.just({}),
        st.fixed_dictionaries({"toPorts": few(st.fixed_dictionaries({"ports": few(mesh_ports, 1)}), 1, 1)}),
        st.fixed_dictionaries({"icmps": few(st.fixed_dictionaries({"fields": few(icmp_types, 1)}), 1, 1)}),
    )
    return st.builds(lambda one, other: {**one, **other}, peers, what)


mesh_specs = st.fixed_dictionaries(
    {"endpointSelector": st.one_of(st.just({}), of_mesh)},
    optional={
        "mode": st.sampled_from(("Enforce", "Enforce", "Audit")),
        "enableDefaultDeny": but_none({"ingress": st.booleans(), "egress": st.booleans()}),
        "ingress": few(mesh_items("from"), 1, 4),
        "egress": few(mesh_items("to"), 1, 4),
        "ingressDeny": few(mesh_items("from"), 1),
        "egressDeny": few(mesh_items("to"), 1),
    },
)
network_ports = st.one_of(
    st.fixed_dictionaries({"port": numbers}, optional={"protocol": st.sampled_from(("TCP", "UDP", "SCTP"))}),
    st.fixed_dictionaries({"port": st.just(53), "endPort": st.sampled_from((80, 443, 8080))}),
    st.fixed_dictionaries({"port": st.sampled_from(NAMED)}),
    st.fixed_dictionaries({"protocol": st.sampled_from(("TCP", "UDP", "SCTP"))}),
)
network_peers = st.one_of(
    st.fixed_dictionaries({"podSelector": of_pods}, optional={"namespaceSelector": of_namespaces}),
    st.fixed_dictionaries({"namespaceSelector": of_namespaces}),
    st.fixed_dictionaries({"ipBlock": cidr_sets}),
)
network_specs = st.fixed_dictionaries(
    {
        "podSelector": st.one_of(st.just({}), of_pods),
        "policyTypes": st.sampled_from((["Ingress"], ["Egress"], ["Ingress", "Egress"], [])),
    },
    optional={
        "ingress": few(but_none({"from": few(network_peers), "ports": few(network_ports)})),
        "egress": few(but_none({"to": few(network_peers), "ports": few(network_ports)})),
    },
)
INVALID: Final[Object] = {"endpointSelector": {}, "ingress": [{"toPorts": []}]}
"""Takes nothing away from what was in force."""


@dataclass(frozen=True)
class Written:
    """A policy of some kind; `number` tells them apart."""

    resource: str
    number: int
    namespace: str
    spec: Object

    @property
    def uid(self) -> str:
        return f"policy-{self.resource}-{self.number}"

    def to_object(self) -> Object:
        kind = {names.MESHPOLICIES: "MeshPolicy", names.CLUSTERMESHPOLICIES: "ClusterMeshPolicy"}
        space = {} if self.resource == names.CLUSTERMESHPOLICIES else {"namespace": self.namespace}
        return {
            "kind": kind.get(self.resource, "NetworkPolicy"),
            "metadata": {"name": f"p{self.number}", "uid": self.uid, **space},
            "spec": self.spec,
        }


which = st.integers(0, 2)
policies = st.one_of(
    st.builds(Written, st.just(names.MESHPOLICIES), which, st.sampled_from(("a", "a", "b")), mesh_specs),
    st.builds(Written, st.just(names.CLUSTERMESHPOLICIES), which, st.just(""), mesh_specs),
    st.builds(Written, st.just(NETWORK_POLICIES), which, st.sampled_from(SPACES), network_specs),
)


@dataclass(frozen=True)
class PodState:
    """`slot` stands for its addresses. `published`: the operator has heard of it. `plugged`: its device is
    there, where it is of this node."""

    uid: str
    own: bool
    slot: int
    namespace: str
    labels: Object
    account: str
    ports: tuple[tuple[str, str, int], ...]
    published: bool
    plugged: bool
    created: int = 0
    finished: bool = False

    @property
    def addresses(self) -> tuple[Address, ...]:
        return addresses_of(self.own, self.slot)

    def to_object(self) -> Object:
        ports = [
            {"name": name, "protocol": protocol, "containerPort": port}
            for name, protocol, port in self.ports
        ]
        return {
            "metadata": {
                "uid": self.uid,
                "name": self.uid,
                "namespace": self.namespace,
                # What no identity is to be told by, and what would pass for another's.
                "labels": {**self.labels, "pod-template-hash": self.uid, NAMESPACE_LABEL: "b"},
                "creationTimestamp": f"{self.created:06}",
            },
            "spec": {"serviceAccountName": self.account, "containers": [{"ports": ports}]},
            "status": {
                "phase": "Succeeded" if self.finished else "Running",
                "podIPs": [{"ip": str(address)} for address in self.addresses],
            },
        }


def addresses_of(own: bool, slot: int) -> tuple[Address, ...]:
    node = 1 if own else 2
    return ip_address(f"10.1.{node}.{10 + slot}"), ip_address(f"fd00:1:0:{node}::{10 + slot:x}")


pod_labels = st.one_of(
    st.fixed_dictionaries({"app": values}), st.fixed_dictionaries({"app": values, "tier": values})
)
pods = st.builds(
    PodState,
    uid=st.just(""),
    own=st.sampled_from((True, True, False)),
    slot=st.integers(0, SLOTS - 1),
    namespace=st.sampled_from(("a", "a", "b")),
    labels=pod_labels,
    account=st.sampled_from(("", "", "a")),
    ports=st.lists(
        st.tuples(st.sampled_from(NAMED), st.sampled_from(("TCP", "UDP")), st.sampled_from((53, 80, 8080))),
        min_size=1,
        max_size=2,
        unique_by=lambda port: port[0],
    ).map(tuple),
    published=st.sampled_from((True, True, True, False)),
    plugged=st.sampled_from((True, True, True, True, False)),
)
services = st.fixed_dictionaries(
    {
        "labels": pod_labels,
        "selector": st.none() | but_none({"app": values}),
        "backends": few(st.sampled_from(WORLD)),
    }
)
space_labels = but_none({"team": values})
apiservers = st.sets(st.sampled_from(APISERVERS), max_size=3)
some_number = st.integers(0, 99)

Operation = tuple[str, Any]
operations: st.SearchStrategy[Operation] = st.one_of(
    st.tuples(st.just("policy"), policies),
    st.tuples(st.just("no policy"), some_number),
    st.tuples(st.just("invalid policy"), some_number),
    st.tuples(st.just("pod"), pods),
    st.tuples(st.just("no pod"), some_number),
    st.tuples(st.just("finished pod"), some_number),
    st.tuples(st.just("relabelled pod"), st.tuples(some_number, pod_labels)),
    st.tuples(st.just("pod like another"), st.tuples(some_number, some_number)),
    st.tuples(st.just("pod like another"), st.tuples(some_number, some_number)),
    st.tuples(st.just("published pod"), some_number),
    st.tuples(st.just("plugged pod"), some_number),
    st.tuples(st.just("published pod"), some_number),
    st.tuples(st.just("namespace"), st.tuples(st.sampled_from(SPACES), space_labels)),
    st.tuples(st.just("service"), st.tuples(st.sampled_from(SPACES), services)),
    st.tuples(st.just("service"), st.tuples(st.just("a"), services)),
    st.tuples(st.just("no service"), st.sampled_from(SPACES)),
    st.tuples(st.just("API servers"), apiservers),
    st.tuples(st.just("nodes"), st.sets(st.sampled_from(NODES))),
    st.tuples(st.just("excluded labels"), st.booleans()),
    st.tuples(st.just("unused identities go"), st.none()),
    st.tuples(st.just("agent restarted"), st.none()),
    st.tuples(st.just("maps read anew"), st.none()),
)


@dataclass
class Stage:
    """What happens, and whether the operator is there to say so to the nodes."""

    operations: list[Operation]
    operator: bool


stages = st.builds(Stage, few(operations, 1, 4), st.sampled_from((True, True, True, False)))


def first_stage(
    listed: list[Written], running: list[PodState], spaces: list[Object], found: list[Object], api: set[str]
) -> Stage:
    return Stage(
        [
            *(("namespace", each) for each in zip(SPACES, spaces, strict=True)),
            *(("pod", pod) for pod in running),
            *(("service", each) for each in zip(SPACES, found, strict=False)),
            *(("policy", policy) for policy in listed),
            ("API servers", api),
            ("nodes", set(NODES)),
        ],
        True,
    )


histories = st.builds(
    lambda first, later: [first, *later],
    st.builds(
        first_stage,
        few(policies, 1, 5),
        few(pods, 2, 7),
        few(space_labels, 2, 2),
        few(services, 0, 2),
        apiservers,
    ),
    st.lists(stages, min_size=2, max_size=3),
)


# The cluster: what the API server has, and what the operator makes of it


@dataclass
class World:
    """`objects`: resource -> key -> object, the operator's among them."""

    objects: dict[str, dict[str, Object]] = field(
        default_factory=lambda: {resource: {} for resource in sources(HERE, network_policies=True)}
    )
    pods: dict[str, PodState] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    excluded: frozenset[str] = frozenset({"pod-template-hash"})
    made: int = 0
    number: int = identity.FIRST_POD
    move: int = 0

    def carry_out(self, name: str, value: Any) -> None:
        match name:
            case "policy":
                self.objects[value.resource][value.uid] = value.to_object()
            case "no policy" | "invalid policy":
                resource = (names.MESHPOLICIES, names.CLUSTERMESHPOLICIES, NETWORK_POLICIES)[value % 3]
                if found := chosen(self.objects[resource], value):
                    if name == "no policy":
                        del self.objects[resource][found]
                    elif resource != NETWORK_POLICIES:
                        old = self.objects[resource][found]
                        self.objects[resource][found] = {**old, "spec": INVALID}
            case "pod":
                self.made += 1
                self._put(replace(value, uid=f"pod-{self.made}", created=self.made))
            case "namespace":
                space, labels = value
                self.objects["namespaces"][space] = {
                    "metadata": {
                        "uid": space,
                        "name": space,
                        "labels": {"kubernetes.io/metadata.name": space, **labels},
                    }
                }
            case "service":
                space, found = value
                self._put_service(space, "x", found, CLUSTER_IPS if space == "a" else ())
            case "no service":
                self.objects["services"].pop(f"{value}/x", None)
                self.objects["endpointslices"].pop(f"{value}/x", None)
            case "API servers":
                written: Object = {"labels": {}, "selector": None, "backends": sorted(value)}
                self._put_service("default", "kubernetes", written, ())
            case "nodes":
                self.nodes = value
            case "excluded labels":
                self.excluded = frozenset({"pod-template-hash", *(("tier",) if value else ())})
            case "unused identities go":
                self.operate(collect=True)
            case "agent restarted" | "maps read anew":
                pass
            case _:
                self._change_pod(name, value)

    def _change_pod(self, name: str, value: Any) -> None:
        index, *more = value if isinstance(value, tuple) else (value,)
        here = {uid: pod for uid, pod in self.pods.items() if pod.own and not pod.finished}
        if not (uid := chosen(here if index % 3 else self.pods, index // 3)):
            return
        pod = self.pods[uid]
        match name:
            case "no pod":
                del self.pods[uid]
                self.objects["pods"].pop(uid, None)
            case "finished pod":
                self._put(replace(pod, finished=True))
            case "relabelled pod":
                self._put(replace(pod, labels=more[0]))
            case "pod like another":
                others = {other: found for other, found in here.items() if found.labels != pod.labels}
                if other := chosen(others, more[0]):
                    self._put(replace(pod, labels=others[other].labels))
            case "plugged pod":
                self._put(replace(pod, plugged=not pod.plugged))
            case "published pod":
                self._put(replace(pod, published=not pod.published))
            case _:
                raise AssertionError(name)

    def _put(self, pod: PodState) -> None:
        self.pods[pod.uid] = pod
        if pod.own:
            self.objects["pods"][pod.uid] = pod.to_object()

    def _put_service(self, space: str, name: str, found: Object, ips: Sequence[str]) -> None:
        key = f"{space}/{name}"
        metadata = {"uid": key, "namespace": space, "name": name}
        self.objects["services"][key] = {
            "metadata": {**metadata, "labels": found["labels"]},
            "spec": {"clusterIPs": list(ips), "selector": found["selector"]},
        }
        self.objects["endpointslices"][key] = {
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"addresses": [each]} for each in found["backends"]],
        }

    def labels_of(self, pod: PodState) -> Labels:
        """Of its identity."""
        own = {key: value for key, value in pod.labels.items() if key not in self.excluded}
        space = self.objects["namespaces"][pod.namespace]["metadata"]["labels"]
        return frozenset(
            {
                **own,
                **{NAMESPACE_LABELS_PREFIX + key: value for key, value in space.items()},
                NAMESPACE_LABEL: pod.namespace,
                SERVICE_ACCOUNT_LABEL: pod.account or "default",
            }.items()
        )

    def operate(self, *, collect: bool = False) -> None:
        """What the operator writes, with a number for each set of labels. `collect`: those that nobody has
        any more are gone. From time to time pods move to another slice."""
        known = {
            frozenset(found["spec"]["labels"].items()): int(key)
            for key, found in self.objects[names.MESHIDENTITIES].items()
        }
        shown = [pod for pod in self.pods.values() if pod.published and not pod.finished]
        for labels in {pod.uid: self.labels_of(pod) for pod in shown}.values():
            if labels not in known:
                known[labels] = self.number
                self.number += 1
        if collect:
            used = {self.labels_of(pod) for pod in shown}
            known = {labels: number for labels, number in known.items() if labels in used}
            self.move += 1
        self.objects[names.MESHIDENTITIES] = {
            str(number): {"metadata": {"name": str(number)}, "spec": {"labels": dict(labels)}}
            for labels, number in known.items()
        }
        endpoints: dict[str, list[Object]] = {}
        for pod in shown:
            endpoints.setdefault(f"slice-{(pod.created + self.move) % 2}", []).append(
                {
                    "addresses": [str(address) for address in pod.addresses],
                    "identity": known[self.labels_of(pod)],
                    "node": HERE if pod.own else "there",
                    "pod": {"namespace": pod.namespace, "name": pod.uid, "uid": pod.uid},
                    "ports": [
                        {"name": name, "protocol": how, "port": port} for name, how, port in pod.ports
                    ],
                }
            )
        self.objects[names.MESHENDPOINTSLICES] = {
            name: {"metadata": {"name": name}, "spec": {"endpoints": found}}
            for name, found in endpoints.items()
        }

    def surroundings(self) -> Surroundings:
        return Surroundings(
            local=frozenset(ip_address(each).packed for each in LOCAL),
            remote=frozenset(ip_address(each).packed for each in self.nodes),
            cluster=CLUSTER,
            own=OWN,
            excluded_labels=self.excluded,
        )


def chosen(of: Mapping[str, Any], number: int) -> str:
    """A key; empty: there is none."""
    keys = sorted(of)
    return keys[number % len(keys)] if keys else ""


# The node's agent, but for what it does to devices


class Kernel(PolicyKernel):
    @property
    def programs(self) -> Programs:
        self._loaded()
        assert self._programs
        return self._programs

    def _attach(self, *arguments: Any) -> None:
        """The programs are run here, not attached."""


class Agent:
    """Hears of objects in whatever order."""

    def __init__(self, pins: Path) -> None:
        self.settings = Settings(
            node=HERE,
            namespace=names.NAMESPACE,
            state_directory=pins,
            pin_directory=pins,
            run_directory=pins,
            proc_sys=pins,
            metrics_address=("", 0),
        )
        self._sources = sources(HERE, network_policies=True)
        self.kernel = Kernel(self.settings)
        self.heard: dict[str, dict[str, Object]] = {}
        self._begin()

    def _begin(self) -> None:
        self.model: Model = self.kernel.new_model()
        self._feed = Feed(self.model)
        self.heard = {resource: {} for resource in self._sources}

    def restart(self, world: World, order: random.Random) -> None:
        """Of what it knew, only what the maps hold is left. The programs are the same: to load them takes a
        second."""
        self._begin()
        resources = list(self._sources)
        order.shuffle(resources)
        for resource in resources:
            self._tell(resource, "LISTED", world.objects[resource].values())
            self.heard[resource] = dict(world.objects[resource])
        self.apply(world)

    def clear(self) -> None:
        """Nothing is left in the maps."""
        self._begin()
        self.kernel.apply(self.model, (), (), skips_stack=True, resync=True, fresh=False)

    def follow(self, world: World, order: random.Random) -> None:
        """Everything that has changed since, one by one, and now and then a round in between."""
        news = [
            (resource, key)
            for resource, known in self.heard.items()
            for key in sorted(known.keys() | world.objects[resource].keys())
            if known.get(key) != world.objects[resource].get(key)
        ]
        order.shuffle(news)
        for resource, key in news:
            new = world.objects[resource].get(key)
            old = self.heard[resource].get(key)
            if new is None:
                assert old
                self._tell(resource, "DELETED", [old])
                del self.heard[resource][key]
            else:
                self._tell(resource, "MODIFIED" if old else "ADDED", [new])
                self.heard[resource][key] = new
            if order.random() < 0.15:
                self.apply(world)
        self.apply(world)

    def apply(self, world: World, *, resync: bool = False) -> None:
        """One round, as the enforcer has it."""
        model = self.model
        model.set_surroundings(world.surroundings())
        for uid in [uid for uid in model.devices if uid in world.pods and not world.pods[uid].plugged]:
            model.set_device(uid, None)
        for pod in model.waiting_for_device():
            if pod.uid in world.pods and world.pods[pod.uid].plugged:
                model.set_device(pod.uid, DEVICE)
        self.kernel.apply(model, (), (), skips_stack=True, resync=resync, fresh=False)

    def _tell(self, resource: str, kind: str, objects: Iterable[Object]) -> None:
        parse = self._sources[resource].parse
        self._feed.take(News(resource, kind, [parse(each) for each in objects]))


# What the verdicts should be


@dataclass(frozen=True)
class Expected:
    """`drops`: any of these; empty: it passes. `would_deny` None: can't be told."""

    drops: frozenset[Reason]
    passes: frozenset[Reason] = frozenset()
    would_deny: bool | None = False
    decisions: Mapping[Side, Decision] = field(default_factory=dict)


OUT_OF_REACH: Final = frozenset(
    {
        Reason.DROP_UNKNOWN_POD,
        Reason.DROP_WRONG_POD,
        Reason.DROP_SPOOFED_SOURCE,
        Reason.DROP_POLICY_EGRESS,
    }
)
DENIED: Final = {Side.EGRESS: Reason.DROP_POLICY_EGRESS, Side.INGRESS: Reason.DROP_POLICY_INGRESS}


class Oracle:
    """Whose addresses are, by the objects alone. `listed` are the policies that can be read."""

    def __init__(self, world: World, listed: Sequence[Policy]) -> None:
        self.world = world
        self.policies = listed
        self.own = [pod for pod in world.pods.values() if pod.own and not pod.finished]
        self.guarded: dict[Address, PodState] = {}
        for slot in range(SLOTS):
            claims = [pod for pod in self.own if pod.slot == slot]
            youngest = max(claims, key=lambda pod: pod.created, default=None)
            if youngest and youngest.plugged:
                self.guarded |= dict.fromkeys(youngest.addresses, youngest)
        self.numbered = {
            int(key): frozenset(found["spec"]["labels"].items())
            for key, found in world.objects[names.MESHIDENTITIES].items()
        }
        self.published = [
            each
            for found in world.objects[names.MESHENDPOINTSLICES].values()
            for each in found["spec"]["endpoints"]
        ]
        self.apiservers = {
            ip_address(text)
            for each in world.objects["endpointslices"]["default/kubernetes"]["endpoints"]
            for text in each["addresses"]
        }
        self.services = {
            (found["metadata"]["namespace"], found["metadata"]["name"]): ServiceInfo(
                labels=found["metadata"]["labels"],
                selector=found["spec"]["selector"] or None,
                addresses=frozenset(
                    ip_address(text)
                    for each in world.objects["endpointslices"][key]["endpoints"]
                    for text in each["addresses"]
                ),
            )
            for key, found in world.objects["services"].items()
        }
        self._ports: dict[tuple[Labels, bool], NamedPorts] = {}

    def is_unguarded(self, address: Address) -> bool:
        """Of this node's pods, and none has it, or none that could be guarded yet."""
        inside = any(address in block for block in OWN)
        return inside and str(address) not in LOCAL and address not in self.guarded

    def party(self, address: Address, *, stale: bool) -> Party:
        number, labels = self._who(address)
        found = dict(labels)
        return Party(
            identity=number,
            labels=found,
            address=address,
            named_ports=self._named_ports(labels, stale) if identity.is_pod(number) else {},
            services=services_of(self.services, identity=number, labels=found, address=address),
        )

    def _who(self, address: Address) -> tuple[int, Labels]:
        nobody: Labels = frozenset()
        is_api = address in self.apiservers
        if str(address) in LOCAL:
            return (identity.APISERVER_HOST if is_api else identity.HOST), nobody
        if str(address) in self.world.nodes:
            return (identity.APISERVER_NODE if is_api else identity.REMOTE_NODE), nobody
        if pod := self.guarded.get(address):
            return identity.FIRST_POD, self.world.labels_of(pod)
        claims = {
            self.numbered[each["identity"]] for each in self.published if str(address) in each["addresses"]
        }
        if len(claims) > 1:
            return identity.UNKNOWN, nobody
        if claims:
            return identity.FIRST_POD, claims.pop()
        if is_api:
            return identity.APISERVER, nobody
        if any(address in block for block in CLUSTER):
            return identity.UNKNOWN, nobody
        return identity.WORLD, nobody

    def _named_ports(self, labels: Labels, stale: bool) -> NamedPorts:
        """Of all pods with the labels. `stale`: also where the operator still says so of a pod of this node
        of which the node knows better."""
        if (labels, stale) not in self._ports:
            here = {pod.uid: pod for pod in self.own}
            listed = [pod.ports for pod in here.values() if self.world.labels_of(pod) == labels]
            for each in self.published:
                pod = here.get(each["pod"]["uid"])
                known_better = each["node"] == HERE and (pod is None or self.world.labels_of(pod) != labels)
                if self.numbered[each["identity"]] == labels and (stale or not known_better):
                    listed.append(
                        tuple((port["name"], port["protocol"], port["port"]) for port in each["ports"])
                    )
            found: dict[str, set[tuple[int, int]]] = {}
            for name, protocol, port in (port for ports in listed for port in ports):
                found.setdefault(name, set()).add(({"TCP": p.TCP, "UDP": p.UDP}[protocol], port))
            self._ports[labels, stale] = {name: frozenset(pairs) for name, pairs in found.items()}
        return self._ports[labels, stale]

    def packet(self, sent: Sent, *, stale: bool = False) -> Packet:
        return Packet(
            source=self.party(sent.src, stale=stale),
            destination=self.party(sent.dst, stale=stale),
            protocol=sent.protocol,
            port=sent.dport if sent.protocol in (p.TCP, p.UDP, p.SCTP) else 0,
            icmp_type=sent.dport if sent.protocol in (p.ICMP, p.ICMPV6) else None,
        )

    def expect(self, sent: Sent) -> Expected | None:
        """None: nothing can be said."""
        if self.is_unguarded(sent.src) or self.is_unguarded(sent.dst):
            return Expected(OUT_OF_REACH)
        found = self._judged(self.packet(sent), sent)
        return found if found == self._judged(self.packet(sent, stale=True), sent) else None

    def _judged(self, packet: Packet, sent: Sent) -> Expected:
        decisions = {}
        would_deny = False
        sides = {Side.EGRESS: sent.src, Side.INGRESS: sent.dst}
        for side, address in sides.items():
            if address not in self.guarded:
                continue
            decisions[side] = judge(self.policies, packet, side)
            if not decisions[side].allowed:
                return Expected(frozenset({DENIED[side]}), decisions=decisions)
            would_deny |= not judge(self.policies, packet, side, audit=True).allowed
        ways = {
            Reason.POLICY_NONE if decision.reason is Why.NOT_ISOLATED else Reason.POLICY_ALLOWED
            for decision in decisions.values()
        }
        return Expected(frozenset(), frozenset(ways), would_deny, decisions)


# Packets


@dataclass(frozen=True)
class Sent:
    """What began a flow. Of ICMP, `sport` is an echo's identifier and `dport` the type. `via`: the address
    of a Service that had hidden the destination; `hidden`: that, without having sent it there."""

    src: Address
    dst: Address
    protocol: int
    sport: int
    dport: int
    via: Address | None = None
    hidden: bool = False

    def packet(self, dst: Address) -> bytes:
        return packet_of(self.src, dst, self.protocol, self.sport, self.dport, p.SYN)

    def reply(self) -> bytes:
        if self.protocol in (p.ICMP, p.ICMPV6):
            kind = 0 if self.protocol == p.ICMP else 129
            return packet_of(self.dst, self.src, self.protocol, self.sport, kind, 0)
        return packet_of(self.dst, self.src, self.protocol, self.dport, self.sport, p.SYN | p.ACK)

    @property
    def is_told_apart(self) -> bool:
        """By its source port, from other flows of its ends."""
        if self.protocol in (p.ICMP, p.ICMPV6):
            return self.dport == ECHO[self.src.version]
        return self.protocol in (p.TCP, p.UDP, p.SCTP)


def packet_of(src: Address, dst: Address, protocol: int, sport: int, dport: int, flags: int) -> bytes:
    if protocol == p.TCP:
        return p.tcp(src, dst, flags=flags, sport=sport, dport=dport)
    if protocol == p.UDP:
        return p.udp(src, dst, b"x", sport=sport, dport=dport)
    if protocol in (p.ICMP, p.ICMPV6):
        return p.icmp(src, dst, dport, rest=struct.pack("!HH", sport, 1))
    return p.ip(src, dst, protocol, struct.pack("!HHQ", sport, dport, 0))


def any_address(source: random.Random, family: int) -> Address:
    kind = source.random()
    if kind < 0.55:
        return addresses_of(source.random() < 0.5, source.randrange(SLOTS))[family == 6]
    pool = source.choice((LOCAL, NODES, NOBODYS, WORLD, WORLD, APISERVERS))
    return source.choice([found for found in map(ip_address, pool) if found.version == family])


@dataclass
class Chain:
    """The programs, their maps, and the agent that writes them."""

    programs: Programs
    maps: PolicyMaps
    events: Events
    agent: Agent
    sent: int = 0
    counted: Mapping[tuple[Reason, Direction], int] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, program: str, packet: bytes) -> bool:
        """Whether it passes."""
        data = packet if program in (POLICY_OUT_L3, POLICY_IN_L3) else p.frame(packet)
        self.sent += 1
        return run(self.programs.get(program).fd, data).verdict != TC_ACT_SHOT

    def counters(self) -> dict[tuple[Reason, Direction], int]:
        return {key: found.packets for key, found in self.maps.metrics.read().items()}


class Story:
    """One cluster's life."""

    def __init__(self, chain: Chain, seed: int) -> None:
        self.chain = chain
        self.source = random.Random(seed)
        self.world = World()
        self.readable: dict[str, Policy] = {}
        self.open: list[tuple[Sent, frozenset[str]]] = []
        self.used: set[tuple[Address, Address, int, int]] = set()
        self.next_port = FIRST_PORT
        self.told: dict[tuple[Address, Address, int, int, int], Sent] = {}
        chain.agent.clear()
        addresses = {flow.src for flow in chain.maps.flows.read()}
        chain.maps.flows.purge(addresses)
        assert not chain.maps.flows.read() and not chain.maps.endpoints.read()
        assert not chain.maps.policies.read() and not chain.maps.identities.read()
        chain.events.read()
        chain.counted = chain.counters()

    def go_on(self, stage: Stage) -> None:
        for operation in stage.operations:
            self.world.carry_out(*operation)
        if stage.operator:
            self.world.operate()
        happened = {name for name, _ in stage.operations}
        agent = self.chain.agent
        if "agent restarted" in happened:
            self.readable.clear()
            agent.restart(self.world, self.source)
        else:
            agent.follow(self.world, self.source)
        if "maps read anew" in happened:
            agent.apply(self.world, resync=True)
        self._read_policies()
        self.ports = tuple(self._ports_asked_for())
        self.oracle = Oracle(self.world, tuple(self.readable.values()))
        self.told.clear()
        self._check_open_flows()
        for _ in range(PACKETS):
            if sent := self._any_packet():
                self.check(sent)
        self._check_events()

    def _read_policies(self) -> None:
        """Of what can't be read, what was in force stays."""
        there = set()
        for resource in (names.MESHPOLICIES, names.CLUSTERMESHPOLICIES, NETWORK_POLICIES):
            for uid, found in self.world.objects[resource].items():
                there.add(uid)
                with suppress(InvalidSpec):
                    self.readable[uid] = (network_policy if resource == NETWORK_POLICIES else mesh_policy)(
                        found
                    )
        for uid in self.readable.keys() - there:
            del self.readable[uid]

    def _ports_asked_for(self) -> Iterator[int]:
        """By policies, and next to those; a pod's where they go by names."""
        ranges = [
            port for policy in self.readable.values() for rule in policy.rules for port in rule.ports or ()
        ]
        for port in ranges:
            if isinstance(port, PortRange) and port.name:
                yield from (number for pod in self.world.pods.values() for _, _, number in pod.ports)
            elif isinstance(port, PortRange) and port.last < FIRST_PORT:
                yield from (port.first, port.first, port.last, port.last + 1)

    def _any_packet(self) -> Sent | None:
        source = self.source
        family = source.choice((4, 6))
        guarded = [address for address in self.oracle.guarded if address.version == family]
        own = addresses_of(True, source.randrange(SLOTS))[family == 6]
        if guarded and source.random() < 0.95:
            own = source.choice(guarded)
        other = any_address(source, family)
        if guarded and self.oracle.is_unguarded(other) and source.random() < 0.8:
            other = source.choice(guarded)
        src, dst = source.choice(((own, other), (other, own)))
        if src == dst:
            return None
        icmp = p.ICMP if family == 4 else p.ICMPV6
        protocol = source.choice((p.TCP, p.TCP, p.TCP, p.UDP, p.UDP, p.SCTP, icmp, icmp, GRE))
        if protocol == icmp:
            dport = source.choice((ECHO[family], *ICMP_TYPES[family]))
        elif protocol == GRE:
            dport = 0
        else:
            asked_for = self.ports or PORTS
            dport = source.choice(
                (*source.choices(asked_for, k=4), *PORTS[::3], source.randrange(1, FIRST_PORT))
            )
        self.next_port += 1
        sent = Sent(src, dst, protocol, self.next_port if protocol != GRE else 0, dport)
        if not sent.is_told_apart:
            if (dst, src, protocol, dport) in self.used:
                # It could be a reply.
                return None
            self.used.add((src, dst, protocol, dport))
        elif src in self.oracle.guarded and str(dst) not in LOCAL and source.random() < 0.15:
            hidden_by = [ip_address(each) for each in CLUSTER_IPS if "a/x" in self.world.objects["services"]]
            via = [address for address in hidden_by if address.version == family]
            return replace(sent, via=via[0] if via else None, hidden=True)
        return sent

    def _path(self, sent: Sent) -> Iterator[tuple[str, bytes]]:
        """Programs in the order in which they get it."""
        oracle, source = self.oracle, self.source
        data = sent.packet(sent.dst)
        out = source.choice((POLICY_OUT, POLICY_OUT_L3))
        if any(sent.src in block for block in OWN) and str(sent.src) not in LOCAL:
            if sent.via:
                yield FROM_POD, sent.packet(sent.via)
            elif not sent.hidden or oracle.is_unguarded(sent.src):
                yield FROM_POD, data
        elif str(sent.src) not in LOCAL:
            yield source.choice((POLICY_IN, POLICY_IN_L3)), data
        if any(sent.dst in block for block in OWN) and str(sent.dst) not in LOCAL:
            yield TO_POD, data
        elif str(sent.dst) not in LOCAL:
            yield out, data

    def _travel(self, path: Iterable[tuple[str, bytes]]) -> tuple[bool, set[Reason], list[str]]:
        chain = self.chain
        before, passed, ran = chain.counted, True, []
        for program, data in path:
            ran.append(program)
            passed = chain.run(program, data)
            if not passed:
                break
        after = chain.counted = chain.counters()
        return passed, {key[0] for key in after if after[key] != before[key]}, ran

    def check(self, sent: Sent, *, again: bool = False) -> None:
        """Of a new flow; `again`: of one that is open already."""
        expected = self.oracle.expect(sent)
        passed, reasons, ran = self._travel(self._path(sent))
        said = f"{sent} {ran} {[reason.name for reason in reasons]} {expected}"
        dropped = {reason for reason in reasons if reason.dropped}
        assert passed is not bool(dropped), said
        if not sent.is_told_apart and not again:
            self.told.pop((sent.src, sent.dst, sent.protocol, 0, sent.dport), None)
        self.told[sent.src, sent.dst, sent.protocol, sent.sport, sent.dport] = sent
        if expected is None:
            self.chain.seen["can't be told"] += 1
            return
        assert passed is not bool(expected.drops), said
        assert dropped <= expected.drops, said
        for side, decision in expected.decisions.items():
            self.chain.seen[f"{side} {decision.reason}{' again' if again else ''}"] += 1
        if not passed:
            self.chain.seen.update(reason.name for reason in dropped)
            return
        if sent.via:
            assert Reason.POLICY_DEFERRED in reasons, said
            self.chain.seen["hidden by a Service"] += 1
        if not again and sent.is_told_apart:
            assert (Reason.POLICY_WOULD_DENY in reasons) is expected.would_deny, said
            self.chain.seen["would be denied"] += bool(expected.would_deny)
        unsaid = {Reason.NOT_OURS, Reason.POLICY_DEFERRED, Reason.POLICY_WOULD_DENY}
        assert reasons - unsaid <= expected.passes, said
        if not again and sent.is_told_apart and not sent.via and self.source.random() < 0.5:
            self.open.append((sent, self._ends(sent)))

    def _ends(self, sent: Sent) -> frozenset[str]:
        """Pods of this node at either end."""
        found = (self.oracle.guarded.get(address) for address in (sent.src, sent.dst))
        return frozenset(pod.uid for pod in found if pod)

    def _check_open_flows(self) -> None:
        """They are judged again by what holds now, in either direction; replies among them go with what they
        are replies to."""
        for sent, ends in self.open:
            if ends == self._ends(sent) and self.source.random() < 0.5:
                self._check_reply(sent)
            self.check(sent, again=True)
            expected = self.oracle.expect(sent)
            if expected and not expected.drops:
                self._check_reply(sent)
        self.open = [(sent, ends) for sent, ends in self.open if ends == self._ends(sent)][-30:]

    def _check_reply(self, sent: Sent) -> None:
        expected = self.oracle.expect(sent)
        if expected is None:
            return
        back = replace(sent, src=sent.dst, dst=sent.src, hidden=False)
        programs = [program for program, _ in self._path(back)]
        passed, reasons, ran = self._travel((program, sent.reply()) for program in programs)
        said = f"reply to {sent} {ran} {[reason.name for reason in reasons]} {expected}"
        assert passed is not bool(expected.drops), said
        # It meets the receiver's rules first: where both deny, those are told of.
        assert {reason for reason in reasons if reason.dropped} <= {*expected.drops, *DENIED.values()}, said
        self.chain.seen["reply dropped" if expected.drops else "reply"] += 1

    def _check_events(self) -> None:
        """They name a rule that denies the packet, or none where none does."""
        for event in self.chain.events.read():
            sent = self._sent(event)
            if sent is None or event.reason not in (*DENIED.values(), Reason.POLICY_WOULD_DENY):
                continue
            expected = self.oracle.expect(sent)
            if expected is None or expected.drops == OUT_OF_REACH:
                continue
            side = Side.EGRESS if event.direction is Direction.EGRESS else Side.INGRESS
            audit = event.reason is Reason.POLICY_WOULD_DENY
            packet = self.oracle.packet(sent)
            decision = judge(self.oracle.policies, packet, side, audit=audit)
            assert not decision.allowed, f"{event} {sent} {decision}"
            if decision.reason is Why.DEFAULT_DENY:
                assert event.rule == 0, f"{event} {sent} {decision}"
            else:
                assert (found := self.chain.agent.model.rule(event.rule)), f"{event} {sent} {decision}"
                policy, path = found
                named = [rule for rule in policy.rules if rule.path == path and rule.direction is side]
                assert any(rule.deny and holds(rule, packet) for rule in named), f"{event} {sent} {found}"
            self.chain.seen[f"told {event.reason.name} by {decision.reason}"] += 1

    def _sent(self, event: Event) -> Sent | None:
        if event.src is None or event.dst is None:
            return None
        icmp = event.protocol in (p.ICMP, p.ICMPV6)
        sport, dport = event.sport, event.dport >> 8 if icmp else event.dport
        return self.told.get((event.src, event.dst, event.protocol, sport, dport))


@pytest.fixture(scope="module")
def chain(bpffs: Path, objects: Path) -> Iterator[Chain]:
    agent = Agent(bpffs / "chain")
    with PolicyMaps.open(agent.settings.policy_pin_directory) as maps, maps.open_events() as events:
        yield Chain(agent.kernel.programs, maps, events, agent)
    agent.kernel.close()


@pytest.mark.timeout(900)
def test_any_cluster_gets_the_evaluators_verdicts(chain: Chain) -> None:
    @settings(
        max_examples=max(5, CLUSTERS // SAMPLE // 2) if SAMPLE > 1 else CLUSTERS,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )
    @given(history=histories, seed=st.integers(0, 2**32))
    def check(history: list[Stage], seed: int) -> None:
        story = Story(chain, seed)
        for stage in history:
            note(f"{stage}")
            story.go_on(stage)

    check()
    print(f"{chain.sent} packets: {dict(sorted(chain.seen.items()))}")
    if SAMPLE == 1:
        assert chain.sent >= 20_000
    # Everything that there is to say has been said by both, more than once.
    wanted = {
        *(f"{side} {why}" for side in Side for why in Why if (side, why) != (Side.EGRESS, Why.OWN_NODE)),
        *("reply", "would be denied", "hidden by a Service", "DROP_UNKNOWN_POD"),
        *("told DROP_POLICY_INGRESS by RuleDenies", "told DROP_POLICY_EGRESS by DefaultDeny"),
    }
    assert SAMPLE > 1 or all(chain.seen[each] > 20 for each in wanted), chain.seen
