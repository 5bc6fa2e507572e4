"""WireGuard in the kernel, over generic netlink: pyroute2's messages, but many peers to one, cut where they
grow too long, and merged again when read."""

from __future__ import annotations

import os
import socket
import struct
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final, Protocol

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.generic import GenericNetlinkSocket
from pyroute2.netlink.generic.wireguard import (
    WG_CMD_GET_DEVICE,
    WG_CMD_SET_DEVICE,
    WG_GENL_NAME,
    WG_GENL_VERSION,
    WGDEVICE_F_REPLACE_PEERS,
    WGPEER_F_REMOVE_ME,
    wgmsg,
)

from meshwire.api.fields import Network
from meshwire.encryption.health import Reading
from meshwire.encryption.model import (
    DeviceState,
    Endpoint,
    PeerState,
    read_preshared_key,
    single_network,
)
from meshwire.encryption.plan import ConfigureDevice, PeerChange

# An attribute's length has 16 bits and WGDEVICE_A_PEERS holds all peers of a message; half of it is plenty.
_MESSAGE_BYTES: Final = 32768
_NETWORK_BYTES: Final = 44
"""Upper bound of an allowed IP's encoding."""
_NETWORKS: Final = _MESSAGE_BYTES // _NETWORK_BYTES - 8
"""Allowed IPs of one peer in one message."""

# linux/wireguard.h
_ADDRESS, _MASK = 2, 3
_TYPE: Final = 0x3FFF
_ATTRIBUTE: Final = struct.Struct("=HH")
_IFNAME, _PEERS = 2, 8
_PUBLIC_KEY, _ENDPOINT, _HANDSHAKE, _RX_BYTES = 1, 4, 6, 7
_TIMESPEC: Final = struct.Struct("=qq")
_GENL: Final = struct.Struct("=BBH")

# linux/netlink.h
_NETLINK_GENERIC: Final = 16
_NLMSG: Final = struct.Struct("=IHHII")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3

Attributes = list[list[Any]]


_Peer = wgmsg.wgdevice_peer


class Reply(genlmsg):  # type: ignore[misc]
    """What the kernel answers, as pyroute2 has it but for allowed IPs, which are left as they are: there may
    be as many as the cluster has pods, and it would make four objects of each. Not a subclass of wgmsg: that
    would share its compiled table."""

    prefix = wgmsg.prefix
    nla_map = wgmsg.nla_map
    parse_wg_key = wgmsg.parse_wg_key

    class wgdevice_peer(nla):  # type: ignore[misc]
        prefix = _Peer.prefix
        nla_flags = _Peer.nla_flags
        nla_map = tuple(
            (name, "cdata" if name == "WGPEER_A_ALLOWEDIPS" else kind) for name, kind in _Peer.nla_map
        )
        parse_peer_key = _Peer.parse_peer_key
        parse_endpoint = staticmethod(_Peer.parse_endpoint)
        endpoint_ipv4 = _Peer.endpoint_ipv4
        endpoint_ipv6 = _Peer.endpoint_ipv6
        parse_handshake_time = _Peer.parse_handshake_time


class WireGuard(Protocol):
    """What both implementations offer. Raises OSError or pyroute2.NetlinkError."""

    def observe(self, name: str) -> DeviceState: ...

    def read(self, name: str) -> dict[str, Reading]:
        """What peers are judged by, by public key: less than `observe` reads, and much faster."""

    def configure(self, change: ConfigureDevice) -> None: ...


class KernelWireGuard:
    """Devices of the kernel's module. Raises pyroute2.NetlinkError, at first use too where there is no
    module."""

    def __init__(self) -> None:
        self._socket: GenericNetlinkSocket | None = None

    def observe(self, name: str) -> DeviceState:
        message = wgmsg()
        message["cmd"] = WG_CMD_GET_DEVICE
        message["version"] = WG_GENL_VERSION
        message["attrs"] = [["WGDEVICE_A_IFNAME", name]]
        return parse_device(name, self._request(message, NLM_F_REQUEST | NLM_F_DUMP))

    def read(self, name: str) -> dict[str, Reading]:
        return parse_readings(_dump(self._open().prid, name))

    def configure(self, change: ConfigureDevice) -> None:
        for attributes in format_change(change):
            message = wgmsg()
            message["cmd"] = WG_CMD_SET_DEVICE
            message["version"] = WG_GENL_VERSION
            message["attrs"] = attributes
            self._request(message, NLM_F_REQUEST | NLM_F_ACK)

    def _request(self, message: wgmsg, flags: int) -> list[Any]:
        opened = self._open()
        return list(opened.nlm_request(message, msg_type=opened.prid, msg_flags=flags))

    def _open(self) -> Any:
        if self._socket is None:
            self._socket = GenericNetlinkSocket()
            self._socket.bind(WG_GENL_NAME, Reply)
        return self._socket


