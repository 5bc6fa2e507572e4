"""One change of keys among many nodes: what it costs the API server and the operator, by the number of
nodes. API server, etcd and the operator's process are real, the nodes are not: bench.agents plays them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from bench.agents import Totals
from bench.figures import Figure
from bench.memory import status_kib
from bench.scale import MIB, seconds_of_cpu

from meshwire.agent.loop import DRAIN
from meshwire.api import names
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube.client import Client
from meshwire.lab import processes
from meshwire.lab.lab import Lab
from meshwire.lab.model import AGENT_ACCOUNT, CONTROL_NETNS, OPERATOR_ACCOUNT, Settings

SIZES: Final = (100, 1000)
OVERLAP: Final = 5.0
"""Seconds; the least there is."""
QUIET: Final = 12.0
"""Seconds without a write until a change of keys counts as digested: more than agents put off counters."""
WAIT_SECONDS: Final = 900.0
METRICS: Final = "http://127.0.0.1:9872/metrics"
MESH: Final = f"/apis/{names.API_VERSION}"
STATUS: Final = f"{MESH}/{names.MESHSTATUSES}/{names.STATUS_NAME}"
REPOSITORY: Final = Path(__file__).resolve().parent.parent

READS: Final = frozenset({"get", "list", "watch"})
ACCOUNTS: Final = {
    f"system:serviceaccount:{names.NAMESPACE}:{OPERATOR_ACCOUNT}": "operator",
    f"system:serviceaccount:{names.NAMESPACE}:{AGENT_ACCOUNT}": "agents",
}
BACKGROUND: Final = frozenset({"leases"})
"""Resources that are written whether anything happens or not."""


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """`who`: operator or agents; `resource` with its subresource after a slash; `code`: HTTP."""

    who: str
    verb: str
    resource: str
    code: int

    @property
    def is_write(self) -> bool:
        """Of an object, and done."""
        return self.verb not in READS and self.code < 400

    @property
    def is_background(self) -> bool:
        return self.resource in BACKGROUND


def read_audit(lines: Iterable[str], since: float = 0.0) -> Iterator[Request]:
    """Requests of operator and agents in an audit log that came at `since` (Unix time) or later. An
    unfinished last line is left out."""
    for line in lines:
        if not line.endswith("\n"):
            continue
        entry = json.loads(line)
        who = ACCOUNTS.get(entry["user"]["username"])
        came = datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp()
        if who is None or came < since or "objectRef" not in entry:
            continue
        target = entry["objectRef"]
        resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
        if resource == "secrets" and target.get("namespace") == names.OPERATOR_NAMESPACE:
            resource = "secrets (epoch)"
        yield Request(who, entry["verb"], resource, entry.get("responseStatus", {}).get("code", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One change of keys among `nodes` nodes. Seconds from the annotation: `moved` until all live nodes send
    by the new keys, `ended` until only those are left. `watched`: bytes that came by an agent's watch of
    MeshNodes. `rounds` and `reconciling` (seconds) are the operator's looks at everything."""

    nodes: int
    requests: Mapping[Request, int]
    moved: float
    ended: float
    operator_cpu: float
    operator_kib: int
    operator_peak_kib: int
    rounds: int
    reconciling: float
    simulation_cpu: float
    apiserver_cpu: float
    watched: int
    events: int
    seconds: float
    """How long was counted."""

    @property
    def writes(self) -> Counter[str]:
        """Objects written, by `who verb resource`."""
        found: Counter[str] = Counter()
        for request, number in self.requests.items():
            if request.is_write and not request.is_background:
                found[f"{request.who}: {request.verb} {request.resource}"] += number
        return found

    @property
    def others(self) -> Counter[str]:
        """Requests that wrote nothing: reads, and what was refused."""
        found: Counter[str] = Counter()
        for request, number in self.requests.items():
            if not request.is_write and not request.is_background and request.verb != "watch":
                refused = f" ({request.code})" if request.code >= 400 else ""
                found[f"{request.who}: {request.verb} {request.resource}{refused}"] += number
        return found

    @property
    def background(self) -> int:
        return sum(number for request, number in self.requests.items() if request.is_background)


def measure(sizes: Sequence[int] = SIZES) -> list[Figure]:
    """In namespaces of its own (bench.isolated). About six minutes. Raises LabError, and TimeoutError where
    keys don't change."""
    return figures([count(nodes) for nodes in sizes])


def short() -> dict[str, Any]:
    """What is written and asked for among few nodes, in well under a minute."""
    counted = count(20, quiet=1.0)
    return {
        "nodes": counted.nodes,
        "writes": counted.writes,
        "others": counted.others,
        "ended": counted.ended,
    }


