"""What `meshwire preflight` looks at, as plain values: probes.py finds them, checks.py judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwire.api.meshconfig import MeshConfig


@dataclass(frozen=True, slots=True)
class Kernel:
    """As uname says."""

    release: str
    machine: str = "x86_64"


@dataclass(frozen=True, slots=True)
class Attempts:
    """What was tried in a network namespace of its own: name -> the error it ended with, empty for success.
    What is missing was not tried. `unprivileged`: in a user namespace, where BPF is never allowed."""

    results: Mapping[str, str]
    unprivileged: bool = False

    def failed(self, *attempts: str) -> dict[str, str]:
        return {name: error for name in attempts if (error := self.results.get(name, ""))}

    def tried(self, *attempts: str) -> bool:
        return all(name in self.results for name in attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WireGuard:
    """`program` is the path of a wireguard-go, empty for none; `tun`: /dev/net/tun is there."""

    attempts: Attempts
    program: str = ""
    tun: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A UDP port. `holder` is the device or process that has it, empty where it can't be told."""

    number: int
    free: bool
    holder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarding:
    """`ipv6` is None on a kernel without IPv6."""

    ipv4: bool
    ipv6: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a boot guard takes. `asked`: the MeshConfig wants one."""

    systemd: bool
    nft: bool
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReversePath:
    """net.ipv4.conf.*.rp_filter: 0 off, 1 strict, 2 loose. `devices` has the uplinks and Meshwire's own."""

    all: int
    devices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Filter:
    """A TC filter on a clsact hook; `name` is the program's, empty for kinds other than bpf."""

    kind: str
    name: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """What sits on one hook, `ingress` or `egress`, of a device pod traffic leaves by. `tcx` has program
    names; `blocked`: an ingress qdisc has the place of clsact."""

    device: str
    direction: str
    filters: tuple[Filter, ...] = ()
    tcx: tuple[str, ...] = ()
    blocked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    kind: str = ""
    mtu: int = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """`uplinks` and `overlays` are those that pod traffic leaves by; `others` all else."""

    uplinks: tuple[Device, ...] = ()
    overlays: tuple[Device, ...] = ()
    others: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A base chain of nftables, which iptables-nft's are too; `where` is its family, table and name."""

    where: str
    hook: str
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Firewall:
    """`readable` is False where nftables' rules can't be listed. `texts` are rules, one string each."""

    readable: bool
    chains: tuple[Chain, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """A Node; `outside` are pods on it (namespace/name address) whose addresses are in none of its pod
    CIDRs."""

    name: str
    kernel: str
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """`version` as /version gives it (`v1.35.4`); `definitions` are the CRDs of ours that are established.
    `denied` are things `kubectl apply -k config` makes that the asker may not make."""

    version: str
    definitions: frozenset[str] = frozenset()
    nodes: tuple[ClusterNode, ...] = ()
    denied: tuple[str, ...] = ()
    config: MeshConfig = field(default_factory=MeshConfig)
    unread: Mapping[str, str] = field(default_factory=dict)
    """What could not be read -> why."""
