"""The eyes of `meshwire preflight`: each function looks at one thing on this node and changes nothing. They
raise OSError or NetlinkError where they may not look."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

from meshwire.api import names
from meshwire.api.fields import Address, Network
from meshwire.cli import bpfcall
from meshwire.cli.facts import (
    Attempts,
    Boot,
    Chain,
    ClusterNode,
    Device,
    Devices,
    Filter,
    Firewall,
    Forwarding,
    Hook,
    Kernel,
    Port,
    ReversePath,
    WireGuard,
)
from meshwire.encryption.discovery import find_paths
from meshwire.encryption.netlink import observe_links, observe_routes

SYSCTL: Final = Path("/proc/sys")
CAPABILITIES: Final = {12: "net_admin", 13: "net_raw", 21: "sys_admin", 38: "perfmon", 39: "bpf"}
"""Bit -> name, as in linux/capability.h; those that Meshwire has to do with."""
PROGRAMS: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where services find theirs, whatever a person's shell does."""
SANDBOX_SECONDS: Final = 60
"""Long enough for modprobe on a slow disk."""


def find_kernel() -> Kernel:
    system = os.uname()
    return Kernel(system.release, system.machine)


def find_capabilities() -> frozenset[str]:
    """Names of this process's effective capabilities, of those in CAPABILITIES."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    bits = int(found[1], 16) if found else 0
    return frozenset(name for bit, name in CAPABILITIES.items() if bits >> bit & 1)


def find_btf() -> bool:
    return Path("/sys/kernel/btf/vmlinux").exists()


def find_bpffs() -> bool:
    return has_mount(Path("/proc/self/mountinfo").read_text(), "/sys/fs/bpf", "bpf")


def has_mount(mountinfo: str, path: str, kind: str) -> bool:
    """Whether the text of a mountinfo file has a file system of `kind` mounted at `path`."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == path and after.split()[0] == kind:
            return True
    return False


def try_kernel() -> Attempts:
    """Tries things out in a network namespace of a process of its own (sandbox.py)."""
    # -P: modules come from where this one came from, never from the directory somebody happens to stand in.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", "meshwire.cli.sandbox"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=SANDBOX_SECONDS, env=environment, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return Attempts({"namespace": lines[-1] if lines else str(error)})
    except (OSError, subprocess.TimeoutExpired) as error:
        return Attempts({"namespace": str(error)})
    results: dict[str, str] = json.loads(run.stdout)
    return Attempts(results, unprivileged=bool(results.pop("unprivileged", "")))


def find_wireguard(attempts: Attempts) -> WireGuard:
    return WireGuard(
        attempts=attempts,
        program=shutil.which("wireguard-go") or "",
        tun=Path("/dev/net/tun").is_char_device(),
    )


def find_libbpf() -> str:
    """Why libbpf.so.1 can't be loaded; empty where it can."""
    try:
        ctypes.CDLL("libbpf.so.1")
    except OSError as error:
        return str(error)
    return ""


def find_devices(
    *,
    uplinks: Sequence[str] = (),
    overlays: Sequence[str] = (),
    nodes: Iterable[ClusterNode] = (),
) -> Devices:
    """The devices pod traffic leaves by: those named, or those the agent would find, being one of these
    nodes. Without any of these, the ones with a default route. Raises NetlinkError."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        links, routes = observe_links(ipr), observe_routes()
    local = {address for link in links.values() for address in link.addresses}
    own: set[Address] = set()
    remote: list[Network] = []
    for node in nodes:
        addresses = {ip_address(address) for address in node.addresses}
        if addresses & local:
            own |= addresses
        else:
            remote += [ip_network(address) for address in addresses]
            remote += [ip_network(cidr) for cidr in node.pod_cidrs]
    paths = find_paths(links, routes, own_addresses=own, remote=remote)
    uplinks = [name for name in uplinks if name in links] or paths.uplinks
    overlays = [name for name in overlays if name in links] or paths.overlays

    def devices(found: Iterable[str]) -> tuple[Device, ...]:
        return tuple(Device(name=name, kind=links[name].kind, mtu=links[name].mtu) for name in found)

    others = sorted(links.keys() - {*uplinks, *overlays, "lo"})
    return Devices(uplinks=devices(uplinks), overlays=devices(overlays), others=devices(others))


def find_ports(base: int) -> list[Port]:
    """The UDP ports of the two tunnel devices, `base` and the next."""
    devices = {name for _, name in socket.if_nameindex()}
    return [_find_port(base + offset, names.device_name(offset), devices) for offset in (0, 1)]


def _find_port(number: int, own_device: str, devices: Iterable[str]) -> Port:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        if family == socket.AF_INET6:
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            udp.bind(("", number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return Port(number, free=False, holder=_find_holder(number, own_device, devices))
    return Port(number, free=True)


def _find_holder(number: int, own_device: str, devices: Iterable[str]) -> str:
    tables = [path.read_text() for path in (Path("/proc/net/udp"), Path("/proc/net/udp6")) if path.exists()]
    process = _find_process({inode for table in tables for inode in udp_inodes(table, number)} - {0})
    # WireGuard in the kernel holds a socket without an inode; asking the device itself would give its
    # private key.
    if own_device in devices and (not process or process.startswith("wireguard-go")):
        return own_device
    return process or next((name for name in ("cilium_wg0",) if name in devices), "")


def udp_inodes(table: str, number: int) -> set[int]:
    """Inodes of the sockets bound to a port, from the text of /proc/net/udp or udp6; 0 for one of the
    kernel's."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[9]) for row in rows if int(row[1].rpartition(":")[2], 16) == number}