def count(nodes: int, *, quiet: float = QUIET) -> Counted:
    """A control plane of its own, with so many nodes, whose keys change once."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=0, audit=True))
        try:
            return rotate(lab, nodes, quiet=quiet)
        finally:
            lab.down()


def rotate(lab: Lab, nodes: int, *, quiet: float = QUIET) -> Counted:
    """In a lab without nodes, whose API server keeps an audit log."""
    # The node controller would find that these nodes have no kubelet; pods there are none.
    for component in ("controller-manager", "scheduler"):
        processes.stop(lab.paths, component)
    lab.apply(
        {
            "apiVersion": names.API_VERSION,
            "kind": "MeshConfig",
            "metadata": {"name": names.CONFIG_NAME},
            "spec": {
                "encryption": {"enabled": True, "keyRotation": {"interval": "0s", "overlap": "5s"}},
                "network": {"clusterCIDRs": ["10.240.0.0/12", "fd00:10:240::/42"]},
            },
        }
    )
    with simulated(lab, nodes) as agents:
        began = time.monotonic()
        lab.call(lambda client: _until(client, nodes, rotations=0))
        print(f"{nodes} nodes joined in {time.monotonic() - began:.1f} s", file=sys.stderr)
        _until_quiet(lab, quiet)
        before, since = _State.of(lab, agents), time.time()
        moved, ended = lab.call(lambda client: _rotate(client, nodes))
        _until_quiet(lab, quiet)
        seconds = time.time() - since
        after = _State.of(lab, agents)
    with lab.log("audit").open() as log:
        requests = Counter(read_audit(log, since))
    return Counted(
        nodes=nodes,
        requests=requests,
        moved=moved,
        ended=ended,
        operator_cpu=after.operator_cpu - before.operator_cpu,
        operator_kib=before.operator_kib,
        operator_peak_kib=after.operator_peak_kib,
        rounds=int(after.metric("reconcile_seconds_count") - before.metric("reconcile_seconds_count")),
        reconciling=after.metric("reconcile_seconds_sum") - before.metric("reconcile_seconds_sum"),
        simulation_cpu=after.totals.cpu_seconds - before.totals.cpu_seconds,
        apiserver_cpu=after.apiserver_cpu - before.apiserver_cpu,
        watched=after.totals.bytes - before.totals.bytes,
        events=after.totals.events - before.totals.events,
        seconds=seconds,
    )


class Agents:
    """The process that plays the nodes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def totals(self) -> Totals:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Totals(**json.loads(self._process.stdout.readline()))


@contextmanager
def simulated(lab: Lab, nodes: int) -> Iterator[Agents]:
    """In the control plane's namespace: without the relay through which people reach the API server."""
    state = lab.state
    command = [
        *processes.in_namespaces(CONTROL_NETNS),
        *(sys.executable, "-m", "bench.agents"),
        str(lab.paths.kubeconfig_of("control")),
        str(nodes),
    ]
    environment = processes.environment(state.lab_id)
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])
    with lab.paths.log("agents").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
    try:
        yield Agents(process)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class _State:
    """At one moment; seconds and KiB."""

    operator_cpu: float
    operator_kib: int
    operator_peak_kib: int
    apiserver_cpu: float
    totals: Totals
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, lab: Lab, agents: Agents) -> _State:
        operator, apiserver = lab.pid("operator"), lab.pid("apiserver")
        assert operator and apiserver
        return cls(
            operator_cpu=seconds_of_cpu(operator),
            operator_kib=status_kib(operator, "VmRSS"),
            operator_peak_kib=status_kib(operator, "VmHWM"),
            apiserver_cpu=seconds_of_cpu(apiserver),
            totals=agents.totals(),
            metrics=operator_metrics(),
        )

    def metric(self, name: str) -> float:
        return self.metrics[f"meshwire_operator_{name}"]


def operator_metrics() -> dict[str, float]:
    """Its metrics page: value by name and labels as written there."""
    script = f"import urllib.request as u; print(u.urlopen('{METRICS}').read().decode())"
    command = [*processes.in_namespaces(CONTROL_NETNS), sys.executable, "-c", script]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    found = re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def _until(client: Client, nodes: int, *, rotations: int) -> MeshStatus:
    """Until so many changes of keys are over, and all nodes send by the keys in force alone."""
    deadline = time.monotonic() + WAIT_SECONDS
    status = MeshStatus()
    while time.monotonic() < deadline:
        if found := await client.find(STATUS):
            status = MeshStatus.from_object(found)
            if (
                status.phase is Phase.ENFORCING
                and status.nodes_ready == nodes
                and status.rotations == rotations
                and status.rotation is None
            ):
                return status
        await asyncio.sleep(0.5)
    raise TimeoutError(f"{nodes} nodes are not there after {WAIT_SECONDS:.0f} s: {status}")


async def _rotate(client: Client, nodes: int) -> tuple[float, float]:
    """Asks for new keys; seconds until all send by them, and until only they are left."""
    found = await client.get(STATUS)
    version, moved = found["metadata"]["resourceVersion"], 0.0
    annotations = {names.ROTATE_ANNOTATION: str(time.time_ns())}
    path = f"{MESH}/{names.MESHCONFIGS}/{names.CONFIG_NAME}"
    began = time.monotonic()
    await client.patch(path, {"metadata": {"annotations": annotations}})
    async with asyncio.timeout(WAIT_SECONDS):
        async for _, body in client.watch(f"{MESH}/{names.MESHSTATUSES}", resourceVersion=version):
            status = MeshStatus.from_object(body)
            if status.rotation and status.rotation.moved_at:
                moved = moved or time.monotonic() - began
            if status.rotations and status.rotation is None:
                return moved, time.monotonic() - began
    raise TimeoutError("the watch ended before the change of keys")


