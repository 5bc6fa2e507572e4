"""What the operator keeps of each object it watches: a projection, never the object."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any, Final

from meshwire.api import conditions as api_conditions
from meshwire.api import fields, names, preshared
from meshwire.api.conditions import Condition
from meshwire.api.fields import Address, InvalidSpec, Network
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshendpointslice import MAX_PORTS, Endpoint, MeshEndpointSlice, NamedPort
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshnode import Key, MeshNode
from meshwire.api.meshpolicy import Kind, PolicyMode, Protocol, Selector
from meshwire.api.policyobjects import mesh_policy
from meshwire.policy.identity import Labels, sorted_labels

MAX_ADDRESSES = 4
MAX_POD_CIDRS = 16
ENDED: Final = frozenset({"Succeeded", "Failed"})
"""Phases of a pod whose containers have all ended: its address may be another's already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`live`: the Node's condition Ready is True. `tainted`: it carries names.NOT_READY_TAINT."""

    name: str
    uid: str
    resource_version: str = field(default="", compare=False)
    created: str = ""
    live: bool = False
    tainted: bool = False
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Node:
        """Reads a v1 Node. What other components write wrongly there is left out, never an error."""
        metadata, spec, status = source["metadata"], source.get("spec", {}), source.get("status", {})
        addresses: list[Address] = []
        for item in status.get("addresses", ()):
            if item.get("type") == "InternalIP":
                with suppress(ValueError):
                    addresses.append(ip_address(item["address"]))
        pod_cidrs: list[Network] = []
        for text in spec.get("podCIDRs") or filter(None, [spec.get("podCIDR")]):
            with suppress(ValueError):
                pod_cidrs.append(ip_network(text))
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            created=metadata.get("creationTimestamp", ""),
            live=any(
                item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions", ())
            ),
            tainted=any(taint.get("key") == names.NOT_READY_TAINT for taint in spec.get("taints", ())),
            addresses=tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES],
            pod_cidrs=tuple(dict.fromkeys(pod_cidrs))[:MAX_POD_CIDRS],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySecret:
    """A node's key Secret without anything secret. `owner` is the uid of the MeshNode it names, `keys` the
    public halves of those private keys that are there."""

    node: str
    uid: str
    resource_version: str = ""
    owner: str = ""
    sealed_to: str = ""
    keys: tuple[Key, ...] = ()

    @property
    def name(self) -> str:
        return self.node

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> KeySecret:
        """Reads a v1 Secret that carries names.NODE_LABEL."""
        metadata = source["metadata"]
        annotations = metadata.get("annotations", {})
        keys: list[Key] = []
        for name, value in annotations.items():
            epoch = name.removeprefix(names.PUBLIC_KEY_ANNOTATION)
            if epoch == name or not epoch.isdecimal():
                continue
            data = source.get("data") or {}
            digest = annotations.get(f"{names.SECRET_DIGEST_ANNOTATION}{epoch}", "")
            # Half a key is none: it is issued again.
            if names.secret_data_key(int(epoch)) not in data or (
                digest and names.sealed_secret_data_key(int(epoch)) not in data
            ):
                continue
            with suppress(InvalidSpec):
                keys.append(
                    Key(
                        epoch=int(epoch),
                        public_key=fields.key(value, ""),
                        secret_digest=digest and fields.key(digest, ""),
                    )
                )
        return cls(
            node=metadata["labels"][names.NODE_LABEL],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            owner=next(
                (
                    owner["uid"]
                    for owner in metadata.get("ownerReferences", ())
                    if owner.get("kind") == "MeshNode"
                ),
                "",
            ),
            sealed_to=annotations.get(names.SEALED_TO_ANNOTATION, ""),
            keys=tuple(sorted(keys, key=lambda key: key.epoch)),
        )

    def key(self, epoch: int) -> Key | None:
        return next((key for key in self.keys if key.epoch == epoch), None)

    def public_key(self, epoch: int) -> str | None:
        return key.public_key if (key := self.key(epoch)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSecret:
    """An epoch's Secret in the operator's namespace, without the secret; `digest` is empty where it holds
    none."""

    epoch: int
    uid: str
    resource_version: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return str(self.epoch)

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> EpochSecret:
        """Reads a v1 Secret that carries names.EPOCH_SECRET_LABEL."""
        metadata = source["metadata"]
        label = metadata["labels"][names.EPOCH_SECRET_LABEL]
        epoch = int(label) if label.isdecimal() else 0
        digest = ""
        with suppress(ValueError):
            digest = preshared.digest(epoch_secret_in(source), epoch)
        return cls(
            epoch=epoch, uid=metadata["uid"], resource_version=metadata["resourceVersion"], digest=digest
        )


def epoch_secret_in(source: Mapping[str, Any]) -> bytes:
    """What such a Secret is there for. Raises ValueError where it isn't in it."""
    data = source.get("data") or {}
    return base64.b64decode(data.get(names.EPOCH_SECRET_DATA_KEY, ""), validate=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The MeshConfig, or why it can't be acted upon: then `config` is None."""

    uid: str
    resource_version: str
    generation: int
    config: MeshConfig | None
    problem: str = ""
    conditions: tuple[Condition, ...] = ()

    @property
    def name(self) -> str:
        return names.CONFIG_NAME

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Config:
        metadata = source["metadata"]
        config, problem = None, ""
        try:
            config = MeshConfig.from_object(source)
        except InvalidSpec as error:
            problem = str(error)
        return cls(
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 0),
            config=config,
            problem=problem,
            conditions=() if config is None else config.conditions,
        )


