"""One real agent in a cluster of 1,000 nodes, 50,000 pods, 250 identities and 500 policies, with encryption
and policy on: its memory and processor time, and how long a change takes to be in the kernel's maps. A real
API server holds all objects; the node's own 50 pods have their network namespaces and veths, the other nodes
and their pods are objects only. Stands by itself too: `python -m bench scale` (root)."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Final

from bench.figures import Figure, percentile
from bench.memory import NODE, agent_pid, create_all, make_objects, settled, status_kib, wait_for_peers

from meshwire.api import names
from meshwire.api.fields import Address
from meshwire.api.meshendpointslice import MAX_ENDPOINTS, Endpoint, MeshEndpointSlice, PodRef
from meshwire.api.meshidentity import FIRST, MeshIdentity
from meshwire.bpf.policymaps import EndpointEntry, PolicyMaps
from meshwire.kube.client import Client, Object
from meshwire.lab import processes
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings
from meshwire.policy.identity import Labels, identity_labels

NODES: Final = 1000
PODS_PER_NODE: Final = 50
NAMESPACES: Final = 25
APPS: Final = 10
"""Per namespace; each is one identity."""
CHANGES: Final = 20
IDLE_SECONDS: Final = 30.0
WAIT_SECONDS: Final = 180.0
CONCURRENCY: Final = 16
MIB: Final = 1024
POLL_SECONDS: Final = 0.001

MESH: Final = f"/apis/{names.API_VERSION}"
IDENTITIES: Final = f"{MESH}/{names.MESHIDENTITIES}"
SLICES: Final = f"{MESH}/{names.MESHENDPOINTSLICES}"
MEMORY_GOAL: Final = "at most 150"
CHANGE_GOAL: Final = "at most 200"


def measure(nodes: int = NODES) -> list[Figure]:
    """In namespaces of its own (bench.isolated). About five minutes. Raises LabError, and TimeoutError where
    something does not come to be in force."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory) / "lab")
        lab.up(Settings(nodes=1))
        try:
            return _measure(lab, nodes)
        finally:
            lab.down()


def _measure(lab: Lab, nodes: int) -> list[Figure]:
    apply_settings(lab)
    lab.call(lambda client: wait_for_peers(client, 0))
    lab.call(wait_until_usable)
    # The operator would find that these nodes have no agents and that their pods don't exist, the node
    # controller that they have no kubelet.
    lab.stop_operator()
    processes.stop(lab.paths, "controller-manager")
    lab.apply(*(_own_pod(number) for number in range(PODS_PER_NODE)))
    lab.call(_wait_for_own_pods)
    lab.call(lambda client: create_all(client, nodes - 1))
    lab.call(lambda client: _create_policy_objects(client, nodes))
    _wait_until_in_force(lab, nodes)
    lab.call(lambda client: wait_for_peers(client, nodes - 1))
    grown = settled(agent_pid(lab))
    # An agent that starts gets everything in lists, not one by one.
    in_force, start = _restart(lab)
    started = settled(agent_pid(lab))
    pid = agent_pid(lab)
    scale = f"{nodes:,} nodes, {nodes * PODS_PER_NODE:,} pods"
    figures = [
        Figure(
            name=f"agent, resident, {scale}, after they came",
            value=grown / MIB,
            unit="MiB",
            goal=MEMORY_GOAL,
        ),
        Figure(
            name=f"agent, resident, {scale}, after a restart",
            value=started / MIB,
            unit="MiB",
            spread=f"PSS {pss_kib(pid) / MIB:.1f}, peak {status_kib(pid, 'VmHWM') / MIB:.1f}",
            goal=MEMORY_GOAL,
        ),
        Figure(
            name="agent's start to all policies in force",
            value=in_force,
            unit="s",
            spread=f"{start:.1f} s of CPU",
        ),
    ]
    before = seconds_of_cpu(pid)
    time.sleep(IDLE_SECONDS)
    idle = (seconds_of_cpu(pid) - before) / IDLE_SECONDS
    figures.append(Figure(name="agent, CPU, idle", value=1000 * idle, unit="ms per s"))
    with _maps(pid) as maps:
        fill = {
            "identities": len(maps.identities.read()),
            "policy": len(maps.policies.read()),
            "endpoints": len(maps.endpoints.read()),
        }
        figures += [Figure(name=f"entries of {name}", value=value, unit="") for name, value in fill.items()]
        for change in (
            PolicyHere(maps),
            PodElsewhere(maps),
            IdentityElsewhere(maps),
        ):
            figures += lab.call(lambda client, change=change: _time(client, pid, change))  # type: ignore[misc]
    figures.append(lab.call(lambda client: _cost_of_others(client, pid)))
    return figures


