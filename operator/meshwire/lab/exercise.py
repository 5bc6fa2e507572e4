"""What tests, the demo and the figures do with a lab: pods on every node that answer, encryption and policy
on and off, traffic between all nodes that counts what it loses."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from meshwire.api import names, policyobjects
from meshwire.api.meshendpointslice import MeshEndpointSlice
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import Kind, Policy
from meshwire.api.meshpolicyreport import MeshPolicyReport
from meshwire.kube.client import ApiError, Client, Object
from meshwire.lab import traffic
from meshwire.lab.lab import Lab, PodRecord
from meshwire.lab.model import PATIENCE, LabError
from meshwire.lab.pods import is_ready
from meshwire.operator.objects import Namespace, Pod
from meshwire.operator.policyreconcile import pod_labels
from meshwire.policy.identity import HIGH_CARDINALITY, Labels
from meshwire.policy.selectors import matches

Result = TypeVar("Result")

PROBE: Final = "probe"
"""Name of the DaemonSet and the Service."""
END_SECONDS: Final = 60.0


def probe_objects(families: Sequence[str], namespace: str = "default") -> list[Object]:
    """A DaemonSet that serves traffic, and a Service over it in all families."""
    metadata = {"name": PROBE, "namespace": namespace}
    labels = {"app": PROBE}
    container = {
        "name": PROBE,
        "image": "host",
        "command": ["python", "-m", "meshwire.lab.traffic", "serve"],
        "readinessProbe": {"tcpSocket": {"port": traffic.PORT}},
    }
    ports = [{"name": kind.lower(), "protocol": kind, "port": traffic.PORT} for kind in ("TCP", "UDP")]
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": metadata,
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "selector": labels,
                "ports": ports,
                "ipFamilyPolicy": "RequireDualStack" if len(families) > 1 else "SingleStack",
            },
        },
    ]


@dataclass(frozen=True, slots=True)
class Flow:
    """One flow's end. `lost` counts packets of both directions (UDP) or bytes (TCP); None: not known."""

    source: str
    target: str
    kind: str
    lost: int | None
    longest_silence_ms: float
    result: Object

    @property
    def is_clean(self) -> bool:
        return traffic.is_clean(self.result)


