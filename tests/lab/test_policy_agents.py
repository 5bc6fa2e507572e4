"""Agents under policy: what runs on while they are restarted, and what they tell of what they drop. On the
probes, and a neighbour that one of them has on its node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pytest
from tests.policy_cases import Object, labels, mesh_policy

from meshwire.lab import traffic
from meshwire.lab.exercise import PROBE, Exercise
from meshwire.lab.lab import Lab, documents

NEIGHBOUR: Final = "neighbour"
NODE: Final = "node1"
"""Where it is."""
OTHER: Final = "node2"
BOTH: Final = {"matchExpressions": [{"key": "app", "operator": "In", "values": [PROBE, NEIGHBOUR]}]}
TRAFFIC: Final = [{"ports": [{"port": str(traffic.PORT), "protocol": kind} for kind in ("TCP", "UDP")]}]


def neighbour() -> Object:
    container = {
        "name": NEIGHBOUR,
        "image": "host",
        "command": ["python", "-m", "meshwire.lab.traffic", "serve"],
        "readinessProbe": {"tcpSocket": {"port": traffic.PORT}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NEIGHBOUR, "namespace": "default", "labels": {"app": NEIGHBOUR}},
        "spec": {"nodeName": NODE, "terminationGracePeriodSeconds": 1, "containers": [container]},
    }


@pytest.fixture(scope="module")
def guarded(exercise: Exercise) -> Iterator[Exercise]:
    """With policy on, and the neighbour."""
    lab = exercise.lab
    try:
        lab.apply(neighbour())
        lab.kubectl("wait", f"pod/{NEIGHBOUR}", "--for=condition=Ready", "--timeout=60s")
        exercise.set_policy(True)
        yield exercise
    finally:
        lab.kubectl("delete", "pod", NEIGHBOUR, "--ignore-not-found", "--timeout=60s")
        exercise.set_policy(False)


@contextmanager
def policies(exercise: Exercise, *objects: Object) -> Iterator[None]:
    """In force while the body runs, which may change them."""
    try:
        exercise.lab.apply(*objects)
        exercise.wait_for_policies()
        yield
    finally:
        exercise.lab.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=documents(objects))
        exercise.wait_for_policies()


def reaches(exercise: Exercise, node: str, target: str) -> bool:
    """By TCP, from the node's probe."""
    return bool(exercise.run(node, "ask", "--seconds=0.7", target)["complete"])


# Restarts


def closed_but_for_traffic(*more: Object) -> tuple[Object, Object]:
    """Default deny both ways for all that talk; `more` rules say the same once again, or nothing of them."""
    peers = {"toPorts": TRAFFIC}
    return (
        mesh_policy("default", "closed", BOTH, ingress=[], egress=[]),
        mesh_policy(
            "default",
            "traffic",
            BOTH,
            ingress=[{"fromEndpoints": [BOTH], **peers}, *more],
            egress=[{"toEndpoints": [BOTH], **peers}],
        ),
    )


def is_enforced(exercise: Exercise) -> bool:
    """Echo requests are none of what is allowed."""
    targets = (exercise.probe(OTHER).addresses[0], exercise.lab.find_pod(NEIGHBOUR).addresses[0])
    return all(exercise.run(NODE, "ping", "--count=2", target)["lost"] == 2 for target in targets)


def take_over(exercise: Exercise, number: int) -> None:
    """Until the agents that run now have carried out a policy that nobody had before."""
    from_nobody = {"fromEndpoints": [labels(app=f"nobody{number}")]}
    exercise.lab.apply(*closed_but_for_traffic(from_nobody))
    exercise.wait_for_policies()