def _maps(pid: int) -> PolicyMaps:
    """The agent's, in the mount namespace of its node."""
    return PolicyMaps.open(Path(f"/proc/{pid}/root/sys/fs/bpf/meshwire-policy"))


def _wait(condition: Callable[[], bool], what: str, *, pause: float = 0.5) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:.0f} s: {what}")
        time.sleep(pause)


def _wait_until_in_force(lab: Lab, nodes: int) -> None:
    def is_done() -> bool:
        with _maps(agent_pid(lab)) as maps:
            return len(maps.identities.read()) >= 2 * nodes * PODS_PER_NODE and any(
                entry.flags for entry in maps.endpoints.read().values()
            )

    _wait(is_done, "addresses of all pods in the map", pause=2)


def _restart(lab: Lab) -> tuple[float, float]:
    """Seconds until the new agent has replaced every set of rules, and of its processor time until then."""
    with _maps(agent_pid(lab)) as maps:
        before = {address: entry.set for address, entry in maps.endpoints.read().items()}
        lab.stop_agent(NODE)
        began = time.monotonic()
        lab.start_agent(NODE)

        def is_done() -> bool:
            now = maps.endpoints.read()
            return all(address in now and now[address].set > number for address, number in before.items())

        _wait(is_done, "all sets written anew", pause=0.05)
        return time.monotonic() - began, seconds_of_cpu(agent_pid(lab))


# Changes


class PolicyHere:
    """The port that a policy of two pods of the node allows."""

    name = "policy of pods here changed"
    goal = CHANGE_GOAL

    def __init__(self, maps: PolicyMaps) -> None:
        self._maps = maps
        self._identity = _own_identity(3)
        self._before: dict[Address, EndpointEntry] = {}

    async def prepare(self, client: Client, number: int) -> Callable[[], Awaitable[object]]:
        self._before = self._entries()
        policy = ingress_policy(self._identity, 8081 + number)
        metadata = policy["metadata"]
        path = f"{MESH}/namespaces/{metadata['namespace']}/{names.MESHPOLICIES}/{metadata['name']}"
        return lambda: client.patch(path, {"spec": policy["spec"]})

    def is_in_force(self) -> bool:
        now = self._entries()
        return all(now[address].set != entry.set for address, entry in self._before.items())

    def _entries(self) -> dict[Address, EndpointEntry]:
        return {
            address: entry
            for address, entry in self._maps.endpoints.read().items()
            if entry.identity == FIRST + self._identity
        }


class PodElsewhere:
    """A pod of another node takes the place of one that ended."""

    name = "pod started elsewhere"
    goal = CHANGE_GOAL

    def __init__(self, maps: PolicyMaps) -> None:
        self._maps = maps
        self._new: Endpoint | None = None

    async def prepare(self, client: Client, number: int) -> Callable[[], Awaitable[object]]:
        path = f"{SLICES}/{_slice_name(MAX_ENDPOINTS)}"
        current = MeshEndpointSlice.from_object(await client.get(path))
        # Beyond the 50 pods that the other node has.
        self._new = await self._pod(client, number)
        endpoints = (*current.endpoints[1:], self._new)
        spec = MeshEndpointSlice(name=current.name, endpoints=endpoints).to_dict()["spec"]
        return lambda: client.patch(path, {"spec": spec})

    async def _pod(self, client: Client, number: int) -> Endpoint:
        return _remote_pod(7, 100 + number, number % (NAMESPACES * APPS))

    def is_in_force(self) -> bool:
        assert self._new
        return all(
            self._maps.identities.find(address) == self._new.identity for address in self._new.addresses
        )


class IdentityElsewhere(PodElsewhere):
    """The same with labels that no other pod has, of which some policies of the node let it in."""

    name = "pod with labels of its own started elsewhere"

    async def _pod(self, client: Client, number: int) -> Endpoint:
        # A caller of the node's own pods of the same namespace.
        identity = _own_identity(3) // APPS * APPS + (_own_identity(3) + 1) % APPS
        labels = {**dict(_labels(identity)), "track": f"canary-{number}"}
        created = FIRST + NAMESPACES * APPS + number
        await client.create(
            IDENTITIES, MeshIdentity(number=created, labels=tuple(sorted(labels.items()))).to_dict()
        )
        return replace(_remote_pod(7, 150 + number, identity), identity=created)


