"""What the operator thinks grows in proportion with the nodes: among a thousand, work by pairs of nodes
would take it longer than its lease lasts."""

from __future__ import annotations

import sys
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from meshwire.api import conditions
from meshwire.api.conditions import Condition
from meshwire.api.meshconfig import Encryption, KeyRotation, MeshConfig
from meshwire.api.meshnode import Key, MeshNode, Phase, Spec, Status, Unreachable
from meshwire.api.meshstatus import MeshStatus, Rotation
from meshwire.operator.objects import Config, EpochSecret, KeySecret, Node
from meshwire.operator.reconcile import Inputs, WriteConfigStatus, reconcile

START = "2026-01-01T00:00:00Z"
FEW, MANY = 40, 160


def text(of: str) -> str:
    return b64encode(sha256(of.encode()).digest()).decode()


def key(name: str, epoch: int) -> Key:
    return Key(epoch=epoch, public_key=text(f"{name} {epoch}"), secret_digest=text(f"epoch {epoch}"))


def cluster(count: int, spec: Spec, status: Callable[[int], Status], *, dead: int = 0) -> Inputs:
    """Nodes that all have the order and the keys of this spec; the first `dead` are not live."""
    nodes, mesh_nodes, secrets = {}, {}, {}
    epochs = [spec.epoch, *([spec.retiring] if spec.retiring else [])]
    for number in range(1, count + 1):
        name = f"node-{number:04}"
        nodes[name] = Node(
            name=name,
            uid=f"node {number}",
            created=START,
            live=number > dead,
            addresses=(IPv4Address("198.18.0.0") + number,),
            pod_cidrs=(IPv4Network((int(IPv4Address("10.0.0.0")) + (number << 8), 24)),),
        )
        keys = tuple(key(name, epoch) for epoch in sorted(epochs))
        ready = Condition(
            type=conditions.READY, status=True, reason="Ready", observed_generation=2, since=START
        )
        mesh_nodes[name] = MeshNode(
            name=name,
            uid=f"mesh node {number}",
            owner=f"node {number}",
            generation=2,
            created=START,
            spec=replace(
                spec, id=number, addresses=nodes[name].addresses, pod_cidrs=nodes[name].pod_cidrs, keys=keys
            ),
            status=replace(
                status(number),
                observed_generation=2,
                sealing_key=text(f"seal {number}"),
                peers=count - 1,
                conditions=(ready,),
            ),
        )
        secrets[name] = KeySecret(
            node=name,
            uid=f"secret {number}",
            owner=f"mesh node {number}",
            sealed_to=text(f"seal {number}"),
            keys=keys,
        )
    rotation = KeyRotation(interval=timedelta(), overlap=timedelta(seconds=5))
    return Inputs(
        nodes=nodes,
        mesh_nodes=mesh_nodes,
        secrets=secrets,
        config=Config(
            uid="config",
            resource_version="1",
            generation=1,
            config=MeshConfig(encryption=Encryption(enabled=True, key_rotation=rotation)),
        ),
        status=MeshStatus(
            phase=spec.phase,
            epoch=spec.epoch,
            epoch_started_at=START,
            rotation=Rotation(from_epoch=spec.retiring, started_at=START) if spec.retiring else None,
        ),
        found_cidrs=(),
        recent_ids=(),
        now=datetime(2026, 1, 1, 1, tzinfo=UTC),
        epoch_secrets={
            str(epoch): EpochSecret(epoch=epoch, uid=f"epoch {epoch}", digest=text(f"epoch {epoch}"))
            for epoch in epochs
        },
    )


ENABLING = Spec(phase=Phase.ENABLING, epoch=1)
ENFORCING = Spec(phase=Phase.ENFORCING, epoch=1)
ROTATING = Spec(phase=Phase.ENFORCING, epoch=2, retiring=1)


def moved(epoch: int, **more: Any) -> Callable[[int], Status]:
    return lambda number: Status(prepared_epoch=epoch, active_epoch=epoch, strict=True, **more)


def waits_for_the_last(number: int) -> Status:
    """Of a rotation; who waits names who is not there yet."""
    return Status(prepared_epoch=2, active_epoch=1, strict=True, unreached=tuple(range(1, 9)))


def hears_nothing_of_some(number: int) -> Status:
    some = tuple(Unreachable(node=f"node-{each:04}", since=START, reason="Silent") for each in range(21, 25))
    return Status(prepared_epoch=1, active_epoch=1, strict=True, unreachable=some, unreachable_count=4)


CASES: dict[str, Callable[[int], Inputs]] = {
    "all have moved into the tunnels": lambda count: cluster(count, ENABLING, moved(1)),
    "nobody has": lambda count: cluster(count, ENABLING, moved(0)),
    "at rest": lambda count: cluster(count, ENFORCING, moved(1)),
    "some pairs are dead": lambda count: cluster(count, ENFORCING, hears_nothing_of_some),
    "a rotation has just begun": lambda count: cluster(count, ROTATING, moved(1)),
    "all wait for the last": lambda count: cluster(count, ROTATING, waits_for_the_last),
    "all have moved but to the dead": lambda count: cluster(
        count, ROTATING, moved(2, unreached=tuple(range(1, 9))), dead=8
    ),
    "on the way to off": lambda count: cluster(count, Spec(phase=Phase.DRAINING, epoch=1), moved(1)),
}


def work(inputs: Inputs) -> int:
    """Python's calls, each step of a generator among them, and calls of what is built in."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        reconcile(inputs)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("case", CASES)
def test_thinking_grows_with_the_nodes_not_with_their_pairs(case: str) -> None:
    few, many = (work(CASES[case](count)) for count in (FEW, MANY))
    assert many / few < 1.15 * MANY / FEW


def test_without_nodes_nothing_is_written_again_and_again() -> None:
    """Nobody can be ordered to encrypt, and no epoch is used up by that."""
    inputs = replace(cluster(0, ENABLING, moved(1)), status=None, epoch_secrets={})
    for _ in range(3):
        plan = reconcile(inputs)
        assert inputs.config is not None
        accepted = next(
            (each.conditions for each in plan.actions if isinstance(each, WriteConfigStatus)), ()
        )
        inputs = replace(
            inputs,
            status=plan.status,
            config=replace(inputs.config, conditions=accepted or inputs.config.conditions),
        )
    assert not plan.actions and plan.status.epoch == 0 and plan.status.phase is Phase.OFF
    joined = reconcile(
        replace(cluster(1, ENABLING, moved(1)), mesh_nodes={}, secrets={}, status=plan.status)
    )
    assert joined.status.phase is Phase.ENABLING
