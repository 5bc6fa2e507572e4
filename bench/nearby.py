"""What policy costs between two pods of one node: requests per second and their slowest hundredth, on a node
with policy on against one that has nothing of Meshwire between its pods, in turns within one run. The nodes
are a lab's, with their real kube-proxy: conntrack is on, and a Service is what kube-proxy makes of it.
Stands by itself too: `python -m bench nearby` (root)."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

JUDGED: Final = "node1"
BARE: Final = "node2"
"""Its agent ends before policy is turned on."""
ROUNDS: Final = 32
CONTROL_ROUNDS: Final = 12
"""Before policy is on, to see whether the nodes differ."""
SECONDS: Final = 0.3
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


Rounds = Mapping[Kind, Sequence[tuple[Answers, Answers]]]
"""Of each round what the judged node's pods found, and the bare one's."""


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). About four minutes. Raises LabError and
    CalledProcessError."""
    with ExitStack() as resources:
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        load = Load(directory)
        lab = Lab(directory / "lab")
        lab.up(Settings(nodes=2))
        resources.callback(lab.down)
        for node in (JUDGED, BARE):
            lab.apply(*_objects(node))
            pods = [f"{name}-{node}" for name in (CLIENT, SERVER)]
            lab.kubectl("wait", "pod", *pods, "--for=condition=Ready", "--timeout=60s")
            resources.enter_context(load.serving(lab.find_pod(f"{SERVER}-{node}").netns))
        lab.stop_agent(BARE)
        control = _rounds(lab, load, CONTROL_ROUNDS)
        exercise = Exercise(lab)
        exercise.set_policy(True, wait=False)
        exercise.wait_until(lambda: _in_force(lab) == 2, f"policy in force on {JUDGED}")
        # What follows from it, in the operator and elsewhere, is over.
        time.sleep(2)
        return _figures(control, _rounds(lab, load, ROUNDS))


def _in_force(lab: Lab) -> int:
    reports = lab.get("meshpolicyreports")["items"]
    found = [report for report in reports if report["metadata"]["name"] == JUDGED]
    return sum(len(report.get("status", {}).get("policies", ())) for report in found)


def _rounds(lab: Lab, load: Load, rounds: int) -> Rounds:
    """Which node goes first by turns."""
    found: defaultdict[Kind, list[tuple[Answers, Answers]]] = defaultdict(list)
    targets = {
        (node, by_service): _target(lab, node, by_service)
        for node in (JUDGED, BARE)
        for by_service in (False, True)
    }
    for number in range(rounds):
        for kind in KINDS:
            answers = {}
            for node in (JUDGED, BARE) if number % 2 else (BARE, JUDGED):
                client = lab.find_pod(f"{CLIENT}-{node}")
                answers[node] = load.ask(
                    client.netns,
                    client.addresses[0],
                    targets[node, kind.by_service],
                    connections=kind.connections,
                    seconds=SECONDS,
                    mode=kind.mode,
                )
            found[kind].append((answers[JUDGED], answers[BARE]))
    return found


def _target(lab: Lab, node: str, by_service: bool) -> str:
    name = f"{SERVER}-{node}"
    if by_service:
        return str(lab.get("service", name)["spec"]["clusterIP"])
    return lab.find_pod(name).addresses[0]


def _figures(control: Rounds, rounds: Rounds) -> list[Figure]:
    return [
        *(figure for kind, pairs in rounds.items() for figure in _figures_of(kind, pairs)),
        *(
            ratio(
                f"{kind.name}: requests/s, the same nodes with policy off",
                [(one.per_second, other.per_second) for one, other in pairs],
            )
            for kind, pairs in control.items()
        ),
    ]


def _figures_of(kind: Kind, pairs: Sequence[tuple[Answers, Answers]]) -> Iterator[Figure]:
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


def _objects(node: str) -> list[Object]:
    def pod(name: str) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{name}-{node}",
                "namespace": "default",
                "labels": {"app": name, "on": node},
            },
            "spec": {
                "nodeName": node,
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
            "metadata": {"name": f"{SERVER}-{node}", "namespace": "default"},
            "spec": {"selector": {"app": SERVER, "on": node}, "ports": [{"port": PORT}]},
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