async def _time(client: Client, pid: int, change: PolicyHere | PodElsewhere) -> list[Figure]:
    """From the API server's answer to the kernel's maps, with the agent's processor time."""
    seconds, cpu = [], []
    for number in range(CHANGES):
        write = await change.prepare(client, number)
        # What was written before, e.g. the agent's own reports, is over.
        await asyncio.sleep(1)
        spent = seconds_of_cpu(pid)
        await write()
        began = time.monotonic()
        while not change.is_in_force():
            if time.monotonic() > began + WAIT_SECONDS:
                raise TimeoutError(f"{change.name}: not in force within {WAIT_SECONDS:.0f} s")
            await asyncio.sleep(POLL_SECONDS)
        seconds.append(time.monotonic() - began)
        # Its report is part of it.
        await asyncio.sleep(0.5)
        cpu.append(seconds_of_cpu(pid) - spent)
    spread = f"of {CHANGES}, {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}"
    name = f"{change.name}: written to in force"
    return [
        Figure(
            name=f"{name}, p50",
            value=1000 * percentile(seconds, 50),
            unit="ms",
            spread=spread,
            goal=change.goal,
        ),
        Figure(name=f"{name}, p95", value=1000 * percentile(seconds, 95), unit="ms", spread=spread),
        Figure(
            name=f"{change.name}: agent's CPU",
            value=1000 * statistics.median(cpu),
            unit="ms",
            spread=f"median of {CHANGES}, report included",
        ),
    ]


async def _cost_of_others(client: Client, pid: int) -> Figure:
    """The agent's processor time for a policy that selects nobody here."""
    cpu = []
    for number in range(CHANGES):
        identity = next(
            each
            for each in range(number * APPS, NAMESPACES * APPS + number * APPS)
            if each % (NAMESPACES * APPS) not in {_own_identity(own) for own in range(PODS_PER_NODE)}
        ) % (NAMESPACES * APPS)
        policy = ingress_policy(identity, 8300 + number)
        metadata = policy["metadata"]
        path = f"{MESH}/namespaces/{metadata['namespace']}/{names.MESHPOLICIES}/{metadata['name']}"
        spent = seconds_of_cpu(pid)
        await client.patch(path, {"spec": policy["spec"]})
        await asyncio.sleep(0.5)
        cpu.append(seconds_of_cpu(pid) - spent)
    return Figure(
        name="policy of pods elsewhere changed: agent's CPU",
        value=1000 * statistics.median(cpu),
        unit="ms",
        spread=f"median of {CHANGES}",
    )


def seconds_of_cpu(pid: int) -> float:
    """Of all of its threads, to the nanosecond; those of threads that ended are lost, and none do."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


def pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# What there is


def apply_settings(lab: Lab) -> None:
    """Encryption and policy on, and the namespaces."""
    lab.apply(
        {
            "apiVersion": names.API_VERSION,
            "kind": "MeshConfig",
            "metadata": {"name": names.CONFIG_NAME},
            "spec": {"encryption": {"enabled": True}, "policy": {"enabled": True}},
        },
        *(_namespace(number) for number in range(NAMESPACES)),
    )


def _namespace_name(number: int) -> str:
    return f"team-{number:02}"


def _namespace(number: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": _namespace_name(number),
            "labels": {"team": f"t{number:02}", "stage": "production" if number % 3 else "staging"},
        },
    }


def pod_labels(app: int) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": f"service-{app}",
        "app.kubernetes.io/part-of": f"product-{app % 4}",
        "tier": ("frontend", "backend", "database")[app % 3],
    }


def _labels(identity: int) -> Labels:
    """Of the identity of this place: a namespace's app."""
    namespace, app = divmod(identity, APPS)
    metadata = _namespace(namespace)["metadata"]
    return identity_labels(
        namespace=metadata["name"],
        namespace_labels={**metadata["labels"], "kubernetes.io/metadata.name": metadata["name"]},
        service_account="default",
        pod_labels=pod_labels(app),
    )


def _own_identity(number: int) -> int:
    """Two pods each of one app per namespace: 25 of the 250 identities have pods on the node."""
    namespace = number % NAMESPACES
    return namespace * APPS + namespace % APPS


def _own_pod(number: int) -> Object:
    namespace, app = divmod(_own_identity(number), APPS)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"own-{number}",
            "namespace": _namespace_name(namespace),
            "labels": pod_labels(app),
        },
        "spec": {
            "nodeName": NODE,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "it", "image": "host", "command": ["sleep", "infinity"]}],
        },
    }


