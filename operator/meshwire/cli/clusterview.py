"""What policies judge by, from a cluster's objects: pods with their identities, Services, nodes. Pure, but
for `find_view` and `find_policies`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import ip_address, ip_network
from itertools import count
from typing import Any, Final

from meshwire.api import names
from meshwire.api.fields import Address, InvalidSpec, Network
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import Entity, Kind, Policy
from meshwire.api.policyobjects import mesh_policy, network_policy
from meshwire.cli.cluster import API, Forbidden, NotFound, Object, Reader
from meshwire.operator.objects import Namespace, Pod
from meshwire.policy import identity
from meshwire.policy.evaluate import Party, services_of
from meshwire.policy.identity import Labels, identity_labels
from meshwire.policy.model import PROTOCOLS, ServiceInfo

Key = tuple[str, str]
"""Namespace and name."""

RESOURCES: Final[Mapping[str, str]] = {
    "Pod": "/api/v1/pods",
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "Service": "/api/v1/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "MeshIdentity": f"{API}/{names.MESHIDENTITIES}",
    "MeshConfig": f"{API}/{names.MESHCONFIGS}",
}
REQUIRED: Final = ("Pod", "Namespace")
"""Without the others an answer is less certain, but there is one."""
POLICIES: Final[Mapping[Kind, str]] = {
    Kind.MESH_POLICY: f"{API}/{names.MESHPOLICIES}",
    Kind.CLUSTER_MESH_POLICY: f"{API}/{names.CLUSTERMESHPOLICIES}",
    Kind.NETWORK_POLICY: "/apis/networking.k8s.io/v1/networkpolicies",
}
GROUPS: Final[Mapping[Kind, str]] = {
    Kind.MESH_POLICY: names.GROUP,
    Kind.CLUSTER_MESH_POLICY: names.GROUP,
    Kind.NETWORK_POLICY: "networking.k8s.io",
}
NAMESPACE_NAME_LABEL: Final = "kubernetes.io/metadata.name"
"""The API server gives it to every namespace."""
SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"
APISERVER_SERVICE: Final = ("default", "kubernetes")

PARTIES: Final[Mapping[Entity, int]] = {
    Entity.WORLD: identity.WORLD,
    Entity.HOST: identity.HOST,
    Entity.REMOTE_NODE: identity.REMOTE_NODE,
    Entity.KUBE_APISERVER: identity.APISERVER,
}
"""Entities that one end of a packet can be."""


class NoSuchEnd(Exception):
    """Nothing is known by the name that one end of a packet was given; the text is for people."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a packet: `party` for the judge, `title` for people. `node`: where it is, if known."""

    party: Party
    title: str
    node: str = ""


