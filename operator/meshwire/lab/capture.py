"""Records the underlay's wire and judges what was on it: how many packets were WireGuard's, and how many
showed a pod's address to whoever listens. `analyse` is pure but for reading the file; `Capture` runs
tcpdump."""

from __future__ import annotations

import datetime
import ipaddress
import re
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from meshwire.lab import processes
from meshwire.lab.model import BRIDGE, PODS, UNDERLAY_NETNS, LabError, Network

WIREGUARD_PORTS: Final = (51871, 51872)
SNAP_LENGTH: Final = 256
"""Bytes kept of each packet: all headers, also of a packet inside of another."""
BUFFER_KIB: Final = 32 * 1024
DRAIN_SECONDS: Final = 30.0
"""How long tcpdump may take to write what it has been given: on an emulated machine it falls behind."""
MAX_EXAMPLES: Final = 20

LINKTYPE_ETHERNET: Final = 1
LINKTYPE_RAW: Final = 101
LINKTYPE_LINUX_SLL2: Final = 276

ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
ETH_P_8021Q: Final = 0x8100
ETH_P_8021AD: Final = 0x88A8
ETH_P_TEB: Final = 0x6558

IPPROTO_HOPOPTS: Final = 0
IPPROTO_ICMP: Final = 1
IPPROTO_IPIP: Final = 4
IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
IPPROTO_IPV6: Final = 41
IPPROTO_ROUTING: Final = 43
IPPROTO_FRAGMENT: Final = 44
IPPROTO_AH: Final = 51
IPPROTO_ICMPV6: Final = 58
IPPROTO_DSTOPTS: Final = 60

VXLAN_PORTS: Final = (4789, 8472)
GENEVE_PORT: Final = 6081

WIREGUARD_LENGTHS: Final = {1: 148, 2: 92, 3: 64}
"""Message type -> bytes; transport data (4) is 32 and a multiple of 16."""


