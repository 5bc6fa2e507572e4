"""The promises, with real packets and a capture on the wire: no plaintext, no loss, failures stay closed."""

from __future__ import annotations

import json
import re
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from meshwire.api import preshared
from meshwire.api.names import API_VERSION, device_name, epoch_secret_name
from meshwire.kube.client import ApiError, Client, Cluster
from meshwire.lab.capture import Capture, Report
from meshwire.lab.exercise import PROBE, Exercise
from meshwire.lab.model import LabError
from meshwire.lab.traffic import PORT


@contextmanager
def wire(exercise: Exercise, directory: Path) -> Iterator[Capture]:
    """Records every port of the underlay while the body runs, and insists that the record is whole."""
    capture = Capture(directory / f"wire-{time.monotonic_ns()}.pcap")
    with capture:
        yield capture
    assert capture.report and capture.report.is_complete, capture.report


def encrypted_only(capture: Capture) -> Report:
    """The report of a capture that must show tunnel traffic and no pod's address."""
    report = capture.report
    assert report
    assert report.clear == 0, report
    # Handshakes and keepalives alone would be a few dozen.
    assert report.wireguard_by_type.get(4, 0) > 100, report
    return report


def active_device(exercise: Exercise) -> str:
    return device_name(exercise.mesh_status()["epoch"])


def eager_pod(name: str, node: str, targets: tuple[str, ...]) -> dict[str, object]:
    """A pod that talks with its first breath: datagrams to every target, from its start to its deletion."""
    script = (
        "import socket, sys, time\n"
        "while True:\n"
        "    for target in sys.argv[1:]:\n"
        "        family = socket.AF_INET6 if ':' in target else socket.AF_INET\n"
        "        with socket.socket(family, socket.SOCK_DGRAM) as sock:\n"
        "            try:\n"
        f"                sock.sendto(b'eager', (target, {PORT}))\n"
        "            except OSError:\n"
        "                pass\n"
        "    time.sleep(0.002)\n"
    )
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {"name": "eager", "image": "host", "command": ["python", "-c", script, *targets]},
            ],
        },
    }


def test_nothing_is_in_clear_and_status_says_so(encrypted: Exercise, tmp_path: Path) -> None:
    with wire(encrypted, tmp_path) as capture:
        with encrypted.flows(services=True) as flows:
            time.sleep(3)
        for node, targets in encrypted.pairs():
            for target in targets:
                assert encrypted.run(node, "ping", target)["lost"] == 0
    assert flows.lost == 0 and not flows.broken
    encrypted_only(capture)
    status = encrypted.mesh_status()
    assert (status["encryption"], status["nodesSummary"], status["leaked"]) == ("WireGuard", "3/3", 0)
    row = encrypted.lab.kubectl("get", "meshstatus").splitlines()
    assert row[0].split() == ["NAME", "ENCRYPTION", "NODES", "EPOCH", "KEY-AGE", "LEAKED", "READY", "AGE"]
    assert re.fullmatch(r"mesh +WireGuard +3/3 +\d+ +\d+[sm]\S* +0 +True +\S+ *", row[1])


def test_the_capture_sees_what_is_in_clear(plain: Exercise, tmp_path: Path) -> None:
    with wire(plain, tmp_path) as capture:
        for node, targets in plain.pairs():
            for target in targets:
                assert plain.run(node, "ask", target)["complete"]
    assert capture.report and capture.report.clear >= 6 * 2 and capture.report.wireguard == 0


def test_on_and_off_under_traffic_lose_no_packet(plain: Exercise) -> None:
    def clsacts() -> list[bool]:
        shown = [plain.lab.on_node(node, "tc", "qdisc", "show", "dev", "eth0") for node in plain.lab.nodes]
        return ["clsact" in each.stdout for each in shown]

    # As on nodes that have never encrypted: the kernel drops packets while a clsact is added, so agents may
    # not leave that for the moment when encryption is turned on.
    for node in plain.lab.nodes:
        plain.lab.on_node(node, "tc", "qdisc", "delete", "dev", "eth0", "clsact", check=False)
    plain.wait_until(lambda: all(clsacts()), "every node has its clsact")
    with plain.flows(udp_rate=500, services=True) as flows:
        for _ in range(2):
            plain.set_encryption(True)
            time.sleep(1)
            plain.set_encryption(False)
            time.sleep(1)
    assert flows.packets > 10_000
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)


