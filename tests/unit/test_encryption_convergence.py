"""plan() against a kernel that can be stopped, broken and asked where a packet would go."""

from __future__ import annotations

import dataclasses
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwire.api.fields import Address, Network
from meshwire.api.meshconfig import Encryption, MeshConfig, Mode, NetworkSettings
from meshwire.api.meshnode import Key, Phase, Spec
from meshwire.encryption import plan as plans
from meshwire.encryption.bootguard import Scope, scope_of
from meshwire.encryption.desired import Inputs, desired
from meshwire.encryption.model import (
    DEVICES,
    NO_PRESHARED_KEY,
    AddressEntry,
    AddressFlags,
    Attachment,
    ClusterNode,
    Datapath,
    Desired,
    DeviceState,
    Direction,
    HeldKey,
    Link,
    Member,
    Observed,
    PeerState,
    Route,
    SecretKey,
    Settings,
    SettingsFlags,
    device_sysctls,
    pod_entry,
    single_address,
    single_network,
)

OWN = "a"
UPLINK = "eth0"
SENDER = ip_address("10.244.1.9")
"""A pod of this node."""


def public(secret: SecretKey) -> str:
    """Stands for Curve25519: one public key for each private one."""
    return b64encode(sha256(secret.reveal()).digest()).decode()


def secret(name: str, epoch: int) -> SecretKey:
    return SecretKey(sha256(f"{name} {epoch}".encode()).digest())


@dataclass
class FakeKernel:
    """What a node's kernel keeps, the programs' decision on egress included."""

    links: dict[str, Link] = field(default_factory=dict)
    wireguard: dict[str, DeviceState] = field(default_factory=dict)
    loaded: bool = False
    addresses: dict[Network, AddressEntry] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    quarantined: set[int] = field(default_factory=set)
    settings: Settings | None = None
    filters: dict[tuple[str, Direction], str] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)
    interruptions: int = 0
    """How often a device that was up lost what it was to send."""
    sysctls: dict[str, str] = field(default_factory=dict)
    unguarded: set[str] = field(default_factory=set)
    boot_guard: Scope | None = None
    """What init has loaded."""
    endpoints: dict[tuple[str, str], Any] = field(default_factory=dict)
    next_index: int = 10
    now: float = 1000.0
    writes: int = 0

    def observe(self) -> Observed:
        pods: dict[int, frozenset[bytes]] = {}
        addresses = {}
        for network, entry in self.addresses.items():
            address = single_address(network)
            if address and entry == pod_entry(entry.node):
                pods[entry.node] = pods.get(entry.node, frozenset()) | {address}
            else:
                addresses[network] = entry
        return Observed(
            links=dict(self.links),
            routes=(Route(ip_network("0.0.0.0/0"), (2,)),),
            wireguard=dict(self.wireguard),
            datapath=Datapath(addresses, dict(self.nodes), self.settings, pods, frozenset(self.quarantined))
            if self.loaded
            else None,
            pinned=self.loaded,
            attachments=frozenset(Attachment(*hook, program) for hook, program in self.filters.items()),
            hooked=frozenset(self.hooked),
            unguarded=frozenset(self.unguarded),
            boot_guard=self.boot_guard is not None,
            sysctls=dict(self.sysctls),
            endpoints=dict(self.endpoints),
            now=self.now,
        )

    def apply(self, action: plans.Action) -> None:
        self.writes += 1
        match action:
            case plans.LoadDatapath():
                self.loaded = True
            case plans.UnloadDatapath():
                self.loaded, self.addresses, self.nodes, self.settings = False, {}, {}, None
                self.quarantined = set()
            case plans.WriteAddresses(entries):
                assert self.loaded
                self.addresses |= dict(entries)
            case plans.DeleteAddresses(networks):
                for network in networks:
                    del self.addresses[network]
            case plans.WritePods(node, singles):
                assert self.loaded
                self.addresses |= {single_network(each): pod_entry(node) for each in singles}
            case plans.DeletePods(singles):
                for each in singles:
                    del self.addresses[single_network(each)]
            case plans.WriteNodes(entries):
                for number, device in entries:
                    self.nodes.pop(number, None)
                    self.quarantined.discard(number)
                    if device == plans.QUARANTINED:
                        self.quarantined.add(number)
                    elif device:
                        self.nodes[number] = self.links[device].index
            case plans.WriteSettings(written):
                assert self.loaded
                self.settings = written
            case plans.AddClsact(device):
                self._hook(device)
            case plans.Attach(attachment):
                assert self.loaded and attachment.device in self.links
                self._hook(attachment.device)
                self.filters[attachment.device, attachment.direction] = attachment.program
            case plans.Detach(attachment):
                del self.filters[attachment.device, attachment.direction]
            case plans.RemoveBootGuard():
                assert self.boot_guard is not None
                self.boot_guard = None
            case plans.CreateDevice(name):
                assert name not in self.links
                self.links[name] = Link(index=self.next_index, name=name, kind="wireguard", ethernet=False)
                self.wireguard[name] = DeviceState(name=name)
                self.sysctls |= {path: "?" for path, _ in device_sysctls(name)}
                self.next_index += 1
            case plans.DeleteDevice(name):
                self.delete(name)
            case plans.SetLink(name, mtu, add_address):
                link = self.links[name]
                extra = {IPv4Address("192.0.0.8")} if add_address else set()
                self.links[name] = replace(link, up=True, mtu=mtu, addresses=link.addresses | extra)
            case plans.WriteSysctls(values):
                self.sysctls |= dict(values)
            case plans.ConfigureDevice():
                self._configure(action)

    def _hook(self, device: str) -> None:
        """As the kernel adds a clsact."""
        self.interruptions += device not in self.hooked and self.links[device].up
        self.hooked.add(device)

    def _configure(self, change: plans.ConfigureDevice) -> None:
        state = self.wireguard[change.name]
        if not all(peer.remove for peer in change.peers):
            assert self.links[change.name].up, "it would shake hands and throw away what comes of it"
            assert (change.name, Direction.INGRESS) in self.filters
        peers = {} if change.fresh else dict(state.peers)

        def take(networks: Iterable[Network]) -> frozenset[Network]:
            taken = frozenset(networks)
            for key, peer in peers.items():
                peers[key] = with_networks(peer, peer.networks - taken)
            return taken

        take((*change.release, *map(single_network, change.release_pods)))
        for each in change.peers:
            if each.remove:
                del peers[each.public_key]
                continue
            gained = take((*each.gain, *map(single_network, each.pods)))
            old = peers.get(each.public_key, PeerState(public_key=each.public_key))
            peers[each.public_key] = with_networks(
                replace(
                    old,
                    endpoint=each.endpoint or old.endpoint,
                    keepalive=each.keepalive,
                    preshared_key=told_key(each.preshared_key, old.preshared_key),
                ),
                old.networks | gained,
            )
            if each.endpoint:
                self.endpoints[change.name, each.public_key] = each.endpoint
        self.wireguard[change.name] = replace(
            state,
            public_key=public(change.private_key) if change.private_key else state.public_key,
            port=change.port or state.port,
            peers=peers,
        )

    # What others do to it.

    def delete(self, name: str) -> None:
        self.links.pop(name, None)
        self.wireguard.pop(name, None)
        self.hooked.discard(name)
        for hook in [hook for hook in self.filters if hook[0] == name]:
            del self.filters[hook]
        self.sysctls = {path: value for path, value in self.sysctls.items() if name not in path}
        self.endpoints = {key: value for key, value in self.endpoints.items() if key[0] != name}

    def shake_hands(self) -> None:
        """Every peer answers."""
        for name, state in self.wireguard.items():
            peers = {key: replace(peer, handshake=self.now) for key, peer in state.peers.items()}
            self.wireguard[name] = replace(state, peers=peers)

    # Where a packet from a pod of this node would go, by the rules of bpf/include/meshwire/verdict.h.

    def _lookup(self, address: Address) -> AddressEntry | None:
        matches = [network for network in self.addresses if address in network]
        return self.addresses[max(matches, key=lambda network: network.prefixlen)] if matches else None

    def egress(self, destination: Address) -> str:
        """`held` (by the boot guard), `clear`, `dropped`, `lost` (sent to where nothing is) or the name of
        the device that encrypts it."""
        if self.boot_guard and holds(self.boot_guard, SENDER, destination):
            return "held"
        if self.filters.get((UPLINK, Direction.EGRESS)) != "mw_to_netdev" or self.settings is None:
            return "clear"
        strict = SettingsFlags.STRICT in self.settings.flags
        entry = self._lookup(destination)
        if entry is None or entry.node == self.settings.local_node:
            return "clear"
        if entry.node in self.quarantined:
            return "dropped"
        if entry.node and (index := self.nodes.get(entry.node)):
            link = next((link for link in self.links.values() if link.index == index), None)
            if link is None or not link.up:
                return "lost"
            peers = self.wireguard[link.name].peers.values()
            return link.name if any(destination in n for p in peers for n in p.networks) else "lost"
        return "dropped" if strict else "clear"