@dataclass(slots=True)
class Flows:
    """Traffic in the background; `ended` is filled when it has been stopped."""

    ended: list[Flow] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Over all UDP flows. Raises LabError where one could not be counted."""
        unknown = [flow for flow in self.ended if flow.lost is None]
        if unknown or not self.ended:
            raise LabError(f"flows not counted: {[flow.result for flow in unknown]}")
        return sum(flow.lost or 0 for flow in self.ended if flow.kind == "udp")

    @property
    def broken(self) -> list[Object]:
        """Results of all flows that lost, damaged or missed something."""
        return [{"source": flow.source, **flow.result} for flow in self.ended if not flow.is_clean]

    @property
    def packets(self) -> int:
        """UDP packets sent, both directions."""
        udp = [flow.result for flow in self.ended if flow.kind == "udp" and flow.result["complete"]]
        return sum(result["forward"]["sent"] + result["backward"]["sent"] for result in udp)


class Exercise:
    """Works on a lab that is up. Methods raise LabError."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    # Probes

    def deploy(self) -> None:
        """A probe on every node, and the Service; waits until they answer."""
        self.lab.apply(*probe_objects(self.lab.state.settings.families))
        self.wait_for_probes()

    def wait_for_probes(self, *, seconds: float = 60) -> None:
        """Until there is a ready one on every node, and no other."""

        async def problem(client: Client) -> str:
            path = "/api/v1/namespaces/default/pods"
            pods = (await client.get(path, labelSelector=f"app={PROBE}"))["items"]
            ready = sorted(pod["spec"].get("nodeName", "") for pod in pods if is_ready(pod))
            wanted = sorted(self.lab.nodes)
            return (
                ""
                if ready == wanted and len(pods) == len(ready)
                else f"probes are ready on {ready} of {wanted}"
            )

        self._wait(problem, seconds)

    def probe(self, node: str) -> PodRecord:
        """The probe on a node, known without the API server."""
        for path in self.lab.paths.pods(node).glob(f"default_{PROBE}-*.json"):
            return self.lab.find_pod(path.stem.partition("_")[2])
        raise LabError(f"no probe runs on {node}")

    def services(self) -> tuple[str, ...]:
        """The Service's addresses, one per family."""
        return tuple(self.lab.get("service", PROBE)["spec"]["clusterIPs"])

    # Encryption

    def set_encryption(self, enabled: bool, *, wait: bool = True, **encryption: Any) -> None:
        """Gives the MeshConfig these fields of spec.encryption, no others, and waits until it is so
        everywhere."""
        self._configure(encryption={"enabled": enabled, **encryption})
        if wait:
            strict = encryption.get("mode") != "Permissive"
            self.wait_for_phase("Enforcing" if enabled else "Off", strict=enabled and strict)

    def rotate(self, *, wait: bool = True, seconds: float = 120) -> None:
        """Asks for new keys, and waits until only those are left."""
        before = self.mesh_status()
        value = str(time.time_ns())
        self.lab.kubectl(
            "annotate", "meshconfig", names.CONFIG_NAME, f"{names.ROTATE_ANNOTATION}={value}", "--overwrite"
        )
        if wait:
            self.wait_until(
                lambda: _is_rotated(self.mesh_status(), value),
                f"keys of epoch {before.get('epoch')} are changed: {self.mesh_status()}",
                seconds=seconds,
            )
            self.wait_for_phase("Enforcing", strict=self.mesh_status()["encryption"] == "WireGuard")

    def mesh_status(self) -> Object:
        """Status of the MeshStatus."""
        status: Object = self.lab.get("meshstatus", names.STATUS_NAME).get("status", {})
        return status

    def mesh_node(self, node: str) -> Object:
        """The MeshNode."""
        return self.lab.get("meshnode", node)

    def wait_for_phase(self, phase: str, *, strict: bool = True, seconds: float = 90) -> None:
        """Until all nodes have been ordered to a phase and say they have carried it out. In Enforcing,
        `strict` says whether plaintext is to be dropped."""

        async def problem(client: Client) -> str:
            base = f"/apis/{names.API_VERSION}"
            found = await client.find(f"{base}/{names.MESHSTATUSES}/{names.STATUS_NAME}")
            status = (found or {}).get("status", {})
            nodes = {
                item["metadata"]["name"]: item
                for item in (await client.get(f"{base}/{names.MESHNODES}"))["items"]
            }
            for node in self.lab.nodes:
                item = nodes.get(node)
                if item is None:
                    return f"{node} has no MeshNode"
                if item["spec"].get("encryption", {}).get("phase", "Off") != phase:
                    return f"{node} is not ordered to {phase}: {item['spec'].get('encryption')}"
                if not _is_settled(item, phase, strict):
                    return f"{node} is not settled in {phase}: {item.get('status')}"
            if status.get("phase") != phase:
                return f"the mesh is in {status.get('phase')}, not {phase}: {status}"
            return (
                ""
                if status.get("nodesReady") == len(self.lab.nodes)
                else f"not all nodes are ready: {status}"
            )

        self._wait(problem, seconds)

    def leftovers(self) -> list[str]:
        """What is there and nobody needs: objects of nodes that are gone, and on the nodes devices, keys,
        pins, filters and routes that no order of theirs asks for; in words."""
        spec_of = {
            item["metadata"]["name"]: item["spec"] for item in self.lab.get("meshnodes").get("items", ())
        }
        configs = self.lab.get("meshconfigs").get("items", ())
        orders = [item["spec"].get("encryption", {}) for item in configs]
        judged = any(item["spec"].get("policy", {}).get("enabled") for item in configs)
        guarded = any(
            order.get("bootGuard") == "Systemd" and order.get("mode") == "Strict" for order in orders
        )
        found = [f"MeshNode {name}" for name in sorted(spec_of.keys() - set(self.lab.nodes))]
        for item in self.lab.get("meshpolicyreports")["items"]:
            if item["metadata"]["name"] not in self.lab.nodes:
                found.append(f"MeshPolicyReport {item['metadata']['name']}")
        label = f"--selector={names.NODE_LABEL}"
        for item in self.lab.get("secrets", "--namespace", names.NAMESPACE, label)["items"]:
            node = item["metadata"]["labels"][names.NODE_LABEL]
            keys = spec_of.get(node, {}).get("keys", ())
            wanted = {names.secret_data_key(key["epoch"]) for key in keys}
            wanted |= {
                names.sealed_secret_data_key(key["epoch"]) for key in keys if key.get("epochSecretDigest")
            }
            if not wanted:
                found.append(f"Secret of {node}")
            found += [f"{name} in the Secret of {node}" for name in sorted(item["data"].keys() - wanted)]
        for node in self.lab.nodes:
            shown = self.lab.on_node(node, "sh", "-c", _LOOK, check=False).stdout
            spec = spec_of.get(node, {})
            ours = find_leftovers(spec, shown, boot_guard=guarded, policy=judged)
            found += [f"{node}: {each}" for each in ours]
        return found

    # Policy

    def set_policy(self, enabled: bool, *, wait: bool = True, **policy: Any) -> None:
        """The same for spec.policy."""
        self._configure(policy={"enabled": enabled, **policy})
        if wait:
            self.wait_for_policies(enabled=enabled)

    def wait_for_policies(self, *, enabled: bool = True, seconds: float = 60) -> None:
        """Until all pods have their identities, and every node says that it judges by exactly the policies
        there are, as they are now. Not `enabled`: until no node judges by any."""

        async def problem(client: Client) -> str:
            reports = await _list(client, names.MESHPOLICYREPORTS, MeshPolicyReport.from_object)
            by_node = {report.name: report for report in reports}
            wrong = [
                node for node in self.lab.nodes if (node in by_node and by_node[node].enabled) is not enabled
            ]
            if wrong or not enabled:
                return f"policy is {'off' if enabled else 'on'} on {', '.join(wrong)}" if wrong else ""
            pods = await _pods(client)
            identities = await _list(client, names.MESHIDENTITIES, MeshIdentity.from_object)
            slices = await _list(client, names.MESHENDPOINTSLICES, MeshEndpointSlice.from_object)
            known = {identity.number: identity.labels for identity in identities}
            endpoints = {
                each.pod.uid: known.get(each.identity) for current in slices for each in current.endpoints
            }
            for pod, labels in pods:
                if endpoints.get(pod.uid) != labels:
                    return f"pod {pod.namespace}/{pod.name} does not have its identity yet"
            by_pod_node = [(pod.node, labels) for pod, labels in pods]
            return find_unenforced(await _policies(client), by_pod_node, by_node)

        self._wait(problem, seconds)

    # Traffic

    def run(self, node: str, *arguments: str) -> Object:
        """`python -m meshwire.lab.traffic ARGUMENTS` in the node's probe; what it found out."""
        command = ("python", "-m", "meshwire.lab.traffic", *arguments)
        done = self.lab.exec(self.probe(node).name, *command, check=False, timeout=120 * PATIENCE)
        try:
            result: Object = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}") from None
        return result

    def pairs(self, nodes: Sequence[str] | None = None) -> list[tuple[str, list[str]]]:
        """(node, addresses of the probes it is to talk to): every pair of nodes once, in all families."""
        found = {node: self.probe(node) for node in nodes or self.lab.nodes}
        talks: dict[str, list[str]] = {}
        for one, other in itertools.combinations(found, 2):
            talks.setdefault(one, []).extend(found[other].addresses)
        return list(talks.items())

    @contextmanager
    def flows(
        self,
        *,
        udp_rate: int = 200,
        tcp_rate: int = 100_000,
        size: int = 200,
        services: bool = False,
        nodes: Sequence[str] | None = None,
        more: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[Flows]:
        """UDP and TCP between every pair of nodes, in both directions and all families, while the body runs;
        with `services` also from each node through the Service. `more`: further addresses that a node's
        probe talks to. Rates are per flow and direction: packets and bytes per second."""
        talks = self.pairs(nodes)
        if services:
            addresses = list(self.services())
            talks = [(node, [*targets, *addresses]) for node, targets in talks]
        by_node: dict[str, Sequence[str]] = dict(talks)
        for node, others in (more or {}).items():
            by_node[node] = [*by_node.get(node, ()), *others]
        flows = Flows()
        rates = [f"--udp-rate={udp_rate}", f"--tcp-rate={tcp_rate}", f"--size={size}"]
        with contextlib.ExitStack() as stack:
            running = []
            for node, reached in by_node.items():
                command = ("python", "-m", "meshwire.lab.traffic", "flows", *rates, *reached)
                process = self.lab.popen(self.probe(node).name, *command)
                stack.callback(_end, process)
                running.append((node, process))
            for node, process in running:
                assert process.stdout
                if (said := process.stdout.readline()) != "started\n":
                    raise LabError(f"flows from {node} don't start: {said}{process.communicate()}")
            yield flows
            for _, process in running:
                process.send_signal(signal.SIGTERM)
            for node, process in running:
                flows.ended += _read_flows(node, process)

    # How

    def _configure(self, **sections: Object) -> None:
        """Applies the MeshConfig with these sections of its spec; the others stay."""
        found = self.lab.kubectl("get", "meshconfig", names.CONFIG_NAME, "--ignore-not-found", "-o", "json")
        spec = json.loads(found)["spec"] if found else {}
        self.lab.apply(
            {
                "apiVersion": names.API_VERSION,
                "kind": "MeshConfig",
                "metadata": {"name": names.CONFIG_NAME},
                "spec": {**spec, **sections},
            }
        )

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float = 30) -> None:
        """Asks again and again, at most `seconds`."""
        deadline = time.monotonic() + seconds * PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise LabError(f"after {seconds * PATIENCE:.0f} s still not: {what}")
            time.sleep(0.1)

    def _wait(self, problem: Callable[[Client], Any], seconds: float) -> None:
        async def wait(client: Client) -> None:
            deadline = time.monotonic() + seconds * PATIENCE
            while True:
                try:
                    found = await problem(client)
                except ApiError as error:
                    found = str(error)
                if not found:
                    return
                if time.monotonic() > deadline:
                    raise LabError(f"after {seconds * PATIENCE:.0f} s {found}")
                await asyncio.sleep(0.1)

        self.lab.call(wait)


