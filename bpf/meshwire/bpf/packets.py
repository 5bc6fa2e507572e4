"""Builds packets byte by byte, for tests and measurements of the programs. Pure."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final

Address = IPv4Address | IPv6Address

ETH_P_IP: Final = 0x0800
ETH_P_ARP: Final = 0x0806
ETH_P_8021Q: Final = 0x8100
ETH_P_IPV6: Final = 0x86DD
ETH_P_8021AD: Final = 0x88A8
ETH_P_TEB: Final = 0x6558

HOP_BY_HOP: Final = 0
ICMP: Final = 1
IGMP: Final = 2
IPIP: Final = 4
TCP: Final = 6
UDP: Final = 17
IPV6: Final = 41
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
ICMPV6: Final = 58
DESTINATION_OPTIONS: Final = 60
SCTP: Final = 132

VXLAN_PORT: Final = 4789
VXLAN_PORT_LINUX: Final = 8472
GENEVE_PORT: Final = 6081

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

ETHERNET_BYTES: Final = 14
_MAC_DESTINATION: Final = bytes.fromhex("020000000002")
_MAC_SOURCE: Final = bytes.fromhex("020000000001")


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071); 0 for data that holds its own right one."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(src: Address, dst: Address, protocol: int, length: int) -> bytes:
    """What transport checksums cover besides the segment of `length` bytes."""
    if src.version == 4:
        return src.packed + dst.packed + struct.pack("!BBH", 0, protocol, length)
    return src.packed + dst.packed + struct.pack("!II", length, protocol)


def ethernet(payload: bytes, kind: int, *, tags: tuple[int, ...] = ()) -> bytes:
    """A frame; `tags` are the types of VLAN tags, outermost first."""
    types = (*tags, kind)
    header = _MAC_DESTINATION + _MAC_SOURCE + struct.pack("!H", types[0])
    return header + b"".join(struct.pack("!HH", 7, following) for following in types[1:]) + payload


def frame(packet: bytes, *, tags: tuple[int, ...] = ()) -> bytes:
    """The frame of an IP packet."""
    return ethernet(packet, ETH_P_IPV6 if packet[0] >> 4 == 6 else ETH_P_IP, tags=tags)


def ipv4(
    src: Address,
    dst: Address,
    protocol: int,
    payload: bytes,
    *,
    df: bool = False,
    more: bool = False,
    offset: int = 0,
    identification: int = 1,
    ttl: int = 64,
    options: bytes = b"",
) -> bytes:
    """`offset` of a fragment is in bytes; `options` are padded to four bytes."""
    options += bytes(-len(options) % 4)
    length = 20 + len(options)
    flags = df << 14 | more << 13 | offset // 8
    head = struct.pack(
        "!BBHHHBBH",
        4 << 4 | length // 4,
        0,
        length + len(payload),
        identification,
        flags,
        ttl,
        protocol,
        0,
    )
    header = head + src.packed + dst.packed + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def ipv6(
    src: Address,
    dst: Address,
    protocol: int,
    payload: bytes,
    *,
    hop_limit: int = 64,
    extensions: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """`extensions` are (type, all of the header but its first byte)."""
    kinds = (*(kind for kind, _ in extensions), protocol)
    chain = b"".join(
        bytes([following]) + rest for (_, rest), following in zip(extensions, kinds[1:], strict=True)
    )
    head = struct.pack("!IHBB", 6 << 28, len(chain) + len(payload), kinds[0], hop_limit)
    return head + src.packed + dst.packed + chain + payload


def ip(src: Address, dst: Address, protocol: int, payload: bytes, *, df: bool = False) -> bytes:
    """A plain packet of the family of its addresses."""
    if src.version == 4:
        return ipv4(src, dst, protocol, payload, df=df)
    return ipv6(src, dst, protocol, payload)


def udp(src: Address, dst: Address, payload: bytes, *, sport: int = 40000, dport: int = 53) -> bytes:
    """A UDP packet."""
    length = 8 + len(payload)
    head = struct.pack("!HHH", sport, dport, length)
    summed = checksum(pseudo_header(src, dst, UDP, length) + head + b"\0\0" + payload)
    return ip(src, dst, UDP, head + struct.pack("!H", summed or 0xFFFF) + payload)


def tcp_segment(
    src: Address,
    dst: Address,
    *,
    flags: int,
    sport: int = 40000,
    dport: int = 80,
    options: bytes = b"",
    payload: bytes = b"",
) -> bytes:
    """A TCP segment without IP header; `options` have to fill four bytes."""
    length = 20 + len(options)
    head = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, length // 4 << 4, flags, 65535, 0, 0) + options
    total = pseudo_header(src, dst, TCP, length + len(payload)) + head + payload
    return head[:16] + struct.pack("!H", checksum(total)) + head[18:] + payload


def tcp(
    src: Address,
    dst: Address,
    *,
    flags: int = ACK,
    sport: int = 40000,
    dport: int = 80,
    options: bytes = b"",
    payload: bytes = b"",
) -> bytes:
    """A TCP packet with DF, as TCP sends them."""
    segment = tcp_segment(src, dst, flags=flags, sport=sport, dport=dport, options=options, payload=payload)
    return ip(src, dst, TCP, segment, df=True)


def icmp_message(src: Address, dst: Address, kind: int, code: int, rest: bytes) -> bytes:
    """An ICMP message of the addresses' family without IP header; `rest` is what follows the checksum."""
    head = struct.pack("!BBH", kind, code, 0)
    covered = head + rest
    if src.version == 6:
        covered = pseudo_header(src, dst, ICMPV6, len(covered)) + covered
    return head[:2] + struct.pack("!H", checksum(covered)) + rest


def icmp(src: Address, dst: Address, kind: int, *, code: int = 0, rest: bytes = bytes(4)) -> bytes:
    """An ICMP packet of the addresses' family."""
    protocol = ICMP if src.version == 4 else ICMPV6
    return ip(src, dst, protocol, icmp_message(src, dst, kind, code, rest))


def vxlan(src: Address, dst: Address, inner: bytes, *, port: int = VXLAN_PORT, flags: int = 0x08) -> bytes:
    """A VXLAN packet around a frame."""
    return udp(src, dst, struct.pack("!BxxxI", flags, 1 << 8) + inner, dport=port)


def geneve(
    src: Address,
    dst: Address,
    inner: bytes,
    *,
    kind: int = ETH_P_TEB,
    options: bytes = b"",
    version: int = 0,
) -> bytes:
    """A Geneve packet around a frame, or with another `kind` a bare packet."""
    header = struct.pack("!BBHI", version << 6 | len(options) // 4, 0, kind, 1 << 8)
    return udp(src, dst, header + options + inner, dport=GENEVE_PORT)


def ipip(src: Address, dst: Address, inner: bytes) -> bytes:
    """A packet right inside of another, of either family."""
    return ip(src, dst, IPV6 if inner[0] >> 4 == 6 else IPIP, inner)