def test_large_segments_of_old_connections_survive_the_cut_over(plain: Exercise) -> None:
    # 1,400 bytes of payload fit the wire and not the tunnel; TCP at this rate sends full segments of 1,500.
    with plain.flows(udp_rate=50, size=1400, tcp_rate=2_000_000) as flows:
        plain.set_encryption(True)
        time.sleep(2)
        plain.set_encryption(False)
    assert not [flow for flow in flows.broken if flow["kind"] == "tcp"]


def test_the_first_packets_of_a_new_pod_are_encrypted(encrypted: Exercise, tmp_path: Path) -> None:
    targets = encrypted.probe("node2").addresses
    with wire(encrypted, tmp_path) as capture:
        for number in range(3):
            encrypted.lab.apply(eager_pod(f"eager{number}", "node1", targets))
        for number in range(3):
            encrypted.lab.kubectl("wait", f"pod/eager{number}", "--for=condition=Ready", "--timeout=60s")
        time.sleep(1)
        encrypted.lab.kubectl("delete", "pod", "eager0", "eager1", "eager2")
    encrypted_only(capture)


def test_the_first_packets_of_a_new_node_are_encrypted(encrypted: Exercise, tmp_path: Path) -> None:
    """Its pods talk as soon as they may start, and pods elsewhere talk to it before it is there."""
    before = encrypted.lab.get("nodes")["items"]
    taken = {cidr for node in before for cidr in node["spec"]["podCIDRs"]}
    # The controller gives a new node one of the next CIDRs, and its first pods the first addresses of it.
    free = [f"10.244.{number}.0/24" for number in range(16) if f"10.244.{number}.0/24" not in taken]
    ahead = tuple(cidr.replace(".0/24", f".{host}") for cidr in free[:4] for host in (2, 3))
    labels = {"app": "eager"}
    pod = eager_pod("eager", "", encrypted.probe("node1").addresses)["spec"]
    assert isinstance(pod, dict)
    del pod["nodeName"]
    daemons = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "eager", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    with wire(encrypted, tmp_path) as capture:
        encrypted.lab.apply(daemons, eager_pod("prober", "node1", ahead))
        encrypted.lab.kubectl("wait", "pod/prober", "--for=condition=Ready", "--timeout=60s")
        encrypted.lab.add_node("node4")
        try:
            encrypted.wait_for_phase("Enforcing")
            encrypted.wait_for_probes()
            encrypted.wait_until(
                lambda: all(
                    encrypted.run("node4", "ask", address)["complete"]
                    for address in encrypted.probe("node2").addresses
                ),
                "node4 reaches node2",
            )
            assert {"10.244.0.0/16"} <= set(encrypted.mesh_node("node4")["spec"]["clusterCIDRs"])
        finally:
            encrypted.lab.kubectl("delete", "daemonset/eager", "pod/prober")
            encrypted.lab.remove_node("node4")
            encrypted.wait_for_probes()
    encrypted_only(capture)
    encrypted.wait_until(
        lambda: not encrypted.lab.kubectl("get", "meshnode", "node4", check=False), "MeshNode node4 is gone"
    )
    secrets = encrypted.lab.kubectl("get", "secrets", "-n", "meshwire-system", "-o", "name")
    assert "node4" not in secrets and "node3" in secrets
    for node in encrypted.lab.nodes:
        assert encrypted.mesh_node(node)["status"]["leaked"] == 0


@pytest.mark.parametrize("outage", ["agents", "operator", "apiserver"])
def test_an_outage_lets_running_and_new_connections_go_on_encrypted(
    encrypted: Exercise, tmp_path: Path, outage: str
) -> None:
    lab = encrypted.lab
    services = encrypted.services()

    def begin() -> None:
        match outage:
            case "agents":
                for node in lab.nodes:
                    lab.stop_agent(node, kill=True)
            case "operator":
                lab.stop_operator(kill=True)
            case _:
                lab.stop_apiserver()

    def end() -> None:
        match outage:
            case "agents":
                for node in lab.nodes:
                    lab.start_agent(node)
            case "operator":
                lab.start_operator()
            case _:
                lab.start_apiserver()

    with wire(encrypted, tmp_path) as capture:
        with encrypted.flows() as flows:
            try:
                begin()
                for node, targets in encrypted.pairs():
                    for target in (*targets, *services):
                        assert encrypted.run(node, "ask", target)["complete"]
                        assert encrypted.run(node, "ask", "--udp", target)["complete"]
            finally:
                end()
            encrypted.wait_for_phase("Enforcing")
    assert flows.lost == 0 and not flows.broken
    encrypted_only(capture)