_LOOK: Final = """
for device in /sys/class/net/meshwire_wg*; do [ -e "$device" ] && echo "device ${device##*/}"; done
for pin in /sys/fs/bpf/meshwire*; do [ -e "$pin" ] && echo "pins ${pin##*/}"; done
for file in /var/lib/meshwire/boot.nft $(find /etc/systemd/system -name 'meshwire*'); do
  [ -e "$file" ] || [ -L "$file" ] && echo "guard $file"
done
nft list tables 2>/dev/null | grep -o 'meshwire.*' | sed 's/^/table /'
[ -e /var/lib/meshwire/keys.json ] && echo "keys $(cat /var/lib/meshwire/keys.json)"
ip -o route show table all | grep -o 'dev meshwire_wg[01].*' | sed 's/^/route /'
for device in /sys/class/net/*; do
  for hook in ingress egress; do
    tc filter show dev "${device##*/}" $hook 2>/dev/null | grep -o ' mw_[a-z0-9_]*' \\
      | sed "s/^ /filter ${device##*/} $hook /"
  done
done
"""
"""One line for each thing of ours on a node: its kind and what it is."""


def find_leftovers(
    spec: Mapping[str, Any], shown: str, *, boot_guard: bool = False, policy: bool = False
) -> list[str]:
    """What of _LOOK's answer a MeshNode's spec doesn't ask for. `boot_guard`: the MeshConfig does, for
    Strict; `policy`: it does."""
    order = spec.get("encryption", {})
    is_on = order.get("phase", "Off") != "Off"
    epochs = {key["epoch"] for key in spec.get("keys", ())}
    devices = {names.device_name(epoch) for epoch in epochs}
    found = []
    for line in shown.splitlines():
        kind, _, what = line.partition(" ")
        match kind:
            case "device":
                is_needed = what in devices
            case "pins":
                is_needed = (is_on and what == "meshwire") or (policy and what == "meshwire-policy")
            case "keys":
                held = {int(epoch) for epoch in json.loads(what or "{}")}
                is_needed, what = held <= epochs, f"of epochs {sorted(held - epochs)}"
            case "guard":
                # On the disk, that is; in force it holds pods back.
                is_needed = boot_guard and order.get("phase") == "Enforcing"
            case "table":
                is_needed = False
            case "route":
                # Of the device's own address alone.
                is_needed = "scope host" in what or "local" in what or "table local" in what
            case _:
                is_tunnel = what.startswith("meshwire_wg")
                is_needed = what.split()[0] in devices if is_tunnel else is_on or policy
        if not is_needed:
            found.append(f"{kind} {what}")
    return found


