"""The probes of `meshwire preflight` against a real kernel, each in a network namespace of its own."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyroute2 import IPRoute

from meshwire.cli import bpfcall, checks, probes, sandbox
from meshwire.cli.__main__ import main
from meshwire.cli.facts import ClusterNode, Devices, Filter
from meshwire.cli.findings import Level

pytestmark = pytest.mark.netns

BPF_LINK_CREATE = 28


@pytest.fixture
def ipr() -> Iterator[IPRoute]:
    """In a new network namespace that has `eth0` (MTU 1400, 192.0.2.1/24, default route) and its other
    end."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    sandbox.unshare(sandbox.CLONE_NEWNET)
    try:
        with IPRoute() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer={"ifname": "wire"})
            for name in ("lo", "eth0", "wire"):
                ipr.link("set", index=socket.if_nametoindex(name), state="up")
            eth0 = socket.if_nametoindex("eth0")
            ipr.link("set", index=eth0, mtu=1400)
            ipr.addr("add", index=eth0, address="192.0.2.1", prefixlen=24)
            ipr.route("add", dst="default", gateway="192.0.2.254")
            yield ipr
    finally:
        _set_namespace(home)
        os.close(home)


def _set_namespace(fd: int) -> None:
    if ctypes.CDLL(None).setns(fd, sandbox.CLONE_NEWNET):
        pytest.exit("can't return to the network namespace the tests were started in", returncode=3)


def eth0() -> Devices:
    return probes.find_devices(uplinks=("eth0",))


def test_what_is_tried_leaves_no_trace(ipr: IPRoute) -> None:
    before = socket.if_nameindex()
    attempts = probes.try_kernel()
    assert attempts.tried("wireguard", *checks.BPF_ATTEMPTS, *checks.TC_ATTEMPTS)
    assert not attempts.failed(*checks.BPF_ATTEMPTS, *checks.TC_ATTEMPTS)
    assert socket.if_nameindex() == before
    assert ipr.get_qdiscs(index=socket.if_nametoindex("lo"))[0].get_attr("TCA_KIND") != "clsact"


def test_wireguard_is_found_where_the_kernel_has_it(ipr: IPRoute) -> None:
    made = (
        subprocess.run(["ip", "link", "add", "wg9", "type", "wireguard"], capture_output=True).returncode
        == 0
    )
    (finding,) = checks.judge_wireguard(probes.find_wireguard(probes.try_kernel()))
    assert (finding.level is Level.PASS) is made


def test_the_device_of_the_default_route_is_the_uplink(ipr: IPRoute) -> None:
    devices = probes.find_devices()
    assert [(device.name, device.mtu) for device in devices.uplinks] == [("eth0", 1400)]
    assert [device.name for device in devices.others] == ["wire"]
    (finding,) = checks.judge_mtu(Devices(uplinks=devices.uplinks))
    assert "tunnel 1320" in finding.what


def test_a_route_to_another_nodes_pods_makes_an_uplink(ipr: IPRoute) -> None:
    ipr.link("add", ifname="eth1", kind="veth", peer={"ifname": "wire1"})
    index = socket.if_nametoindex("eth1")
    for name in ("eth1", "wire1"):
        ipr.link("set", index=socket.if_nametoindex(name), state="up")
    ipr.addr("add", index=index, address="198.51.100.1", prefixlen=24)
    ipr.route("add", dst="10.244.1.0/24", gateway="198.51.100.2")
    nodes = (
        ClusterNode(name="here", kernel="", addresses=("192.0.2.1",), pod_cidrs=("10.244.0.0/24",)),
        ClusterNode(name="there", kernel="", addresses=("192.0.2.2",), pod_cidrs=("10.244.1.0/24",)),
    )
    assert [device.name for device in probes.find_devices(nodes=nodes).uplinks] == ["eth0", "eth1"]


