"""When pods may come to a node that registered with the start-up taint."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.test_lost_disk import SEALS_OLD, cluster

from meshwire.api.conditions import Condition
from meshwire.api.meshconfig import Encryption, MeshConfig, PolicySettings
from meshwire.api.meshnode import Status
from meshwire.operator.objects import Config
from meshwire.operator.reconcile import LiftTaint, reconcile
from meshwire.operator.summary import Pressure

JUDGES = Pressure(True, {}, frozenset({"a"}))
OTHERS_JUDGE = Pressure(True, {}, frozenset({"b"}))


def is_lifted(
    *,
    ready: bool = True,
    generation: int = 1,
    quarantined: bool = False,
    policy: bool = False,
    pressure: Pressure | None = None,
    readable: bool = True,
) -> bool:
    inputs = cluster()
    condition = Condition(
        type="Ready",
        status=ready,
        reason="Ready" if ready else "Preparing",
        observed_generation=generation,
        since="2026-01-01T00:00:00Z",
    )
    node = inputs.mesh_nodes["a"]
    status = Status(
        observed_generation=generation,
        sealing_key=SEALS_OLD,
        active_epoch=1,
        strict=True,
        conditions=(condition,),
    )
    config = MeshConfig(
        generation=1, encryption=Encryption(enabled=True), policy=PolicySettings(enabled=policy)
    )
    inputs = replace(
        inputs,
        nodes={"a": replace(inputs.nodes["a"], tainted=True)},
        mesh_nodes={"a": replace(node, status=status, spec=replace(node.spec, quarantined=quarantined))},
        config=Config(
            uid="config",
            resource_version="1",
            generation=1,
            config=config if readable else None,
            problem="" if readable else "can't be read",
        ),
        pressure=pressure,
    )
    return LiftTaint("a") in reconcile(inputs).actions


def test_pods_may_come_when_what_is_asked_for_is_in_force() -> None:
    assert is_lifted()
    assert is_lifted(policy=True, pressure=JUDGES)


@pytest.mark.parametrize(
    "case",
    [
        {"ready": False},
        {"generation": 0},
        {"quarantined": True},
        {"readable": False},
        {"policy": True},
        {"policy": True, "pressure": OTHERS_JUDGE},
        {"policy": True, "pressure": JUDGES, "ready": False},
    ],
    ids=[
        "no datapath",
        "of an order before",
        "quarantined",
        "nobody knows what is wanted",
        "nobody knows who judges",
        "doesn't judge yet",
        "judges, and doesn't encrypt",
    ],
)
def test_until_then_they_wait(case: dict[str, object]) -> None:
    assert not is_lifted(**case)  # type: ignore[arg-type]
