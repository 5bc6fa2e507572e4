"""The node's kernel as the agent sees and changes it: links, WireGuard, filters, maps. Blocking; one thread
uses it."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.agent import userspace
from meshwire.agent.settings import Settings
from meshwire.api.fields import Address, Network
from meshwire.api.meshconfig import Userspace
from meshwire.api.meshnode import Implementation
from meshwire.bpf import layouts, loader, migrate, tc
from meshwire.bpf.layouts import Reason
from meshwire.bpf.maps import AddressEntry as MapAddress
from meshwire.bpf.maps import Counter, Maps, SettingsEntry
from meshwire.encryption import bootguard, netlink, nftables, uapi
from meshwire.encryption import plan as plans
from meshwire.encryption.health import PairKey, Reading
from meshwire.encryption.model import (
    DEVICES,
    AddressEntry,
    AddressFlags,
    Attachment,
    Datapath,
    DeviceState,
    Direction,
    Endpoint,
    Link,
    Observed,
    SettingsFlags,
    device_sysctls,
    pod_entry,
    single_network,
)
from meshwire.encryption.model import Settings as DatapathSettings
from meshwire.encryption.plan import after_change, after_pods
from meshwire.encryption.wireguard import KernelWireGuard, WireGuard

log = logging.getLogger("meshwire.agent")

_DIRECTIONS = {
    Direction.EGRESS: layouts.Direction.EGRESS,
    Direction.INGRESS: layouts.Direction.INGRESS,
}
STALE = "stale"
_PROBE_SECONDS = 60.0

Metrics = dict[tuple[Reason, layouts.Direction], Counter]


class Part(enum.Flag):
    """What an observation reads anew rather than remembers. On a node with many peers and pods each of them
    takes a tenth of a second, and most events concern one at most."""

    NONE = 0
    NETWORK = enum.auto()
    """Links, addresses, routes, filters, sysctls."""
    WIREGUARD = enum.auto()
    MAPS = enum.auto()
    """All but addresses."""
    ADDRESSES = enum.auto()
    ALL = NETWORK | WIREGUARD | MAPS | ADDRESSES


class _Known:
    """Addresses of pods that are in memory already: what the kernel has of them need not be there again."""

    def __init__(self, pods: Iterable[frozenset[bytes]]) -> None:
        self._sets = {each: each for each in pods}
        self._addresses = {address: address for each in self._sets for address in each}

    def share_pods(self, pods: Mapping[int, frozenset[bytes]]) -> dict[int, frozenset[bytes]]:
        """Sets that are known are the same objects: see meshwire.encryption.pods."""
        return {node: self._sets.get(each) or self._share(each) for node, each in pods.items()}

    def share_device(self, state: DeviceState) -> DeviceState:
        peers = {key: replace(peer, singles=self._share(peer.singles)) for key, peer in state.peers.items()}
        return replace(state, peers=peers)

    def _share(self, addresses: frozenset[bytes]) -> frozenset[bytes]:
        return frozenset(self._addresses.get(each, each) for each in addresses)


@dataclass(slots=True)
class _Loaded:
    programs: loader.Programs
    maps: Maps

    def close(self) -> None:
        self.maps.close()
        self.programs.close()


class Kernel:
    """Observes and applies, from one thread that runs no event loop: pyroute2 brings its own. Raises
    NetlinkError, OSError, loader.Refused, loader.IncompatibleMap, tc.Conflict and userspace.CannotStart;
    whatever was done before stays, and the next observation sees it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._socket: IPRoute | None = None
        self._questions: socket.socket | None = None
        self._loaded: _Loaded | None = None
        self._kernel_wireguard = False
        self._probe_after = 0.0
        self._chosen = Implementation.NONE
        self._implementations: dict[str, WireGuard] = {}
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self._lost_source: frozenset[str] = frozenset()
        self._stale = Part.ALL
        self._seen = Observed(links={})
        self._guarded: frozenset[str] = frozenset()
        self._nftables_after = 0.0

    def close(self) -> None:
        """Lets go of everything; what is attached and pinned stays in force."""
        if self._loaded:
            self._loaded.close()
            self._loaded = None
        if self._socket:
            self._socket.close()
            self._socket = None
        if self._questions:
            self._questions.close()
            self._questions = None

    @property
    def _ipr(self) -> IPRoute:
        if self._socket is None:
            self._socket = IPRoute()
        return self._socket

    def observe(
        self, mode: Userspace, fresh: Part = Part.ALL, pods: Iterable[frozenset[bytes]] = ()
    ) -> Observed:
        """What is `fresh`, or was changed by `apply` since, is read; the rest is as it was read last. `pods`
        are sets of addresses that are in memory anyway."""
        stale, seen = fresh | self._stale, self._seen
        known: _Known | None = None
        if Part.NETWORK in stale:
            links = netlink.observe_links(self._ipr)
            if any(_index(links, name) != _index(seen.links, name) for name in DEVICES):
                stale |= Part.WIREGUARD
            if _addresses(seen.links) - _addresses(links):
                # The kernel's looks after each packet's source itself; wireguard-go keeps to the one that it
                # was last reached at, some versions until a handshake has failed with it.
                self._lost_source = frozenset(
                    name for name, each in self._implementations.items() if isinstance(each, uapi.Uapi)
                )
            hooked = self._observe_hooked(links)
            self._guarded = frozenset(self._observe_guarded(hooked))
            paths = [path for name in DEVICES for path, _ in device_sysctls(name)]
            seen = replace(
                seen,
                links=links,
                routes=netlink.observe_routes(),
                attachments=frozenset(self._observe_attachments(hooked)),
                hooked=frozenset(hooked.values()),
                boot_guard=self._observe_boot_guard(),
                sysctls=netlink.read_sysctls(self._settings.proc_sys, paths),
            )
        if Part.WIREGUARD in stale:
            devices = {
                name: self._observe_device(seen.links[name]) for name in DEVICES if name in seen.links
            }
            known = known or _Known(pods)
            devices = {name: known.share_device(device) for name, device in devices.items()}
            seen = replace(seen, wireguard=devices)
        if stale & (Part.MAPS | Part.ADDRESSES):
            before = None if Part.ADDRESSES in stale else seen.datapath
            datapath = self._observe_datapath(before)
            if datapath and not before:
                known = known or _Known(pods)
                datapath = replace(datapath, pods=known.share_pods(datapath.pods))
            seen = replace(seen, datapath=datapath, pinned=self._settings.pin_directory.exists())
        self._seen, self._stale = seen, Part.NONE
        self._chosen = self._implementation(mode, seen.links)
        return replace(
            seen,
            unguarded=frozenset(DEVICES) - self._guarded
            if self._settings.policy_pin_directory.exists()
            else frozenset(),
            endpoints=dict(self._endpoints),
            lost_source=self._lost_source,
            implementation=self._chosen,
            now=time.time(),
        )

    def metrics(self) -> Metrics:
        """The datapath's counters; none where it isn't loaded."""
        return self._loaded.maps.metrics.read() if self._loaded else {}

    def read_peers(self) -> dict[PairKey, Reading]:
        """What is read of peers every few seconds, of the devices seen last; none of one that is gone."""
        found = {}
        for name, implementation in self._implementations.items():
            try:
                readings = implementation.read(name)
            except (OSError, NetlinkError) as error:
                log.debug("can't read the peers of %s: %s", name, error)
                continue
            found.update({(name, key): reading for key, reading in readings.items()})
        return found

    def ask(self, device: str, packet: bytes) -> None:
        """Sends an IP packet out of a device."""
        if self._questions is None:
            self._questions = netlink.open_sender()
        netlink.send_ip(self._questions, device, packet)

    def apply(self, action: plans.Action) -> None:
        before = self._stale
        self._stale |= _touched(action)
        self._apply(action)
        if _is_remembered(action):
            # Only where it fails has it to be read again.
            self._stale = before
            self._remember(action)

    def _apply(self, action: plans.Action) -> None:
        match action:
            case plans.LoadDatapath():
                self._load()
            case plans.UnloadDatapath():
                self._unload()
            case plans.WriteAddresses(entries):
                for network, entry in entries:
                    value = MapAddress(entry.identity, entry.node, layouts.AddressFlag(entry.flags))
                    self._maps().ipcache.update(network, value)
            case plans.DeleteAddresses(networks):
                for network in networks:
                    self._maps().ipcache.delete(network)
            case plans.WritePods(node, addresses):
                pod = pod_entry(node)
                self._maps().ipcache.update_singles(
                    addresses, MapAddress(pod.identity, pod.node, layouts.AddressFlag(pod.flags))
                )
            case plans.DeletePods(addresses):
                self._maps().ipcache.delete_singles(addresses)
            case plans.WriteNodes(entries):
                for number, device in entries:
                    self._maps().nodes.update(number, self._way(device))
            case plans.WriteSettings(settings):
                self._maps().settings.write(
                    SettingsEntry(
                        layouts.SettingsFlag(settings.flags), settings.local_node, settings.tunnel_mtu
                    )
                )
            case plans.AddClsact(device):
                tc.add_clsact(self._ipr, self._index(device))
            case plans.Attach(attachment):
                tc.attach(
                    self._ipr,
                    self._index(attachment.device),
                    _DIRECTIONS[attachment.direction],
                    self._programs().get(attachment.program),
                )
            case plans.Detach(attachment):
                self._detach(attachment)
            case plans.RemoveBootGuard():
                nftables.delete_table(bootguard.TABLE)
            case plans.CreateDevice(name):
                self._create(name)
            case plans.DeleteDevice(name):
                netlink.delete_link(self._ipr, name)
                self._forget(name)
            case plans.SetLink(name, mtu, add_address):
                netlink.set_up(self._ipr, name, mtu=mtu, add_address=add_address)
                if isinstance(self._implementations.get(name), uapi.Uapi):
                    # Its sockets are there only now. They work without, only not in bursts.
                    with contextlib.suppress(userspace.CannotStart):
                        userspace.ensure_device(self._settings.run_directory, name)
            case plans.WriteSysctls(sysctls):
                for path, text in sysctls:
                    netlink.write_sysctl(self._settings.proc_sys, path, text)
            case plans.ConfigureDevice():
                self._configure(action)
            case _:
                assert_never(action)

    def _remember(self, action: plans.Action) -> None:
        """What is known of pods, brought up to date by what has been done: there are too many to read them
        all again for each that comes or goes."""
        datapath = self._seen.datapath
        match action:
            case plans.WritePods(node, addresses) if datapath:
                pods = after_pods(datapath.pods, node, addresses)
                self._seen = replace(self._seen, datapath=replace(datapath, pods=pods))
            case plans.DeletePods(addresses) if datapath:
                pods = after_pods(datapath.pods, None, addresses)
                self._seen = replace(self._seen, datapath=replace(datapath, pods=pods))
            case plans.ConfigureDevice():
                if state := self._seen.wireguard.get(action.name):
                    wireguard = {**self._seen.wireguard, action.name: after_change(state, action)}
                    self._seen = replace(self._seen, wireguard=wireguard)

    def _way(self, device: str) -> int:
        """What `nodes` has for a device's name, as in WriteNodes."""
        if device == plans.QUARANTINED:
            return layouts.QUARANTINED
        return self._index(device) if device else 0

    def _index(self, name: str) -> int:
        if (index := netlink.find_index(self._ipr, name)) is None:
            raise NetlinkError(errno.ENODEV, f"{name} is gone")
        return index

    # WireGuard

    def _implementation(self, mode: Userspace, links: Mapping[str, Link]) -> Implementation:
        if mode is not Userspace.ALWAYS:
            # Asked again now and then while the answer is no: the module may be installed meanwhile.
            if not self._kernel_wireguard and time.monotonic() >= self._probe_after:
                self._kernel_wireguard = netlink.kernel_has_wireguard(self._ipr)
                self._probe_after = time.monotonic() + _PROBE_SECONDS
            if self._kernel_wireguard:
                return Implementation.KERNEL
        if mode is not Userspace.NEVER and (
            any(links[name].kind == "tun" for name in DEVICES if name in links)
            or userspace.available(self._settings.run_directory)
        ):
            return Implementation.USERSPACE
        return Implementation.NONE

    def _observe_device(self, link: Link) -> DeviceState:
        implementation = self._implementations.get(link.name)
        if implementation is None or (link.kind == "wireguard") != isinstance(
            implementation, KernelWireGuard
        ):
            implementation = KernelWireGuard() if link.kind == "wireguard" else uapi.Uapi()
            self._implementations[link.name] = implementation
        return implementation.observe(link.name)

    def _create(self, name: str) -> None:
        self._forget(name)
        if self._chosen is Implementation.KERNEL:
            netlink.create_wireguard(self._ipr, name)
            self._implementations[name] = KernelWireGuard()
        else:
            userspace.ensure_device(self._settings.run_directory, name)
            self._implementations[name] = uapi.Uapi()

    def _configure(self, change: plans.ConfigureDevice) -> None:
        self._implementations[change.name].configure(change)
        if change.fresh:
            self._forget_endpoints(change.name)
        for peer in change.peers:
            if peer.remove:
                self._endpoints.pop((change.name, peer.public_key), None)
            elif peer.endpoint:
                key = (change.name, peer.public_key)
                # One that was set again for its source's sake may be where the peer has roamed to.
                again = change.name in self._lost_source and key in self._endpoints
                self._endpoints[key] = self._endpoints[key] if again else peer.endpoint
        if not change.only_pods:
            self._lost_source -= {change.name}

    def _forget(self, name: str) -> None:
        self._implementations.pop(name, None)
        self._forget_endpoints(name)

    def _forget_endpoints(self, name: str) -> None:
        self._endpoints = {key: value for key, value in self._endpoints.items() if key[0] != name}

    # Programs, maps and filters

    def _load(self) -> None:
        if self._loaded:
            self._loaded.close()
            self._loaded = None
        programs = migrate.load(self._settings.pin_directory)
        try:
            self._loaded = _Loaded(programs, Maps.open(self._settings.pin_directory))
        except BaseException:
            programs.close()
            raise

    def _unload(self) -> None:
        if self._loaded:
            self._loaded.close()
            self._loaded = None
        remove_pins(self._settings.pin_directory)

    def _programs(self) -> loader.Programs:
        if self._loaded is None:
            raise RuntimeError("the programs are not loaded")
        return self._loaded.programs

    def _maps(self) -> Maps:
        if self._loaded is None:
            raise RuntimeError("the maps are not open")
        return self._loaded.maps

    def _observe_datapath(self, before: Datapath | None) -> Datapath | None:
        """With the addresses as they were `before`, if given."""
        # Pins that somebody removed are no longer what the next agent would find: load anew.
        if self._loaded is None or not (self._settings.pin_directory / "ipcache").exists():
            return None
        maps = self._loaded.maps
        settings, nodes = maps.settings.read(), maps.nodes.read()
        if before:
            addresses, pods = before.addresses, before.pods
        else:
            addresses, pods = self._observe_addresses(maps)
        return Datapath(
            addresses=addresses,
            pods=pods,
            nodes={number: index for number, index in nodes.items() if index != layouts.QUARANTINED},
            quarantined=frozenset(number for number, index in nodes.items() if index == layouts.QUARANTINED),
            settings=DatapathSettings(
                SettingsFlags(settings.flags), settings.local_node, settings.tunnel_mtu
            ),
        )

    def _observe_addresses(
        self, maps: Maps
    ) -> tuple[Mapping[Network, AddressEntry], Mapping[int, frozenset[bytes]]]:
        found = maps.ipcache.read_compact()
        addresses = {
            network: AddressEntry(entry.node, AddressFlags(entry.flags), entry.identity)
            for network, entry in found.prefixes.items()
        }
        pods: dict[int, frozenset[bytes]] = {}
        for (node, flags), singles in found.singles.items():
            entry = AddressEntry(node, AddressFlags(flags))
            if entry != pod_entry(node):
                addresses |= dict.fromkeys(map(single_network, singles), entry)
            else:
                pods[node] = frozenset(singles)
        return addresses, pods

    def _observe_hooked(self, links: Mapping[str, Link]) -> dict[int, str]:
        """Index -> name of the devices that have a clsact. One dump says where there can be filters at all:
        a node has hundreds of pod devices without any."""
        names = {link.index: link.name for link in links.values()}
        return {
            message["index"]: names[message["index"]]
            for message in self._ipr.get_qdiscs()
            if message.get_attr("TCA_KIND") == "clsact" and message["index"] in names
        }

    def _observe_attachments(self, hooked: Mapping[int, str]) -> Iterable[Attachment]:
        for index in sorted(hooked):
            filters = tc.find_filters(self._ipr, index)
            for direction in Direction:
                found = [each for each in filters if each.direction == _DIRECTIONS[direction]]
                if not found:
                    continue
                current = len(found) == 1 and found[0].first and self._is_loaded(found[0])
                yield Attachment(hooked[index], direction, found[0].name if current else STALE)

    def _observe_guarded(self, hooked: Mapping[int, str]) -> Iterable[str]:
        """Tunnel devices at whose egress policy has a filter."""
        for index, name in hooked.items():
            if name in DEVICES and any(
                each.direction == _DIRECTIONS[Direction.EGRESS]
                for each in tc.find_filters(self._ipr, index, tc.POLICY_OUT)
            ):
                yield name

    def _observe_boot_guard(self) -> bool:
        # Each question makes a kernel without nftables look for the module.
        if time.monotonic() < self._nftables_after:
            return False
        there = nftables.has_table(bootguard.TABLE)
        if there is None:
            self._nftables_after = time.monotonic() + _PROBE_SECONDS
        return bool(there)

    def _is_loaded(self, found: tc.Filter) -> bool:
        """The filter does what the program we loaded would do."""
        if self._loaded is None or found.name not in self._loaded.programs.names():
            return False
        return loader.does_the_same(found.program_id, self._loaded.programs.get(found.name))

    def _detach(self, attachment: Attachment) -> None:
        if (index := netlink.find_index(self._ipr, attachment.device)) is None:
            return
        for found in tc.find_filters(self._ipr, index):
            if found.direction == _DIRECTIONS[attachment.direction]:
                tc.detach(self._ipr, found)


