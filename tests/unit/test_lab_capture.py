from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwire.lab.capture import Counters, Judge, Report, Unreadable, analyse, counters
from meshwire.lab.model import PODS, LabError

JUDGE = Judge.of(PODS.values())
POD4, OTHER_POD4, NODE4, OTHER_NODE4 = "10.244.1.2", "10.244.2.3", "198.18.0.11", "198.18.0.12"
POD6, OTHER_POD6, NODE6, OTHER_NODE6 = (
    "fd00:10:244:1::2",
    "fd00:10:244:2::3",
    "fd00:198:18::11",
    "fd00:198:18::12",
)

UDP, TCP, ICMP, ICMPV6, IPIP, IPV6 = 17, 6, 1, 58, 4, 41


def packet(source: str, destination: str, protocol: int, payload: bytes, *, fragment: int = 0) -> bytes:
    """An IP packet; `fragment` is the offset in units of eight bytes."""
    one, other = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if one.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, fragment, 64, protocol, 0)
        return head + one.packed + other.packed + payload
    if fragment:
        payload = struct.pack(">BBHI", protocol, 0, fragment << 3, 7) + payload
        protocol = 44
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + one.packed + other.packed + payload


def udp(source: int, destination: int, payload: bytes, *, length: int | None = None) -> bytes:
    return (
        struct.pack(">HHHH", source, destination, 8 + (len(payload) if length is None else length), 0)
        + payload
    )


def ethernet(payload: bytes) -> bytes:
    protocol = 0x86DD if payload[0] >> 4 == 6 else 0x0800
    return bytes(12) + struct.pack(">H", protocol) + payload


def kind(data: bytes) -> tuple[str, str]:
    return JUDGE.kind(0x86DD if data[0] >> 4 == 6 else 0x0800, data)


def wireguard(message: int, length: int) -> bytes:
    return udp(51872, 51871, bytes([message, 0, 0, 0]) + bytes(length - 4))


@pytest.mark.parametrize(("source", "destination"), [(NODE4, OTHER_NODE4), (NODE6, OTHER_NODE6)])
@pytest.mark.parametrize(("message", "length"), [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1456)])
def test_wireguards_messages_are_known_by_port_type_and_length(
    source: str, destination: str, message: int, length: int
) -> None:
    assert kind(packet(source, destination, UDP, wireguard(message, length))) == ("wireguard", str(message))


@pytest.mark.parametrize(
    "payload",
    [
        udp(51871, 51872, b"\5\0\0\0" + bytes(28)),
        udp(51871, 51872, b"\4\0\0\1" + bytes(28)),
        udp(51871, 51872, b"\4\0\0\0" + bytes(29)),
        udp(51871, 51872, b"\1\0\0\0" + bytes(100)),
        udp(51871, 51872, b"\4"),
        udp(1, 2, b"\4\0\0\0" + bytes(28)),
    ],
)
def test_what_only_looks_like_wireguard_is_other(payload: bytes) -> None:
    assert kind(packet(NODE4, OTHER_NODE4, UDP, payload))[0] == "other"


def test_a_cut_off_message_is_judged_by_its_headers_length() -> None:
    data = packet(NODE4, OTHER_NODE4, UDP, udp(51871, 51872, b"\4\0\0\0" + bytes(60), length=1456))
    assert kind(data) == ("wireguard", "4")


@pytest.mark.parametrize(
    ("source", "destination"),
    [(POD4, OTHER_POD4), (POD4, NODE4), (NODE4, POD4), (POD6, OTHER_POD6), (NODE6, POD6), (POD6, NODE6)],
)
@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP, ICMPV6, 132])
def test_a_pods_address_outside_is_clear_whatever_is_carried(
    source: str, destination: str, protocol: int
) -> None:
    found, detail = kind(packet(source, destination, protocol, bytes(20)))
    assert found == "clear" and f"{source} > {destination}" in detail and "(outside)" in detail


