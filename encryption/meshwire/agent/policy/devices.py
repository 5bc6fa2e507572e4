"""The host's end of a pod's veth, found from what the kernel knows: any CNI that uses veths will do."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.encryption.model import Link

# linux/rtnetlink.h
_RTN_UNICAST: Final = 1
_FAMILIES: Final = {4: socket.AF_INET, 16: socket.AF_INET6}


def find_pod_device(ipr: IPRoute, address: bytes, links: Mapping[int, Link]) -> int | None:
    """Index of the device by which the node reaches a pod of its own, or None where there is none yet.
    `address` is packed, `links` are all devices by index. Through a bridge it is the port that leads to the
    pod, once the node and the pod have talked. Raises NetlinkError."""
    index = _route(ipr, address)
    link = links.get(index) if index is not None else None
    if link is None:
        return None
    if link.kind == "veth":
        return link.index
    if link.kind != "bridge":
        # The CNI has made no route yet, so this is the way to somewhere else.
        return None
    hardware = _neighbour(ipr, address, link.index)
    if hardware is None:
        _ask(address)
        return None
    port = _port(ipr, hardware, link.index)
    return port if port is not None and port in links and links[port].kind == "veth" else None


def _route(ipr: IPRoute, address: bytes) -> int | None:
    try:
        messages = ipr.route("get", dst=str(ip_address(address)), family=_FAMILIES[len(address)])
    except NetlinkError as error:
        if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return None
        raise
    for message in messages:
        if message["type"] == _RTN_UNICAST and not message.get_attr("RTA_GATEWAY"):
            index: int | None = message.get_attr("RTA_OIF")
            return index
    return None


def _neighbour(ipr: IPRoute, address: bytes, index: int) -> str | None:
    text = str(ip_address(address))
    for message in ipr.get_neighbours(family=_FAMILIES[len(address)], ifindex=index):
        if message.get_attr("NDA_DST") == text and message["ifindex"] == index:
            hardware: str | None = message.get_attr("NDA_LLADDR")
            return hardware
    return None


def _port(ipr: IPRoute, hardware: str, bridge: int) -> int | None:
    for message in ipr.get_neighbours(family=socket.AF_BRIDGE):
        if message.get_attr("NDA_LLADDR") == hardware and message.get_attr("NDA_MASTER") == bridge:
            port: int = message["ifindex"]
            return port
    return None


def _ask(address: bytes) -> None:
    """Makes the kernel look for the neighbour: one empty datagram to the discard port."""
    family = _FAMILIES[len(address)]
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.sendto(b"", (str(ip_address(address)), 9))
        except OSError:
            # Whatever keeps it from being sent: the next look asks again.
            return
