"""A node joins, is drained, is reinstalled, claims what is not its own, and goes, while two others talk
to each other and lose nothing."""

from __future__ import annotations

import ipaddress
import json
import time
from pathlib import Path

from meshwire.api.names import device_name
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise

UNTOUCHED = ("node1", "node2")
GUEST = "node4"
IMPOSTOR = "impostor"
NEW_ADDRESS = "198.18.0.240"


def reaches(exercise: Exercise, node: str) -> bool:
    return all(
        exercise.run("node1", "ask", address)["complete"] for address in exercise.probe(node).addresses
    )


def events(exercise: Exercise, name: str) -> list[str]:
    items = exercise.lab.get("events", "--field-selector", f"involvedObject.name={name}")["items"]
    return [f"{item['reason']}: {item.get('message', '')}" for item in items]


def test_a_nodes_life_costs_the_others_nothing(encrypted: Exercise, tmp_path: Path) -> None:
    lab = encrypted.lab
    with Capture(tmp_path / "wire.pcap") as capture, encrypted.flows(udp_rate=500, nodes=UNTOUCHED) as flows:
        lab.add_node(GUEST)
        try:
            encrypted.wait_for_phase("Enforcing")
            encrypted.wait_for_probes()
            encrypted.wait_until(lambda: reaches(encrypted, GUEST), f"{GUEST} has joined")

            lab.kubectl("drain", GUEST, "--ignore-daemonsets", "--timeout=60s")
            assert reaches(encrypted, GUEST)
            lab.kubectl("uncordon", GUEST)

            # Reinstalled: the disk, and with it the sealing key, is another.
            old = encrypted.mesh_node(GUEST)
            lab.stop_agent(GUEST)
            for path in lab.paths.lib(GUEST).iterdir():
                path.unlink()
            lab.reboot_node(GUEST)
            encrypted.wait_until(
                lambda: (
                    encrypted.mesh_node(GUEST)["spec"]["keys"] not in ([], old["spec"]["keys"])
                    and encrypted.mesh_node(GUEST)["status"]["sealingKey"] != old["status"]["sealingKey"]
                ),
                "it has a new key",
                seconds=60,
            )
            encrypted.wait_for_phase("Enforcing")
            encrypted.wait_for_probes()
            encrypted.wait_until(lambda: reaches(encrypted, GUEST), f"{GUEST} is back")
            told = events(encrypted, GUEST)
            assert any(each.startswith("KeyWithdrawn") for each in told), told
            assert any(each.startswith("KeyRenewed") and "withdrawn" in each for each in told), told

            # What another node has: refused, both named, and the owner keeps it.
            taken = encrypted.mesh_node("node1")["spec"]["keys"][0]["publicKey"]
            epoch = encrypted.mesh_node(GUEST)["spec"]["encryption"]["epoch"]
            stolen = {"spec": {"keys": [{"epoch": epoch, "publicKey": taken}]}}
            lab.kubectl("patch", "meshnode", GUEST, "--type=merge", "-p", json.dumps(stolen))
            encrypted.wait_until(
                lambda: encrypted.mesh_node(GUEST)["spec"]["keys"][0]["publicKey"] != taken,
                "a key of another's is taken away again",
            )
            encrypted.wait_until(lambda: reaches(encrypted, GUEST), f"{GUEST} is reached by its own key")
            assert encrypted.mesh_node("node1")["spec"]["keys"][0]["publicKey"] == taken
        finally:
            lab.remove_node(GUEST)
            encrypted.wait_for_probes()
        encrypted.wait_until(lambda: not lab.kubectl("get", "meshnode", GUEST, check=False), "it is gone")
        time.sleep(1)
    report = capture.report
    print(f"{flows.packets} packets between the others, {flows.lost} lost; on the wire: {report}")
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
    assert report and report.clear == 0 and report.wireguard_by_type.get(4, 0) > 100, report
    # A count alone is told of within ten seconds.
    encrypted.wait_until(
        lambda: all(
            encrypted.mesh_node(node)["status"]["peers"] == len(lab.nodes) - 1 for node in UNTOUCHED
        ),
        "nobody has it as a peer any more",
    )
    encrypted.wait_until(lambda: not encrypted.leftovers(), "nothing is left")
    assert not encrypted.leftovers()