def holds(scope: Scope, source: Address, destination: Address) -> bool:
    def both_in(networks: Iterable[Network]) -> bool:
        return all(any(each in network for network in networks) for each in (source, destination))

    return both_in(scope.pods) and not both_in(scope.own)


def told_key(told: SecretKey | None, old: SecretKey | None) -> SecretKey | None:
    if told is None:
        return old
    return None if told == NO_PRESHARED_KEY else told


def with_networks(peer: PeerState, networks: Iterable[Network]) -> PeerState:
    """As both implementations are read."""
    networks = list(networks)
    singles = {address for network in networks if (address := single_address(network))}
    blocks = frozenset(network for network in networks if single_address(network) is None)
    return replace(peer, allowed_ips=blocks, singles=frozenset(singles))


def make_kernel() -> FakeKernel:
    return FakeKernel(
        links={
            "lo": Link(index=1, name="lo", up=True),
            UPLINK: Link(index=2, name=UPLINK, up=True, addresses=frozenset({ip_address("198.18.0.1")})),
        }
    )


@dataclass(frozen=True)
class Cluster:
    """What the API says: this node `a` and others, each with its number, pod CIDR and whether it has a
    key. Nodes `without` (numbers) have no CIDR; `pods` are single addresses and their nodes, None: unknown
    yet."""

    phase: Phase = Phase.OFF
    epoch: int = 0
    mode: Mode = Mode.STRICT
    others: tuple[tuple[str, int, bool], ...] = (("b", 2, True), ("c", 3, True))
    own_key: bool = True
    cluster_cidr: bool = True
    without: frozenset[int] = frozenset()
    pods: tuple[tuple[str, str], ...] | None = ()

    def member(self, name: str, number: int, has_key: bool) -> Member:
        key = Key(epoch=self.epoch, public_key=public(secret(name, self.epoch)))
        return Member(
            name=name,
            created=f"2026-01-01T00:00:{number:02}Z",
            spec=Spec(
                id=number,
                addresses=(ip_address(f"198.18.0.{number}"),),
                pod_cidrs=() if number in self.without else (pod_cidr(number),),
                cluster_cidrs=(ip_network("10.244.0.0/16"),) if self.cluster_cidr else (),
                keys=(key,) if has_key and self.epoch and self.phase is not Phase.OFF else (),
                phase=self.phase,
                epoch=self.epoch,
            ),
        )

    def desired(self, kernel: FakeKernel) -> Desired:
        wanted = desired(self.inputs(kernel))
        assert wanted is not None
        return wanted

    def inputs(self, kernel: FakeKernel) -> Inputs:
        members = [self.member(OWN, 1, self.own_key), *(self.member(*other) for other in self.others)]
        secret_key = secret(OWN, self.epoch)
        observed = kernel.observe()
        return Inputs(
            node=OWN,
            members={member.name: member for member in members},
            nodes={member.name: ClusterNode(name=member.name, ready=True) for member in members},
            config=MeshConfig(encryption=Encryption(enabled=True, mode=self.mode)),
            held={self.epoch: HeldKey(self.epoch, public(secret_key), secret_key)} if self.own_key else {},
            links=observed.links,
            routes=observed.routes,
            pods=self.single_pods(),
            in_place=observed.pinned,
        )

    def single_pods(self) -> dict[str, frozenset[bytes]] | None:
        if self.pods is None:
            return None
        return {
            node: frozenset(ip_address(address).packed for address, owner in self.pods if owner == node)
            for _, node in self.pods
        }


