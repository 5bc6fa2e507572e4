"""What is kept of the API's objects, and when it is everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import pytest

from meshwire.agent import watch
from meshwire.agent.watch import PATHS, Store, Watch, World
from meshwire.api.meshconfig import MeshConfig
from meshwire.kube.client import Cluster


def body(name: str, uid: str, *, created: str = "2026-01-01T00:00:00Z", **parts: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": uid, "creationTimestamp": created}, **parts}


def listed(store: Store, **there: list[str]) -> None:
    """All three lists come in, with these UIDs."""
    for resource in PATHS:
        store.reconcile(resource, store.known(resource), frozenset(there.get(resource, [])))


def test_a_store_is_complete_when_every_listed_object_has_been_seen() -> None:
    store = Store("a")
    assert not store.complete
    store.put("nodes", body("a", "1"))
    listed(store, nodes=["1", "2"], meshnodes=["3"])
    assert not store.complete
    store.put("nodes", body("b", "2"))
    assert not store.complete
    store.remove("meshnodes", body("a", "3"))
    assert store.complete
    assert store.snapshot().nodes.keys() == {"a", "b"}


def test_an_empty_cluster_is_complete_at_once() -> None:
    store = Store("a")
    listed(store)
    assert store.complete
    assert store.snapshot() == World()


def test_an_object_deleted_while_the_list_was_on_its_way_is_not_waited_for() -> None:
    store = Store("a")
    store.remove("nodes", body("b", "2"))
    listed(store, nodes=["2"])
    assert store.complete


def test_an_object_made_while_the_list_was_on_its_way_stays() -> None:
    store = Store("a")
    before = store.known("nodes")
    store.put("nodes", body("b", "2"))
    store.reconcile("nodes", before, frozenset())
    assert store.snapshot().nodes.keys() == {"b"}


def test_what_was_deleted_while_nobody_watched_goes() -> None:
    store = Store("a")
    for name, uid in (("a", "1"), ("b", "2")):
        store.put("nodes", body(name, uid))
    listed(store, nodes=["1"])
    assert store.snapshot().nodes.keys() == {"a"}


def test_of_two_objects_of_one_name_the_newer_counts() -> None:
    """Made anew while nobody watched: the old one is still there until the next list."""
    store = Store("a")
    old = body("b", "1", spec={"podCIDR": "10.244.1.0/24"})
    new = body("b", "2", created="2026-01-02T00:00:00Z", spec={"podCIDR": "10.244.2.0/24"})
    for order in ((old, new), (new, old)):
        for each in order:
            store.put("nodes", each)
        assert str(store.snapshot().nodes["b"].pod_cidrs[0]) == "10.244.2.0/24"


def test_an_equal_object_is_the_same_object() -> None:
    store = Store("a")
    store.put("nodes", body("b", "1", status={"conditions": [{"type": "Ready", "status": "True"}]}))
    before = store.snapshot()
    heartbeat = {"type": "Ready", "status": "True", "lastHeartbeatTime": "later"}
    store.put("nodes", body("b", "1", status={"conditions": [heartbeat]}))
    assert store.snapshot().nodes["b"] is before.nodes["b"]


def test_a_malformed_meshnode_keeps_its_last_good_form() -> None:
    store = Store("a")
    store.put("meshnodes", body("b", "1", spec={"id": 7}))
    store.put("meshnodes", body("b", "1", spec={"id": -1}))
    assert store.snapshot().members["b"].spec.id == 7


def test_only_the_own_status_is_kept() -> None:
    store = Store("a")
    store.put("meshnodes", body("b", "2", status={"leaked": 9}))
    assert store.snapshot().status is None
    store.put("meshnodes", body("a", "1", status={"leaked": 3}))
    status = store.snapshot().status
    assert status is not None
    assert status.leaked == 3
    store.remove("meshnodes", body("a", "1"))
    assert store.snapshot().status is None


def test_only_the_config_of_the_right_name_counts() -> None:
    store = Store("a")
    store.put("meshconfigs", body("other", "1", spec={"encryption": {"port": 1}}))
    assert store.snapshot().config is None
    store.put("meshconfigs", body("default", "2", spec={"encryption": {"port": 2}}))
    world = store.snapshot()
    assert isinstance(world.config, MeshConfig)
    assert world.config.encryption.port == 2
    assert world.config_spec == {"encryption": {"port": 2}}


class Lists:
    """Answers uids() from what the test says there is; the first answer to each may be a failure."""

    def __init__(self) -> None:
        self.there: dict[str, set[str]] = {resource: set() for resource in PATHS}
        self.fail = 0

    async def uids(self, path: str) -> frozenset[str]:
        if self.fail:
            self.fail -= 1
            raise TimeoutError
        return frozenset(next(self.there[resource] for resource, its in PATHS.items() if its == path))


class Slices(Lists):
    """Lists, and MeshEndpointSlices that are listed when `open` is set, and then watched."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.slices: dict[str, Any] = {}
        self.news: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.lists = 0

    async def get(self, path: str, **params: str) -> Any:
        assert path == watch.SLICES and params == {"limit": watch.SLICES_PER_PAGE}
        self.lists += 1
        await self.open.wait()
        items = [dict(item) for item in self.slices.values()]
        return {"kind": "MeshEndpointSliceList", "metadata": {"resourceVersion": "1"}, "items": items}

    async def watch(self, path: str, **params: str) -> AsyncIterator[tuple[str, Any]]:
        while True:
            yield await self.news.get()


