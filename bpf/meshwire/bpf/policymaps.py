"""The pinned maps of the policy programs as Python values, as `meshwire.bpf.maps` does for the encrypting
ones."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from ctypes import c_uint32
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Final

from meshwire.bpf import policylayouts as layouts
from meshwire.bpf._elements import (
    Network,
    delete,
    delete_many,
    items,
    lookup,
    network_of,
    open_pinned,
    prefix_of,
    raw_items,
    update,
    update_many,
)
from meshwire.bpf._libbpf import SampleFunction, check, library, map_info
from meshwire.bpf.layouts import Direction, Family, Prefix, Reason
from meshwire.bpf.maps import Metrics
from meshwire.bpf.policylayouts import (
    POLICY_BITS_ALL,
    POLICY_BITS_PROTOCOL,
    CidrFlag,
    EndpointFlag,
    FlowFlag,
    StateFlag,
)

Address = IPv4Address | IPv6Address

_IP: Final = struct.Struct("=16sB3x")
_NUMBER: Final = struct.Struct("=I")
"""`layouts.Ip` and `layouts.Identity`."""


@dataclass(frozen=True, slots=True)
class CidrEntry:
    """`number` 0: no policy names the block."""

    number: int
    flags: CidrFlag


@dataclass(frozen=True, slots=True)
class EndpointEntry:
    """A pod of this node. `audit_set` 0: the same as `set`."""

    ifindex: int
    identity: int
    set: int
    audit_set: int
    revision: int
    born: int
    flags: EndpointFlag


@dataclass(frozen=True, slots=True)
class PolicyKey:
    """`protocol` None: every protocol. Of `port`, the first `port_bits` bits count; of ICMP it is the type
    in the upper and the code in the lower byte."""

    set: int
    identity: int
    direction: Direction
    protocol: int | None = None
    port: int = 0
    port_bits: int = 0


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    rule: int
    deny: bool


@dataclass(frozen=True, slots=True)
class FlowKey:
    """The packet that began the flow. `direction` EGRESS: by the policy of `src`, else of `dst`. Of ICMP,
    `sport` is an echo's identifier and `dport` as in PolicyKey."""

    src: Address
    dst: Address
    protocol: int
    sport: int
    dport: int
    direction: Direction


@dataclass(frozen=True, slots=True)
class FlowEntry:
    """`expires_ns` is on the clock of CLOCK_MONOTONIC."""

    expires_ns: int
    revision: int
    peer: int
    flags: FlowFlag
    reason: Reason


@dataclass(frozen=True, slots=True)
class Event:
    """A packet that was dropped, or would be by the policies in mode Audit. Of one that couldn't be read,
    there are no addresses. `time_ns` is on the clock of CLOCK_MONOTONIC, `length` is that of the IP packet
    in bytes; `rule` 0: no rule, i.e. the default. Ports as in FlowKey."""

    time_ns: int
    src: Address | None
    dst: Address | None
    src_identity: int
    dst_identity: int
    rule: int
    ifindex: int
    length: int
    sport: int
    dport: int
    protocol: int
    direction: Direction
    reason: Reason


class Identities:
    """Address -> identity number. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[Address, int]:
        return {
            _address_of(key): value.number for key, value in items(self._fd, layouts.Ip, layouts.Identity)
        }

    def read_packed(self) -> dict[bytes, int]:
        """The same with packed addresses: there are hundreds of thousands."""
        found: dict[bytes, int] = {}
        sizes = ctypes.sizeof(layouts.Ip), ctypes.sizeof(layouts.Identity)
        for keys, values in raw_items(self._fd, *sizes):
            pairs = zip(_IP.iter_unpack(keys), _NUMBER.iter_unpack(values), strict=True)
            for (address, family), (number,) in pairs:
                found[address if family == Family.IPV6 else address[:4]] = number
        return found

    def find(self, address: Address) -> int | None:
        """None: there is no entry."""
        value = layouts.Identity()
        found = lookup(self._fd, _ip_of(address), value, f"reading {address} from identities")
        return value.number if found else None

    def update(self, address: Address, number: int) -> None:
        update(
            self._fd, _ip_of(address), layouts.Identity(number=number), f"writing {address} to identities"
        )

    def update_many(self, entries: Mapping[Address, int]) -> None:
        elements = [
            (_ip_of(address), layouts.Identity(number=number)) for address, number in entries.items()
        ]
        update_many(self._fd, elements, "writing identities")

    def delete(self, address: Address) -> None:
        """An address that isn't there is no error."""
        delete(self._fd, _ip_of(address), f"deleting {address} from identities")


class Cidrs:
    """Block -> CidrEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[Network, CidrEntry]:
        return {
            network_of(key): CidrEntry(value.number, CidrFlag(value.flags))
            for key, value in items(self._fd, Prefix, layouts.Cidr)
        }

    def update(self, network: Network, entry: CidrEntry) -> None:
        value = layouts.Cidr(number=entry.number, flags=entry.flags)
        update(self._fd, prefix_of(network), value, f"writing {network} to cidrs")

    def delete(self, network: Network) -> None:
        """A block that isn't there is no error."""
        delete(self._fd, prefix_of(network), f"deleting {network} from cidrs")


