"""The lab itself: what it brings up is a cluster, and nothing of it stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwire.lab import network, processes
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import LabError, Settings


def ready(lab: Lab, node: str) -> bool:
    conditions = lab.get("node", node)["status"]["conditions"]
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def test_probes_of_all_nodes_reach_each_other_in_both_families(exercise: Exercise) -> None:
    for node, targets in exercise.pairs():
        for target in targets:
            assert exercise.run(node, "ping", "--count=2", target)["lost"] == 0
            assert exercise.run(node, "ask", target)["complete"]
            assert exercise.run(node, "ask", "--udp", target)["complete"]


def test_services_lead_to_pods_of_every_node_in_both_families(exercise: Exercise) -> None:
    names = {exercise.probe(node).name for node in exercise.lab.nodes}
    for service in exercise.services():
        # One of three at random: 30 times none of one of them has a chance of 1 in 60,000.
        assert set(exercise.run("node1", "ask", "--count=30", service)["names"]) == names


def test_a_pod_reaches_the_api_server_with_its_token(exercise: Exercise) -> None:
    script = (
        "import json,os,ssl,urllib.request;d='/var/run/secrets/kubernetes.io/serviceaccount/';"
        "q=urllib.request.Request('https://'+os.environ['KUBERNETES_SERVICE_HOST']"
        "+'/apis/authentication.k8s.io/v1/selfsubjectreviews',data=json.dumps({'apiVersion':"
        "'authentication.k8s.io/v1','kind':'SelfSubjectReview'}).encode(),headers={'Content-Type':"
        "'application/json','Authorization':'Bearer '+open(d+'token').read()});"
        "print(urllib.request.urlopen(q,context=ssl.create_default_context(cafile=d+'ca.crt')).read().decode())"
    )
    done = exercise.lab.exec(exercise.probe("node1").name, "python", "-c", script)
    assert "system:serviceaccount:default:default" in done.stdout


def test_an_agents_token_names_its_node(lab: Lab) -> None:
    token = lab.paths.token_directory("node2") / "token"
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "metadata": {"name": "review"},
        "spec": {"token": token.read_text()},
    }

    async def create(client: object) -> dict[str, object]:
        answer: dict[str, object] = await client.create(  # type: ignore[attr-defined]
            "/apis/authentication.k8s.io/v1/tokenreviews", review
        )
        return answer

    status = lab.call(create)["status"]
    assert isinstance(status, dict)
    assert status["user"]["username"] == "system:serviceaccount:meshwire-system:meshwire-agent"
    assert status["user"]["extra"]["authentication.kubernetes.io/node-name"] == ["node2"]


def test_a_deployment_rolls_out_restarts_and_goes(lab: Lab) -> None:
    labels = {"app": "sleeper"}
    env = [{"name": "TIME", "value": "infinity"}]
    container = {"name": "c", "image": "host", "command": ["sleep", "$(TIME)"], "env": env}
    lab.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "sleeper"},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            },
        }
    )
    lab.kubectl("rollout", "status", "deployment/sleeper", "--timeout=60s")
    pods = lab.get("pods", "-l", "app=sleeper")["items"]
    assert len(pods) == 3
    record = lab.find_pod(pods[0]["metadata"]["name"])
    os.kill(record.pid, 9)
    lab.kubectl("wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", f"pod/{record.name}")
    lab.kubectl("delete", "deployment", "sleeper", "--cascade=foreground", "--timeout=60s")
    assert not [name for name in network.list_netns() if "sleeper" in name]


def test_a_pod_that_ends_has_its_exit_code_and_one_without_command_says_why(lab: Lab) -> None:
    def pod(name: str, container: dict[str, object]) -> dict[str, object]:
        spec = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "host", **container}]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}

    lab.apply(pod("ends", {"command": ["sh", "-c", "echo said; exit 3"]}), pod("image", {}))
    lab.kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "pod/ends", "--timeout=30s")
    state = lab.get("pod", "ends")["status"]["containerStatuses"][0]["state"]
    assert state["terminated"]["exitCode"] == 3
    assert lab.log("pods/default_ends").read_text() == "said\n"
    reason = "jsonpath={.status.containerStatuses[0].state.waiting.reason}"
    lab.kubectl("wait", f"--for={reason}=CreateContainerError", "pod/image", "--timeout=30s")
    lab.kubectl("delete", "pod", "ends", "image", "--timeout=30s")


def test_a_host_network_pod_has_the_nodes_addresses_and_mounts(lab: Lab) -> None:
    spec = {
        "hostNetwork": True,
        "nodeName": "node3",
        "containers": [{"name": "c", "image": "host", "command": ["sleep", "infinity"]}],
    }
    lab.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "host"}, "spec": spec})
    lab.kubectl("wait", "--for=condition=Ready", "pod/host", "--timeout=30s")
    addresses = lab.exec("host", "ip", "-o", "address", "show", "dev", "eth0").stdout
    assert "198.18.0.13/" in addresses and "fd00:198:18::13/" in addresses
    # What only the node has.
    (lab.paths.lib("node3") / "here").touch()
    assert "here" in lab.exec("host", "ls", "/var/lib/meshwire").stdout
    lab.kubectl("delete", "pod", "host", "--timeout=30s")
    with pytest.raises(LabError, match="no pod default/host"):
        lab.exec("host", "true")


def test_a_node_is_added_and_removed(exercise: Exercise) -> None:
    lab = exercise.lab
    lab.add_node("extra")
    try:
        exercise.wait_for_probes()
        assert exercise.run("extra", "ask", exercise.probe("node1").addresses[0])["complete"]
        with pytest.raises(LabError, match="already"):
            lab.add_node("extra")
    finally:
        lab.remove_node("extra")
    assert "extra" not in lab.nodes
    assert not [name for name in network.list_netns() if name.startswith("mw-extra")]
    assert lab.kubectl("get", "node", "extra", "--ignore-not-found") == ""
    exercise.wait_for_probes()


def test_a_rebooted_node_has_its_disk_and_nothing_else(exercise: Exercise) -> None:
    lab = exercise.lab
    before = {name: lab.pid(f"node2.{name}") for name in ("holder", "node", "proxy", "agent", "wireguard")}
    lab.on_node("node2", "touch", "/run/gone", "/var/lib/meshwire/stays")
    lab.on_node("node2", "mkdir", "/sys/fs/bpf/gone")
    lab.reboot_node("node2")
    assert not {lab.pid(f"node2.{name}") for name in before} & set(before.values())
    lab.on_node("node2", "rm", "/var/lib/meshwire/stays")
    for path in ("/run/gone", "/sys/fs/bpf/gone"):
        assert lab.on_node("node2", "test", "-e", path, check=False).returncode == 1
    exercise.wait_for_probes()
    assert exercise.run("node1", "ask", exercise.probe("node2").addresses[0])["complete"]


def test_pods_go_on_while_the_api_server_is_away(exercise: Exercise) -> None:
    lab = exercise.lab
    assert lab.stop_apiserver()
    try:
        with pytest.raises(LabError, match="kubectl"):
            lab.kubectl("get", "nodes", "--request-timeout=2s")
        target = exercise.probe("node3").addresses[0]
        assert exercise.run("node1", "udp", "--seconds=1", target)["forward"]["lost"] == 0
    finally:
        lab.start_apiserver()
    lab.wait_ready()
    assert all(ready(lab, node) for node in lab.nodes)


def test_a_pod_that_was_marked_not_ready_is_ready_again(exercise: Exercise) -> None:
    """As the node controller marks the pods of a node whose lease was late."""
    name = exercise.probe("node1").name
    marked = '{"status": {"conditions": [{"type": "Ready", "status": "False"}]}}'
    exercise.lab.kubectl("patch", "pod", name, "--subresource=status", "-p", marked)
    exercise.wait_for_probes()


def test_a_node_without_its_kubelet_becomes_not_ready(lab: Lab) -> None:
    processes.stop(lab.paths, "node3.node")
    lab.kubectl("wait", "--for=condition=Ready=Unknown", "node/node3", "--timeout=60s")
    lab.reboot_node("node3")
    assert ready(lab, "node3")


def test_flows_are_counted_and_captured(plain: Exercise, tmp_path: Path) -> None:
    # Not by the Service: after the reboot before this, kube-proxy may still be about to forget UDP flows to
    # the probe that was there.
    with plain.lab.capture(tmp_path / "wire.pcap") as capture, plain.flows(udp_rate=100) as flows:
        subprocess.run(["sleep", "1"], check=True)
    assert flows.lost == 0 and flows.broken == []
    report = capture.report
    assert report and report.is_complete
    # Encryption is off: what a capture must be able to see is there.
    assert report.clear >= flows.packets / 2


def test_flows_count_what_a_cut_wire_loses(exercise: Exercise) -> None:
    lab = exercise.lab
    port = ("ip", "-n", "mw-underlay", "link", "set", "dev", "node2")
    with exercise.flows(udp_rate=100, nodes=["node1", "node2"]) as flows:
        subprocess.run([*port, "down"], check=True)
        subprocess.run(["sleep", "0.5"], check=True)
        subprocess.run([*port, "up"], check=True)
        subprocess.run(["sleep", "1"], check=True)
    assert flows.lost > 0
    assert max(flow.longest_silence_ms for flow in flows.ended) > 400
    lab.wait_ready()


@pytest.fixture
def other_directory(tmp_path: Path, lab: Lab) -> Iterator[Path]:
    yield tmp_path / "other"


def test_a_second_lab_beside_is_refused_and_leaves_the_first_alone(lab: Lab, other_directory: Path) -> None:
    before = network.list_netns()
    with pytest.raises(LabError, match="MESHWIRE_LAB_DIR"):
        Lab(other_directory).up(Settings(nodes=1))
    assert network.list_netns() == before
    assert not other_directory.exists()
    assert all(component.running for component in lab.components())
