"""The pinned maps as Python values. Reads and writes the kernel; knows nothing of what ought to be in
them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import byref, c_uint32
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from meshwire.bpf import layouts
from meshwire.bpf._elements import Network as Network
from meshwire.bpf._elements import (
    batches,
    delete,
    delete_many,
    items,
    network_of,
    open_pinned,
    prefix_of,
    single_of,
    update,
    update_many,
)
from meshwire.bpf._libbpf import check, library
from meshwire.bpf.layouts import FAMILY_BITS, AddressFlag, Direction, Family, Reason, SettingsFlag


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


@dataclass(frozen=True, slots=True)
class Addresses:
    """All of the ipcache. `singles` are entries of single addresses that are nothing but a pod's, or
    somewhere in the cluster: packed, by node number and flags. There may be as many as the cluster has
    pods."""

    prefixes: dict[Network, AddressEntry]
    singles: dict[tuple[int, AddressFlag], set[bytes]]


_SINGLES: Final = frozenset({int(AddressFlag.POD), int(AddressFlag.CLUSTER)})
_SINGLE_BITS: Final = {int(Family.IPV4): FAMILY_BITS + 32, int(Family.IPV6): FAMILY_BITS + 128}
_PREFIX: Final = struct.Struct("=IB3x16s")
"""As layouts.Prefix."""
_ADDRESS: Final = struct.Struct("=IHH")
"""As layouts.Address."""


class Ipcache:
    """Address prefix -> AddressEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[Network, AddressEntry]:
        return {
            network_of(key): AddressEntry(value.identity, value.node, AddressFlag(value.flags))
            for key, value in items(self._fd, layouts.Prefix, layouts.Address)
        }

    def read_compact(self) -> Addresses:
        prefixes: dict[Network, AddressEntry] = {}
        singles: dict[tuple[int, int], set[bytes]] = {}
        for keys, values, count in batches(self._fd, layouts.Prefix, layouts.Address):
            # Not by ctypes' fields: they take six times as long.
            elements = zip(
                _PREFIX.iter_unpack(memoryview(keys).cast("B")[: count * _PREFIX.size]),
                _ADDRESS.iter_unpack(memoryview(values).cast("B")[: count * _ADDRESS.size]),
                range(count),
                strict=True,
            )
            for (length, family, address), (identity, node, flags), number in elements:
                if flags in _SINGLES and not identity and length == _SINGLE_BITS[family]:
                    single = address[:4] if family == Family.IPV4 else address
                    singles.setdefault((node, flags), set()).add(single)
                else:
                    prefixes[network_of(keys[number])] = AddressEntry(identity, node, AddressFlag(flags))
        return Addresses(
            prefixes, {(node, AddressFlag(flags)): each for (node, flags), each in singles.items()}
        )

    def update_singles(self, addresses: Sequence[bytes], entry: AddressEntry) -> None:
        """The same entry for each of these addresses (packed)."""
        value = layouts.Address(identity=entry.identity, node=entry.node, flags=entry.flags)
        update_many(
            self._fd, [(single_of(each), value) for each in addresses], "writing addresses to ipcache"
        )

    def delete_singles(self, addresses: Sequence[bytes]) -> None:
        """Ones that aren't there are no error."""
        delete_many(self._fd, [single_of(each) for each in addresses], "deleting addresses from ipcache")

    def update(self, network: Network, entry: AddressEntry) -> None:
        """Adds or replaces in one step: a packet sees the old entry or the new one."""
        value = layouts.Address(identity=entry.identity, node=entry.node, flags=entry.flags)
        update(self._fd, prefix_of(network), value, f"writing {network} to ipcache")

    def delete(self, network: Network) -> None:
        """A prefix that isn't there is no error."""
        delete(self._fd, prefix_of(network), f"deleting {network} from ipcache")


class Nodes:
    """Node number -> ifindex of the device to reach it by, or layouts.QUARANTINED. All methods raise
    OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[int, int]:
        """Nodes that have a device, or are quarantined."""
        return {
            number: value.wg_ifindex
            for number, value in items(self._fd, c_uint32, layouts.Node)
            if value.wg_ifindex
        }

    def update(self, node: int, ifindex: int) -> None:
        """`ifindex` 0: no tunnel."""
        update(self._fd, c_uint32(node), layouts.Node(wg_ifindex=ifindex), f"writing node {node}")


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
        update(self._fd, c_uint32(0), value, "writing settings")


class Metrics:
    """(reason, direction) -> what was counted since the map was made. Raises OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[tuple[Reason, Direction], Counter]:
        """Summed over all CPUs, every reason and direction."""
        # One by one, as few of the map's entries have a meaning.
        counters = (layouts.Counter * check(library().libbpf_num_possible_cpus(), "counting CPUs"))()
        found = {}
        for reason in Reason:
            for direction in Direction:
                key = c_uint32(reason * len(Direction) + direction)
                check(
                    library().bpf_map_lookup_elem(self._fd, byref(key), byref(counters)), "reading metrics"
                )
                found[reason, direction] = Counter(
                    sum(each.packets for each in counters), sum(each.bytes for each in counters)
                )
        return found


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
                return open_pinned(pin_directory / name, resources)

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