@dataclass(slots=True, kw_only=True)
class View:
    """A cluster. `host_pods`: those that use their node's network -> the node. `services` None: unknown."""

    config: MeshConfig = field(default_factory=MeshConfig)
    pods: dict[Key, Pod] = field(default_factory=dict)
    host_pods: dict[Key, str] = field(default_factory=dict)
    namespaces: dict[str, Mapping[str, str]] = field(default_factory=dict)
    services: dict[Key, ServiceInfo] | None = None
    service_addresses: dict[Address, Key] = field(default_factory=dict)
    nodes: dict[str, tuple[Address, ...]] = field(default_factory=dict)
    cluster_cidrs: tuple[Network, ...] = ()
    apiservers: frozenset[Address] = frozenset()
    numbers: dict[Labels, int] = field(default_factory=dict)
    """Of the MeshIdentities; pods with other labels get provisional ones."""
    notes: tuple[str, ...] = ()
    """What could not be read."""

    def labels(self, pod: Pod) -> Labels:
        return identity_labels(
            namespace=pod.namespace,
            namespace_labels=self.namespaces.get(pod.namespace, {NAMESPACE_NAME_LABEL: pod.namespace}),
            service_account=pod.service_account,
            pod_labels=dict(pod.labels),
            excluded=self.config.policy.excluded_labels,
        )

    def label_sets(self) -> list[Mapping[str, str]]:
        """Of all pods, each set once."""
        return [dict(labels) for labels in dict.fromkeys(self.labels(pod) for pod in self.pods.values())]

    def find_ends(self, source: str, destination: str, *, version: int = 0) -> tuple[End, End]:
        """Both ends of a packet: `NAMESPACE/POD`, an address or an entity. `version` 4 or 6: of IP; 0: one
        that both have. Raises NoSuchEnd."""
        addresses = [self._addresses(text) for text in (source, destination)]
        versions = [{address.version for address in found} for found in addresses]
        common = (versions[0] or {4, 6}) & (versions[1] or {4, 6})
        if version:
            common &= {version}
        if not common:
            raise NoSuchEnd(f"{source} and {destination} have no address of one IP version")
        # The first address is the one that a pod prefers.
        preferred = next((a.version for found in addresses for a in found if a.version in common), 4)
        chosen = [next((a for a in found if a.version == preferred), None) for found in addresses]
        nodes = [
            self._node(text, address) for text, address in zip((source, destination), chosen, strict=True)
        ]
        return (
            self._end(source, chosen[0], nodes[0], nodes[1]),
            self._end(destination, chosen[1], nodes[1], nodes[0]),
        )

    def _addresses(self, text: str) -> tuple[Address, ...]:
        if text in list(Entity):
            return ()
        with suppress(ValueError):
            return (ip_address(text),)
        namespace, slash, name = text.partition("/")
        if not slash or not namespace or not name:
            raise NoSuchEnd(f"{text!r} is no NAMESPACE/POD, no IP address and none of {', '.join(PARTIES)}")
        if pod := self.pods.get((namespace, name)):
            if not pod.addresses:
                raise NoSuchEnd(f"pod {text} has no address yet")
            return pod.addresses
        if node := self.host_pods.get((namespace, name)):
            return self.nodes.get(node, ())
        known = [f"{namespace}/{name}" for namespace, name in (*self.pods, *self.host_pods)]
        near = sorted(each for each in known if each.startswith(f"{text}-"))[:3]
        near = near or get_close_matches(text, known, n=1, cutoff=0.8)
        raise NoSuchEnd(f"there is no pod {text}" + (f"; did you mean {' or '.join(near)}?" if near else ""))

    def _node(self, text: str, address: Address | None) -> str:
        key = _key(text)
        if pod := self.pods.get(key):
            return pod.node
        if key in self.host_pods:
            return self.host_pods[key]
        if pod := self._pod_at(address):
            return pod.node
        return next((node for node, addresses in self.nodes.items() if address in addresses), "")

    def _pod_at(self, address: Address | None) -> Pod | None:
        return next((pod for pod in self.pods.values() if address in pod.addresses), None)

    def _end(self, text: str, address: Address | None, node: str, other_node: str) -> End:
        pod = self.pods.get(_key(text)) or self._pod_at(address)
        if pod is not None:
            return self._pod_end(pod, address)
        if text in list(Entity):
            if Entity(text) not in PARTIES:
                raise NoSuchEnd(f"{text} is more than one end: name one of {', '.join(PARTIES)}")
            number = PARTIES[Entity(text)]
        elif address is not None and (service := self.service_addresses.get(address)):
            namespace, name = service
            raise NoSuchEnd(
                f"{address} is the address of Service {namespace}/{name}: policies judge the pod behind it, "
                f"so name one{self._behind(service)}"
            )
        else:
            number = self._number(address, node, other_node)
        name = identity.NAMES[number]
        if text in list(Entity):
            title = name
        else:
            title = f"{text if address is None or _key(text) in self.host_pods else address} ({name})"
        party = Party(
            identity=number,
            address=address,
            services=services_of(self.services or {}, identity=number, labels={}, address=address),
        )
        return End(party, title, node)

    def _number(self, address: Address | None, node: str, other_node: str) -> int:
        is_api = address in self.apiservers
        if node:
            if node == other_node:
                return identity.APISERVER_HOST if is_api else identity.HOST
            return identity.APISERVER_NODE if is_api else identity.REMOTE_NODE
        if is_api:
            return identity.APISERVER
        inside = address is not None and any(address in cidr for cidr in self.cluster_cidrs)
        return identity.UNKNOWN if inside else identity.WORLD

    def _pod_end(self, pod: Pod, address: Address | None) -> End:
        labels = self.labels(pod)
        numbers = {**self.numbers}
        provisional = count(identity.PROVISIONAL)
        ports: dict[str, set[tuple[int, int]]] = {}
        for other in self.pods.values():
            others = self.labels(other)
            if others not in numbers:
                numbers[others] = next(provisional)
            # Pods of one identity share the names of their ports, as in the datapath.
            if others == labels:
                for port in other.ports:
                    found = {(protocol, port.port) for protocol in PROTOCOLS[port.protocol]}
                    ports.setdefault(port.name, set()).update(found)
        number = numbers[labels]
        party = Party(
            identity=number,
            labels=dict(labels),
            address=address,
            named_ports={name: frozenset(found) for name, found in ports.items()},
            services=services_of(self.services or {}, identity=number, labels=dict(labels), address=address),
        )
        known = f" (identity {number})" if number < identity.PROVISIONAL else ""
        return End(party, f"{pod.namespace}/{pod.name}{known}", pod.node)

    def _behind(self, service: Key) -> str:
        behind = [
            f"{pod.namespace}/{pod.name}"
            for pod in self.pods.values()
            if services_of(
                {service: (self.services or {})[service]},
                identity=identity.FIRST_POD,
                labels=dict(self.labels(pod)),
                address=next(iter(pod.addresses), None),
            )
        ]
        return f": {', '.join(sorted(behind)[:3])}" if behind else ""