def slice_of(name: str, **pods: str) -> dict[str, Any]:
    """Address by node."""
    endpoints = [{"node": node, "addresses": [address]} for node, address in pods.items()]
    return {"metadata": {"name": name, "resourceVersion": "2"}, "spec": {"endpoints": endpoints}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY", 0.01)
    monkeypatch.setattr(watch, "PRUNE_DELAY", 0.01)


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not done():
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("quick")
async def test_nobody_is_told_before_everything_is_in_and_everybody_after() -> None:
    lists, told = Lists(), []
    lists.there["nodes"] = {"1", "2"}
    lists.fail = 2

    def follow(source: Callable[[], World]) -> None:
        told.append(source())

    watching = Watch("a", Cluster(server="https://x"), lists, follow)  # type: ignore[arg-type]
    task = asyncio.create_task(watching.complete())
    watching._event("nodes", None, body("a", "1"))
    await asyncio.sleep(0.05)
    assert told == []
    watching._event("nodes", None, body("b", "2"))
    await until(lambda: told)
    assert told[-1].nodes.keys() == {"a", "b"}
    # kopf lists anew: the object that is not in it is gone.
    lists.there["nodes"] = {"1"}
    watching._event("nodes", None, body("a", "1"))
    await until(lambda: told[-1].nodes.keys() == {"a"})
    task.cancel()


@pytest.mark.usefixtures("quick")
async def test_an_object_that_went_between_two_lists_holds_nobody_up() -> None:
    """It is in ours and not in kopf's, and no event will ever name it."""
    lists, told = Lists(), []
    lists.there["nodes"] = {"1", "gone"}

    def follow(source: Callable[[], World]) -> None:
        told.append(source())

    watching = Watch("a", Cluster(server="https://x"), lists, follow)  # type: ignore[arg-type]
    task = asyncio.create_task(watching.complete())
    watching._event("nodes", None, body("a", "1"))
    await asyncio.sleep(0.05)
    assert told == []
    lists.there["nodes"] = {"1"}
    await until(lambda: told)
    task.cancel()


@pytest.mark.usefixtures("quick")
async def test_pods_are_followed_while_nodes_without_cidr_encrypt() -> None:
    lists, told = Slices(), []

    def follow(source: Callable[[], World]) -> None:
        told.append(source())

    def order(phase: str) -> None:
        watching._event(
            "meshnodes", "MODIFIED", body("b", "2", spec={"id": 2, "encryption": {"phase": phase}})
        )

    watching = Watch("a", Cluster(server="https://x"), lists, follow)  # type: ignore[arg-type]
    lists.there |= {"nodes": {"1"}, "meshnodes": {"2"}}
    lists.slices["s"] = slice_of("s", a="10.0.0.1", b="fd00::1")
    tasks = [asyncio.create_task(watching.complete()), asyncio.create_task(watching.follow_pods())]
    watching._event("nodes", None, body("b", "1"))
    order("Off")
    await until(lambda: told)
    assert told[-1].pods == {} and lists.lists == 0

    # The order comes; what is published is not known yet.
    order("Enabling")
    assert told[-1].pods is None
    lists.open.set()
    one, two = ip_address("10.0.0.1").packed, ip_address("fd00::1").packed
    await until(lambda: told[-1].pods == {"a": {one}, "b": {two}})
    await lists.news.put(("ADDED", slice_of("t", b="10.0.0.2")))
    await until(lambda: told[-1].pods == {"a": {one}, "b": {two, ip_address("10.0.0.2").packed}})
    await lists.news.put(("DELETED", slice_of("s")))
    await until(lambda: told[-1].pods == {"b": {ip_address("10.0.0.2").packed}})

    order("Off")
    assert told[-1].pods == {}
    # The next time everything is asked for anew.
    lists.slices = {"u": slice_of("u", a="10.0.0.1")}
    order("Enabling")
    assert told[-1].pods is None
    await until(lambda: told[-1].pods == {"a": {one}})
    assert lists.lists == 2
    watching._event("nodes", "MODIFIED", body("b", "1", spec={"podCIDRs": ["10.0.2.0/24"]}))
    assert told[-1].pods == {}, "every node has a CIDR"
    for task in tasks:
        task.cancel()


@pytest.mark.usefixtures("quick")
async def test_who_starts_in_an_encrypted_cluster_without_cidrs_waits_for_pods() -> None:
    """The agent before it has written them to the kernel: less than that is nothing to act on."""
    lists, told = Slices(), []

    def follow(source: Callable[[], World]) -> None:
        told.append(source())

    watching = Watch("a", Cluster(server="https://x"), lists, follow)  # type: ignore[arg-type]
    lists.there |= {"nodes": {"1"}, "meshnodes": {"2"}}
    lists.slices["s"] = slice_of("s", a="10.0.0.1")
    tasks = [asyncio.create_task(watching.complete()), asyncio.create_task(watching.follow_pods())]
    watching._event("nodes", None, body("b", "1"))
    watching._event("meshnodes", None, body("b", "2", spec={"id": 2, "encryption": {"phase": "Enforcing"}}))
    await until(lambda: lists.lists)
    await asyncio.sleep(0.05)
    assert told == []
    lists.open.set()
    await until(lambda: told)
    assert told[0].pods == {"a": frozenset({ip_address("10.0.0.1").packed})}
    for task in tasks:
        task.cancel()
