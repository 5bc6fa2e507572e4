"""A node joins, is drained, is reinstalled, claims what is not its own, and goes, while two others talk
to each other and lose nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise

UNTOUCHED = ("node1", "node2")
GUEST = "node4"


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
