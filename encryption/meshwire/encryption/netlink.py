"""Links, addresses and routes through rtnetlink, sysctls through /proc/sys. No opinion on what they should
be."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any, Final

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.api.fields import Address
from meshwire.encryption.model import DEVICE_ADDRESS, DEVICES, Link, Route

# linux/if_arp.h and linux/if.h
_ARPHRD_ETHER: Final = 1
_IFF_UP: Final = 1
# linux/netlink.h and linux/rtnetlink.h
_NLMSG: Final = struct.Struct("=IHHII")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_RTATTR: Final = struct.Struct("=HH")
_RTNEXTHOP: Final = struct.Struct("=HBBi")
_U32: Final = struct.Struct("=I")
_NLM_F_REQUEST: Final = 0x1
_NLM_F_DUMP: Final = 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_RTM_NEWROUTE: Final = 24
_RTM_GETROUTE: Final = 26
_RTM_F_CLONED: Final = 0x200
_RTA_DST: Final = 1
_RTA_OIF: Final = 4
_RTA_MULTIPATH: Final = 9
_RTA_TABLE: Final = 15
_RTN_UNICAST: Final = 1
_RT_TABLE_LOCAL: Final = 255
QUEUE_LENGTH: Final = 8192
"""Packets that a userspace device holds while its process gets no processor; a TUN's 500 are a few tens of
milliseconds."""
_ETH_P_IP: Final = 0x0800
_ETH_P_IPV6: Final = 0x86DD
_RT_SCOPE_HOST: Final = 254
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)

# RTMGRP_LINK, _TC, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS: Final = 0x1 | 0x8 | 0x10 | 0x40 | 0x100 | 0x400


def open_monitor() -> socket.socket:
    """A non-blocking socket that becomes readable when a link, address, route or TC filter changes. What
    comes out matters to nobody: it only says when to look again, even if messages were lost."""
    monitor = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    monitor.setblocking(False)
    monitor.bind((0, _GROUPS))
    return monitor


def observe_links(ipr: IPRoute) -> dict[str, Link]:
    """Every device with its addresses, by name. Raises NetlinkError."""
    addresses: dict[int, set[Address]] = {}
    for message in ipr.addr("dump"):
        # A point-to-point address names its own end in IFA_LOCAL.
        if text := message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"):
            addresses.setdefault(message["index"], set()).add(ip_address(text))
    links = (
        Link(
            index=message["index"],
            name=message.get_attr("IFLA_IFNAME"),
            kind=_kind(message),
            up=bool(message["flags"] & _IFF_UP),
            mtu=message.get_attr("IFLA_MTU") or 0,
            ethernet=message["ifi_type"] == _ARPHRD_ETHER,
            addresses=frozenset(addresses.get(message["index"], ())),
        )
        for message in ipr.link("dump")
    )
    return {link.name: link for link in links}


def observe_routes() -> tuple[Route, ...]:
    """Unicast routes of every table but `local`, of the network namespace that the thread is in. Raises
    OSError."""
    return tuple(
        route for family in _FAMILIES for message in _dump_routes(family) for route in _read_route(message)
    )


def _dump_routes(family: int) -> Iterator[bytes]:
    """Messages from `struct rtmsg` on. By hand: a node has a route for each other one, and pyroute2, which
    reads whatever may be in a message, takes a fifth of a millisecond for it."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as sock:
        body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        head = _NLMSG.pack(_NLMSG.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        sock.send(head + body)
        while True:
            data = sock.recv(1 << 17)
            at = 0
            while at < len(data):
                length, kind, _, _, _ = _NLMSG.unpack_from(data, at)
                content = data[at + _NLMSG.size : at + length]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    error = -int.from_bytes(content[:4], sys.byteorder, signed=True)
                    raise OSError(error, f"reading routes: {os.strerror(error)}")
                if kind == _RTM_NEWROUTE:
                    yield content
                at += length + 3 & ~3


def _read_route(message: bytes) -> Iterator[Route]:
    family, length, _, _, table, _, _, kind, flags = _RTMSG.unpack_from(message)
    # IPv6 lists multicast and cloned routes among the others.
    if kind != _RTN_UNICAST or flags & _RTM_F_CLONED:
        return
    destination, interfaces = bytes(4 if family == socket.AF_INET else 16), []
    for name, value in _attributes(message, _RTMSG.size):
        if name == _RTA_DST:
            destination = value
        elif name == _RTA_TABLE:
            (table,) = _U32.unpack(value)
        elif name == _RTA_OIF:
            interfaces.append(_U32.unpack(value)[0])
        elif name == _RTA_MULTIPATH:
            interfaces += _hops(value)
    if interfaces and table != _RT_TABLE_LOCAL:
        network = IPv4Network if family == socket.AF_INET else IPv6Network
        yield Route(network((destination, length)), tuple(interfaces))


def _attributes(message: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """From a place in a message on."""
    while at + _RTATTR.size <= len(message):
        length, name = _RTATTR.unpack_from(message, at)
        yield name & 0x3FFF, message[at + _RTATTR.size : at + length]
        at += max(_RTATTR.size, length + 3 & ~3)


def _hops(value: bytes) -> Iterator[int]:
    """Indexes of the devices of a route with several."""
    at = 0
    while at + _RTNEXTHOP.size <= len(value):
        length, _, _, index = _RTNEXTHOP.unpack_from(value, at)
        yield index
        at += max(_RTNEXTHOP.size, length + 3 & ~3)


def _kind(message: Any) -> str:
    information = message.get_attr("IFLA_LINKINFO")
    return (information.get_attr("IFLA_INFO_KIND") if information else None) or ""


def open_sender() -> socket.socket:
    """For `send_ip`; it receives nothing. Raises PermissionError without CAP_NET_RAW."""
    return socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)


def send_ip(sender: socket.socket, device: str, packet: bytes) -> None:
    """An IP packet out of a device, whatever routes say: no route leads into a tunnel. Raises OSError."""
    protocol = _ETH_P_IP if packet[0] >> 4 == 4 else _ETH_P_IPV6
    sender.sendto(packet, (device, protocol))


def kernel_has_wireguard(ipr: IPRoute) -> bool:
    """Whether the kernel makes WireGuard devices; asking loads the module where there is one. Raises
    NetlinkError."""
    probe = "meshwire_probe"
    try:
        ipr.link("add", ifname=probe, kind="wireguard")
    except NetlinkError as error:
        if error.code == errno.EOPNOTSUPP:
            return False
        if error.code != errno.EEXIST:
            raise
    delete_link(ipr, probe)
    return True


def create_wireguard(ipr: IPRoute, name: str) -> None:
    """A kernel WireGuard device, down. Raises NetlinkError."""
    _check_ours(name)
    ipr.link("add", ifname=name, kind="wireguard")


def delete_link(ipr: IPRoute, name: str) -> None:
    """A device that is gone already is no error. Raises NetlinkError."""
    if (index := find_index(ipr, name)) is None:
        return
    try:
        ipr.link("del", index=index)
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise


def find_index(ipr: IPRoute, name: str) -> int | None:
    """None where there is no such device. Raises NetlinkError."""
    try:
        found = socket.if_nametoindex(name)
    except OSError:
        return None
    return found


def set_up(ipr: IPRoute, name: str, *, mtu: int, add_address: bool) -> None:
    """Raises NetlinkError, ENODEV where the device is gone."""
    _check_ours(name)
    index = find_index(ipr, name)
    if index is None:
        raise NetlinkError(errno.ENODEV, f"no device {name}")
    # Before it is up: the queue takes its length from the device then. WireGuard in the kernel has none.
    ipr.link("set", index=index, mtu=mtu, txqlen=QUEUE_LENGTH)
    if add_address:
        try:
            # Scope host: never the source of a packet that leaves the node.
            ipr.addr("add", index=index, address=str(DEVICE_ADDRESS), prefixlen=32, scope=_RT_SCOPE_HOST)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
    ipr.link("set", index=index, state="up")


def read_sysctls(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Those that exist: a kernel without IPv6 has none of its."""
    found = {}
    for path in paths:
        try:
            found[path] = (root / path).read_text().strip()
        except FileNotFoundError:
            continue
    return found


def write_sysctl(root: Path, path: str, value: str) -> None:
    """One that doesn't exist is no error. Raises OSError, e.g. where /proc/sys is mounted read-only."""
    try:
        (root / path).write_text(value)
    except FileNotFoundError:
        return


def _check_ours(name: str) -> None:
    if name not in DEVICES:
        raise ValueError(f"{name} is not Meshwire's to change")
