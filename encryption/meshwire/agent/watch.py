"""What the API server says, kept as small values. kopf watches, our handlers keep; nothing is written."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any, Final

import aiohttp
import kopf

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import MeshNode, Phase, Status
from meshwire.encryption.model import ClusterNode, Member
from meshwire.encryption.pods import PodAddresses, Pods
from meshwire.kube.client import ApiError, Client, Cluster, Object
from meshwire.kube.follow import follow
from meshwire.kube.login import login

log = logging.getLogger("meshwire.agent")

PRUNE_DELAY: Final = 5.0
"""Seconds after the first object of a new list: the rest of it has to be in before anything counts as
gone."""
RETRY: Final = 2.0
"""Seconds between attempts to list."""

PATHS: Final = {
    names.MESHNODES: f"/apis/{names.API_VERSION}/{names.MESHNODES}",
    names.MESHCONFIGS: f"/apis/{names.API_VERSION}/{names.MESHCONFIGS}",
    "nodes": "/api/v1/nodes",
}
SLICES: Final = f"/apis/{names.API_VERSION}/{names.MESHENDPOINTSLICES}"
SLICES_PER_PAGE: Final = "20"
"""A hundred pods each, which take a megabyte or two until they are parsed."""
KINDS: Final = frozenset({names.MESHCONFIGS, names.MESHNODES})
"""Those that a cluster has only once the CRDs are applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All objects at one moment. `config` is None where there is no MeshConfig; `config_spec` is what was
    parsed, to be kept on disk. `status` is what the API server has of this node's. `pods`: as in
    meshwire.encryption.desired.Inputs."""

    members: Mapping[str, Member] = field(default_factory=dict)
    nodes: Mapping[str, ClusterNode] = field(default_factory=dict)
    config: MeshConfig | InvalidSpec | None = None
    config_spec: Mapping[str, Any] = field(default_factory=dict)
    status: Status | None = None
    pods: Pods | None = field(default_factory=dict)


def parse_member(body: Mapping[str, Any]) -> Member:
    """Raises InvalidSpec."""
    parsed = MeshNode.from_object({"metadata": body["metadata"], "spec": body.get("spec") or {}})
    return Member(
        name=parsed.name,
        uid=parsed.uid,
        created=parsed.created,
        generation=parsed.generation,
        spec=parsed.spec,
    )


def parse_node(body: Mapping[str, Any]) -> ClusterNode:
    """The little of a Node that agents need."""
    spec, status = body.get("spec") or {}, body.get("status") or {}
    cidrs = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    return ClusterNode(
        name=body["metadata"]["name"],
        ready=any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in status.get("conditions") or ()
        ),
        addresses=tuple(
            ip_address(address["address"])
            for address in status.get("addresses") or ()
            if address["type"] == "InternalIP"
        ),
        pod_cidrs=tuple(ip_network(cidr) for cidr in cidrs),
    )


def parse_config(body: Mapping[str, Any]) -> tuple[MeshConfig | InvalidSpec, dict[str, Any]]:
    """The config, or why it can't be, and its spec as written."""
    spec = dict(body.get("spec") or {})
    source = {"metadata": {"generation": body["metadata"].get("generation", 0)}, "spec": spec}
    try:
        return MeshConfig.from_object(source), spec
    except InvalidSpec as error:
        return error, spec


def parse_status(body: Mapping[str, Any]) -> Status:
    try:
        return MeshNode.from_object({"status": body.get("status") or {}}).status
    except InvalidSpec:
        return Status()