def _until_quiet(lab: Lab, seconds: float) -> None:
    """Until neither operator nor agents have written anything for so long."""
    deadline = time.monotonic() + WAIT_SECONDS
    with lab.log("audit").open() as log:
        since, rest = time.monotonic(), ""
        while time.monotonic() < since + seconds:
            if time.monotonic() > deadline:
                raise TimeoutError(f"there are still writes after {WAIT_SECONDS:.0f} s")
            time.sleep(0.25)
            *lines, rest = (rest + log.read()).splitlines(keepends=True) or [""]
            if rest.endswith("\n"):
                lines, rest = [*lines, rest], ""
            if any(request.is_write and not request.is_background for request in read_audit(lines)):
                since = time.monotonic()


# What it comes to


def figures(counted: Sequence[Counted]) -> list[Figure]:
    """Of each, then the last's to the first's, by node."""
    found = [figure for each in counted for figure in _of_one(each)]
    if len(counted) > 1:
        found += _quotients(counted[0], counted[-1])
    return found


def _of_one(counted: Counted) -> Iterator[Figure]:
    nodes = counted.nodes
    prefix = f"{nodes:,} nodes: "

    def per_node(value: float, unit: str) -> str:
        return f"{value / nodes:.3g} {unit} a node".replace("  ", " ")

    def number(name: str, value: int, unit: str) -> Figure:
        return Figure(name=prefix + name, value=value, unit=unit, spread=per_node(value, ""))

    yield Figure(name=f"{prefix}asked for to all sending by the new keys", value=counted.moved, unit="s")
    yield Figure(
        name=f"{prefix}asked for to the end of the old keys",
        value=counted.ended,
        unit="s",
        spread=f"{OVERLAP:.0f} s of overlap in it, {DRAIN:.0f} s for old tunnels to empty",
    )
    yield number("objects written", sum(counted.writes.values()), "writes")
    for name, value in sorted(counted.writes.items(), key=lambda item: -item[1]):
        yield number(name, value, "writes")
    yield number("requests that write nothing", sum(counted.others.values()), "requests")
    for name, value in sorted(counted.others.items(), key=lambda item: -item[1]):
        yield number(name, value, "requests")
    yield Figure(
        name=f"{prefix}leases, left out of all that",
        value=counted.background,
        unit="requests",
        spread=f"in {counted.seconds:.0f} s",
    )
    yield Figure(
        name=f"{prefix}operator, CPU",
        value=counted.operator_cpu,
        unit="s",
        spread=f"{1000 * counted.operator_cpu / nodes:.3g} ms a node; {counted.rounds} looks at everything,"
        f" {counted.reconciling:.2f} s",
    )
    yield Figure(
        name=f"{prefix}operator, resident before",
        value=counted.operator_kib / MIB,
        unit="MiB",
        spread=f"peak {counted.operator_peak_kib / MIB:.1f}",
    )
    yield Figure(
        name=f"{prefix}what an agent's watch of MeshNodes gets",
        value=counted.watched / 2**20,
        unit="MiB",
        spread=f"{counted.events} events, {counted.watched / max(1, counted.events):.0f} bytes each",
    )
    yield Figure(
        name=f"{prefix}API server, CPU",
        value=counted.apiserver_cpu,
        unit="s",
        spread=f"the simulated nodes took {counted.simulation_cpu:.1f} s of CPU on the same machine",
    )


def _without_events(counted: Counted) -> int:
    return sum(number for name, number in counted.writes.items() if not name.endswith(" events"))


def _quotients(small: Counted, large: Counted) -> Iterator[Figure]:
    """How much more each node costs among many: 1 where all grows in proportion."""

    def quotient(name: str, one: float, other: float, goal: str = "") -> Figure:
        first, last = one / small.nodes, other / large.nodes
        return Figure(
            name=f"{name}, per node, {large.nodes:,} to {small.nodes:,} nodes",
            value=last / first,
            unit="ratio",
            spread=f"{last:.4g} to {first:.4g}",
            goal=goal,
        )

    yield quotient(
        "objects written", sum(small.writes.values()), sum(large.writes.values()), "about 1: in proportion"
    )
    # Of many at once the operator leaves some out.
    yield quotient("objects but Events written", _without_events(small), _without_events(large))
    yield quotient("requests that write nothing", sum(small.others.values()), sum(large.others.values()))
    yield quotient("operator's CPU", small.operator_cpu, large.operator_cpu)
    # The overlap, and the time that old tunnels get to empty, are the same for any number.
    waited = OVERLAP + DRAIN
    yield quotient("duration but for what is waited", small.ended - waited, large.ended - waited)
    yield quotient("what an agent's watch gets", small.watched, large.watched)