def _remote_pods(nodes: int) -> Iterator[Endpoint]:
    """As the operator publishes them: in no order of nodes or namespaces."""
    identities = NAMESPACES * APPS
    for count in range((nodes - 1) * PODS_PER_NODE):
        node, number = count % (nodes - 1), count // (nodes - 1)
        yield _remote_pod(node, number, (count * 7) % identities)


def _remote_pod(node: int, number: int, identity: int) -> Endpoint:
    namespace, app = divmod(identity, APPS)
    spec = pod_cidrs_of(node)
    unique = f"{node:04x}{number:04x}"
    return Endpoint(
        addresses=tuple(cidr[10 + number] for cidr in spec),
        identity=FIRST + identity,
        node=f"worker-{node:04}.example.internal",
        pod=PodRef(
            _namespace_name(namespace),
            f"service-{app}-6d4cf56db6-{unique[:5]}{unique[5:]}",
            f"00000000-0000-4000-8000-{unique:>012}",
        ),
    )


_CIDRS: dict[int, tuple[IPv4Network | IPv6Network, ...]] = {}


def pod_cidrs_of(node: int) -> tuple[IPv4Network | IPv6Network, ...]:
    """The pod CIDRs of that other node."""
    if node not in _CIDRS:
        texts = make_objects(node)[0]["spec"]["podCIDRs"]
        _CIDRS[node] = (IPv4Network(texts[0]), IPv6Network(texts[1]))
    return _CIDRS[node]


def _policies() -> Iterator[tuple[str, Object]]:
    """(path, object): two per identity. Half allow three other apps to reach a port; of the rest half are
    NetworkPolicies, a third egress to blocks of addresses, a sixth cluster-wide."""
    for identity in range(NAMESPACES * APPS):
        namespace, app = divmod(identity, APPS)
        name = _namespace_name(namespace)
        yield f"{MESH}/namespaces/{name}/{names.MESHPOLICIES}", ingress_policy(identity, 8080)
        selector = {"matchLabels": {"app.kubernetes.io/name": f"service-{app}"}}
        meta = {"name": f"more-{app}", "namespace": name}
        match identity % 6:
            case 0 | 1 | 2:
                yield (
                    f"/apis/networking.k8s.io/v1/namespaces/{name}/networkpolicies",
                    {
                        "apiVersion": "networking.k8s.io/v1",
                        "kind": "NetworkPolicy",
                        "metadata": meta,
                        "spec": {
                            "podSelector": selector,
                            "policyTypes": ["Ingress"],
                            "ingress": [
                                {
                                    "from": [
                                        {
                                            "namespaceSelector": {"matchLabels": {"stage": "production"}},
                                            "podSelector": {"matchLabels": {"tier": "frontend"}},
                                        },
                                        {"podSelector": {}},
                                    ],
                                    "ports": [{"port": 9090, "protocol": "TCP"}],
                                }
                            ],
                        },
                    },
                )
            case 3 | 4:
                yield (
                    f"{MESH}/namespaces/{name}/{names.MESHPOLICIES}",
                    {
                        "apiVersion": names.API_VERSION,
                        "kind": "MeshPolicy",
                        "metadata": meta,
                        "spec": {
                            "endpointSelector": selector,
                            "egress": [
                                {
                                    "toCIDRSet": [
                                        {
                                            "cidr": f"203.0.{identity}.0/24",
                                            "except": [f"203.0.{identity}.8/32"],
                                        }
                                    ],
                                    "toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}]}],
                                },
                                {
                                    "toEndpoints": [
                                        {
                                            "matchLabels": {
                                                "k8s:io.kubernetes.pod.namespace": "kube-system",
                                                "k8s-app": "kube-dns",
                                            }
                                        }
                                    ],
                                    "toPorts": [{"ports": [{"port": "53", "protocol": "UDP"}]}],
                                },
                                {"toEndpoints": [{}]},
                            ],
                        },
                    },
                )
            case _:
                yield (
                    f"{MESH}/{names.CLUSTERMESHPOLICIES}",
                    {
                        "apiVersion": names.API_VERSION,
                        "kind": "ClusterMeshPolicy",
                        "metadata": {"name": f"more-{identity}"},
                        "spec": {
                            "endpointSelector": {
                                "matchLabels": {
                                    "k8s:io.kubernetes.pod.namespace": name,
                                    "app.kubernetes.io/name": f"service-{app}",
                                }
                            },
                            "ingress": [
                                {
                                    "fromEndpoints": [
                                        {
                                            "matchExpressions": [
                                                {
                                                    "key": "k8s:io.kubernetes.pod.namespace",
                                                    "operator": "Exists",
                                                }
                                            ],
                                            "matchLabels": {"tier": "backend"},
                                        }
                                    ],
                                    "toPorts": [
                                        {"ports": [{"port": "9000", "endPort": 9100, "protocol": "TCP"}]}
                                    ],
                                }
                            ],
                        },
                    },
                )


