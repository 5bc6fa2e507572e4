"""What doesn't fit the tunnel: MSS clamping and the ICMP errors, byte by byte."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest

from meshwire.bpf import packets as p
from meshwire.bpf._libbpf import check, library
from meshwire.bpf.layouts import AddressFlag, Direction, Reason, SettingsFlag
from meshwire.bpf.loader import TO_NETDEV, Programs
from meshwire.bpf.maps import AddressEntry, Maps, SettingsEntry
from meshwire.bpf.testrun import TC_ACT_REDIRECT, TC_ACT_SHOT, Context, run

pytestmark = pytest.mark.bpf

Address = IPv4Address | IPv6Address

IFINDEX = 7777
MTU = 1420
QUOTED = 128
ENDS: dict[int, tuple[Address, Address]] = {
    4: (ip_address("10.1.1.9"), ip_address("10.1.2.9")),
    6: (ip_address("fd00:1:0:1::9"), ip_address("fd00:1:0:2::9")),
}
IP_HEADER = {4: 20, 6: 40}
MORE_TO_COME = ((p.FRAGMENT, bytes.fromhex("00000100000001")),)
THE_REST = ((p.FRAGMENT, bytes.fromhex("0005c900000001")),)

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])


@dataclass(frozen=True)
class Outcome:
    verdict: int
    data: bytes
    reasons: dict[Reason, int]


class Datapath:
    def __init__(self, programs: Programs, maps: Maps, pins: Path) -> None:
        self.program = programs.get(TO_NETDEV)
        self.maps = maps
        self.pins = pins

    def set(self, flags: SettingsFlag = SettingsFlag.STRICT, tunnel_mtu: int = MTU) -> None:
        self.maps.settings.write(SettingsEntry(flags, 1, tunnel_mtu))

    def spend_icmp_budget(self, sent: int) -> None:
        """On every CPU, in the second that begins now."""
        cpus = library().libbpf_num_possible_cpus()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        value = (ctypes.c_uint64 * (2 * cpus))(*(now, sent) * cpus)
        budget = check(library().bpf_obj_get(bytes(self.pins / "icmp_budget")), "opening the budget")
        result = library().bpf_map_update_elem(budget, ctypes.byref(ctypes.c_uint32(0)), value, 0)
        os.close(budget)
        check(result, "writing the budget")

    def send(self, packet: bytes, *, context: Context | None = None) -> Outcome:
        before = self.maps.metrics.read()
        result = run(self.program.fd, p.frame(packet), context=context)
        after = self.maps.metrics.read()
        counted = {key: after[key].packets - before[key].packets for key in after}
        assert not any(count for (_, direction), count in counted.items() if direction is Direction.INGRESS)
        return Outcome(
            result.verdict,
            result.data,
            {reason: count for (reason, _), count in counted.items() if count},
        )


@pytest.fixture(scope="module")
def loaded(programs: Programs, maps: Maps, pins: Path) -> Iterator[Datapath]:
    for node, prefixes in {
        1: ("10.1.1.0/24", "fd00:1:0:1::/64"),
        2: ("10.1.2.0/24", "fd00:1:0:2::/64"),
    }.items():
        for prefix in prefixes:
            maps.ipcache.update(ip_network(prefix), AddressEntry(0, node, AddressFlag.POD))
    maps.nodes.update(2, IFINDEX)
    yield Datapath(programs, maps, pins)


@pytest.fixture
def datapath(loaded: Datapath) -> Datapath:
    loaded.set()
    loaded.spend_icmp_budget(0)
    return loaded


# Option bytes of a SYN, and what becomes of them where the family's limit is LLLL.
CLAMPED = {
    "an MSS that is too large": ("020405b4", "0204LLLL"),
    "the largest possible MSS": ("0204ffff", "0204LLLL"),
    "an MSS one too large": ("0204MMMM", "0204LLLL"),
    "MSS behind other options": ("0402 0303 07 0101 01 020405b4 080a 0000000100000000", None),
    "MSS across two words": ("01 020405b4 010101", "01 0204LLLL 010101"),
    "MSS across two words, behind an odd option": ("030307 020405b4 00", "030307 0204LLLL 00"),
    "MSS as the last of forty bytes": ("01" * 36 + "020405b4", "01" * 36 + "0204LLLL"),
}
UNTOUCHED = {
    "an MSS that fits": "02040200",
    "just the limit": "0204LLLL",
    "no options": "",
    "no MSS": "04020101",
    "an MSS behind the end of options": "00010101 020405b4",
    "an MSS of the wrong length": "0203 05b4 01010101",
    "an MSS cut off": "01010101 01010204",
    "an option without length": "0101010103",
    "an option of length zero": "0300 0000 020405b4",
    "an option longer than the header": "03ff 0101 01010101",
}


def options(text: str, family: int) -> bytes:
    limit = MTU - IP_HEADER[family] - 20
    data = bytes.fromhex(text.replace("LLLL", f"{limit:04x}").replace("MMMM", f"{limit + 1:04x}"))
    return data + bytes(-len(data) % 4)


def clamped_options(name: str, family: int) -> tuple[bytes, bytes]:
    offered, lowered = CLAMPED[name]
    return options(offered, family), options(lowered or offered.replace("020405b4", "0204LLLL"), family)


@pytest.mark.parametrize("flags", [p.SYN, p.SYN | p.ACK], ids=["SYN", "SYN-ACK"])
@families
@pytest.mark.parametrize("name", CLAMPED)
def test_an_offered_mss_is_lowered_with_its_checksum(
    datapath: Datapath, name: str, family: int, flags: int
) -> None:
    offered, lowered = clamped_options(name, family)
    outcome = datapath.send(p.tcp(*ENDS[family], flags=flags, options=offered))
    assert outcome.data == p.frame(p.tcp(*ENDS[family], flags=flags, options=lowered))
    assert outcome.verdict == TC_ACT_REDIRECT
    assert outcome.reasons == {Reason.MSS_CLAMPED: 1, Reason.ENCRYPTED: 1}


@families
@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_options_stay(datapath: Datapath, name: str, family: int) -> None:
    packet = p.tcp(*ENDS[family], flags=p.SYN, options=options(UNTOUCHED[name], family))
    outcome = datapath.send(packet)
    assert outcome.data == p.frame(packet)
    assert outcome.reasons == {Reason.ENCRYPTED: 1}


@families
def test_only_packets_that_open_a_connection_are_clamped(datapath: Datapath, family: int) -> None:
    packet = p.tcp(*ENDS[family], flags=p.ACK, options=bytes.fromhex("020405b4"))
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, p.frame(packet), {Reason.ENCRYPTED: 1})


@families
def test_without_a_tunnel_mtu_nothing_is_clamped_or_too_big(datapath: Datapath, family: int) -> None:
    datapath.set(tunnel_mtu=0)
    for packet in (
        p.tcp(*ENDS[family], flags=p.SYN, options=bytes.fromhex("020405b4")),
        p.tcp(*ENDS[family], payload=bytes(3000)),
    ):
        assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, p.frame(packet), {Reason.ENCRYPTED: 1})


def test_an_mss_behind_ipv4_options_and_ipv6_extensions_is_found(datapath: Datapath) -> None:
    def packets(family: int, mss: str) -> bytes:
        src, dst = ENDS[family]
        segment = p.tcp_segment(src, dst, flags=p.SYN, options=bytes.fromhex(f"0204{mss}"))
        if family == 4:
            return p.ipv4(src, dst, p.TCP, segment, options=bytes([1] * 12))
        chain = ((p.HOP_BY_HOP, bytes(7)), (p.DESTINATION_OPTIONS, bytes([1]) + bytes(14)))
        return p.ipv6(src, dst, p.TCP, segment, extensions=chain)

    assert datapath.send(packets(4, "05b4")).data == p.frame(packets(4, f"{MTU - 40:04x}"))
    assert datapath.send(packets(6, "05b4")).data == p.frame(packets(6, f"{MTU - 60:04x}"))


def test_a_later_fragment_is_no_syn(datapath: Datapath) -> None:
    for family in (4, 6):
        src, dst = ENDS[family]
        segment = p.tcp_segment(src, dst, flags=p.SYN, options=bytes.fromhex("020405b4"))
        if family == 4:
            packet = p.ipv4(src, dst, p.TCP, segment, offset=1480)
        else:
            packet = p.ipv6(src, dst, p.TCP, segment, extensions=THE_REST)
        assert datapath.send(packet).data == p.frame(packet)


def too_big_error(packet: bytes, mtu: int = MTU) -> bytes:
    """The ICMP error that answers `packet`, by the RFCs (792, 1191, 4443)."""
    quote = packet[:QUOTED]
    if packet[0] >> 4 == 4:
        src, dst = packet[12:16], packet[16:20]
        icmp = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + quote
        icmp = icmp[:2] + struct.pack("!H", p.checksum(icmp)) + icmp[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0xC0, 20 + len(icmp), 0, 0, 64, p.ICMP, 0) + dst + src
        return head[:10] + struct.pack("!H", p.checksum(head)) + head[12:] + icmp
    src, dst = packet[8:24], packet[24:40]
    icmp = struct.pack("!BBHI", 2, 0, 0, mtu) + quote
    pseudo = dst + src + struct.pack("!II", len(icmp), p.ICMPV6)
    icmp = icmp[:2] + struct.pack("!H", p.checksum(pseudo + icmp)) + icmp[4:]
    return struct.pack("!IHBB", 6 << 28, len(icmp), p.ICMPV6, 64) + dst + src + icmp


def udp_of(family: int, size: int, *, df: bool = True) -> bytes:
    """A UDP packet of `size` bytes, IP header included."""
    src, dst = ENDS[family]
    header = IP_HEADER[family]
    datagram = p.udp(src, dst, bytes(i % 251 for i in range(size - header - 8)))[header:]
    return p.ip(src, dst, p.UDP, datagram, df=df)


ANSWERED = {Reason.DROP_TOO_BIG: 1, Reason.TOO_BIG_ANSWERED: 1}


@families
@pytest.mark.parametrize("size", [MTU + 1, 1500, 3000])
def test_an_oversized_packet_is_answered(datapath: Datapath, family: int, size: int) -> None:
    packet = udp_of(family, size)
    expected = p.frame(too_big_error(packet))
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, expected, ANSWERED)


@families
def test_oversized_tcp_is_answered(datapath: Datapath, family: int) -> None:
    packet = p.tcp(*ENDS[family], payload=bytes(1460))
    expected = p.frame(too_big_error(packet))
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, expected, ANSWERED)


@families
def test_a_packet_that_just_fits_goes(datapath: Datapath, family: int) -> None:
    packet = udp_of(family, MTU)
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, p.frame(packet), {Reason.ENCRYPTED: 1})


def test_ipv4_that_may_be_fragmented_goes_as_it_is(datapath: Datapath) -> None:
    packet = udp_of(4, 1500, df=False)
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, p.frame(packet), {Reason.ENCRYPTED: 1})


def test_options_and_extensions_are_quoted(datapath: Datapath) -> None:
    src, dst = ENDS[4]
    packet = p.ipv4(src, dst, p.TCP, bytes(1440), df=True, options=bytes([1] * 40))
    assert datapath.send(packet).data == p.frame(too_big_error(packet))
    src, dst = ENDS[6]
    packet = p.ipv6(src, dst, p.UDP, bytes(1440), extensions=((p.HOP_BY_HOP, bytes([2]) + bytes(22)),))
    assert datapath.send(packet).data == p.frame(too_big_error(packet))


def test_a_first_fragment_is_answered_and_later_ones_are_dropped(datapath: Datapath) -> None:
    src, dst = ENDS[4]
    first = p.ipv4(src, dst, p.UDP, bytes(1480), df=True, more=True)
    later = p.ipv4(src, dst, p.UDP, bytes(1480), df=True, offset=1480)
    assert datapath.send(first) == Outcome(TC_ACT_REDIRECT, p.frame(too_big_error(first)), ANSWERED)
    assert datapath.send(later) == Outcome(TC_ACT_SHOT, p.frame(later), {Reason.DROP_TOO_BIG: 1})
    src, dst = ENDS[6]
    first = p.ipv6(src, dst, p.UDP, bytes(1448), extensions=MORE_TO_COME)
    later = p.ipv6(src, dst, p.UDP, bytes(1448), extensions=THE_REST)
    assert datapath.send(first) == Outcome(TC_ACT_REDIRECT, p.frame(too_big_error(first)), ANSWERED)
    assert datapath.send(later) == Outcome(TC_ACT_SHOT, p.frame(later), {Reason.DROP_TOO_BIG: 1})


@pytest.mark.parametrize("kind", [3, 4, 5, 11, 12], ids="ICMPv4 type {}".format)
def test_icmp_errors_get_no_error(datapath: Datapath, kind: int) -> None:
    packet = p.ipv4(*ENDS[4], p.ICMP, bytes([kind]) + bytes(1479), df=True)
    assert datapath.send(packet) == Outcome(TC_ACT_SHOT, p.frame(packet), {Reason.DROP_TOO_BIG: 1})


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 127], ids="ICMPv6 type {}".format)
def test_icmpv6_errors_get_no_error(datapath: Datapath, kind: int) -> None:
    packet = p.ipv6(*ENDS[6], p.ICMPV6, bytes([kind]) + bytes(1459))
    assert datapath.send(packet) == Outcome(TC_ACT_SHOT, p.frame(packet), {Reason.DROP_TOO_BIG: 1})


def test_pings_are_answered(datapath: Datapath) -> None:
    ping = p.ipv4(*ENDS[4], p.ICMP, bytes([8]) + bytes(1479), df=True)
    assert datapath.send(ping) == Outcome(TC_ACT_REDIRECT, p.frame(too_big_error(ping)), ANSWERED)
    ping = p.ipv6(*ENDS[6], p.ICMPV6, bytes([128]) + bytes(1459))
    assert datapath.send(ping) == Outcome(TC_ACT_REDIRECT, p.frame(too_big_error(ping)), ANSWERED)


@families
def test_of_a_batch_one_segment_counts(datapath: Datapath, family: int) -> None:
    batch = p.tcp(*ENDS[family], payload=bytes(3000))
    fits = MTU - IP_HEADER[family] - 20
    small = datapath.send(batch, context=Context(gso_size=fits, gso_segs=3))
    assert small == Outcome(TC_ACT_REDIRECT, p.frame(batch), {Reason.ENCRYPTED: 1})
    large = datapath.send(batch, context=Context(gso_size=fits + 1, gso_segs=3))
    assert large == Outcome(TC_ACT_REDIRECT, p.frame(too_big_error(batch)), ANSWERED)


@families
def test_tcp_options_count_in_a_batch(datapath: Datapath, family: int) -> None:
    batch = p.tcp(*ENDS[family], options=bytes([1] * 12), payload=bytes(3000))
    fits = MTU - IP_HEADER[family] - 32
    assert datapath.send(batch, context=Context(gso_size=fits, gso_segs=3)).reasons == {Reason.ENCRYPTED: 1}
    assert datapath.send(batch, context=Context(gso_size=fits + 1, gso_segs=3)).reasons == ANSWERED


@families
def test_a_batch_of_udp(datapath: Datapath, family: int) -> None:
    batch = udp_of(family, 3000)
    fits = MTU - IP_HEADER[family] - 8
    assert datapath.send(batch, context=Context(gso_size=fits, gso_segs=3)).reasons == {Reason.ENCRYPTED: 1}
    assert datapath.send(batch, context=Context(gso_size=fits + 1, gso_segs=3)).reasons == ANSWERED


@families
def test_errors_end_with_the_budget(datapath: Datapath, family: int) -> None:
    packet = udp_of(family, 1500)
    while True:
        started = time.monotonic()
        datapath.spend_icmp_budget(255)
        answered, silent = datapath.send(packet), datapath.send(packet)
        # A new second brings a new budget: only a run within one says anything.
        if time.monotonic() - started < 0.5:
            break
    assert answered.reasons == ANSWERED
    assert silent == Outcome(TC_ACT_SHOT, p.frame(packet), {Reason.DROP_TOO_BIG: 1})


@families
def test_while_cutting_over_an_unanswerable_packet_goes_anyway(datapath: Datapath, family: int) -> None:
    datapath.set(SettingsFlag.PASS_OVERSIZED)
    src, dst = ENDS[family]
    if family == 4:
        packet = p.ipv4(src, dst, p.UDP, bytes(1480), df=True, offset=1480)
    else:
        packet = p.ipv6(src, dst, p.UDP, bytes(1448), extensions=THE_REST)
    assert datapath.send(packet) == Outcome(TC_ACT_REDIRECT, p.frame(packet), {Reason.ENCRYPTED: 1})


@families
def test_while_cutting_over_an_oversized_packet_is_answered_too(datapath: Datapath, family: int) -> None:
    datapath.set(SettingsFlag.PASS_OVERSIZED)
    packet = udp_of(family, 1500)
    outcome = datapath.send(packet)
    assert outcome.data == p.frame(too_big_error(packet))
    assert outcome.reasons == {Reason.ENCRYPTED: 1, Reason.TOO_BIG_ANSWERED: 1}
