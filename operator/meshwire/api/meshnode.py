"""MeshNode: the operator's orders to one node, and that node's answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from meshwire.api import conditions, fields, names
from meshwire.api.conditions import Condition
from meshwire.api.fields import Address, Network

MAX_UNREACHABLE: Final = 20
"""Nodes that a status names; `unreachable_count` has them all."""


class Phase(StrEnum):
    """In the order a cluster goes through them; after Draining comes Off again (docs/architecture.md)."""

    OFF = "Off"
    ENABLING = "Enabling"
    ENFORCING = "Enforcing"
    DISABLING = "Disabling"
    DRAINING = "Draining"


class Implementation(StrEnum):
    KERNEL = "Kernel"
    USERSPACE = "Userspace"
    NONE = "None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The node's WireGuard public key of one epoch (canonical base64). `secret_digest`: of the epoch secret
    that preshared keys with this key are derived from; empty: it is used without."""

    epoch: int
    public_key: str
    secret_digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """An item of `spec.keys`."""
        return {
            "epoch": self.epoch,
            "publicKey": self.public_key,
            **({"epochSecretDigest": self.secret_digest} if self.secret_digest else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """`id` 0 and `epoch` 0 stand for none yet. `retiring` is the epoch before, while it is in use beside
    `epoch`; 0: none. `quarantined` is what people ask for, and the only part that the operator never writes;
    `revocation` tells this quarantine from all others of the node, and outlasts it until all others have let
    go of the node; 0: none."""

    id: int = 0
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()
    cluster_cidrs: tuple[Network, ...] = ()
    keys: tuple[Key, ...] = ()
    phase: Phase = Phase.OFF
    epoch: int = 0
    retiring: int = 0
    quarantined: bool = False
    revocation: int = 0

    @property
    def is_out(self) -> bool:
        """Nobody is to have this node as a peer."""
        return self.quarantined or bool(self.revocation)

    def public_key(self, epoch: int) -> str | None:
        """The key published for `epoch`, if any."""
        return next((key.public_key for key in self.keys if key.epoch == epoch), None)

    def to_dict(self) -> dict[str, Any]:
        """What goes into `spec`, but for `quarantined`."""
        return {
            "id": self.id,
            "addresses": [str(address) for address in self.addresses],
            "podCIDRs": [str(cidr) for cidr in self.pod_cidrs],
            "clusterCIDRs": [str(cidr) for cidr in self.cluster_cidrs],
            "keys": [key.to_dict() for key in self.keys],
            # null takes the field away where the spec is merge-patched.
            "encryption": {
                "phase": str(self.phase),
                "epoch": self.epoch,
                "retiring": self.retiring or None,
            },
            "revocation": self.revocation or None,
        }


@dataclass(frozen=True, slots=True, order=True)
class Revoked:
    """Node number `id` is no peer any more, as of its `revocation`."""

    id: int
    revocation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """A live node from which nothing comes. `since` is RFC 3339: when it was last heard of; `reason` is
    CamelCase."""

    node: str
    since: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"node": self.node, "since": self.since, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """`unreached`: numbers of the nodes that it sends to by the retiring epoch, if at all. `revoked`: those
    of nodes that it has let go of, each with the revocation."""

    observed_generation: int = 0
    sealing_key: str | None = None
    implementation: Implementation = Implementation.NONE
    prepared_epoch: int = 0
    active_epoch: int = 0
    unreached: tuple[int, ...] = ()
    revoked: tuple[Revoked, ...] = ()
    strict: bool = False
    peers: int = 0
    handshakes: int = 0
    leaked: int = 0
    dropped: int = 0
    agent_version: str = ""
    unreachable: tuple[Unreachable, ...] = ()
    """At most MAX_UNREACHABLE, of `unreachable_count`."""
    unreachable_count: int = 0
    conditions: tuple[Condition, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What goes into `status`."""
        return {
            "observedGeneration": self.observed_generation,
            **({"sealingKey": self.sealing_key} if self.sealing_key else {}),
            "implementation": str(self.implementation),
            "preparedEpoch": self.prepared_epoch,
            "activeEpoch": self.active_epoch,
            "unreached": list(self.unreached),
            "revoked": [{"id": each.id, "revocation": each.revocation} for each in self.revoked],
            "strict": self.strict,
            "peers": self.peers,
            "handshakes": self.handshakes,
            "leaked": self.leaked,
            "dropped": self.dropped,
            "agentVersion": self.agent_version,
            "unreachable": [each.to_dict() for each in self.unreachable],
            "unreachableCount": self.unreachable_count,
            "conditions": conditions.to_list(self.conditions),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshNode:
    """`generation` counts changes of the spec; a status speaks of the generation it has observed. `owner`
    is the uid of the Node it stands for."""

    name: str
    uid: str = ""
    owner: str = ""
    resource_version: str = ""
    generation: int = 0
    created: str = ""
    spec: Spec = field(default_factory=Spec)
    status: Status = field(default_factory=Status)

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshNode:
        """Reads a MeshNode as the API server gives it; parts not written yet read as their defaults.
        Raises InvalidSpec."""
        metadata = fields.child(source, "metadata", "")
        return cls(
            name=fields.text(metadata, "name", "metadata"),
            uid=fields.text(metadata, "uid", "metadata"),
            owner=next(
                (
                    str(owner.get("uid"))
                    for owner in metadata.get("ownerReferences", ())
                    if owner.get("kind") == "Node"
                ),
                "",
            ),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
            generation=fields.integer(metadata, "generation", "metadata", default=0),
            created=fields.text(metadata, "creationTimestamp", "metadata"),
            spec=_spec(fields.child(source, "spec", "")),
            status=_status(fields.child(source, "status", "")),
        )

    @property
    def ready(self) -> bool:
        """The node's agent has carried out the spec as it is now."""
        return self.current and conditions.is_true(
            self.status.conditions, conditions.READY, generation=self.generation
        )

    @property
    def current(self) -> bool:
        """The status speaks of the spec as it is now."""
        return self.status.observed_generation >= self.generation


def _spec(source: Mapping[str, Any]) -> Spec:
    def key(item: Any, path: str) -> Key:
        if not isinstance(item, Mapping):
            raise fields.InvalidSpec(path, "must be an object")
        return Key(
            epoch=fields.integer(item, "epoch", path, default=0, low=1),
            public_key=fields.key(item.get("publicKey"), f"{path}.publicKey"),
            secret_digest=fields.key(item["epochSecretDigest"], f"{path}.epochSecretDigest")
            if item.get("epochSecretDigest") is not None
            else "",
        )

    encryption = fields.child(source, "encryption", "spec")
    return Spec(
        id=fields.integer(source, "id", "spec", default=0, high=names.MAX_NODE_ID),
        addresses=fields.listed(source, "addresses", "spec", fields.address),
        pod_cidrs=fields.listed(source, "podCIDRs", "spec", fields.network),
        cluster_cidrs=fields.listed(source, "clusterCIDRs", "spec", fields.network),
        keys=fields.listed(source, "keys", "spec", key),
        phase=fields.choice(encryption, "phase", "spec.encryption", default=Phase.OFF),
        epoch=fields.integer(encryption, "epoch", "spec.encryption", default=0),
        retiring=0
        if encryption.get("retiring") is None
        else fields.integer(encryption, "retiring", "spec.encryption", default=0),
        quarantined=fields.boolean(source, "quarantined", "spec", default=False),
        revocation=0
        if source.get("revocation") is None
        else fields.integer(source, "revocation", "spec", default=0),
    )


def _number(item: Any, path: str) -> int:
    return fields.integer({"item": item}, "item", path, default=0, low=1, high=names.MAX_NODE_ID)


def _unreachable(item: Any, path: str) -> Unreachable:
    if not isinstance(item, Mapping):
        raise fields.InvalidSpec(path, "must be an object")
    return Unreachable(
        node=fields.text(item, "node", path),
        since=fields.text(item, "since", path),
        reason=fields.text(item, "reason", path),
    )


def _revoked(item: Any, path: str) -> Revoked:
    if not isinstance(item, Mapping):
        raise fields.InvalidSpec(path, "must be an object")
    return Revoked(
        fields.integer(item, "id", path, default=0, low=1, high=names.MAX_NODE_ID),
        fields.integer(item, "revocation", path, default=0, low=1),
    )


def _status(source: Mapping[str, Any]) -> Status:
    sealing_key = source.get("sealingKey")
    return Status(
        observed_generation=fields.integer(source, "observedGeneration", "status", default=0),
        sealing_key=None if sealing_key is None else fields.key(sealing_key, "status.sealingKey"),
        implementation=fields.choice(source, "implementation", "status", default=Implementation.NONE),
        prepared_epoch=fields.integer(source, "preparedEpoch", "status", default=0),
        active_epoch=fields.integer(source, "activeEpoch", "status", default=0),
        unreached=fields.listed(source, "unreached", "status", _number),
        revoked=fields.listed(source, "revoked", "status", _revoked),
        strict=fields.boolean(source, "strict", "status", default=False),
        peers=fields.integer(source, "peers", "status", default=0),
        handshakes=fields.integer(source, "handshakes", "status", default=0),
        leaked=fields.integer(source, "leaked", "status", default=0),
        dropped=fields.integer(source, "dropped", "status", default=0),
        agent_version=fields.text(source, "agentVersion", "status"),
        unreachable=fields.listed(source, "unreachable", "status", _unreachable),
        unreachable_count=fields.integer(source, "unreachableCount", "status", default=0),
        conditions=conditions.parse(source),
    )
