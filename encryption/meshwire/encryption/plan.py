"""The difference between what a node should be and what it is, as an ordered list of actions. Pure.

An action names what to do, holds everything needed to do it, and prints without its secrets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from meshwire.api.fields import Network
from meshwire.encryption.bootguard import TABLE
from meshwire.encryption.model import (
    DEVICE_ADDRESS,
    DEVICES,
    HANDSHAKE_LIFETIME,
    NO_PRESHARED_KEY,
    AddressEntry,
    AddressFlags,
    Attachment,
    Desired,
    Device,
    DeviceState,
    Endpoint,
    Observed,
    Peer,
    PeerState,
    Redirect,
    SecretKey,
    Settings,
    SettingsFlags,
    device_sysctls,
    single_address,
    single_network,
    sorted_networks,
)

FIRST_KEEPALIVE: Final = 1
"""Seconds. Where keepalives are off, this one starts the first handshake, and is taken back when it is
done."""


QUARANTINED: Final = "quarantined"
"""In the place of a device's name."""


@dataclass(frozen=True, slots=True)
class LoadDatapath:
    """Loads the programs and pins the maps; attaches nothing."""

    def __str__(self) -> str:
        return "load programs and maps"


@dataclass(frozen=True, slots=True)
class UnloadDatapath:
    """Removes the pins; the kernel frees what no filter holds."""

    def __str__(self) -> str:
        return "unpin maps"


@dataclass(frozen=True, slots=True)
class WriteAddresses:
    entries: tuple[tuple[Network, AddressEntry], ...]

    def __str__(self) -> str:
        return f"write {_some(network for network, _ in self.entries)} to ipcache"


@dataclass(frozen=True, slots=True)
class DeleteAddresses:
    networks: tuple[Network, ...]

    def __str__(self) -> str:
        return f"delete {_some(self.networks)} from ipcache"


@dataclass(frozen=True, slots=True)
class WritePods:
    """Single pod addresses (packed) of node number `node`, 0: nobody knows whose."""

    node: int
    addresses: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"write pods of node {self.node} to ipcache: {_some(map(single_network, self.addresses))}"


@dataclass(frozen=True, slots=True)
class DeletePods:
    addresses: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"delete pods from ipcache: {_some(map(single_network, self.addresses))}"


@dataclass(frozen=True, slots=True)
class WriteNodes:
    """(node number, name of the device to reach it by or empty, or QUARANTINED). The device's index is
    looked up when it is applied: an earlier action may have made the device."""

    entries: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        by_device: dict[str, list[int]] = {}
        for number, device in self.entries:
            by_device.setdefault(device, []).append(number)
        return "; ".join(
            f"quarantine nodes {_some(numbers)}"
            if device == QUARANTINED
            else f"send to nodes {_some(numbers)} by {device}"
            if device
            else f"send to nodes {_some(numbers)} by no tunnel"
            for device, numbers in sorted(by_device.items())
        )


@dataclass(frozen=True, slots=True)
class WriteSettings:
    settings: Settings

    def __str__(self) -> str:
        flags = self.settings.flags
        text = ", ".join(flag.name or "" for flag in flags) or "none"
        return f"set flags {text}, node {self.settings.local_node}, tunnel MTU {self.settings.tunnel_mtu}"


@dataclass(frozen=True, slots=True)
class AddClsact:
    """Without a filter it changes no packet."""

    device: str

    def __str__(self) -> str:
        return f"add a clsact to {self.device}"


@dataclass(frozen=True, slots=True)
class Attach:
    """Makes the program the hook's first filter; one of ours that is there already is replaced in one
    step."""

    attachment: Attachment

    def __str__(self) -> str:
        return f"attach {self.attachment.program} to {self.attachment.device} {self.attachment.direction}"


@dataclass(frozen=True, slots=True)
class Detach:
    attachment: Attachment

    def __str__(self) -> str:
        return f"detach our program from {self.attachment.device} {self.attachment.direction}"


@dataclass(frozen=True, slots=True)
class RemoveBootGuard:
    """Takes away what the node's init loaded to hold pods back until now."""

    def __str__(self) -> str:
        return f"remove nftables' table {TABLE}"


@dataclass(frozen=True, slots=True)
class CreateDevice:
    name: str

    def __str__(self) -> str:
        return f"create {self.name}"


