"""The programs on real devices: two nodes with a pod each, joined by an uplink.

A tunnel is a TUN device whose other end is this process: a WireGuard outside of the kernel, but without the
encryption, so that a test sees what goes in, and can join two of them."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from tests.bpf.spaces import inside, ip

from meshwire.bpf import loader, tc
from meshwire.bpf import packets as p
from meshwire.bpf.layouts import AddressFlag, Direction, Reason, SettingsFlag
from meshwire.bpf.loader import Program, Programs
from meshwire.bpf.maps import AddressEntry, Maps, SettingsEntry

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

MTU = 1420
PATIENCE = 10.0
"""Seconds until something that has to happen counts as not happening."""

# asm-generic/socket.h, linux/in.h, linux/in6.h, linux/if_tun.h
SO_RCVBUFFORCE = 33
IP_MTU_DISCOVER, IP_MTU, IPV6_MTU_DISCOVER, IPV6_MTU = 10, 14, 23, 24
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ETH_P_ALL = 0x0003
# linux/if_packet.h
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_CSUMNOTREADY = 263, 8, 1 << 3

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
families = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])


def pod_address(node: int, family: int) -> str:
    return f"10.1.{node}.9" if family == 4 else f"fd00:1:0:{node}::9"


def node_address(node: int, family: int) -> str:
    return f"192.168.0.{node}" if family == 4 else f"fd00:9::{node}"


def sysctl(namespace: str, *settings: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-qw", *settings], check=True)


def open_tun(namespace: str, name: str) -> int:
    with inside(namespace):
        handle = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    os.set_blocking(handle, False)
    return handle


@dataclass(frozen=True)
class Node:
    number: int
    pod: str
    host: str
    ipr: IPRoute
    programs: Programs
    maps: Maps
    tunnel: int
    """The file descriptor at the other end of the tunnel device."""
    tunnel_index: int
    wire: socket.socket
    """Sees every frame that arrives on the uplink."""

    def set(self, flags: SettingsFlag, *, tunnel_to: int | None) -> None:
        """In this order, as an agent does: no packet may meet the tunnel before what allows for it."""
        self.maps.settings.write(SettingsEntry(flags, self.number, MTU))
        self.maps.nodes.update(3 - self.number, self.tunnel_index if tunnel_to else 0)

    def attach(self, device: str, direction: Direction, program: str) -> None:
        index = self.ipr.link_lookup(ifname=device)[0]
        tc.attach(self.ipr, index, direction, self.programs.get(program))

    def count(self, reason: Reason, direction: Direction = Direction.EGRESS) -> int:
        return self.maps.metrics.read()[reason, direction].packets

    def out_of_tunnel(self) -> bytes:
        """The next packet that went into the tunnel, but for what the kernel sends of its own accord."""
        while True:
            ready, _, _ = select.select([self.tunnel], [], [], PATIENCE)
            assert ready, "nothing came out of the tunnel"
            packet = os.read(self.tunnel, 65536)
            if not is_chatter(packet):
                return packet

    def pod_frames_on_the_wire(self) -> list[bytes]:
        """Frames with a pod's address that have arrived by the uplink since the last call."""
        found: list[bytes] = []
        while True:
            try:
                data = self.wire.recv(65536)
            except BlockingIOError:
                return found
            if any(
                socket.inet_pton(FAMILIES[family], pod_address(node, family)) in data
                for node in (1, 2)
                for family in FAMILIES
            ) and data[12:14] not in (b"\x08\x06",):
                found.append(data)


def is_chatter(packet: bytes) -> bool:
    """Router solicitations and multicast reports of the tunnel device itself."""
    return packet[0] >> 4 == 6 and packet[24] == 0xFF


