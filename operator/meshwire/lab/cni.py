"""The network part of a node: what routes, tunnels and pod devices there should be, as commands of `ip` and
`bridge`. Pure, but for the address pool's file and `apply`."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshwire.kube.client import Object
from meshwire.lab.files import write_private
from meshwire.lab.model import (
    OVERLAY_DEVICE,
    OVERLAY_PORT,
    OVERLAY_VNI,
    POD_GATEWAY,
    PODS,
    UPLINK,
    Address,
    LabError,
    Network,
    Settings,
    family_of,
    overlay_mac,
)

ROUTE_PROTOCOL: Final = 77
"""Marks our routes, so that those of an earlier process are found and flushed."""
TABLE: Final = "mw-cni"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the kernel, with the commands that make and remove it. `remove` names it exactly: it must
    not hit what replaced it."""

    tool: str
    add: str
    remove: str


@dataclass(frozen=True, slots=True)
class Remote:
    """Another node as the routes see it."""

    name: str
    addresses: tuple[Address, ...]
    pod_cidrs: tuple[Network, ...]


def parse_remote(node: Object) -> Remote:
    """From a Node object."""
    addresses = node.get("status", {}).get("addresses", ())
    return Remote(
        node["metadata"]["name"],
        tuple(ipaddress.ip_address(item["address"]) for item in addresses if item["type"] == "InternalIP"),
        tuple(ipaddress.ip_network(cidr) for cidr in node["spec"].get("podCIDRs", ())),
    )


def plan_routes(remotes: Iterable[Remote], settings: Settings) -> tuple[Entry, ...]:
    """To the pod CIDRs of the other nodes."""
    plan = _overlay_routes if settings.overlay else _underlay_routes
    return tuple(
        entry for remote in sorted(remotes, key=lambda remote: remote.name) for entry in plan(remote)
    )


def plan_pod_routes(pods: Iterable[tuple[Address, str]], remotes: Iterable[Remote]) -> tuple[Entry, ...]:
    """One per pod, as (address, node's name), where nodes have no CIDR. Pods of nodes not in `remotes` get
    none."""
    by_name = {remote.name: remote for remote in remotes}
    entries = []
    for address, node in sorted(pods, key=str):
        if (remote := by_name.get(node)) and (gateway := _same_family(remote.addresses, address.version)):
            entries.append(_route(f"{address}/{address.max_prefixlen} via {gateway} dev {UPLINK}"))
    return tuple(entries)


def _underlay_routes(remote: Remote) -> Iterator[Entry]:
    for cidr in remote.pod_cidrs:
        if gateway := _same_family(remote.addresses, cidr.version):
            yield _route(f"{cidr} via {gateway} dev {UPLINK}")


def _overlay_routes(remote: Remote) -> Iterator[Entry]:
    """As flannel does: the remote's overlay device has the first address of its CIDR, every node knows its
    MAC."""
    if not remote.addresses:
        return
    mac = overlay_mac(remote.name)
    # Both families travel inside the underlay's first.
    forward = f"{mac} dev {OVERLAY_DEVICE} dst {remote.addresses[0]}"
    yield Entry("bridge", f"fdb replace {forward} self permanent", f"fdb delete {forward} self")
    for cidr in remote.pod_cidrs:
        neighbour = f"{cidr[0]} lladdr {mac} dev {OVERLAY_DEVICE}"
        yield Entry("ip", f"neigh replace {neighbour} nud permanent", f"neigh delete {neighbour}")
        yield _route(f"{cidr} via {cidr[0]} dev {OVERLAY_DEVICE} onlink")


def _route(route: str) -> Entry:
    return Entry("ip", f"route replace {route} proto {ROUTE_PROTOCOL}", f"route delete {route}")


def _same_family(addresses: Iterable[Address], version: int) -> Address | None:
    return next((address for address in addresses if address.version == version), None)


def overlay_commands(
    name: str, local: Address, cidrs: Iterable[Network], settings: Settings
) -> tuple[str, ...]:
    """Makes this node's overlay device."""
    return (
        f"link add {OVERLAY_DEVICE} address {overlay_mac(name)} mtu {settings.pod_mtu} type vxlan"
        f" id {OVERLAY_VNI} dstport {OVERLAY_PORT} local {local} dev {UPLINK} nolearning",
        *(
            f"address add {cidr[0]}/{cidr.max_prefixlen} dev {OVERLAY_DEVICE}"
            + (" nodad" if cidr.version == 6 else "")
            for cidr in cidrs
        ),
        f"link set {OVERLAY_DEVICE} up",
    )


def masquerade_rules(families: Iterable[str]) -> str:
    """For nft: pods reach what is outside of the cluster under their node's address."""
    matches = [("ip" if family == "v4" else "ip6", PODS[family]) for family in families]
    rules = "\n".join(
        f"    oifname {UPLINK} {match} saddr {pods} {match} daddr != {pods} masquerade"
        for match, pods in matches
    )
    return (
        # Adding it first makes the deletion valid where there is none: one transaction either way.
        f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n"
        f"  chain postrouting {{\n    type nat hook postrouting priority srcnat;\n{rules}\n  }}\n}}\n"
    )


