"""What a lab is made of: its settings, names, addresses and the layout of its state directory. Touches
nothing."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FAMILIES: Final = ("v4", "v6")
UNDERLAY: Final[Mapping[str, Network]] = {
    "v4": ipaddress.ip_network("198.18.0.0/24"),
    "v6": ipaddress.ip_network("fd00:198:18::/64"),
}
PODS: Final[Mapping[str, Network]] = {
    "v4": ipaddress.ip_network("10.244.0.0/16"),
    "v6": ipaddress.ip_network("fd00:10:244::/56"),
}
NODE_PREFIX: Final[Mapping[str, int]] = {"v4": 24, "v6": 64}
SERVICES: Final[Mapping[str, Network]] = {
    "v4": ipaddress.ip_network("10.96.0.0/16"),
    "v6": ipaddress.ip_network("fd00:10:96::/112"),
}
POD_GATEWAY: Final = {"v4": "169.254.1.1", "v6": "fe80::1"}
"""Every host-side veth carries them, so that a pod's default route is the same on every node."""

CONTROL: Final = "control"
CONTROL_NETNS: Final = "mw-control"
UNDERLAY_NETNS: Final = "mw-underlay"
BRIDGE: Final = "wire"
UPLINK: Final = "eth0"
OVERLAY_DEVICE: Final = "vxlan.1"
OVERLAY_PORT: Final = 8472
"""What flannel uses, and Linux before VXLAN had a port of its own."""
OVERLAY_VNI: Final = 1

API_PORT: Final = 6443
HELPER: Final = "meshwire-lab:cni"
"""The user the nodes' network part acts as; a kubelet may read neither other nodes nor their pods."""

AGENT_ACCOUNT: Final = "meshwire-agent"
OPERATOR_ACCOUNT: Final = "meshwire-operator"

PATIENCE: Final = float(os.environ.get("MESHWIRE_LAB_PATIENCE", "1"))
"""How many times longer than usual something may take before it counts as failed: an emulated machine needs
several."""
NODE_MONITOR_GRACE_SECONDS: Final = round(20 * PATIENCE)
"""A node whose lease is older is not ready. Half of what a cluster waits, and enough for a busy machine."""
LEASE_RENEWAL_SECONDS: Final = 2.5

MAX_NODES: Final = 200


class LabError(Exception):
    """Something a person has to know or do; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `up` was asked for. `overlay` is "" (routes to the other nodes) or "vxlan"."""

    nodes: int = 3
    families: tuple[str, ...] = FAMILIES
    underlay_mtu: int = 1500
    overlay: str = ""
    node_cidr: bool = True
    mesh: bool = True
    """Whether operator, agents and userspace WireGuard run; without them it is a plain cluster."""
    audit: bool = False
    """Whether the API server logs who asked it for what (log `audit`)."""

    def __post_init__(self) -> None:
        # None: a control plane alone.
        if not 0 <= self.nodes <= MAX_NODES:
            raise LabError(f"{self.nodes} nodes: a lab has up to {MAX_NODES}")
        if (
            not self.families
            or len(set(self.families)) != len(self.families)
            or set(self.families) - set(FAMILIES)
        ):
            raise LabError(f"families {','.join(self.families)!r}: want v4,v6 or v6,v4 or v4 or v6")
        if not 1280 <= self.underlay_mtu <= 9216:
            raise LabError(f"underlay MTU {self.underlay_mtu}: want 1280 (IPv6 needs it) to 9216")
        if self.overlay not in ("", "vxlan"):
            raise LabError(f"overlay {self.overlay!r}: only vxlan is known")
        if self.overlay and not self.node_cidr:
            raise LabError(
                "an overlay routes by the nodes' pod CIDRs: it can't be had together with --no-node-cidr"
            )
        if self.pod_mtu < 1280 and "v6" in self.families:
            raise LabError(
                f"{self.underlay_mtu} minus the overlay's header leaves pods less than IPv6's 1280"
            )

    @property
    def pod_mtu(self) -> int:
        """MTU of the pods' devices, as a CNI that knows nothing of WireGuard gives it."""
        if not self.overlay:
            return self.underlay_mtu
        return self.underlay_mtu - (50 if self.families[0] == "v4" else 70)