def test_restarted_agents_and_changed_policies_lose_no_packet_of_what_is_allowed(guarded: Exercise) -> None:
    lab = guarded.lab
    near = {NODE: lab.find_pod(NEIGHBOUR).addresses}
    elsewhere = mesh_policy("default", "elsewhere", labels(app="nobody"), ingress=[], egress=[])
    with policies(guarded, *closed_but_for_traffic(), elsewhere):
        assert is_enforced(guarded)
        with guarded.flows(udp_rate=200, services=True, more=near) as flows:
            try:
                for node in lab.nodes:
                    assert lab.stop_agent(node, kill=True)
                assert is_enforced(guarded)
            finally:
                for node in lab.nodes:
                    lab.start_agent(node)
            take_over(guarded, 1)
            for node in lab.nodes:
                lab.restart_agent(node)
            take_over(guarded, 2)
            # Changes that are about others, or that allow the same by other rules.
            lab.apply(
                mesh_policy("default", "elsewhere", labels(app="nobody"), ingress=[{"toPorts": TRAFFIC}])
            )
            lab.apply(mesh_policy("default", "closed", BOTH, ingress=[{"toPorts": TRAFFIC}], egress=[]))
            guarded.wait_for_policies()
            lab.kubectl("delete", "meshpolicy", "elsewhere")
            lab.kubectl("label", "namespace", "default", "colour=blue")
            guarded.wait_for_policies()
            lab.kubectl("label", "namespace", "default", "colour-")
            guarded.wait_for_policies()
        assert is_enforced(guarded)
    print(f"{flows.packets} datagrams, {flows.lost} lost; {len(flows.ended)} flows")
    assert flows.packets > 10_000
    near_by = {flow.target for flow in flows.ended if flow.target in near[NODE]}
    assert len(near_by) == len(near[NODE]), "flows on one node"
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)


# What the command line says


class Monitor:
    """`meshwire monitor` as a person has it; `lines` grow."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "meshwire.cli", "monitor", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(lab),
            # Where these tests run in the background, it is ignored, and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def stop(self) -> int:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(timeout=30)
        self._thread.join()
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(lab: Lab) -> dict[str, str]:
    """Of a shell in which this lab is the cluster."""
    return {
        **os.environ,
        "MESHWIRE_LAB_DIR": str(lab.paths.root),
        "KUBECONFIG": str(lab.kubeconfig),
        "COLUMNS": "300",
    }


def meshwire(lab: Lab, *arguments: str) -> tuple[int, list[str]]:
    """The command's exit code and the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "meshwire.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(lab),
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


LONE: Final = mesh_policy("default", "lone", labels(app=NEIGHBOUR), ingress=[])
WATCHFUL: Final = mesh_policy(
    "default",
    "watchful",
    labels(app=PROBE),
    mode="Audit",
    ingressDeny=[{"fromEndpoints": [labels(app=PROBE)], "toPorts": TRAFFIC}],
)


def event(node: str, verdict: str, source: tuple[str, str], target: tuple[str, str], why: str) -> str:
    """Pattern of a line; ends are (pod, address)."""
    sender = rf"default/{source[0]} {re.escape(endpoint(source[1]))}:\d+"
    flow = rf"{sender} -> default/{target[0]}:{traffic.PORT} TCP"
    return rf"\d\d:\d\d:\d\d\.\d{{3}} {node} {verdict} ingress {flow}: {re.escape(why)}( \(\d+ times\))?"


