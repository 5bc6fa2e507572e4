"""The table of tests/policy_cases with real packets: nine pods on three nodes, in both families, directly
and by Services; then what a table can't say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Final, NamedTuple

import pytest
from tests.policy_cases import (
    CASES,
    DENY_INGRESS,
    ICMP,
    NAMESPACES,
    NODES,
    OUTSIDE,
    PORTS,
    TOWN,
    WORLD,
    Case,
    End,
    Expectation,
    Flow,
    Labels,
    Object,
    Step,
    container_ports,
    differences,
    everything,
    flows,
    key,
    mesh_policy,
    namespace_labels,
    network_policy,
    resolve,
    service,
)

from meshwire.kube.client import ApiError, Client, Cluster
from meshwire.lab import network, processes, reach, traffic
from meshwire.lab.exercise import PROBE, Exercise
from meshwire.lab.lab import Lab, documents
from meshwire.lab.model import (
    BRIDGE,
    PATIENCE,
    UNDERLAY_NETNS,
    UPLINK,
    LabError,
    underlay_address,
)
from meshwire.lab.pods import is_ready

WORLD_NETNS: Final = "mw-world"
WORLD_NUMBER: Final = 200
TIMEOUT: Final = 0.7
ATTEMPTS: Final = 2
SERVICE_PORT: Final = PORTS[0]
"""Services are asked on one port: what they add to a pod's address is that somebody translates."""
SETTLE: Final = 10.0
"""Seconds in which nodes have to hear of changed labels. Nobody reports that; of policies they do."""


EVERY: Final = int(os.environ.get("MESHWIRE_CASES", "3"))
"""Every how many of the cases; all of them (1) take eight minutes. The evaluator is checked against all of
them, and the compiler and the programs against the evaluator, without a lab."""


class Attempt(NamedTuple):
    flow: Flow
    by_service: bool


