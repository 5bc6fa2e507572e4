"""What an agent takes in a cluster of a thousand nodes: a real API server that holds their Nodes and
MeshNodes, one real agent with its WireGuard device. The other nodes are objects only."""

from __future__ import annotations

import asyncio
import tempfile
import time
from base64 import b64encode
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Final

from bench.figures import Figure
from nacl.bindings import crypto_scalarmult_base

from meshwire.api import names
from meshwire.api.meshnode import MeshNode, Phase
from meshwire.kube.client import Client
from meshwire.lab import processes
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

NODES: Final = 1000
WAIT_SECONDS: Final = 120.0
QUIET_SECONDS: Final = 10.0
"""How long the memory has to stay within QUIET_KIB until it counts as settled."""
QUIET_KIB: Final = 512
CONCURRENCY: Final = 16
MESHNODES: Final = f"/apis/{names.API_VERSION}/{names.MESHNODES}"
MIB: Final = 1024
NODE: Final = "node1"
"""The lab's own."""


def measure(nodes: int = NODES) -> list[Figure]:
    """In namespaces of its own (bench.isolated). About two minutes. Raises LabError, and TimeoutError where
    the agent does not take them all up."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=1))
        try:
            return _measure(lab, nodes)
        finally:
            lab.down()


def _measure(lab: Lab, nodes: int) -> list[Figure]:
    spec = {"encryption": {"enabled": True}}
    lab.apply(
        {
            "apiVersion": names.API_VERSION,
            "kind": "MeshConfig",
            "metadata": {"name": names.CONFIG_NAME},
            "spec": spec,
        }
    )
    lab.call(lambda client: wait_for_peers(client, 0))
    alone = settled(agent_pid(lab))
    # The operator would find that these nodes have no agents, the node controller that they have no kubelet.
    lab.stop_operator()
    processes.stop(lab.paths, "controller-manager")
    lab.call(lambda client: create_all(client, nodes - 1))
    lab.call(lambda client: wait_for_peers(client, nodes - 1))
    grown = settled(agent_pid(lab))
    # An agent that starts gets everything in lists, not one by one.
    lab.restart_agent(NODE)
    started = settled(agent_pid(lab))
    return [
        Figure(name="agent, resident, alone", value=alone / MIB, unit="MiB"),
        Figure(
            name=f"agent, resident, {nodes} nodes, after they joined",
            value=grown / MIB,
            unit="MiB",
            spread=f"{(grown - alone) / (nodes - 1):.1f} KiB per node",
            goal="at most 80",
        ),
        Figure(
            name=f"agent, resident, {nodes} nodes, after a restart",
            value=started / MIB,
            unit="MiB",
            spread=f"peak {status_kib(agent_pid(lab), 'VmHWM') / MIB:.1f}",
            goal="at most 80",
        ),
    ]


def agent_pid(lab: Lab) -> int:
    pid = lab.pid(f"{NODE}.agent")
    if pid is None:
        raise RuntimeError(f"the agent does not run: {lab.log(f'{NODE}.agent').read_text()[-1000:]}")
    return pid


async def wait_for_peers(client: Client, peers: int) -> None:
    """Until the agent reports epoch 1 in place with so many peers."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if found := await client.find(f"{MESHNODES}/{NODE}"):
            node = MeshNode.from_object(found)
            if (
                node.spec.phase is Phase.ENFORCING
                and node.status.active_epoch
                and node.status.peers == peers
            ):
                return
        await asyncio.sleep(0.5)
    raise TimeoutError(f"the agent has not taken up {peers} peers within {WAIT_SECONDS:.0f} s: {found}")