def build_node(
    number: int, namespaces: Callable[[str], str], bpffs: Path, objects: Path, resources: ExitStack
) -> Node:
    pod, host = namespaces(f"pod{number}"), namespaces(f"node{number}")
    sysctl(pod, "net.ipv6.conf.default.accept_dad=0")
    sysctl(
        host,
        "net.ipv6.conf.default.accept_dad=0",
        *(f"net.ipv4.conf.{each}.rp_filter=2" for each in ("all", "default")),
        *(f"net.ipv{family}.conf.all.forwarding=1" for family in FAMILIES),
    )
    ip(
        host,
        f"link add v0 type veth peer name eth0 netns {pod}",
        f"addr add 10.1.{number}.1/24 dev v0",
        f"addr add fd00:1:0:{number}::1/64 dev v0 nodad",
        "link set v0 up",
    )
    ip(
        pod,
        f"addr add {pod_address(number, 4)}/24 dev eth0",
        f"addr add {pod_address(number, 6)}/64 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via 10.1.{number}.1",
        f"route add default via fd00:1:0:{number}::1",
    )
    tunnel = open_tun(host, "mwt0")
    resources.callback(os.close, tunnel)
    # Where source addresses are checked at all, the kernel refuses everything on a device without one.
    ip(host, f"link set mwt0 mtu {MTU} up", f"addr add {node_address(number, 4)}/32 dev mwt0")

    pins = bpffs / f"{os.path.basename(host)}-{time.monotonic_ns()}"
    programs = resources.enter_context(loader.Programs.load(pins, objects=objects))
    maps = resources.enter_context(Maps.open(pins))
    for node in (1, 2):
        for network, flags in (
            (f"10.1.{node}.0/24", AddressFlag.POD),
            (f"fd00:1:0:{node}::/64", AddressFlag.POD),
            (node_address(node, 4), AddressFlag.HOST),
            (node_address(node, 6), AddressFlag.HOST),
        ):
            maps.ipcache.update(ip_network(network), AddressEntry(0, node, flags))
    ipr = resources.enter_context(IPRoute(netns=host))
    with inside(host):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    resources.callback(wire.close)
    wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    return Node(number, pod, host, ipr, programs, maps, tunnel, ipr.link_lookup(ifname="mwt0")[0], wire)