def test_a_deleted_device_is_restored_at_once_and_nothing_leaks_meanwhile(
    encrypted: Exercise, tmp_path: Path
) -> None:
    device = active_device(encrypted)
    old = encrypted.lab.on_node("node1", "cat", f"/sys/class/net/{device}/ifindex").stdout
    with wire(encrypted, tmp_path) as capture:
        with encrypted.flows() as flows:
            encrypted.lab.on_node("node1", "ip", "link", "delete", device)
            # Far less than the agent's slow look at the kernel: only a notification can be that quick.
            encrypted.wait_until(
                lambda: (
                    encrypted.lab.on_node(
                        "node1", "cat", f"/sys/class/net/{device}/ifindex", check=False
                    ).stdout
                    not in ("", old)
                ),
                f"{device} is back",
                seconds=10,
            )
            encrypted.wait_until(
                lambda: all(
                    encrypted.run("node1", "ask", target)["complete"]
                    for target in encrypted.probe("node2").addresses
                ),
                "node1 reaches node2 again",
            )
            time.sleep(1)
    encrypted_only(capture)
    # What was on its way to the device is lost; nothing between the other two nodes is.
    assert not [flow for flow in flows.broken if flow["source"] == "node2"], flows.broken
    assert encrypted.mesh_status()["leaked"] == 0


def test_without_agents_a_deleted_device_fails_closed(encrypted: Exercise, tmp_path: Path) -> None:
    device = active_device(encrypted)
    target = encrypted.probe("node2").addresses[0]
    encrypted.lab.stop_agent("node1", kill=True)
    try:
        with wire(encrypted, tmp_path) as capture:
            encrypted.lab.on_node("node1", "ip", "link", "delete", device)
            for _ in range(3):
                assert not encrypted.run("node1", "ask", "--seconds=1", target)["complete"]
        assert capture.report and capture.report.clear == 0, capture.report
    finally:
        encrypted.lab.start_agent("node1")
    encrypted.wait_until(
        lambda: bool(encrypted.run("node1", "ask", target)["complete"]), "node1 reaches node2"
    )


def test_removed_filters_come_back(encrypted: Exercise) -> None:
    def filters() -> str:
        return encrypted.lab.on_node("node1", "tc", "filter", "show", "dev", "eth0", "egress").stdout

    assert "mw_to_netdev" in filters()
    encrypted.lab.on_node("node1", "tc", "qdisc", "delete", "dev", "eth0", "clsact")
    assert "mw_to_netdev" not in filters()
    encrypted.wait_until(lambda: "mw_to_netdev" in filters(), "the filter is back", seconds=10)


def test_plaintext_that_arrives_is_refused_and_counted(encrypted: Exercise) -> None:
    """A node that lost its datapath sends in clear: the others don't take it, and say so."""
    lab = encrypted.lab
    target = encrypted.probe("node2").addresses[0]
    lab.stop_agent("node1", kill=True)
    try:
        lab.on_node("node1", "tc", "qdisc", "delete", "dev", "eth0", "clsact")
        assert not encrypted.run("node1", "ask", "--seconds=1", target)["complete"]
        encrypted.wait_until(lambda: encrypted.mesh_status()["leaked"] > 0, "the leak is counted")
        assert encrypted.mesh_node("node2")["status"]["leaked"] > 0
    finally:
        lab.start_agent("node1")
    encrypted.wait_until(
        lambda: bool(encrypted.run("node1", "ask", target)["complete"]), "node1 reaches node2"
    )
    # The next one counts from nothing.
    encrypted.set_encryption(False)


def test_an_unknown_device_is_refused_at_run_time_and_the_last_good_state_stays(
    encrypted: Exercise, tmp_path: Path
) -> None:
    lab = encrypted.lab
    good = lab.get("meshconfig", "default")
    bad = {**good, "spec": {**good["spec"], "network": {"uplinks": ["nosuch0"]}}}
    bad["metadata"] = {"name": "default"}

    def condition(node: str) -> dict[str, str]:
        conditions = encrypted.mesh_node(node)["status"]["conditions"]
        return next(each for each in conditions if each["type"] == "Ready")

    lab.apply(bad)
    try:
        encrypted.wait_until(
            lambda: all(condition(node)["reason"] == "DeviceNotFound" for node in lab.nodes),
            "every node says that the device doesn't exist",
        )
        assert "nosuch0" in condition("node1")["message"]
        with wire(encrypted, tmp_path) as capture:
            with encrypted.flows() as flows:
                # The last good configuration outlives the agent, too.
                lab.restart_agent("node1")
                time.sleep(3)
        assert flows.lost == 0 and not flows.broken
        encrypted_only(capture)
        assert encrypted.mesh_status()["nodesReady"] == 0
    finally:
        lab.apply({**bad, "spec": good["spec"] | {"network": {"uplinks": []}}})
    encrypted.wait_for_phase("Enforcing")