def parse_slice(body: Object) -> tuple[str, list[tuple[str, tuple[bytes, ...]]]]:
    """A MeshEndpointSlice's name, and of each pod its node and addresses. Nothing else of a pod is kept."""
    return body["metadata"]["name"], [
        (endpoint["node"], tuple(map(_packed, endpoint["addresses"])))
        for endpoint in body["spec"]["endpoints"]
    ]


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of an object."""

    name: str
    created: str
    value: Any


class Store:
    """What is known of each resource's objects, by UID, and whether that is everything.

    An event handler's view has two gaps. It doesn't say when the first list is in; kopf's indexes would, but
    hold every object whole until the last one is there: a thousand Nodes, 100 MB. And where a watch was away
    for too long and kopf lists anew, it doesn't say what was deleted meanwhile. A list of UIDs alone closes
    both."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._objects: dict[str, dict[str, _Kept]] = {resource: {} for resource in PATHS}
        self._status: Status | None = None
        self._missing: dict[str, frozenset[str]] = {}
        self._deleted: dict[str, set[str]] = {resource: set() for resource in PATHS}
        """Since the last list was compared."""
        self._malformed: set[str] = set()

    @property
    def complete(self) -> bool:
        """A peer that is missing from the snapshot is gone."""
        return self._missing.keys() == PATHS.keys() and not any(self._missing.values())

    def put(self, resource: str, body: Mapping[str, Any]) -> None:
        metadata = body["metadata"]
        uid, name, created = metadata["uid"], metadata["name"], metadata.get("creationTimestamp", "")
        if resource == names.MESHNODES and name == self._node:
            self._status = parse_status(body)
        try:
            value = _PARSE[resource](body)
        except InvalidSpec as error:
            log.warning("%s %s is malformed, its last good form stays: %s", resource, name, error)
            self._malformed.add(uid)
        else:
            kept = self._objects[resource].get(uid)
            # An equal value stays the same object: comparing two snapshots is then a matter of identities.
            if kept is None or kept.value != value:
                self._objects[resource][uid] = _Kept(name, created, value)
        self._seen(resource, uid)

    def remove(self, resource: str, body: Mapping[str, Any]) -> None:
        uid = body["metadata"]["uid"]
        self._objects[resource].pop(uid, None)
        self._deleted[resource].add(uid)
        self._seen(resource, uid)

    def known(self, resource: str) -> frozenset[str]:
        """UIDs."""
        return frozenset(self._objects[resource])

    def reconcile(self, resource: str, before: frozenset[str], there: frozenset[str]) -> None:
        """`there` are the UIDs that a list has, `before` those that were known when it was asked for."""
        if gone := before - there:
            log.info("%d %s were deleted while nobody watched", len(gone), resource)
        for uid in gone:
            self._objects[resource].pop(uid, None)
        accounted = self._objects[resource].keys() | self._deleted[resource] | self._malformed
        self._missing[resource] = there - accounted
        self._deleted[resource].clear()

    @property
    def needs_pods(self) -> bool:
        """Encryption is on, and there are nodes whose pods are in no CIDR."""
        return any(
            kept.value.spec.phase is not Phase.OFF for kept in self._objects[names.MESHNODES].values()
        ) and any(not kept.value.pod_cidrs for kept in self._objects["nodes"].values())

    def snapshot(self) -> World:
        config = self._latest(names.MESHCONFIGS).get(names.CONFIG_NAME)
        members = self._latest(names.MESHNODES)
        return World(
            members=members,
            nodes=self._latest("nodes"),
            config=config[0] if config else None,
            config_spec=config[1] if config else {},
            status=self._status if self._node in members else None,
        )

    def _seen(self, resource: str, uid: str) -> None:
        if missing := self._missing.get(resource):
            self._missing[resource] = missing - {uid}

    def _latest(self, resource: str) -> dict[str, Any]:
        """By name. Where an object was made anew while nobody watched, the old one may still be there."""
        found: dict[str, _Kept] = {}
        for kept in self._objects[resource].values():
            if kept.name not in found or found[kept.name].created < kept.created:
                found[kept.name] = kept
        return {name: kept.value for name, kept in found.items()}


_PARSE: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    names.MESHNODES: parse_member,
    names.MESHCONFIGS: parse_config,
    "nodes": parse_node,
}