def find_unenforced(
    policies: Iterable[Policy],
    pods: Iterable[tuple[str, Labels]],
    reports: Mapping[str, MeshPolicyReport],
) -> str:
    """The first policy that a node with pods of it (node, labels) doesn't judge by as it is now, or that it
    still judges by though it is gone; in words, "" for none."""
    labels_on: dict[str, set[Labels]] = {}
    for node, labels in pods:
        labels_on.setdefault(node, set()).add(labels)
    generations = {}
    for policy in policies:
        generations[policy.uid] = policy.generation
        for node, found in labels_on.items():
            if not any(matches(policy.selector, dict(labels)) for labels in found):
                continue
            report = reports.get(node)
            if not report or policy.uid not in {item.uid for item in report.policies}:
                failed = [item for item in report.failed if item.uid == policy.uid] if report else []
                return f"{policy.title} is not in force on {node}: {failed}"
    for node, report in reports.items():
        for item in report.policies:
            if generations.get(item.uid) != item.generation:
                return f"{node} judges by generation {item.generation} of {item.uid}: {generations}"
    return ""


async def _list(client: Client, resource: str, parse: Callable[[Object], Result]) -> list[Result]:
    path = f"/apis/{names.API_VERSION}/{resource}"
    return [parse(item) for item in (await client.get(path))["items"]]