def _find_process(inodes: set[int]) -> str:
    """`name (pid)` of a process that has one of these sockets open, empty where none can be seen."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for directory in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) in wanted for entry in directory.iterdir()):
                return f"{(directory.parent / 'comm').read_text().strip()} (pid {directory.parent.name})"
        except OSError:
            continue  # Gone meanwhile, or not ours to see.
    return ""


def find_forwarding() -> Forwarding:
    disabled = SYSCTL / "net/ipv6/conf/all/disable_ipv6"
    return Forwarding(
        ipv4=_sysctl("net/ipv4/ip_forward") == 1,
        ipv6=_sysctl("net/ipv6/conf/all/forwarding") == 1
        if disabled.exists() and disabled.read_text().strip() == "0"
        else None,
    )


def find_boot() -> Boot:
    # sd_booted(3)
    return Boot(
        systemd=Path("/run/systemd/system").is_dir(), nft=shutil.which("nft", path=PROGRAMS) is not None
    )


def find_reverse_path(devices: Devices) -> ReversePath:
    watched = [device.name for device in (*devices.uplinks, *devices.overlays)]
    watched += [device.name for device in devices.others if device.name.startswith("meshwire_wg")]
    return ReversePath(
        all=_sysctl("net/ipv4/conf/all/rp_filter"),
        devices={name: _sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in watched},
    )


def _sysctl(name: str) -> int:
    return int((SYSCTL / name).read_text())


HOOKS: Final = (
    ("ingress", 0xFFFFFFF2, bpfcall.BPF_TCX_INGRESS),
    ("egress", 0xFFFFFFF3, bpfcall.BPF_TCX_EGRESS),
)
"""Name, parent of clsact, attach type of tcx."""


def find_filters(devices: Devices) -> list[Hook]:
    """TC filters on both hooks of the devices pod traffic leaves by."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        return [
            Hook(
                device=device.name,
                direction=direction,
                filters=_read_filters(ipr, device.name, parent),
                blocked=_has_ingress_qdisc(ipr, device.name),
            )
            for device in (*devices.uplinks, *devices.overlays)
            for direction, parent, _ in HOOKS
        ]


def _has_ingress_qdisc(ipr: Any, device: str) -> bool:
    qdiscs = ipr.get_qdiscs(index=socket.if_nametoindex(device))
    return any(message.get_attr("TCA_KIND") == "ingress" for message in qdiscs)


def _read_filters(ipr: Any, device: str, parent: int) -> tuple[Filter, ...]:
    found = []
    for message in ipr.get_filters(index=socket.if_nametoindex(device), parent=parent):
        # The kernel also reports each priority by itself, without a filter.
        if not message["handle"]:
            continue
        kind, options = message.get_attr("TCA_KIND"), message.get_attr("TCA_OPTIONS")
        name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" and options else ""
        found.append(Filter(kind, name or "", message["info"] >> 16))
    return tuple(found)


def find_tcx(devices: Devices) -> list[Hook] | None:
    """tcx programs on the same hooks; None on a kernel without tcx."""
    try:
        return [
            Hook(device=device.name, direction=direction, tcx=_read_tcx(device.name, attach_type))
            for device in (*devices.uplinks, *devices.overlays)
            for direction, _, attach_type in HOOKS
        ]
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _read_tcx(device: str, attach_type: int) -> tuple[str, ...]:
    ids = bpfcall.attached_programs(socket.if_nametoindex(device), attach_type)
    return tuple(bpfcall.program_name(id) or f"program {id}" for id in ids)


def find_firewall() -> Firewall:
    """nftables' rules, iptables-nft's among them."""
    program = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not program:
        return Firewall(readable=False)
    try:
        run = subprocess.run([program, "list", "ruleset"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return Firewall(readable=False)
    return Firewall(readable=False) if run.returncode else parse_ruleset(run.stdout)


def parse_ruleset(text: str) -> Firewall:
    """From what `nft list ruleset` prints."""
    table = chain = ""
    chains, rules = [], []
    for line in map(str.strip, text.splitlines()):
        match line.split():
            case ["table", family, name, "{"]:
                table = f"{family} {name}"
            case ["chain", name, "{"]:
                chain = name
            case ["type", _, "hook", hook, *words]:
                policy = "drop" if "drop;" in words else "accept"
                chains.append(Chain(where=f"{table} {chain}", hook=hook, policy=policy))
            case [] | ["}"] | ["set" | "map", *_]:
                pass
            case _:
                rules.append(line)
    return Firewall(readable=True, chains=tuple(chains), texts=tuple(rules))
