"""The kernel's WireGuard, driven as the agent drives it. Runs inside of the virtual machine: test_vm.py
names it to pytest, which by itself doesn't take it for a test."""

from __future__ import annotations

import os
import platform
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

import pytest
from bench import peers as many
from pyroute2 import IPRoute

from meshwire.encryption import netlink
from meshwire.encryption.health import ANSWER, Reading, says_something
from meshwire.encryption.keys import public_key
from meshwire.encryption.model import DEVICES, NO_PRESHARED_KEY, Device, Endpoint, HeldKey, Peer, SecretKey
from meshwire.encryption.plan import ConfigureDevice, PeerChange, renew_peer
from meshwire.encryption.question import question
from meshwire.encryption.wireguard import KernelWireGuard

DEVICE = "meshwire_wg0"
PEERS = 1000


@pytest.fixture
def wireguard() -> Iterator[KernelWireGuard]:
    """With one device, fresh and down."""
    with IPRoute() as ipr:
        assert netlink.kernel_has_wireguard(ipr)
        netlink.create_wireguard(ipr, DEVICE)
        yield KernelWireGuard()
        netlink.delete_link(ipr, DEVICE)


def make_peer(number: int) -> PeerChange:
    """Every other one reached over IPv6."""
    v4, v6 = IPv4Address(0xC6120001 + number), IPv6Address((0xFD00 << 112) + 1 + number)
    return PeerChange(
        public_key=b64encode(number.to_bytes(32, "big")).decode(),
        endpoint=Endpoint(v6 if number % 2 else v4, 51871),
        keepalive=25,
        gain=(
            ip_network((0x0A000000 + (number << 8), 24)),
            ip_network(((0xFD01 << 112) + (number << 64), 64)),
            ip_network(f"{v4}/32"),
        ),
    )


def test_this_is_the_kernel_the_test_is_about() -> None:
    assert platform.release() == os.environ["MESHWIRE_VM_RELEASE"]
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 1_000_000


def test_a_thousand_peers_in_one_go_are_all_there(wireguard: KernelWireGuard) -> None:
    secret = SecretKey(os.urandom(32))
    peers = tuple(make_peer(number) for number in range(1, PEERS + 1))
    wireguard.configure(
        ConfigureDevice(name=DEVICE, private_key=secret, port=51871, fresh=True, peers=peers)
    )
    device = wireguard.observe(DEVICE)
    assert (device.public_key, device.port, len(device.peers)) == (public_key(secret), 51871, PEERS)
    for peer in peers:
        found = device.peers[peer.public_key]
        assert found.networks == frozenset(peer.gain)
        assert (found.endpoint, found.keepalive, found.handshake) == (peer.endpoint, 25, 0)

    fewer = tuple(replace(peer, remove=True) for peer in peers[1:])
    wireguard.configure(ConfigureDevice(name=DEVICE, peers=fewer))
    assert set(wireguard.observe(DEVICE).peers) == {peers[0].public_key}
    wireguard.configure(ConfigureDevice(name=DEVICE, fresh=True, peers=peers[1:2]))
    assert set(wireguard.observe(DEVICE).peers) == {peers[1].public_key}


def test_a_network_moves_or_goes_without_touching_the_others(wireguard: KernelWireGuard) -> None:
    one, other = make_peer(1), make_peer(2)
    start = ConfigureDevice(
        name=DEVICE, private_key=SecretKey(os.urandom(32)), port=51871, peers=(one, other)
    )
    wireguard.configure(start)
    moved = PeerChange(public_key=other.public_key, keepalive=25, gain=one.gain[:1])
    wireguard.configure(ConfigureDevice(name=DEVICE, peers=(moved,), release=other.gain[1:2]))
    peers = wireguard.observe(DEVICE).peers
    assert set(peers) == {one.public_key, other.public_key}
    assert peers[one.public_key].networks == set(one.gain[1:])
    assert peers[other.public_key].networks == {other.gain[0], other.gain[2], one.gain[0]}
    assert peers[other.public_key].endpoint == other.endpoint


