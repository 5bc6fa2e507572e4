"""The loops of policy with their watches, against an API server that is a few dictionaries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from meshwire.api import conditions, names
from meshwire.api.meshconfig import Encryption, MeshConfig, PolicySettings
from meshwire.api.meshnode import MeshNode, Phase, Spec
from meshwire.api.meshpolicyreport import MapPressure
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube.client import ApiError, Client
from meshwire.kube.events import Event
from meshwire.operator import loop, policyloop, policystatus, policyworld, reconcile, rounds
from meshwire.operator.apply import Hands
from meshwire.operator.metrics import Metrics
from meshwire.operator.objects import Config, Node
from meshwire.operator.policyapply import PolicyHands
from meshwire.operator.policyloop import EndpointLoop, StatusLoop
from meshwire.operator.policyreconcile import Plan
from meshwire.operator.policyworld import PolicyWorld
from meshwire.operator.reconcile import Inputs, WriteStatus
from meshwire.operator.summary import Pressure
from meshwire.operator.watches import Watched
from meshwire.operator.world import World

MESH = f"/apis/{names.API_VERSION}"


class Server(Client):
    """Objects by path. `refuse` may turn a write down."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 0
        self.news: list[tuple[int, str, str, dict[str, Any]]] = []
        self.writes: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str, Any], None] = lambda method, path, body: None

    def put(self, path: str, item: dict[str, Any], kind: str = "") -> dict[str, Any]:
        self.version += 1
        new = path not in self.objects
        metadata = {"uid": f"uid-{self.version}"} | (self.objects.get(path, {}).get("metadata") or {})
        item = {**item, "metadata": metadata | item["metadata"] | {"resourceVersion": str(self.version)}}
        self.objects[path] = item
        self.news.append((self.version, "ADDED" if new else "MODIFIED", path, item))
        return item

    def remove(self, path: str) -> None:
        self.version += 1
        item = self.objects.pop(path)
        item = {**item, "metadata": item["metadata"] | {"resourceVersion": str(self.version)}}
        self.news.append((self.version, "DELETED", path, item))

    def of(self, resource: str) -> dict[str, Any]:
        return {path: item for path, item in self.objects.items() if path.split("/")[-2] == resource}

    async def get(self, path: str, **params: str) -> Any:
        if path == MESH:
            return {"resources": [{"name": kind} for kind in policyworld.KINDS]}
        if path in self.objects:
            return self.objects[path]
        if path.rpartition("/")[2] not in {*policyworld.KINDS, "pods", "namespaces"}:
            raise ApiError(404, "NotFound", path)
        return {
            "kind": "List",
            "metadata": {"resourceVersion": str(self.version)},
            "items": list(self.of(path.rpartition("/")[2]).values()),
        }

    async def watch(self, path: str, **params: str) -> AsyncIterator[tuple[str, Any]]:
        version = int(params["resourceVersion"])
        while True:
            for at, kind, where, item in list(self.news):
                if at > version and where.split("/")[-2] == path.rpartition("/")[2]:
                    version = at
                    yield kind, item
            await asyncio.sleep(0.005)

    async def request(self, method: str, path: str, **options: Any) -> Any:
        body: Any = options.get("body")
        self.refuse(method, path, body)
        self.writes.append((method, path))
        if method == "DELETE":
            if path not in self.objects:
                raise ApiError(404, "NotFound", path)
            self.remove(path)
            return {}
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                raise ApiError(409, "AlreadyExists", path)
            return self.put(path, body)
        assert method == "PATCH", method
        path = path.removesuffix("/status")
        old = self.objects[path]
        if "status" in body:
            # As a merge patch does with null.
            status = {name: value for name, value in body["status"].items() if value is not None}
            body = {**body, "status": status}
        if body["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", path)
        return self.put(path, {**old, **body, "metadata": old["metadata"] | body["metadata"]})


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setattr(rounds.Rounds, "debounce_seconds", 0.01)
    monkeypatch.setattr(policyloop.StatusLoop, "debounce_seconds", 0.01)
    monkeypatch.setattr(policyworld, "SETTINGS_DEBOUNCE", 0.01)
    cluster = Cluster()
    tasks = [
        asyncio.create_task(work)
        for work in (
            cluster.endpoints.run(),
            cluster.statuses.run(),
            cluster.world.wait_for_kinds(),
            cluster.world.follow_settings(),
            *(watch.run(cluster.server) for watch in cluster.world.watches.values()),
        )
    ]
    yield cluster
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Cluster:
    def __init__(self) -> None:
        self.server = Server()
        self.leads = True
        self.watched = Watched()
        self.world = PolicyWorld(self.server, mesh=lambda: self.watched)
        hands = PolicyHands(self.server, self.world)
        self.endpoints = EndpointLoop(Metrics(), lambda: self.leads, self.world, hands)
        self.statuses = StatusLoop(Metrics(), lambda: self.leads, self.world, hands)
        self.world.endpoints_changed = self.endpoints.wake
        self.world.policies_changed = self.statuses.wake
        self.server.put("/api/v1/namespaces/shop", {"metadata": {"name": "shop", "labels": {"team": "x"}}})
        self.configure(True)

    def configure(
        self, enabled: bool, *, encrypted: bool = False, phase: Phase = Phase.OFF, live: bool = True
    ) -> None:
        """`enabled`: policy. Node `a` has no pod CIDR."""
        config = MeshConfig(policy=PolicySettings(enabled=enabled), encryption=Encryption(enabled=encrypted))
        self.watched = Watched(
            nodes={"a": Node(name="a", uid="node-a", live=live)},
            mesh_nodes={"a": MeshNode(name="a", owner="node-a", spec=Spec(phase=phase))},
            configs={"default": Config(uid="c", resource_version="1", generation=1, config=config)},
        )
        self.server.put(
            f"{MESH}/{names.MESHCONFIGS}/default",
            {
                "metadata": {"name": "default"},
                "spec": {"policy": {"enabled": enabled}, "encryption": {"enabled": encrypted}},
            },
        )
        self.world.mesh_changed.set()

    def add_pod(self, name: str, address: str, **labels: str) -> None:
        self.server.put(
            f"/api/v1/pods/{name}",
            {
                "metadata": {"name": name, "namespace": "shop", "labels": labels},
                "spec": {"nodeName": "a"},
                "status": {"phase": "Running", "podIPs": [{"ip": address}]},
            },
        )

    def endpoints_of(self) -> dict[str, int]:
        return {
            each["pod"]["name"]: each["identity"]
            for item in self.server.of(names.MESHENDPOINTSLICES).values()
            for each in item["spec"]["endpoints"]
        }

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)


