"""How long encryption takes to come: from `kubectl apply` to all of three nodes, and to a node that joins.
In a lab of its own, with everything a cluster has but the machines."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentiles

from meshwire.api import conditions, names
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube.client import Client
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

CYCLES: Final = 10
NODES: Final = 3
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
STATUS_PATH: Final = f"/apis/{names.API_VERSION}/{names.MESHSTATUSES}/{names.STATUS_NAME}"


def measure() -> list[Figure]:
    """In namespaces of its own (bench.isolated). About four minutes. Raises LabError, and TimeoutError where
    a state does not come within a minute."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=NODES))
        try:
            return [*_switch(lab), *_join(lab)]
        finally:
            lab.down()


def _switch(lab: Lab) -> list[Figure]:
    """Ends with encryption on."""
    on, off = [], []
    for cycle in range(CYCLES):
        if cycle:
            off.append(_apply(lab, enabled=False))
        on.append(_apply(lab, enabled=True))
    return [
        *percentiles(f"kubectl apply to encrypted on all of {NODES} nodes", on),
        *percentiles(f"kubectl apply to plaintext and cleaned up on all of {NODES} nodes", off),
    ]


def _apply(lab: Lab, *, enabled: bool) -> float:
    """Seconds from before kubectl starts until the MeshStatus says that all nodes have done it."""
    began = time.monotonic()
    lab.apply(
        {
            "apiVersion": names.API_VERSION,
            "kind": "MeshConfig",
            "metadata": {"name": names.CONFIG_NAME},
            "spec": {"encryption": {"enabled": enabled}},
        }
    )
    return _wait(lab, Phase.ENFORCING if enabled else Phase.OFF, nodes=NODES) - began


def _join(lab: Lab) -> list[Figure]:
    """A node that is added to an encrypted cluster, and taken away again."""
    whole, registered = [], []
    for number in range(CYCLES):
        name = f"joining{number + 1}"
        began = time.monotonic()
        lab.add_node(name, wait=False)
        seen = _wait_for_node(lab, name)
        done = _wait(lab, Phase.ENFORCING, nodes=NODES + 1)
        whole.append(done - began)
        registered.append(done - seen)
        lab.remove_node(name)
        _wait(lab, Phase.ENFORCING, nodes=NODES)
    return [
        *percentiles("node added (its machine made, agent started) to encrypted with all others", whole),
        *percentiles("node registered to encrypted with all others", registered),
    ]


def _wait(lab: Lab, phase: Phase, *, nodes: int) -> float:
    """When (time.monotonic) the operator says that all of so many nodes are in this phase."""

    def is_there(status: MeshStatus) -> bool:
        return (
            status.phase is phase
            and status.nodes == status.nodes_ready == nodes
            and conditions.is_true(status.conditions, conditions.READY, generation=0)
        )

    async def watch(client: Client) -> float:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = await client.find(STATUS_PATH)
            if found and is_there(MeshStatus.from_object(found)):
                return time.monotonic()
            await asyncio.sleep(POLL_SECONDS)
        raise TimeoutError(f"not {phase} on {nodes} nodes within {WAIT_SECONDS:.0f} s: {found}")

    return lab.call(watch)


def _wait_for_node(lab: Lab, name: str) -> float:
    """When (time.monotonic) the Node object was there."""

    async def watch(client: Client) -> float:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if await client.find(f"/api/v1/nodes/{name}"):
                return time.monotonic()
            await asyncio.sleep(POLL_SECONDS)
        raise TimeoutError(f"no Node {name} within {WAIT_SECONDS:.0f} s")

    return lab.call(watch)