def test_a_port_somebody_holds_is_told_with_its_holder(ipr: IPRoute) -> None:
    assert all(port.free for port in probes.find_ports(51871))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("192.0.2.1", 51872))
        first, second = probes.find_ports(51871)
    assert first.free and not second.free
    assert f"(pid {os.getpid()})" in second.holder


def test_sysctls_are_read_in_this_namespace(ipr: IPRoute) -> None:
    conf = Path("/proc/sys/net/ipv4")
    (conf / "ip_forward").write_text("1")
    (conf / "conf/all/rp_filter").write_text("0")
    (conf / "conf/eth0/rp_filter").write_text("1")
    assert probes.find_forwarding().ipv4
    assert probes.find_reverse_path(eth0()).devices == {"eth0": 1}
    (conf / "ip_forward").write_text("0")
    assert not probes.find_forwarding().ipv4


def test_foreign_filters_are_seen(ipr: IPRoute) -> None:
    assert all(hook.filters == () for hook in probes.find_filters(eth0()))
    index, fd = socket.if_nametoindex("eth0"), bpfcall.load_pass_program()
    ipr.tc("add", "clsact", index)
    ipr.tc("add-filter", "bpf", index, 1, parent=sandbox.CLSACT_EGRESS, prio=1, protocol=sandbox.ETH_P_ALL,
           fd=fd, name="theirs", direct_action=True)  # fmt: skip
    os.close(fd)
    hooks = {hook.direction: hook.filters for hook in probes.find_filters(eth0())}
    assert hooks == {"ingress": (), "egress": (Filter("bpf", "theirs", 1),)}


def test_an_ingress_qdisc_is_told_from_clsact(ipr: IPRoute) -> None:
    index = socket.if_nametoindex("eth0")
    ipr.tc("add", "ingress", index)
    assert all(hook.blocked for hook in probes.find_filters(eth0()))
    ipr.tc("del", "ingress", index)
    ipr.tc("add", "clsact", index)
    assert not any(hook.blocked for hook in probes.find_filters(eth0()))


def test_tcx_programs_are_seen(ipr: IPRoute) -> None:
    hooks = probes.find_tcx(eth0())
    if hooks is None:
        pytest.skip("this kernel has no tcx")
    assert all(hook.tcx == () for hook in hooks)
    fd = bpfcall.load_pass_program()
    link = bpfcall.bpf(
        BPF_LINK_CREATE,
        bpfcall.attributes("=4I", fd, socket.if_nametoindex("eth0"), bpfcall.BPF_TCX_EGRESS, 0),
    )
    os.close(fd)
    try:
        found = {hook.direction: hook.tcx for hook in probes.find_tcx(eth0()) or ()}
    finally:
        os.close(link)
    assert found["ingress"] == ()
    assert len(found["egress"]) == 1


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_a_firewall_that_drops_is_seen(ipr: IPRoute) -> None:
    assert [finding.level for finding in checks.judge_firewall(probes.find_firewall(), (51871,))] == [
        Level.PASS
    ]
    rules = "table inet filter { chain input { type filter hook input priority 0; policy drop; }; }"
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    (finding,) = checks.judge_firewall(probes.find_firewall(), (51871,))
    assert (finding.level, "inet filter input" in finding.what) == (Level.WARN, True)


def test_the_whole_command_says_something_of_everything(ipr: IPRoute) -> None:
    result = CliRunner().invoke(main, ["preflight", "--no-cluster", "-o", "json"], catch_exceptions=False)
    answer = json.loads(result.stdout)
    assert result.exit_code == (0 if answer["ok"] else 1)
    found = {finding["check"] for finding in answer["findings"]}
    assert found == {
        "kernel", "privileges", "btf", "bpffs", "bpf", "tc", "wireguard", "libbpf", "ports", "forwarding",
        "boot guard", "rp_filter", "mtu", "conflicts", "tcx", "tc filters", "firewall",
    }  # fmt: skip