@pytest.mark.parametrize(
    "inner", [packet(POD4, OTHER_POD4, TCP, bytes(20)), packet(POD6, OTHER_POD6, UDP, bytes(8))]
)
@pytest.mark.parametrize("outer", [(NODE4, OTHER_NODE4), (NODE6, OTHER_NODE6)])
@pytest.mark.parametrize(
    "tunnel", ["vxlan", "flannel", "geneve", "geneve with options", "geneve without ethernet", "ipip"]
)
def test_a_pods_address_inside_of_a_tunnel_is_clear(
    inner: bytes, outer: tuple[str, str], tunnel: str
) -> None:
    protocol = 0x86DD if inner[0] >> 4 == 6 else 0x0800
    payloads = {
        "vxlan": udp(1, 4789, bytes(8) + ethernet(inner)),
        "flannel": udp(1, 8472, bytes(8) + ethernet(inner)),
        "geneve": udp(1, 6081, struct.pack(">BBHI", 0, 0, 0x6558, 0) + ethernet(inner)),
        "geneve with options": udp(
            1, 6081, struct.pack(">BBHI", 2, 0, 0x6558, 0) + bytes(8) + ethernet(inner)
        ),
        "geneve without ethernet": udp(1, 6081, struct.pack(">BBHI", 0, 0, protocol, 0) + inner),
        "ipip": inner,
    }
    carrier = (IPV6 if inner[0] >> 4 == 6 else IPIP) if tunnel == "ipip" else UDP
    found, detail = kind(packet(*outer, carrier, payloads[tunnel]))
    assert found == "clear" and "inside" in detail


def test_a_tunnel_inside_of_a_tunnel_is_looked_into() -> None:
    inner = packet(NODE4, OTHER_NODE4, IPIP, packet(POD4, OTHER_POD4, TCP, bytes(20)))
    assert kind(packet(NODE4, OTHER_NODE4, UDP, udp(1, 4789, bytes(8) + ethernet(inner))))[0] == "clear"


def test_tunnels_that_carry_no_pods_are_other() -> None:
    inner = packet(NODE4, OTHER_NODE4, TCP, bytes(20))
    assert kind(packet(NODE4, OTHER_NODE4, UDP, udp(1, 4789, bytes(8) + ethernet(inner))))[0] == "other"
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    assert kind(packet(NODE4, OTHER_NODE4, UDP, udp(1, 4789, bytes(8) + arp)))[0] == "other"


@pytest.mark.parametrize(
    ("outer", "protocol", "icmp_type", "quoted"),
    [
        ((NODE4, OTHER_NODE4), ICMP, 3, packet(POD4, OTHER_POD4, UDP, bytes(8))),
        ((NODE6, OTHER_NODE6), ICMPV6, 2, packet(POD6, OTHER_POD6, UDP, bytes(8))),
    ],
)
def test_an_icmp_error_that_quotes_a_pods_packet_is_clear(
    outer: tuple[str, str], protocol: int, icmp_type: int, quoted: bytes
) -> None:
    found, detail = kind(packet(*outer, protocol, bytes([icmp_type]) + bytes(7) + quoted))
    assert found == "clear" and "quoted" in detail
    # An echo that happens to look the same quotes nothing.
    echo = 8 if protocol == ICMP else 128
    assert kind(packet(*outer, protocol, bytes([echo]) + bytes(7) + quoted))[0] == "other"
    assert kind(packet(*outer, protocol, bytes([icmp_type]) + bytes(7) + quoted[:12]))[0] == "other"


@pytest.mark.parametrize(
    ("pods", "nodes"),
    [((POD4, OTHER_POD4), (NODE4, OTHER_NODE4)), ((POD6, OTHER_POD6), (NODE6, OTHER_NODE6))],
)
def test_later_fragments_are_judged_by_their_addresses(
    pods: tuple[str, str], nodes: tuple[str, str]
) -> None:
    assert kind(packet(*pods, UDP, bytes(3), fragment=100))[0] == "clear"
    # What would be a UDP header is payload here.
    assert kind(packet(*nodes, UDP, udp(51871, 51872, b"\4\0\0\0" + bytes(28)), fragment=100))[0] == "other"


