from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from meshwire.api import names
from meshwire.cli import checks
from meshwire.cli.facts import (
    Attempts,
    Boot,
    Chain,
    ClusterFacts,
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
from meshwire.cli.findings import Finding, Level

UNTRIED = Attempts({"namespace": "a network namespace needs root"})
WORKS = Attempts(dict.fromkeys(("wireguard", *checks.BPF_ATTEMPTS, *checks.TC_ATTEMPTS), ""))
ETH0 = Device(name="eth0", mtu=1500)
PORTS = (51871, 51872)
INPUT_DROP = Chain(where="inet filter input", hook="input", policy="drop")
FORWARD_DROP = Chain(where="ip filter FORWARD", hook="forward", policy="drop")
CRDS = frozenset(f"{plural}.meshwire.dev" for plural in names.RESOURCES)
NODE_A = ClusterNode(
    name="a", kernel="6.1.0-27-amd64", addresses=("192.0.2.1",), pod_cidrs=("10.244.0.0/24", "fd00::/64")
)
NODE_B = ClusterNode(name="b", kernel="6.12.1", addresses=("192.0.2.2",), pod_cidrs=("10.244.1.0/24",))


def failing(**errors: str) -> Attempts:
    return Attempts({**WORKS.results, **errors})


def without(attempts: Attempts, *names: str) -> Attempts:
    return Attempts({name: error for name, error in attempts.results.items() if name not in names})


@dataclass(frozen=True)
class Case:
    name: str
    judge: Callable[..., Iterable[Finding]]
    facts: Any
    level: Level
    words: str
    """Part of the words of the worst finding."""


def cluster(
    version: str, definitions: frozenset[str], nodes: tuple[ClusterNode, ...] = (), **others: Any
) -> ClusterFacts:
    return ClusterFacts(version=version, definitions=definitions, nodes=nodes, **others)


def firewall(facts: Firewall) -> Iterable[Finding]:
    return checks.judge_firewall(facts, PORTS)


def mtu_of_1480(facts: Devices) -> Iterable[Finding]:
    return checks.judge_mtu(facts, 1480)


PASS, SKIP, WARN, FAIL = Level.PASS, Level.SKIP, Level.WARN, Level.FAIL
CASES = (
    Case("the oldest kernel", checks.judge_kernel, Kernel("5.15.0-91-generic"), PASS, "5.15"),
    Case(
        "a kernel too old names what it lacks", checks.judge_kernel, Kernel("5.4.0"), FAIL, "older than 5.15"
    ),
    Case("versions are numbers, not text", checks.judge_kernel, Kernel("5.9.1"), FAIL, "5.9.1"),
    Case("a two-digit major", checks.judge_kernel, Kernel("10.2-rc1"), PASS, "10.2"),
    Case("root", checks.judge_privileges, frozenset({"sys_admin", "net_admin"}), PASS, "enough"),
    Case("not root", checks.judge_privileges, frozenset({"net_admin"}), SKIP, "without root"),
    Case("BTF", checks.judge_btf, True, PASS, "vmlinux"),
    Case("no BTF", checks.judge_btf, False, WARN, "missing"),
    Case("bpffs", checks.judge_bpffs, True, PASS, "mounted"),
    Case("no bpffs", checks.judge_bpffs, False, FAIL, "No BPF file system"),
    Case("BPF works", checks.judge_bpf, WORKS, PASS, "an LPM trie map"),
    Case(
        "BPF forbidden",
        checks.judge_bpf,
        failing(program="Operation not permitted"),
        FAIL,
        "a TC program: Op",
    ),
    Case("BPF not tried", checks.judge_bpf, UNTRIED, SKIP, "needs root"),
    Case(
        "BPF in a user namespace",
        checks.judge_bpf,
        Attempts({"wireguard": ""}, unprivileged=True),
        SKIP,
        "root",
    ),
    Case("TC works", checks.judge_tc, WORKS, PASS, "the clsact qdisc"),
    Case(
        "no clsact, so no filter was tried",
        checks.judge_tc,
        without(failing(clsact="No such file or directory"), "filter_ingress", "filter_egress"),
        FAIL,
        "the clsact qdisc: No such file",
    ),
    Case(
        "TC not tried for want of a program",
        checks.judge_tc,
        without(failing(program="Operation not permitted"), "filter_ingress", "filter_egress"),
        SKIP,
        "not tried",
    ),
    Case("WireGuard", checks.judge_wireguard, WireGuard(attempts=WORKS), PASS, "in the kernel"),
    Case(
        "no WireGuard, but TUN",
        checks.judge_wireguard,
        WireGuard(attempts=failing(wireguard="Operation not supported"), tun=True),
        WARN,
        "image brings wireguard-go",
    ),
    Case(
        "no WireGuard, a program without TUN",
        checks.judge_wireguard,
        WireGuard(attempts=failing(wireguard="Operation not supported"), program="/usr/bin/wireguard-go"),
        FAIL,
        "no /dev/net/tun",
    ),
    Case("WireGuard not tried", checks.judge_wireguard, WireGuard(attempts=UNTRIED, tun=True), SKIP, "root"),
    Case("ports free", checks.judge_ports, [Port(51871, True), Port(51872, True)], PASS, "free"),
    Case(
        "one port is Meshwire's",
        checks.judge_ports,
        [Port(51871, True), Port(51872, False, "meshwire_wg1")],
        PASS,
        "51872 (meshwire_wg1)",
    ),
    Case(
        "a port is somebody else's",
        checks.judge_ports,
        [Port(51871, False, "cilium_wg0"), Port(51872, True)],
        FAIL,
        "UDP 51871 is taken by cilium_wg0",
    ),
    Case(
        "a port is held by nobody knows whom",
        checks.judge_ports,
        [Port(51871, False)],
        FAIL,
        "somebody else",
    ),
    Case("no boot guard", checks.judge_boot, Boot(systemd=True, nft=True), PASS, "Systemd is possible"),
    Case("none to have", checks.judge_boot, Boot(systemd=True, nft=False), PASS, "without nft"),
    Case("boot guard", checks.judge_boot, Boot(systemd=True, nft=True, asked=True), PASS, "are here"),
    Case("no nft", checks.judge_boot, Boot(systemd=True, nft=False, asked=True), WARN, "There is no nft"),
    Case(
        "no systemd",
        checks.judge_boot,
        Boot(systemd=False, nft=False, asked=True),
        WARN,
        "no systemd and no nft",
    ),
    Case("forwarding", checks.judge_forwarding, Forwarding(ipv4=True, ipv6=True), PASS, "on"),
    Case(
        "forwarding without IPv6", checks.judge_forwarding, Forwarding(ipv4=True, ipv6=None), PASS, "no IPv6"
    ),
    Case(
        "no IPv6 forwarding",
        checks.judge_forwarding,
        Forwarding(ipv4=True, ipv6=False),
        WARN,
        "ipv6.conf.all",
    ),
    Case(
        "an IPv6 cluster",
        checks.judge_forwarding,
        Forwarding(ipv4=False, ipv6=True),
        WARN,
        "ip_forward is 0",
    ),
    Case(
        "no forwarding", checks.judge_forwarding, Forwarding(ipv4=False, ipv6=None), FAIL, "ip_forward is 0"
    ),
    Case(
        "no rp_filter",
        checks.judge_reverse_path,
        ReversePath(all=0, devices={"eth0": 2}),
        PASS,
        "not strict",
    ),
    Case(
        "strict on the uplink is fine",
        checks.judge_reverse_path,
        ReversePath(all=1, devices={"eth0": 0}),
        PASS,
        "fine",
    ),
    Case(
        "loose on a tunnel device wins over strict for all",
        checks.judge_reverse_path,
        ReversePath(all=1, devices={"eth0": 1, "meshwire_wg1": 2}),
        PASS,
        "strict on eth0",
    ),
    Case(
        "strict on a tunnel device",
        checks.judge_reverse_path,
        ReversePath(all=1, devices={"eth0": 1, "meshwire_wg1": 0}),
        FAIL,
        "meshwire_wg1.rp_filter is strict",
    ),
    Case("MTU", checks.judge_mtu, Devices(uplinks=(ETH0,)), PASS, "tunnel 1420"),
    Case(
        "the smallest uplink counts",
        checks.judge_mtu,
        Devices(uplinks=(Device(name="eth0", mtu=9001), Device(name="eth1", mtu=1500))),
        PASS,
        "tunnel 1420",
    ),
    Case(
        "pods larger than the tunnel",
        checks.judge_mtu,
        Devices(uplinks=(ETH0,), others=(Device(name="veth1", kind="veth", mtu=1500),)),
        WARN,
        "pods use up to 1500 (veth1)",
    ),
    Case(
        "pods that fit",
        checks.judge_mtu,
        Devices(uplinks=(ETH0,), others=(Device(name="cni0", kind="bridge", mtu=1420),)),
        PASS,
        "tunnel 1420",
    ),
    Case(
        "another bridge is nobody's pod",
        checks.judge_mtu,
        Devices(uplinks=(ETH0,), others=(Device(name="docker0", kind="bridge", mtu=1500),)),
        PASS,
        "tunnel 1420",
    ),
    Case(
        "an uplink too small for IPv6",
        checks.judge_mtu,
        Devices(uplinks=(Device(name="e", mtu=1359),)),
        FAIL,
        "1279",
    ),
    Case(
        "an uplink just large enough",
        checks.judge_mtu,
        Devices(uplinks=(Device(name="e", mtu=1360),)),
        PASS,
        "1280",
    ),
    Case("no uplink", checks.judge_mtu, Devices(), WARN, "No uplink"),
    Case(
        "a configured MTU that does not fit",
        mtu_of_1480,
        Devices(uplinks=(ETH0,)),
        WARN,
        "has room for 1420",
    ),
    Case(
        "a configured MTU that fits",
        mtu_of_1480,
        Devices(uplinks=(Device(name="e", mtu=9000),)),
        PASS,
        "tunnel 1480",
    ),
    Case("no other encryption", checks.judge_conflicts, Devices(uplinks=(ETH0,)), PASS, "no other"),
    Case(
        "another WireGuard device alone is no conflict",
        checks.judge_conflicts,
        Devices(uplinks=(ETH0,), others=(Device(name="wg0", kind="wireguard"),)),
        PASS,
        "no other",
    ),
    Case(
        "Calico's encryption",
        checks.judge_conflicts,
        Devices(uplinks=(ETH0,), others=(Device(name="wireguard.cali", kind="wireguard"),)),
        WARN,
        "wireguard.cali belongs to Calico",
    ),
    Case("no tcx", checks.judge_tcx, None, PASS, "new in 6.6"),
    Case("tcx unused", checks.judge_tcx, [Hook(device="eth0", direction="egress")], PASS, "no program"),
    Case(
        "a tcx program goes first",
        checks.judge_tcx,
        [Hook(device="eth0", direction="egress", tcx=("cil_to_netdev",))],
        WARN,
        "eth0 egress: cil_to_netdev runs before",
    ),
    Case(
        "our filter, and a foreign one behind it",
        checks.judge_filters,
        [
            Hook(
                device="eth0",
                direction="egress",
                filters=(Filter("bpf", "mw_to_netdev", 1), Filter("u32", "", 2)),
            )
        ],
        PASS,
        "no other",
    ),
    Case(
        "a foreign program at priority 1",
        checks.judge_filters,
        [Hook(device="eth0", direction="ingress", filters=(Filter("bpf", "theirs", 1),))],
        WARN,
        "bpf theirs is at priority 1",
    ),
    Case(
        "a filter of another kind at priority 1",
        checks.judge_filters,
        [Hook(device="eth0", direction="ingress", filters=(Filter("u32", "", 1),))],
        FAIL,
        "a filter of kind u32 holds priority 1",
    ),
    Case(
        "an ingress qdisc leaves no place for clsact",
        checks.judge_filters,
        [Hook(device="eth0", direction="egress", blocked=True)],
        FAIL,
        "eth0 has an ingress qdisc",
    ),
    Case("a firewall that can't be read", firewall, Firewall(readable=False), SKIP, "can't be listed"),
    Case("no firewall", firewall, Firewall(readable=True), PASS, "no base chain"),
    Case(
        "INPUT drops",
        firewall,
        Firewall(readable=True, chains=(INPUT_DROP,)),
        WARN,
        "inet filter input drops",
    ),
    Case(
        "INPUT drops, and one of the ports is open",
        firewall,
        Firewall(readable=True, chains=(INPUT_DROP,), texts=("udp dport 51871 accept",)),
        WARN,
        "UDP 51871, 51872",
    ),
    Case(
        "INPUT drops, and the ports are open",
        firewall,
        Firewall(readable=True, chains=(INPUT_DROP,), texts=("udp dport { 51871, 51872 } accept",)),
        PASS,
        "no base chain",
    ),
    Case(
        "INPUT drops, and a range holds the ports",
        firewall,
        Firewall(readable=True, chains=(INPUT_DROP,), texts=("udp dport 51800-51900 accept",)),
        PASS,
        "no base chain",
    ),
    Case(
        "FORWARD drops", firewall, Firewall(readable=True, chains=(FORWARD_DROP,)), WARN, "ip filter FORWARD"
    ),
    Case(
        "FORWARD drops, but not from tunnels",
        firewall,
        Firewall(readable=True, chains=(FORWARD_DROP,), texts=('iifname "meshwire_wg*" accept',)),
        PASS,
        "no base chain",
    ),
    Case(
        "firewalld's reverse path filter",
        firewall,
        Firewall(readable=True, texts=("meta nfproto ipv6 fib saddr . mark . iif oif missing drop",)),
        WARN,
        "IPv6_rpfilter",
    ),
    Case(
        "a loose reverse path filter",
        firewall,
        Firewall(readable=True, texts=("meta nfproto ipv6 fib saddr . mark oif missing drop",)),
        PASS,
        "no base chain",
    ),
    Case("libbpf", checks.judge_libbpf, "", PASS, "can be loaded"),
    Case("no libbpf", checks.judge_libbpf, "cannot open shared object file", SKIP, "brings its own"),
    Case(
        "a cluster that has all",
        checks.judge_cluster,
        cluster("v1.35.4", CRDS, (NODE_A, NODE_B)),
        PASS,
        "v1.35.4",
    ),
    Case(
        "an old cluster",
        checks.judge_cluster,
        cluster("v1.31.9+k3s1", CRDS, (NODE_A,)),
        FAIL,
        "older than 1.32",
    ),
    Case(
        "not installed yet",
        checks.judge_cluster,
        cluster("v1.32.0", CRDS - {"meshnodes.meshwire.dev"}, (NODE_A,)),
        WARN,
        "Not installed: meshnodes.meshwire.dev",
    ),
    Case(
        "no rights",
        checks.judge_cluster,
        cluster("v1.32.0", CRDS, (NODE_A,), denied=("clusterroles",)),
        WARN,
        "may not create clusterroles",
    ),
    Case(
        "what may not be read is skipped",
        checks.judge_cluster,
        cluster("v1.32.0", CRDS, unread={"nodes": "can't be examined: forbidden"}),
        SKIP,
        "forbidden",
    ),
    Case(
        "a node without pod CIDRs",
        checks.judge_cluster,
        cluster("v1.32.0", CRDS, (NODE_A, ClusterNode(name="c", kernel="6.1.0", addresses=("192.0.2.3",)))),
        WARN,
        "without spec.podCIDRs: c",
    ),
    Case(
        "pods the pod CIDRs know nothing of",
        checks.judge_cluster,
        cluster(
            "v1.32.0",
            CRDS,
            (
                ClusterNode(
                    name="c",
                    kernel="6.1.0",
                    addresses=("192.0.2.3",),
                    pod_cidrs=("10.1.0.0/24",),
                    outside=("default/web 172.16.0.9",),
                ),
            ),
        ),
        FAIL,
        "default/web 172.16.0.9 on c",
    ),
    Case(
        "two nodes with one pod CIDR",
        checks.judge_cluster,
        cluster(
            "v1.32.0",
            CRDS,
            (
                NODE_A,
                ClusterNode(
                    name="c", kernel="6.1.0", addresses=("192.0.2.3",), pod_cidrs=("10.244.0.0/23",)
                ),
            ),
        ),
        FAIL,
        "10.244.0.0/24 of a and 10.244.0.0/23 of c overlap",
    ),
    Case(
        "a node with an old kernel",
        checks.judge_cluster,
        cluster(
            "v1.32.0",
            CRDS,
            (ClusterNode(name="c", kernel="4.18.0", addresses=("192.0.2.3",), pod_cidrs=("10.1.0.0/24",)),),
        ),
        FAIL,
        "c (4.18.0)",
    ),
    Case(
        "a node without an address",
        checks.judge_cluster,
        cluster("v1.32.0", CRDS, (ClusterNode(name="c", kernel="6.1.0", pod_cidrs=("10.1.0.0/24",)),)),
        FAIL,
        "Without an InternalIP: c",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_facts_are_judged(case: Case) -> None:
    found = list(case.judge(case.facts))
    worst = max(found, key=lambda finding: list(Level).index(finding.level))
    assert worst.level is case.level
    assert any(case.words in finding.what for finding in found if finding.level is case.level)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_wrong_says_why_and_what_to_do(case: Case) -> None:
    for finding in case.judge(case.facts):
        assert finding.what
        if finding.level in (Level.WARN, Level.FAIL):
            assert finding.why and finding.todo


def test_an_old_kernel_is_told_each_feature_it_lacks() -> None:
    (finding,) = checks.judge_kernel(Kernel("5.7.0"))
    assert "CAP_BPF" in finding.why
    assert "WireGuard" not in finding.why
