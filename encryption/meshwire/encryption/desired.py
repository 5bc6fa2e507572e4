"""What this node should be, from the API's objects and what is found on the node. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final, TypeVar

from meshwire.api import names
from meshwire.api.fields import Address, InvalidSpec, Network
from meshwire.api.meshconfig import MeshConfig, Mode, missing_families
from meshwire.api.meshnode import Implementation, Key, Phase, Spec, Status
from meshwire.encryption.discovery import find_paths
from meshwire.encryption.model import (
    AddressEntry,
    AddressFlags,
    Attachment,
    ClusterNode,
    Desired,
    Device,
    Direction,
    Endpoint,
    HeldKey,
    Link,
    Member,
    Peer,
    Problem,
    Redirect,
    Route,
    Settings,
    SettingsFlags,
    host_network,
    pod_entry,
    single_address,
    single_network,
    sorted_networks,
)
from meshwire.encryption.pods import Pods

T = TypeVar("T")

TUNNEL_OVERHEAD: Final = 80
"""Bytes WireGuard adds to a packet over IPv6; 60 over IPv4, but one figure fits both families."""
MIN_MTU: Final = 1280
"""IPv6's smallest: a tunnel narrower than that would lose the family."""

WIREGUARD_UNAVAILABLE: Final = "WireGuardUnavailable"
QUARANTINED: Final = "Quarantined"

SAMPLE: Final = 4
"""Pods of a node without CIDR whose routes tell by which device its pods are reached."""