def test_ipv6_extension_headers_hide_nothing() -> None:
    hop_by_hop = bytes([60, 1]) + bytes(14)
    options = bytes([UDP, 0]) + bytes(6)
    data = packet(NODE6, OTHER_NODE6, 0, hop_by_hop + options + wireguard(4, 32))
    assert kind(data) == ("wireguard", "4")
    inner = packet(POD4, OTHER_POD4, TCP, bytes(20))
    data = packet(NODE6, OTHER_NODE6, 0, hop_by_hop + options + udp(1, 4789, bytes(8) + ethernet(inner)))
    assert kind(data)[0] == "clear"


def test_addresses_around_the_pods_networks_are_others() -> None:
    for source in ("10.243.255.255", "10.245.0.0", "198.18.0.1"):
        assert kind(packet(source, NODE4, TCP, bytes(20)))[0] == "other"
    for source in ("fd00:10:244:100::", "fd00:10:243:ffff::1"):
        assert kind(packet(source, NODE6, TCP, bytes(20)))[0] == "other"
    for source in ("10.244.0.0", "10.244.255.255"):
        assert kind(packet(source, NODE4, TCP, bytes(20)))[0] == "clear"
    assert kind(packet("fd00:10:244:ff:ffff::", NODE6, TCP, bytes(20)))[0] == "clear"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x45" + bytes(10),
        b"\x42" + bytes(30),
        b"\x60" + bytes(20),
        b"\x50" + bytes(40),
        packet(NODE4, OTHER_NODE4, UDP, bytes(4)),
        packet(NODE6, OTHER_NODE6, 0, b"\x11\x00"),
        packet(NODE4, OTHER_NODE4, UDP, udp(1, 4789, bytes(8) + bytes(9))),
        packet(NODE4, OTHER_NODE4, UDP, udp(1, 6081, bytes(3))),
        packet(NODE4, OTHER_NODE4, IPIP, b""),
        packet(NODE4, OTHER_NODE4, ICMP, b""),
    ],
)
def test_what_cannot_be_judged_is_said_to_be_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable):
        JUDGE.kind(0x86DD if data[:1] >= b"\x60" else 0x0800, data)


@given(st.binary(max_size=200), st.sampled_from([0x0800, 0x86DD]))
def test_no_packet_breaks_the_judge(data: bytes, protocol: int) -> None:
    try:
        assert JUDGE.kind(protocol, data)[0] in ("wireguard", "clear", "other")
    except Unreadable:
        pass


@given(st.binary(min_size=20, max_size=100), st.booleans())
def test_whatever_a_pod_sends_is_clear(payload: bytes, is_v4: bool) -> None:
    source, destination = (POD4, NODE4) if is_v4 else (POD6, NODE6)
    assert kind(packet(source, destination, TCP, payload))[0] == "clear"


def sll2(payload: bytes, interface: int = 5) -> bytes:
    protocol = 0x86DD if payload[0] >> 4 == 6 else 0x0800
    return struct.pack(">HHIHBB8s", protocol, 0, interface, 1, 3, 6, bytes(8)) + payload


def pcap(
    path: Path, packets: Sequence[bytes], *, link_type: int = 276, magic: int = 0xA1B2C3D4, order: str = "<"
) -> Path:
    records = (struct.pack(order + "IIII", 1, 500000, len(data), len(data)) + data for data in packets)
    path.write_bytes(struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 256, link_type) + b"".join(records))
    return path


