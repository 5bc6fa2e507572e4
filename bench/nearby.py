"""What policy costs between two pods of one node: requests per second and their slowest hundredth, with
policy on against nothing of Meshwire on the way, in turns within one run. The node is a lab's, with its real
kube-proxy: conntrack is on, and a Service is what kube-proxy makes of it. Stands by itself too:
`python -m bench nearby` (root)."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile, ratio
from bench.load import PORT, Answers, Load, Mode

from meshwire.kube.client import Object
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

NODE: Final = "node1"
ROUNDS: Final = 16
SECONDS: Final = 0.8
CLIENT, SERVER = "client", "server"
GOAL: Final = "at least 1.0"
SERVICE_GOAL: Final = "at least 0.97"
SLOWEST_GOAL: Final = "at most 1.0"


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    connections: int
    mode: Mode
    by_service: bool = False


KINDS: Final = (
    Kind("16 connections", 16, "keep"),
    Kind("1 connection", 1, "keep"),
    Kind("a connection per request, 16 at a time", 16, "new"),
    Kind("16 connections, by ClusterIP", 16, "keep", by_service=True),
    Kind("a connection per request, 16 at a time, by ClusterIP", 16, "new", by_service=True),
)


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). About four minutes. Raises LabError and
    CalledProcessError."""
    with ExitStack() as resources:
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        load = Load(directory)
        lab = Lab(directory / "lab")
        lab.up(Settings(nodes=1))
        resources.callback(lab.down)
        lab.apply(*_objects())
        lab.kubectl("wait", "pod", CLIENT, SERVER, "--for=condition=Ready", "--timeout=60s")
        resources.enter_context(load.serving(lab.find_pod(SERVER).netns))
        return _figures(_rounds(Exercise(lab), load))


def _rounds(exercise: Exercise, load: Load) -> dict[Kind, list[tuple[Answers, Answers]]]:
    """(on, off) of each round; which goes first by turns, so that it is switched once a round."""
    found: defaultdict[Kind, list[tuple[Answers, Answers]]] = defaultdict(list)
    for number in range(ROUNDS):
        answers: dict[bool, dict[Kind, Answers]] = {}
        for enabled in (number % 2 == 0, number % 2 == 1):
            _switch(exercise, enabled)
            answers[enabled] = {kind: _ask(exercise.lab, load, kind, SECONDS) for kind in KINDS}
        for kind in KINDS:
            found[kind].append((answers[True][kind], answers[False][kind]))
    return found


def _switch(exercise: Exercise, enabled: bool) -> None:
    """Off: nothing of Meshwire is left at the pods' devices."""
    exercise.set_policy(enabled)
    if enabled:
        return
    devices = json.loads(exercise.lab.on_node(NODE, "tc", "-json", "qdisc", "show").stdout)
    for device in devices:
        if device["kind"] == "clsact" and device["dev"] in _pod_devices(exercise.lab):
            exercise.lab.on_node(NODE, "tc", "qdisc", "delete", "dev", device["dev"], "clsact")


def _pod_devices(lab: Lab) -> set[str]:
    links = json.loads(lab.on_node(NODE, "ip", "-json", "link", "show", "type", "veth").stdout)
    return {link["ifname"] for link in links} - {"eth0"}


def _ask(lab: Lab, load: Load, kind: Kind, seconds: float) -> Answers:
    client, server = lab.find_pod(CLIENT), lab.find_pod(SERVER)
    target = lab.get("service", SERVER)["spec"]["clusterIP"] if kind.by_service else server.addresses[0]
    return load.ask(
        client.netns,
        client.addresses[0],
        target,
        connections=kind.connections,
        seconds=seconds,
        mode=kind.mode,
    )


def _figures(rounds: dict[Kind, list[tuple[Answers, Answers]]]) -> list[Figure]:
    return [figure for kind, pairs in rounds.items() for figure in _figures_of(kind, pairs)]


def _figures_of(kind: Kind, pairs: list[tuple[Answers, Answers]]) -> Iterator[Figure]:
    rate = percentile([off.per_second for _, off in pairs], 50)
    slowest = percentile([off.p99_us for _, off in pairs], 50)
    spread = f"median of {len(pairs)} rounds of {SECONDS} s"
    yield Figure(name=f"{kind.name}: without Meshwire", value=rate, unit="requests/s", spread=spread)
    yield ratio(
        f"{kind.name}: requests/s, policy on to without",
        [(on.per_second, off.per_second) for on, off in pairs],
        goal=SERVICE_GOAL if kind.by_service else GOAL,
    )
    yield Figure(name=f"{kind.name}: p99 without Meshwire", value=slowest, unit="µs", spread=spread)
    yield ratio(
        f"{kind.name}: p99, policy on to without",
        [(on.p99_us, off.p99_us) for on, off in pairs],
        goal=SLOWEST_GOAL if not kind.by_service else "",
    )


def _objects() -> list[Object]:
    def pod(name: str) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
            "spec": {
                "nodeName": NODE,
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "it", "image": "host", "command": ["sleep", "infinity"]}],
            },
        }

    ports = [{"ports": [{"port": str(PORT), "protocol": "TCP"}]}]
    return [
        pod(CLIENT),
        pod(SERVER),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVER, "namespace": "default"},
            "spec": {"selector": {"app": SERVER}, "ports": [{"port": PORT}]},
        },
        {
            "apiVersion": "meshwire.dev/v1alpha1",
            "kind": "MeshPolicy",
            "metadata": {"name": SERVER, "namespace": "default"},
            "spec": {
                "endpointSelector": {"matchLabels": {"app": SERVER}},
                "ingress": [{"fromEndpoints": [{"matchLabels": {"app": CLIENT}}], "toPorts": ports}],
            },
        },
        {
            "apiVersion": "meshwire.dev/v1alpha1",
            "kind": "MeshPolicy",
            "metadata": {"name": CLIENT, "namespace": "default"},
            "spec": {
                "endpointSelector": {"matchLabels": {"app": CLIENT}},
                "egress": [{"toEndpoints": [{"matchLabels": {"app": SERVER}}], "toPorts": ports}],
            },
        },
    ]
