"""The judgements of `meshwire preflight`: facts in, findings out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from itertools import combinations
from typing import Final

from meshwire.api import names
from meshwire.cli.facts import (
    Attempts,
    Boot,
    ClusterFacts,
    Device,
    Devices,
    Firewall,
    Forwarding,
    Hook,
    Kernel,
    Port,
    ReversePath,
    WireGuard,
)
from meshwire.cli.findings import UNGUARDED_BOOT, Finding, failure, passed, skipped, warning

MINIMUM_KERNEL: Final = (5, 15)
KERNEL_FEATURES: Final = (
    ((5, 6), "WireGuard"),
    ((5, 8), "CAP_BPF, so that the agent needs no CAP_SYS_ADMIN"),
    ((5, 11), "BPF memory counted by cgroup, not by RLIMIT_MEMLOCK"),
    ((5, 15), "the first long-term kernel that Meshwire supports"),
)
MINIMUM_API: Final = (1, 32)
TUNNEL_OVERHEAD: Final = 80
"""Outer IPv6 (40) and UDP (8) headers, WireGuard's header (16) and tag (16)."""
MINIMUM_MTU: Final = 1280
"""What IPv6 asks of every link."""
OWN_FILTERS: Final = "mw_"
OWN_PRIORITY: Final = 1

FOREIGN_ENCRYPTION: Final = {
    "cilium_wg0": "Cilium's WireGuard encryption (encryption.enabled)",
    "wireguard.cali": "Calico's WireGuard encryption (wireguardEnabled)",
    "wg-v6.cali": "Calico's WireGuard encryption (wireguardEnabledV6)",
    "kilo0": "Kilo",
    "antrea-wg0": "Antrea's WireGuard encryption (trafficEncryptionMode)",
    "flannel-wg": "flannel's WireGuard backend",
    "flannel-wg-v6": "flannel's WireGuard backend",
    "kubespan": "Talos KubeSpan",
}
"""Device -> who encrypts by it."""