def test_what_others_put_on_a_node_stays(plain: Exercise) -> None:
    """A WireGuard device (or, without the kernel's, a TUN), a filter on the uplink and a route: before, with
    and after Meshwire."""
    lab = plain.lab
    add = """
        set -e
        ip link add foreign0 type wireguard 2>/dev/null || ip tuntap add foreign0 mode tun
        ip addr add 203.0.113.1/24 dev foreign0
        ip link set foreign0 up
        ip route add 198.51.100.0/24 via 203.0.113.2
        tc qdisc replace dev eth0 clsact
        tc filter add dev eth0 egress pref 7 protocol ip bpf bytecode '1,6 0 0 0,' flowid 1:1
        tc filter add dev eth0 ingress pref 7 protocol ip bpf bytecode '1,6 0 0 0,' flowid 1:1
    """
    look = """
        ip -o link show foreign0 | sed 's/^[0-9]*: //'
        ip -o -4 addr show dev foreign0
        ip route show 198.51.100.0/24
        tc filter show dev eth0 egress pref 7 | grep -v -e Sent -e used
        tc filter show dev eth0 ingress pref 7 | grep -v -e Sent -e used
    """
    lab.on_node("node1", "sh", "-c", add)
    try:
        before = lab.on_node("node1", "sh", "-c", look).stdout
        assert before.count("1,6 0 0 0") == 2
        plain.set_encryption(True)
        assert lab.on_node("node1", "sh", "-c", look).stdout == before
        lab.restart_agent("node1")
        plain.wait_for_phase("Enforcing")
        assert lab.on_node("node1", "sh", "-c", look).stdout == before
        plain.set_encryption(False)
        assert lab.on_node("node1", "sh", "-c", look).stdout == before
    finally:
        plain.set_encryption(False)
        lab.on_node(
            "node1", "sh", "-c", "ip link delete foreign0; tc qdisc delete dev eth0 clsact", check=False
        )


def test_off_leaves_nothing(plain: Exercise) -> None:
    plain.set_encryption(True)
    plain.set_encryption(False)
    for node in plain.lab.nodes:
        found = plain.lab.on_node(
            node,
            "sh",
            "-c",
            "ip -o link | grep meshwire; tc filter show dev eth0 egress; tc filter show dev eth0 ingress;"
            " find /sys/fs/bpf/meshwire -type f 2>/dev/null; cat /var/lib/meshwire/keys.json 2>/dev/null",
            check=False,
        ).stdout
        assert "mw_" not in found and "meshwire" not in found and "private" not in found, found
    # Agents that have heard of it delete their keys; the operator deletes the Secrets.
    plain.wait_until(
        lambda: (
            "meshwire-key-" not in plain.lab.kubectl("get", "secrets", "-n", "meshwire-system", "-o", "name")
            and not plain.lab.kubectl("get", "secrets", "-n", "meshwire-operator", "-o", "name")
        ),
        "the key Secrets are gone",
    )