def endpoint(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def test_monitor_names_pods_policies_and_reasons(guarded: Exercise) -> None:
    lab = guarded.lab
    asking, asked = guarded.probe(NODE), guarded.probe(OTHER)
    alone = lab.find_pod(NEIGHBOUR).addresses
    with policies(guarded, LONE, WATCHFUL):
        monitor, drops = Monitor(lab), Monitor(lab, "--type=drop", f"--node={NODE}", "-o", "json")
        try:
            for own, near, far in zip(asking.addresses, alone, asked.addresses, strict=True):
                wanted = [
                    event(
                        NODE,
                        "DROP",
                        (asking.name, own),
                        (NEIGHBOUR, near),
                        "no rule allows it (isolated by MeshPolicy default/lone)",
                    ),
                    event(
                        OTHER,
                        "AUDIT",
                        (asking.name, own),
                        (asked.name, far),
                        "would be denied by MeshPolicy default/watchful spec.ingressDeny[0]",
                    ),
                ]

                def are_told(near: str = near, far: str = far, wanted: Sequence[str] = wanted) -> bool:
                    assert not reaches(guarded, NODE, near)
                    assert reaches(guarded, NODE, far)
                    return all(any(re.fullmatch(each, line) for line in monitor.lines) for each in wanted)

                guarded.wait_until(are_told, f"the monitor says {wanted}")
            assert monitor.stop() == 0 and drops.stop() == 0
        finally:
            monitor.kill()
            drops.kill()
    print(*monitor.lines, sep="\n")
    objects = [json.loads(line) for line in drops.lines]
    assert {(each["verdict"], each["node"]) for each in objects} == {("DROP", NODE)}
    assert {each["destination"]["address"] for each in objects} == set(alone)


def numbers(lab: Lab) -> Mapping[str, int]:
    """Identities of the pods of `default`, by name, as the API server has them."""
    slices = lab.get("meshendpointslices")["items"]
    found: list[dict[str, Any]] = [each for item in slices for each in item["spec"].get("endpoints", ())]
    return {each["pod"]["name"]: each["identity"] for each in found if each["pod"]["namespace"] == "default"}


def test_endpoints_and_identities_are_listed(guarded: Exercise) -> None:
    lab = guarded.lab
    guarded.wait_for_policies()
    known = numbers(lab)
    code, lines = meshwire(lab, "endpoints", "-n", "default")
    assert code == 0 and lines[0].split() == ["Pod", "Addresses", "Node", "Identity", "Labels"]
    rows = {row[0]: row[1:] for line in lines[1:] if (row := re.split(r"\s{2,}", line.strip()))}
    ends = {guarded.probe(node).name: (node, PROBE) for node in lab.nodes} | {NEIGHBOUR: (NODE, NEIGHBOUR)}
    for name, (node, app) in ends.items():
        addresses = ", ".join(lab.find_pod(name).addresses)
        assert rows[f"default/{name}"][:3] == [addresses, node, str(known[name])], lines
        assert f"app={app}" in rows[f"default/{name}"][3]
    number = known[NEIGHBOUR]
    code, lines = meshwire(lab, "identities", str(number))
    assert code == 0 and lines[0] == f"identity {number}"
    assert {f"  app={NEIGHBOUR}", "  io.kubernetes.pod.namespace=default"} <= set(lines)
    assert lines[-2:] == ["endpoints: 1", f"  default/{NEIGHBOUR}"]
    code, lines = meshwire(lab, "identities")
    counts = {row[0]: row[-1] for line in lines[1:] if (row := line.split())}
    assert code == 0 and counts[str(number)] == "1"
    assert counts[str(known[guarded.probe(NODE).name])] == str(len(lab.nodes))
    assert meshwire(lab, "identities", "1")[1][0].startswith("1 is host")


def test_explain_says_what_the_datapath_does(guarded: Exercise) -> None:
    lab = guarded.lab
    asking, asked = guarded.probe(NODE), guarded.probe(OTHER)
    port = f"--port={traffic.PORT}"
    with policies(guarded, LONE, WATCHFUL):
        known = numbers(lab)
        source = ("policy", "explain", f"--from=default/{asking.name}", port)
        code, lines = meshwire(lab, *source, f"--to=default/{NEIGHBOUR}")
        assert code == 3
        target = lab.find_pod(NEIGHBOUR).addresses[0]
        ends = [
            f"default/{name} (identity {known[name]}) {address}"
            for name, address in ((asking.name, asking.addresses[0]), (NEIGHBOUR, target))
        ]
        assert lines[0] == f"{ends[0]} -> {ends[1]} TCP port {traffic.PORT}: DENIED"
        assert "  no rule allows it; isolated by MeshPolicy default/lone" in lines, lines
        assert not reaches(guarded, NODE, target)
        code, lines = meshwire(lab, *source, f"--to=default/{asked.name}", "-o", "json")
        found = json.loads("\n".join(lines))
        assert code == 0 and found["allowed"] and found["ingress"]["reason"] == "NotIsolated"
        rule = found["ingress"]["audit"]["rule"]
        assert (rule["kind"], rule["namespace"], rule["name"], rule["path"]) == (
            "MeshPolicy",
            "default",
            "watchful",
            "spec.ingressDeny[0]",
        )
        assert reaches(guarded, NODE, asked.addresses[0])