@dataclass(frozen=True, slots=True)
class DeleteDevice:
    name: str

    def __str__(self) -> str:
        return f"delete {self.name}"


@dataclass(frozen=True, slots=True)
class SetLink:
    """Up, with this MTU and DEVICE_ADDRESS."""

    name: str
    mtu: int
    add_address: bool

    def __str__(self) -> str:
        return f"set {self.name} up, MTU {self.mtu}" + (
            f", address {DEVICE_ADDRESS}" if self.add_address else ""
        )


@dataclass(frozen=True, slots=True)
class WriteSysctls:
    """Paths relative to /proc/sys."""

    values: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "set " + ", ".join(f"{path}={value}" for path, value in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerChange:
    """What differs of one peer, and its keepalive, which both WireGuard interfaces leave as it is unless
    told; so they do with a preshared key. Networks in `gain`, and pods' addresses in `pods` (packed), leave
    the peer that had them in the same step."""

    public_key: str
    node: str = ""
    remove: bool = False
    endpoint: Endpoint | None = None
    keepalive: int = 0
    gain: tuple[Network, ...] = ()
    pods: tuple[bytes, ...] = ()
    preshared_key: SecretKey | None = field(default=None, hash=False)

    def __str__(self) -> str:
        if self.remove:
            return f"-{self.public_key[:8]}…"
        parts = [f"{self.node or '?'} {self.public_key[:8]}… keepalive {self.keepalive}"]
        parts += ["set the preshared key"] if self.preshared_key else []
        parts += [f"at {self.endpoint}"] if self.endpoint else []
        parts += [f"+{network}" for network in self.gain]
        parts += [f"+{_some(map(single_network, self.pods))}"] if self.pods else []
        return " ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigureDevice:
    """None leaves the key or port as it is. `fresh`: the device's old peers belong to another key and go.
    `release` are networks, `release_pods` single addresses (packed), that no peer is to have any more, taken
    without touching the rest of their peers."""

    name: str
    private_key: SecretKey | None = None
    port: int | None = None
    fresh: bool = False
    peers: tuple[PeerChange, ...] = ()
    release: tuple[Network, ...] = ()
    release_pods: tuple[bytes, ...] = ()

    @property
    def only_pods(self) -> bool:
        """Nothing changes but which peer has which single address."""
        return not (self.private_key or self.port or self.fresh or self.release) and not any(
            peer.remove or peer.endpoint or peer.gain or peer.preshared_key for peer in self.peers
        )

    def __str__(self) -> str:
        parts = (["set the key"] if self.private_key else []) + ([f"port {self.port}"] if self.port else [])
        parts += ["drop old peers"] if self.fresh else []
        parts += [f"peers {_some(self.peers, limit=3)}"] if self.peers else []
        parts += [f"release {_some(self.release)}"] if self.release else []
        parts += [f"release {_some(map(single_network, self.release_pods))}"] if self.release_pods else []
        return f"configure {self.name}: {'; '.join(parts)}"


Action = (
    LoadDatapath
    | UnloadDatapath
    | WriteAddresses
    | DeleteAddresses
    | WritePods
    | DeletePods
    | WriteNodes
    | WriteSettings
    | AddClsact
    | Attach
    | Detach
    | RemoveBootGuard
    | CreateDevice
    | DeleteDevice
    | SetLink
    | WriteSysctls
    | ConfigureDevice
)

Plan = tuple[Action, ...]


def plan(desired: Desired, observed: Observed) -> Plan:
    """Actions that make `observed` what is `desired`, in an order in which nothing leaks and nothing is lost
    on the way; empty where nothing differs. Stopping after any action and planning again is safe."""
    return tuple(_turn_off(desired, observed) if desired.settings is None else _turn_on(desired, observed))


def _turn_on(desired: Desired, observed: Observed) -> Iterator[Action]:
    # The order, and why:
    #  1. Programs and maps are loaded; nothing is attached yet, so a refused program changes nothing.
    #  2. Addresses are added and changed: a guard that doesn't know an address can't hold it back.
    #  3. Settings become only milder here, or are written for the first time. Milder before capacity goes: a
    #     strict node without a tunnel drops. First time before anything is attached: no packet sees zeroes.
    #  4. Nodes whose device is in place already get it; nodes that have none any more lose it.
    #  5. Uplinks and overlays get their programs, before there is a device: a new node is guarded first.
    #     Where they drop already, the boot guard can go: it may hold back more than they do. Otherwise it
    #     goes after 8. It stays while a device is missing that pod traffic may leave by.
    #  6. Each device: made, told its key and port, given sysctls and from_wireguard, put up, and only then
    #     told its peers. On current kernels wireguard-go takes its device for up from the start and shakes
    #     hands with peers that it knows; they would move to a device that throws away what they send.
    #  7. Nodes whose device was not in place before get it: up and configured, it queues until the handshake
    #     is done. While keys change, the new epoch's device goes through 6 and 7 before the old one loses
    #     peers that have moved: WireGuard answers whatever has no peer with an ICMP error.
    #  8. Settings become stricter: every way that exists is in use by now.
    #  9. What is too much goes: addresses, programs on devices that carry no pod traffic, devices.
    # Single pod addresses come to peers of devices that are in place before anything is sent by them, and
    # leave them after. WireGuard would tell the sender that there is no such host, and its connection with
    # a pod that only moves would end. Peers that are new are told all of theirs at once.
    assert desired.settings is not None
    datapath = observed.datapath
    if datapath is None:
        yield LoadDatapath()
    told = frozenset(device.name for device in desired.devices if _takes_pods(device, desired, observed))
    gains = {device.name: _pod_gains(device, observed) for device in desired.devices if device.name in told}
    yield from (ConfigureDevice(name=name, peers=gained) for name, gained in gains.items() if gained)
    old_addresses = datapath.addresses if datapath else {}
    old_settings = datapath.settings if datapath else None
    old_nodes = datapath.nodes if datapath else {}

    pods_written, pods_gone = _pod_entries(desired, datapath.pods if datapath else {})
    yield from pods_written
    # Single nodes before whole clusters: a cluster CIDR covers them all and would drop what is on its way to
    # a node that is written a moment later.
    changed = [
        (network, entry)
        for network, entry in desired.addresses.items()
        if old_addresses.get(network) != entry
    ]
    changed.sort(key=lambda item: AddressFlags.CLUSTER in item[1].flags)
    if changed:
        yield WriteAddresses(tuple(changed))

    milder = _milder(old_settings, desired.settings)
    if milder != old_settings:
        yield WriteSettings(milder)

    now, later = _node_writes(desired, observed, old_nodes)
    if now:
        yield WriteNodes(now)

    wanted = desired.attachments - observed.attachments
    yield from (Attach(attachment) for attachment in sorted(wanted) if attachment.device not in DEVICES)
    lifts = observed.boot_guard and (desired.ways_known or not desired.strict)
    drops = SettingsFlags.STRICT in milder.flags
    if lifts and drops:
        yield RemoveBootGuard()
    for device in sorted(desired.devices, key=lambda device: device.epoch != desired.epoch):
        attach = sorted(attachment for attachment in wanted if attachment.device == device.name)
        yield from _device_actions(device, observed, attach, with_pods=device.name not in told)
        if entries := tuple(entry for entry in later if entry[1] == device.name):
            yield WriteNodes(entries)
    if milder != desired.settings:
        yield WriteSettings(desired.settings)
    if lifts and not drops:
        yield RemoveBootGuard()

    gone = set(old_addresses) - set(desired.addresses)
    if gone and (written := {address for action in pods_written for address in action.addresses}):
        gone = {network for network in gone if single_address(network) not in written}
    if gone:
        yield DeleteAddresses(tuple(sorted_networks(gone)))
    if pods_gone:
        yield DeletePods(pods_gone)
    if desired.pods is not None:
        for device in desired.devices:
            if released := _pod_losses(device, observed):
                yield ConfigureDevice(name=device.name, release_pods=released)
    yield from (Detach(attachment) for attachment in _superfluous(desired, observed))
    names = {device.name for device in desired.devices}
    yield from (DeleteDevice(name) for name in DEVICES if name in observed.links and name not in names)


def _turn_off(desired: Desired, observed: Observed) -> Iterator[Action]:
    # Guards go first, then what they send to: the other way round, redirects would have nowhere to go.
    yield from (Detach(attachment) for attachment in sorted(observed.attachments))
    yield from (DeleteDevice(name) for name in DEVICES if name in observed.links)
    if observed.pinned:
        yield UnloadDatapath()
    if observed.boot_guard:
        yield RemoveBootGuard()
    yield from (AddClsact(name) for name in sorted(desired.hooked - observed.hooked))


def _milder(old: Settings | None, new: Settings) -> Settings:
    """The settings to go through: no stricter than the old ones, no narrower than the new."""
    if old is None or not old.local_node:
        return new
    hard = SettingsFlags.STRICT | SettingsFlags.ENFORCING
    flags = (new.flags & ~hard) | (old.flags & new.flags & hard) | (old.flags & SettingsFlags.PASS_OVERSIZED)
    mtu = min((mtu for mtu in (old.tunnel_mtu, new.tunnel_mtu) if mtu), default=0)
    return replace(new, flags=flags, tunnel_mtu=mtu)


def _node_writes(
    desired: Desired, observed: Observed, old: Mapping[int, int]
) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
    """Entries to write before and after the devices are worked on."""
    now: list[tuple[int, str]] = []
    later: list[tuple[int, str]] = []
    ours = {observed.links[name].index for name in DEVICES if name in observed.links}
    in_place = {device.name: _in_place(device, observed) for device in desired.devices}
    for number, wanted in sorted(desired.redirects.items()):
        current = old.get(number, 0)
        redirect = _way(wanted, current, observed, in_place)
        link = observed.links.get(redirect.device)
        if current and link and current == link.index:
            continue
        if redirect.device in observed.unguarded:
            # Behind a service's address there may be what the sender's policy forbids: it has to come first.
            continue
        state = observed.wireguard.get(redirect.device)
        peer = state.peers.get(redirect.public_key) if state else None
        # An entry that leads to none of our devices led to one that somebody deleted: that node has moved
        # for good.
        if redirect.when_proven and (not current or current in ours) and not (peer and peer.handshake):
            continue
        (now if in_place[redirect.device] and peer else later).append((number, redirect.device))
    quarantined = observed.datapath.quarantined if observed.datapath else frozenset()
    released = quarantined - desired.quarantined - {number for number, _ in (*now, *later)}
    ended = old.keys() - desired.redirects.keys() - desired.quarantined
    now += [(number, "") for number in sorted(ended | released)]
    now += [(number, QUARANTINED) for number in sorted(desired.quarantined - quarantined)]
    return tuple(now), tuple(later)


def _way(redirect: Redirect, current: int, observed: Observed, in_place: Mapping[str, bool]) -> Redirect:
    """Of two tunnels to a node, the one to send by. Who has moved doesn't go back."""
    if redirect.before is None or not redirect.when_proven:
        return redirect
    link, state = observed.links.get(redirect.device), observed.wireguard.get(redirect.device)
    if in_place[redirect.device] and link and state:
        peer = state.peers.get(redirect.public_key)
        proven = peer is not None and peer.handshake > 0
        if current == link.index or (proven and redirect.device not in observed.unguarded):
            return redirect
    return redirect.before


def _pod_entries(
    desired: Desired, old: Mapping[int, frozenset[bytes]]
) -> tuple[list[WritePods], tuple[bytes, ...]]:
    """What to write, and what to delete."""
    if desired.pods is None:
        return [], ()
    writes: list[WritePods] = []
    gone: set[bytes] = set()
    for number in desired.pods.keys() | old.keys():
        wanted, present = desired.pods.get(number, frozenset()), old.get(number, frozenset())
        if wanted is present:
            continue
        if new := wanted - present:
            writes.append(WritePods(number, tuple(sorted(new))))
        gone |= present - wanted
    if gone:
        # What another node has now is overwritten, and so is what is a node's own address.
        for write in writes:
            gone.difference_update(write.addresses)
        gone -= {single_address(network) for network in desired.addresses}
    return sorted(writes, key=lambda write: write.node), tuple(sorted(gone))


def _takes_pods(device: Device, desired: Desired, observed: Observed) -> bool:
    """The device is as it should be, so that its peers can be told of pods before anything else."""
    guards = {attachment for attachment in desired.attachments if attachment.device == device.name}
    return _in_place(device, observed) and guards <= observed.attachments


def _pod_gains(device: Device, observed: Observed) -> tuple[PeerChange, ...]:
    present = observed.wireguard[device.name].peers
    return tuple(
        PeerChange(
            public_key=peer.public_key,
            node=peer.node,
            keepalive=_keepalive(peer, present[peer.public_key]),
            pods=pods,
        )
        for peer in device.peers
        if peer.public_key in present and (pods := _missing_pods(peer, present[peer.public_key]))
    )


def _missing_pods(peer: Peer, state: PeerState) -> tuple[bytes, ...]:
    missing = peer.pods - state.singles
    if missing and state.allowed_ips:
        missing -= {single_address(network) for network in state.allowed_ips}
    return tuple(sorted(missing))


def _pod_losses(device: Device, observed: Observed) -> tuple[bytes, ...]:
    """Single addresses that peers have, and no peer is to have any more."""
    state = observed.wireguard.get(device.name)
    if state is None or state.public_key != device.key.public_key:
        return ()
    lost: set[bytes] = set()
    for peer in device.peers:
        if (present := state.peers.get(peer.public_key)) and (extra := present.singles - peer.pods):
            lost |= extra - {single_address(network) for network in peer.allowed_ips}
    if lost:
        for peer in device.peers:
            lost -= peer.pods
            lost -= {single_address(network) for network in peer.allowed_ips}
    return tuple(sorted(lost))


def has_all(peer: Peer, state: PeerState) -> bool:
    """The peer has all AllowedIPs that it should have."""
    return not _missing_networks(peer, state) and not _missing_pods(peer, state)


def _missing_networks(peer: Peer, state: PeerState) -> list[Network]:
    missing = peer.allowed_ips - state.allowed_ips
    return sorted_networks(network for network in missing if single_address(network) not in state.singles)


def _keepalive(peer: Peer, state: PeerState | None) -> int:
    return peer.keepalive or (0 if state and state.handshake else FIRST_KEEPALIVE)


def _in_place(device: Device, observed: Observed) -> bool:
    link, state = observed.links.get(device.name), observed.wireguard.get(device.name)
    return bool(link and link.up and state and state.public_key == device.key.public_key)


def _device_actions(
    device: Device, observed: Observed, attachments: list[Attachment], *, with_pods: bool
) -> Iterator[Action]:
    link = observed.links.get(device.name)
    if link is None:
        yield CreateDevice(device.name)
    state = observed.wireguard.get(device.name, DeviceState(name=device.name))
    new_key = state.public_key != device.key.public_key
    if new_key or state.port != device.port:
        yield ConfigureDevice(
            name=device.name,
            private_key=device.key.private_key if new_key else None,
            port=device.port if state.port != device.port else None,
            fresh=new_key and bool(state.peers),
        )
    wanted = device_sysctls(device.name)
    # A device that isn't there yet has no sysctls to read: write them all.
    known = observed.sysctls if link else dict.fromkeys((path for path, _ in wanted), "")
    sysctls = tuple((path, value) for path, value in wanted if known.get(path, value) != value)
    if sysctls:
        yield WriteSysctls(sysctls)
    yield from (Attach(attachment) for attachment in attachments)
    has_address = link is not None and DEVICE_ADDRESS in link.addresses
    if link is None or not link.up or link.mtu != device.mtu or not has_address:
        yield SetLink(device.name, device.mtu, add_address=not has_address)
    # Whatever a device with another key has as peers are that key's.
    if change := _changed_peers(device, {} if new_key else state.peers, observed, with_pods):
        yield change


def _changed_peers(
    device: Device, present: Mapping[str, PeerState], observed: Observed, with_pods: bool
) -> ConfigureDevice | None:
    """`with_pods`: peers that are there already haven't been told of their pods yet."""
    wanted = {peer.public_key for peer in device.peers}
    removed = tuple(
        PeerChange(public_key=public_key, remove=True)
        for public_key in sorted(present)
        if public_key not in wanted
    )
    changes = tuple(
        change
        for peer in device.peers
        if (change := _peer_change(device, peer, present, observed, with_pods))
    )
    lost = {
        network
        for peer in device.peers
        if peer.public_key in present
        for network in present[peer.public_key].allowed_ips - peer.allowed_ips
        if single_address(network) not in peer.pods
    }
    gained = {network for change in changes for network in change.gain}
    result = ConfigureDevice(
        name=device.name,
        # Added peers take over what they share with removed ones, so those go last.
        peers=(*changes, *removed),
        release=tuple(sorted_networks(lost - gained)),
    )
    return result if result.peers or result.release else None


def _peer_change(
    device: Device, peer: Peer, present: Mapping[str, PeerState], observed: Observed, with_pods: bool
) -> PeerChange | None:
    state = present.get(peer.public_key)
    keepalive = _keepalive(peer, state)
    if state is None:
        return PeerChange(
            public_key=peer.public_key,
            node=peer.node,
            endpoint=peer.endpoint,
            keepalive=keepalive,
            gain=tuple(sorted_networks(peer.allowed_ips)),
            pods=tuple(sorted(peer.pods)),
            preshared_key=peer.preshared_key,
        )
    change = PeerChange(
        public_key=peer.public_key,
        node=peer.node,
        endpoint=_new_endpoint(device, peer, state, observed),
        keepalive=keepalive,
        gain=tuple(_missing_networks(peer, state)),
        pods=_missing_pods(peer, state) if with_pods else (),
        preshared_key=None
        if state.preshared_key == peer.preshared_key
        else peer.preshared_key or NO_PRESHARED_KEY,
    )
    differs = change.endpoint or change.gain or change.pods or change.preshared_key
    same = not differs and state.keepalive == keepalive
    return None if same else change


def renew_peer(device: Device, peer: Peer) -> ConfigureDevice:
    """Takes the peer away and adds it again in one step, with fresh state on this side. Others keep
    theirs."""
    added = _peer_change(device, peer, {}, Observed(links={}), True)
    assert added
    gone = PeerChange(public_key=peer.public_key, remove=True)
    return ConfigureDevice(name=device.name, peers=(gone, added))


def reset_endpoint(device: Device, peer: Peer) -> ConfigureDevice:
    """Puts the peer where the API says it is, whatever WireGuard has learned since."""
    change = PeerChange(
        public_key=peer.public_key,
        node=peer.node,
        endpoint=peer.endpoint,
        keepalive=peer.keepalive or FIRST_KEEPALIVE,
    )
    return ConfigureDevice(name=device.name, peers=(change,))


def _new_endpoint(device: Device, peer: Peer, state: PeerState, observed: Observed) -> Endpoint | None:
    """None leaves the endpoint alone: a peer that answers from elsewhere has roamed, and WireGuard knows
    better. It is set again where the API's changed since we last set it, or where the peer can't be reached
    at the one it has; and to where it is already, where that makes WireGuard choose its own address anew."""
    if device.name in observed.lost_source:
        return state.endpoint or peer.endpoint
    if peer.endpoint is None or peer.endpoint == state.endpoint:
        return None
    last_set = observed.endpoints.get((device.name, peer.public_key))
    if last_set is not None and last_set != peer.endpoint:
        return peer.endpoint
    return peer.endpoint if observed.now - state.handshake > HANDSHAKE_LIFETIME else None


def after_pods(
    pods: Mapping[int, frozenset[bytes]], node: int | None, addresses: Iterable[bytes]
) -> dict[int, frozenset[bytes]]:
    """Datapath.pods once these are node number `node`'s; None: nobody's."""
    moved = frozenset(addresses)
    left = {
        number: present if present.isdisjoint(moved) else present - moved for number, present in pods.items()
    }
    if node is not None:
        left[node] = left.get(node, frozenset()) | moved
    return {number: present for number, present in left.items() if present}


def after_change(state: DeviceState, change: ConfigureDevice) -> DeviceState:
    """The device once a change of nothing but pods is done."""
    peers = dict(state.peers)

    def take(addresses: frozenset[bytes]) -> None:
        for key, peer in peers.items():
            if not peer.singles.isdisjoint(addresses):
                peers[key] = replace(peer, singles=peer.singles - addresses)

    take(frozenset(change.release_pods))
    for each in change.peers:
        gained = frozenset(each.pods)
        take(gained)
        peer = peers.get(each.public_key, PeerState(public_key=each.public_key))
        peers[each.public_key] = replace(peer, keepalive=each.keepalive, singles=peer.singles | gained)
    return replace(state, peers=peers)


def _superfluous(desired: Desired, observed: Observed) -> list[Attachment]:
    """Our filters where nothing of ours belongs. While the drop is in force, a device keeps its guard even
    if no route leads there at the moment: the route may come back before we could."""
    hooks = {(attachment.device, attachment.direction) for attachment in desired.attachments}
    deleted = set(DEVICES) - {device.name for device in desired.devices}
    return sorted(
        attachment
        for attachment in observed.attachments
        if (attachment.device, attachment.direction) not in hooks
        and attachment.device not in deleted
        and not desired.strict
    )


def _some(items: Iterable[object], limit: int = 8) -> str:
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
