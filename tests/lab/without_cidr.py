"""Goes through the life of a cluster whose nodes have no pod CIDR, and prints what it found: see
test_without_cidr. Run in namespaces of its own, with a directory to work in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from meshwire.api import names
from meshwire.lab import cni, reach
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise, Flows
from meshwire.lab.lab import Lab
from meshwire.lab.model import PODS, Settings
from meshwire.lab.traffic import PORT

SERVED = 80


def pod(name: str, node: str, *command: str, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [{"name": "it", "image": "host", "command": ["python", *command]}],
        },
    }


def server(name: str, node: str, **labels: str) -> dict[str, Any]:
    return pod(name, node, "-m", "meshwire.lab.reach", "serve", f"--tcp={SERVED}", **labels)


def eager(name: str, node: str, targets: Iterable[str]) -> dict[str, Any]:
    """Talks with its first breath, and never stops."""
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
    return pod(name, node, "-c", script, *targets)


class Story:
    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.exercise = Exercise(lab)
        self.found: dict[str, Any] = {}

    def tell(self) -> None:
        self.exercise.deploy()
        self.found["cidrs"] = [node["spec"].get("podCIDRs") for node in self.lab.get("nodes")["items"]]
        self.cluster_cidrs()
        self.off_and_on()
        with self.wire("wire"), self.exercise.flows() as flows:
            self.new_pods()
            self.without_agents()
            self.used_again()
        self.found["meanwhile"] = result(flows)
        self.found["leaked"] = self.exercise.mesh_status()["leaked"]
        self.policy()
        self.boot()

    # Parts

    def cluster_cidrs(self) -> None:
        """Nobody tells them at first."""
        self.lab.kubectl("delete", "configmap", "kubeadm-config", "-n", "kube-system")
        self.lab.stop_operator()
        self.lab.start_operator()
        self.exercise.set_encryption(True, wait=False)
        self.exercise.wait_until(
            lambda: (
                all(each.get("reason") == "ClusterCIDRMissing" for each in self.ready_of_nodes())
                and self.mesh_condition("StrictScope").get("reason") == "ClusterCIDRMissing"
                and self.exercise.mesh_status()["phase"] == "Enforcing"
                and self.mesh_condition("Ready").get("reason") != "Enabling"
            ),
            "everybody says that a cluster CIDR is missing",
        )
        status = [sys.executable, "-m", "meshwire.cli", "status", f"--kubeconfig={self.lab.kubeconfig}"]
        self.found["missing"] = self.strictness() | {
            "reasons": [each["reason"] for each in self.ready_of_nodes()],
            "shown": subprocess.run(status, capture_output=True, text=True).stdout,
        }
        config = self.lab.get("meshconfig", names.CONFIG_NAME)
        cidrs = [str(PODS[family]) for family in self.lab.state.settings.families]
        self.lab.apply(
            {
                "apiVersion": names.API_VERSION,
                "kind": "MeshConfig",
                "metadata": {"name": names.CONFIG_NAME},
                "spec": config["spec"] | {"network": {"clusterCIDRs": cidrs}},
            }
        )
        self.exercise.wait_for_phase("Enforcing")
        self.exercise.wait_until(
            lambda: (
                self.mesh_condition("StrictScope")["status"] == "True"
                and self.mesh_condition("Ready")["status"] == "True"
            ),
            "all is well",
        )
        self.found["given"] = self.strictness()

    def off_and_on(self) -> None:
        with self.exercise.flows(udp_rate=500, services=True) as flows:
            self.exercise.set_encryption(False)
            self.exercise.wait_until(lambda: self.count(names.MESHENDPOINTSLICES) == 0, "slices are gone")
            self.found["published"] = {"off": self.count(names.MESHENDPOINTSLICES)}
            with self.wire("wire, off"):
                time.sleep(0.5)
            self.exercise.set_encryption(True)
            self.found["published"]["on"] = self.count(names.MESHENDPOINTSLICES)
            time.sleep(1)
        self.found["off and on"] = result(flows) | {"packets": flows.packets}

    def new_pods(self) -> None:
        targets = self.exercise.probe("node2").addresses
        self.lab.apply(
            eager("eager", "node1", targets), eager("eager2", "node3", targets), server("new", "node2")
        )
        self.lab.kubectl("wait", "pod/new", "--for=condition=Ready", "--timeout=60s")
        addresses = self.lab.find_pod("new").addresses
        self.found["new"] = {
            node: self.until_answered(node, addresses, "new") == "new" for node in ("node1", "node3")
        }
        self.lab.kubectl("delete", "pod", "new", "eager2")

    def without_agents(self) -> None:
        for node in self.lab.nodes:
            self.lab.stop_agent(node, kill=True)
        try:
            self.found["without agents"] = [
                answered for node, targets in self.exercise.pairs() for answered in self.ask(node, targets)
            ]
        finally:
            for node in self.lab.nodes:
                self.lab.start_agent(node)
        self.exercise.wait_for_phase("Enforcing")

    def used_again(self) -> None:
        """A pod goes, and the next one elsewhere is given its address."""
        self.lab.apply(server("first", "node2"))
        self.lab.kubectl("wait", "pod/first", "--for=condition=Ready", "--timeout=60s")
        first = self.lab.find_pod("first").addresses
        self.until_answered("node1", first, "first")
        self.lab.kubectl("delete", "pod", "first")
        pool = cni.ClusterPool(self.lab.paths.pool, self.lab.state.settings.families)
        # Every pool gives an address again some day; this one would take a while.
        content = json.loads(pool.path.read_text())
        number = int(ip_address(first[0])) - int(pool.networks[0][0])
        pool.path.write_text(json.dumps(content | {"last": number - 1}))
        self.lab.apply(server("second", "node3"))
        self.lab.kubectl("wait", "pod/second", "--for=condition=Ready", "--timeout=60s")
        second = self.lab.find_pod("second").addresses
        self.found["again"] = {
            "addresses": [list(first), list(second)],
            "nodes": ["node2", self.lab.get("pod", "second")["spec"]["nodeName"]],
            "answers": {node: self.until_answered(node, second, "second") for node in ("node1", "node2")},
        }
        self.lab.kubectl("delete", "pod", "second", "eager")

    def policy(self) -> None:
        lab = self.lab
        self.exercise.set_policy(True)
        who = {
            "friend": ("node2", "friend"),
            "near-friend": ("node1", "friend"),
            "stranger": ("node3", "stranger"),
            "near-stranger": ("node1", "stranger"),
            "open": ("node1", "open"),
        }
        lab.apply(
            server("guarded", "node1", role="server"),
            *(server(name, node, role=role) for name, (node, role) in who.items()),
            {
                "apiVersion": names.API_VERSION,
                "kind": "MeshPolicy",
                "metadata": {"name": "guarded", "namespace": "default"},
                "spec": {
                    "endpointSelector": {"matchLabels": {"role": "server"}},
                    "ingress": [{"fromEndpoints": [{"matchLabels": {"role": "friend"}}]}],
                },
            },
        )
        lab.kubectl("wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s")
        self.exercise.wait_for_policies()
        guarded = lab.find_pod("guarded").addresses
        self.exercise.wait_until(
            lambda: all(self.reaches("friend", guarded) + self.reaches("near-friend", guarded)),
            "friends are let through",
        )
        self.found["policy"] = {name: self.reaches(name, guarded) for name in who if name != "open"}

        opened = lab.find_pod("open").addresses
        lab.stop_agent("node1", kill=True)
        try:
            lab.apply(server("late", "node1", role="late"))
            lab.kubectl("wait", "pod/late", "--for=condition=Ready", "--timeout=60s")
            self.found["late"] = {"without agent": self.reaches("late", opened)}
        finally:
            lab.start_agent("node1")
        self.exercise.wait_until(lambda: all(self.reaches("late", opened)), "the late pod is let through")
        self.found["late"]["with agent"] = self.reaches("late", opened)

        self.exercise.set_policy(False)
        self.exercise.wait_until(lambda: self.count(names.MESHPOLICYREPORTS) == 0, "reports are gone")
        self.found["policy off"] = {
            "slices": self.count(names.MESHENDPOINTSLICES),
            "reports": self.count(names.MESHPOLICYREPORTS),
            "reached": all(self.ask("node1", self.exercise.probe("node2").addresses)),
        }
        lab.kubectl("delete", "pod", "guarded", "late", *who)
        lab.kubectl("delete", "meshpolicy", "guarded")

    def boot(self) -> None:
        """Nobody knows which addresses the node's pods are going to have."""
        lab, node = self.lab, "node3"
        self.exercise.set_encryption(True, bootGuard="Systemd")
        self.exercise.wait_until(
            lambda: condition(self.exercise.mesh_node(node), "BootGuard").get("status") == "True",
            "the boot guard is kept",
        )
        lab.apply(eager("eager3", node, self.exercise.probe("node1").addresses))
        lab.kubectl("wait", "pod/eager3", "--for=condition=Ready", "--timeout=60s")
        table = ("nft", "list", "table", "inet", "meshwire_boot")
        with self.wire("wire, boot"):
            lab.reboot_node(node, wait=False, agent=False)
            self.exercise.wait_until(
                lambda: bool(list(lab.paths.pods(node).glob("*eager3*"))), "it has booted"
            )
            time.sleep(3)
            shown = lab.on_node(node, *table).stdout
            lab.start_agent(node)
            self.exercise.wait_until(
                lambda: lab.on_node(node, *table, check=False).returncode != 0, "the guard is off"
            )
            self.exercise.wait_for_probes()
            self.exercise.wait_until(
                lambda: all(
                    self.ask(node, self.exercise.probe("node1").addresses)
                    + self.ask("node1", self.exercise.probe(node).addresses)
                ),
                "it is back",
            )
        self.found["boot"] = [int(count) for count in re.findall(r"counter packets (\d+)", shown)]
        lab.kubectl("delete", "pod", "eager3")

    # How

    def wire(self, name: str) -> Wire:
        return Wire(self, name)

    def ask(self, node: str, targets: Iterable[str]) -> list[bool]:
        return [bool(self.exercise.run(node, "ask", target)["complete"]) for target in targets]

    def probe(self, name: str, addresses: Iterable[str]) -> list[dict[str, Any]]:
        targets = [reach.format_target("tcp", address, SERVED) for address in addresses]
        done = self.lab.exec(name, "python", "-m", "meshwire.lab.reach", "probe", *targets)
        return list(json.loads(done.stdout).values())

    def reaches(self, name: str, addresses: Iterable[str]) -> list[bool]:
        return [each["reached"] for each in self.probe(name, addresses)]

    def until_answered(self, node: str, addresses: Iterable[str], by: str) -> str:
        """By whom, from the node's probe, once that is who it should be."""
        name, addresses = self.exercise.probe(node).name, tuple(addresses)
        answers: list[str] = []

        def is_answered() -> bool:
            answers[:] = [str(each["by"]) for each in self.probe(name, addresses)]
            return set(answers) == {by}

        self.exercise.wait_until(is_answered, f"{by} answers {node}")
        return answers[0]

    def count(self, resource: str) -> int:
        return len(self.lab.get(resource)["items"])

    def mesh_condition(self, kind: str) -> dict[str, Any]:
        return condition(self.lab.get("meshstatus", names.STATUS_NAME), kind)

    def ready_of_nodes(self) -> list[dict[str, Any]]:
        return [condition(self.exercise.mesh_node(node), "Ready") for node in self.lab.nodes]

    def strictness(self) -> dict[str, Any]:
        nodes = [self.exercise.mesh_node(node) for node in self.lab.nodes]
        return {
            "scope": self.mesh_condition("StrictScope"),
            "ready": self.mesh_condition("Ready"),
            "strict": [node["status"].get("strict", False) for node in nodes],
        }


class Wire:
    """Records the underlay while the body runs."""

    def __init__(self, story: Story, name: str) -> None:
        self._story = story
        self._name = name
        self._capture = Capture(story.directory / f"{name}.pcap")

    def __enter__(self) -> None:
        self._capture.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)
        report = self._capture.report
        assert report
        self._story.found[self._name] = {
            "complete": report.is_complete,
            "clear": report.clear,
            "data": report.wireguard_by_type.get(4, 0),
            "examples": report.examples,
        }


def condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    found = item.get("status", {}).get("conditions", ())
    return next((each for each in found if each["type"] == kind), {})


def result(flows: Flows) -> dict[str, Any]:
    return {"lost": flows.lost, "broken": flows.broken}


def main(directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    lab = Lab(directory / "lab")
    try:
        lab.up(Settings(nodes=3, node_cidr=False))
        story = Story(lab, directory)
        story.tell()
    finally:
        lab.down()
    print(json.dumps(story.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