@dataclass(frozen=True, slots=True)
class Node:
    """`index` (from 1) is the node's place in the lab; its addresses and MAC follow from it."""

    name: str
    index: int

    @property
    def netns(self) -> str:
        return f"mw-{self.name}"

    def addresses(self, families: Iterable[str]) -> tuple[Address, ...]:
        """Underlay addresses, in the order of `families`."""
        return tuple(underlay_address(family, 10 + self.index) for family in families)

    @property
    def mac(self) -> str:
        """Of the uplink: it stays over a reboot, as hardware does."""
        return f"02:00:c6:12:00:{10 + self.index:02x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the lab in a state directory was built as; written before anything is built, so that `down` after
    a crash knows what to look for."""

    lab_id: str
    settings: Settings
    api_port: int
    nodes: tuple[Node, ...]
    made_directories: tuple[str, ...] = ()
    """Directories outside of the state directory that didn't exist before; parents first."""
    made_netns_mount: bool = False
    """Whether /run/netns was no mount point before."""

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"no node {name!r}; there are: {', '.join(node.name for node in self.nodes)}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> State:
        raw = json.loads(text)
        settings = raw.pop("settings")
        settings["families"] = tuple(settings["families"])
        return cls(
            settings=Settings(**settings),
            nodes=tuple(Node(**node) for node in raw.pop("nodes")),
            made_directories=tuple(raw.pop("made_directories")),
            **raw,
        )


@dataclass(frozen=True, slots=True)
class Paths:
    """The layout of a lab's state directory."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "lab.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def processes(self) -> Path:
        return self.root / "processes"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    @property
    def audit_policy(self) -> Path:
        return self.root / "audit-policy.yaml"

    @property
    def pool(self) -> Path:
        """The address pool of a cluster whose nodes have no CIDR."""
        return self.root / "pool.json"

    def kubeconfig_of(self, identity: str) -> Path:
        return self.pki / f"{identity}.kubeconfig"

    def log(self, component: str) -> Path:
        return self.logs / f"{component}.log"

    def run(self, machine: str) -> Path:
        """/run of a node, or of the control plane's machine."""
        return self.root / "machines" / machine / "run"

    def lib(self, machine: str) -> Path:
        """/var/lib/meshwire of a node."""
        return self.root / "machines" / machine / "lib"

    def units(self, machine: str) -> Path:
        """/etc/systemd/system of a node."""
        return self.root / "machines" / machine / "units"

    def pods(self, machine: str) -> Path:
        """One JSON file per pod that runs on a node: where to find it."""
        return self.root / "machines" / machine / "pods"

    def pod_run(self, machine: str) -> Path:
        """Holds a directory per pod that runs on a node: the pod's /run."""
        return self.root / "machines" / machine / "pod-run"

    def token_directory(self, machine: str) -> Path:
        return self.run(machine) / "secrets/kubernetes.io/serviceaccount"


NODE_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")


def check_node_name(name: str) -> None:
    """Raises LabError. A port of the underlay's bridge is called as the node, and devices' names end at
    15."""
    if not NODE_NAME.fullmatch(name):
        raise LabError(f"node name {name!r}: want up to 15 of a-z, 0-9 and -, as it names a device too")
    if name in (CONTROL, "underlay", BRIDGE, "lo"):
        raise LabError(f"node name {name!r} is taken by the lab itself")


def free_index(nodes: Iterable[Node]) -> int:
    """The lowest index no node has."""
    taken = {node.index for node in nodes}
    index = next(index for index in range(1, MAX_NODES + 2) if index not in taken)
    if index > MAX_NODES:
        raise LabError(f"a lab has at most {MAX_NODES} nodes")
    return index


def family_of(address: Address | Network) -> str:
    return f"v{address.version}"


def underlay_address(family: str, number: int) -> Address:
    """`number` is written out in the last group of both families: 198.18.0.11 and fd00:198:18::11."""
    network = UNDERLAY[family]
    return network[number] if family == "v4" else network[int(str(number), 16)]


def control_addresses(families: Iterable[str]) -> tuple[Address, ...]:
    """Underlay addresses of the control plane."""
    return tuple(underlay_address(family, 2) for family in families)


def gateway_addresses(families: Iterable[str]) -> tuple[Address, ...]:
    """The nodes' default gateway, the control plane's machine too."""
    return tuple(underlay_address(family, 1) for family in families)


def api_service_address(family: str) -> Address:
    """ClusterIP of `kubernetes`."""
    return SERVICES[family][1]


def pod_netns(node: str, namespace: str, pod: str) -> str:
    return f"mw-{node}-{namespace}-{pod}"


def overlay_mac(node: str) -> str:
    """MAC of a node's overlay device; every node can compute every other's."""
    digest = hashlib.sha256(node.encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x76, *digest[:4]))


def with_port(address: Address, port: int) -> str:
    """As in a URL."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
