"""Many nodes' agents in one process, for measurements of what is on the API server's side: the agents' own
code but for the kernel, which bench.simulated shows them. Their Nodes are made first; each agent has a token
of its own, bound to its Node.

    python -m bench.agents KUBECONFIG NODES

A line on stdin is answered by one of JSON (Totals); the end of stdin ends it."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
from bench.memory import make_objects
from bench.simulated import Mesh, device_epochs, show
from nacl.public import PrivateKey

from meshwire.agent.kernel import Kernel
from meshwire.agent.loop import COUNTERS_EVERY, RETRIES, SETTLE, Agent, Outcome
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World, parse_member, parse_status
from meshwire.api import names
from meshwire.api.meshnode import Status
from meshwire.encryption.model import Member, SecretKey
from meshwire.kube.client import ApiError, Client, Cluster, Object, read_kubeconfig
from meshwire.kube.follow import follow
from meshwire.lab.model import AGENT_ACCOUNT

CONCURRENCY: Final = 16
SWEEP: Final = 0.2
"""Seconds between looks whether others' progress concerns a node: as often as an agent that waits for
handshakes looks at them."""
MESHNODES: Final = f"/apis/{names.API_VERSION}/{names.MESHNODES}"
TOKEN: Final = f"/api/v1/namespaces/{names.NAMESPACE}/serviceaccounts/{AGENT_ACCOUNT}/token"


class TokenClient(Client):
    """Requests by another one's connections, under a token of its own."""

    def __init__(self, client: Client, token: str) -> None:
        self.cluster = replace(client.cluster, token=token)
        self._session = client._session


class SimulatedAgent(Agent):
    """What it fetches, opens, reports and announces, and when, is the agent's own doing."""

    def __init__(self, settings: Settings, client: Client, sealing_key: SecretKey) -> None:
        super().__init__(settings, cast(Kernel, None), client, sealing_key)

    @property
    def counters_due(self) -> bool:
        return time.monotonic() >= self._written + COUNTERS_EVERY

    async def look(self, own: Member, status: Status, mesh: Mesh, version: str) -> float:
        """Once; seconds until the next time, unless something happens. Raises what Client raises."""
        problems = await self._fetch_keys(own)
        mesh.set_up(own.name, device_epochs(own, self._held))
        desired, observed = show(own, self._held, mesh, time.time())
        outcome = Outcome(desired, observed, (), problems, {}, False)
        remaining = self._until_drained(outcome, status)
        drained = remaining == 0
        delay = await self._report(World(status=status), own, outcome, version, drained=drained)
        return min(delay, remaining) if remaining else delay


@dataclass(slots=True)
class Totals:
    """Of the one watch of MeshNodes: what came, in bytes as an agent's own watch would get them."""

    nodes: int = 0
    events: int = 0
    bytes: int = 0
    looks: int = 0
    errors: int = 0
    cpu_seconds: float = 0.0


@dataclass(slots=True)
class NodeState:
    """One node's side of the simulation."""

    agent: SimulatedAgent
    member: Member | None = None
    status: Status = field(default_factory=Status)
    behind: int = sys.maxsize
    """At the latest look."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Simulation:
    def __init__(self) -> None:
        self.mesh = Mesh()
        self.nodes: dict[str, NodeState] = {}
        self.totals = Totals()

    def see(self, body: Object) -> None:
        """A MeshNode that came by the watch."""
        member = parse_member(body)
        self.mesh.put(member)
        if found := self.nodes.get(member.name):
            status = parse_status(body)
            if member != found.member or status != found.status:
                found.member, found.status = member, status
                found.wake.set()

    async def watch(self, client: Client) -> None:
        async for kind, bodies in follow(client, MESHNODES, lambda body: body):
            for body in bodies:
                if kind != "LISTED":
                    self.totals.events += 1
                    self.totals.bytes += len(
                        json.dumps({"type": kind, "object": body}, separators=(",", ":"))
                    )
                self.see(body)

    async def sweep(self) -> None:
        """For ever: wakes those whom others' progress concerns."""
        while True:
            await asyncio.sleep(SWEEP)
            for node in self.nodes.values():
                if node.member and self.mesh.concerns(
                    node.member, node.behind, counters_due=node.agent.counters_due
                ):
                    node.wake.set()

    async def live(self, node: NodeState) -> None:
        """One agent's life, as meshwire.agent.loop has it."""
        release, delay, failures = version("meshwire"), 3600.0, 0
        while True:
            try:
                async with asyncio.timeout(delay):
                    await node.wake.wait()
                    await asyncio.sleep(SETTLE)
            except TimeoutError:
                pass
            node.wake.clear()
            if node.member is None:
                continue
            # What changes while it looks and writes is looked at again.
            node.behind = self.mesh.behind(node.member)
            self.totals.looks += 1
            try:
                delay = await node.agent.look(node.member, node.status, self.mesh, release)
                failures = 0
            except (aiohttp.ClientError, ApiError, TimeoutError, OSError) as error:
                print(f"{node.member.name}: {type(error).__name__} {error}", file=sys.stderr, flush=True)
                self.totals.errors += 1
                delay = RETRIES[min(failures, len(RETRIES) - 1)]
                failures += 1


async def make_nodes(client: Client, count: int) -> dict[str, str]:
    """Creates the Nodes, ready, with addresses and pod CIDRs; the token of each one's agent by name."""
    gate = asyncio.Semaphore(CONCURRENCY)
    tokens = {}

    async def make(number: int) -> None:
        async with gate:
            node, _ = make_objects(number)
            metadata = (await client.create("/api/v1/nodes", node))["metadata"]
            bound = {"apiVersion": "v1", "kind": "Node", "name": metadata["name"], "uid": metadata["uid"]}
            spec = {"expirationSeconds": 3600, "boundObjectRef": bound}
            request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
            tokens[metadata["name"]] = (await client.create(TOKEN, request))["status"]["token"]

    await asyncio.gather(*(make(number) for number in range(count)))
    return tokens


def make_agent(name: str, client: Client, directory: Path) -> SimulatedAgent:
    settings = Settings(
        node=name,
        namespace=names.NAMESPACE,
        state_directory=directory / name,
        pin_directory=directory,
        run_directory=directory,
        proc_sys=directory,
        metrics_address=("", 0),
    )
    return SimulatedAgent(settings, client, SecretKey(bytes(PrivateKey.generate())))


async def run(cluster: Cluster, count: int, directory: Path) -> None:
    """Until stdin ends."""
    simulation = Simulation()
    async with Client(cluster) as admin:
        tokens = await make_nodes(admin, count)
    # Without the administrator's certificate, which would count for more than a token.
    anonymous = Cluster(server=cluster.server, ca_file=cluster.ca_file)
    async with Client(anonymous) as client:
        clients = {name: TokenClient(client, token) for name, token in tokens.items()}
        for name, own in clients.items():
            simulation.nodes[name] = NodeState(make_agent(name, own, directory))
        simulation.totals.nodes = count
        work: Iterable[Any] = (
            simulation.watch(next(iter(clients.values()))),
            simulation.sweep(),
            *(simulation.live(node) for node in simulation.nodes.values()),
        )
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each) for each in work]
            while await asyncio.to_thread(sys.stdin.readline):
                simulation.totals.cpu_seconds = time.process_time()
                print(json.dumps(asdict(simulation.totals)), flush=True)
            for task in running:
                task.cancel()


def main() -> int:
    kubeconfig, count = sys.argv[1:]
    # In memory: each agent writes its keys, with fsync.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        asyncio.run(run(read_kubeconfig(Path(kubeconfig)), int(count), Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
