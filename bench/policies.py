"""What judging by policy costs: nanoseconds per packet by the number of rules, and the time from `kubectl
apply` to in force on every node and from a pod's start to its first allowed packet, alone and among many
policies. Stands by itself too: `python -m bench policies` (root)."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile, percentiles, ratio

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
from meshwire.bpf.policylayouts import CidrFlag, EndpointFlag, StateFlag
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
CYCLES: Final = 30
PERCENTS: Final = (50, 95, 99)
CROWD: Final = 250
"""MeshPolicies and NetworkPolicies each that are there besides."""
OURS, PEER, SET = 300, 301, 5
HERE: Final = 1
"""Test runs happen on the loopback device."""

FLAT_GOAL: Final = "at most 1.2"

PODS: Final = "/api/v1/namespaces/default/pods"
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
        figures = _by_rules(programs, maps, us, peer)
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


def _by_rules(programs: Programs, maps: PolicyMaps, us: p.Address, peer: p.Address) -> list[Figure]:
    """Nanoseconds by the number of rules, measured in turns, and whether many cost more than few."""
    for number, rules in enumerate(RULES):
        maps.policies.update_many(dict(_entries(SET + number, rules)))
    kinds = (
        (FROM_POD, "known flow", p.udp(us, peer, bytes(1000), sport=40000, dport=80)),
        (TO_POD, "known flow", p.udp(peer, us, bytes(1000), sport=40000, dport=80)),
        (FROM_POD, "judged and dropped", p.udp(us, peer, bytes(1000), dport=9)),
        (TO_POD, "judged and dropped", p.udp(peer, us, bytes(1000), dport=9)),
    )
    times: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for revision in range(1, ROUNDS + 1):
        for number, rules in enumerate(RULES):
            flags = (EndpointFlag.INGRESS_ENFORCED | EndpointFlag.EGRESS_ENFORCED) if rules else 0
            entry = EndpointEntry(HERE, OURS, SET + number, 0, revision, 1, EndpointFlag(flags))
            maps.endpoints.update(us, entry)
            maps.state.renew(StateFlag(0))
            for program, name, packet in kinds:
                if rules or name == "known flow":
                    found = run(programs.get(program).fd, p.frame(packet), repeat=REPEAT).duration_ns
                    times[f"{program}: {name}", rules].append(found)
    few, many = RULES[1], RULES[-1]
    return [
        *(
            _of_times(f"{name}, {rules:,} rules" if rules else f"{name}, no policy", found)
            for (name, rules), found in times.items()
        ),
        *(
            ratio(
                f"{name}, {many:,} rules to {few:,}",
                list(zip(times[name, many], times[name, few], strict=True)),
                goal=FLAT_GOAL,
            )
            for name in dict.fromkeys(name for name, _ in times)
        ),
    ]


def _entries(number: int, rules: int) -> Iterator[tuple[PolicyKey, PolicyEntry]]:
    """Of a set. One of them allows the flow that is measured."""
    for each in range(rules):
        key = PolicyKey(number, PEER + each, Direction(each % 2), p.UDP, 80, 16)
        yield key, PolicyEntry(each + 1, deny=False)
    if rules:
        for direction in Direction:
            yield PolicyKey(number, PEER, direction, p.UDP, 80, 16), PolicyEntry(1, deny=False)


def _time(programs: Programs, program: str, name: str, data: bytes) -> Figure:
    fd = programs.get(program).fd
    return _of_times(f"{program}: {name}", [run(fd, data, repeat=REPEAT).duration_ns for _ in range(ROUNDS)])


def _of_times(name: str, times: Sequence[int]) -> Figure:
    """The median over ROUNDS of the mean over REPEAT packets."""
    return Figure(
        name=name,
        value=percentile(times, 50),
        unit="ns",
        spread=f"median of {len(times)} runs of {REPEAT:,}, {min(times)} to {max(times)}",
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

    async def is_ready(client: Client, name: str) -> float:
        while True:
            found = await client.find(f"{POLICIES}/{name}")
            conditions = (found or {}).get("status", {}).get("conditions", ())
            if any(each["type"] == "Ready" and each["status"] == "True" for each in conditions):
                return time.monotonic()
            await asyncio.sleep(0.01)

    lab = exercise.lab
    seconds = []
    for number in range(CYCLES):
        name = f"measured-{number}"
        began = time.monotonic()
        lab.apply(_policy(name, "probe", "nobody"))
        seconds.append(lab.call(lambda client, name=name: is_ready(client, name)) - began)  # type: ignore[misc]
        lab.call(lambda client, name=name: client.delete(f"{POLICIES}/{name}"))  # type: ignore[misc]
        # It is gone everywhere before the next comes.
        time.sleep(0.5)
    exercise.wait_for_policies()
    what = f"policy applied to in force on all 3 nodes, by its status{among}"
    return percentiles(what, seconds, PERCENTS)


def _starting(exercise: Exercise, among: str) -> list[Figure]:
    """A pod that may reach one of another node, from its object's creation and from its first question to
    its first answer. It asks from its first moment on, fifty times a second. Between the two is what the
    lab needs to start it, a Python interpreter included."""
    lab = exercise.lab
    lab.apply(
        _policy("started", "answering", "started"),
        _pod("answering", "node2", "answering", "serve", "--tcp=80"),
    )
    lab.kubectl("wait", "pod/answering", "--for=condition=Ready", "--timeout=60s")
    exercise.wait_for_policies()
    target = reach.format_target("tcp", lab.find_pod("answering").addresses[0], 80)
    from_creation, from_question = [], []
    for number in range(CYCLES):
        name = f"started-{number}"
        watching = ("watch", "--timeout=0.02", "--attempts=1", "--pause=0", target)
        log = lab.paths.logs / "pods" / f"default_{name}.log"
        # A pod of this name may have been there before.
        log.unlink(missing_ok=True)
        pod = _pod(name, "node1", "started", *watching)
        began = time.time()
        lab.call(lambda client, pod=pod: client.create(PODS, pod))  # type: ignore[misc]
        answers: list[Object] = []
        while not answers or not answers[-1]["reached"]:
            time.sleep(0.05)
            answers = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        from_creation.append(answers[-1]["time"] - began)
        from_question.append(answers[-1]["time"] - answers[0]["time"])
        lab.call(lambda client, name=name: client.delete(f"{PODS}/{name}"))  # type: ignore[misc]
        # The next one starts on a node that is at rest.
        time.sleep(0.5)
    lab.kubectl("delete", "meshpolicy/started", "pod/answering")
    exercise.wait_for_policies()
    return [
        *percentiles(f"pod created to its first allowed answer{among}", from_creation, PERCENTS),
        *percentiles(f"pod's first question to its first allowed answer{among}", from_question, PERCENTS),
    ]


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