class Endpoints:
    """Address of a pod of this node -> EndpointEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[Address, EndpointEntry]:
        return {
            _address_of(key): EndpointEntry(
                value.ifindex,
                value.identity,
                value.set,
                value.audit_set,
                value.revision,
                value.born,
                EndpointFlag(value.flags),
            )
            for key, value in items(self._fd, layouts.Ip, layouts.Endpoint)
        }

    def update(self, address: Address, entry: EndpointEntry) -> None:
        """Adds or replaces in one step: a packet sees the old entry or the new one."""
        value = layouts.Endpoint(
            ifindex=entry.ifindex,
            identity=entry.identity,
            set=entry.set,
            audit_set=entry.audit_set,
            revision=entry.revision,
            born=entry.born,
            flags=entry.flags,
        )
        update(self._fd, _ip_of(address), value, f"writing {address} to endpoints")

    def delete(self, address: Address) -> None:
        """An address that isn't there is no error."""
        delete(self._fd, _ip_of(address), f"deleting {address} from endpoints")


class Services:
    """The addresses of services. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> set[Address]:
        return {_address_of(key) for key, _ in items(self._fd, layouts.Ip, layouts.Service)}

    def update(self, address: Address) -> None:
        update(self._fd, _ip_of(address), layouts.Service(), f"writing {address} to services")

    def delete(self, address: Address) -> None:
        """An address that isn't there is no error."""
        delete(self._fd, _ip_of(address), f"deleting {address} from services")


class Policies:
    """PolicyKey -> PolicyEntry. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[PolicyKey, PolicyEntry]:
        return {
            _policy_key_of(key): PolicyEntry(value.rule, bool(value.deny))
            for key, value in items(self._fd, layouts.PolicyKey, layouts.PolicyValue)
        }

    def update(self, key: PolicyKey, entry: PolicyEntry) -> None:
        update(self._fd, _packed(key), _value_of(entry), f"writing {key} to policy")

    def update_many(self, entries: Mapping[PolicyKey, PolicyEntry]) -> None:
        """Not in one step: write to a set that no endpoint uses yet."""
        elements = [(_packed(key), _value_of(entry)) for key, entry in entries.items()]
        update_many(self._fd, elements, "writing policy entries")

    def delete(self, key: PolicyKey) -> None:
        """A key that isn't there is no error."""
        delete(self._fd, _packed(key), f"deleting {key} from policy")

    def delete_many(self, keys: Iterable[PolicyKey]) -> None:
        """Keys that aren't there are no error."""
        delete_many(self._fd, [_packed(key) for key in keys], "deleting policy entries")


class Flows:
    """FlowKey -> FlowEntry, expired ones among them: they go when room is needed. All methods raise
    OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> dict[FlowKey, FlowEntry]:
        return {
            FlowKey(
                _address(key.src, key.family),
                _address(key.dst, key.family),
                key.protocol,
                socket.ntohs(key.sport),
                socket.ntohs(key.dport),
                Direction(key.direction),
            ): FlowEntry(
                value.expires, value.revision, value.peer, FlowFlag(value.flags), Reason(value.reason)
            )
            for key, value in items(self._fd, layouts.FlowKey, layouts.Flow)
        }

    def count(self, *, now_ns: int = 0) -> int:
        """Flows that have not expired at `now_ns` of CLOCK_MONOTONIC."""
        return sum(value.expires > now_ns for _, value in items(self._fd, layouts.FlowKey, layouts.Flow))

    def purge(self, addresses: Collection[Address]) -> int:
        """Deletes the flows that have one of the addresses at either end; answers with how many."""
        wanted = {(address.version, _padded(address)) for address in addresses}
        keys = [
            key
            for key, _ in items(self._fd, layouts.FlowKey, layouts.Flow)
            if (key.family, bytes(key.src)) in wanted or (key.family, bytes(key.dst)) in wanted
        ]
        delete_many(self._fd, keys, "deleting flows")
        return len(keys)


class State:
    """Voids the verdicts that the programs remember, and says how they work. All methods raise OSError."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> StateFlag:
        return StateFlag(self._read().flags)

    def renew(self, flags: StateFlag) -> None:
        """After any change of the other maps. Until then, and for a second at most, packets of known flows
        may be treated as before it."""
        state = self._read()
        state.generation = (state.generation + 1) % 2**32
        state.flags = flags
        update(self._fd, c_uint32(0), state, "writing policy_state")

    def _read(self) -> layouts.State:
        state: layouts.State
        ((_, state),) = items(self._fd, c_uint32, layouts.State)
        return state


