"""Attaches programs to devices as clsact filters, through pyroute2. Only filters whose name starts with
that of a Place are ours; everything else on a device belongs to somebody else and stays.

A clsact without filters changes no packet, but the kernel doesn't say who made it: another agent may be
about to add its filter. So `detach` leaves it."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.bpf.layouts import Direction
from meshwire.bpf.loader import Program

NAME_PREFIX: Final = "mw_"
POLICY_NAME_PREFIX: Final = "mwp_"
PRIORITY: Final = 1
HANDLE: Final = 0x4D57
POLICY_HANDLE: Final = 0x4D70

# linux/pkt_sched.h: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS and TC_H_MIN_EGRESS)
_PARENTS: Final = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}
# linux/if_ether.h
_ETH_P_ALL: Final = 0x0003
# linux/pkt_cls.h; pyroute2 decodes attributes up to TCA_BPF_FLAGS.
_TCA_BPF_ID: Final = 11


class Conflict(Exception):
    """Something of somebody else's on the device (an `ingress` qdisc, a filter of another kind at our
    priority) leaves no place for our filter."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one kind of our filters is: at most one of those whose names start with `prefix`, at `priority`
    and before all others of it, under the first free handle from `handle` on."""

    prefix: str
    priority: int
    handle: int


ENCRYPTION: Final = Place(NAME_PREFIX, PRIORITY, HANDLE)
POLICY_POD: Final = Place(POLICY_NAME_PREFIX, PRIORITY, POLICY_HANDLE)
"""Policy programs on a pod's veth, where nothing is encrypted."""
POLICY_OUT: Final = Place(POLICY_NAME_PREFIX, 2, POLICY_HANDLE)
"""Policy programs on devices to other nodes, behind the encrypting ones: what goes into a tunnel leaves by
that, and what must not arrive in clear doesn't."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One of our filters. `program_id` 0: the kernel didn't say. `first`: nobody's filter of its priority
    runs before it."""

    ifindex: int
    direction: Direction
    name: str
    program_id: int
    priority: int
    handle: int
    first: bool = True


def find_filters(ipr: IPRoute, ifindex: int, place: Place = ENCRYPTION) -> list[Filter]:
    """Our filters of one kind on a device, wherever they are, in the order in which they run; none where the
    device is gone. Raises NetlinkError."""
    return [
        found
        for direction in Direction
        for found in _find(ipr, ifindex, direction)
        if found.name.startswith(place.prefix)
    ]


def add_clsact(ipr: IPRoute, ifindex: int) -> None:
    """Makes sure that a device has a clsact. Where it has none, the kernel takes the device's queues out of
    use for an RCU grace period and drops what is sent meanwhile (qdisc_graft() in net/sched/sch_api.c): do
    it before there is traffic to lose. Raises Conflict, and NetlinkError, e.g. with ENODEV."""
    try:
        ipr.tc("add", "clsact", ifindex)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
        # An `ingress` qdisc takes egress filters too, and runs them on what arrives.
        kinds = {each.get_attr("TCA_KIND") for each in ipr.get_qdiscs() if each["index"] == ifindex}
        if "clsact" not in kinds:
            raise Conflict(
                f"device {ifindex} has an ingress qdisc where a clsact is needed: "
                "whoever added it can use a clsact just as well"
            ) from error


def attach(
    ipr: IPRoute, ifindex: int, direction: Direction, program: Program, place: Place = ENCRYPTION
) -> None:
    """Makes `program` the first filter of its priority on the device and our only one of its kind in that
    direction. A filter of ours that comes first already is replaced in one step; one that others have got in
    front of keeps working until the new one is in place. Raises Conflict, and NetlinkError, e.g. with
    ENODEV."""
    add_clsact(ipr, ifindex)
    filters = list(_find(ipr, ifindex, direction))
    ours = [each for each in filters if each.name.startswith(place.prefix)]
    handle = next(
        (each.handle for each in ours if each.first and each.priority == place.priority),
        # Filters of one priority run newest first, so coming first again takes a new filter: a handle of its
        # own.
        min(set(range(place.handle, place.handle + len(filters) + 1)) - {each.handle for each in filters}),
    )
    try:
        ipr.tc(
            "replace-filter",
            "bpf",
            ifindex,
            handle,
            parent=_PARENTS[direction],
            prio=place.priority,
            protocol=_ETH_P_ALL,
            fd=program.fd,
            name=program.name,
            direct_action=True,
        )
    except NetlinkError as error:
        if error.code == errno.EINVAL:
            raise Conflict(
                f"device {ifindex} takes no {direction.name.lower()} filter at priority {place.priority}: "
                "`tc filter show` says whose is in the way"
            ) from error
        raise
    for stale in ours:
        if (stale.priority, stale.handle) != (place.priority, handle):
            detach(ipr, stale)


def detach(ipr: IPRoute, filter: Filter) -> None:
    """Removes one filter, and nothing else; one that is gone already is no error. Raises NetlinkError."""
    try:
        ipr.tc(
            "del-filter",
            "bpf",
            filter.ifindex,
            filter.handle,
            parent=_PARENTS[filter.direction],
            prio=filter.priority,
            protocol=_ETH_P_ALL,
        )
    except NetlinkError as error:
        # EINVAL: the device has no clsact any more.
        if error.code not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            raise


def _find(ipr: IPRoute, ifindex: int, direction: Direction) -> Iterator[Filter]:
    """Everybody's filters; ones that aren't programs have no name."""
    before = 0
    for message in ipr.get_filters(index=ifindex, parent=_PARENTS[direction]):
        # The kernel also reports each priority by itself, without a filter.
        if not message["handle"]:
            continue
        options = message.get_attr("TCA_OPTIONS") if message.get_attr("TCA_KIND") == "bpf" else None
        priority = message["info"] >> 16
        yield Filter(
            ifindex,
            direction,
            (options.get_attr("TCA_BPF_NAME") if options else None) or "",
            _program_id(options) if options else 0,
            priority,
            message["handle"],
            priority != before,
        )
        before = priority


def _program_id(options: Any) -> int:
    for slot in options["attrs"]:
        if slot[0] == "UNKNOWN" and slot[1]["header"]["type"] == _TCA_BPF_ID:
            value: int = struct.unpack_from("=I", slot[1].data, slot[1].offset + 4)[0]
            return value
    return 0