def test_every_packet_of_a_file_is_counted_once(tmp_path: Path) -> None:
    packets = [
        sll2(packet(NODE4, OTHER_NODE4, UDP, wireguard(4, 64))),
        sll2(packet(NODE6, OTHER_NODE6, UDP, wireguard(1, 148))),
        sll2(packet(POD4, OTHER_POD4, UDP, udp(7, 8, b"x"))),
        sll2(packet(NODE4, OTHER_NODE4, TCP, bytes(20))),
        struct.pack(">HHIHBB8s", 0x0806, 0, 5, 1, 3, 6, bytes(8)) + bytes(28),
        sll2(packet(NODE4, OTHER_NODE4, UDP, bytes(2))),
    ]
    report = analyse(pcap(tmp_path / "a", packets), interfaces={5: "node1"}, dropped=3)
    assert (report.total, report.wireguard, report.clear) == (6, 2, 1)
    assert (report.other, report.non_ip, report.unreadable, report.dropped) == (1, 1, 1, 3)
    assert report.wireguard_by_type == {1: 1, 4: 1}
    assert report.examples[0] == "00:00:01.500000 node1: 10.244.1.2 > 10.244.2.3 UDP 7 > 8 (outside)"
    assert "unreadable UDP header" in report.examples[1]
    assert not report.is_complete
    assert "1 with a pod address in clear" in str(report) and report.examples[0] in str(report)


@pytest.mark.parametrize(
    ("magic", "order"), [(0xA1B2C3D4, "<"), (0xA1B2C3D4, ">"), (0xA1B23C4D, "<"), (0xA1B23C4D, ">")]
)
@pytest.mark.parametrize("link_type", [1, 101, 276])
def test_files_of_all_orders_and_links_are_read(
    tmp_path: Path, magic: int, order: str, link_type: int
) -> None:
    wraps: dict[int, Callable[[bytes], bytes]] = {1: ethernet, 101: bytes, 276: sll2}
    wrap = wraps[link_type]
    packets = [
        wrap(packet(POD6, OTHER_POD6, TCP, bytes(20))),
        wrap(packet(NODE4, OTHER_NODE4, UDP, wireguard(4, 32))),
    ]
    report = analyse(pcap(tmp_path / "a", packets, link_type=link_type, magic=magic, order=order))
    assert (report.total, report.clear, report.wireguard) == (2, 1, 1)


def test_vlan_tags_hide_nothing(tmp_path: Path) -> None:
    inner = packet(POD4, OTHER_POD4, TCP, bytes(20))
    tagged = bytes(12) + struct.pack(">HHHH", 0x88A8, 1, 0x8100, 2) + struct.pack(">H", 0x0800) + inner
    assert analyse(pcap(tmp_path / "a", [tagged], link_type=1)).clear == 1


def test_only_given_networks_and_ports_count(tmp_path: Path) -> None:
    file = pcap(
        tmp_path / "a",
        [
            sll2(packet("10.1.0.1", NODE4, TCP, bytes(20))),
            sll2(packet(NODE4, OTHER_NODE4, UDP, wireguard(4, 32))),
        ],
    )
    report = analyse(file, pods=[ipaddress.ip_network("10.1.0.0/16")], ports=[1])
    assert (report.clear, report.wireguard, report.other) == (1, 0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pcap"),
        (b"x" * 24, "no pcap"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 256, 999), "link type 999"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 256, 276) + b"123", "ends within"),
        (struct.pack("<IHHiIIIIIII", 0xA1B2C3D4, 2, 4, 0, 0, 256, 276, 1, 1, 9, 9) + b"123", "ends within"),
    ],
)
def test_files_that_are_no_recording_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(LabError, match=message):
        analyse(tmp_path / "a")


def test_what_the_recorder_has_seen_is_known_from_its_words() -> None:
    final = "tcpdump: end\n7 packets captured\n10 packets received by filter\n1 packet dropped by kernel\n"
    assert counters(final) == Counters(captured=7, received=10, dropped=1)
    asked = "tcpdump: 1 packet captured, 1 packet received by filter, 0 packets dropped by kernel\n"
    assert counters(asked) == Counters(captured=1, received=1, dropped=0)
    with pytest.raises(LabError, match="without its statistics"):
        counters("Killed")


def test_a_report_without_losses_is_complete() -> None:
    assert Report(total=0, wireguard=0, clear=0, other=0, non_ip=0, unreadable=0, dropped=0).is_complete