class Watch:
    """One run of kopf: its handlers fill a Store. `follow` is called with the way to take a snapshot, first
    when the Store is complete, then for every event."""

    def __init__(
        self, node: str, cluster: Cluster, client: Client, follow: Callable[[Callable[[], World]], None]
    ) -> None:
        self._client = client
        self._follow = follow
        self._store = Store(node)
        self._listed = asyncio.Event()
        self._started = False
        self._needs_pods = asyncio.Event()
        self._pods: PodAddresses | None = None
        self._following: asyncio.Task[None] | None = None
        self.registry = make_registry(cluster, self._event)

    async def complete(self) -> None:
        """Lists UIDs at the start, and whenever kopf lists anew. For ever."""
        while True:
            await self._list(PATHS)
            if not self._store.complete:
                # Mostly kopf is still listing; but what was deleted between our list and its own never
                # comes.
                await asyncio.sleep(RETRY)
                continue
            self._listed.clear()
            await self._listed.wait()
            await asyncio.sleep(PRUNE_DELAY)

    async def follow_pods(self) -> None:
        """Follows MeshEndpointSlices while they are needed. For ever. Each time encryption is turned on they
        are listed anew: the operator has published all pods before it gave the order."""
        while True:
            await self._needs_pods.wait()
            self._following = asyncio.create_task(self._follow_pods(), name="watch pods")
            try:
                await self._following
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    self._following.cancel()
                    raise
            finally:
                self._pods, self._following = None, None

    async def _follow_pods(self) -> None:
        known: set[str] = set()
        pods = PodAddresses()
        async for kind, slices in follow(self._client, SLICES, parse_slice, limit=SLICES_PER_PAGE):
            there = {name for name, _ in slices}
            for name in there if kind == "DELETED" else known - there if kind == "LISTED" else ():
                known.discard(name)
                pods.remove_slice(name)
            if kind != "DELETED":
                known |= there
                for name, content in slices:
                    pods.put_slice(name, content)
                self._pods = pods
            self._changed()

    def _snapshot(self) -> World:
        world = self._store.snapshot()
        if not self._needs_pods.is_set():
            return world
        return replace(world, pods=self._pods.snapshot() if self._pods else None)

    async def _list(self, resources: Iterable[str]) -> None:
        for resource in resources:
            while True:
                before = self._store.known(resource)
                try:
                    there = await self._client.uids(PATHS[resource])
                    break
                except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                    log.warning("can't list %s, trying again: %s", resource, error)
                    await asyncio.sleep(RETRY)
            self._store.reconcile(resource, before, there)
        self._changed()

    def _event(self, resource: str, type: str | None, body: Mapping[str, Any]) -> None:
        if type == "DELETED":
            self._store.remove(resource, body)
        else:
            self._store.put(resource, body)
        if type is None and self._started:
            self._listed.set()
        self._changed()

    def _changed(self) -> None:
        if self._store.complete:
            if self._store.needs_pods:
                self._needs_pods.set()
            elif self._needs_pods.is_set():
                self._needs_pods.clear()
                # The next order must not be carried out by what was known at the time of this one.
                self._pods = None
                if self._following:
                    self._following.cancel()
            # Who has just started has what the agent before knew in the kernel, and doesn't act on less.
            if self._pods or not self._needs_pods.is_set():
                self._started = True
        if self._started:
            self._follow(self._snapshot)


def make_registry(
    cluster: Cluster, event: Callable[[str, str | None, Mapping[str, Any]], None]
) -> kopf.OperatorRegistry:
    """Handlers that call `event` with the resource, the event's type (None while listing) and the object."""
    # Not the smart registry of `@kopf.on` without one: that imports the official client for its login.
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login(cluster)

    # Coroutines, though they wait for nothing: kopf runs plain functions in threads.
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHNODES, registry=registry)
    async def meshnode(type: str | None, event: kopf.RawEvent, **_: Any) -> None:
        handle(names.MESHNODES, type, event)

    @kopf.on.event(names.GROUP, names.VERSION, names.MESHCONFIGS, registry=registry)
    async def meshconfig(type: str | None, event: kopf.RawEvent, **_: Any) -> None:
        handle(names.MESHCONFIGS, type, event)

    @kopf.on.event("", "v1", "nodes", registry=registry)
    async def node(type: str | None, event: kopf.RawEvent, **_: Any) -> None:
        handle("nodes", type, event)

    def handle(resource: str, type: str | None, raw: kopf.RawEvent) -> None:
        event(resource, type, raw["object"])

    return registry