async def test_an_agents_account_can_do_no_more_than_it_needs(encrypted: Exercise) -> None:
    """The token that really runs node1, against the real API server."""
    credentials = encrypted.lab.paths.token_directory("node1")
    server = encrypted.lab.kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    account = Cluster(server=server, ca_file=credentials / "ca.crt", token_file=credentials / "token")
    ours, secrets = f"/apis/{API_VERSION}", "/api/v1/namespaces/meshwire-system/secrets"
    leaked = {"status": {"leaked": 0}}
    epoch = encrypted.mesh_status()["epoch"]
    async with Client(account) as client:
        await client.patch(f"{ours}/meshnodes/node1/status", leaked)
        await client.get(f"{secrets}/meshwire-key-node1")
        for refused in (
            client.patch(f"{ours}/meshnodes/node2/status", leaked),
            client.patch(f"{ours}/meshnodes/node1", {"spec": {"podCIDRs": ["10.0.0.0/8"]}}),
            client.delete(f"{ours}/meshnodes/node2"),
            client.delete(f"{ours}/meshconfigs/default"),
            client.delete("/api/v1/namespaces/default/pods/some"),
            client.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "some"}}),
            client.delete(f"{ours}/meshidentities/256"),
            client.patch(f"{ours}/namespaces/default/meshpolicies/some", {"spec": {"mode": "Audit"}}),
            client.patch(f"{ours}/meshendpointslices/meshwire-0", {"spec": {"endpoints": []}}),
            client.get("/api/v1/secrets"),
            client.get(secrets),
            client.get("/api/v1/namespaces/kube-system/secrets"),
            client.get("/api/v1/namespaces/meshwire-operator/secrets"),
            client.get(f"/api/v1/namespaces/meshwire-operator/secrets/{epoch_secret_name(epoch)}"),
            client.delete(f"{secrets}/meshwire-key-node2"),
            client.patch("/api/v1/nodes/node1", {"metadata": {"labels": {"a": "b"}}}),
        ):
            with pytest.raises(ApiError) as refusal:
                await refused
            assert refusal.value.status in (403, 422), refusal.value


def test_private_keys_are_nowhere_to_be_read(encrypted: Exercise, tmp_path: Path) -> None:
    """Every private key, in every spelling, in every log, object, event, command line and environment."""
    lab = encrypted.lab
    keys: list[bytes] = []
    for node in lab.nodes:
        directory = lab.paths.lib(node)
        for path in directory.iterdir():
            assert path.stat().st_mode & 0o077 == 0 or not _secrets_in(path), path
            keys += _secrets_in(path)
    # A sealing key, a WireGuard key and the epoch secret per node.
    assert len(keys) >= 3 * len(lab.nodes)
    epoch = encrypted.mesh_status()["epoch"]
    held = [json.loads((lab.paths.lib(node) / "keys.json").read_text())[str(epoch)] for node in lab.nodes]
    [secret] = {b64decode(each["epochSecret"]) for each in held}
    public = [
        key["publicKey"]
        for node in lab.nodes
        for key in encrypted.mesh_node(node)["spec"]["keys"]
        if key["epoch"] == epoch
    ]
    keys += [preshared.pair_key(secret, epoch, *pair) for pair in combinations(public, 2)]

    haystacks: dict[str, bytes] = {f"log {name}": lab.log(name).read_bytes() for name in lab.logs()}
    for kind in (
        "meshconfigs",
        "meshnodes",
        "meshstatuses",
        "events",
        "secrets",
        "configmaps",
        "nodes",
        "pods",
    ):
        # The epoch secret is where the operator keeps it.
        elsewhere = ["--field-selector=metadata.namespace!=meshwire-operator"] if kind == "secrets" else []
        text = lab.kubectl("get", kind, "-A", "-o", "yaml", *elsewhere).encode()
        haystacks[kind] = text
        haystacks[f"{kind} decoded"] = b"\n".join(
            b64decode(word) for word in re.findall(rb"[A-Za-z0-9+/]{40,}={0,2}", text) if len(word) % 4 == 0
        )
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for file in ("cmdline", "environ"):
                try:
                    haystacks[f"{file} of {process.name}"] = (process / file).read_bytes()
                except OSError:
                    continue
    for node in lab.nodes:
        haystacks[f"metrics of {node}"] = lab.on_node(
            node,
            "python3",
            "-c",
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9871/metrics').read().decode())",
        ).stdout.encode()
    assert any(b"meshwire_" in text for name, text in haystacks.items() if name.startswith("metrics"))
    for key in keys:
        for spelling in (key, key.hex().encode(), key.hex().upper().encode(), _base64(key)):
            for name, text in haystacks.items():
                assert spelling not in text, f"a private key is in {name}"


def _base64(key: bytes) -> bytes:
    return b64encode(key).rstrip(b"=")


def _secrets_in(path: Path) -> list[bytes]:
    """The private keys in a file of an agent's state directory, raw."""
    if path.name == "sealing.key":
        return [b64decode(path.read_bytes())]
    if path.name == "keys.json":
        return [b64decode(text) for item in json.loads(path.read_text()).values() for text in item.values()]
    return []


def test_probes_do_not_share_a_node(exercise: Exercise) -> None:
    """What the other tests take for granted."""
    with pytest.raises(LabError):
        exercise.probe("no-such-node")
    assert len({exercise.probe(node).netns for node in exercise.lab.nodes}) == 3
    assert PROBE in exercise.probe("node1").name
