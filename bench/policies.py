"""What judging by policy costs: nanoseconds per packet by the number of rules, and the time from `kubectl
apply` to in force on every node and from a pod's start to its first allowed packet, alone and among many
policies. Stands by itself too: `python -m bench policies` (root)."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from bench.figures import Figure, p50_p95, percentile

from meshwire.bpf import packets as p
from meshwire.bpf.layouts import Direction
from meshwire.bpf.loader import (
    FROM_POD,
    POLICY_IN,
    POLICY_OBJECTS,
    POLICY_OUT,
    TO_POD,
    Programs,
    instructions,
)
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag
from meshwire.bpf.policymaps import CidrEntry, EndpointEntry, PolicyEntry, PolicyKey, PolicyMaps
from meshwire.bpf.testrun import run
from meshwire.kube.client import Client, Object
from meshwire.lab import reach
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings
from meshwire.policy import identity

RULES: Final = (0, 10, 1_000, 10_000)
REPEAT: Final = 50_000
ROUNDS: Final = 7
CYCLES: Final = 10
CROWD: Final = 250
"""MeshPolicies and NetworkPolicies each that are there besides."""
OURS, PEER, SET = 300, 301, 5
HERE: Final = 1
"""Test runs happen on the loopback device."""

POLICIES: Final = "/apis/meshwire.dev/v1alpha1/namespaces/default/meshpolicies"


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). About five minutes. Raises LabError."""
    figures = _programs()
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=3))
        try:
            exercise = Exercise(lab)
            exercise.deploy()
            exercise.set_policy(True)
            exercise.wait_for_policies()
            figures += _enforcing(exercise, "")
            figures += _starting(exercise, "")
            lab.apply(*_crowd())
            exercise.wait_for_policies(seconds=120)
            figures += _enforcing(exercise, f", among {2 * CROWD} policies")
            figures += _starting(exercise, f", among {2 * CROWD} policies")
        finally:
            lab.down()
    return figures


# The programs


def _programs() -> list[Figure]:
    with (
        tempfile.TemporaryDirectory(dir="/sys/fs/bpf") as pins,
        Programs.load(Path(pins), objects=POLICY_OBJECTS) as programs,
        PolicyMaps.open(Path(pins)) as maps,
    ):
        us, peer, uplink = ip_address("10.1.1.9"), ip_address("10.1.2.9"), ip_address("192.0.2.1")
        maps.cidrs.update(ip_network("10.1.0.0/16"), CidrEntry(0, CidrFlag.CLUSTER))
        maps.cidrs.update(ip_network("10.1.1.0/24"), CidrEntry(0, CidrFlag.CLUSTER | CidrFlag.LOCAL))
        maps.identities.update_many({us: OURS, peer: PEER, uplink: identity.HOST})
        figures = []
        for rules in RULES:
            flags = (EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED) if rules else 0
            maps.endpoints.update(us, EndpointEntry(HERE, OURS, SET, 0, 1 + rules, 1, EndpointFlag(flags)))
            maps.policies.update_many(dict(_entries(rules)))
            what = f"{rules:,} rules" if rules else "no policy"
            for program, name, packet in (
                (FROM_POD, "known flow", p.udp(us, peer, bytes(1000), sport=40000, dport=80)),
                (TO_POD, "known flow", p.udp(peer, us, bytes(1000), sport=40000, dport=80)),
                *(
                    [(FROM_POD, "judged and dropped", p.udp(us, peer, bytes(1000), dport=9))]
                    if rules
                    else ()
                ),
            ):
                figures.append(_time(programs, program, f"{name}, {what}", p.frame(packet)))
        foreign = p.frame(p.udp(uplink, ip_address("192.0.2.2"), bytes(1000), sport=51871, dport=51871))
        figures.append(_time(programs, POLICY_OUT, "WireGuard's own packet", foreign))
        figures.append(_time(programs, POLICY_IN, "WireGuard's own packet", foreign))
        for name in sorted(programs.names()):
            size, verified = instructions(programs.get(name))
            spread = f"{size:,} are run by the kernel; limit 1,000,000"
            figures.append(
                Figure(name=f"{name}: verified", value=verified, unit="instructions", spread=spread)
            )
        for pin in Path(pins).iterdir():
            pin.unlink()
    return figures