class Lines:
    """What a process prints, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[Any] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self._thread.join()
        self.process.communicate()


class Town:
    """The pods, Services and outsiders of tests/policy_cases in the lab; with `ends`, only those pods, and
    no outsiders."""

    def __init__(self, exercise: Exercise, ends: Sequence[End] = TOWN) -> None:
        self.exercise = exercise
        self.lab: Lab = exercise.lab
        self.ends = ends
        self.namespaces = tuple(dict.fromkeys(end.ns for end in ends))
        self.families: Sequence[str] = self.lab.state.settings.families
        self.transports = ("TCP", "UDP", "SCTP") if has_sctp() else ("TCP", "UDP")
        self._world: Lines | None = None

    # What there is

    @cached_property
    def addresses(self) -> Mapping[str, Mapping[str, str]]:
        """By end and family; those of pods as they are now: nothing here restarts."""
        found = {}
        for end in self.ends:
            found[end.name] = by_family(self.lab.find_pod(end.pod, end.ns).addresses)
        for node in self.lab.state.nodes:
            found[node.name] = by_family(map(str, node.addresses(self.families)))
        found[WORLD.name] = {family: str(underlay_address(family, WORLD_NUMBER)) for family in self.families}
        return found

    @cached_property
    def services(self) -> Mapping[str, Mapping[str, str]]:
        """ClusterIPs by pod and family."""
        return {
            end.name: by_family(self.lab.get("service", end.pod, "-n", end.ns)["spec"]["clusterIPs"])
            for end in self.ends
        }

    @property
    def _has_outsiders(self) -> bool:
        return len(self.ends) == len(TOWN)

    @property
    def _outside_nodes(self) -> Sequence[str]:
        return self.lab.nodes if self._has_outsiders else ()

    def build(self) -> None:
        assert set(self.lab.nodes) == {end.node for end in self.ends}
        if self._has_outsiders:
            self._make_world()
        for ns in self.namespaces:
            own = {name: value for name, value in namespace_labels(ns).items() if "/" not in name}
            self.lab.apply(
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ns, "labels": own}}
            )
        self._wait_for_accounts()
        self.lab.apply(
            *(self._pod(end.pod, end.ns, end.node, {"pod": end.pod}) for end in self.ends),
            *(self._pod(node, "default", node, {}, hostNetwork=True) for node in self._outside_nodes),
            *(service(end, self.transports, self.families) for end in self.ends),
        )
        self._wait_for_pods()
        self.exercise.wait_for_policies()
        # Services last: kube-proxy has to have heard of all of it.
        self.exercise.wait_until(
            lambda: (
                not self.compare(everything, self.attempts(outside=self._has_outsiders, by_service=True))
            ),
            "everybody reaches everybody",
            seconds=60,
        )

    def tear_down(self) -> None:
        self.lab.kubectl("delete", "namespace", *self.namespaces, "--ignore-not-found", "--timeout=120s")
        if not self._has_outsiders:
            return
        self.lab.kubectl("delete", "pod", *self.lab.nodes, "--ignore-not-found", "--timeout=60s")
        if self._world:
            self._world.close()
        network.unplug(WORLD.name)
        network.delete_netns(WORLD_NETNS)

    def _serve(self) -> list[str]:
        ports = ",".join(map(str, PORTS))
        return [
            "-m",
            "meshwire.lab.reach",
            "serve",
            *(f"--{kind.lower()}={ports}" for kind in self.transports),
        ]

    def _pod(self, name: str, ns: str, node: str, labels: Mapping[str, str], **spec: Any) -> Object:
        container = {
            "name": "serve",
            "image": "host",
            "command": ["python", *self._serve()],
            "readinessProbe": {"tcpSocket": {"port": PORTS[0]}},
            "ports": container_ports(self.transports),
        }
        if spec.get("hostNetwork"):
            del container["ports"]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": ns, "labels": dict(labels)},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "containers": [container],
                **spec,
            },
        }

    def _wait_for_accounts(self) -> None:
        """Without its namespace's account no pod is admitted."""

        def are_there() -> bool:
            found = self.lab.get("serviceaccounts", "-A")["items"]
            return set(self.namespaces) <= {
                item["metadata"]["namespace"] for item in found if item["metadata"]["name"] == "default"
            }

        self.exercise.wait_until(are_there, "namespaces have their service accounts")

    def _wait_for_pods(self) -> None:
        wanted = {(end.ns, end.pod) for end in self.ends}
        wanted |= {("default", node) for node in self._outside_nodes}

        async def ready(client: Client) -> set[tuple[str, str]]:
            pods = (await client.get("/api/v1/pods"))["items"]
            return {(pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in pods if is_ready(pod)}

        self.exercise.wait_until(lambda: wanted <= self.lab.call(ready), "all pods are ready", seconds=90)

    def _make_world(self) -> None:
        """A machine on the wire that is none of the cluster's; it knows the way to the pods."""
        network.add_netns(WORLD_NETNS)
        network.ip(
            f"link add name {WORLD.name} type veth peer name {UPLINK} netns {WORLD_NETNS}",
            f"link set dev {WORLD.name} master {BRIDGE} up",
            netns=UNDERLAY_NETNS,
        )
        prefixes = {"v4": "24", "v6": "64 nodad"}
        routes = [
            f"route add {cidr} via {address}"
            for node in self.lab.state.nodes
            for cidr in self.lab.get("node", node.name)["spec"]["podCIDRs"]
            for address in node.addresses(self.families)
            if ("." in cidr) is (address.version == 4)
        ]
        network.ip(
            "link set lo up",
            f"link set {UPLINK} up",
            *(
                f"address add {underlay_address(family, WORLD_NUMBER)}/{prefixes[family]} dev {UPLINK}"
                for family in self.families
            ),
            *routes,
            netns=WORLD_NETNS,
        )
        command = [*processes.in_namespaces(WORLD_NETNS), sys.executable, *self._serve()]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.lab.environment()
        )
        assert process.stdout and process.stdout.readline() == "ready\n"
        self._world = Lines(process)

    # Who reaches whom

    def attempts(self, *, outside: bool, by_service: bool) -> list[Attempt]:
        here = {*self.ends, *(OUTSIDE if outside else ())}
        found = [
            Attempt(flow, False)
            for flow in flows(outside=outside, transports=self.transports)
            if flow.family in self.families and {flow.src, flow.dst} <= here
        ]
        if by_service:
            found += [
                Attempt(flow, True)
                for flow, _ in found
                if flow.src.is_pod and flow.dst.is_pod and flow.port == SERVICE_PORT
            ]
        return found

    def run(self, attempts: Iterable[Attempt]) -> dict[Attempt, str]:
        """What becomes of each, all at once: "" or an error."""
        targets: dict[str, dict[str, Attempt]] = {}
        for attempt in attempts:
            flow = attempt.flow
            known = self.services if attempt.by_service else self.addresses
            text = reach.format_target(flow.protocol, known[flow.dst.name][flow.family], flow.port)
            targets.setdefault(flow.src.name, {})[text] = attempt
        running = {source: self._start_probe(source, list(texts)) for source, texts in targets.items()}
        results: dict[Attempt, str] = {}
        for source, process in running.items():
            output, errors = process.communicate(timeout=60 * PATIENCE)
            try:
                answers = json.loads(output)
            except json.JSONDecodeError:
                raise LabError(f"the probe in {source} failed: {errors}") from None
            for text, answer in answers.items():
                attempt = targets[source][text]
                results[attempt] = outcome(attempt.flow, answer)
        return results

    def compare(self, expect: Expectation, attempts: Sequence[Attempt]) -> list[tuple[Flow, bool, str]]:
        """What is not as expected. What should pass and doesn't gets a second chance, as this machine may be
        busy; what passes and should not gets none."""
        results = self.run(attempts)
        if missing := [attempt for attempt in attempts if results[attempt] and expect(attempt.flow)]:
            results |= self.run(missing)
        return [
            (*attempt, results[attempt] or "passes")
            for attempt in attempts
            if results[attempt] != ("" if expect(attempt.flow) else "timeout")
        ]

    def _start_probe(self, source: str, targets: Sequence[str]) -> subprocess.Popen[str]:
        options = (f"--timeout={TIMEOUT * PATIENCE}", f"--attempts={ATTEMPTS}")
        command = ("-m", "meshwire.lab.reach", "probe", *options, *targets)
        if source == WORLD.name:
            return subprocess.Popen(
                [*processes.in_namespaces(WORLD_NETNS), sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=self.lab.environment(),
            )
        ns, slash, pod = source.rpartition("/")
        return self.lab.popen(pod, "python", *command, namespace=ns if slash else "default")

    # Changes

    def apply(self, *objects: Object) -> None:
        self.lab.apply(*resolve(objects, self.addresses))
        self.exercise.wait_for_policies()

    def delete(self, *objects: Object) -> None:
        """Those that are there."""
        if objects:
            text = documents(resolve(objects, self.addresses))
            self.lab.kubectl("delete", "-f", "-", "--ignore-not-found", stdin=text)
        self.exercise.wait_for_policies()

    @contextmanager
    def policies(self, *objects: Object) -> Iterator[None]:
        """In force while the body runs."""
        try:
            self.apply(*objects)
            yield
        finally:
            self.delete(*objects)

    def change(self, step: Step) -> None:
        if step.apply:
            self.lab.apply(*resolve(step.apply, self.addresses))
        self._label(step.namespaces, step.pods)
        self.delete(*step.delete)

    def undo(self, steps: Sequence[Step]) -> None:
        """Cases set labels of their own only, never those that the town has from the start."""
        for step in steps:
            self._label(
                {name: dict.fromkeys(pairs) for name, pairs in step.namespaces.items()},
                {name: dict.fromkeys(pairs) for name, pairs in step.pods.items()},
            )
        self.delete(*{key(item): item for step in steps for item in step.apply}.values())

    def _label(self, namespaces: Labels, pods: Labels) -> None:
        for name, pairs in namespaces.items():
            self.lab.kubectl("label", "--overwrite", "namespace", name, *label_arguments(pairs))
        for name, pairs in pods.items():
            ns, _, pod = name.partition("/")
            self.lab.kubectl("label", "--overwrite", "pod", pod, "-n", ns, *label_arguments(pairs))


def label_arguments(pairs: Mapping[str, str | None]) -> list[str]:
    return [f"{name}-" if value is None else f"{name}={value}" for name, value in pairs.items()]


def by_family(addresses: Iterable[str]) -> dict[str, str]:
    return {"v6" if ":" in address else "v4": address for address in addresses}


def outcome(flow: Flow, answer: Mapping[str, Any]) -> str:
    if not answer["reached"]:
        return str(answer["error"])
    if flow.protocol != ICMP and flow.dst != WORLD and answer["by"] != flow.dst.pod:
        return f"answered by {answer['by']}"
    return ""


def has_sctp() -> bool:
    try:
        reach.listen("sctp", 0).close()
    except OSError:
        return False
    return True


def left_behind(lab: Lab, node: str) -> str:
    """Filters and pins of policy on a node."""
    script = (
        "for device in /sys/class/net/*; do for side in ingress egress; do"
        " tc filter show dev ${device##*/} $side 2>/dev/null | grep mwp_; done; done;"
        " find /sys/fs/bpf/meshwire-policy -type f 2>/dev/null"
    )
    return lab.on_node(node, "sh", "-c", script, check=False).stdout


@pytest.fixture(scope="module")
def town(exercise: Exercise) -> Iterator[Town]:
    town = Town(exercise)
    with ExitStack() as ends:
        ends.callback(exercise.set_policy, False)
        ends.callback(town.tear_down)
        exercise.set_policy(True)
        town.build()
        yield town
    exercise.wait_until(
        lambda: not any(left_behind(exercise.lab, node) for node in exercise.lab.nodes),
        "no filter and no pin of policy is left",
    )


@pytest.mark.parametrize("case", CASES[::EVERY], ids=lambda case: case.slug)
def test_a_case_holds_for_packets(town: Town, case: Case) -> None:
    attempts = town.attempts(outside=case.outside, by_service=case.by_service)
    try:
        for number, step in enumerate(case.steps):
            town.change(step)
            wrong = town.compare(step.expect, attempts)
            deadline = time.monotonic() + SETTLE
            while wrong and (step.namespaces or step.pods) and time.monotonic() < deadline:
                wrong = town.compare(step.expect, attempts)
            assert not wrong, f"step {number}: {len(wrong)} flows:\n{differences(wrong)}"
    finally:
        town.undo(case.steps)


def test_without_policies_everybody_is_reached_again(town: Town) -> None:
    attempts = town.attempts(outside=True, by_service=True)
    shut = [network_policy(ns, "shut", ingress=[], egress=[]) for ns in NAMESPACES]
    with town.policies(*shut):
        assert not town.compare(lambda flow: flow.on_own_node, attempts)
    wrong = town.compare(everything, attempts)
    assert not wrong, differences(wrong)


STREAM: Final = """
import json, socket, sys, threading, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(b"ECHO\\n")
def send():
    while True:
        sock.sendall(bytes(200))
        time.sleep(0.005)
threading.Thread(target=send, daemon=True).start()
total = 0
while data := sock.recv(65536):
    total += len(data)
    print(json.dumps([time.monotonic(), total]), flush=True)
"""
"""Prints when (CLOCK_MONOTONIC) how many bytes had come back."""


@pytest.fixture
def echo(town: Town) -> Iterator[tuple[str, ...]]:
    """Addresses that lead to the probe on node2: its own, and those of a Service that has no other pod."""
    exercise, lab = town.exercise, town.lab
    probe = exercise.probe("node2")
    label = {"echo": "yes"}
    only = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "echo", "namespace": "default"},
        "spec": {
            "selector": label,
            "ports": [{"port": traffic.PORT}],
            "ipFamilyPolicy": "RequireDualStack" if len(town.families) > 1 else "SingleStack",
        },
    }
    try:
        lab.apply(only)
        lab.kubectl("label", "pod", probe.name, *label_arguments(label))
        addresses = (*probe.addresses, *lab.get("service", "echo")["spec"]["clusterIPs"])
        exercise.wait_until(
            lambda: all(exercise.run("node1", "ask", address)["complete"] for address in addresses),
            "the probe is reached by its Service",
        )
        exercise.wait_for_policies()
        yield addresses
    finally:
        lab.kubectl("delete", "service", "echo", "--ignore-not-found")
        lab.kubectl("label", "pod", probe.name, "echo-")