def view_of(objects: Iterable[Object], notes: Iterable[str] = ()) -> View:
    """Of objects of any kinds; each has its `kind`. What can't be read is left out."""
    view = View(notes=tuple(notes))
    nodes: dict[str, set[Address]] = {}
    cidrs: set[Network] = set()
    backends: dict[Key, set[Address]] = {}
    services: list[Object] = []
    seen = set()
    for found in objects:
        seen.add(found.get("kind"))
        metadata = {"uid": "", "resourceVersion": "", **found["metadata"]}
        source = {**found, "metadata": metadata}
        key = (metadata.get("namespace", "default"), metadata["name"])
        match source.get("kind"):
            case "Pod":
                _add_pod(view, {**source, "metadata": {**metadata, "namespace": key[0]}}, nodes)
            case "Namespace":
                namespace = Namespace.from_object(source)
                view.namespaces[namespace.name] = {
                    NAMESPACE_NAME_LABEL: namespace.name,
                    **dict(namespace.labels),
                }
            case "Node":
                addresses = source.get("status", {}).get("addresses", ())
                nodes.setdefault(key[1], set()).update(
                    _addresses(each.get("address") for each in addresses if each["type"] == "InternalIP")
                )
                cidrs.update(_networks(source.get("spec", {}).get("podCIDRs", ())))
            case "Service":
                services.append(source)
            case "EndpointSlice":
                service = (metadata.get("labels") or {}).get(SERVICE_NAME_LABEL, "")
                backends.setdefault((key[0], service), set()).update(
                    _addresses(
                        address
                        for endpoint in source.get("endpoints") or ()
                        for address in endpoint.get("addresses", ())
                    )
                )
            case "MeshIdentity":
                with suppress(InvalidSpec):
                    mesh_identity = MeshIdentity.from_object(source)
                    view.numbers[mesh_identity.labels] = mesh_identity.number
            case "MeshConfig":
                with suppress(InvalidSpec):
                    view.config = MeshConfig.from_object(source)
    if "Service" in seen:
        view.services = {}
    for source in services:
        _add_service(view, source, backends)
    view.nodes = {
        name: tuple(sorted(found, key=lambda a: (a.version, int(a))))
        for name, found in sorted(nodes.items())
    }
    view.cluster_cidrs = (*sorted(cidrs, key=str), *view.config.network.cluster_cidrs)
    view.apiservers = frozenset(backends.get(APISERVER_SERVICE, ()))
    return view