def test_no_pod_runs_on_a_node_before_its_datapath_is_in_force(encrypted: Exercise) -> None:
    """The operator is away while the node joins, so nobody tells it what to do."""
    lab = encrypted.lab
    eager = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "eager", "namespace": "default"},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": GUEST},
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "eager", "image": "host", "command": ["sleep", "600"]}],
        },
    }
    lab.apply(eager)
    lab.stop_operator()
    try:
        lab.add_node(GUEST, wait=False)
        encrypted.wait_until(
            lambda: (
                "True"
                in lab.kubectl(
                    "get",
                    "node",
                    GUEST,
                    "-o",
                    'jsonpath={.status.conditions[?(@.type=="Ready")].status}',
                    check=False,
                )
            ),
            f"{GUEST} is Ready",
        )
        time.sleep(3)
        taints = lab.get("node", GUEST)["spec"]["taints"]
        assert "meshwire.dev/agent-not-ready" in [taint["key"] for taint in taints]
        assert "nodeName" not in lab.get("pod", "eager")["spec"]
        lab.start_operator()
        lab.kubectl("wait", "pod/eager", "--for=condition=Ready", "--timeout=60s")
        assert any(each.startswith("DatapathReady") for each in events(encrypted, GUEST))
        # Its datapath breaks, and the taint stays away: what runs there is guarded by what is in the kernel.
        lab.stop_agent(GUEST, kill=True)
        time.sleep(2)
        assert not lab.get("node", GUEST)["spec"].get("taints")
    finally:
        if lab.pid("operator") is None:
            lab.start_operator()
        lab.kubectl("delete", "pod", "eager", "--now")
        lab.remove_node(GUEST)
        encrypted.wait_for_probes()


def report_addresses(exercise: Exercise, node: str, *addresses: str) -> None:
    """As a kubelet whose host has these."""
    found = [{"type": "InternalIP", "address": address} for address in addresses]
    patch = {"status": {"addresses": [*found, {"type": "Hostname", "address": node}]}}
    exercise.lab.kubectl(
        "patch", "node", node, "--subresource=status", "--type=merge", "-p", json.dumps(patch)
    )


def asks(exercise: Exercise, node: str) -> bool:
    return all(
        exercise.run(node, "ask", address)["complete"] for address in exercise.probe("node1").addresses
    )


def change_address(exercise: Exercise, node: str, old: str, new: str) -> None:
    """What an administrator and the CNI do. Routes to pods name the old one as their source, and the kernel
    takes such routes away together with it."""
    lab = exercise.lab
    lab.on_node(node, "ip", "address", "add", f"{new}/24", "dev", "eth0")
    for route in lab.on_node(node, "ip", "route", "show", "src", old).stdout.splitlines():
        if "proto kernel" not in route:
            lab.on_node(node, "ip", "route", "replace", *route.split(), "src", new)
    lab.on_node(node, "ip", "address", "delete", f"{old}/24", "dev", "eth0")


def endpoint(exercise: Exercise, at: str, of: str) -> str:
    """Where one node sends what is for another, without the port."""
    (key,) = exercise.mesh_node(of)["spec"]["keys"]
    device = device_name(key["epoch"])
    shown = exercise.lab.on_node(at, "wg", "show", device, "endpoints").stdout.splitlines()
    (found,) = (line.split("\t")[1] for line in shown if line.startswith(key["publicKey"]))
    return found.rpartition(":")[0]