async def test_pods_get_identities_and_policies_a_status(cluster: Cluster) -> None:
    server = cluster.server
    cluster.add_pod("one", "10.0.0.1", app="web")
    cluster.add_pod("two", "10.0.0.2", app="web")
    cluster.add_pod("three", "10.0.0.3", app="api")
    await cluster.until(lambda: len(cluster.endpoints_of()) == 3)
    found = cluster.endpoints_of()
    assert found["one"] == found["two"] != found["three"]
    assert set(server.of(names.MESHIDENTITIES)) == {
        f"{MESH}/{names.MESHIDENTITIES}/256",
        f"{MESH}/{names.MESHIDENTITIES}/257",
    }

    where = f"{MESH}/namespaces/shop/{names.MESHPOLICIES}/p"
    server.put(
        where,
        {
            "metadata": {"name": "p", "namespace": "shop", "generation": 1},
            "spec": {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": []},
        },
    )
    await cluster.until(lambda: "status" in server.objects[where])
    assert server.objects[where]["status"]["nodes"] == "0/1"
    report = f"{MESH}/{names.MESHPOLICYREPORTS}/a"
    await cluster.until(lambda: report in server.objects)
    uid = server.objects[where]["metadata"]["uid"]
    status = {"enabled": True, "policies": [{"uid": uid, "generation": 1}]}
    server.put(report, server.objects[report] | {"status": status})
    await cluster.until(lambda: server.objects[where]["status"]["nodes"] == "1/1")

    server.remove("/api/v1/pods/one")
    await cluster.until(lambda: "one" not in cluster.endpoints_of())
    assert len(server.of(names.MESHENDPOINTSLICES)) == 1

    cluster.configure(False)
    await cluster.until(
        lambda: (
            not any(
                server.of(kind)
                for kind in (names.MESHENDPOINTSLICES, names.MESHIDENTITIES, names.MESHPOLICYREPORTS)
            )
        )
    )
    await cluster.until(lambda: "PolicyDisabled" in str(server.objects[where]["status"]["conditions"]))


async def test_a_watch_that_is_late_deletes_nothing(cluster: Cluster) -> None:
    cluster.add_pod("one", "10.0.0.1", app="web")
    await cluster.until(lambda: "one" in cluster.endpoints_of())
    # The watch says what was true once, or nothing yet; the API server knows better.
    for late in (MeshConfig(), None):
        cluster.watched = Watched(
            configs={"default": Config(uid="c", resource_version="0", generation=1, config=late)}
            if late
            else {}
        )
        cluster.endpoints.wake()
        cluster.statuses.wake()
        await asyncio.sleep(0.1)
        assert "one" in cluster.endpoints_of()


async def test_one_identity_that_is_refused_holds_up_no_other(cluster: Cluster) -> None:
    def refuse(method: str, path: str, body: Any) -> None:
        if method == "POST" and "odd" in str(body):
            raise ApiError(422, "Invalid", "too odd")

    cluster.server.refuse = refuse
    cluster.add_pod("odd", "10.0.0.1", app="odd")
    cluster.add_pod("one", "10.0.0.2", app="web")
    await cluster.until(lambda: "one" in cluster.endpoints_of())
    cluster.add_pod("two", "10.0.0.3", app="api")
    await cluster.until(lambda: "two" in cluster.endpoints_of())
    assert "odd" not in cluster.endpoints_of()


async def test_who_does_not_lead_writes_nothing(cluster: Cluster) -> None:
    cluster.leads = False
    cluster.add_pod("one", "10.0.0.1", app="web")
    await asyncio.sleep(0.2)
    assert not cluster.server.writes
    cluster.leads = True
    cluster.endpoints.leadership_changed()
    await cluster.until(lambda: "one" in cluster.endpoints_of())


async def test_somebody_elses_write_is_seen_and_mended(cluster: Cluster) -> None:
    cluster.add_pod("one", "10.0.0.1", app="web")
    await cluster.until(lambda: "one" in cluster.endpoints_of())
    server = cluster.server
    (path,) = server.of(names.MESHENDPOINTSLICES)
    server.put(path, {**server.objects[path], "spec": {"count": 0, "endpoints": []}})
    await cluster.until(lambda: "one" in cluster.endpoints_of())
    (path,) = server.of(names.MESHENDPOINTSLICES)
    server.remove(path)
    await cluster.until(lambda: "one" in cluster.endpoints_of())


async def test_a_change_after_a_rest_is_looked_at_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock, cluster = Clock(), Cluster()
    for watch in cluster.world.watches.values():
        watch.complete = True
    for module in (policyloop, loop, rounds):
        monkeypatch.setattr(module, "time", clock)

    def look(inputs: object) -> Plan:
        clock.now += 4
        return Plan()

    monkeypatch.setattr(policyloop, "reconcile", look)
    monkeypatch.setattr(policystatus, "plan", lambda *inputs: look(inputs).actions)
    monkeypatch.setattr(loop, "reconcile", lambda inputs: (look(inputs), reconcile.Plan())[1])
    cluster.world.stale.clear()

    class Known(World):
        async def gather(self) -> reconcile.Inputs:
            return reconcile.Inputs(
                nodes={},
                mesh_nodes={},
                secrets={},
                config=None,
                status=None,
                found_cidrs=(),
                recent_ids=(),
                now=datetime(2026, 1, 1, tzinfo=UTC),
            )

    nodes = loop.Loop(Metrics(), lambda: True, cluster.server, Known(cluster.server, ""), "one")
    for each, least in (
        (nodes, rounds.DEBOUNCE),
        (cluster.endpoints, rounds.DEBOUNCE),
        (cluster.statuses, policyloop.STATUS_DEBOUNCE),
    ):
        await each._round()
        assert each.debounce == rounds.SHARE * 4
        clock.now += 5
        assert each.debounce == rounds.SHARE * 4 - 5
        clock.now += 5
        assert each.debounce == least


async def test_news_of_nodes_are_looked_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look goes through all nodes, and while keys change there is always news of some."""
    await cluster.until(lambda: not cluster.world.mesh_changed.is_set())
    await asyncio.sleep(0.1)
    looks = 0

    def mesh() -> Watched:
        nonlocal looks
        looks += 1
        return cluster.watched

    monkeypatch.setattr(cluster.world, "mesh", mesh)
    cluster.world.mesh_changed.set()
    await cluster.until(lambda: not cluster.world.mesh_changed.is_set())
    await asyncio.sleep(0.1)
    assert looks == 1


async def test_encryption_has_pods_published_where_nodes_have_no_cidr(cluster: Cluster) -> None:
    changes: list[bool] = []
    cluster.endpoints.published_changed = lambda: changes.append(cluster.endpoints.published.complete)
    cluster.configure(False)
    cluster.add_pod("one", "10.0.0.1", app="web")
    await asyncio.sleep(0.1)
    assert not cluster.endpoints_of() and not cluster.endpoints.published.complete
    cluster.configure(False, encrypted=True)
    await cluster.until(lambda: cluster.endpoints.published.complete)
    assert "one" in cluster.endpoints_of() and changes[-1]
    assert cluster.endpoints.published.families == {4}
    assert not cluster.server.of(names.MESHPOLICYREPORTS), "nobody judges by policies"

    # It goes on while the nodes are being led out of the tunnels, and whether kubelet is well or not.
    cluster.configure(False, phase=Phase.DRAINING, live=False)
    cluster.add_pod("two", "10.0.0.2", app="web")
    await cluster.until(lambda: "two" in cluster.endpoints_of())

    cluster.configure(True, phase=Phase.DRAINING)
    await cluster.until(lambda: bool(cluster.server.of(names.MESHPOLICYREPORTS)))
    cluster.configure(False, phase=Phase.DRAINING)
    await cluster.until(lambda: not cluster.server.of(names.MESHPOLICYREPORTS))
    assert "one" in cluster.endpoints_of()

    cluster.configure(False)
    await cluster.until(lambda: not cluster.server.of(names.MESHENDPOINTSLICES))
    await cluster.until(lambda: not cluster.server.of(names.MESHIDENTITIES))
    await cluster.until(lambda: not cluster.endpoints.published.complete)


async def test_a_node_that_has_just_joined_may_be_given_its_cidr_in_a_moment(cluster: Cluster) -> None:
    cluster.configure(False, encrypted=True, live=False)
    cluster.add_pod("one", "10.0.0.1", app="web")
    await asyncio.sleep(0.2)
    assert not cluster.endpoints_of()


async def test_who_knows_no_nodes_yet_deletes_no_endpoints(cluster: Cluster) -> None:
    cluster.configure(False, encrypted=True)
    cluster.add_pod("one", "10.0.0.1", app="web")
    await cluster.until(lambda: "one" in cluster.endpoints_of())
    cluster.watched = Watched()
    cluster.world.mesh_changed.set()
    cluster.endpoints.wake()
    await asyncio.sleep(0.2)
    assert "one" in cluster.endpoints_of()


async def test_a_map_that_fills_up_is_told_once(cluster: Cluster) -> None:
    """From a node's report to the condition of MeshStatus and one Event."""
    changes: list[Pressure | None] = []
    cluster.world.pressure_changed = lambda: changes.append(cluster.world.pressure())
    events: list[Event] = []
    world = World(cluster.server, "ns", pressure=cluster.world.pressure)
    hands = Hands(cluster.server, world, events.append)
    report = f"{MESH}/{names.MESHPOLICYREPORTS}/a"
    status: MeshStatus | None = None

    async def look(*, live: bool = True) -> conditions.Condition | None:
        """As the loop of nodes does, for a node that has had its part."""
        nonlocal status
        plan = reconcile.reconcile(
            Inputs(
                nodes={"a": Node(name="a", uid="node-a", live=live)},
                mesh_nodes={"a": MeshNode(name="a", owner="node-a")},
                secrets={},
                config=None,
                status=status,
                found_cidrs=(),
                recent_ids=(),
                now=datetime(2026, 1, 1, tzinfo=UTC),
                pressure=world.pressure(),
            )
        )
        for action in plan.actions:
            if isinstance(action, WriteStatus):
                await hands.apply(action)
                (found,) = cluster.server.of(names.MESHSTATUSES).values()
                status = MeshStatus.from_object(found)
        assert status
        return conditions.find(status.conditions, conditions.POLICY_MAP_PRESSURE)

    async def say(*pressure: MapPressure, enabled: bool = True) -> None:
        told = {each.map: vars_of(each) for each in pressure}
        cluster.server.put(
            report,
            {"metadata": {"name": "a"}, "status": {"enabled": enabled, "mapPressure": list(told.values())}},
        )
        wanted = Pressure(enabled, {"a": pressure} if pressure else {}, frozenset("a" if enabled else ""))
        await cluster.until(lambda: cluster.world.pressure() == wanted)

    def vars_of(each: MapPressure) -> dict[str, Any]:
        return {
            "map": each.map,
            "entries": each.entries,
            "capacity": each.capacity,
            "full": each.full,
            "leftOut": each.left_out,
        }

    await cluster.until(lambda: report in cluster.server.objects)
    await cluster.until(lambda: cluster.world.pressure() == Pressure(False, {}))
    assert await look() is None
    await say()
    found = await look()
    assert found and (found.status, found.reason) == (False, "MapsHaveRoom")

    await say(MapPressure("policy", 83, 100))
    found = await look()
    assert found and (found.status, found.reason) == (True, "MapsFillUp")
    assert "a (policy: 83 % of 100 entries)" in found.message
    await say(
        MapPressure("policy", 100, 100, True, 7),
        MapPressure("services", 100, 100, True, 1),
        MapPressure("cidrs", 90, 100),
    )
    found = await look()
    assert found and (found.status, found.reason) == (True, "MapFull")
    assert found.message == (
        "policy maps of these nodes are full: a (policy: pods are closed, no room in 100 entries, "
        "services: services are judged as ordinary addresses, no room in 100 entries, "
        "cidrs: 90 % of 100 entries)"
    )
    (event,) = [each for each in events if each.reason == "PolicyMapPressure"]
    assert event.warning and event.kind == "MeshStatus" and "83 %" in event.note
    # An operator that starts doesn't know yet: what was said stays.
    world.pressure = lambda: None
    found = await look()
    assert found and found.status is True
    world.pressure = cluster.world.pressure
    found = await look(live=False)
    assert found and found.status is False
    await say(enabled=False)
    found = await look()
    assert found and (found.status, found.reason) == (False, "PolicyDisabled")
    assert len([each for each in events if each.reason == "PolicyMapPressure"]) == 1
    assert len(changes) >= 4 and None not in changes
