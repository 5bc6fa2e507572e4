"""The operator among 50,000 pods: its memory and processor time, and how long a new pod takes to be
published to the agents, in a cluster at rest and while five more come every second. A real API server holds
the pods; their nodes are names only. It takes longer than all other parts, so it is measured on demand
alone: `python -m bench publishing` (root)."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from bench.figures import Figure, percentiles
from bench.memory import settled, status_kib
from bench.scale import (
    APPS,
    MIB,
    NAMESPACES,
    NODES,
    PODS_PER_NODE,
    SLICES,
    apply_settings,
    pod_cidrs_of,
    pod_labels,
    pss_kib,
    seconds_of_cpu,
    wait_until_usable,
)

from meshwire.kube.client import Client, Object
from meshwire.lab import processes
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

WAIT_SECONDS: Final = 600.0
CHANGES: Final = 20
REST_SECONDS: Final = 5.0
"""Between single changes: longer than the operator rests after a look."""
CHURN: Final = 100
CHURN_PER_SECOND: Final = 5
CONCURRENCY: Final = 32


def measure(nodes: int = NODES) -> list[Figure]:
    """In namespaces of its own (bench.isolated). About ten minutes. Raises LabError, and TimeoutError where
    something is not published."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=1))
        try:
            return _measure(lab, nodes)
        finally:
            lab.down()


def _measure(lab: Lab, nodes: int) -> list[Figure]:
    apply_settings(lab)
    lab.call(wait_until_usable)
    # The node controller would delete pods of nodes that aren't there.
    processes.stop(lab.paths, "controller-manager")
    lab.stop_operator()
    count = nodes * PODS_PER_NODE
    lab.call(lambda client: _create_all(client, count))
    lab.start_operator()
    began = time.monotonic()
    lab.call(lambda client: _wait_until_published(client, count))
    published = time.monotonic() - began
    pid = lab.pid("operator")
    assert pid is not None
    start = seconds_of_cpu(pid)
    resident = settled(pid)
    figures = [
        Figure(
            name=f"operator, resident, {count:,} pods",
            value=resident / MIB,
            unit="MiB",
            spread=f"PSS {pss_kib(pid) / MIB:.1f}, peak {status_kib(pid, 'VmHWM') / MIB:.1f}",
        ),
        Figure(
            name=f"operator's start to all of {count:,} pods published",
            value=published,
            unit="s",
            spread=f"{start:.1f} s of CPU",
        ),
    ]
    before = seconds_of_cpu(pid)
    time.sleep(REST_SECONDS)
    idle = 1000 * (seconds_of_cpu(pid) - before) / REST_SECONDS
    figures.append(Figure(name="operator, CPU, idle", value=idle, unit="ms per s"))
    single, cpu = lab.call(lambda client: _one_by_one(client, pid, count))
    figures += percentiles("pod has its address to published", single, (50, 95, 99))
    figures.append(
        Figure(
            name="pod published: operator's CPU",
            value=1000 * statistics.median(cpu),
            unit="ms",
            spread=f"median of {len(cpu)}",
        )
    )
    churn = lab.call(lambda client: _churning(client, count + CHANGES))
    figures += percentiles(
        f"pod has its address to published, {CHURN_PER_SECOND} a second", churn, (50, 95, 99)
    )
    return figures


async def _create_all(client: Client, count: int) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def create(number: int) -> None:
        async with gate:
            await _create(client, number)

    for at in range(0, count, 1000):
        await asyncio.gather(*(create(number) for number in range(at, min(at + 1000, count))))


async def _create(client: Client, number: int) -> str:
    """A pod that runs; its first address."""
    pod = _pod(number)
    path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
    await client.create(path, pod)
    # Beyond the first fifty of each node are those that come later.
    node, place = number % (NODES - 1), number // (NODES - 1)
    addresses = [str(cidr[10 + place]) for cidr in pod_cidrs_of(node)]
    status = {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    await client.patch(f"{path}/{pod['metadata']['name']}/status", {"status": status})
    return addresses[0]


def _pod(number: int) -> Object:
    namespace, app = divmod(number * 7 % (NAMESPACES * APPS), APPS)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"service-{app}-6d4cf56db6-{number:05x}",
            "namespace": f"team-{namespace:02}",
            "labels": pod_labels(app),
        },
        "spec": {
            "nodeName": f"worker-{number % (NODES - 1):04}.example.internal",
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "it", "image": "registry.example/team/service:v1.0.0"}],
        },
    }


async def _wait_until_published(client: Client, count: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        page = await client.get(SLICES, limit="1")
        slices = len(page["items"]) + (page["metadata"].get("remainingItemCount") or 0)
        if slices >= count / 100:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{slices} slices for {count} pods after {WAIT_SECONDS:.0f} s")
        await asyncio.sleep(1)


class _Published:
    """When (time.monotonic) each address came to be in a slice."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self.news = asyncio.Event()

    async def follow(self, client: Client, version: str) -> None:
        async for _, item in client.watch(SLICES, resourceVersion=version):
            now = time.monotonic()
            for endpoint in item.get("spec", {}).get("endpoints", ()):
                self.at.setdefault(endpoint["addresses"][0], now)
            self.news.set()

    async def wait(self, address: str) -> float:
        async with asyncio.timeout(WAIT_SECONDS):
            while address not in self.at:
                self.news.clear()
                await self.news.wait()
        return self.at[address]


async def _follow(client: Client) -> tuple[_Published, asyncio.Task[None]]:
    published = _Published()
    version = (await client.get(SLICES, limit="1"))["metadata"]["resourceVersion"]
    return published, asyncio.create_task(published.follow(client, version))


async def _one_by_one(client: Client, pid: int, first: int) -> tuple[list[float], list[float]]:
    """Seconds from the pod having its address to a slice having it, and of the operator's CPU."""
    published, task = await _follow(client)
    seconds, cpu = [], []
    try:
        for number in range(first, first + CHANGES):
            await asyncio.sleep(REST_SECONDS)
            spent = seconds_of_cpu(pid)
            address = await _create(client, number)
            began = time.monotonic()
            seconds.append(await published.wait(address) - began)
            await asyncio.sleep(REST_SECONDS)
            cpu.append(seconds_of_cpu(pid) - spent)
    finally:
        task.cancel()
    return seconds, cpu


async def _churning(client: Client, first: int) -> list[float]:
    published, task = await _follow(client)

    async def one(number: int) -> float:
        await asyncio.sleep((number - first) / CHURN_PER_SECOND)
        address = await _create(client, number)
        began = time.monotonic()
        return await published.wait(address) - began

    try:
        found: list[Any] = await asyncio.gather(*(one(number) for number in range(first, first + CHURN)))
        return found
    finally:
        task.cancel()