def _dump(family: int, name: str) -> Iterator[bytes]:
    """The attributes of each message of a device's dump. By hand, as routes are read: pyroute2 takes a tenth
    of a second for a thousand peers, and this is asked for every few seconds. Raises OSError."""
    text = name.encode() + b"\0"
    body = _GENL.pack(WG_CMD_GET_DEVICE, WG_GENL_VERSION, 0)
    body += _ATTRIBUTE.pack(4 + len(text), _IFNAME) + text + bytes(-len(text) % 4)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC) as sock:
        sock.send(_NLMSG.pack(_NLMSG.size + len(body), family, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        while True:
            data, at = sock.recv(1 << 17), 0
            while at < len(data):
                length, kind, _, _, _ = _NLMSG.unpack_from(data, at)
                content = data[at + _NLMSG.size : at + length]
                # The end of a dump carries its error.
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    if error := -int.from_bytes(content[:4], sys.byteorder, signed=True):
                        raise OSError(error, f"reading {name}: {os.strerror(error)}")
                    return
                yield content[_GENL.size :]
                at += length + 3 & ~3


def parse_readings(messages: Iterable[bytes]) -> dict[str, Reading]:
    """From WGDEVICE_A_* attributes. A peer that is continued in the next message has its numbers in the
    first part alone."""
    found: dict[str, Reading] = {}
    for message in messages:
        for kind, peers in _attributes(message, 0, len(message)):
            if kind != _PEERS:
                continue
            for _, peer in _attributes(message, *peers):
                fields = dict(_attributes(message, *peer))
                start, end = fields[_PUBLIC_KEY]
                key = b64encode(message[start:end]).decode()
                if key not in found:
                    found[key] = _reading(message, fields)
    return found


def _attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Kind, and where the value begins and ends."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE, (at + _ATTRIBUTE.size, at + length)
        at += max(_ATTRIBUTE.size, length + 3 & ~3)


def _reading(data: bytes, fields: dict[int, tuple[int, int]]) -> Reading:
    received, handshake, endpoint = 0, 0.0, None
    if _RX_BYTES in fields:
        received = int.from_bytes(data[slice(*fields[_RX_BYTES])], sys.byteorder)
    if _HANDSHAKE in fields:
        seconds, nanoseconds = _TIMESPEC.unpack_from(data, fields[_HANDSHAKE][0])
        handshake = seconds + nanoseconds / 1e9
    if _ENDPOINT in fields:
        endpoint = _endpoint(data[slice(*fields[_ENDPOINT])])
    return Reading(received, handshake, endpoint)


def _endpoint(raw: bytes) -> Endpoint | None:
    """Of a struct sockaddr_in or sockaddr_in6."""
    port = int.from_bytes(raw[2:4])
    match int.from_bytes(raw[:2], sys.byteorder):
        case socket.AF_INET:
            return Endpoint(IPv4Address(raw[4:8]), port)
        case socket.AF_INET6:
            return Endpoint(IPv6Address(raw[8:24]), port)
        case _:
            return None


def parse_device(name: str, messages: Iterable[Any]) -> DeviceState:
    """A dump cuts where its buffer ends, in the middle of a peer's allowed IPs too: the next message then
    starts with the same peer again."""
    public_key, port = "", 0
    peers: dict[str, PeerState] = {}
    for message in messages:
        if key := message.get_attr("WGDEVICE_A_PUBLIC_KEY"):
            public_key = key.decode()
        port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or port
        for peer in message.get_attr("WGDEVICE_A_PEERS") or ():
            key = peer.get_attr("WGPEER_A_PUBLIC_KEY").decode()
            allowed, singles = parse_allowed(peer.get_attr("WGPEER_A_ALLOWEDIPS") or b"")
            if key in peers:
                allowed, singles = allowed | peers[key].allowed_ips, singles | peers[key].singles
            peers[key] = _peer_state(key, peer, allowed, singles, peers.get(key))
    return DeviceState(name=name, public_key=public_key, port=port, peers=peers)


def parse_allowed(raw: bytes) -> tuple[frozenset[Network], frozenset[bytes]]:
    """Blocks, and single addresses (packed), of WGPEER_A_ALLOWEDIPS."""
    blocks: list[Network] = []
    singles: list[bytes] = []
    position = 0
    while position < len(raw):
        length, _ = _ATTRIBUTE.unpack_from(raw, position)
        end, at = position + length, position + 4
        address, mask = b"", 0
        while at < end:
            size, kind = _ATTRIBUTE.unpack_from(raw, at)
            if kind & _TYPE == _ADDRESS:
                address = raw[at + 4 : at + size]
            elif kind & _TYPE == _MASK:
                mask = raw[at + 4]
            at += (size + 3) & ~3
        if mask == 8 * len(address):
            singles.append(address)
        else:
            blocks.append(
                IPv4Network((address, mask)) if len(address) == 4 else IPv6Network((address, mask))
            )
        position = (end + 3) & ~3
    return frozenset(blocks), frozenset(singles)


def _peer_state(
    key: str, peer: Any, allowed: frozenset[Network], singles: frozenset[bytes], before: PeerState | None
) -> PeerState:
    if before:
        # A continuation has the key and further allowed IPs alone.
        return PeerState(
            public_key=key,
            endpoint=before.endpoint,
            allowed_ips=allowed,
            singles=singles,
            keepalive=before.keepalive,
            handshake=before.handshake,
            received=before.received,
            sent=before.sent,
            preshared_key=before.preshared_key,
        )
    endpoint = peer.get_attr("WGPEER_A_ENDPOINT")
    # As pyroute2 has it, base64.
    preshared_key = peer.get_attr("WGPEER_A_PRESHARED_KEY")
    handshake = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME") or {"tv_sec": 0, "tv_nsec": 0}
    return PeerState(
        public_key=key,
        endpoint=Endpoint(ip_address(endpoint["addr"]), endpoint["port"]) if endpoint else None,
        allowed_ips=allowed,
        singles=singles,
        keepalive=peer.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or 0,
        handshake=handshake["tv_sec"] + handshake["tv_nsec"] / 1e9,
        received=peer.get_attr("WGPEER_A_RX_BYTES") or 0,
        sent=peer.get_attr("WGPEER_A_TX_BYTES") or 0,
        preshared_key=read_preshared_key(b64decode(preshared_key)) if preshared_key else None,
    )


def format_change(change: ConfigureDevice) -> Iterator[Attributes]:
    """The attributes of one message after the other, to be sent in this order."""
    head: Attributes = [["WGDEVICE_A_IFNAME", change.name]]
    if change.fresh:
        head.append(["WGDEVICE_A_FLAGS", WGDEVICE_F_REPLACE_PEERS])
    if change.private_key:
        head.append(["WGDEVICE_A_PRIVATE_KEY", b64encode(change.private_key.reveal())])
    if change.port:
        head.append(["WGDEVICE_A_LISTEN_PORT", change.port])

    batch: list[dict[str, Attributes]] = []
    size = 0
    release = (*change.release, *map(single_network, change.release_pods))
    for peer in (*_release(release), *(part for each in change.peers for part in _peer(each))):
        length = _length(peer)
        if batch and size + length > _MESSAGE_BYTES:
            yield [*head, ["WGDEVICE_A_PEERS", batch]]
            head, batch, size = head[:1], [], 0
        batch.append({"attrs": peer})
        size += length
    yield [*head, ["WGDEVICE_A_PEERS", batch]] if batch else head


def _release(networks: tuple[Network, ...]) -> Iterator[Attributes]:
    """Kernels before 6.16 can't take a single network away, and REPLACE_ALLOWEDIPS would leave the peer
    without any for a moment. A network has one peer, though, so giving it to a peer that goes at once takes
    it from its old one."""
    if not networks:
        return
    stand_in = b64encode(os.urandom(32))
    yield from _allowing(stand_in, networks)
    yield [["WGPEER_A_PUBLIC_KEY", stand_in], ["WGPEER_A_FLAGS", WGPEER_F_REMOVE_ME]]


def _allowing(key: Any, networks: tuple[Network, ...]) -> Iterator[Attributes]:
    """As many parts as it takes."""
    for at in range(0, len(networks), _NETWORKS):
        allowed = [_allowed(network) for network in networks[at : at + _NETWORKS]]
        yield [["WGPEER_A_PUBLIC_KEY", key], ["WGPEER_A_ALLOWEDIPS", allowed]]


def _peer(change: PeerChange) -> Iterator[Attributes]:
    attributes: Attributes = [["WGPEER_A_PUBLIC_KEY", change.public_key]]
    if change.remove:
        yield [*attributes, ["WGPEER_A_FLAGS", WGPEER_F_REMOVE_ME]]
        return
    if change.preshared_key:
        attributes.append(["WGPEER_A_PRESHARED_KEY", b64encode(change.preshared_key.reveal())])
    if change.endpoint:
        endpoint = {"addr": str(change.endpoint.address), "port": change.endpoint.port}
        attributes.append(["WGPEER_A_ENDPOINT", endpoint])
    attributes.append(["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", change.keepalive])
    networks = (*change.gain, *map(single_network, change.pods))
    if networks:
        allowed = [_allowed(network) for network in networks[:_NETWORKS]]
        attributes.append(["WGPEER_A_ALLOWEDIPS", allowed])
    yield attributes
    yield from _allowing(change.public_key, networks[_NETWORKS:])


def _allowed(network: Network) -> dict[str, Attributes]:
    return {
        "attrs": [
            ["WGALLOWEDIP_A_FAMILY", socket.AF_INET if network.version == 4 else socket.AF_INET6],
            ["WGALLOWEDIP_A_IPADDR", network.network_address.packed],
            ["WGALLOWEDIP_A_CIDR_MASK", network.prefixlen],
        ]
    }


def _length(peer: Attributes) -> int:
    """Upper bound of a peer's encoding: 36 bytes a key, 32 an endpoint, 8 anything else but networks."""
    allowed = next((value for name, value in peer if name == "WGPEER_A_ALLOWEDIPS"), ())
    return 128 + _NETWORK_BYTES * len(allowed)