def ingress_policy(identity: int, port: int) -> Object:
    """The policy `main` of an app: three of its own namespace, and one of the next one, may reach it."""
    namespace, app = divmod(identity, APPS)
    name, other = _namespace_name(namespace), _namespace_name((namespace + 1) % NAMESPACES)
    callers = [
        *(
            {"matchLabels": {"app.kubernetes.io/name": f"service-{(app + step) % APPS}"}}
            for step in (1, 2, 3)
        ),
        {
            "matchLabels": {
                "k8s:io.kubernetes.pod.namespace": other,
                "app.kubernetes.io/name": f"service-{app}",
            }
        },
    ]
    return {
        "apiVersion": names.API_VERSION,
        "kind": "MeshPolicy",
        "metadata": {"name": f"main-{app}", "namespace": name},
        "spec": {
            "endpointSelector": {"matchLabels": {"app.kubernetes.io/name": f"service-{app}"}},
            "ingress": [
                {
                    "fromEndpoints": callers,
                    "toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}]}],
                }
            ],
        },
    }


async def wait_until_usable(client: Client) -> None:
    """Pods can be made in every namespace, and the agent has a report to write to."""
    paths = [
        f"/api/v1/namespaces/{_namespace_name(number)}/serviceaccounts/default"
        for number in range(NAMESPACES)
    ]
    await _wait_for(client, [*paths, f"{MESH}/{names.MESHPOLICYREPORTS}/{NODE}"])


async def _wait_for(client: Client, paths: list[str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    for path in paths:
        while await client.find(path) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {path} within {WAIT_SECONDS:.0f} s")
            await asyncio.sleep(0.2)


async def _wait_for_own_pods(client: Client) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        pods = [pod for pod in await _own_pods(client) if pod.get("status", {}).get("podIPs")]
        if len(pods) == PODS_PER_NODE:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(pods)} of {PODS_PER_NODE} pods run after {WAIT_SECONDS:.0f} s")
        await asyncio.sleep(0.5)


async def _create_policy_objects(client: Client, nodes: int) -> None:
    """As the operator and people would: identities, slices, policies."""
    found = list(_own_endpoints(await _own_pods(client)))
    remote = [*found, *_remote_pods(nodes)]
    await _create_each(
        client,
        (
            (IDENTITIES, MeshIdentity(number=FIRST + number, labels=_labels(number)).to_dict())
            for number in range(NAMESPACES * APPS)
        ),
    )
    await _create_each(
        client,
        (
            (
                SLICES,
                MeshEndpointSlice(
                    name=_slice_name(at), endpoints=tuple(remote[at : at + MAX_ENDPOINTS])
                ).to_dict(),
            )
            for at in range(0, len(remote), MAX_ENDPOINTS)
        ),
    )
    await _create_each(client, _policies())


def _slice_name(at: int) -> str:
    return f"meshwire-{at // MAX_ENDPOINTS}"


async def _create_each(client: Client, objects: Iterable[tuple[str, Object]]) -> None:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def create(path: str, item: Object) -> None:
        async with gate:
            await client.create(path, item)

    await asyncio.gather(*(create(path, item) for path, item in objects))


async def _own_pods(client: Client) -> list[Object]:
    found = await client.get("/api/v1/pods", fieldSelector=f"spec.nodeName={NODE}")
    items: list[Object] = found["items"]
    return items


def _own_endpoints(pods: Iterable[Object]) -> Iterator[Endpoint]:
    for pod in pods:
        metadata = pod["metadata"]
        yield Endpoint(
            addresses=tuple(ip_address(item["ip"]) for item in pod["status"]["podIPs"]),
            identity=FIRST + _own_identity(int(metadata["name"].removeprefix("own-"))),
            node=NODE,
            pod=PodRef(metadata["namespace"], metadata["name"], metadata["uid"]),
        )