@pytest.mark.parametrize("side", ["Ingress", "Egress"])
def test_an_open_connection_that_a_new_policy_forbids_stops(
    town: Town, echo: tuple[str, ...], side: str
) -> None:
    exercise, lab = town.exercise, town.lab
    forbids = network_policy("default", "cut", {"matchLabels": {"app": PROBE}}, types=[side])
    client = exercise.probe("node1").name
    with ExitStack() as ends:
        streams = []
        for address in echo:
            process = lab.popen(client, "python", "-c", STREAM, address, str(traffic.PORT))
            streams.append(Lines(process))
            ends.callback(streams[-1].close)
        exercise.wait_until(lambda: all(len(stream.lines) > 10 for stream in streams), "bytes come back")
        with town.policies(forbids):
            in_force = time.monotonic()
            time.sleep(3)
            late = [stream.lines[-1][0] - in_force for stream in streams]
            assert max(late) < 1, late
        gone = time.monotonic()
        # As TCP tries again: the longer it was silent, the more slowly.
        exercise.wait_until(
            lambda: all(stream.lines[-1][0] > gone for stream in streams), "bytes come back again"
        )


def test_an_external_address_of_a_service_is_no_way_round_a_policy(
    town: Town, echo: tuple[str, ...]
) -> None:
    """kube-proxy masquerades what it leads on from there: where it leaves the node, its pod is unknown.
    So such an address is judged as what it is, part of the world."""
    exercise, lab = town.exercise, town.lab
    external = ["203.0.113.77", "2001:db8:77::77"][: len(town.families)]
    lab.kubectl("patch", "service", "echo", "-p", json.dumps({"spec": {"externalIPs": external}}))

    def is_answered(address: str) -> bool:
        return bool(exercise.run("node1", "ask", address)["complete"])

    client = {"matchLabels": {"app": PROBE}}
    exercise.wait_until(lambda: all(map(is_answered, external)), "the external addresses lead to the probe")
    with town.policies(network_policy("default", "shut", client, egress=[])):
        assert not any(is_answered(address) for address in (*external, *echo))
    world = mesh_policy("default", "world", client, egress=[{"toEntities": ["world"]}])
    with town.policies(world):
        assert all(is_answered(address) for address in external)
        assert not any(is_answered(address) for address in echo)