def pod_cidr(number: int) -> IPv4Network:
    return IPv4Network(f"10.244.{number}.0/24")


def pod(number: int) -> IPv4Address:
    return pod_cidr(number)[7]


def converge(kernel: FakeKernel, cluster: Cluster) -> plans.Plan:
    done: plans.Plan = ()
    for _ in range(3):
        todo = plans.plan(cluster.desired(kernel), kernel.observe())
        for action in todo:
            kernel.apply(action)
        done += todo
    wanted = cluster.desired(kernel)
    assert plans.plan(wanted, kernel.observe()) == ()
    assert_is(wanted, kernel)
    return done


def assert_is(wanted: Desired, kernel: FakeKernel) -> None:
    """The kernel has what is wanted and nothing more, judged without the help of plan()."""
    assert kernel.settings == wanted.settings
    if wanted.pods is not None:
        pods = {
            single_network(each): pod_entry(number) for number, some in wanted.pods.items() for each in some
        }
        assert kernel.addresses == {**wanted.addresses, **pods}
        assert not wanted.addresses.keys() & pods.keys()
    assert kernel.wireguard.keys() == {device.name for device in wanted.devices}
    for device in wanted.devices:
        state = kernel.wireguard[device.name]
        assert (state.public_key, state.port) == (device.key.public_key, device.port)
        if wanted.pods is not None:
            assert {key: peer.networks for key, peer in state.peers.items()} == {
                peer.public_key: peer.allowed_ips.union(map(single_network, peer.pods))
                for peer in device.peers
            }
        assert {path: kernel.sysctls[path] for path, _ in device_sysctls(device.name)} == dict(
            device_sysctls(device.name)
        )
    indexes = {number: kernel.links[each.device].index for number, each in wanted.redirects.items()}
    if all(not each.when_proven for each in wanted.redirects.values()):
        assert kernel.nodes == indexes
    else:
        assert kernel.nodes.items() <= indexes.items()
    filters = {Attachment(*hook, program) for hook, program in kernel.filters.items()}
    assert filters >= wanted.attachments if wanted.strict else filters == wanted.attachments


# One cluster's life: turned on, enforced, turned off.

ON = [
    Cluster(Phase.ENABLING, 1),
    Cluster(Phase.ENFORCING, 1),
    Cluster(Phase.DISABLING, 1),
    Cluster(Phase.DRAINING, 1),
]


def test_a_node_is_left_as_it_was_found() -> None:
    kernel = make_kernel()
    converge(kernel, Cluster(Phase.OFF))
    before = dataclasses.asdict(kernel)
    for cluster in [*ON, Cluster(Phase.OFF, 1)]:
        converge(kernel, cluster)
        kernel.shake_hands()
        converge(kernel, cluster)
    after = dataclasses.asdict(kernel)
    for counter in ("next_index", "writes"):
        del before[counter], after[counter]
    assert after == before


def test_no_device_is_interrupted_by_turning_encryption_on_and_off() -> None:
    kernel = make_kernel()
    converge(kernel, Cluster(Phase.OFF))
    assert kernel.interruptions == 1, "the uplink's clsact comes before there is anything to lose"
    for cluster in [*ON, Cluster(Phase.OFF, 1), Cluster(Phase.ENABLING, 2)]:
        converge(kernel, cluster)
        kernel.shake_hands()
        converge(kernel, cluster)
    assert kernel.interruptions == 1


def test_each_pair_moves_when_its_handshake_is_proven() -> None:
    kernel = make_kernel()
    converge(kernel, ON[0])
    assert [kernel.egress(pod(number)) for number in (2, 3)] == ["clear", "clear"]
    state = kernel.wireguard["meshwire_wg1"]
    key = public(secret("b", 1))
    peers = {**state.peers, key: replace(state.peers[key], handshake=1.0)}
    kernel.wireguard["meshwire_wg1"] = replace(state, peers=peers)
    converge(kernel, ON[0])
    assert [kernel.egress(pod(number)) for number in (2, 3)] == ["meshwire_wg1", "clear"]