def _entries(rules: int) -> Iterator[tuple[PolicyKey, PolicyEntry]]:
    """One of them allows the flow that is measured."""
    for number in range(rules):
        key = PolicyKey(SET, PEER + number, Direction(number % 2), p.UDP, 80, 16)
        yield key, PolicyEntry(number + 1, deny=False)
    if rules:
        for direction in Direction:
            yield PolicyKey(SET, PEER, direction, p.UDP, 80, 16), PolicyEntry(1, deny=False)


def _time(programs: Programs, program: str, name: str, data: bytes) -> Figure:
    """The median over ROUNDS of the mean over REPEAT packets."""
    fd = programs.get(program).fd
    times = [run(fd, data, repeat=REPEAT).duration_ns for _ in range(ROUNDS)]
    return Figure(
        name=f"{program}: {name}",
        value=percentile(times, 50),
        unit="ns",
        spread=f"median of {ROUNDS} runs of {REPEAT:,}, {min(times)} to {max(times)}",
    )


# The whole way


def _policy(name: str, app: str, client: str, port: int = 80) -> Object:
    return {
        "apiVersion": "meshwire.dev/v1alpha1",
        "kind": "MeshPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": app}},
            "ingress": [
                {
                    "fromEndpoints": [{"matchLabels": {"app": client}}],
                    "toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}]}],
                }
            ],
        },
    }


def _crowd() -> list[Object]:
    """Half of them select the probes."""
    found = []
    for number in range(CROWD):
        app = "probe" if number % 2 else f"app-{number}"
        found.append(_policy(f"crowd-{number}", app, f"client-{number}", 1000 + number))
        found.append(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": f"crowd-{number}", "namespace": "default"},
                "spec": {
                    "podSelector": {"matchLabels": {"app": app}},
                    "ingress": [
                        {
                            "from": [{"podSelector": {"matchLabels": {"app": f"client-{number}"}}}],
                            "ports": [{"port": 2000 + number}],
                        }
                    ],
                },
            }
        )
    return found


def _enforcing(exercise: Exercise, among: str) -> list[Figure]:
    """From before `kubectl apply` starts until the policy's own status says that all nodes enforce it."""

    async def is_ready(client: Client) -> float:
        while True:
            found = await client.find(f"{POLICIES}/measured")
            conditions = (found or {}).get("status", {}).get("conditions", ())
            if any(each["type"] == "Ready" and each["status"] == "True" for each in conditions):
                return time.monotonic()
            await asyncio.sleep(0.01)

    seconds = []
    for _ in range(CYCLES):
        began = time.monotonic()
        exercise.lab.apply(_policy("measured", "probe", "nobody"))
        seconds.append(exercise.lab.call(is_ready) - began)
        exercise.lab.kubectl("delete", "meshpolicy", "measured")
        exercise.wait_for_policies()
    return p50_p95(f"policy applied to in force on all 3 nodes, by its status{among}", seconds)


def _starting(exercise: Exercise, among: str) -> list[Figure]:
    """A pod that may reach one of another node, from its first question to its first answer. It asks from
    its first moment on, twenty times a second."""
    lab = exercise.lab
    lab.apply(
        _policy("started", "answering", "started"),
        _pod("answering", "node2", "answering", "serve", "--tcp=80"),
    )
    lab.kubectl("wait", "pod/answering", "--for=condition=Ready", "--timeout=60s")
    exercise.wait_for_policies()
    target = reach.format_target("tcp", lab.find_pod("answering").addresses[0], 80)
    seconds = []
    for number in range(CYCLES):
        name = f"started-{number}"
        watching = ("watch", "--timeout=0.05", "--attempts=1", "--pause=0", target)
        log = lab.paths.logs / "pods" / f"default_{name}.log"
        # A pod of this name may have been there before.
        log.unlink(missing_ok=True)
        lab.apply(_pod(name, "node1", "started", *watching))
        answers: list[Object] = []
        while not answers or not answers[-1]["reached"]:
            time.sleep(0.05)
            answers = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        seconds.append(answers[-1]["time"] - answers[0]["time"])
        lab.kubectl("delete", "pod", name)
    lab.kubectl("delete", "meshpolicy/started", "pod/answering")
    exercise.wait_for_policies()
    return p50_p95(f"pod's first question to its first allowed answer{among}", seconds)


def _pod(name: str, node: str, app: str, *command: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": app}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {"name": "it", "image": "host", "command": ["python", "-m", "meshwire.lab.reach", *command]}
            ],
        },
    }