@contextmanager
def events(lab: Lab, node: str) -> Iterator[list[Any]]:
    """What the node's agent tells of its policies while the body runs."""
    command = lab.node_command(node, [sys.executable, "-m", "meshwire.agent", "events"])
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**lab.environment(), "NODE_NAME": node},
    )
    lines = Lines(process)
    try:
        yield lines.lines
    finally:
        lines.close()


def test_what_an_audited_policy_would_deny_passes_and_is_told_and_counted(town: Town) -> None:
    audited = mesh_policy("x", "audited", {"matchLabels": {"pod": "a"}}, ingress=[], mode="Audit")
    attempt = Attempt(Flow(TOWN[4], TOWN[0], "TCP", 80, "v4"), False)

    def is_told(found: Sequence[Any]) -> bool:
        assert town.run([attempt]) == {attempt: ""}
        return any(
            event["verdict"] == "AUDIT"
            and event["source"]["pod"] == attempt.flow.src.name
            and event["destination"]["pod"] == attempt.flow.dst.name
            and "MeshPolicy x/audited" in event["isolatedBy"]
            for event in found
            if "verdict" in event
        )

    with town.policies(audited):
        with events(town.lab, attempt.flow.dst.node) as found:
            town.exercise.wait_until(lambda: is_told(found), "the event is told")
        town.exercise.wait_until(
            lambda: (
                town.lab.get("meshpolicy", "audited", "-n", "x").get("status", {}).get("wouldDeny", 0) > 0
            ),
            "it is counted",
            seconds=60,
        )