_FLAGS: Final = {
    Phase.ENABLING: SettingsFlags.PASS_OVERSIZED,
    Phase.ENFORCING: SettingsFlags.ENFORCING,
    Phase.DISABLING: SettingsFlags.PASS_OVERSIZED,
    Phase.DRAINING: SettingsFlags.PASS_OVERSIZED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that `desired` depends on. `members` and `nodes` are by name; `held` is this node's keys by
    epoch. `pods` None: there are nodes without pod CIDR, and their pods aren't known yet."""

    node: str
    members: Mapping[str, Member]
    nodes: Mapping[str, ClusterNode]
    config: MeshConfig
    held: Mapping[int, HeldKey] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    pods: Pods | None = field(default_factory=dict)
    implementation: Implementation = Implementation.KERNEL
    config_refused: bool = False
    """The newest MeshConfig can't be carried out here: a node that doesn't encrypt yet doesn't begin to."""
    in_place: bool = False
    """There is a datapath of ours on the node."""
    told: Status = field(default_factory=Status)
    """What the API server has of this node's status: what it says of a rotation is kept to."""


def missing_devices(config: MeshConfig, links: Mapping[str, Link]) -> tuple[str, ...]:
    """Devices that a MeshConfig names and this node doesn't have."""
    return tuple(name for name in (*config.network.uplinks, *config.network.overlays) if name not in links)


def desired(inputs: Inputs) -> Desired | None:
    """What the node should be; None where nobody has said yet: then nothing is touched."""
    if (own := _own_order(inputs)) is None:
        return None
    phase, epoch = own.spec.phase, own.spec.epoch
    begins = phase is Phase.ENABLING and not inputs.in_place
    accepted, problems = _accept(inputs, own)
    others = {name: shares for name, shares in accepted.items() if name != own.name}
    revocations = {
        shares.number: shares.member.spec.revocation
        for shares in others.values()
        if shares.member.spec.revocation
    }
    if own.spec.is_out:
        problems.append(
            Problem(
                QUARANTINED,
                "this node is quarantined: it has no keys, and its pods exchange nothing with other nodes"
                if own.spec.quarantined
                else "it was quarantined, and gets new keys when all others have let go of its old ones",
            )
        )
    addresses = _addresses(inputs, own, accepted)
    pods = _single_pods(inputs, accepted)
    paths = find_paths(
        inputs.links,
        inputs.routes,
        own_addresses=own.spec.addresses,
        remote=[
            *(network for name, each in accepted.items() if name != own.name for network in each.networks),
            *_sample(pods or {}, own.name),
        ],
    )
    uplinks = inputs.config.network.uplinks or paths.uplinks
    overlays = inputs.config.network.overlays or paths.overlays
    hooked = frozenset(name for name in (*uplinks, *overlays) if name in inputs.links)
    if phase is Phase.OFF or (begins and inputs.config_refused):
        return Desired(phase=Phase.OFF, revocations=revocations, hooked=hooked)
    if begins and inputs.pods is None:
        # A peer that sends by tunnel is listened to where its pods are known, and nowhere else.
        problem = Problem("WaitingForEndpoints", "the pods of nodes without pod CIDR are not known yet")
        return Desired(
            phase=Phase.OFF, epoch=epoch, revocations=revocations, hooked=hooked, problems=(problem,)
        )

    strict = phase is Phase.ENFORCING and inputs.config.encryption.mode is Mode.STRICT
    devices: tuple[Device, ...] = ()
    mtu = tunnel_mtu(inputs.config, [inputs.links[name] for name in uplinks if name in inputs.links])
    problems += _uncovered(inputs, own, accepted, blocking=strict)
    if not uplinks:
        problems.append(Problem("UplinkNotFound", "no device holds the node's address or a default route"))

    if inputs.implementation is Implementation.NONE:
        problems.append(
            Problem(
                WIREGUARD_UNAVAILABLE,
                "the kernel has no WireGuard and no userspace implementation may be used or is there",
            )
        )
        if not strict:
            # Nothing can be encrypted and nothing must be dropped: leave the node as it is.
            return Desired(
                phase=Phase.OFF,
                epoch=epoch,
                revocations=revocations,
                hooked=hooked,
                problems=tuple(problems),
            )
    else:
        devices = tuple(
            _device(inputs, own, accepted, pods or {}, key, mtu)
            for key in sorted(inputs.held.values(), key=lambda key: key.epoch)
            # With another epoch secret, or without the one that there should be, it would be another key.
            if accepted[own.name].keys.get(key.epoch) == published_key(key)
            and key.epoch in (epoch, own.spec.retiring)
        )
        problems += _unpaired(devices, accepted, own.name)
        if epoch and not own.spec.is_out and not any(device.epoch == epoch for device in devices):
            problems.append(_missing_key(own, accepted, epoch, blocking=not devices))

    return Desired(
        phase=phase,
        epoch=epoch,
        retiring=own.spec.retiring,
        settings=Settings(
            _FLAGS[phase] | (SettingsFlags.STRICT if strict else SettingsFlags.NONE),
            accepted[own.name].number,
            mtu,
        ),
        devices=devices,
        addresses={network: addresses[network] for network in sorted_networks(addresses)},
        pods=None if pods is None else _by_number(pods, accepted, addresses),
        redirects=_redirects(devices, accepted, own, inputs.told),
        quarantined=frozenset(
            shares.number
            for shares in others.values()
            if own.spec.quarantined or shares.member.spec.quarantined
        ),
        revocations=revocations,
        attachments=frozenset(_attachments(inputs.links, (*uplinks, *overlays), devices)),
        hooked=hooked,
        ways_known=bool(uplinks) and hooked.issuperset((*uplinks, *overlays)),
        live_ids=frozenset(
            shares.number
            for name, shares in others.items()
            if name in inputs.nodes and inputs.nodes[name].ready and not shares.member.spec.is_out
        ),
        problems=tuple(problems),
    )


def tunnel_mtu(config: MeshConfig, uplinks: Iterable[Link]) -> int:
    """Of the WireGuard devices, in bytes: what the config says, or what fits the narrowest uplink."""
    if config.network.mtu:
        return config.network.mtu
    return max(min((link.mtu for link in uplinks), default=1500) - TUNNEL_OVERHEAD, MIN_MTU)


def _own_order(inputs: Inputs) -> Member | None:
    """This node's MeshNode. A node that was a member goes on as it is while its MeshNode is away. Before the
    operator has made it, a cluster that enforces is joined enforcing: with a number of the node's own choice
    (numbers are read on the node alone), no keys, so everything is guarded."""
    own = inputs.members.get(inputs.node)
    node = inputs.nodes.get(inputs.node)
    if own is not None and own.spec.id:
        if node is None:
            return own
        spec = own.spec
        addresses = _union(spec.addresses, node.addresses)
        return replace(
            own, spec=replace(spec, addresses=addresses, pod_cidrs=_union(spec.pod_cidrs, node.pod_cidrs))
        )
    enforcing = [member for member in inputs.members.values() if member.spec.phase is Phase.ENFORCING]
    if node is None or not enforcing or (inputs.held and inputs.in_place):
        return None
    taken = {member.spec.id for member in inputs.members.values()}
    leader = max(enforcing, key=lambda member: (member.spec.epoch, member.name))
    return Member(
        name=inputs.node,
        spec=Spec(
            id=_free_number(taken),
            addresses=node.addresses,
            pod_cidrs=node.pod_cidrs,
            cluster_cidrs=leader.spec.cluster_cidrs,
            phase=Phase.ENFORCING,
            epoch=leader.spec.epoch,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """What of a member's spec is its own: nothing that an older member has already. `hosts` are its
    addresses."""

    member: Member
    number: int
    pods: tuple[Network, ...]
    hosts: tuple[Network, ...]
    keys: Mapping[int, Key]

    @property
    def networks(self) -> tuple[Network, ...]:
        return self.pods + self.hosts


def _accept(inputs: Inputs, own: Member) -> tuple[dict[str, _Shares], list[Problem]]:
    """Every member's share, by name. Keys and addresses belong to the oldest member that claims them: a node
    that publishes another's key, or its addresses, must not get its traffic. A member that is out keeps its
    addresses, so that they stay guarded, and what it publishes as a key is nobody else's."""
    members = {name: member for name, member in inputs.members.items() if member.spec.id}
    members[own.name] = own
    by_age = sorted(members.values(), key=lambda member: (member.created or "~", member.name))
    hosts = {member.name: tuple(map(host_network, member.spec.addresses)) for member in by_age}
    contested = _overlapping((member.name, member.spec.pod_cidrs + hosts[member.name]) for member in by_age)
    problems: list[Problem] = []
    key_owner: dict[str, str] = {}
    number_owner: dict[int, str] = {}
    claimed: list[tuple[Network, str]] = []
    accepted: dict[str, _Shares] = {}

    def free(network: Network, name: str) -> bool:
        if network not in contested:
            return True
        for other, owner in claimed:
            if owner != name and other.version == network.version and other.overlaps(network):
                problems.append(
                    Problem(
                        "DuplicateAddress",
                        f"{network} of {name} overlaps {other} of {owner}, which is older and keeps it",
                        blocking=False,
                    )
                )
                return False
        claimed.append((network, name))
        return True

    taken = {member.spec.id for member in by_age}
    for member in by_age:
        name, number = member.name, member.spec.id
        if (owner := number_owner.setdefault(number, name)) != name:
            problems.append(Problem("DuplicateID", f"{owner} and {name} both have number {number}", False))
            # Numbers are read on this node alone, so any other will do.
            number = _free_number(taken)
            taken.add(number)
        keys = {}
        for key in member.spec.keys:
            if (owner := key_owner.setdefault(key.public_key, name)) == name:
                keys[key.epoch] = key
                continue
            problems.append(
                Problem(
                    "DuplicateKey",
                    f"{name} publishes the public key of {owner}, which is older and keeps it",
                    blocking=own.name == name,
                )
            )
        accepted[name] = _Shares(
            member,
            number,
            tuple(network for network in member.spec.pod_cidrs if free(network, name)),
            tuple(network for network in hosts[name] if free(network, name)),
            {} if member.spec.is_out else keys,
        )
    return accepted, problems


def _free_number(taken: Container[int]) -> int:
    return next(number for number in range(names.MAX_NODE_ID, 0, -1) if number not in taken)


def _overlapping(claims: Iterable[tuple[str, tuple[Network, ...]]]) -> frozenset[Network]:
    """Networks that overlap one of another member: none, as a rule, so this is one sorted sweep."""
    spans = []
    for name, networks in claims:
        for network in networks:
            first = int(network.network_address)
            last = first + (1 << (network.max_prefixlen - network.prefixlen)) - 1
            spans.append((network.version, first, -last, name, network))
    spans.sort(key=lambda span: span[:4])
    found: set[Network] = set()
    # CIDR blocks nest or are disjoint, so the blocks around the current one form a stack.
    around: list[tuple[int, int, str, Network]] = []
    for version, first, negative_last, name, network in spans:
        while around and (around[-1][0] != version or around[-1][1] < first):
            around.pop()
        for _, _, other_name, other in around:
            if other_name != name:
                found |= {network, other}
        around.append((version, -negative_last, name, network))
    return frozenset(found)


def _missing_key(own: Member, accepted: Mapping[str, _Shares], epoch: int, *, blocking: bool) -> Problem:
    """Blocking where nothing else carries the traffic."""
    published = own.spec.public_key(epoch)
    if published and epoch not in accepted[own.name].keys:
        return Problem("DuplicateKey", f"this node's key of epoch {epoch} belongs to an older node")
    if published:
        text = f"the key of epoch {epoch} is published but not opened here yet"
    else:
        text = f"the operator has not published this node's key of epoch {epoch} yet"
    return Problem("WaitingForKey", text, blocking)


def published_key(held: HeldKey) -> Key:
    """As this node's MeshNode has it."""
    return Key(epoch=held.epoch, public_key=held.public_key, secret_digest=held.secret_digest)


def _unpaired(devices: Iterable[Device], accepted: Mapping[str, _Shares], own: str) -> Iterator[Problem]:
    for device in devices:
        peers = {peer.node for peer in device.peers}
        names = sorted(
            name
            for name, shares in accepted.items()
            if name != own and device.epoch in shares.keys and name not in peers
        )
        if names:
            some = ", ".join(names[:SAMPLE]) + (f" and {len(names) - SAMPLE} more" if names[SAMPLE:] else "")
            message = f"epoch {device.epoch} has another epoch secret, or none, on {some}: no tunnel there"
            yield Problem("EpochSecretDiffers", message, blocking=False)


def _device(
    inputs: Inputs, own: Member, accepted: Mapping[str, _Shares], pods: Pods, key: HeldKey, mtu: int
) -> Device:
    encryption = inputs.config.encryption
    port = names.listen_port(encryption.port, key.epoch)
    digest = key.secret_digest
    return Device(
        name=names.device_name(key.epoch),
        epoch=key.epoch,
        key=key,
        port=port,
        mtu=mtu,
        peers=tuple(
            Peer(
                node=name,
                public_key=shares.keys[key.epoch].public_key,
                endpoint=_endpoint(own.spec.addresses, shares.hosts, port),
                allowed_ips=frozenset(shares.networks),
                keepalive=encryption.keepalive,
                pods=pods.get(name, frozenset()),
                preshared_key=key.pair_key(shares.keys[key.epoch].public_key),
            )
            for name, shares in sorted(accepted.items())
            # Both ends have the same, or there is no tunnel: least of all one without.
            if name != own.name
            and key.epoch in shares.keys
            and shares.keys[key.epoch].secret_digest == digest
        ),
    )


def _endpoint(own: Iterable[Address], other: Iterable[Network], port: int) -> Endpoint | None:
    """The other node's first address of a family that this node has too; IPv4 first: less overhead."""
    families = {address.version for address in own}
    usable = [host.network_address for host in other if host.version in families]
    return Endpoint(min(usable, key=lambda address: address.version), port) if usable else None


def _addresses(inputs: Inputs, own: Member, accepted: Mapping[str, _Shares]) -> dict[Network, AddressEntry]:
    entries: dict[Network, AddressEntry] = {}
    unknown = AddressEntry(0, AddressFlags.CLUSTER)
    for cluster_cidr in (*inputs.config.network.cluster_cidrs, *own.spec.cluster_cidrs):
        entries[cluster_cidr] = unknown
    # Pod CIDRs that no MeshNode has yet are nobody's: never in clear.
    for node in inputs.nodes.values():
        entries |= dict.fromkeys(node.pod_cidrs, unknown)
    for shares in accepted.values():
        entries |= dict.fromkeys(shares.pods, AddressEntry(shares.number, AddressFlags.POD))
        entries |= dict.fromkeys(shares.hosts, AddressEntry(shares.number, AddressFlags.HOST))
    return entries


def _single_pods(inputs: Inputs, accepted: Mapping[str, _Shares]) -> Pods | None:
    """By node: addresses of pods on nodes without CIDR. A node's own address is no pod's, and a CIDR's are
    those of the node that has it."""
    if inputs.pods is None:
        return None
    with_cidr = _with_cidr(inputs, accepted)
    hosts = {host.network_address.packed for shares in accepted.values() for host in shares.hosts}
    hosts |= {address.packed for node in inputs.nodes.values() for address in node.addresses}
    blocks = _Blocks(
        network
        for networks in (
            *(node.pod_cidrs for node in inputs.nodes.values()),
            *(shares.pods for shares in accepted.values()),
        )
        for network in networks
    )
    found = {}
    for name, addresses in inputs.pods.items():
        if name in with_cidr:
            continue
        # Mostly nothing is taken away, and the set stays the same object.
        if not addresses.isdisjoint(hosts):
            addresses -= hosts
        if inside := blocks.inside(addresses):
            addresses -= inside
        if addresses:
            found[name] = addresses
    return found


def _with_cidr(inputs: Inputs, accepted: Mapping[str, _Shares]) -> set[str]:
    found = {name for name, node in inputs.nodes.items() if node.pod_cidrs}
    return found | {name for name, shares in accepted.items() if shares.member.spec.pod_cidrs}


class _Blocks:
    """Networks, to find which of many addresses lie in one."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._tables: dict[tuple[int, int], set[int]] = {}
        for network in networks:
            shift = network.max_prefixlen - network.prefixlen
            table = self._tables.setdefault((network.max_prefixlen // 8, shift), set())
            table.add(int(network.network_address) >> shift)

    def inside(self, addresses: Iterable[bytes]) -> set[bytes]:
        return {
            address
            for (length, shift), table in self._tables.items()
            for address in addresses
            if len(address) == length and int.from_bytes(address) >> shift in table
        }


def _by_number(
    pods: Pods, accepted: Mapping[str, _Shares], addresses: dict[Network, AddressEntry]
) -> dict[int, frozenset[bytes]]:
    """The same by node number. Takes out of `addresses` what looks like a pod's there: a CIDR of a single
    address."""
    found: dict[int, frozenset[bytes]] = {}
    for name, each in pods.items():
        number = accepted[name].number if name in accepted else 0
        found[number] = found[number] | each if number in found else each
    for network in [network for network in addresses if network.prefixlen == network.max_prefixlen]:
        entry, address = addresses[network], single_address(network)
        if address is not None and entry == pod_entry(entry.node):
            del addresses[network]
            found = {number: each - {address} for number, each in found.items() if each != {address}}
            found[entry.node] = found.get(entry.node, frozenset()) | {address}
    return found


def _sample(pods: Pods, own: str) -> Iterator[Network]:
    for name, addresses in pods.items():
        if name != own:
            yield from map(single_network, islice(addresses, SAMPLE))


def _uncovered(
    inputs: Inputs, own: Member, accepted: Mapping[str, _Shares], *, blocking: bool
) -> list[Problem]:
    """Strictness needs cluster CIDRs where a pod that nobody knows yet is in no node's CIDR either."""
    pods, with_cidr = inputs.pods or {}, _with_cidr(inputs, accepted)
    lacking = [
        name for name, node in inputs.nodes.items() if name not in with_cidr and (node.ready or name in pods)
    ]
    lengths: set[int] = set()
    for name in lacking:
        if len(lengths) < 2:
            lengths.update(map(len, pods.get(name, ())))
    families = frozenset(4 if length == 4 else 6 for length in lengths)
    known = (*inputs.config.network.cluster_cidrs, *own.spec.cluster_cidrs)
    if not lacking or not (missing := missing_families(known, families)):
        return []
    which = " or ".join(f"IPv{version}" for version in sorted(missing))
    message = (
        f"nodes have no pod CIDR and no cluster CIDR of {which} is known: packets to a pod that is not known"
        " yet leave in clear; set spec.network.clusterCIDRs in the MeshConfig"
    )
    return [Problem(names.CLUSTER_CIDR_MISSING, message, blocking=blocking)]


def _redirects(
    devices: tuple[Device, ...], accepted: Mapping[str, _Shares], own: Member, told: Status
) -> dict[int, Redirect]:
    """By node number. In a rotation each peer is sent to by the new epoch once that is proven, by the one
    before until then. What was told of a node is kept to, whatever happens to devices and sessions: once all
    have told of all, the old epoch may end at any moment."""
    phase, epoch = own.spec.phase, own.spec.epoch
    if phase is Phase.DRAINING:
        return {}
    found: dict[int, Redirect] = {}
    for device in sorted(devices, key=lambda device: device.epoch):
        for peer in device.peers:
            number = accepted[peer.node].number
            before = found.get(number)
            proof = phase is not Phase.ENFORCING
            if before and device.epoch == epoch:
                proof = told.active_epoch != epoch or number in told.unreached
            found[number] = Redirect(device.name, peer.public_key, proof, before)
    return found


def _attachments(
    links: Mapping[str, Link], paths: Iterable[str], devices: tuple[Device, ...]
) -> Iterable[Attachment]:
    for name in paths:
        if link := links.get(name):
            layer = "" if link.ethernet else "_l3"
            yield Attachment(name, Direction.EGRESS, f"mw_to_netdev{layer}")
            yield Attachment(name, Direction.INGRESS, f"mw_from_netdev{layer}")
    for device in devices:
        yield Attachment(device.name, Direction.INGRESS, "mw_from_wireguard")


def _union(first: tuple[T, ...], second: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def judge_config(
    candidate: MeshConfig | InvalidSpec | None, last_good: MeshConfig | None, links: Mapping[str, Link]
) -> tuple[MeshConfig, Problem | None]:
    """The MeshConfig in force: the newest one that this node can carry out. One that nobody has written, or
    that was deleted, changes nothing: whether to encrypt is the operator's order."""
    in_force = last_good or MeshConfig()
    match candidate:
        case None:
            return in_force, None
        case InvalidSpec():
            return in_force, Problem(
                "ConfigRejected", f"MeshConfig: {candidate}; the last good one stays in force"
            )
    if missing := missing_devices(candidate, links):
        named = ", ".join(missing)
        return in_force, Problem(
            "DeviceNotFound",
            f"MeshConfig names {named}, which this node does not have; the last good one stays in force",
        )
    return candidate, None
