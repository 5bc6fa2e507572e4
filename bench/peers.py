"""A thousand peers: how long from API objects to a device that has them all, and to one that has one
changed.

Run as root, in a network and mount namespace of its own: it makes a device, and pins maps, under Meshwire's
own names."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, Final, TypeVar

from nacl.bindings import crypto_scalarmult_base

from meshwire.agent import userspace
from meshwire.agent.kernel import Kernel
from meshwire.agent.loop import Look, observe_and_plan
from meshwire.agent.pairs import Pairs
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World
from meshwire.api.meshconfig import Encryption, MeshConfig
from meshwire.api.meshnode import Key, Phase, Spec
from meshwire.api.preshared import digest
from meshwire.encryption.desired import Inputs, desired
from meshwire.encryption.health import find_pairs, find_source
from meshwire.encryption.keys import public_key
from meshwire.encryption.model import ClusterNode, HeldKey, Member, SecretKey
from meshwire.encryption.plan import LoadDatapath, Plan, plan
from meshwire.encryption.question import question

T = TypeVar("T")

EPOCH_SECRET: Final = SecretKey(sha256(b"epoch").digest())


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    desired: float
    plan: float
    observe: float
    apply: float

    @property
    def total(self) -> float:
        return self.desired + self.plan + self.observe + self.apply


def make_world(peers: int) -> tuple[World, HeldKey]:
    """Node `n0` and its peers, dual stack, one pod CIDR a family each."""
    secret = SecretKey(sha256(b"n0").digest())
    nodes, members = {}, {}
    for number in range(peers + 1):
        name = f"n{number}"
        raw = secret.reveal() if number == 0 else sha256(name.encode()).digest()
        addresses = (IPv4Address(0xC6120001 + number), IPv6Address((0xFD00 << 112) + 1 + number))
        cidrs = (
            ip_network((0x0A000000 + (number << 8), 24)),
            ip_network(((0xFD01 << 112) + (number << 64), 64)),
        )
        spec = Spec(
            id=number + 1,
            addresses=addresses,
            pod_cidrs=cidrs,
            keys=(
                Key(
                    epoch=1,
                    public_key=b64encode(crypto_scalarmult_base(raw)).decode(),
                    secret_digest=digest(EPOCH_SECRET.reveal(), 1),
                ),
            ),
            phase=Phase.ENFORCING,
            epoch=1,
        )
        members[name] = Member(name=name, created="2026-01-01T00:00:00Z", generation=1, spec=spec)
        nodes[name] = ClusterNode(name=name, ready=True, addresses=addresses, pod_cidrs=cidrs)
    world = World(members=members, nodes=nodes, config=MeshConfig(encryption=Encryption(enabled=True)))
    return world, HeldKey(1, public_key(secret), secret, EPOCH_SECRET)


def change_one(world: World) -> World:
    """One peer gets another pod CIDR."""
    member = world.members["n1"]
    spec = replace(member.spec, pod_cidrs=(*member.spec.pod_cidrs, ip_network("10.200.0.0/24")))
    return replace(world, members={**world.members, "n1": replace(member, spec=spec)})


def measure(peers: int = 1000) -> dict[str, Any]:
    """Milliseconds for a fresh device and for one changed peer, and whether a further look finds nothing to
    do. With the kernel's WireGuard where there is one, else through the UAPI socket."""
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
        world, held = make_world(peers)
        try:
            kernel.apply(LoadDatapath())
            fresh, _ = _converge(kernel, world, held)
            changed, todo = _converge(kernel, change_one(world), held)
            after = _look(kernel, change_one(world), held)
            return {
                "peers": peers,
                "implementation": str(after.observed.implementation),
                "fresh_ms": _milliseconds(fresh),
                "one_changed_ms": _milliseconds(changed),
                "actions_for_one_changed": [str(action) for action in todo],
                "further_actions": len(after.todo),
                "watching": _watch(kernel, after),
            }
        finally:
            _remove_all(kernel, world, held)
            kernel.close()


def _converge(kernel: Kernel, world: World, held: HeldKey) -> tuple[Timing, Plan]:
    config = world.config
    assert isinstance(config, MeshConfig)
    for_observe, observed = _timed(lambda: kernel.observe(config.encryption.userspace))
    inputs = Inputs(
        node="n0",
        members=world.members,
        nodes=world.nodes,
        config=config,
        held={held.epoch: held},
        links=observed.links,
        routes=observed.routes,
        implementation=observed.implementation,
    )
    for_desired, wanted = _timed(lambda: desired(inputs))
    assert wanted is not None
    for_plan, todo = _timed(lambda: plan(wanted, observed))
    for_apply, _ = _timed(lambda: _apply(kernel, todo))
    return Timing(for_desired, for_plan, for_observe, for_apply), todo


def _apply(kernel: Kernel, todo: Plan) -> None:
    for action in todo:
        kernel.apply(action)


def _look(kernel: Kernel, world: World, held: HeldKey) -> Look:
    return observe_and_plan(kernel, "n0", world, held={held.epoch: held}, last_good=None)


def _watch(kernel: Kernel, look: Look) -> dict[str, float]:
    """What it costs to see whether all peers are there. `cpu_percent`: of one CPU, for the agent, where no
    peer ever answers, so that each is asked as often as can be."""
    wanted, seen, watch = look.desired, look.observed, Pairs(kernel)
    assert wanted
    watch.look(wanted, seen, ())
    looks = [_timed(lambda: watch.look(wanted, seen, ()))[0] for _ in range(9)]
    found = find_pairs(wanted, seen)
    targets = [pair.peer.endpoint.address for pair in found if pair.peer.endpoint]
    source = find_source(wanted, 4)
    assert source and len(targets) == len(found)

    def ask() -> None:
        for pair, target in zip(found, targets, strict=True):
            kernel.ask(pair.device.name, question(source, target))

    asking = _timed(ask)[0]
    cost = median(looks) / watch.pace.look + asking / watch.pace.ask_again
    return {
        "pairs": len(found),
        "look_ms": round(1000 * median(looks), 1),
        "ask_all_ms": round(1000 * asking, 1),
        "seconds_between_looks": watch.pace.look,
        "questions_per_second": round(len(found) / watch.pace.ask_again, 1),
        "cpu_percent": round(100 * cost, 2),
        "detection_seconds": watch.pace.detection,
    }


def _remove_all(kernel: Kernel, world: World, held: HeldKey) -> None:
    own = world.members["n0"]
    off = replace(world, members={"n0": replace(own, spec=replace(own.spec, phase=Phase.OFF))})
    for action in _look(kernel, off, held).todo:
        kernel.apply(action)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {
        name: round(1000 * getattr(timing, name), 1)
        for name in ("desired", "plan", "observe", "apply", "total")
    }


@contextmanager
def _supervisor(run_directory: Path) -> Iterator[None]:
    """Serves userspace devices from a thread, until the process ends."""
    Thread(target=userspace.serve, args=(run_directory,), daemon=True).start()
    deadline = time.monotonic() + 5
    while not userspace.available(run_directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield


if __name__ == "__main__":
    json.dump(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), sys.stdout, indent=2)
    print()