@pytest.fixture
def tunnel(wireguard: KernelWireGuard) -> Iterator[Callable[[SecretKey | None, SecretKey | None], float]]:
    """Two devices of one kernel that know each other. What it returns sets their preshared keys, makes them
    shake hands anew, and says when the first had a handshake: 0 for never."""
    other = "meshwire_wg1"
    secrets = {name: SecretKey(os.urandom(32)) for name in (DEVICE, other)}
    ports = {DEVICE: 51871, other: 51872}
    with IPRoute() as ipr:
        ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")
        netlink.create_wireguard(ipr, other)
        for name in ports:
            wireguard.configure(ConfigureDevice(name=name, private_key=secrets[name], port=ports[name]))
            netlink.set_up(ipr, name, mtu=1420, add_address=True)

        def connect(here: SecretKey | None, there: SecretKey | None) -> float:
            for name, peer, key in ((other, DEVICE, there), (DEVICE, other, here)):
                change = PeerChange(
                    public_key=public_key(secrets[peer]),
                    endpoint=Endpoint(IPv4Address("127.0.0.1"), ports[peer]),
                    # This makes them begin.
                    keepalive=1,
                    gain=(ip_network("10.0.0.0/24"),),
                    preshared_key=key,
                )
                wireguard.configure(ConfigureDevice(name=name, fresh=True, peers=(change,)))
            deadline = time.monotonic() + 12
            while time.monotonic() < deadline:
                [state] = wireguard.observe(DEVICE).peers.values()
                if state.handshake:
                    break
                time.sleep(0.2)
            assert state.preshared_key == here
            return state.handshake

        yield connect
        netlink.delete_link(ipr, other)


def test_a_preshared_key_is_set_kept_and_taken_away(wireguard: KernelWireGuard) -> None:
    one, other = make_peer(1), make_peer(2)
    key, second = SecretKey(os.urandom(32)), SecretKey(os.urandom(32))

    def present() -> list[SecretKey | None]:
        peers = wireguard.observe(DEVICE).peers
        return [peers[each.public_key].preshared_key for each in (one, other)]

    start = ConfigureDevice(
        name=DEVICE, private_key=second, port=51871, peers=(replace(one, preshared_key=key), other)
    )
    wireguard.configure(start)
    assert present() == [key, None]
    for told, expected in ((None, key), (second, second), (NO_PRESHARED_KEY, None)):
        change = PeerChange(public_key=one.public_key, keepalive=25, preshared_key=told)
        wireguard.configure(ConfigureDevice(name=DEVICE, peers=(change,)))
        assert present() == [expected, None]


def test_there_is_a_handshake_only_with_the_same_preshared_key(
    tunnel: Callable[[SecretKey | None, SecretKey | None], float],
) -> None:
    key, other = SecretKey(os.urandom(32)), SecretKey(os.urandom(32))
    assert tunnel(key, key)
    assert not tunnel(key, other)
    assert not tunnel(key, None)
    assert not tunnel(None, key)
    assert tunnel(None, None)


def test_thousands_of_single_addresses_of_one_peer_are_all_there(wireguard: KernelWireGuard) -> None:
    one, other = make_peer(1), make_peer(2)
    pods = [(0x0B000000 + number).to_bytes(4) for number in range(5000)]
    pods += [((0xFD02 << 112) + number).to_bytes(16) for number in range(5000)]
    start = ConfigureDevice(
        name=DEVICE,
        private_key=SecretKey(os.urandom(32)),
        port=51871,
        peers=(replace(one, pods=tuple(pods)), other),
    )
    wireguard.configure(start)

    def singles() -> tuple[frozenset[bytes], frozenset[bytes]]:
        peers = wireguard.observe(DEVICE).peers
        host = frozenset(each.gain[2].network_address.packed for each in (one, other))
        return peers[one.public_key].singles - host, peers[other.public_key].singles - host

    assert singles() == (frozenset(pods), frozenset())
    moved = PeerChange(public_key=other.public_key, keepalive=25, pods=tuple(pods[:3000]))
    wireguard.configure(ConfigureDevice(name=DEVICE, peers=(moved,)))
    assert singles() == (frozenset(pods[3000:]), frozenset(pods[:3000]))
    wireguard.configure(ConfigureDevice(name=DEVICE, release_pods=tuple(pods[2000:4000])))
    assert singles() == (frozenset(pods[4000:]), frozenset(pods[:2000]))
    peers = wireguard.observe(DEVICE).peers
    assert set(peers) == {one.public_key, other.public_key}, "the stand-in is gone"
    assert {each.endpoint for each in peers.values()} == {one.endpoint, other.endpoint}