def test_a_pair_that_has_moved_never_moves_back() -> None:
    kernel = make_kernel()
    converge(kernel, ON[0])
    kernel.shake_hands()
    converge(kernel, ON[0])
    kernel.delete("meshwire_wg1")
    converge(kernel, ON[0])
    assert kernel.wireguard["meshwire_wg1"].peers[public(secret("b", 1))].handshake == 0
    assert kernel.egress(pod(2)) == "meshwire_wg1"


def test_nothing_is_led_past_policy_that_is_in_force() -> None:
    """To a device at which nobody asks the sender's policy, once more, for what a service's address hid."""
    kernel = make_kernel()
    kernel.unguarded = {"meshwire_wg0", "meshwire_wg1"}

    def take_steps(cluster: Cluster) -> None:
        for _ in range(3):
            for action in plans.plan(cluster.desired(kernel), kernel.observe()):
                kernel.apply(action)

    take_steps(ON[0])
    kernel.shake_hands()
    take_steps(ON[0])
    assert kernel.egress(pod(2)) == "clear"
    kernel.unguarded = {"meshwire_wg0"}
    converge(kernel, ON[0])
    assert kernel.egress(pod(2)) == "meshwire_wg1"
    # A device that is made anew is nobody's yet.
    converge(kernel, ON[1])
    kernel.delete("meshwire_wg1")
    kernel.unguarded = {"meshwire_wg0", "meshwire_wg1"}
    take_steps(ON[1])
    assert kernel.wireguard.keys() == {"meshwire_wg1"} and kernel.egress(pod(2)) == "lost"
    kernel.unguarded = {"meshwire_wg0"}
    converge(kernel, ON[1])
    assert kernel.egress(pod(2)) == "meshwire_wg1"


def test_turning_on_and_off_loses_nothing_on_the_way() -> None:
    kernel = make_kernel()
    for cluster in [*ON, Cluster(Phase.OFF, 1)]:
        for _ in range(2):
            for action in plans.plan(cluster.desired(kernel), kernel.observe()):
                kernel.apply(action)
                for number in (2, 3):
                    assert kernel.egress(pod(number)) in {"clear", "meshwire_wg1"}, str(action)
            kernel.shake_hands()
        assert (kernel.egress(pod(2)) == "clear") == (cluster.phase in {Phase.DRAINING, Phase.OFF})