def test_a_drop_is_told_with_the_policy_behind_it(town: Town) -> None:
    attempt = Attempt(Flow(TOWN[4], TOWN[0], "UDP", 81, "v6"), False)

    def is_told(found: Sequence[Any]) -> bool:
        assert town.run([attempt]) == {attempt: "timeout"}
        return any(
            (event["verdict"], event["reason"]) == ("DROP", "DROP_POLICY_INGRESS")
            and event["destination"]["pod"] == attempt.flow.dst.name
            and "NetworkPolicy x/deny-ingress" in event["isolatedBy"]
            for event in found
            if "verdict" in event
        )

    with town.policies(DENY_INGRESS), events(town.lab, attempt.flow.dst.node) as found:
        town.exercise.wait_until(lambda: is_told(found), "the event is told")


COLLECT: Final = """
import json, socket, sys
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
sock.bind(("::", int(sys.argv[1])))
print(json.dumps("ready"), flush=True)
while True:
    print(json.dumps(sock.recv(2048).decode()), flush=True)
"""
SEND: Final = """
import socket, struct, sys
source, target, port, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
family = socket.AF_INET6 if ":" in target else socket.AF_INET
src, dst = (socket.inet_pton(family, address) for address in (source, target))
length = 8 + len(text)
datagram = struct.pack(">HHHH", 5555, port, length, 0) + text
data = src + dst + struct.pack(">II", length, 17) + datagram
data += bytes(len(data) % 2)
total = sum(struct.unpack(f">{len(data) // 2}H", data))
while total >> 16:
    total = (total & 0xFFFF) + (total >> 16)
datagram = datagram[:6] + struct.pack(">H", ~total & 0xFFFF) + text
if family == socket.AF_INET:
    # The kernel fills in the header's checksum.
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + src + dst
else:
    header = struct.pack(">IHBB", 6 << 28, length, 17, 64) + src + dst
with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
    sock.sendto(header + datagram, (target, 0))
"""
"""A datagram from any address, by a raw socket: SOURCE TARGET PORT TEXT."""