def _index(links: Mapping[str, Link], name: str) -> int:
    return links[name].index if name in links else 0


def _addresses(links: Mapping[str, Link]) -> frozenset[Address]:
    """That a peer may be reached from; each pod's device has a link-local one."""
    found = (address for link in links.values() for address in link.addresses)
    return frozenset(address for address in found if not address.is_link_local)


def _is_remembered(action: plans.Action) -> bool:
    """What it does is known without looking again."""
    match action:
        case plans.WritePods() | plans.DeletePods():
            return True
        case plans.ConfigureDevice():
            return action.only_pods
        case _:
            return False


def _touched(action: plans.Action) -> Part:
    """What has to be looked at again after an action, done or failed."""
    match action:
        case plans.LoadDatapath() | plans.UnloadDatapath():
            # Which filters are up to date depends on what is loaded.
            return Part.MAPS | Part.ADDRESSES | Part.NETWORK
        case plans.WriteAddresses() | plans.DeleteAddresses() | plans.WritePods() | plans.DeletePods():
            return Part.ADDRESSES
        case plans.WriteNodes() | plans.WriteSettings():
            return Part.MAPS
        case plans.ConfigureDevice():
            return Part.WIREGUARD
        case plans.CreateDevice() | plans.DeleteDevice():
            return Part.NETWORK | Part.WIREGUARD
        case _:
            return Part.NETWORK


def remove_pins(directory: Path) -> None:
    """The directory is Meshwire's own. Raises OSError."""
    if not directory.exists():
        return
    for pin in directory.iterdir():
        pin.unlink()
    directory.rmdir()