def _add_pod(view: View, source: Object, nodes: dict[str, set[Address]]) -> None:
    metadata, spec = source["metadata"], source.get("spec", {})
    node = spec.get("nodeName", "")
    if node:
        nodes.setdefault(node, set()).update(_addresses([source.get("status", {}).get("hostIP")]))
    if pod := Pod.from_object(source):
        view.pods[pod.namespace, pod.name] = pod
    elif spec.get("hostNetwork"):
        view.host_pods[metadata["namespace"], metadata["name"]] = node


def _add_service(view: View, source: Object, backends: Mapping[Key, set[Address]]) -> None:
    metadata, spec = source["metadata"], source.get("spec", {})
    key = (metadata.get("namespace", "default"), metadata["name"])
    assert view.services is not None
    view.services[key] = ServiceInfo(
        labels=dict(metadata.get("labels") or {}),
        selector=spec.get("selector") or None,
        addresses=frozenset(backends.get(key, ())),
    )
    for address in _addresses(spec.get("clusterIPs") or [spec.get("clusterIP")]):
        view.service_addresses[address] = key


def _addresses(texts: Iterable[Any]) -> Iterator[Address]:
    for text in texts:
        with suppress(ValueError):
            yield ip_address(text)


def _networks(texts: Iterable[Any]) -> Iterator[Network]:
    for text in texts:
        with suppress(ValueError):
            yield ip_network(text)


def _key(text: str) -> Key:
    namespace, _, name = text.partition("/")
    return namespace, name


def policy_of(source: Object, kind: Kind) -> Policy:
    """Raises InvalidSpec."""
    return network_policy(source) if kind is Kind.NETWORK_POLICY else mesh_policy(source, kind)


def policies_of(objects: Iterable[Object]) -> tuple[list[Policy], list[str]]:
    """The policies among objects of any kinds, and why some of them can't be carried out."""
    policies, notes = [], []
    for source in objects:
        kind = next((kind for kind in Kind if kind == source.get("kind")), None)
        if kind is None:
            continue
        try:
            policies.append(policy_of(source, kind))
        except InvalidSpec as error:
            metadata = source["metadata"]
            name = "/".join(filter(None, (metadata.get("namespace"), metadata["name"])))
            notes.append(f"{kind} {name} can't be carried out and is left out: {error}")
    return policies, notes


def find_view(reader: Reader) -> View:
    """Of a cluster. Raises ClusterUnavailable where not even its pods and namespaces can be read."""
    objects: list[Object] = []
    notes = []
    for kind, path in RESOURCES.items():
        try:
            objects += [{**item, "kind": kind} for item in reader.items(path)]
        except Forbidden as error:
            if kind in REQUIRED:
                raise
            notes.append(str(error))
        except NotFound:
            notes.append(f"{reader.server} knows no {path.rpartition('/')[2]}")
    return view_of(objects, notes)


def find_policies(reader: Reader, config: MeshConfig) -> tuple[list[Policy], list[str]]:
    """Those of a cluster that take part, and notes on what doesn't. Raises ClusterUnavailable."""
    objects: list[Object] = []
    notes = []
    for kind, path in POLICIES.items():
        if kind is Kind.NETWORK_POLICY and not config.policy.network_policies:
            notes.append("NetworkPolicies are left out, as the MeshConfig says (networkPolicies: false)")
            continue
        try:
            objects += [{**item, "kind": kind} for item in reader.items(path)]
        except NotFound:
            notes.append(f"{reader.server} knows no {path.rpartition('/')[2]}")
    policies, refused = policies_of(objects)
    return policies, [*notes, *refused]
