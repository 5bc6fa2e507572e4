"""What goes to WireGuard and what comes back, in both of its languages."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.generic.wireguard import (
    WGDEVICE_F_REPLACE_PEERS,
    WGPEER_F_REMOVE_ME,
    wgmsg,
)

from meshwire.encryption import uapi, wireguard
from meshwire.encryption.keys import public_key
from meshwire.encryption.model import DeviceState, Endpoint, PeerState, SecretKey
from meshwire.encryption.plan import ConfigureDevice, PeerChange


def key(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


SECRET = SecretKey(bytes(range(32)))
ADDED = PeerChange(
    public_key=key(1),
    node="b",
    endpoint=Endpoint(ip_address("198.18.0.2"), 51872),
    keepalive=25,
    gain=(ip_network("10.244.2.0/24"), ip_network("fd00::/64")),
)
CHANGED = PeerChange(
    public_key=key(2), node="c", endpoint=Endpoint(ip_address("fd00::3"), 51872), keepalive=0
)
REMOVED = PeerChange(public_key=key(3), remove=True)


def decode(attributes: wireguard.Attributes, reader: Any = wgmsg) -> Any:
    """Through the wire format and back, as the kernel would read it, or as we do (`wireguard.Reply`)."""
    message = wgmsg()
    message["attrs"] = attributes
    message.encode()
    decoded = reader(message.data)
    decoded.decode()
    return decoded


def peers_of(message: Any) -> list[Any]:
    return list(message.get_attr("WGDEVICE_A_PEERS") or ())


def test_netlink_says_what_differs_and_nothing_else() -> None:
    [attributes] = wireguard.format_change(
        ConfigureDevice(name="meshwire_wg1", peers=(ADDED, CHANGED, REMOVED))
    )
    message = decode(attributes)
    assert message.get_attr("WGDEVICE_A_IFNAME") == "meshwire_wg1"
    for absent in ("PRIVATE_KEY", "LISTEN_PORT", "FLAGS"):
        assert message.get_attr(f"WGDEVICE_A_{absent}") is None
    added, changed, removed = peers_of(message)
    assert added.get_attr("WGPEER_A_ENDPOINT")["addr"] == "198.18.0.2"
    assert added.get_attr("WGPEER_A_ENDPOINT")["port"] == 51872
    assert [each["addr"] for each in added.get_attr("WGPEER_A_ALLOWEDIPS")] == ["10.244.2.0/24", "fd00::/64"]
    assert added.get_attr("WGPEER_A_FLAGS") is None
    assert changed.get_attr("WGPEER_A_ENDPOINT")["addr"] == "fd00::3"
    assert changed.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") == 0
    assert changed.get_attr("WGPEER_A_ALLOWEDIPS") is None
    assert removed.get_attr("WGPEER_A_FLAGS") == WGPEER_F_REMOVE_ME
    assert removed.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") is None


def test_netlink_cuts_many_peers_into_messages_that_fit() -> None:
    networks = tuple(ip_network((0xFD << 120 | n << 64, 64)) for n in range(20))
    peers = tuple(
        PeerChange(public_key=base64.b64encode(n.to_bytes(32)).decode(), keepalive=25, gain=networks)
        for n in range(200)
    )
    change = ConfigureDevice(name="meshwire_wg1", private_key=SECRET, port=51872, fresh=True, peers=peers)
    messages = [decode(attributes) for attributes in wireguard.format_change(change)]
    assert len(messages) > 1
    sizes = []
    for attributes in wireguard.format_change(change):
        message = wgmsg()
        message["attrs"] = attributes
        message.encode()
        sizes.append(len(message.data))
    assert max(sizes) < 65536
    assert [peer.get_attr("WGPEER_A_PUBLIC_KEY").decode() for m in messages for peer in peers_of(m)] == [
        peer.public_key for peer in peers
    ]
    # Peers are replaced, and the key set, once: not again with every part.
    flags = [message.get_attr("WGDEVICE_A_FLAGS") for message in messages]
    assert flags == [WGDEVICE_F_REPLACE_PEERS] + [None] * (len(messages) - 1)
    assert [message.get_attr("WGDEVICE_A_PRIVATE_KEY") is not None for message in messages].count(True) == 1


def test_netlink_releases_a_network_by_a_stand_in_that_goes_at_once() -> None:
    change = ConfigureDevice(name="meshwire_wg1", release=(ip_network("10.9.0.0/24"),), peers=(CHANGED,))
    [attributes] = wireguard.format_change(change)
    taker, leaver, peer = peers_of(decode(attributes))
    assert [each["addr"] for each in taker.get_attr("WGPEER_A_ALLOWEDIPS")] == ["10.9.0.0/24"]
    stand_in = taker.get_attr("WGPEER_A_PUBLIC_KEY")
    assert leaver.get_attr("WGPEER_A_PUBLIC_KEY") == stand_in != peer.get_attr("WGPEER_A_PUBLIC_KEY")
    assert leaver.get_attr("WGPEER_A_FLAGS") == WGPEER_F_REMOVE_ME


def test_netlink_cuts_many_pods_of_one_peer_into_messages_that_fit() -> None:
    gained = tuple((0x0A000000 + n).to_bytes(4) for n in range(3000))
    released = tuple(((0xFD << 120) + n).to_bytes(16) for n in range(3000))
    peer = replace(ADDED, pods=gained)
    change = ConfigureDevice(name="meshwire_wg1", peers=(peer,), release_pods=released)
    told: dict[str, list[str]] = {}
    removed = []
    for attributes in wireguard.format_change(change):
        message = wgmsg()
        message["attrs"] = attributes
        message.encode()
        assert len(message.data) < 65536
        for part in peers_of(decode(attributes)):
            name = part.get_attr("WGPEER_A_PUBLIC_KEY").decode()
            told.setdefault(name, []).extend(
                each["addr"] for each in part.get_attr("WGPEER_A_ALLOWEDIPS") or ()
            )
            if part.get_attr("WGPEER_A_FLAGS") == WGPEER_F_REMOVE_ME:
                removed.append(name)
    assert told.pop(ADDED.public_key) == [
        *map(str, ADDED.gain),
        *(f"{ip_address(each)}/32" for each in gained),
    ]
    [(stand_in, taken)] = told.items()
    assert taken == [f"{ip_address(each)}/128" for each in released]
    assert removed == [stand_in]


def test_netlink_merges_a_peer_that_a_dump_cut_in_two() -> None:
    def part(*, first: bool, networks: list[str]) -> Any:
        peer: wireguard.Attributes = [["WGPEER_A_PUBLIC_KEY", key(1)]]
        if first:
            peer += [
                ["WGPEER_A_ENDPOINT", {"addr": "198.18.0.2", "port": 51872}],
                ["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", 25],
                ["WGPEER_A_LAST_HANDSHAKE_TIME", {"tv_sec": 12, "tv_nsec": 500_000_000}],
                ["WGPEER_A_RX_BYTES", 7],
                ["WGPEER_A_TX_BYTES", 8],
            ]
        peer.append(
            [
                "WGPEER_A_ALLOWEDIPS",
                [
                    {
                        "attrs": [
                            ["WGALLOWEDIP_A_FAMILY", socket.AF_INET6 if ":" in text else socket.AF_INET],
                            ["WGALLOWEDIP_A_IPADDR", ip_network(text).network_address.packed],
                            ["WGALLOWEDIP_A_CIDR_MASK", ip_network(text).prefixlen],
                        ]
                    }
                    for text in networks
                ],
            ]
        )
        head: wireguard.Attributes = [["WGDEVICE_A_PUBLIC_KEY", key(9)], ["WGDEVICE_A_LISTEN_PORT", 51872]]
        return decode([*(head if first else []), ["WGDEVICE_A_PEERS", [{"attrs": peer}]]], wireguard.Reply)

    messages = [
        part(first=True, networks=["10.1.0.0/24", "fd00::7/128"]),
        part(first=False, networks=["10.2.0.0/24", "10.3.0.1/32"]),
    ]
    assert wireguard.parse_device("meshwire_wg1", messages) == DeviceState(
        name="meshwire_wg1",
        public_key=key(9),
        port=51872,
        peers={
            key(1): PeerState(
                public_key=key(1),
                endpoint=Endpoint(ip_address("198.18.0.2"), 51872),
                allowed_ips=frozenset({ip_network("10.1.0.0/24"), ip_network("10.2.0.0/24")}),
                singles=frozenset({ip_address("fd00::7").packed, ip_address("10.3.0.1").packed}),
                keepalive=25,
                handshake=12.5,
                received=7,
                sent=8,
            )
        },
    )


def test_uapi_says_what_differs_and_nothing_else() -> None:
    change = ConfigureDevice(
        name="meshwire_wg1", private_key=SECRET, port=51872, peers=(ADDED, CHANGED, REMOVED)
    )
    assert uapi.format_change(change).decode().splitlines() == [
        "set=1",
        f"private_key={SECRET.reveal().hex()}",
        "listen_port=51872",
        f"public_key={'01' * 32}",
        "endpoint=198.18.0.2:51872",
        "persistent_keepalive_interval=25",
        "allowed_ip=10.244.2.0/24",
        "allowed_ip=fd00::/64",
        f"public_key={'02' * 32}",
        "endpoint=[fd00::3]:51872",
        "persistent_keepalive_interval=0",
        f"public_key={'03' * 32}",
        "remove=true",
        "",
    ]


def test_uapi_releases_a_network_by_a_stand_in_that_goes_at_once() -> None:
    change = ConfigureDevice(name="meshwire_wg1", fresh=True, release=(ip_network("10.9.0.0/24"),))
    lines = uapi.format_change(change).decode().splitlines()
    assert lines[1] == "replace_peers=true"
    assert lines[3:] == ["allowed_ip=10.9.0.0/24", lines[2], "remove=true", ""]


def test_uapi_answers_are_read_back() -> None:
    answer = "\n".join(
        [
            f"private_key={SECRET.reveal().hex()}",
            "listen_port=51872",
            f"public_key={'01' * 32}",
            f"preshared_key={'00' * 32}",
            "protocol_version=1",
            "endpoint=[fd00::2%3]:51872",
            "last_handshake_time_sec=12",
            "last_handshake_time_nsec=500000000",
            "tx_bytes=8",
            "rx_bytes=7",
            "persistent_keepalive_interval=25",
            "allowed_ip=10.1.0.0/24",
            "allowed_ip=fd00::/64",
            "allowed_ip=10.3.0.1/32",
            "allowed_ip=fd00::/32",
            "allowed_ip=fd00::7/128",
            f"public_key={'02' * 32}",
            "last_handshake_time_sec=0",
            "errno=0",
            "",
            "",
        ]
    )
    state = uapi.parse_device("meshwire_wg1", answer.splitlines())
    assert (state.public_key, state.port) == (public_key(SECRET), 51872)
    assert state.peers == {
        key(1): PeerState(
            public_key=key(1),
            endpoint=Endpoint(ip_address("fd00::2"), 51872),
            allowed_ips=frozenset(map(ip_network, ("10.1.0.0/24", "fd00::/64", "fd00::/32"))),
            singles=frozenset({ip_address("fd00::7").packed, ip_address("10.3.0.1").packed}),
            keepalive=25,
            handshake=12.5,
            received=7,
            sent=8,
        ),
        key(2): PeerState(public_key=key(2)),
    }
    assert SECRET.reveal().hex() not in repr(state)


@pytest.mark.parametrize("answer", [f"private_key={'00' * 32}\nlisten_port=1\nerrno=0\n\n", "errno=0\n\n"])
def test_uapi_a_device_without_a_key_has_no_public_key(answer: str) -> None:
    assert uapi.parse_device("meshwire_wg1", answer.splitlines()).public_key == ""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A UAPI server that sends the parts it is given, one answer to a connection."""
    monkeypatch.setattr(uapi, "SOCKETS", tmp_path)
    parts: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "meshwire_wg1.sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                for part in parts:
                    connection.sendall(part)

        thread = threading.Thread(target=serve)
        thread.start()
        yield parts
        thread.join()


def test_uapi_an_answer_may_come_in_pieces(server: list[bytes]) -> None:
    server += [b"listen_port=5", b"1872\nerrno=0\n", b"\n"]
    assert uapi.Uapi().observe("meshwire_wg1").port == 51872


def test_uapi_an_errno_is_an_error(server: list[bytes]) -> None:
    server += [b"errno=98\n\n"]
    with pytest.raises(OSError, match="Address already in use") as error:
        uapi.Uapi().configure(ConfigureDevice(name="meshwire_wg1", port=51872))
    assert error.value.errno == 98


def test_uapi_half_an_answer_is_an_error(server: list[bytes]) -> None:
    server += [b"listen_port=51872\n"]
    with pytest.raises(ConnectionResetError):
        uapi.Uapi().observe("meshwire_wg1")


def test_uapi_nobody_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uapi, "SOCKETS", tmp_path)
    with pytest.raises(FileNotFoundError):
        uapi.Uapi().observe("meshwire_wg1")
