"""MeshConfig: what people ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from hashlib import sha256
from itertools import combinations
from typing import Any, Final

from meshwire.api import conditions, fields, names
from meshwire.api.conditions import Condition
from meshwire.api.fields import InvalidSpec, Network

RESERVED_PORTS: Final[Mapping[int, str]] = {4789: "VXLAN", 6081: "Geneve", 8472: "VXLAN in many CNIs"}
"""UDP ports of the overlays Meshwire encrypts: a WireGuard device there would take the CNI's packets."""

OWN_DEVICES: Final = "meshwire_"
"""Devices whose names start like this are Meshwire's own."""

MIN_INTERVAL: Final = timedelta(minutes=1)
MIN_OVERLAP: Final = timedelta(seconds=5)
MAX_REQUEST: Final = 128
"""Characters of a request to rotate keys that MeshStatus repeats; a longer one is known by its hash."""

EXCLUDED_LABELS: Final = frozenset(
    {
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/controller-uid",
        "batch.kubernetes.io/job-completion-index",
        "batch.kubernetes.io/job-name",
        "controller-revision-hash",
        "controller-uid",
        "job-name",
        "pod-template-generation",
        "pod-template-hash",
        "statefulset.kubernetes.io/pod-name",
    }
)
"""Labels that tell one pod from its siblings: no part of identities unless the MeshConfig says so."""


class Mode(StrEnum):
    STRICT = "Strict"
    PERMISSIVE = "Permissive"


class Userspace(StrEnum):
    AUTO = "Auto"
    NEVER = "Never"
    ALWAYS = "Always"


class BootGuard(StrEnum):
    OFF = "Off"
    SYSTEMD = "Systemd"


class SameNodePath(StrEnum):
    AUTO = "Auto"
    DIRECT = "Direct"
    STACK = "Stack"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRotation:
    """`interval` is from keys that came into force to the next ones, 0: only on demand; `overlap` from the
    moment when all live nodes send by the new keys to the end of the old ones."""

    interval: timedelta = timedelta(hours=24)
    overlap: timedelta = timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    enabled: bool = False
    mode: Mode = Mode.STRICT
    userspace: Userspace = Userspace.AUTO
    port: int = 51871
    """The even epochs' UDP port; odd ones use the next (names.listen_port)."""
    keepalive: int = 25
    """Seconds between persistent keepalives; 0: none."""
    key_rotation: KeyRotation = field(default_factory=KeyRotation)
    preshared_keys: bool = True
    """Of epochs that begin from now on: what has begun stays as it is."""
    boot_guard: BootGuard = BootGuard.OFF
    """Who holds back, in Strict, what pods of a node that boots send before its agent is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    cluster_cidrs: tuple[Network, ...] = ()
    uplinks: tuple[str, ...] = ()
    overlays: tuple[str, ...] = ()
    mtu: int = 0
    """Of the tunnel, in bytes; 0: the underlay's minus 80."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    enabled: bool = False
    network_policies: bool = True
    """NetworkPolicies are enforced too."""
    same_node_path: SameNodePath = SameNodePath.AUTO
    excluded_labels: frozenset[str] = EXCLUDED_LABELS
    """Keys of pods' own labels that are no part of identities."""

    @property
    def skips_stack(self) -> bool:
        """Pods of one node reach each other directly, where nothing translates their addresses. Not by
        default where somebody else enforces NetworkPolicies: probably there, in the host's stack."""
        if self.same_node_path is SameNodePath.AUTO:
            return self.network_policies
        return self.same_node_path is SameNodePath.DIRECT


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """`MeshConfig()` is what holds while nobody has written one: encryption and policy off."""

    encryption: Encryption = field(default_factory=Encryption)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    rotate: str = ""
    """The value of names.ROTATE_ANNOTATION, or what stands for it where it is long."""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshConfig:
        """Reads a MeshConfig as the API server gives it. Raises InvalidSpec."""
        metadata, spec = fields.child(source, "metadata", ""), fields.child(source, "spec", "")
        return cls(
            encryption=_encryption(fields.child(spec, "encryption", "spec")),
            network=_network(fields.child(spec, "network", "spec")),
            policy=_policy(fields.child(spec, "policy", "spec")),
            rotate=_request(fields.child(metadata, "annotations", "metadata")),
            uid=fields.text(metadata, "uid", "metadata"),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
            generation=fields.integer(metadata, "generation", "metadata", default=0),
            conditions=conditions.parse(fields.child(source, "status", "")),
        )