def test_what_is_read_often_is_what_is_observed(wireguard: KernelWireGuard) -> None:
    peers = tuple(make_peer(number) for number in range(1, PEERS + 1))
    start = ConfigureDevice(name=DEVICE, private_key=SecretKey(os.urandom(32)), port=51871, peers=peers)
    wireguard.configure(start)
    began = time.monotonic()
    readings = wireguard.read(DEVICE)
    took = time.monotonic() - began
    assert readings == {peer.public_key: Reading(0, 0.0, peer.endpoint) for peer in peers}
    began = time.monotonic()
    wireguard.observe(DEVICE)
    print(f"{PEERS} peers read in {took:.3f} s, observed in {time.monotonic() - began:.3f} s")
    with pytest.raises(OSError, match="No such device"):
        wireguard.read("meshwire_wg1")


def test_a_question_is_answered_and_a_renewed_peer_shakes_hands_anew(wireguard: KernelWireGuard) -> None:
    """Two devices that are each other's peer, over loopback."""
    secrets = {name: SecretKey(os.urandom(32)) for name in DEVICES}
    ports = dict(zip(DEVICES, (51871, 51872), strict=True))
    other = dict(zip(DEVICES, reversed(DEVICES), strict=True))
    made = {
        name: Device(
            name=name,
            epoch=0,
            key=HeldKey(0, public_key(secrets[name]), secrets[name]),
            port=ports[name],
            mtu=1420,
            peers=(
                Peer(
                    node=other[name],
                    public_key=public_key(secrets[other[name]]),
                    endpoint=Endpoint(IPv4Address("127.0.0.1"), ports[other[name]]),
                    allowed_ips=frozenset(
                        ip_network(text.format(ports[other[name]] % 10))
                        for text in ("198.18.0.{}/32", "fd00::{}/128")
                    ),
                    keepalive=65535,
                ),
            ),
        )
        for name in DEVICES
    }

    def read(name: str) -> Reading:
        [reading] = wireguard.read(name).values()
        return reading

    def wait(what: Callable[[], bool], seconds: float) -> float:
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < seconds
            time.sleep(0.1)
        return time.monotonic() - began

    with IPRoute() as ipr, netlink.open_sender() as sender:
        ipr.link("set", index=netlink.find_index(ipr, "lo"), state="up")
        netlink.create_wireguard(ipr, DEVICES[1])
        try:
            for name in DEVICES:
                start = ConfigureDevice(name=name, private_key=secrets[name], port=ports[name])
                wireguard.configure(start)
                netlink.set_up(ipr, name, mtu=1420, add_address=True)
                wireguard.configure(renew_peer(made[name], made[name].peers[0]))
            one, two = DEVICES
            packet = question(IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2"))
            netlink.send_ip(sender, one, packet)
            wait(lambda: bool(read(one).handshake and read(two).handshake), 30)
            time.sleep(12)

            before = read(one)
            netlink.send_ip(sender, one, question(IPv6Address("fd00::1"), IPv6Address("fd00::2")))
            took = wait(lambda: says_something(before, read(one)), ANSWER + 6)
            assert read(one).received - before.received == 32, "a keepalive, and nothing else"
            assert took > ANSWER - 1

            wireguard.configure(renew_peer(made[one], made[one].peers[0]))
            # Its keepalive is new to it, so it begins at once, and counts from 0.
            again = wait(lambda: read(one).handshake > before.handshake, 10)
            renewed = wireguard.observe(one).peers[made[one].peers[0].public_key]
            assert renewed.received < before.received + 32
            assert renewed.networks == made[one].peers[0].allowed_ips
            assert renewed.endpoint == before.endpoint
            print(f"answered after {took:.1f} s, a renewed peer after {again:.1f} s")
        finally:
            netlink.delete_link(ipr, DEVICES[1])


def test_many_nodes_become_a_datapath_that_needs_nothing_more() -> None:
    # A thousand take more than a minute here; they are measured by `make bench`.
    found = many.measure(100)
    print(found)
    assert found["implementation"] == "Kernel"
    assert found["further_actions"] == 0