async def create_all(client: Client, count: int) -> None:
    """A Node and a MeshNode each, as they are in a running cluster."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def create(number: int) -> None:
        async with gate:
            node, meshnode = make_objects(number)
            created = await client.create("/api/v1/nodes", node)
            owner = {
                "apiVersion": "v1",
                "kind": "Node",
                "name": created["metadata"]["name"],
                "uid": created["metadata"]["uid"],
            }
            meshnode["metadata"]["ownerReferences"] = [owner]
            await client.create(MESHNODES, meshnode)
            path = f"{MESHNODES}/{meshnode['metadata']['name']}/status"
            await client.patch(path, {"status": meshnode["status"]})

    await asyncio.gather(*(create(number) for number in range(count)))


def make_objects(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Node and the MeshNode of the NUMBERth other node, dual stack, with what kubelets write besides."""
    name = f"worker-{number:04}.example.internal"
    addresses = [str(IPv4Address("198.18.16.1") + number), str(IPv6Address("fd00:198:18:1::1") + number)]
    cidrs = [
        str(IPv4Network((int(IPv4Address("10.245.0.0")) + (number << 8), 24))),
        str(IPv6Network((int(IPv6Address("fd00:10:245::")) + (number << 64), 64))),
    ]
    now = "2026-01-01T00:00:00Z"
    pressures = [
        {
            "type": type,
            "status": "False",
            "reason": f"KubeletHasNo{type}",
            "message": f"kubelet has no {type}",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        for type in ("MemoryPressure", "DiskPressure", "PIDPressure")
    ]
    ready = {**pressures[0], "type": "Ready", "status": "True", "reason": "KubeletReady"}
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "topology.kubernetes.io/zone": f"zone-{number % 3}",
                "node.kubernetes.io/instance-type": "standard-8",
            },
        },
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": address} for address in addresses),
                {"type": "Hostname", "address": name},
            ],
            "capacity": {"cpu": "8", "memory": "32Gi", "pods": "110"},
            "allocatable": {"cpu": "8", "memory": "32Gi", "pods": "110"},
            "conditions": [*pressures, ready],
            # What makes Nodes large: 50 images of two names each.
            "images": [
                {
                    "names": [
                        f"registry.example/team/service-{image}@sha256:{sha256(bytes([image])).hexdigest()}",
                        f"registry.example/team/service-{image}:v1.{image}.0",
                    ],
                    "sizeBytes": 100_000_000 + image,
                }
                for image in range(50)
            ],
        },
    }
    key, sealing_key = (
        b64encode(crypto_scalarmult_base(sha256(f"{name} {use}".encode()).digest())).decode()
        for use in ("key", "sealing key")
    )
    meshnode = {
        "apiVersion": names.API_VERSION,
        "kind": "MeshNode",
        "metadata": {"name": name},
        "spec": {
            "id": number + 1000,
            "addresses": addresses,
            "podCIDRs": cidrs,
            "clusterCIDRs": ["10.244.0.0/14", "fd00:10:244::/46"],
            "keys": [{"epoch": 1, "publicKey": key}],
            "encryption": {"phase": "Enforcing", "epoch": 1},
        },
        "status": {
            "observedGeneration": 1,
            "sealingKey": sealing_key,
            "implementation": "Kernel",
            "preparedEpoch": 1,
            "activeEpoch": 1,
            "strict": True,
            "peers": NODES - 1,
            "handshakes": NODES - 1,
            "leaked": 0,
            "dropped": 0,
            "agentVersion": "0.1.0",
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True",
                    "reason": "Ready",
                    "message": "epoch 1 carries all traffic to other nodes' pods",
                    "observedGeneration": 1,
                    "lastTransitionTime": now,
                }
            ],
        },
    }
    return node, meshnode


def settled(pid: int) -> int:
    """Resident KiB once it no longer changes; at the latest after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    reference, since = status_kib(pid, "VmRSS"), time.monotonic()
    while time.monotonic() < min(deadline, since + QUIET_SECONDS):
        time.sleep(0.5)
        now = status_kib(pid, "VmRSS")
        if abs(now - reference) > QUIET_KIB:
            reference, since = now, time.monotonic()
    return status_kib(pid, "VmRSS")


def status_kib(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
