"""Network namespaces, the underlay's bridge and the nodes' mount namespaces. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from meshwire.lab import init, processes
from meshwire.lab.model import (
    BRIDGE,
    CONTROL,
    CONTROL_NETNS,
    UNDERLAY,
    UNDERLAY_NETNS,
    UPLINK,
    Address,
    LabError,
    Node,
    Paths,
    Settings,
    control_addresses,
    family_of,
    gateway_addresses,
)

NETNS_DIRECTORY: Final = Path("/run/netns")
NODE_STATE: Final = Path("/var/lib/meshwire")

CONTROL_MAC: Final = "02:00:c6:12:00:02"

NODE_SYSCTLS: Final[Mapping[str, str]] = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    # Strict, as many distributions have it: what depends on loose filtering has to say so itself.
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/default/rp_filter": "1",
    # Addresses are ours to give, and there is nobody to detect as a duplicate: usable at once.
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}


def ip(*lines: str, netns: str | None = None) -> None:
    """Runs `ip` commands in one go, in a named network namespace or our own. Raises LabError at the first
    that fails."""
    command = ["ip", *(["-n", netns] if netns else []), "-batch", "-"]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"ip in {netns or 'this namespace'}: {result.stderr.strip()}")


def list_netns() -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in NETNS_DIRECTORY.iterdir())
    return []


def add_netns(name: str) -> None:
    """Raises LabError where it exists."""
    result = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"can't make network namespace {name}: {result.stderr.strip()}")


def delete_netns(name: str) -> None:
    """One that isn't there is no error."""
    result = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True)
    # Left by a crash between making the file and mounting on it, or still mounted.
    if result.returncode and (NETNS_DIRECTORY / name).exists():
        raise LabError(f"can't delete network namespace {name}: {result.stderr.strip()}")


def pids_in(netns: str) -> list[int]:
    """Processes in a named network namespace."""
    try:
        wanted = (NETNS_DIRECTORY / netns).stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                namespace = (entry / "ns/net").stat()
                if (namespace.st_dev, namespace.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(int(entry.name))
    return found


def make_underlay(settings: Settings) -> None:
    """The wire: a bridge in a namespace of its own, without an address and without multicast snooping, which
    would keep neighbour discovery waiting for a querier that isn't there."""
    add_netns(UNDERLAY_NETNS)
    options = "forward_delay 0 stp_state 0 mcast_snooping 0"
    ip(
        "link set lo up",
        f"link add {BRIDGE} mtu {settings.underlay_mtu} type bridge {options}",
        f"link set {BRIDGE} up",
        netns=UNDERLAY_NETNS,
    )


def make_control(settings: Settings) -> None:
    """The control plane's machine, which is the nodes' default gateway too (and forwards nothing)."""
    add_netns(CONTROL_NETNS)
    addresses = (*control_addresses(settings.families), *gateway_addresses(settings.families))
    _connect(CONTROL, CONTROL_NETNS, CONTROL_MAC, addresses, settings)


def make_node(node: Node, settings: Settings, paths: Paths, lab_id: str) -> None:
    """A node's namespaces and its uplink. The mount namespace lives as long as the recorded process
    NODE.holder."""
    add_netns(node.netns)
    _start_holder(node, paths, lab_id)
    _connect(node.name, node.netns, node.mac, node.addresses(settings.families), settings)
    gateways = gateway_addresses(settings.families)
    ip(*(f"route add default via {gateway} dev {UPLINK}" for gateway in gateways), netns=node.netns)


def unplug(port: str) -> None:
    """Removes a machine's port from the underlay, and with it the machine's uplink, at once: deleting a
    namespace leaves that to the kernel's leisure."""
    subprocess.run(["ip", "-n", UNDERLAY_NETNS, "link", "delete", "dev", port], capture_output=True)


def _connect(port: str, netns: str, mac: str, addresses: Iterable[Address], settings: Settings) -> None:
    mtu = settings.underlay_mtu
    ip(
        f"link add name {port} mtu {mtu} type veth peer name {UPLINK} mtu {mtu} address {mac} netns {netns}",
        f"link set dev {port} master {BRIDGE} up",
        netns=UNDERLAY_NETNS,
    )
    ip(
        "link set lo up",
        f"link set {UPLINK} up",
        *(_address_command(address) for address in addresses),
        netns=netns,
    )


def _address_command(address: Address) -> str:
    prefix = UNDERLAY[family_of(address)].prefixlen
    return f"address add {address}/{prefix} dev {UPLINK}" + (" nodad" if address.version == 6 else "")


HOLDER: Final = """
set -e
mount -t sysfs sysfs /sys
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
mount --bind "$1" /run
[ /var/run -ef /run ] || mount --bind "$1" /var/run
mount --bind "$2" /var/lib/meshwire
mount --bind "$3" /etc/systemd/system
shift 3
while [ $# -gt 0 ]; do echo "$2" > "/proc/sys/$1"; shift 2; done
echo ready
exec sleep infinity > /dev/null
"""
"""What is a node's own: /sys of its network namespace, bpffs, /run, Meshwire's state, and systemd's units.
The rest is the host's."""


def _start_holder(node: Node, paths: Paths, lab_id: str) -> None:
    for directory in (paths.run(node.name), paths.lib(node.name), paths.logs):
        directory.mkdir(parents=True, exist_ok=True)
    # As every system has some.
    (paths.units(node.name) / f"{init.TARGET}.wants").mkdir(parents=True, exist_ok=True)
    arguments = [str(path(node.name)) for path in (paths.run, paths.lib, paths.units)]
    for name, value in NODE_SYSCTLS.items():
        # A kernel without IPv6 has none of its settings.
        if Path("/proc/sys", name).exists():
            arguments += [name, value]
    command = [
        *("nsenter", f"--net={NETNS_DIRECTORY / node.netns}", "--"),
        *("unshare", "--mount", "--propagation", "private", "--"),
        *("sh", "-c", HOLDER, "holder", *arguments),
    ]
    component = f"{node.name}.holder"
    with paths.log(component).open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=processes.environment(lab_id),
            cwd="/",
            start_new_session=True,
        )
    assert child.stdout
    with child.stdout as stream:
        answer = stream.readline()
    if answer != b"ready\n":
        raise LabError(
            f"can't make the namespaces of {node.name}:\n{paths.log(component).read_text()[-1000:]}"
        )
    processes.record(paths, component, child.pid, ("holder",))


def remove_directories(made: Sequence[str]) -> None:
    """Removes directories given parents first; one that somebody put something into stays."""
    for directory in reversed(made):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def is_mount_point(path: Path) -> bool:
    """Of a bind mount on itself too, which os.path.ismount doesn't see."""
    wanted = os.fsencode(path)
    return any(line.split()[4] == wanted for line in Path("/proc/self/mountinfo").read_bytes().splitlines())


def unmount_netns_directory() -> None:
    """Undoes what the first `ip netns add` on a machine does, where no namespace is left."""
    if not list_netns():
        subprocess.run(["umount", str(NETNS_DIRECTORY)], capture_output=True)
