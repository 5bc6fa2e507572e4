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
from meshwire.api.meshconfig import Encryption, MeshConfig, Mode
from meshwire.api.meshnode import Key, Phase, Spec
from meshwire.encryption import plan as plans
from meshwire.encryption.desired import Inputs, desired
from meshwire.encryption.model import (
    DEVICES,
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
)

OWN = "a"
UPLINK = "eth0"


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
    settings: Settings | None = None
    filters: dict[tuple[str, Direction], str] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)
    interruptions: int = 0
    """How often a device that was up lost what it was to send."""
    sysctls: dict[str, str] = field(default_factory=dict)
    endpoints: dict[tuple[str, str], Any] = field(default_factory=dict)
    next_index: int = 10
    now: float = 1000.0
    writes: int = 0

    def observe(self) -> Observed:
        return Observed(
            links=dict(self.links),
            routes=(Route(ip_network("0.0.0.0/0"), (2,)),),
            wireguard=dict(self.wireguard),
            datapath=Datapath(dict(self.addresses), dict(self.nodes), self.settings)
            if self.loaded
            else None,
            pinned=self.loaded,
            attachments=frozenset(Attachment(*hook, program) for hook, program in self.filters.items()),
            hooked=frozenset(self.hooked),
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
            case plans.WriteAddresses(entries):
                assert self.loaded
                self.addresses |= dict(entries)
            case plans.DeleteAddresses(networks):
                for network in networks:
                    del self.addresses[network]
            case plans.WriteNodes(entries):
                for number, device in entries:
                    self.nodes.pop(number, None)
                    if device:
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

        def take(networks: Iterable[Network]) -> None:
            for key, peer in peers.items():
                peers[key] = replace(peer, allowed_ips=peer.allowed_ips - frozenset(networks))

        take(change.release)
        for each in change.peers:
            if each.remove:
                del peers[each.public_key]
                continue
            take(each.gain)
            old = peers.get(each.public_key, PeerState(public_key=each.public_key))
            peers[each.public_key] = replace(
                old,
                endpoint=each.endpoint or old.endpoint,
                keepalive=each.keepalive,
                allowed_ips=old.allowed_ips | frozenset(each.gain),
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
        """`clear`, `dropped`, `lost` (sent to where nothing is) or the name of the device that encrypts
        it."""
        if self.filters.get((UPLINK, Direction.EGRESS)) != "mw_to_netdev" or self.settings is None:
            return "clear"
        strict = SettingsFlags.STRICT in self.settings.flags
        entry = self._lookup(destination)
        if entry is None or entry.node == self.settings.local_node:
            return "clear"
        if entry.node and (index := self.nodes.get(entry.node)):
            link = next((link for link in self.links.values() if link.index == index), None)
            if link is None or not link.up:
                return "lost"
            peers = self.wireguard[link.name].peers.values()
            return link.name if any(destination in n for p in peers for n in p.allowed_ips) else "lost"
        return "dropped" if strict else "clear"


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
    key."""

    phase: Phase = Phase.OFF
    epoch: int = 0
    mode: Mode = Mode.STRICT
    others: tuple[tuple[str, int, bool], ...] = (("b", 2, True), ("c", 3, True))
    own_key: bool = True
    cluster_cidr: bool = True

    def member(self, name: str, number: int, has_key: bool) -> Member:
        key = Key(epoch=self.epoch, public_key=public(secret(name, self.epoch)))
        return Member(
            name=name,
            created=f"2026-01-01T00:00:{number:02}Z",
            spec=Spec(
                id=number,
                addresses=(ip_address(f"198.18.0.{number}"),),
                pod_cidrs=(pod_cidr(number),),
                cluster_cidrs=(ip_network("10.244.0.0/16"),) if self.cluster_cidr else (),
                keys=(key,) if has_key and self.epoch and self.phase is not Phase.OFF else (),
                phase=self.phase,
                epoch=self.epoch,
            ),
        )

    def desired(self, kernel: FakeKernel) -> Desired:
        members = [self.member(OWN, 1, self.own_key), *(self.member(*other) for other in self.others)]
        secret_key = secret(OWN, self.epoch)
        observed = kernel.observe()
        wanted = desired(
            Inputs(
                node=OWN,
                members={member.name: member for member in members},
                nodes={member.name: ClusterNode(name=member.name, ready=True) for member in members},
                config=MeshConfig(encryption=Encryption(enabled=True, mode=self.mode)),
                held={self.epoch: HeldKey(self.epoch, public(secret_key), secret_key)}
                if self.own_key
                else {},
                links=observed.links,
                routes=observed.routes,
            )
        )
        assert wanted is not None
        return wanted


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
    assert kernel.addresses == wanted.addresses
    assert kernel.wireguard.keys() == {device.name for device in wanted.devices}
    for device in wanted.devices:
        state = kernel.wireguard[device.name]
        assert (state.public_key, state.port) == (device.key.public_key, device.port)
        assert {key: peer.allowed_ips for key, peer in state.peers.items()} == {
            peer.public_key: peer.allowed_ips for peer in device.peers
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
    assert pod_cidr(2) in kernel.wireguard["meshwire_wg1"].peers[public(secret("c", 1))].allowed_ips


def test_what_others_put_on_the_node_is_left_alone() -> None:
    kernel = make_kernel()
    kernel.links["wg0"] = Link(index=5, name="wg0", kind="wireguard", up=True)
    for cluster in [*ON, Cluster(Phase.OFF, 1)]:
        for action in converge(kernel, cluster):
            assert "wg0" not in str(action)


# Any order of events, any interruption, any damage.

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


@settings(max_examples=300, deadline=None)
@given(clusters, clusters, st.integers(0, 20), st.booleans())
def test_what_is_guarded_is_never_in_clear_on_the_way(
    before: Cluster, after: Cluster, stop_after: int, broken: bool
) -> None:
    """From one strict state to another, whatever differs between them, interrupted once."""
    before = replace(before, phase=Phase.ENFORCING, mode=Mode.STRICT)
    after = replace(after, phase=Phase.ENFORCING, mode=Mode.STRICT)
    kernel = make_kernel()
    converge(kernel, before)
    wanted = after.desired(kernel)
    guarded = [
        number
        for number in range(2, 8)
        if kernel.egress(pod(number)) != "clear"
        and any(pod(number) in network for network in wanted.addresses)
    ]
    first = plans.plan(wanted, kernel.observe())[:stop_after]
    for action in first:
        kernel.apply(action)
        assert all(kernel.egress(pod(number)) != "clear" for number in guarded), str(action)
    if broken:
        damage(kernel, "device")
    for action in plans.plan(after.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert all(kernel.egress(pod(number)) != "clear" for number in guarded), str(action)
    known = [number for number in range(2, 8) if any(pod(number) in network for network in wanted.addresses)]
    assert all(kernel.egress(pod(number)) != "clear" for number in known)


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
        if has_key and (name, number, has_key) in after.others
    ]
    for action in plans.plan(after.desired(kernel), kernel.observe()):
        kernel.apply(action)
        assert all(kernel.egress(pod(number)) == "meshwire_wg1" for number in stays), str(action)


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