def pod_device_commands(
    device: str,
    netns: str,
    label: str,
    addresses: Sequence[Address],
    node_addresses: Sequence[Address],
    mtu: int,
) -> tuple[str, ...]:
    """On the node: the veth pair, its gateway addresses, and a route to each of the pod's addresses. The
    node itself talks to its pods under its own address."""
    families = [family_of(address) for address in addresses]
    gateways = {
        "v4": f"{POD_GATEWAY['v4']}/32 dev {device} scope link",
        "v6": f"{POD_GATEWAY['v6']}/64 dev {device} nodad",
    }
    return (
        f"link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {netns}",
        f"link set {device} alias {label} up",
        *(f"address add {gateways[family]}" for family in families),
        *(
            f"route replace {address}/{address.max_prefixlen} dev {device}"
            + (f" src {source}" if (source := _same_family(node_addresses, address.version)) else "")
            for address in addresses
        ),
    )


def pod_commands(addresses: Iterable[Address]) -> tuple[str, ...]:
    """Inside of the pod."""
    commands = ["link set lo up", "link set eth0 up"]
    for address in addresses:
        gateway = POD_GATEWAY[family_of(address)]
        if address.version == 4:
            commands += [
                f"address add {address}/32 dev eth0",
                f"route add {gateway} dev eth0 scope link",
                f"route add default via {gateway} dev eth0",
            ]
        else:
            commands += [
                f"address add {address}/128 dev eth0 nodad",
                f"route add default via {gateway} dev eth0",
            ]
    return tuple(commands)


def changes(before: Sequence[Entry], after: Sequence[Entry]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """(to add, to remove), each in an order that works."""
    old, new = frozenset(before), frozenset(after)
    return tuple(e for e in after if e not in old), tuple(e for e in reversed(before) if e not in new)


async def apply(before: Sequence[Entry], after: Sequence[Entry]) -> None:
    """Adds first, so that a route that changes is never missing. Raises LabError."""
    add, remove = changes(before, after)
    for tool in ("bridge", "ip"):
        if lines := [entry.add for entry in add if entry.tool == tool]:
            await batch(lines, tool=tool)
    for tool in ("ip", "bridge"):
        if lines := [entry.remove for entry in remove if entry.tool == tool]:
            await batch(lines, tool=tool, force=True)


async def batch(
    lines: Iterable[str], *, tool: str = "ip", netns: str | None = None, force: bool = False
) -> None:
    """Runs commands of `ip` or `bridge` in a named network namespace or our own; `force` passes over those
    that fail. Raises LabError."""
    command = [tool, *(["-force"] if force else []), *(["-n", netns] if netns else []), "-batch", "-"]
    await run(command, "\n".join(lines), check=not force)


async def run(command: Sequence[str], text: str = "", *, check: bool = True) -> None:
    """Raises LabError with what the command had to say."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate(text.encode())
    if process.returncode and check:
        raise LabError(f"{' '.join(command)}: {errors.decode().strip()}\n{text}")


FIRST_NUMBER: Final = 2
"""Within a CIDR: 0 is the overlay device's, 1 by custom a gateway's."""


def pick(taken: Iterable[int], last: int, end: int) -> int:
    """The next free number after `last` below `end`, from the start again when there is none: an address
    just given back rests as long as possible. Raises LabError."""
    used = frozenset(taken)
    for number in itertools.chain(
        range(max(last + 1, FIRST_NUMBER), end), range(FIRST_NUMBER, min(last + 1, end))
    ):
        if number not in used:
            return number
    raise LabError("no pod address is left on this node")


class NodePool:
    """A node's pod addresses, out of its own CIDRs. A pod has the same number in both families."""

    def __init__(self, cidrs: Sequence[Network]) -> None:
        self.cidrs = tuple(cidrs)
        self._taken: set[int] = set()
        self._last = 0

    def allocate(self, owner: str) -> tuple[Address, ...]:
        end = min(int(cidr.num_addresses) for cidr in self.cidrs) - 1
        number = self._last = pick(self._taken, self._last, end)
        self._taken.add(number)
        return tuple(cidr[number] for cidr in self.cidrs)

    def release(self, addresses: Sequence[Address]) -> None:
        self._taken.discard(int(addresses[0]) - int(self.cidrs[0][0]))


class ClusterPool:
    """The cluster's pod addresses, for nodes without CIDR: a file that all nodes share under a lock."""

    def __init__(self, path: Path, families: Iterable[str]) -> None:
        self.path = path
        self.networks = tuple(PODS[family] for family in families)

    def allocate(self, owner: str) -> tuple[Address, ...]:
        with self._locked() as pool:
            end = min(int(network.num_addresses) for network in self.networks) - 1
            number = pick(map(int, pool["taken"]), int(pool["last"]), end)
            pool["last"] = number
            pool["taken"][str(number)] = owner
        return tuple(network[number] for network in self.networks)

    def release(self, addresses: Sequence[Address]) -> None:
        with self._locked() as pool:
            pool["taken"].pop(str(int(addresses[0]) - int(self.networks[0][0])), None)

    def release_all(self, owner: str) -> None:
        with self._locked() as pool:
            pool["taken"] = {number: holder for number, holder in pool["taken"].items() if holder != owner}

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pool = json.loads(self.path.read_text()) if self.path.exists() else {"last": 0, "taken": {}}
            yield pool
            write_private(self.path, json.dumps(pool).encode())


def pods_elsewhere(pods: Mapping[str, Object], node: str) -> Iterator[tuple[Address, str]]:
    """(address, node) of every pod that has an address of its own on another node."""
    for pod in pods.values():
        spec, status = pod["spec"], pod.get("status", {})
        if spec.get("hostNetwork") or spec.get("nodeName", node) == node:
            continue
        if status.get("phase") in ("Succeeded", "Failed"):
            continue
        for item in status.get("podIPs", ()):
            yield ipaddress.ip_address(item["ip"]), spec["nodeName"]
