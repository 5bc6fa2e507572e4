"""What the agent wants and what it finds, as plain values. Nothing here touches the kernel, files or the
API."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Final, NoReturn

from meshwire.api import names, preshared
from meshwire.api.fields import Address, Network
from meshwire.api.meshnode import Implementation, Phase, Spec

DEVICES: Final = (names.device_name(0), names.device_name(1))
"""The only WireGuard devices Meshwire ever creates, changes or deletes."""

DEVICE_ADDRESS: Final = IPv4Address("192.0.0.8")
"""Every tunnel device carries this address and no route: Linux drops whatever arrives on a device without
any IPv4 address as soon as rp_filter is on, loose or not (`__fib_validate_source`). RFC 7600 reserves it for
such a purpose, so nothing can be sent to it."""

HANDSHAKE_LIFETIME: Final = 180.0
"""Seconds after which WireGuard itself considers a session dead (REJECT_AFTER_TIME)."""


class SecretKey:
    """32 bytes that must not be printed, logged, compared in variable time, copied or pickled by
    accident."""

    __slots__ = ("_raw",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise ValueError("a key has 32 bytes")
        self._raw = raw

    def reveal(self) -> bytes:
        """The raw key, for the kernel, the UAPI socket and the 0600 key file alone."""
        return self._raw

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and hmac.compare_digest(self._raw, other._raw)

    def __repr__(self) -> str:
        return "SecretKey(hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is never pickled or copied")


NO_PRESHARED_KEY: Final = SecretKey(bytes(32))
"""What WireGuard takes for none; telling it nothing would leave the one that is there."""


def read_preshared_key(raw: bytes) -> SecretKey | None:
    """As WireGuard tells of one."""
    key = SecretKey(raw)
    return None if key == NO_PRESHARED_KEY else key


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A WireGuard key pair of this node. `public_key` is base64; `epoch_secret` is what preshared keys are
    derived from, None in an epoch without."""

    epoch: int
    public_key: str
    private_key: SecretKey
    epoch_secret: SecretKey | None = None

    @property
    def secret_digest(self) -> str:
        """As MeshNodes publish it."""
        return preshared.digest(self.epoch_secret.reveal(), self.epoch) if self.epoch_secret else ""

    def pair_key(self, public_key: str) -> SecretKey | None:
        """The preshared key with the node of that public key (base64); None in an epoch without."""
        if self.epoch_secret is None:
            return None
        return SecretKey(
            preshared.pair_key(self.epoch_secret.reveal(), self.epoch, self.public_key, public_key)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A MeshNode without its status; `uid` tells it from a later one of that name. `created` orders members
    by age (RFC 3339, as the API server writes it)."""

    name: str
    uid: str = ""
    created: str = ""
    generation: int = 0
    spec: Spec = field(default_factory=Spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """A Node object: known before the operator has made its MeshNode."""

    name: str
    ready: bool = False
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a person should know, for the Ready condition. `reason` is CamelCase; `blocking` makes it
    False."""

    reason: str
    message: str
    blocking: bool = True


# What the kernel has.


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network device. `kind` is IFLA_INFO_KIND or empty; `ethernet`: its packets have an Ethernet
    header."""

    index: int
    name: str
    kind: str = ""
    up: bool = False
    mtu: int = 1500
    ethernet: bool = True
    addresses: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route and the indexes of the devices it uses. A default route has prefix length 0."""

    destination: Network
    interfaces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: Address
    port: int

    def __str__(self) -> str:
        return (
            f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """A peer as its device has it. `singles` are those of its AllowedIPs that are single addresses, packed;
    `allowed_ips` the others. `handshake`: Unix time of the latest handshake in seconds, 0 for never.
    `preshared_key` None: it has none."""

    public_key: str
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[Network] = frozenset()
    singles: frozenset[bytes] = frozenset()
    keepalive: int = 0
    handshake: float = 0.0
    received: int = 0
    sent: int = 0
    preshared_key: SecretKey | None = field(default=None, hash=False)

    @property
    def networks(self) -> frozenset[Network]:
        """All of its AllowedIPs."""
        return self.allowed_ips.union(map(single_network, self.singles))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A WireGuard device as it is. `public_key` is empty where no private key is set; `private_key` never
    leaves the kernel."""

    name: str
    public_key: str = ""
    port: int = 0
    peers: Mapping[str, PeerState] = field(default_factory=dict)


# What the datapath is told.


class AddressFlags(enum.IntFlag):
    """As enum mw_address_flags."""

    POD = 1
    HOST = 2
    CLUSTER = 4


class SettingsFlags(enum.IntFlag):
    """As enum mw_settings_flags."""

    NONE = 0
    STRICT = 1
    ENFORCING = 2
    PASS_OVERSIZED = 4


@dataclass(frozen=True, slots=True)
class AddressEntry:
    """A value of the datapath's `ipcache`. `node` 0: no known node."""

    node: int
    flags: AddressFlags
    identity: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    flags: SettingsFlags
    local_node: int
    tunnel_mtu: int


class Direction(enum.StrEnum):
    """Of a TC hook."""

    EGRESS = "egress"
    INGRESS = "ingress"


@dataclass(frozen=True, slots=True, order=True)
class Attachment:
    """A TC program on a device's hook; there is one of ours on a hook at most."""

    device: str
    direction: Direction
    program: str


@dataclass(frozen=True, slots=True)
class Datapath:
    """The maps' contents. `nodes` has the entries that lead to a device: node number to ifindex. `pods` are
    the entries of single pod addresses, as in Desired; `addresses` all others. `quarantined`: as in
    Desired."""

    addresses: Mapping[Network, AddressEntry]
    nodes: Mapping[int, int]
    settings: Settings | None
    pods: Mapping[int, frozenset[bytes]] = field(default_factory=dict)
    quarantined: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything of the kernel that a plan depends on.

    `attachments` are our filters; one whose program is not the loaded one has program `stale`. `hooked` are
    the names of devices that have a clsact, whoever's. `unguarded`: tunnel devices, there or not, at which
    policy that is in force doesn't judge what leaves. `datapath` is None where programs and maps of this
    version are not loaded. `sysctls` has what is readable of the paths asked for, relative to /proc/sys.
    `endpoints` is what this agent last set, by device and public key: a peer that has roamed since is
    left alone. `lost_source`: names of tunnel devices that may go on sending from an address which the node
    has lost. `now` is Unix time in seconds."""

    links: Mapping[str, Link]
    routes: tuple[Route, ...] = ()
    wireguard: Mapping[str, DeviceState] = field(default_factory=dict)
    datapath: Datapath | None = None
    pinned: bool = False
    attachments: frozenset[Attachment] = frozenset()
    hooked: frozenset[str] = frozenset()
    unguarded: frozenset[str] = frozenset()
    boot_guard: bool = False
    """What init loaded before the agent was there still holds back what pods send (bootguard.TABLE)."""
    sysctls: Mapping[str, str] = field(default_factory=dict)
    endpoints: Mapping[tuple[str, str], Endpoint] = field(default_factory=dict)
    lost_source: frozenset[str] = frozenset()
    implementation: Implementation = Implementation.KERNEL
    now: float = 0.0

    def by_index(self, index: int) -> Link | None:
        return next((link for link in self.links.values() if link.index == index), None)


# What the agent wants.


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another node on a device. `keepalive`: seconds, 0 for none once the first handshake is done. `pods`
    are addresses (packed) that it has besides `allowed_ips`. `preshared_key` None: it is to have none."""

    node: str
    public_key: str
    endpoint: Endpoint | None
    allowed_ips: frozenset[Network]
    keepalive: int
    pods: frozenset[bytes] = frozenset()
    preshared_key: SecretKey | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A WireGuard device to be."""

    name: str
    epoch: int
    key: HeldKey
    port: int
    mtu: int
    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Redirect:
    """Traffic to a node goes by this peer of this device; with `when_proven`, only once a handshake is
    done, and until then by `before`, if there is such a way."""

    device: str
    public_key: str
    when_proven: bool
    before: Redirect | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What the node should be. `settings` None: no datapath and no devices, everything of ours is
    removed. `hooked` are devices that should have a clsact, in every phase: as one is added, the kernel
    drops what the device is to send for the time of an RCU grace period. Turning encryption on must not cost
    that."""

    phase: Phase
    epoch: int = 0
    retiring: int = 0
    """The epoch before, still in use; 0: none."""
    settings: Settings | None = None
    devices: tuple[Device, ...] = ()
    addresses: Mapping[Network, AddressEntry] = field(default_factory=dict)
    pods: Mapping[int, frozenset[bytes]] | None = field(default_factory=dict)
    """Pod addresses (packed) that lie in no node's CIDR, by node number, 0: nobody knows whose. None: they
    aren't known yet, and what is there stays."""
    redirects: Mapping[int, Redirect] = field(default_factory=dict)
    quarantined: frozenset[int] = frozenset()
    """Numbers of nodes with which pods of this one exchange nothing, in whatever phase."""
    revocations: Mapping[int, int] = field(default_factory=dict)
    """By number of the nodes that nobody is to have as a peer: what their agents' peers are asked to
    confirm."""
    attachments: frozenset[Attachment] = frozenset()
    hooked: frozenset[str] = frozenset()
    ways_known: bool = False
    """There is a device that pod traffic leaves the node by, and none that the MeshConfig names is missing:
    with `attachments` in place nothing passes them by."""
    live_ids: frozenset[int] = frozenset()
    """Numbers of the other nodes whose Node is Ready."""
    problems: tuple[Problem, ...] = ()

    @property
    def strict(self) -> bool:
        return self.settings is not None and SettingsFlags.STRICT in self.settings.flags


def device_sysctls(name: str) -> tuple[tuple[str, str], ...]:
    """What a tunnel device needs: paths relative to /proc/sys and their values."""
    return (
        (f"net/ipv4/conf/{name}/forwarding", "1"),
        # Loose: what a tunnel delivers is routed back by the uplink until to_netdev redirects it.
        (f"net/ipv4/conf/{name}/rp_filter", "2"),
        # No link-local address, so no router solicitations, MLD or DAD through the tunnels.
        (f"net/ipv6/conf/{name}/addr_gen_mode", "1"),
        (f"net/ipv6/conf/{name}/accept_ra", "0"),
        (f"net/ipv6/conf/{name}/forwarding", "1"),
        (f"net/ipv6/conf/{name}/disable_ipv6", "0"),
    )


def host_network(address: Address) -> Network:
    """The /32 or /128 of an address. `ip_network(address)` does the same by way of strings, in six times the
    time."""
    return IPv4Network(int(address)) if isinstance(address, IPv4Address) else IPv6Network(int(address))


def single_network(address: bytes) -> Network:
    """The /32 or /128 of a packed address."""
    number = int.from_bytes(address)
    return IPv4Network(number) if len(address) == 4 else IPv6Network(number)


def single_address(network: Network) -> bytes | None:
    """The packed address of a /32 or /128; None for a wider block."""
    if network.prefixlen < network.max_prefixlen:
        return None
    return network.network_address.packed


def pod_entry(node: int) -> AddressEntry:
    """What `ipcache` has of a single pod address on node number `node`."""
    return AddressEntry(node, AddressFlags.POD if node else AddressFlags.CLUSTER)


def sorted_networks(networks: Iterable[Network]) -> list[Network]:
    """By family, address, length; IPv4 and IPv6 don't compare otherwise."""
    return sorted(
        networks, key=lambda network: (network.version, int(network.network_address), network.prefixlen)
    )