async def _policies(client: Client) -> list[Policy]:
    path = "/apis/networking.k8s.io/v1/networkpolicies"
    found = [policyobjects.network_policy(item) for item in (await client.get(path))["items"]]
    for resource, kind in (
        (names.MESHPOLICIES, Kind.MESH_POLICY),
        (names.CLUSTERMESHPOLICIES, Kind.CLUSTER_MESH_POLICY),
    ):
        # Items of a list don't say what they are.
        found += await _list(client, resource, partial(policyobjects.mesh_policy, kind=kind))
    return found


async def _pods(client: Client) -> list[tuple[Pod, Labels]]:
    """Those that run on a network of their own, and what their identities should stand for."""
    items = (await client.get("/api/v1/namespaces"))["items"]
    namespaces = {each.name: each for each in map(Namespace.from_object, items)}
    pods = map(Pod.from_object, (await client.get("/api/v1/pods"))["items"])
    return [
        (pod, pod_labels(pod, namespaces[pod.namespace], HIGH_CARDINALITY))
        for pod in pods
        if pod and pod.addresses and pod.namespace in namespaces
    ]


def _is_settled(node: Object, phase: str, strict: bool) -> bool:
    """Whether the agent's answer is to the present order, and says that it has been carried out."""
    status = node.get("status", {})
    if status.get("observedGeneration") != node["metadata"]["generation"]:
        return False
    match phase:
        case "Enforcing":
            return (
                bool(status.get("strict"))
                and status.get("activeEpoch") == node["spec"]["encryption"]["epoch"]
            )
        case "Off":
            return not status.get("strict") and not status.get("activeEpoch")
        case _:
            return True


def _is_rotated(status: Object, value: str) -> bool:
    return status.get("handledRotate") == value and not status.get("rotation")


def _read_flows(node: str, process: subprocess.Popen[str]) -> list[Flow]:
    try:
        output, errors = process.communicate(timeout=END_SECONDS * PATIENCE)
    except subprocess.TimeoutExpired:
        raise LabError(f"flows from {node} don't end") from None
    try:
        results = json.loads(output.splitlines()[-1])["flows"]
    except (IndexError, json.JSONDecodeError):
        raise LabError(f"flows from {node} ended without a result: {errors.strip()}") from None
    return [_flow(node, result) for result in results]


def _flow(node: str, result: Object) -> Flow:
    if not result["complete"]:
        return Flow(node, result["target"], result["kind"], None, 0.0, result)
    if result["kind"] == "tcp":
        lost, silence = result["sent"] - result["returned"], result["longest_stall_ms"]
    else:
        parts = (result["forward"], result["backward"])
        lost, silence = sum(part["lost"] for part in parts), max(part["longest_gap_ms"] for part in parts)
    return Flow(node, result["target"], result["kind"], lost, silence, result)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