def test_a_pod_sends_only_as_itself(town: Town) -> None:
    """Also to a pod that lets in only whom it pretends to be."""
    liar, victim, target = TOWN[0], TOWN[1], TOWN[4]
    assert liar.node == victim.node != target.node
    lets_in = mesh_policy(
        target.ns,
        "narrow",
        {"matchLabels": {"pod": target.pod}},
        ingress=[
            {
                "fromEndpoints": [
                    {"matchLabels": {"k8s:io.kubernetes.pod.namespace": end.ns, "pod": end.pod}}
                    for end in (liar, victim)
                ]
            }
        ],
    )
    port = "7777"
    receiver = town.lab.popen(target.pod, "python", "-c", COLLECT, port, namespace=target.ns)
    collected = Lines(receiver)

    def send(source: str, family: str, text: str) -> None:
        goal = town.addresses[target.name][family]
        town.lab.exec(liar.pod, "python", "-c", SEND, source, goal, port, text, namespace=liar.ns)

    try:
        town.exercise.wait_until(lambda: collected.lines[:1] == ["ready"], "the receiver listens")
        with town.policies(lets_in), events(town.lab, liar.node) as told:
            for family in town.families:
                for _ in range(3):
                    send(town.addresses[victim.name][family], family, f"lie {family}")
                send(town.addresses[liar.name][family], family, f"truth {family}")
            truths = {f"truth {family}" for family in town.families}
            town.exercise.wait_until(lambda: truths <= set(collected.lines), "what is true arrives")

            def is_told() -> bool:
                send(town.addresses[victim.name]["v6"], "v6", "lie v6")
                return any(event.get("reason") == "DROP_SPOOFED_SOURCE" for event in told)

            if "v6" in town.families:
                town.exercise.wait_until(is_told, "the drop is told")
        assert not [line for line in collected.lines if line.startswith("lie")], collected.lines
    finally:
        collected.close()


def test_killed_agents_leave_policies_in_force(town: Town) -> None:
    lab = town.lab
    attempts = town.attempts(outside=True, by_service=True)

    def expect(flow: Flow) -> bool:
        return flow.dst.ns != "x" or flow.on_own_node

    with town.policies(DENY_INGRESS):
        try:
            for node in lab.nodes:
                assert lab.stop_agent(node, kill=True)
            wrong = town.compare(expect, attempts)
            assert not wrong, differences(wrong)
        finally:
            for node in lab.nodes:
                lab.start_agent(node)
        # Before, while and after they take over.
        for _ in range(3):
            wrong = town.compare(expect, attempts)
            assert not wrong, differences(wrong)
        town.exercise.wait_for_policies()
    wrong = town.compare(everything, attempts)
    assert not wrong, differences(wrong)


async def test_an_agent_reports_for_its_own_node_alone(town: Town) -> None:
    """The token that really runs node1, against the real API server."""
    credentials = town.lab.paths.token_directory("node1")
    server = town.lab.kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    account = Cluster(server=server, ca_file=credentials / "ca.crt", token_file=credentials / "token")
    reports = "/apis/meshwire.dev/v1alpha1/meshpolicyreports"
    async with Client(account) as client:
        own = await client.get(f"{reports}/node1")
        await client.patch(f"{reports}/node1/status", {"status": own["status"]})
        for refused in (
            client.patch(f"{reports}/node2/status", {"status": own["status"]}),
            client.patch(f"{reports}/node1", {"metadata": {"labels": {"a": "b"}}}),
            client.delete(f"{reports}/node2"),
        ):
            with pytest.raises(ApiError) as refusal:
                await refused
            assert refusal.value.status in (403, 422), refusal.value


def test_policy_is_on_every_pods_device(town: Town) -> None:
    for node in town.lab.nodes:
        found = left_behind(town.lab, node)
        pods = len(NODES[node].split()) + 1  # and the probe
        for program in ("mwp_from_pod", "mwp_to_pod"):
            assert sum(program in line for line in found.splitlines()) == pods, found
        assert "mwp_policy_out" in found