def _encryption(source: Mapping[str, Any]) -> Encryption:
    path = "spec.encryption"
    port = fields.integer(source, "port", path, default=51871, low=1, high=65534)
    for taken in (port, port + 1):
        if user := RESERVED_PORTS.get(taken):
            raise InvalidSpec(f"{path}.port", f"takes {port} and {port + 1}, and {taken} is {user}")
    return Encryption(
        enabled=fields.boolean(source, "enabled", path, default=False),
        mode=fields.choice(source, "mode", path, default=Mode.STRICT),
        userspace=fields.choice(source, "userspace", path, default=Userspace.AUTO),
        port=port,
        keepalive=fields.integer(source, "persistentKeepaliveSeconds", path, default=25, high=65535),
        key_rotation=_key_rotation(fields.child(source, "keyRotation", path)),
        preshared_keys=fields.boolean(source, "presharedKeys", path, default=True),
        boot_guard=fields.choice(source, "bootGuard", path, default=BootGuard.OFF),
    )


def _key_rotation(source: Mapping[str, Any]) -> KeyRotation:
    path, default = "spec.encryption.keyRotation", KeyRotation()
    interval = fields.duration(source, "interval", path, default=default.interval)
    overlap = fields.duration(source, "overlap", path, default=default.overlap)
    if interval and interval < MIN_INTERVAL:
        raise InvalidSpec(f"{path}.interval", "must be 0s (only on demand) or at least 1m")
    if overlap < MIN_OVERLAP:
        raise InvalidSpec(f"{path}.overlap", "must be at least 5s: what the old keys sent has to arrive")
    if interval and overlap >= interval:
        raise InvalidSpec(f"{path}.overlap", "must be shorter than the interval")
    return KeyRotation(interval=interval, overlap=overlap)


def _request(annotations: Mapping[str, Any]) -> str:
    value = fields.text(annotations, names.ROTATE_ANNOTATION, "metadata.annotations")
    return value if len(value) <= MAX_REQUEST else sha256(value.encode()).hexdigest()


def _network(source: Mapping[str, Any]) -> NetworkSettings:
    path = "spec.network"
    cidrs = fields.listed(source, "clusterCIDRs", path, fields.network)
    for one, other in combinations(cidrs, 2):
        if one.overlaps(other):
            raise InvalidSpec(f"{path}.clusterCIDRs", f"{one} and {other} overlap")
    uplinks = fields.listed(source, "uplinks", path, _foreign_device)
    overlays = fields.listed(source, "overlays", path, _foreign_device)
    if both := set(uplinks) & set(overlays):
        raise InvalidSpec(f"{path}.overlays", f"{min(both)} is an uplink too: a device is one or the other")
    mtu = fields.integer(source, "mtu", path, default=0, high=65535)
    if 0 < mtu < 1280:
        raise InvalidSpec(f"{path}.mtu", "must be 0 (found by itself) or 1280 to 65535: IPv6 needs 1280")
    return NetworkSettings(cluster_cidrs=cidrs, uplinks=uplinks, overlays=overlays, mtu=mtu)


def _policy(source: Mapping[str, Any]) -> PolicySettings:
    path = "spec.policy"
    return PolicySettings(
        enabled=fields.boolean(source, "enabled", path, default=False),
        network_policies=fields.boolean(source, "networkPolicies", path, default=True),
        same_node_path=fields.choice(source, "sameNodePath", path, default=SameNodePath.AUTO),
        excluded_labels=(
            frozenset(fields.listed(source, "excludedLabels", path, fields.label_key))
            if source.get("excludedLabels") is not None
            else EXCLUDED_LABELS
        ),
    )


def _foreign_device(value: Any, path: str) -> str:
    name = fields.device(value, path)
    if name.startswith(OWN_DEVICES):
        raise InvalidSpec(path, f"{name} is named like Meshwire's own devices ({names.device_name(0)})")
    return name


def missing_families(cidrs: Iterable[Network], families: frozenset[int]) -> frozenset[int]:
    """IP versions of pods that no cluster CIDR is of; both where none is given and nothing is known of
    pods."""
    given = frozenset(cidr.version for cidr in cidrs)
    return (families or (frozenset() if given else frozenset({4, 6}))) - given