def version_of(text: str) -> tuple[int, int]:
    """The first two numbers of `6.1.0-27-amd64` or `v1.35.4`; (0, 0) where there are none."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def judge_kernel(kernel: Kernel) -> Iterator[Finding]:
    version = version_of(kernel.release)
    if version >= MINIMUM_KERNEL:
        yield passed("kernel", f"Linux {kernel.release} ({kernel.machine})")
        return
    missing = "; ".join(
        f"{major}.{minor}: {what}" for (major, minor), what in KERNEL_FEATURES if (major, minor) > version
    )
    yield failure(
        "kernel",
        f"Linux {kernel.release} is older than {MINIMUM_KERNEL[0]}.{MINIMUM_KERNEL[1]}",
        why=f"it lacks what came with {missing}",
        todo="run a kernel of 5.15 or newer: Ubuntu has one since 22.04, Debian since 12, RHEL since 10",
    )


def judge_privileges(capabilities: frozenset[str]) -> Iterator[Finding]:
    if "sys_admin" in capabilities and "net_admin" in capabilities:
        yield passed("privileges", "enough to try everything")
        return
    yield skipped(
        "privileges",
        "without root (CAP_SYS_ADMIN, CAP_NET_ADMIN) the checks of BPF, TC, tcx and the firewall can't look",
        todo="run `meshwire preflight` as root on a node",
    )


def judge_btf(present: bool) -> Iterator[Finding]:
    if present:
        yield passed("btf", "/sys/kernel/btf/vmlinux is there")
        return
    yield warning(
        "btf",
        "/sys/kernel/btf/vmlinux is missing",
        why="the datapath does without; tools that look into the kernel, bpftool among them, show less",
        todo="a kernel built with CONFIG_DEBUG_INFO_BTF=y has it",
    )


def judge_bpffs(mounted: bool) -> Iterator[Finding]:
    if mounted:
        yield passed("bpffs", "mounted at /sys/fs/bpf")
        return
    yield failure(
        "bpffs",
        "No BPF file system is mounted at /sys/fs/bpf",
        why="programs and maps are pinned there, so that they stay in force when the agent restarts",
        todo="mount -t bpf bpf /sys/fs/bpf; systemd does it at boot, elsewhere a line in /etc/fstab does",
    )


BPF_ATTEMPTS: Final = {
    "lpm_trie": "an LPM trie map",
    "array": "an array map",
    "percpu_array": "a per-CPU array map",
    "program": "a TC program",
}
TC_ATTEMPTS: Final = {
    "clsact": "the clsact qdisc",
    "filter_ingress": "a program on ingress",
    "filter_egress": "a program on egress",
}


def judge_bpf(attempts: Attempts) -> Iterator[Finding]:
    yield _judge_attempts(
        "bpf",
        attempts,
        BPF_ATTEMPTS,
        why="the datapath is made of these",
        todo="a kernel with CONFIG_BPF_SYSCALL=y; if it has, look for a seccomp or LSM rule or kernel "
        "lockdown (/sys/kernel/security/lockdown) that forbids bpf()",
    )


def judge_tc(attempts: Attempts) -> Iterator[Finding]:
    yield _judge_attempts(
        "tc",
        attempts,
        TC_ATTEMPTS,
        why="on these hooks packets are sent into tunnels and plaintext is dropped",
        todo="modprobe sch_ingress cls_bpf, or a kernel with CONFIG_NET_CLS_ACT=y, CONFIG_NET_SCH_INGRESS "
        "and CONFIG_NET_CLS_BPF",
    )


def _judge_attempts(
    check: str, attempts: Attempts, wanted: Mapping[str, str], *, why: str, todo: str
) -> Finding:
    failed = attempts.failed(*wanted)
    if attempts.unprivileged or (not attempts.tried(*wanted) and not failed):
        return skipped(check, f"not tried: {attempts.results.get('namespace') or 'needs root'}")
    if not failed:
        return passed(check, f"tried and works: {', '.join(wanted.values())}")
    words = "; ".join(f"{wanted[name]}: {error}" for name, error in failed.items())
    return failure(check, f"The kernel refuses {words}", why=why, todo=todo)


def judge_wireguard(wireguard: WireGuard) -> Iterator[Finding]:
    attempts = wireguard.attempts
    if not attempts.tried("wireguard"):
        yield skipped("wireguard", f"not tried: {attempts.results.get('namespace') or 'needs root'}")
        return
    error = attempts.failed("wireguard").get("wireguard", "")
    if not error:
        yield passed("wireguard", "in the kernel: a device could be made")
    elif wireguard.tun:
        there = (
            f"{wireguard.program} is there" if wireguard.program else "the agent's image brings wireguard-go"
        )
        yield warning(
            "wireguard",
            f"The kernel has none ({error}); in user space it will work: /dev/net/tun is there, and {there}",
            why="WireGuard in user space is as safe, but slower and takes more CPU",
            todo="modprobe wireguard, or the distribution's package with extra kernel modules",
        )
    else:
        yield failure(
            "wireguard",
            f"The kernel has none ({error}), and there is no /dev/net/tun for one in user space",
            why="without WireGuard this node can't encrypt, and the others would drop what its pods send",
            todo="modprobe wireguard, or the distribution's extra kernel modules; or modprobe tun",
        )


def judge_ports(ports: Sequence[Port]) -> Iterator[Finding]:
    taken = [port for port in ports if not port.free and not port.holder.startswith("meshwire_wg")]
    if not taken:
        ours = [f"{port.number} ({port.holder})" for port in ports if not port.free]
        numbers = " and ".join(str(port.number) for port in ports)
        yield passed("ports", f"UDP {numbers}: {'held by Meshwire: ' + ', '.join(ours) if ours else 'free'}")
    for port in taken:
        yield failure(
            "ports",
            f"UDP {port.number} is taken by {port.holder or 'somebody else'}",
            why="each node's two tunnel devices listen there",
            todo="set spec.encryption.port in the MeshConfig to the first of two free ports"
            + ("; or turn Cilium's own encryption off" if port.holder == "cilium_wg0" else ""),
        )


def judge_forwarding(forwarding: Forwarding) -> Iterator[Finding]:
    off = []
    if not forwarding.ipv4:
        off.append("net.ipv4.ip_forward")
    if forwarding.ipv6 is False:
        off.append("net.ipv6.conf.all.forwarding")
    if not off:
        yield passed(
            "forwarding", "on for IPv4" + (" and IPv6" if forwarding.ipv6 else "; the kernel has no IPv6")
        )
        return
    judge = failure if not forwarding.ipv4 and not forwarding.ipv6 else warning
    yield judge(
        "forwarding",
        f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} 0",
        why="the node forwards no packet of that family to or from its pods, encrypted or not",
        todo="the CNI usually sets it when it starts; where it does not and pods use that family: "
        f"sysctl -w {' '.join(f'{name}=1' for name in off)}, and in /etc/sysctl.d",
    )


def judge_boot(boot: Boot) -> Iterator[Finding]:
    lacks = [name for name, there in (("systemd", boot.systemd), ("nft", boot.nft)) if not there]
    if boot.asked and lacks:
        yield warning(
            "boot guard",
            f"There is no {' and no '.join(lacks)} on this node for spec.encryption.bootGuard",
            why=UNGUARDED_BOOT,
            todo="drain the node before you reboot it" if not boot.systemd else "install nftables",
        )
    elif boot.asked:
        yield passed("boot guard", "systemd and nft are here for it")
    elif lacks:
        yield passed("boot guard", f"not asked for, and not possible without {' and '.join(lacks)}")
    else:
        yield passed(
            "boot guard", f"not asked for; spec.encryption.bootGuard: Systemd is possible. {UNGUARDED_BOOT}"
        )


def judge_reverse_path(reverse_path: ReversePath) -> Iterator[Finding]:
    # The kernel takes the larger of `all` and the device's own, so loose on a device wins over strict for
    # all.
    effective = {name: max(value, reverse_path.all) for name, value in reverse_path.devices.items()}
    ours = sorted(name for name, value in effective.items() if name.startswith("meshwire_wg") and value == 1)
    if ours:
        yield failure(
            "rp_filter",
            f"net.ipv4.conf.{ours[0]}.rp_filter is strict ({', '.join(ours)})",
            why="decrypted packets arrive on this device while the route back leads to the uplink, so "
            "strict drops every one of them; the agent sets loose (2), and something has set it back",
            todo="take net.ipv4.conf.*.rp_filter out of /etc/sysctl.d (or except meshwire_wg*), then "
            f"{' '.join(f'sysctl -w net.ipv4.conf.{name}.rp_filter=2;' for name in ours)}",
        )
        return
    strict = sorted(name for name, value in effective.items() if value == 1)
    if strict:
        yield passed(
            "rp_filter",
            f"strict on {', '.join(strict)}, which is fine: decrypted packets arrive on meshwire_wg*, where "
            "the agent sets loose, and a device's loose wins over strict for all",
        )
    else:
        yield passed("rp_filter", "not strict on any uplink")


def judge_mtu(devices: Devices, configured: int = 0) -> Iterator[Finding]:
    """`configured` is spec.network.mtu, 0 for found by itself."""
    if not devices.uplinks:
        yield warning(
            "mtu",
            "No uplink was found: no device has a default route or a route to another node",
            why="Meshwire has to sit on the devices by which pod traffic leaves the node",
            todo="name them: --device here, spec.network.uplinks in the MeshConfig",
        )
        return
    smallest = min(devices.uplinks, key=lambda device: device.mtu)
    room = smallest.mtu - TUNNEL_OVERHEAD
    tunnel = configured or room
    on = ", ".join(f"{device.name} {device.mtu}" for device in devices.uplinks)
    if tunnel > room:
        yield warning(
            "mtu",
            f"spec.network.mtu is {tunnel}, and {smallest.name} ({smallest.mtu}) has room for {room}",
            why="full packets get fragmented on their way, or lost where fragments are",
            todo=f"set spec.network.mtu to {room} or 0, unless the path between the nodes carries more",
        )
        return
    if tunnel < MINIMUM_MTU:
        yield failure(
            "mtu",
            f"The tunnel's MTU would be {tunnel} ({on}), less than {MINIMUM_MTU}",
            why="IPv6 does not work on a link that small, and IPv4 hardly",
            todo=f"raise the MTU of {smallest.name} to {MINIMUM_MTU + TUNNEL_OVERHEAD} or more",
        )
        return
    larger = [device for device in devices.others if _is_pod_side(device) and device.mtu > tunnel]
    if larger:
        yield warning(
            "mtu",
            f"The tunnel's MTU is {tunnel} ({on}); pods use up to {max(device.mtu for device in larger)} "
            f"({larger[0].name}{' and others' if len(larger) > 1 else ''})",
            why="it works: TCP is told the smaller size, and larger packets get an ICMP error; but programs "
            "that send large UDP and ignore the error lose packets",
            todo=f"set the CNI's MTU to {tunnel} or less, then restart the pods",
        )
        return
    yield passed("mtu", f"tunnel {tunnel} ({on}); set the CNI's pod MTU to {tunnel} or less")


def _is_pod_side(device: Device) -> bool:
    return device.kind in ("veth", "netkit") or device.name in ("cni0", "cbr0")


def judge_conflicts(devices: Devices) -> Iterator[Finding]:
    found = [
        device.name
        for device in (*devices.uplinks, *devices.overlays, *devices.others)
        if device.name in FOREIGN_ENCRYPTION
    ]
    if not found:
        yield passed("conflicts", "no other encryption between nodes found")
    for name in found:
        yield warning(
            "conflicts",
            f"{name} belongs to {FOREIGN_ENCRYPTION[name]}",
            why="packets would be encrypted twice, at the cost of CPU and MTU, or go by the other tunnel "
            "and never pass Meshwire's devices",
            todo="turn one of the two off",
        )


def judge_tcx(hooks: Sequence[Hook] | None) -> Iterator[Finding]:
    """None: the kernel has no tcx."""
    if hooks is None:
        yield passed("tcx", "this kernel has none (new in 6.6), so nothing runs before TC filters")
        return
    occupied = [hook for hook in hooks if hook.tcx]
    if not occupied:
        yield passed("tcx", "no program runs before TC filters")
    for hook in occupied:
        yield warning(
            "tcx",
            f"{hook.device} {hook.direction}: {', '.join(hook.tcx)} run{'s' if len(hook.tcx) == 1 else ''} "
            "before TC filters",
            why="a tcx program that answers anything but TCX_NEXT ends the chain: Meshwire's filter never "
            "sees that packet, and it leaves in clear, or is not counted",
            todo="find out whose it is: bpftool net show dev "
            f"{hook.device}; Cilium can be told to use TC filters: bpf.enableTCX=false",
        )


def judge_filters(hooks: Sequence[Hook]) -> Iterator[Finding]:
    blocked = sorted({hook.device for hook in hooks if hook.blocked})
    for device in blocked:
        yield failure(
            "tc filters",
            f"{device} has an ingress qdisc, in the place of clsact",
            why="it has no egress hook, where packets are sent into tunnels; a device has one of the two",
            todo=f"have its owner use clsact, which takes the same filters; see: tc qdisc show dev {device}",
        )
    first = [
        (hook, filter)
        for hook in hooks
        for filter in hook.filters
        if filter.priority <= OWN_PRIORITY and not filter.name.startswith(OWN_FILTERS)
    ]
    if not first and not blocked:
        yield passed("tc filters", "no other filter at priority 1")
    for hook, filter in first:
        whose = f"{filter.kind} {filter.name}".strip()
        if filter.kind != "bpf":
            yield failure(
                "tc filters",
                f"{hook.device} {hook.direction}: a filter of kind {whose} holds priority {OWN_PRIORITY}",
                why="Meshwire's has to be first, and the kernel takes one kind of filter for one priority",
                todo=f"move it to another priority; see: tc filter show dev {hook.device} {hook.direction}",
            )
            continue
        yield warning(
            "tc filters",
            f"{hook.device} {hook.direction}: {whose} is at priority {OWN_PRIORITY}, too",
            why="filters of one priority run newest first: one that is attached after Meshwire's and "
            "answers anything but TC_ACT_UNSPEC hides packets from it, until the agent comes first again",
            todo=f"move it to another priority; see: tc filter show dev {hook.device} {hook.direction}",
        )


STRICT_REVERSE_PATH: Final = re.compile(r"\bfib saddr\b.*\biif oif (missing|0)\b.*\bdrop\b")
"""The strict one only: without `iif` any route back is good enough."""


def judge_firewall(firewall: Firewall, ports: Sequence[int]) -> Iterator[Finding]:
    if not firewall.readable:
        yield skipped("firewall", "nftables' rules can't be listed", todo="run as root, with nft installed")
        return
    dropping = [chain for chain in firewall.chains if chain.policy == "drop"]
    named = all(any(_speaks_of(rule, port) for rule in firewall.texts) for port in ports)
    quiet = True
    for chain in dropping:
        if chain.hook == "input" and not named:
            quiet = False
            numbers = ", ".join(str(port) for port in ports)
            yield warning(
                "firewall",
                f"{chain.where} drops what no rule accepts, and no rule speaks of UDP {numbers}",
                why="the other nodes' handshakes and packets may be dropped",
                todo=f"accept UDP {numbers} from the other nodes' addresses",
            )
        if chain.hook == "forward" and not any("meshwire_wg" in text for text in firewall.texts):
            quiet = False
            yield warning(
                "firewall",
                f"{chain.where} drops what no rule accepts",
                why="decrypted packets are forwarded from meshwire_wg0 and meshwire_wg1 to the pods; rules "
                "that accept only by the uplink's name don't match them",
                todo='accept iifname "meshwire_wg*", unless rules for pod addresses accept them already',
            )
    if any(STRICT_REVERSE_PATH.search(text) for text in firewall.texts):
        quiet = False
        yield warning(
            "firewall",
            "A rule drops packets whose route back is another device (firewalld: IPv6_rpfilter)",
            why="decrypted packets arrive on meshwire_wg0 or 1, while the route back leads to the uplink",
            todo="firewalld: IPv6_rpfilter=loose (or no) in /etc/firewalld/firewalld.conf; otherwise except "
            'iifname "meshwire_wg*"',
        )
    if quiet:
        yield passed("firewall", "no base chain drops by policy what Meshwire needs")


def _speaks_of(rule: str, port: int) -> bool:
    """Whether the rule names the destination port, alone, in a set or in a range."""
    _, _, ports = rule.partition("dport")
    ranges = re.findall(r"(\d+)(?:[-:](\d+))?", ports)
    return any(int(low) <= port <= int(high or low) for low, high in ranges)


def judge_libbpf(error: str) -> Iterator[Finding]:
    if not error:
        yield passed("libbpf", "libbpf.so.1 can be loaded")
        return
    yield skipped(
        "libbpf",
        f"libbpf.so.1 can't be loaded here ({error}); the agent's image brings its own",
        todo="only to run the agent or the lab outside of that image: install libbpf 1.x (Debian: libbpf1)",
    )


def judge_cluster(cluster: ClusterFacts) -> Iterator[Finding]:
    yield from _judge_api(cluster)
    yield from _judge_nodes(cluster)
    if cluster.denied:
        yield warning(
            "rbac",
            f"You may not create {', '.join(cluster.denied)}",
            why="installing Meshwire makes these",
            todo="install as a cluster administrator",
        )
    elif "rbac" not in cluster.unread:
        yield passed("rbac", "you may create all that Meshwire installs")
    for what, reason in cluster.unread.items():
        yield skipped(what, reason)


def _judge_api(cluster: ClusterFacts) -> Iterator[Finding]:
    if version_of(cluster.version) >= MINIMUM_API:
        yield passed("api server", f"Kubernetes {cluster.version}")
    else:
        yield failure(
            "api server",
            f"Kubernetes {cluster.version} is older than {MINIMUM_API[0]}.{MINIMUM_API[1]}",
            why="since 1.32 every service account token names its node, by which the API server holds an "
            "agent to its own MeshNode (ValidatingAdmissionPolicy), and schemas can check CIDRs (CEL)",
            todo="upgrade the control plane",
        )
    if "crds" in cluster.unread:
        return
    wanted = {f"{plural}.{names.GROUP}" for plural in names.RESOURCES}
    if missing := sorted(wanted - cluster.definitions):
        yield warning(
            "crds",
            f"Not installed: {', '.join(missing)}",
            why="fine before Meshwire is installed; nothing of it works without",
            todo="kubectl apply -k config",
        )
    else:
        yield passed("crds", "installed")


def _judge_nodes(cluster: ClusterFacts) -> Iterator[Finding]:
    if "nodes" in cluster.unread:
        return
    nodes = cluster.nodes
    yield from _judge_pod_cidrs(cluster)
    if old := [f"{node.name} ({node.kernel})" for node in nodes if version_of(node.kernel) < MINIMUM_KERNEL]:
        yield failure(
            "node kernels",
            f"Older than {MINIMUM_KERNEL[0]}.{MINIMUM_KERNEL[1]}: {', '.join(old)}",
            why="the agent does not run there, and strict nodes drop what comes from there",
            todo="upgrade these nodes' kernels",
        )
    elif nodes:
        yield passed(
            "node kernels",
            f"{min((node.kernel for node in nodes), key=version_of)} or newer on {len(nodes)}",
        )
    if silent := [node.name for node in nodes if not node.addresses]:
        yield failure(
            "node addresses",
            f"Without an InternalIP: {', '.join(silent)}",
            why="the other nodes would not know where to send the tunnel's packets",
            todo="give kubelet --node-ip, or see why the cloud provider sets none",
        )


def _judge_pod_cidrs(cluster: ClusterFacts) -> Iterator[Finding]:
    nodes = cluster.nodes
    if bare := [node.name for node in nodes if not node.pod_cidrs]:
        yield warning(
            "pod CIDRs",
            f"Nodes without spec.podCIDRs: {', '.join(bare)}",
            why="their pods' addresses come one by one: a new pod is reached when nodes have heard of it",
            todo="set spec.network.clusterCIDRs in the MeshConfig, so that Strict covers new pods; or let"
            " the controller manager give out CIDRs (--allocate-node-cidrs) and the CNI use them",
        )
    owned = [(node.name, ip_network(cidr)) for node in nodes for cidr in node.pod_cidrs]
    for (one, first), (other, second) in combinations(owned, 2):
        if one != other and first.version == second.version and first.overlaps(second):
            yield failure(
                "pod CIDRs",
                f"{first} of {one} and {second} of {other} overlap",
                why="an address would live on two nodes",
                todo="give every node a range of its own",
            )
    outside = [f"{pod} on {node.name}" for node in nodes for pod in node.outside]
    if outside and "pods" not in cluster.unread:
        yield failure(
            "pod CIDRs",
            f"Pods with addresses outside their node's pod CIDRs: {', '.join(outside[:3])}"
            + (f" and {len(outside) - 3} more" if len(outside) > 3 else ""),
            why="Meshwire would not know their traffic for pod traffic: it travels in clear, or is dropped",
            todo="let the CNI take addresses from spec.podCIDRs (Cilium: ipam.mode=kubernetes; Calico: "
            "host-local with usePodCidr)",
        )
    if nodes and not bare and not outside:
        yield passed("pod CIDRs", f"on each of {len(nodes)} nodes" if len(nodes) > 1 else "on the one node")