class Events:
    """Reads the ring buffer, of which there can be one reader; a context manager."""

    def __init__(self, fd: int) -> None:
        """Raises OSError."""
        self._found: list[Event] = []
        # Referenced from C for as long as the buffer is.
        self._function = SampleFunction(self._take)
        self._handle: int | None = library().ring_buffer__new(fd, self._function, None, None)
        if not self._handle:
            error = ctypes.get_errno()
            raise OSError(error, f"mapping events: {os.strerror(error)}")

    def fileno(self) -> int:
        """Readable when there are events, also for an event loop."""
        return check(library().ring_buffer__epoll_fd(self._handle), "waiting for events")

    def read(self, *, timeout_s: float = 0) -> list[Event]:
        """All that there are; waits for the first one up to `timeout_s`. Raises OSError."""
        result = library().ring_buffer__consume(self._handle)
        if not result and timeout_s:
            result = library().ring_buffer__poll(self._handle, round(timeout_s * 1000))
        if result != -errno.EINTR:
            check(result, "reading events")
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        if self._handle:
            library().ring_buffer__free(self._handle)
        self._handle = None

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, context: int | None, record: int, size: int) -> int:
        self._found.append(_event_of(layouts.Event.from_buffer_copy(ctypes.string_at(record, size))))
        return 0


class PolicyMaps:
    """The pinned maps; a context manager that closes their file descriptors."""

    def __init__(
        self,
        *,
        identities: Identities,
        cidrs: Cidrs,
        endpoints: Endpoints,
        services: Services,
        policies: Policies,
        flows: Flows,
        state: State,
        metrics: Metrics,
        events: int,
        event_budget: int,
        capacities: Mapping[str, int],
        resources: ExitStack,
    ) -> None:
        """`events` and `event_budget` are file descriptors. `capacities`: how many entries there is room
        for, by the name of the map."""
        self.identities = identities
        self.cidrs = cidrs
        self.endpoints = endpoints
        self.services = services
        self.policies = policies
        self.flows = flows
        self.state = state
        self.metrics = metrics
        self._events = events
        self._event_budget = event_budget
        self.capacities = capacities
        self._resources = resources

    @classmethod
    def open(cls, pin_directory: Path) -> PolicyMaps:
        """Raises FileNotFoundError where they have not been loaded yet, and other OSErrors."""
        with ExitStack() as resources:
            capacities: dict[str, int] = {}

            def opened(name: str) -> int:
                fd = open_pinned(pin_directory / name, resources)
                capacities[name] = map_info(fd).max_entries
                return fd

            return cls(
                identities=Identities(opened("identities")),
                cidrs=Cidrs(opened("cidrs")),
                endpoints=Endpoints(opened("endpoints")),
                services=Services(opened("services")),
                policies=Policies(opened("policy")),
                flows=Flows(opened("flows")),
                state=State(opened("policy_state")),
                metrics=Metrics(opened("policy_metrics")),
                events=opened("events"),
                event_budget=opened("event_budget"),
                capacities=capacities,
                resources=resources.pop_all(),
            )

    def open_events(self) -> Events:
        """Raises OSError."""
        return Events(self._events)

    def lost_events(self) -> int:
        """Events since the maps were made for which there was no room or no budget. Raises OSError."""
        cpus = check(library().libbpf_num_possible_cpus(), "counting CPUs")
        ((_, budgets),) = items(self._event_budget, c_uint32, layouts.EventBudget * cpus)
        return sum(each.lost for each in budgets)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> PolicyMaps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _padded(address: Address) -> bytes:
    return address.packed.ljust(16, b"\0")


def _ip_of(address: Address) -> layouts.Ip:
    return layouts.Ip(addr=(ctypes.c_uint8 * 16)(*address.packed), family=Family(address.version))


def _address(addr: Iterable[int], family: int) -> Address:
    packed = bytes(addr)
    return IPv4Address(packed[:4]) if family == Family.IPV4 else IPv6Address(packed)


def _address_of(key: layouts.Ip) -> Address:
    return _address(key.addr, key.family)


def _packed(key: PolicyKey) -> layouts.PolicyKey:
    return layouts.PolicyKey(
        prefixlen=POLICY_BITS_ALL if key.protocol is None else POLICY_BITS_PROTOCOL + key.port_bits,
        set=key.set,
        identity=key.identity,
        direction=key.direction,
        protocol=key.protocol or 0,
        port=socket.htons(key.port),
    )


def _policy_key_of(key: layouts.PolicyKey) -> PolicyKey:
    if key.prefixlen == POLICY_BITS_ALL:
        return PolicyKey(key.set, key.identity, Direction(key.direction))
    return PolicyKey(
        key.set,
        key.identity,
        Direction(key.direction),
        key.protocol,
        socket.ntohs(key.port),
        key.prefixlen - POLICY_BITS_PROTOCOL,
    )


def _value_of(entry: PolicyEntry) -> layouts.PolicyValue:
    return layouts.PolicyValue(rule=entry.rule, deny=entry.deny)


def _event_of(event: layouts.Event) -> Event:
    return Event(
        event.time,
        _address(event.src, event.family) if event.family else None,
        _address(event.dst, event.family) if event.family else None,
        event.src_identity,
        event.dst_identity,
        event.rule,
        event.ifindex,
        event.length,
        socket.ntohs(event.sport),
        socket.ntohs(event.dport),
        event.protocol,
        Direction(event.direction),
        Reason(event.reason),
    )
