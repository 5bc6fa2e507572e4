"""WireGuard outside the kernel, through its UAPI socket (https://www.wireguard.com/xplatform/)."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_address, ip_network
from itertools import chain
from pathlib import Path
from typing import Final

from meshwire.api.fields import Network
from meshwire.encryption.health import Reading
from meshwire.encryption.keys import public_key
from meshwire.encryption.model import (
    DeviceState,
    Endpoint,
    PeerState,
    SecretKey,
    read_preshared_key,
    single_network,
)
from meshwire.encryption.plan import ConfigureDevice

SOCKETS: Final = Path("/var/run/wireguard")
"""Where implementations put their sockets; not ours to choose."""

_TIMEOUT: Final = 10.0


class Uapi:
    """Devices of a userspace implementation. Raises OSError: FileNotFoundError or ConnectionRefusedError
    where nobody serves the device, or the errno that the implementation answered."""

    def observe(self, name: str) -> DeviceState:
        with _connect(name) as connection:
            connection.sendall(b"get=1\n\n")
            return parse_device(name, _answer(name, connection))

    def read(self, name: str) -> dict[str, Reading]:
        with _connect(name) as connection:
            connection.sendall(b"get=1\n\n")
            return parse_readings(_answer(name, connection))

    def configure(self, change: ConfigureDevice) -> None:
        """In one write, all peers at once."""
        with _connect(change.name) as connection:
            connection.sendall(format_change(change))
            for _ in _answer(change.name, connection):
                pass


def serves(name: str) -> bool:
    """Whether an implementation answers for the device."""
    try:
        with _connect(name):
            return True
    except OSError:
        return False


def parse_device(name: str, answer: Iterable[str]) -> DeviceState:
    """The lines that get=1 is answered with. The private key in it goes no further than its public half."""
    device_key, port = "", 0
    peers: dict[str, PeerState] = {}
    fields: dict[str, str] = {}
    allowed: list[str] = []
    singles: list[bytes] = []

    def finish() -> None:
        if "public_key" not in fields:
            return
        key = base64.b64encode(bytes.fromhex(fields["public_key"])).decode()
        peers[key] = PeerState(
            public_key=key,
            endpoint=parse_endpoint(fields["endpoint"]) if "endpoint" in fields else None,
            allowed_ips=frozenset(map(_network, allowed)),
            singles=frozenset(singles),
            keepalive=int(fields.get("persistent_keepalive_interval", 0)),
            handshake=int(fields.get("last_handshake_time_sec", 0))
            + int(fields.get("last_handshake_time_nsec", 0)) / 1e9,
            received=int(fields.get("rx_bytes", 0)),
            sent=int(fields.get("tx_bytes", 0)),
            preshared_key=read_preshared_key(bytes.fromhex(fields.get("preshared_key", "00" * 32))),
        )

    for line in answer:
        # There may be as many of these as the cluster has pods.
        if line.startswith("allowed_ip="):
            if line.endswith("/128"):
                singles.append(socket.inet_pton(socket.AF_INET6, line[11:-4]))
            elif line.endswith("/32") and ":" not in line:
                singles.append(socket.inet_pton(socket.AF_INET, line[11:-3]))
            else:
                allowed.append(line[11:])
            continue
        key, _, value = line.partition("=")
        match key:
            case "private_key" if value.strip("0"):
                device_key = public_key(SecretKey(bytes.fromhex(value)))
            case "listen_port":
                port = int(value)
            case "public_key":
                finish()
                fields, allowed, singles = {key: value}, [], []
            case _:
                fields[key] = value
    finish()
    return DeviceState(name=name, public_key=device_key, port=port, peers=peers)


def parse_readings(answer: Iterable[str]) -> dict[str, Reading]:
    """What of the same lines tells whether peers are there, by public key."""
    found: dict[str, Reading] = {}
    key, received, handshake, endpoint = "", 0, 0.0, ""

    def finish() -> None:
        if key:
            found[base64.b64encode(bytes.fromhex(key)).decode()] = Reading(
                received, handshake, _endpoint(endpoint) if endpoint else None
            )

    for line in answer:
        if line.startswith("allowed_ip="):
            continue
        name, _, value = line.partition("=")
        match name:
            case "public_key":
                finish()
                key, received, handshake, endpoint = value, 0, 0.0, ""
            case "endpoint":
                endpoint = value
            case "last_handshake_time_sec":
                handshake += int(value)
            case "last_handshake_time_nsec":
                handshake += int(value) / 1e9
            case "rx_bytes":
                received = int(value)
    finish()
    return found


@lru_cache(maxsize=16384)
def _network(text: str) -> Network:
    """The same few thousand are read again and again, and reading one takes ten times as long as finding
    it."""
    return ip_network(text)


def parse_endpoint(text: str) -> Endpoint:
    """`192.0.2.1:51871` or `[2001:db8::1]:51871`, with a zone perhaps."""
    host, _, port = text.rpartition(":")
    return Endpoint(ip_address(host.strip("[]").partition("%")[0]), int(port))


@lru_cache(maxsize=4096)
def _endpoint(text: str) -> Endpoint:
    """Asked for every few seconds."""
    return parse_endpoint(text)


def format_change(change: ConfigureDevice) -> bytes:
    return ("set=1\n" + "".join(f"{line}\n" for line in _lines(change)) + "\n").encode()


def _lines(change: ConfigureDevice) -> Iterator[str]:
    if change.private_key:
        yield f"private_key={change.private_key.reveal().hex()}"
    if change.port:
        yield f"listen_port={change.port}"
    if change.fresh:
        yield "replace_peers=true"
    if change.release or change.release_pods:
        # Only newer implementations can take a single network away. A network has one peer, though, so
        # giving it to a peer that goes at once takes it from its old one everywhere, and that one isn't
        # disturbed.
        stand_in = os.urandom(32).hex()
        yield f"public_key={stand_in}"
        yield from (f"allowed_ip={network}" for network in change.release)
        yield from (f"allowed_ip={single_network(address)}" for address in change.release_pods)
        yield f"public_key={stand_in}"
        yield "remove=true"
    for peer in change.peers:
        yield f"public_key={base64.b64decode(peer.public_key).hex()}"
        if peer.remove:
            yield "remove=true"
            continue
        # First of all: the peer is there from its first line on.
        if peer.preshared_key:
            yield f"preshared_key={peer.preshared_key.reveal().hex()}"
        if peer.endpoint:
            yield f"endpoint={peer.endpoint}"
        yield f"persistent_keepalive_interval={peer.keepalive}"
        yield from (f"allowed_ip={each}" for each in chain(peer.gain, map(single_network, peer.pods)))


def _connect(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_TIMEOUT)
    try:
        connection.connect(str(SOCKETS / f"{name}.sock"))
    except BaseException:
        connection.close()
        raise
    return connection


def _answer(name: str, connection: socket.socket) -> Iterator[str]:
    """Line by line: there may be as many as the cluster has pods. Raises OSError with the errno, at the
    end."""
    number = 0
    with connection.makefile("r", encoding="ascii", newline="\n") as stream:
        for line in stream:
            line = line.rstrip("\n")
            if line.startswith("errno="):
                number = int(line[6:])
            elif line:
                yield line
            elif number:
                raise OSError(abs(number), f"{name}: {os.strerror(abs(number))}")
            else:
                return
    raise ConnectionResetError("the WireGuard implementation closed its socket in mid-answer")