@pytest.fixture
def pair(namespaces: Callable[[str], str], bpffs: Path, objects: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes with to_netdev on their uplinks and from_wireguard on their tunnels, off, without a
    tunnel."""
    with ExitStack() as resources:
        one, two = (build_node(number, namespaces, bpffs, objects, resources) for number in (1, 2))
        ip(one.host, f"link add up0 type veth peer name up0 netns {two.host}")
        for node, other in ((one, two), (two, one)):
            ip(
                node.host,
                f"addr add {node_address(node.number, 4)}/24 dev up0",
                f"addr add {node_address(node.number, 6)}/64 dev up0 nodad",
                "link set up0 up",
                f"route add 10.1.{other.number}.0/24 via {node_address(other.number, 4)}",
                f"route add fd00:1:0:{other.number}::/64 via {node_address(other.number, 6)}",
            )
        for node in (one, two):
            node.wire.bind(("up0", ETH_P_ALL))
            node.set(SettingsFlag(0), tunnel_to=None)
            node.attach("up0", Direction.EGRESS, loader.TO_NETDEV)
            node.attach("mwt0", Direction.INGRESS, loader.FROM_WIREGUARD)
        yield one, two


@contextmanager
def joined(one: Node, two: Node) -> Iterator[None]:
    """Carries packets between the two tunnels meanwhile."""
    done_read, done_write = os.pipe()

    def carry() -> None:
        while True:
            ready, _, _ = select.select([one.tunnel, two.tunnel, done_read], [], [])
            if done_read in ready:
                return
            for source in ready:
                packet = os.read(source, 65536)
                if not is_chatter(packet):
                    os.write(two.tunnel if source == one.tunnel else one.tunnel, packet)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.write(done_write, b".")
        thread.join()
        os.close(done_read)
        os.close(done_write)


def udp_socket(namespace: str, family: int, peer: str, *, discover: int | None = None) -> socket.socket:
    with inside(namespace):
        opened = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    if discover is not None:
        set_discovery(opened, family, discover)
    opened.connect((peer, 5353))
    return opened


def set_discovery(opened: socket.socket, family: int, discover: int) -> None:
    if family == 4:
        opened.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, discover)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discover)


def path_mtu(opened: socket.socket, family: int) -> int:
    if family == 4:
        return opened.getsockopt(socket.IPPROTO_IP, IP_MTU)
    return opened.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)


def send_until_refused(sender: socket.socket, size: int) -> None:
    """Sends until the kernel says EMSGSIZE, as it does once the ICMP error has come back."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            sender.send(bytes(size))
        except OSError as error:
            assert error.errno == errno.EMSGSIZE
            # The packet was refused for its route's MTU; what the ICMP error left on the socket is apart.
            sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return
        time.sleep(0.01)
    raise AssertionError("no ICMP error reached the sender's socket")


STRICT = SettingsFlag.STRICT | SettingsFlag.ENFORCING


@families
def test_a_pods_packet_goes_into_the_tunnel_bare_and_not_on_the_wire(
    pair: tuple[Node, Node], family: int
) -> None:
    one, two = pair
    one.set(STRICT, tunnel_to=2)
    with udp_socket(one.pod, family, pod_address(2, family)) as sender:
        sender.send(b"hello")
        packet = one.out_of_tunnel()
    assert packet[0] >> 4 == family
    assert packet.endswith(b"hello")
    assert one.count(Reason.ENCRYPTED) == 1
    assert two.pod_frames_on_the_wire() == []


@families
def test_without_a_tunnel_strict_sends_nothing_and_off_all(pair: tuple[Node, Node], family: int) -> None:
    one, two = pair
    with inside(two.pod):
        receiver = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    with receiver, udp_socket(one.pod, family, pod_address(2, family)) as sender:
        receiver.bind((pod_address(2, family), 5353))
        receiver.settimeout(PATIENCE)
        sender.send(b"in clear")
        assert receiver.recv(100) == b"in clear"
        assert len(two.pod_frames_on_the_wire()) == 1

        one.set(STRICT, tunnel_to=None)
        sender.send(b"not in clear")
        one.set(SettingsFlag(0), tunnel_to=None)
        sender.send(b"in clear again")
        assert receiver.recv(100) == b"in clear again"
    assert one.count(Reason.DROP_NO_TUNNEL) == 1
    assert len(two.pod_frames_on_the_wire()) == 1


@families
def test_a_tunnel_that_somebody_deleted_fails_closed(pair: tuple[Node, Node], family: int) -> None:
    one, two = pair
    one.set(STRICT, tunnel_to=2)
    ip(one.host, "link del mwt0")
    with udp_socket(one.pod, family, pod_address(2, family)) as sender:
        for _ in range(5):
            sender.send(b"x")
    deadline = time.monotonic() + PATIENCE
    while one.count(Reason.ENCRYPTED) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert two.pod_frames_on_the_wire() == []


@families
@pytest.mark.parametrize("who", ["pod", "host"])
def test_the_icmp_error_reaches_the_senders_socket(pair: tuple[Node, Node], who: str, family: int) -> None:
    one, two = pair
    one.set(STRICT, tunnel_to=2)
    namespace = one.pod if who == "pod" else one.host
    with udp_socket(namespace, family, pod_address(2, family), discover=PMTUDISC_DO) as sender:
        send_until_refused(sender, 1440)
        assert path_mtu(sender, family) == MTU
        sender.send(b"this fits")
        assert one.out_of_tunnel().endswith(b"this fits")
    assert one.count(Reason.TOO_BIG_ANSWERED) >= 1
    assert one.count(Reason.TOO_BIG_ANSWERED) == one.count(Reason.DECRYPTED, Direction.INGRESS)
    assert two.pod_frames_on_the_wire() == []


@families
def test_no_device_will_write_a_checksum_into_the_icmp_error(pair: tuple[Node, Node], family: int) -> None:
    """The pod's packet is one whose checksum is still to come; the error made out of it must not be."""
    one, _ = pair
    one.set(STRICT, tunnel_to=2)
    with inside(one.pod):
        watch = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with watch, udp_socket(one.pod, family, pod_address(2, family), discover=PMTUDISC_DO) as sender:
        watch.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        watch.settimeout(PATIENCE)
        watch.bind(("eth0", ETH_P_ALL))
        sender.send(bytes(1440))
        seen = {}
        while "error" not in seen:
            data, ancillary, _, _ = watch.recvmsg(65536, 1024)
            unfinished = bool(struct.unpack_from("=I", ancillary[0][2])[0] & TP_STATUS_CSUMNOTREADY)
            if len(data) > 1440:
                seen["packet"] = unfinished
            elif data[14:].startswith(b"\x45\xc0") or data[20] == p.ICMPV6 and data[54] == 2:
                seen["error"] = unfinished
    assert seen == {"packet": True, "error": False}


def test_the_icmp_error_finds_its_way_back_through_nat(pair: tuple[Node, Node]) -> None:
    one, _ = pair
    one.set(STRICT, tunnel_to=2)
    rule = f"PREROUTING -d 10.96.0.1 -j DNAT --to-destination {pod_address(2, 4)}"
    subprocess.run(
        ["ip", "netns", "exec", one.host, "iptables", "-w", "-t", "nat", "-A", *rule.split()], check=True
    )
    with udp_socket(one.pod, 4, "10.96.0.1", discover=PMTUDISC_DO) as sender:
        send_until_refused(sender, 1440)
        assert path_mtu(sender, 4) == MTU


def test_ipv4_that_may_be_fragmented_goes_in_whole(pair: tuple[Node, Node]) -> None:
    one, _ = pair
    one.set(STRICT, tunnel_to=2)
    with udp_socket(one.pod, 4, pod_address(2, 4), discover=PMTUDISC_DONT) as sender:
        sender.send(bytes(1472))
        assert len(one.out_of_tunnel()) == 1500
    assert one.count(Reason.TOO_BIG_ANSWERED) == 0


@families
def test_a_syn_whose_checksum_is_still_to_come_is_clamped(pair: tuple[Node, Node], family: int) -> None:
    one, _ = pair
    one.set(STRICT, tunnel_to=2)
    with inside(one.pod):
        client = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    with client:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect((pod_address(2, family), 80))
        packet = one.out_of_tunnel()
    head = 20 if family == 4 else 40
    segment = packet[head:]
    assert segment[13] == p.SYN
    assert segment[20:24] == bytes([2, 4]) + (MTU - head - 20).to_bytes(2, "big")
    source, destination = (packet[12:16], packet[16:20]) if family == 4 else (packet[8:24], packet[24:40])
    pseudo = source + destination + struct.pack("!II", len(segment), p.TCP)
    assert p.checksum(pseudo + segment) == 0
    assert one.count(Reason.MSS_CLAMPED) == 1


class Sink(threading.Thread):
    """Reads a TCP connection to its end."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__()
        self.listener = listener
        self.received = 0

    def run(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            while data := connection.recv(1 << 16):
                self.received += len(data)

    def wait_for(self, size: int) -> None:
        deadline = time.monotonic() + 3 * PATIENCE
        while self.received < size:
            assert time.monotonic() < deadline, f"{self.received} of {size} bytes arrived"
            time.sleep(0.01)


@families
def test_tcp_begun_in_clear_goes_on_through_a_smaller_tunnel(pair: tuple[Node, Node], family: int) -> None:
    one, two = pair
    chunk = 2_000_000
    with inside(two.pod):
        listener = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    with inside(one.pod):
        client = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    with listener, client, joined(one, two):
        listener.bind((pod_address(2, family), 80))
        listener.listen()
        sink = Sink(listener)
        sink.start()
        client.connect((pod_address(2, family), 80))
        client.sendall(bytes(chunk))
        sink.wait_for(chunk)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > MTU - 40

        for node in pair:
            node.set(STRICT | SettingsFlag.PASS_OVERSIZED, tunnel_to=3 - node.number)
        time.sleep(0.2)  # What was under way on the wire has arrived.
        for node in pair:
            node.pod_frames_on_the_wire()
        client.sendall(bytes(chunk))
        client.shutdown(socket.SHUT_WR)
        sink.wait_for(2 * chunk)
        sink.join()
    assert one.count(Reason.TOO_BIG_ANSWERED) >= 1
    assert [node.pod_frames_on_the_wire() for node in pair] == [[], []]


@families
def test_no_oversized_datagram_is_lost_while_cutting_over(pair: tuple[Node, Node], family: int) -> None:
    one, two = pair
    with inside(two.pod):
        receiver = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    with inside(one.pod):
        # Not connected: a connected one is told of the error once, by a send that fails.
        sender = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    with receiver, sender, joined(one, two):
        receiver.bind((pod_address(2, family), 5353))
        receiver.settimeout(PATIENCE)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        # Neighbours that don't know each other yet would lose packets by themselves.
        sender.sendto(bytes(4), (pod_address(2, family), 5353))
        receiver.recv(2000)
        for number in range(200):
            if number == 100:
                one.set(STRICT | SettingsFlag.PASS_OVERSIZED, tunnel_to=2)
            sender.sendto(number.to_bytes(4, "big") + bytes(1440), (pod_address(2, family), 5353))
        lost = set(range(200))
        while lost:
            try:
                lost.remove(int.from_bytes(receiver.recv(2000)[:4], "big"))
            except TimeoutError:
                break
    assert lost == set()
    assert one.count(Reason.TOO_BIG_ANSWERED) >= 1
    assert one.count(Reason.DROP_TOO_BIG) == 0


@families
def test_a_device_without_l2_header(pair: tuple[Node, Node], family: int) -> None:
    """As an IPIP overlay is: here another TUN device, whose packets must not come out."""
    one, _ = pair
    overlay = open_tun(one.host, "over0")
    try:
        ip(
            one.host,
            "link set over0 up",
            "route replace 10.1.2.0/24 dev over0",
            "route del fd00:1:0:2::/64",
            "route add fd00:1:0:2::/64 dev over0",
        )
        one.attach("over0", Direction.EGRESS, loader.TO_NETDEV_L3)
        one.set(STRICT, tunnel_to=2)
        with udp_socket(one.pod, family, pod_address(2, family), discover=PMTUDISC_DO) as sender:
            sender.send(b"hello")
            assert one.out_of_tunnel().endswith(b"hello")
            send_until_refused(sender, 1440)
            assert path_mtu(sender, family) == MTU
        with pytest.raises(BlockingIOError):
            while is_chatter(os.read(overlay, 65536)):
                pass
    finally:
        os.close(overlay)


TAGGING = """
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

SEC("tc")
int tag(struct __sk_buff *skb)
{
	bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), 7);
	return -1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
"""


@families
def test_a_tag_the_device_was_to_add_does_not_follow_into_the_tunnel(
    pair: tuple[Node, Node], family: int, compiled: Callable[[str], Path], bpffs: Path
) -> None:
    one, _ = pair
    one.set(STRICT, tunnel_to=2)
    uplink = one.ipr.link_lookup(ifname="up0")[0]
    with udp_socket(one.pod, family, pod_address(2, family)) as sender:
        sender.send(b"so that the neighbours know each other")
        one.out_of_tunnel()
    with loader.Programs.load(bpffs / "tagging", objects=compiled(TAGGING)) as foreign:
        program: Program = foreign.get("tag")
        # Newest first: this one tags what ours then sees.
        one.ipr.tc(
            "add-filter",
            "bpf",
            uplink,
            1,
            parent=0xFFFFFFF3,
            prio=1,
            fd=program.fd,
            name="tag",
            direct_action=True,
        )
        with udp_socket(one.pod, family, pod_address(2, family)) as sender:
            sender.send(b"hello")
            packet = one.out_of_tunnel()
    assert packet[0] >> 4 == family
    assert len(packet) == (20 if family == 4 else 40) + 8 + len(b"hello")