def test_enforcing_drops_nothing_of_a_pair_that_is_late() -> None:
    """The order may come before the handshake: from then on the device queues, and the drop comes after."""
    kernel = make_kernel()
    converge(kernel, ON[0])
    for action in plans.plan(ON[1].desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert kernel.egress(pod(2)) in {"clear", "meshwire_wg1"}, str(action)
    assert kernel.egress(pod(2)) == "meshwire_wg1"


def test_turning_off_opens_up_before_it_takes_away() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    for action in plans.plan(ON[3].desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert kernel.egress(pod(2)) in {"clear", "meshwire_wg1"}, str(action)


def test_nodes_are_written_before_the_cluster_that_holds_them() -> None:
    """One by one: a cluster CIDR alone would drop what is on its way to a node."""
    kernel = make_kernel()
    todo = plans.plan(ON[1].desired(kernel), kernel.observe())
    [written] = [action for action in todo if isinstance(action, plans.WriteAddresses)]
    assert AddressFlags.CLUSTER in written.entries[-1][1].flags
    assert not any(AddressFlags.CLUSTER in entry.flags for _, entry in written.entries[:-1])


def test_a_guard_outlives_its_route_while_the_drop_is_in_force() -> None:
    kernel = make_kernel()
    kernel.links["eth1"] = Link(
        index=3, name="eth1", up=True, addresses=frozenset({ip_address("198.18.0.1")})
    )
    guards = {("eth1", Direction.EGRESS), ("eth1", Direction.INGRESS)}
    converge(kernel, ON[1])
    assert kernel.filters.keys() >= guards
    kernel.links["eth1"] = replace(kernel.links["eth1"], addresses=frozenset())
    assert converge(kernel, ON[1]) == ()
    converge(kernel, ON[2])
    assert not kernel.filters.keys() & guards


def test_a_node_that_joins_an_enforcing_cluster_guards_before_it_can_send() -> None:
    kernel = make_kernel()
    todo = plans.plan(ON[1].desired(kernel), kernel.observe())
    kinds = [type(action) for action in todo]
    attach = kinds.index(plans.Attach)
    assert kinds[:attach] == [plans.LoadDatapath, plans.WriteAddresses, plans.WriteSettings]
    assert kinds.index(plans.CreateDevice) > attach
    written = next(action for action in todo if isinstance(action, plans.WriteSettings)).settings
    assert SettingsFlags.STRICT in written.flags
    # The device sends nothing before it knows its key and peers, and takes nothing before from_wireguard is
    # there.
    assert kinds.index(plans.ConfigureDevice) < kinds.index(plans.SetLink) < kinds.index(plans.WriteNodes)
    last_attach = len(kinds) - 1 - kinds[::-1].index(plans.Attach)
    assert last_attach < kinds.index(plans.SetLink)


def test_without_a_key_everything_is_guarded_and_nothing_sent() -> None:
    kernel = make_kernel()
    converge(kernel, replace(ON[1], own_key=False))
    assert not kernel.wireguard
    assert kernel.egress(pod(2)) == "dropped"
    assert kernel.egress(pod(77)) == "dropped"


def test_permissive_mode_counts_and_drops_nothing() -> None:
    kernel = make_kernel()
    converge(kernel, replace(ON[1], mode=Mode.PERMISSIVE, others=(("b", 2, True), ("c", 3, False))))
    assert kernel.settings is not None
    assert kernel.settings.flags == SettingsFlags.ENFORCING
    assert [kernel.egress(pod(number)) for number in (2, 3, 77)] == ["meshwire_wg1", "clear", "clear"]


def test_an_equal_node_is_not_written_to() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    writes = kernel.writes
    converge(kernel, ON[1])
    assert kernel.writes == writes


def test_a_changed_peer_touches_no_other() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    kernel.shake_hands()
    changed = replace(ON[1], others=(("b", 2, True), ("c", 3, True), ("d", 4, True)))
    configure = [action for action in converge(kernel, changed) if isinstance(action, plans.ConfigureDevice)]
    assert [[peer.node for peer in action.peers] for action in configure] == [["d"]]
    assert all(action.private_key is None and action.port is None for action in configure)


def test_a_roamed_endpoint_stays_until_the_api_names_another() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    kernel.shake_hands()
    name, key = "meshwire_wg1", public(secret("b", 1))
    state = kernel.wireguard[name]
    roamed = replace(state.peers[key].endpoint, port=4242)  # type: ignore[type-var]
    peers = {**state.peers, key: replace(state.peers[key], endpoint=roamed)}
    kernel.wireguard[name] = replace(state, peers=peers)
    assert converge(kernel, ON[1]) == ()
    kernel.now += 3600
    [action] = converge(kernel, ON[1])
    assert isinstance(action, plans.ConfigureDevice)
    assert {peer.node for peer in action.peers} == {"b"}, (
        "no answer for an hour: where the API says is worth a try"
    )


def test_where_a_device_has_lost_its_source_endpoints_are_set_again_as_they_are() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    kernel.shake_hands()
    name = "meshwire_wg1"
    present = {key: peer.endpoint for key, peer in kernel.wireguard[name].peers.items()}
    observed = replace(kernel.observe(), lost_source=frozenset({name}))
    [action] = plans.plan(ON[1].desired(kernel), observed)
    assert isinstance(action, plans.ConfigureDevice) and action.name == name and not action.only_pods
    assert {peer.public_key: peer.endpoint for peer in action.peers} == present
    assert not any(peer.remove or peer.gain or peer.preshared_key for peer in action.peers)


def test_a_deleted_device_is_healed_in_one_plan() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    kernel.delete("meshwire_wg1")
    assert kernel.egress(pod(2)) == "lost"
    for action in plans.plan(ON[1].desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert kernel.egress(pod(2)) in {"lost", "meshwire_wg1"}
    assert kernel.egress(pod(2)) == "meshwire_wg1"


def test_keys_of_another_epoch_make_a_device_start_afresh() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    later = replace(ON[1], epoch=3)
    configure = next(a for a in converge(kernel, later) if isinstance(a, plans.ConfigureDevice))
    assert configure.fresh
    assert set(kernel.wireguard["meshwire_wg1"].peers) == {public(secret("b", 3)), public(secret("c", 3))}


def test_an_address_that_moves_between_peers_has_one_owner_throughout() -> None:
    kernel = make_kernel()
    converge(kernel, ON[1])
    swapped = replace(ON[1], others=(("c", 2, True), ("b", 3, True)))
    configure = [a for a in converge(kernel, swapped) if isinstance(a, plans.ConfigureDevice)]
    assert [action.release for action in configure] == [()]
    assert kernel.egress(pod(2)) == kernel.egress(pod(3)) == "meshwire_wg1"
    assert pod_cidr(2) in kernel.wireguard["meshwire_wg1"].peers[public(secret("c", 1))].networks


def test_what_others_put_on_the_node_is_left_alone() -> None:
    kernel = make_kernel()
    kernel.links["wg0"] = Link(index=5, name="wg0", kind="wireguard", up=True)
    for cluster in [*ON, Cluster(Phase.OFF, 1)]:
        for action in converge(kernel, cluster):
            assert "wg0" not in str(action)


# Nodes without pod CIDR.

WITHOUT = replace(
    ON[1],
    without=frozenset({1, 2, 3}),
    pods=(("10.244.9.1", "a"), ("10.244.9.2", "b"), ("10.244.9.3", "c"), ("fd00::2", "b")),
)


def at(address: str) -> Address:
    return ip_address(address)


def test_single_addresses_are_reached_by_their_nodes_peers() -> None:
    kernel = make_kernel()
    converge(kernel, WITHOUT)
    assert [kernel.egress(at(each)) for each in ("10.244.9.2", "10.244.9.3", "fd00::2")] == [
        "meshwire_wg1"
    ] * 3
    peers = kernel.wireguard["meshwire_wg1"].peers
    assert peers[public(secret("b", 1))].networks == {
        ip_network("198.18.0.2"),
        ip_network("10.244.9.2"),
        ip_network("fd00::2"),
    }
    assert kernel.egress(at("10.244.9.99")) == "dropped", "nobody has told of it yet"
    assert kernel.egress(at("10.244.9.1")) == "clear", "it is of this node"


def test_one_pod_that_comes_touches_nothing_else() -> None:
    kernel = make_kernel()
    converge(kernel, WITHOUT)
    kernel.shake_hands()
    converge(kernel, WITHOUT)
    assert WITHOUT.pods
    todo = converge(kernel, replace(WITHOUT, pods=(*WITHOUT.pods, ("10.244.9.4", "b"))))
    new = ip_address("10.244.9.4").packed
    # The peer first: until then the address is unknown, and not in clear either.
    told, written = todo
    assert isinstance(told, plans.ConfigureDevice) and told.only_pods
    assert [(peer.node, peer.pods, peer.gain, peer.endpoint) for peer in told.peers] == [
        ("b", (new,), (), None)
    ]
    assert written == plans.WritePods(2, (new,))


def test_one_pod_that_goes_touches_nothing_else() -> None:
    kernel = make_kernel()
    converge(kernel, WITHOUT)
    assert WITHOUT.pods
    gone = ip_address("10.244.9.2").packed
    assert converge(kernel, replace(WITHOUT, pods=WITHOUT.pods[:1] + WITHOUT.pods[2:])) == (
        plans.DeletePods((gone,)),
        plans.ConfigureDevice(name="meshwire_wg1", release_pods=(gone,)),
    )
    assert kernel.egress(at("10.244.9.2")) == "dropped"


@pytest.mark.parametrize(("before", "after"), ["bc", "ba", "ab", "b-", "-b", "cb"])
def test_an_address_that_is_used_again_elsewhere_moves(before: str, after: str) -> None:
    """`-`: a node that has no MeshNode yet."""
    kernel = make_kernel()
    others = (("10.244.9.3", "c"), ("10.244.9.8", "b"))
    start = replace(WITHOUT, pods=(*others, ("10.244.9.5", before)))
    converge(kernel, start)
    kernel.shake_hands()
    converge(kernel, start)
    moved = replace(WITHOUT, pods=(*others, ("10.244.9.5", after)))
    for action in plans.plan(moved.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert [kernel.egress(at(address)) for address, _ in others] == ["meshwire_wg1"] * 2, str(action)
        if isinstance(action, plans.ConfigureDevice):
            assert action.only_pods
    converge(kernel, moved)
    assert kernel.egress(at("10.244.9.5")) == {"-": "dropped", "a": "clear"}.get(after, "meshwire_wg1")


def test_what_is_not_known_yet_leaves_what_is_there() -> None:
    """An agent that has just started, and an API server that is away."""
    kernel = make_kernel()
    converge(kernel, WITHOUT)
    assert converge(kernel, replace(WITHOUT, pods=None)) == ()
    assert kernel.egress(at("10.244.9.2")) == "meshwire_wg1"


def test_nobody_begins_to_encrypt_before_pods_are_known() -> None:
    kernel = make_kernel()
    begin = replace(WITHOUT, phase=Phase.ENABLING, pods=None)
    converge(kernel, begin)
    assert not kernel.wireguard and not kernel.loaded
    assert [problem.reason for problem in begin.desired(kernel).problems] == ["WaitingForEndpoints"]
    converge(kernel, replace(begin, pods=WITHOUT.pods))
    assert kernel.wireguard["meshwire_wg1"].peers[public(secret("b", 1))].singles >= {
        ip_address("10.244.9.2").packed
    }


def test_turning_on_and_off_loses_nothing_of_single_addresses() -> None:
    kernel = make_kernel()
    for cluster in [*ON, Cluster(Phase.OFF, 1)]:
        cluster = replace(cluster, without=WITHOUT.without, pods=WITHOUT.pods)
        for _ in range(2):
            for action in plans.plan(cluster.desired(kernel), kernel.observe()):
                kernel.apply(action)
                assert kernel.egress(at("10.244.9.2")) in {"clear", "meshwire_wg1"}, str(action)
            kernel.shake_hands()


def test_where_no_cluster_cidr_covers_new_pods_it_is_said() -> None:
    kernel = make_kernel()
    open_end = replace(WITHOUT, cluster_cidr=False)
    converge(kernel, open_end)
    assert kernel.egress(at("10.244.9.99")) == "clear"
    [problem] = open_end.desired(kernel).problems
    assert (problem.reason, problem.blocking) == ("ClusterCIDRMissing", True)
    assert "IPv4 or IPv6" in problem.message and "spec.network.clusterCIDRs" in problem.message
    # The cluster CIDR is one of IPv4.
    [problem] = WITHOUT.desired(kernel).problems
    assert "IPv6" in problem.message and "IPv4" not in problem.message
    only_v4 = replace(WITHOUT, pods=(("10.244.9.2", "b"),))
    assert not only_v4.desired(kernel).problems


# A node that boots again, with what its init has loaded.


def boot(before: Cluster) -> FakeKernel:
    """The kernel after a boot of a node that was as `before` asks."""
    last = make_kernel()
    converge(last, before)
    kernel = make_kernel()
    kernel.boot_guard = scope_of(before.desired(last))
    return kernel


def test_the_boot_guard_goes_when_programs_drop_and_not_before() -> None:
    kernel = boot(ON[1])
    assert [kernel.egress(pod(number)) for number in (1, 2, 77)] == ["clear", "held", "held"]
    todo = plans.plan(ON[1].desired(kernel), kernel.observe())
    kinds = [type(action) for action in todo]
    lifted = kinds.index(plans.RemoveBootGuard)
    assert kinds[:lifted] == [
        plans.LoadDatapath,
        plans.WriteAddresses,
        plans.WriteSettings,
        plans.Attach,
        plans.Attach,
    ]
    for action in todo:
        kernel.apply(action)
        assert kernel.egress(pod(2)) in {"held", "dropped", "meshwire_wg1"}, str(action)
    assert kernel.boot_guard is None and kernel.egress(pod(2)) == "meshwire_wg1"
    assert converge(kernel, ON[1]) == ()


def test_a_boot_guard_alone_is_a_reason_to_act() -> None:
    """Somebody has loaded it again by hand."""
    kernel = boot(ON[1])
    converge(kernel, ON[1])
    kernel.boot_guard = Scope(frozenset(), frozenset())
    assert converge(kernel, ON[1]) == (plans.RemoveBootGuard(),)


@pytest.mark.parametrize("uplinks", [("eth0", "bond0"), ("bond0",)])
def test_the_boot_guard_waits_for_every_device_that_pods_send_by(uplinks: tuple[str, ...]) -> None:
    kernel = boot(ON[1])
    known = ON[1].inputs(kernel)
    config = replace(known.config, network=NetworkSettings(uplinks=uplinks))

    def take_steps() -> None:
        for _ in range(2):
            wanted = desired(replace(known, config=config, links=kernel.links, in_place=kernel.loaded))
            assert wanted
            for action in plans.plan(wanted, kernel.observe()):
                kernel.apply(action)

    take_steps()
    assert kernel.loaded and kernel.egress(pod(2)) == "held"
    kernel.links["bond0"] = Link(index=3, name="bond0", up=True)
    take_steps()
    assert kernel.boot_guard is None and ("bond0", Direction.EGRESS) in kernel.filters


def test_without_any_uplink_the_boot_guard_stays() -> None:
    kernel = boot(ON[1])
    uplink = kernel.links.pop(UPLINK)
    known = replace(ON[1].inputs(kernel), routes=())
    wanted = desired(known)
    assert wanted and not wanted.attachments - {
        each for each in wanted.attachments if each.device in DEVICES
    }
    for action in plans.plan(wanted, replace(kernel.observe(), routes=())):
        kernel.apply(action)
    assert kernel.egress(pod(2)) == "held"
    kernel.links[UPLINK] = uplink
    converge(kernel, ON[1])
    assert kernel.boot_guard is None


@pytest.mark.parametrize("action", [plans.LoadDatapath, plans.WriteSettings, plans.Attach])
def test_where_the_datapath_is_refused_the_boot_guard_stays(action: type) -> None:
    """The agent ends a plan where an action fails."""
    kernel = boot(ON[1])
    for each in plans.plan(ON[1].desired(kernel), kernel.observe()):
        if isinstance(each, action):
            break
        kernel.apply(each)
    assert kernel.egress(pod(2)) == "held"


@pytest.mark.parametrize(
    "after",
    [Cluster(Phase.OFF, 1), *ON[2:], replace(ON[1], mode=Mode.PERMISSIVE)],
    ids=lambda cluster: f"{cluster.phase}-{cluster.mode}",
)
def test_where_plaintext_may_pass_by_now_nothing_is_held(after: Cluster) -> None:
    kernel = boot(ON[1])
    converge(kernel, after)
    assert kernel.boot_guard is None and kernel.egress(pod(2)) in {"clear", "meshwire_wg1"}


def test_no_order_touches_nothing() -> None:
    kernel = boot(ON[1])
    assert desired(replace(ON[1].inputs(kernel), members={}, nodes={})) is None


# Any order of events, any interruption, any damage.

ADDRESSES = ("10.244.9.1", "10.244.9.2", "10.244.2.7", "198.18.0.3", "fd00::1")
"""Of pods; among them one in a CIDR, and one that is a node's own."""

clusters = st.builds(
    Cluster,
    phase=st.sampled_from(Phase),
    epoch=st.sampled_from([1, 2, 3]),
    mode=st.sampled_from(Mode),
    others=st.lists(
        st.tuples(st.sampled_from(["b", "c", "d", "e"]), st.integers(2, 5), st.booleans()),
        unique_by=(lambda other: other[0], lambda other: other[1]),
        max_size=4,
    ).map(tuple),
    own_key=st.booleans(),
    cluster_cidr=st.booleans(),
    without=st.frozensets(st.integers(1, 5)),
    pods=st.none()
    | st.lists(
        st.tuples(st.sampled_from(ADDRESSES), st.sampled_from("abcdef")), unique_by=lambda pod: pod[0]
    ).map(tuple),
)
damages = st.sampled_from(["nothing", "device", "filters", "addresses", "nodes", "unpinned", "down"])


def damage(kernel: FakeKernel, what: str) -> None:
    match what:
        case "device":
            for name in DEVICES:
                kernel.delete(name)
        case "filters":
            kernel.filters.clear()
        case "addresses":
            kernel.addresses.clear()
        case "nodes":
            kernel.nodes.clear()
        case "unpinned":
            kernel.apply(plans.UnloadDatapath())
        case "down":
            kernel.links.update(
                {name: replace(link, up=False) for name, link in kernel.links.items() if name in DEVICES}
            )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(clusters, st.integers(0, 20), damages), min_size=1, max_size=6))
def test_interrupted_anywhere_it_converges_from_there(history: list[tuple[Cluster, int, str]]) -> None:
    kernel = make_kernel()
    for cluster, stop_after, harm in history:
        for action in plans.plan(cluster.desired(kernel), kernel.observe())[:stop_after]:
            kernel.apply(action)
        damage(kernel, harm)
    converge(kernel, history[-1][0])
    kernel.shake_hands()
    converge(kernel, history[-1][0])


def destinations() -> list[Address]:
    return [*(pod(number) for number in range(2, 8)), *map(at, ADDRESSES)]


def is_guarded_by(wanted: Desired, destination: Address) -> bool:
    """It is a pod's of another node, as far as anybody knows."""
    assert wanted.settings
    own = wanted.settings.local_node
    for number, some in (wanted.pods or {}).items():
        if destination.packed in some:
            return number != own
    found = [network for network in wanted.addresses if destination in network]
    entry = wanted.addresses[max(found, key=lambda network: network.prefixlen)] if found else None
    return entry is not None and entry.node != own


@settings(max_examples=300, deadline=None)
@given(clusters, clusters, st.integers(0, 20), st.booleans())
def test_what_is_guarded_is_never_in_clear_on_the_way(
    before: Cluster, after: Cluster, stop_after: int, broken: bool
) -> None:
    """From one strict state to another, whatever differs between them, interrupted once."""
    before = replace(before, phase=Phase.ENFORCING, mode=Mode.STRICT)
    after = replace(after, phase=Phase.ENFORCING, mode=Mode.STRICT, pods=after.pods or ())
    kernel = make_kernel()
    converge(kernel, before)
    wanted = after.desired(kernel)
    known = [each for each in destinations() if is_guarded_by(wanted, each)]
    guarded = [each for each in known if kernel.egress(each) != "clear"]
    first = plans.plan(wanted, kernel.observe())[:stop_after]
    for action in first:
        kernel.apply(action)
        assert all(kernel.egress(each) != "clear" for each in guarded), str(action)
    if broken:
        damage(kernel, "device")
    for action in plans.plan(after.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert all(kernel.egress(each) != "clear" for each in guarded), str(action)
    assert all(kernel.egress(each) != "clear" for each in known)


@settings(max_examples=300, deadline=None)
@given(clusters, clusters, st.integers(0, 20), st.booleans())
def test_what_the_boot_guard_holds_is_never_in_clear_after(
    before: Cluster, after: Cluster, stop_after: int, broken: bool
) -> None:
    """A node that was strict boots, and is strict in what has become of the cluster; interrupted once."""
    before = replace(before, phase=Phase.ENFORCING, mode=Mode.STRICT)
    after = replace(after, phase=Phase.ENFORCING, mode=Mode.STRICT)
    kernel = boot(before)
    wanted = after.desired(kernel)
    held = [each for each in destinations() if kernel.egress(each) == "held" and is_guarded_by(wanted, each)]
    for action in plans.plan(wanted, kernel.observe())[:stop_after]:
        kernel.apply(action)
        assert all(kernel.egress(each) != "clear" for each in held), str(action)
    if broken:
        damage(kernel, "device")
    for action in plans.plan(after.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert all(kernel.egress(each) != "clear" for each in held), str(action)
    assert kernel.boot_guard is None


@settings(max_examples=200, deadline=None)
@given(clusters, clusters)
def test_a_peer_that_stays_is_reached_throughout(before: Cluster, after: Cluster) -> None:
    """Enforcing to enforcing in one epoch: nodes come, go and get keys; who is in both loses no packet."""
    before = replace(before, phase=Phase.ENFORCING, epoch=1, own_key=True)
    after = replace(after, phase=Phase.ENFORCING, epoch=1, own_key=True)
    kernel = make_kernel()
    converge(kernel, before)
    stays = [
        number
        for name, number, has_key in before.others
        if has_key
        and (name, number, has_key) in after.others
        and number not in before.without | after.without
    ]
    single = set(before.pods or ()) & set(after.pods or ())
    there = [
        at(address)
        for name, number, has_key in before.others
        for address, node in single
        if (name, number, has_key) in after.others
        and has_key
        and node == name
        and number in before.without & after.without
        and kernel.egress(at(address)) == "meshwire_wg1"
        and after.desired(kernel).pods.get(number, frozenset()) >= {at(address).packed}  # type: ignore[union-attr]
    ]
    for action in plans.plan(after.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert all(kernel.egress(pod(number)) == "meshwire_wg1" for number in stays), str(action)
        assert all(kernel.egress(each) == "meshwire_wg1" for each in there), str(action)


@pytest.mark.parametrize("cluster", [*ON, Cluster(Phase.OFF, 1)], ids=lambda cluster: str(cluster.phase))
def test_no_plan_prints_a_key(cluster: Cluster) -> None:
    kernel = make_kernel()
    wanted = cluster.desired(kernel)
    raw = secret(OWN, 1).reveal()
    shown = " ".join(
        [
            *map(str, plans.plan(wanted, kernel.observe())),
            *map(repr, plans.plan(wanted, kernel.observe())),
            repr(wanted),
        ]
    )
    for leak in (raw.hex(), b64encode(raw).decode(), repr(raw)[2:-1]):
        assert leak not in shown


def test_flags_are_those_of_the_programs() -> None:
    from meshwire.bpf import layouts

    assert {flag.name: flag.value for flag in SettingsFlags if flag} == {
        flag.name: flag.value for flag in layouts.SettingsFlag
    }
    assert {flag.name: flag.value for flag in AddressFlags} == {
        flag.name: flag.value for flag in layouts.AddressFlag
    }