def test_a_node_gets_another_address_and_not_one_that_is_taken(encrypted: Exercise, tmp_path: Path) -> None:
    lab, moved = encrypted.lab, "node3"
    old, *others = (str(address) for address in lab.state.node(moved).addresses(lab.state.settings.families))
    taken = str(lab.state.node("node1").addresses(lab.state.settings.families)[0])
    with Capture(tmp_path / "wire.pcap") as capture, encrypted.flows(udp_rate=200, nodes=UNTOUCHED) as flows:
        lab.on_node(moved, "sysctl", "-q", "net.ipv4.conf.eth0.promote_secondaries=1")
        change_address(encrypted, moved, old, NEW_ADDRESS)
        try:
            report_addresses(encrypted, moved, NEW_ADDRESS, *others)
            encrypted.wait_until(
                lambda: all(endpoint(encrypted, node, moved) == NEW_ADDRESS for node in UNTOUCHED),
                "the others send to its new address",
            )
            encrypted.wait_until(lambda: reaches(encrypted, moved), "it is reached there")
            encrypted.wait_until(lambda: asks(encrypted, moved), "it reaches others from there")
            assert NEW_ADDRESS in encrypted.mesh_node(moved)["spec"]["addresses"]

            # Somebody else's: refused, both named, and whoever had it keeps it.
            report_addresses(encrypted, moved, NEW_ADDRESS, taken, *others)
            refusal = f"{moved} has address {taken} of node1, which keeps it"
            encrypted.wait_until(
                lambda: refusal in json.dumps(encrypted.mesh_status()["conditions"]), "MeshStatus names both"
            )
            assert taken in encrypted.mesh_node("node1")["spec"]["addresses"]
            assert taken not in encrypted.mesh_node(moved)["spec"]["addresses"]
            assert endpoint(encrypted, "node2", moved) == NEW_ADDRESS
            assert reaches(encrypted, moved)
        finally:
            change_address(encrypted, moved, NEW_ADDRESS, old)
            report_addresses(encrypted, moved, old, *others)
        encrypted.wait_until(lambda: endpoint(encrypted, "node2", moved) == old, "all is as before")
        encrypted.wait_until(lambda: reaches(encrypted, moved), "it is reached again")
    print(f"{flows.packets} packets between the others, {flows.lost} lost; on the wire: {capture.report}")
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
    assert capture.report and capture.report.clear == 0, capture.report
    encrypted.wait_for_phase("Enforcing")


def test_a_node_that_claims_what_others_have_gets_nothing(encrypted: Exercise, tmp_path: Path) -> None:
    """Its pod CIDR covers those of all nodes (so the CNI keeps its routes, which are longer), its address is
    another's."""
    lab = encrypted.lab
    cidrs = {node: encrypted.mesh_node(node)["spec"]["podCIDRs"] for node in lab.nodes}
    claimed = [str(ipaddress.ip_network(cidr).supernet(8)) for cidr in cidrs["node1"]]
    address = str(lab.state.node("node2").addresses(lab.state.settings.families)[0])
    wanted = (
        f"{IMPOSTOR}'s pod CIDR {claimed[0]} overlaps what node",
        f"{IMPOSTOR} has address {address} of node2, which keeps it",
    )
    with Capture(tmp_path / "wire.pcap") as capture, encrypted.flows(udp_rate=200, nodes=UNTOUCHED) as flows:
        lab.apply(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": IMPOSTOR},
                "spec": {"podCIDR": claimed[0], "podCIDRs": claimed},
            }
        )
        try:
            report_addresses(encrypted, IMPOSTOR, address)
            encrypted.wait_until(
                lambda: all(each in json.dumps(encrypted.mesh_status()["conditions"]) for each in wanted),
                "MeshStatus names all of them",
            )
            spec = encrypted.mesh_node(IMPOSTOR)["spec"]
            assert not spec.get("podCIDRs") and not spec.get("addresses"), spec
            assert cidrs == {node: encrypted.mesh_node(node)["spec"]["podCIDRs"] for node in lab.nodes}
            assert all(reaches(encrypted, node) for node in UNTOUCHED[1:])
        finally:
            lab.kubectl("delete", "node", IMPOSTOR)
        encrypted.wait_until(
            lambda: IMPOSTOR not in json.dumps(encrypted.mesh_status()["conditions"]), "all is well again"
        )
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
    assert capture.report and capture.report.clear == 0, capture.report