def mesh_node(source: Mapping[str, Any]) -> MeshNode:
    """A MeshNode; a status that can't be read counts as none, so that an agent can't hide its node. Raises
    InvalidSpec."""
    try:
        return MeshNode.from_object(source)
    except InvalidSpec:
        return MeshNode.from_object({**source, "status": {}})


@lru_cache(maxsize=8192)
def shared(labels: Labels) -> Labels:
    """The same pairs as one object: thousands of pods have the same labels."""
    return labels


@lru_cache(maxsize=1024)
def shared_ports(ports: tuple[NamedPort, ...]) -> tuple[NamedPort, ...]:
    return ports


def _named_ports(spec: Mapping[str, Any]) -> tuple[NamedPort, ...]:
    """Of the containers, and of those init containers that go on running beside them."""
    found: set[NamedPort] = set()
    for container in (
        *spec.get("containers", ()),
        *(each for each in spec.get("initContainers") or () if each.get("restartPolicy") == "Always"),
    ):
        for port in container.get("ports") or ():
            with suppress(ValueError):
                if port.get("name"):
                    protocol = Protocol(port.get("protocol", "TCP"))
                    found.add(NamedPort(port["name"], protocol, port["containerPort"]))
    return tuple(sorted(found)[:MAX_PORTS])


