"""Fifty thousand pods on nodes without pod CIDR: what the agent needs for their single addresses, and how
long it takes until one that comes, goes or moves is as it should be.

Run as root, in a network and mount namespace of its own: it makes a device, and pins maps, under Meshwire's
own names."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

from bench.peers import _remove_all, _supervisor, make_world

from meshwire.agent.kernel import Kernel, Part
from meshwire.agent.loop import observe_and_plan
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World, parse_slice
from meshwire.encryption.model import HeldKey
from meshwire.encryption.plan import LoadDatapath, Plan
from meshwire.encryption.pods import PodAddresses

PODS_PER_SLICE = 100
CLUSTER = (ip_network("10.0.0.0/8"), ip_network("fd01::/16"))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. `slice`: from the parsed MeshEndpointSlice to a snapshot; `look` and `apply` are the loop's,
    `again` the look that finds nothing more to do."""

    slice: float
    look: float
    apply: float
    again: float

    @property
    def total(self) -> float:
        return self.slice + self.look + self.apply + self.again


def make_slice(number: int, nodes: int, moved: int = 0) -> dict[str, Any]:
    """As the API server gives it; the first pod is `moved` so many nodes on."""
    pods = range(number * PODS_PER_SLICE, (number + 1) * PODS_PER_SLICE)
    return {
        "metadata": {"name": f"meshwire-{number}"},
        "spec": {
            "endpoints": [
                {
                    "addresses": [
                        str(IPv4Address(0x0A000001 + pod)),
                        str(IPv6Address((0xFD01 << 112) + 1 + pod)),
                    ],
                    "identity": 256 + pod % 200,
                    "node": f"n{(pod + (moved if pod % PODS_PER_SLICE == 0 else 0)) % nodes}",
                    "pod": {"namespace": f"ns-{pod % 50}", "name": f"pod-{pod}", "uid": f"uid-{pod}"},
                }
                for pod in pods
            ]
        },
    }


def without_cidrs(world: World) -> World:
    members = {
        name: replace(member, spec=replace(member.spec, pod_cidrs=(), cluster_cidrs=CLUSTER))
        for name, member in world.members.items()
    }
    nodes = {name: replace(node, pod_cidrs=()) for name, node in world.nodes.items()}
    return replace(world, members=members, nodes=nodes)


def measure(pods: int = 50_000, nodes: int = 1000) -> dict[str, Any]:
    """With the kernel's WireGuard where there is one, else through the UAPI socket, which another process
    serves but for a thread that only passes it on."""
    with tempfile.TemporaryDirectory() as directory, _supervisor(Path(directory)):
        settings = Settings(
            node="n0",
            namespace="",
            state_directory=Path(directory),
            pin_directory=Path("/sys/fs/bpf/meshwire"),
            run_directory=Path(directory),
            proc_sys=Path("/proc/sys"),
            metrics_address=("", 0),
        )
        kernel = Kernel(settings)
        base, held = make_world(nodes - 1)
        world = without_cidrs(base)
        addresses = PodAddresses()
        try:
            kernel.apply(LoadDatapath())
            _settle(kernel, world, held)
            before = _resident_mib()
            for number in range(pods // PODS_PER_SLICE):
                addresses.put_slice(*parse_slice(make_slice(number, nodes)))
            told = _resident_mib()
            world = replace(world, pods=addresses.snapshot())
            started = time.perf_counter()
            _settle(kernel, world, held)
            fresh = time.perf_counter() - started
            in_place = _resident_mib()
            read_started = time.perf_counter()
            _look(kernel, world, held, Part.ALL)
            read = time.perf_counter() - read_started
            changes = {}
            for name, content in {
                "goes": _without_first(make_slice(7, nodes)),
                "comes": make_slice(7, nodes),
                "moves": make_slice(7, nodes, moved=1),
            }.items():
                times, todo, world = _change(kernel, world, held, addresses, content)
                changes[f"one_{name}_ms"] = {
                    part: round(1000 * getattr(times, part), 1)
                    for part in ("slice", "look", "apply", "again", "total")
                } | {"actions": [str(action) for action in todo]}
            return {
                "pods": pods,
                "nodes": nodes,
                "resident_before_mib": before,
                "resident_told_mib": told,
                "resident_in_place_mib": in_place,
                "resident_at_the_end_mib": _resident_mib(),
                "all_of_them_ms": round(1000 * fresh, 1),
                "look_at_everything_ms": round(1000 * read, 1),
                **changes,
            }
        finally:
            _remove_all(kernel, world, held)
            kernel.close()


def _change(
    kernel: Kernel, world: World, held: HeldKey, addresses: PodAddresses, content: dict[str, Any]
) -> tuple[Times, Plan, World]:
    parsed = parse_slice(content)
    started = time.perf_counter()
    addresses.put_slice(*parsed)
    world = replace(world, pods=addresses.snapshot())
    sliced = time.perf_counter()
    todo = _look(kernel, world, held)
    looked = time.perf_counter()
    for action in todo:
        kernel.apply(action)
    applied = time.perf_counter()
    assert not _look(kernel, world, held)
    again = time.perf_counter()
    return Times(sliced - started, looked - sliced, applied - looked, again - applied), todo, world


def _look(kernel: Kernel, world: World, held: HeldKey, fresh: Part = Part.NONE) -> Plan:
    return observe_and_plan(kernel, "n0", world, held={held.epoch: held}, last_good=None, fresh=fresh).todo


def _settle(kernel: Kernel, world: World, held: HeldKey) -> None:
    for _ in range(4):
        todo = _look(kernel, world, held, Part.NONE)
        if not todo:
            return
        for action in todo:
            kernel.apply(action)
    raise RuntimeError(f"it does not settle: {[str(action) for action in todo]}")


def _without_first(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "spec": {"endpoints": content["spec"]["endpoints"][1:]}}


def _resident_mib() -> float:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


if __name__ == "__main__":
    json.dump(measure(*map(int, sys.argv[1:])), sys.stdout, indent=2)
    print()
