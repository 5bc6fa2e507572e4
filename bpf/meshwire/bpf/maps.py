"""The pinned maps as Python values. Reads and writes the kernel; knows nothing of what ought to be in
them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from ctypes import byref, c_uint32
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import TracebackType
from typing import Any

from meshwire.bpf import layouts
from meshwire.bpf._libbpf import check, library
from meshwire.bpf.layouts import FAMILY_BITS, AddressFlag, Direction, Family, Reason, SettingsFlag

Network = IPv4Network | IPv6Network

# The kernel's own, from before there was a number for it in errno.h.
_ENOTSUPP = 524
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class AddressEntry:
    """Who lives under a prefix. `node` 0: nobody knows."""

    identity: int
    node: int
    flags: AddressFlag


@dataclass(frozen=True, slots=True)
class SettingsEntry:
    """`tunnel_mtu` is the largest IP packet in bytes that a tunnel carries; 0: no limit."""

    flags: SettingsFlag
    local_node: int
    tunnel_mtu: int


@dataclass(frozen=True, slots=True)
class Counter:
    packets: int
    bytes: int


class Ipcache:
    """Address prefix -> AddressEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[Network, AddressEntry]:
        return {
            _network(key): AddressEntry(value.identity, value.node, AddressFlag(value.flags))
            for key, value in _items(self._fd, layouts.Prefix, layouts.Address)
        }

    def update(self, network: Network, entry: AddressEntry) -> None:
        """Adds or replaces in one step: a packet sees the old entry or the new one."""
        value = layouts.Address(identity=entry.identity, node=entry.node, flags=entry.flags)
        _update(self._fd, _prefix(network), value, f"writing {network} to ipcache")

    def delete(self, network: Network) -> None:
        """A prefix that isn't there is no error."""
        result = library().bpf_map_delete_elem(self._fd, byref(_prefix(network)))
        if result != -errno.ENOENT:
            check(result, f"deleting {network} from ipcache")


class Nodes:
    """Node number -> ifindex of the device to reach it by. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[int, int]:
        """Nodes that have a device."""
        return {
            number: value.wg_ifindex
            for number, value in _items(self._fd, c_uint32, layouts.Node)
            if value.wg_ifindex
        }

    def update(self, node: int, ifindex: int) -> None:
        """`ifindex` 0: no tunnel."""
        _update(self._fd, c_uint32(node), layouts.Node(wg_ifindex=ifindex), f"writing node {node}")


class Settings:
    """The node's one SettingsEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> SettingsEntry:
        value = layouts.Settings()
        key = c_uint32(0)
        check(library().bpf_map_lookup_elem(self._fd, byref(key), byref(value)), "reading settings")
        return SettingsEntry(SettingsFlag(value.flags), value.local_node, value.tunnel_mtu)

    def write(self, entry: SettingsEntry) -> None:
        value = layouts.Settings(flags=entry.flags, local_node=entry.local_node, tunnel_mtu=entry.tunnel_mtu)
        _update(self._fd, c_uint32(0), value, "writing settings")


class Metrics:
    """(reason, direction) -> what was counted since the map was made. Raises OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[tuple[Reason, Direction], Counter]:
        """Summed over all CPUs, every reason and direction."""
        cpus = check(library().libbpf_num_possible_cpus(), "counting CPUs")
        directions = len(Direction)
        found = dict(_items(self._fd, c_uint32, layouts.Counter * cpus))
        return {
            (reason, direction): Counter(
                sum(each.packets for each in found[reason * directions + direction]),
                sum(each.bytes for each in found[reason * directions + direction]),
            )
            for reason in Reason
            for direction in Direction
        }


class Maps:
    """The pinned maps; a context manager that closes their file descriptors."""

    def __init__(
        self, ipcache: Ipcache, nodes: Nodes, settings: Settings, metrics: Metrics, resources: ExitStack
    ) -> None:
        self.ipcache = ipcache
        self.nodes = nodes
        self.settings = settings
        self.metrics = metrics
        self._resources = resources

    @classmethod
    def open(cls, pin_directory: Path) -> Maps:
        """Raises FileNotFoundError where they have not been loaded yet, and other OSErrors."""
        with ExitStack() as resources:

            def opened(name: str) -> int:
                path = pin_directory / name
                fd = check(library().bpf_obj_get(os.fsencode(path)), str(path))
                resources.callback(os.close, fd)
                return fd

            return cls(
                Ipcache(opened("ipcache")),
                Nodes(opened("nodes")),
                Settings(opened("settings")),
                Metrics(opened("metrics")),
                resources.pop_all(),
            )

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Maps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _prefix(network: Network) -> layouts.Prefix:
    address = network.network_address.packed
    return layouts.Prefix(
        prefixlen=FAMILY_BITS + network.prefixlen,
        family=Family(network.version),
        addr=(ctypes.c_uint8 * 16)(*address),
    )


def _network(prefix: layouts.Prefix) -> Network:
    length = prefix.prefixlen - FAMILY_BITS
    address = bytes(prefix.addr)
    if prefix.family == Family.IPV4:
        return IPv4Network((address[:4], length))
    return IPv6Network((address, length))


def _update(fd: int, key: ctypes._CData, value: ctypes._CData, what: str) -> None:
    check(library().bpf_map_update_elem(fd, byref(key), byref(value), 0), what)


def _items(
    fd: int, key_type: type[Any], value_type: type[Any], batch: int = _BATCH
) -> Iterator[tuple[Any, Any]]:
    """Everything in a map, with few system calls; ctypes hands simple types over as Python values."""
    keys, values = (key_type * batch)(), (value_type * batch)()
    position: object = None
    while True:
        count, following = c_uint32(batch), key_type()
        result = library().bpf_map_lookup_batch(
            fd, position, byref(following), byref(keys), byref(values), byref(count), None
        )
        # LPM tries learned batches in 5.13, others may never.
        if result == -_ENOTSUPP and position is None:
            yield from _items_one_by_one(fd, key_type, value_type)
            return
        if result != -errno.ENOENT:
            check(result, "reading a map")
        yield from zip(keys[: count.value], values[: count.value], strict=True)
        if result == -errno.ENOENT:
            return
        position = byref(following)


def _items_one_by_one(fd: int, key_type: type[Any], value_type: type[Any]) -> Iterator[tuple[Any, Any]]:
    keys, values = (key_type * 1)(), (value_type * 1)()
    position: object = None
    while (result := library().bpf_map_get_next_key(fd, position, byref(keys))) != -errno.ENOENT:
        check(result, "reading a map")
        position = byref(keys)
        # Only we write, but a key that went away meanwhile is no reason to fail.
        if (found := library().bpf_map_lookup_elem(fd, byref(keys), byref(values))) != -errno.ENOENT:
            check(found, "reading a map")
            yield keys[0], values[0]