def labels_of(metadata: Mapping[str, Any]) -> Labels:
    return shared(sorted_labels((metadata.get("labels") or {}).items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One with a network of its own, whose containers have not all ended. `node` is empty and `addresses`
    are none until it has them."""

    uid: str
    namespace: str
    name: str
    created: str = ""
    labels: Labels = ()
    service_account: str = ""
    node: str = ""
    addresses: tuple[Address, ...] = ()
    ports: tuple[NamedPort, ...] = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Pod | None:
        """Reads a v1 Pod; None for one that has no network of its own, or not any more."""
        metadata, spec, status = source["metadata"], source.get("spec", {}), source.get("status", {})
        if spec.get("hostNetwork") or status.get("phase") in ENDED:
            return None
        by_family: dict[int, Address] = {}
        for item in status.get("podIPs") or [{"ip": status.get("podIP")}]:
            with suppress(ValueError):
                address = ip_address(item.get("ip"))
                by_family.setdefault(address.version, address)
        return cls(
            uid=metadata["uid"],
            namespace=metadata["namespace"],
            name=metadata["name"],
            created=metadata.get("creationTimestamp", ""),
            labels=labels_of(metadata),
            service_account=spec.get("serviceAccountName", ""),
            node=spec.get("nodeName", ""),
            addresses=tuple(by_family.values()),
            ports=shared_ports(_named_ports(spec)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    name: str
    labels: Labels = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Namespace:
        return cls(name=source["metadata"]["name"], labels=labels_of(source["metadata"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A MeshIdentity. One that can't be read has no labels, which no pod's identity has: its number is
    taken, and nothing uses it."""

    name: str
    uid: str
    resource_version: str = field(default="", compare=False)
    labels: Labels = ()
    unused_since: datetime | None = None

    @property
    def number(self) -> int:
        return int(self.name) if self.name.isdecimal() else 0

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Identity:
        metadata = source["metadata"]
        labels: Labels = ()
        with suppress(InvalidSpec):
            labels = shared(MeshIdentity.from_object(source).labels)
        since = None
        with suppress(ValueError):
            since = datetime.fromisoformat(
                (metadata.get("annotations") or {}).get(names.UNUSED_SINCE_ANNOTATION, "")
            )
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            labels=labels,
            unused_since=since if since is None or since.tzinfo else since.replace(tzinfo=UTC),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A MeshEndpointSlice. One that can't be read is empty: what belongs into it is written anew."""

    name: str
    uid: str
    resource_version: str = field(default="", compare=False)
    endpoints: tuple[Endpoint, ...] = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> Slice:
        metadata = source["metadata"]
        endpoints: tuple[Endpoint, ...] = ()
        with suppress(InvalidSpec):
            endpoints = MeshEndpointSlice.from_object(source).endpoints
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            endpoints=endpoints,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """`nodes` is like 2/3."""

    observed_generation: int = 0
    nodes: str = ""
    would_deny: int = 0
    conditions: tuple[Condition, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What goes into `status`."""
        return {
            "observedGeneration": self.observed_generation,
            "nodes": self.nodes,
            "wouldDeny": self.would_deny,
            "conditions": api_conditions.to_list(self.conditions),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObject:
    """A MeshPolicy or ClusterMeshPolicy. `selector` None: it can't be carried out, and `problem` says why.
    `key` tells it from all others of its kind."""

    kind: Kind
    namespace: str
    key: str
    uid: str
    resource_version: str = field(default="", compare=False)
    generation: int = 0
    mode: PolicyMode = PolicyMode.ENFORCE
    selector: Selector | None = None
    problem: str = ""
    status: PolicyStatus = PolicyStatus()

    @property
    def name(self) -> str:
        return self.key

    @classmethod
    def from_object(cls, source: Mapping[str, Any], kind: Kind) -> PolicyObject:
        metadata, status = source["metadata"], source.get("status") or {}
        mode, selector, problem = PolicyMode.ENFORCE, None, ""
        try:
            policy = mesh_policy(source, kind)
            mode, selector = policy.mode, policy.selector
        except InvalidSpec as error:
            problem = str(error)
        found = PolicyStatus()
        # Nobody but us writes it: one that can't be read is written anew.
        with suppress(InvalidSpec):
            found = PolicyStatus(
                observed_generation=fields.integer(status, "observedGeneration", "status", default=0),
                nodes=fields.text(status, "nodes", "status"),
                would_deny=fields.integer(status, "wouldDeny", "status", default=0),
                conditions=api_conditions.parse(status),
            )
        namespace = metadata.get("namespace", "")
        return cls(
            kind=kind,
            namespace=namespace,
            key=f"{namespace}/{metadata['name']}",
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 0),
            mode=mode,
            selector=selector,
            problem=problem,
            status=found,
        )
