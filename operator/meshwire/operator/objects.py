"""What the operator keeps of each object it watches: a projection, never the object."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from meshwire.api import fields, names
from meshwire.api.conditions import Condition
from meshwire.api.fields import Address, InvalidSpec, Network
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Key, MeshNode

MAX_ADDRESSES = 4
MAX_POD_CIDRS = 16


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
            if names.secret_data_key(int(epoch)) in (source.get("data") or {}):
                with suppress(InvalidSpec):
                    keys.append(Key(epoch=int(epoch), public_key=fields.key(value, "")))
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

    def public_key(self, epoch: int) -> str | None:
        return next((key.public_key for key in self.keys if key.epoch == epoch), None)


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