_DATA: Final = f"({' or '.join(f'udp port {port}' for port in WIREGUARD_PORTS)}) and udp[8:4] = 0x04000000"
"""As a filter: what begins like WireGuard's data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was on the wire. Every packet is one of `wireguard`, `clear`, `other`, `non_ip`, `unreadable`."""

    total: int
    wireguard: int
    clear: int
    """With a pod's address in an IP header that anybody on the wire can read."""
    other: int
    """IP without a pod's address, e.g. between nodes and the API server."""
    non_ip: int
    unreadable: int
    """Cut short or impossible, so that nobody can say what they carried."""
    dropped: int
    """Seen by the kernel but not recorded: with any, the rest proves nothing."""
    wireguard_by_type: Mapping[int, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    """The first clear and unreadable packets, one line each."""

    @property
    def is_complete(self) -> bool:
        """Whether every packet was recorded and understood."""
        return self.dropped == 0 and self.unreadable == 0

    def __str__(self) -> str:
        lines = [
            f"{self.total} packets: {self.wireguard} WireGuard, {self.clear} with a pod address in clear,"
            f" {self.other} other IP, {self.non_ip} not IP, {self.unreadable} unreadable;"
            f" {self.dropped} not recorded"
        ]
        return "\n".join([*lines, *(f"  {example}" for example in self.examples)])


@dataclass(frozen=True, slots=True)
class Frame:
    """One recorded packet from its network header on. `time` is in seconds since 1970, `interface` an
    ifindex or 0."""

    time: float
    interface: int
    protocol: int
    data: bytes


class Unreadable(Exception):
    """A packet ends too early or contradicts itself."""


@dataclass(frozen=True, slots=True)
class _Header:
    """An IP header: addresses as integers, `end` the offset of what it carries (of protocol `protocol`)."""

    version: int
    source: int
    destination: int
    protocol: int
    end: int
    is_later_fragment: bool


@dataclass(frozen=True, slots=True)
class Judge:
    """Says what one packet is."""

    pods: tuple[tuple[int, int, int], ...]
    """(IP version, network, mask)"""
    ports: frozenset[int]

    @classmethod
    def of(cls, pods: Iterable[Network], ports: Iterable[int] = WIREGUARD_PORTS) -> Judge:
        networks = ((net.version, int(net.network_address), int(net.netmask)) for net in pods)
        return cls(tuple(networks), frozenset(ports))

    def kind(self, protocol: int, data: bytes) -> tuple[str, str]:
        """(`wireguard`, `clear`, `other` or `non_ip`; its WireGuard type or, where clear, who talks to
        whom). Raises Unreadable."""
        if protocol not in (ETH_P_IP, ETH_P_IPV6):
            return "non_ip", ""
        if found := self._find_pods(data, "outside"):
            return "clear", found
        if wireguard := self._wireguard_type(data):
            return "wireguard", str(wireguard)
        return "other", ""

    def _is_pod(self, version: int, address: int) -> bool:
        return any(version == family and address & mask == network for family, network, mask in self.pods)

    def _find_pods(self, data: bytes, where: str) -> str:
        """Text about the first header, from the outside in, that names a pod; else empty."""
        header = _parse_ip(data)
        if self._is_pod(header.version, header.source) or self._is_pod(header.version, header.destination):
            return f"{_text(header, data)} ({where})"
        if header.is_later_fragment:
            return ""
        inner = data[header.end :]
        match header.protocol:
            case 4 | 41:  # IPPROTO_IPIP, IPPROTO_IPV6
                return self._find_pods(inner, "inside IP-in-IP")
            case 17:  # IPPROTO_UDP
                return self._find_pods_in_udp(inner)
            case 1 | 58:  # IPPROTO_ICMP, IPPROTO_ICMPV6
                return self._find_pods_in_icmp(header.protocol, inner)
        return ""

    def _find_pods_in_udp(self, data: bytes) -> str:
        source, destination, _ = _parse_udp(data)
        # A tunnel's source port is a hash of what it carries; only the destination names it.
        if destination in VXLAN_PORTS:
            return self._find_pods_in_ethernet(data[8 + 8 :], "inside VXLAN")
        if destination == GENEVE_PORT:
            if len(data) < 16:
                raise Unreadable("Geneve header")
            inner = data[8 + 8 + 4 * (data[8] & 0x3F) :]
            if (protocol := int.from_bytes(data[10:12])) == ETH_P_TEB:
                return self._find_pods_in_ethernet(inner, "inside Geneve")
            if protocol in (ETH_P_IP, ETH_P_IPV6):
                return self._find_pods(inner, "inside Geneve")
        return ""

    def _find_pods_in_ethernet(self, data: bytes, where: str) -> str:
        protocol, inner = _strip_ethernet(data)
        return self._find_pods(inner, where) if protocol in (ETH_P_IP, ETH_P_IPV6) else ""

    def _find_pods_in_icmp(self, protocol: int, data: bytes) -> str:
        """Errors quote the packet they are about."""
        if not data:
            raise Unreadable("ICMP header")
        is_error = data[0] in (3, 4, 5, 11, 12) if protocol == IPPROTO_ICMP else data[0] < 128
        if not is_error or len(data) <= 8:
            return ""
        try:
            return self._find_pods(data[8:], "quoted by ICMP")
        except Unreadable:
            # A quotation may end anywhere; what it didn't quote it didn't show.
            return ""

    def _wireguard_type(self, data: bytes) -> int:
        header = _parse_ip(data)
        if header.protocol != IPPROTO_UDP or header.is_later_fragment:
            return 0
        source, destination, length = _parse_udp(data[header.end :])
        if not {source, destination} & self.ports:
            return 0
        message = data[header.end + 8 : header.end + 12]
        if len(message) < 4 or message[1:] != b"\0\0\0":
            return 0
        kind = message[0]
        if kind == 4:
            return 4 if length >= 32 and length % 16 == 0 else 0
        return kind if WIREGUARD_LENGTHS.get(kind) == length else 0


def analyse(
    *paths: Path,
    pods: Iterable[Network] = tuple(PODS.values()),
    ports: Iterable[int] = WIREGUARD_PORTS,
    dropped: int = 0,
    interfaces: Mapping[int, str] | None = None,
) -> Report:
    """Judges the packets of pcap files. `dropped` is what their recorder says it missed, `interfaces` gives
    names to ifindexes. Raises LabError for a file that is no pcap or ends within a packet."""
    judge = Judge.of(pods, ports)
    kinds: Counter[str] = Counter()
    types: Counter[int] = Counter()
    examples: list[str] = []
    for path in paths:
        with path.open("rb") as stream:
            for frame in read_pcap(stream, str(path)):
                try:
                    kind, detail = judge.kind(frame.protocol, frame.data)
                except Unreadable as error:
                    kind, detail = "unreadable", f"unreadable {error}: {frame.data[:48].hex()}"
                kinds[kind] += 1
                if kind == "wireguard":
                    types[int(detail)] += 1
                elif detail and len(examples) < MAX_EXAMPLES:
                    when = datetime.datetime.fromtimestamp(frame.time, datetime.UTC).strftime("%H:%M:%S.%f")
                    port = (interfaces or {}).get(frame.interface, f"if{frame.interface}")
                    examples.append(f"{when} {port}: {detail}")
    return Report(
        total=kinds.total(),
        wireguard=kinds["wireguard"],
        clear=kinds["clear"],
        other=kinds["other"],
        non_ip=kinds["non_ip"],
        unreadable=kinds["unreadable"],
        dropped=dropped,
        wireguard_by_type=dict(sorted(types.items())),
        examples=tuple(examples),
    )


def read_pcap(stream: BinaryIO, name: str) -> Iterator[Frame]:
    """The packets of a pcap file of Ethernet, raw IP or Linux cooked (v2) packets. Raises LabError."""
    header = stream.read(24)
    orders = {
        0xA1B2C3D4: ("<", 1e-6),
        0xD4C3B2A1: (">", 1e-6),
        0xA1B23C4D: ("<", 1e-9),
        0x4D3CB2A1: (">", 1e-9),
    }
    magic = int.from_bytes(header[:4], "little")
    if len(header) < 24 or magic not in orders:
        raise LabError(f"{name} is no pcap file")
    order, unit = orders[magic]
    link_type = struct.unpack(order + "I", header[20:])[0] & 0x0FFFFFFF
    if link_type not in (LINKTYPE_ETHERNET, LINKTYPE_RAW, LINKTYPE_LINUX_SLL2):
        raise LabError(f"{name}: link type {link_type} is not known here")
    record = struct.Struct(order + "IIII")
    while head := stream.read(16):
        if len(head) < 16:
            raise LabError(f"{name} ends within a packet")
        seconds, fraction, length, _ = record.unpack(head)
        data = stream.read(length)
        if len(data) < length:
            raise LabError(f"{name} ends within a packet")
        yield _frame(seconds + fraction * unit, link_type, data)


def _frame(when: float, link_type: int, data: bytes) -> Frame:
    if link_type == LINKTYPE_LINUX_SLL2:
        return Frame(when, int.from_bytes(data[4:8]), int.from_bytes(data[:2]), data[20:])
    if link_type == LINKTYPE_RAW:
        return Frame(when, 0, ETH_P_IPV6 if data[:1] >= b"\x60" else ETH_P_IP, data)
    protocol, inner = _strip_ethernet(data) if len(data) >= 14 else (0, data)
    return Frame(when, 0, protocol, inner)


def _strip_ethernet(data: bytes) -> tuple[int, bytes]:
    """(protocol, what follows), past VLAN tags. Raises Unreadable."""
    offset = 12
    while True:
        protocol = int.from_bytes(data[offset : offset + 2])
        if len(data) < offset + 2:
            raise Unreadable("Ethernet header")
        if protocol not in (ETH_P_8021Q, ETH_P_8021AD):
            return protocol, data[offset + 2 :]
        offset += 4


def _parse_ip(data: bytes) -> _Header:
    version = data[0] >> 4 if data else 0
    if version == 4:
        end = (data[0] & 15) * 4
        if end < 20 or len(data) < end:
            raise Unreadable("IPv4 header")
        fragment = int.from_bytes(data[6:8]) & 0x1FFF
        source, destination = int.from_bytes(data[12:16]), int.from_bytes(data[16:20])
        return _Header(4, source, destination, data[9], end, fragment != 0)
    if version == 6:
        if len(data) < 40:
            raise Unreadable("IPv6 header")
        protocol, end, is_later_fragment = _skip_extensions(data)
        source, destination = int.from_bytes(data[8:24]), int.from_bytes(data[24:40])
        return _Header(6, source, destination, protocol, end, is_later_fragment)
    raise Unreadable(f"IP version {version}")


def _skip_extensions(data: bytes) -> tuple[int, int, bool]:
    """(protocol, its offset, whether this is a fragment without it)"""
    protocol, offset = data[6], 40
    while protocol in (IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_FRAGMENT, IPPROTO_AH, IPPROTO_DSTOPTS):
        if len(data) < offset + 8:
            raise Unreadable("IPv6 extension header")
        length = data[offset + 1]
        match protocol:
            case 44:  # IPPROTO_FRAGMENT
                if int.from_bytes(data[offset + 2 : offset + 4]) & 0xFFF8:
                    return data[offset], offset + 8, True
                size = 8
            case 51:  # IPPROTO_AH
                size = (length + 2) * 4
            case _:
                size = (length + 1) * 8
        protocol, offset = data[offset], offset + size
    return protocol, offset, False


def _parse_udp(data: bytes) -> tuple[int, int, int]:
    """(source port, destination port, bytes of payload)"""
    if len(data) < 8:
        raise Unreadable("UDP header")
    source, destination, length, _ = struct.unpack(">HHHH", data[:8])
    return source, destination, length - 8


def _text(header: _Header, data: bytes) -> str:
    make = ipaddress.IPv4Address if header.version == 4 else ipaddress.IPv6Address
    names = {IPPROTO_TCP: "TCP", IPPROTO_UDP: "UDP", IPPROTO_ICMP: "ICMP", IPPROTO_ICMPV6: "ICMPv6"}
    protocol = names.get(header.protocol, f"protocol {header.protocol}")
    ports = ""
    if header.protocol in (IPPROTO_TCP, IPPROTO_UDP) and not header.is_later_fragment:
        source, destination = (int.from_bytes(data[header.end + i : header.end + i + 2]) for i in (0, 2))
        ports = f" {source} > {destination}"
    return f"{make(header.source)} > {make(header.destination)} {protocol}{ports}"


class Capture:
    """tcpdump on all ports of the underlay, also those of nodes that come later. Each packet is recorded
    once, as it enters the wire. Used as a context manager; `report` is there afterwards. Without `data`
    WireGuard's own data (message type 4) is left out over IPv4: a record of hours stays small."""

    def __init__(
        self,
        path: Path,
        *,
        lab_id: str = "",
        data: bool = True,
        netns: str = UNDERLAY_NETNS,
        bridge: str = BRIDGE,
        pods: Sequence[Network] = tuple(PODS.values()),
    ) -> None:
        self.path = path
        self.report: Report | None = None
        self._pods = pods
        self._without = "" if data else f" and not ({_DATA})"
        self._netns = netns
        self._bridge = bridge
        self._env = processes.environment(lab_id)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Capture:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when packets are being recorded. Raises LabError."""
        bridge = self._interfaces(self._bridge)
        if not bridge:
            raise LabError(f"no bridge {self._bridge} in {self._netns}")
        command = [
            *processes.in_namespaces(self._netns),
            *("tcpdump", "--interface=any", "--linktype=LINUX_SLL2", "--immediate-mode"),
            *("-n", "-U", f"--snapshot-length={SNAP_LENGTH}", f"--buffer-size={BUFFER_KIB}"),
            # Without it tcpdump gives up root before it opens the file.
            *("--relinquish-privileges=root", "-w", str(self.path)),
            # The bridge shows some of what its ports have shown already. (--direction=in is judged in
            # tcpdump after the kernel has counted the packet: its statistics would tell of losses that are
            # none.)
            f"inbound and not ifindex {next(iter(bridge))}{self._without}",
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self._env,
            start_new_session=True,
        )
        assert self._process.stderr
        said = ""
        while "listening on" not in said:
            if not (line := self._process.stderr.readline()):
                raise LabError(f"tcpdump: {said.strip()}")
            said += line

    def stop(self) -> Report:
        """Ends the recording and judges it."""
        process, self._process = self._process, None
        if process is None or process.stderr is None:
            raise LabError("no capture runs")
        interfaces = self._interfaces()
        # What is on the wire by now, belongs in the record; what comes while we are at it, doesn't.
        process.send_signal(signal.SIGUSR1)
        now = counters(process.stderr.readline())
        deadline = time.monotonic() + DRAIN_SECONDS
        last = now
        while last.captured + last.dropped < now.received and time.monotonic() < deadline:
            time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            last = counters(process.stderr.readline())
        process.send_signal(signal.SIGINT)
        last = counters(process.stderr.read())
        process.stderr.close()
        process.wait()
        unread = max(0, now.received - last.captured - last.dropped)
        self.report = analyse(
            self.path, pods=self._pods, dropped=last.dropped + unread, interfaces=interfaces
        )
        return self.report

    def _interfaces(self, name: str = "") -> dict[int, str]:
        """Ifindex -> name in the capture's namespace."""
        command = ["ip", "-n", self._netns, "-o", "link", "show", *([name] if name else [])]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return {int(match[1]): match[2] for line in lines if (match := re.match(r"(\d+): ([^:@]+)", line))}


@dataclass(frozen=True, slots=True)
class Counters:
    """Packets: read by tcpdump, that passed its filter in the kernel, and of these lost for want of room."""

    captured: int
    received: int
    dropped: int


def counters(statistics: str) -> Counters:
    """From what tcpdump says at its end, or at SIGUSR1. Raises LabError where it doesn't."""
    found = [
        re.search(rf"(\d+) packets? {what}\b", statistics)
        for what in ("captured", "received by filter", "dropped by kernel")
    ]
    captured, received, dropped = (int(match[1]) if match else None for match in found)
    if captured is None or received is None or dropped is None:
        raise LabError(f"tcpdump ended without its statistics: {statistics.strip()}")
    return Counters(captured, received, dropped)
