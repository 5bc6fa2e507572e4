"""What the API server says, kept as small values by kopf's indexes. Reads only; a change wakes the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Final

import aiohttp
import kopf

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import MeshNode, Status
from meshwire.encryption.model import ClusterNode, Member
from meshwire.kube.client import ApiError, Client, Cluster
from meshwire.kube.login import login

log = logging.getLogger("meshwire.agent")

PRUNE_DELAY: Final = 5.0
"""Seconds after the first object of a new list: the rest of it has to be in before anything counts as
gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All objects at one moment. `config` is None where there is no MeshConfig; `config_spec` is what was
    parsed, to be kept on disk."""

    members: Mapping[str, Member] = field(default_factory=dict)
    nodes: Mapping[str, ClusterNode] = field(default_factory=dict)
    config: MeshConfig | InvalidSpec | None = None
    config_spec: Mapping[str, Any] = field(default_factory=dict)
    status: Status | None = None


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


class Watch:
    """The API's objects as kopf's indexes hold them. kopf holds events back until every first list is in, so
    the first snapshot is whole: a peer that is missing from it is gone."""

    def __init__(self, node: str, cluster: Cluster, follow: Callable[[Callable[[], World]], None]) -> None:
        """`follow` is called on every event, with the way to take a snapshot."""
        self._follow = follow
        self._node = node
        self._indexes: Mapping[str, kopf.Index[str, Any]] | None = None
        self._gone: frozenset[str] = frozenset()
        self.relisted = asyncio.Event()
        """Set when kopf has listed anew, after a watch was lost for too long: it says nothing of what was
        deleted meanwhile."""
        self.registry = make_registry(node, cluster, self._event)

    @property
    def synced(self) -> bool:
        return self._indexes is not None

    def snapshot(self) -> World:
        """Only once `synced`."""
        assert self._indexes is not None
        statuses = self._latest("statuses")
        config = self._latest("configs").get(names.CONFIG_NAME)
        own = statuses.get(self._node)
        return World(
            members={name: each.value for name, each in self._latest("members").items()},
            nodes={name: each.value for name, each in self._latest("nodes").items()},
            config=config.value[0] if config else None,
            config_spec=config.value[1] if config else {},
            status=own.value if own else None,
        )

    def known(self, index: str) -> frozenset[str]:
        """UIDs."""
        return frozenset(each.uid for store in (self._indexes or {})[index].values() for each in store)

    def forget(self, uids: frozenset[str]) -> None:
        """These objects are gone. A UID never comes back."""
        self._gone |= uids
        self._follow(self.snapshot)

    def _latest(self, index: str) -> dict[str, _Kept]:
        """By name. Where an object was made anew while we didn't watch, the old one may still be there."""
        assert self._indexes is not None
        found = {}
        for name, store in self._indexes[index].items():
            if alive := [each for each in store if each.uid not in self._gone]:
                found[name] = max(alive, key=lambda each: each.created)
        return found

    def _event(self, type: str | None, indexes: Mapping[str, Any]) -> None:
        if type is None and self._indexes is not None:
            self.relisted.set()
        self._indexes = indexes
        self._follow(self.snapshot)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What an index keeps of an object."""

    uid: str
    created: str
    value: Any


def _kept(body: Mapping[str, Any], value: Any) -> dict[str, _Kept]:
    metadata = body["metadata"]
    return {metadata["name"]: _Kept(metadata.get("uid", ""), metadata.get("creationTimestamp", ""), value)}


def make_registry(
    node: str, cluster: Cluster, event: Callable[[str | None, Mapping[str, Any]], None]
) -> kopf.OperatorRegistry:
    """Handlers that index and then call `event` with its type and the indexes."""
    # Not the smart registry of `@kopf.on` without one: that imports the official client for its login.
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login(cluster)

    @kopf.index(names.GROUP, names.VERSION, names.MESHNODES, id="members", registry=registry)
    def members(body: kopf.Body, **_: Any) -> Mapping[str, _Kept] | None:
        metadata = dict(body["metadata"])
        try:
            parsed = MeshNode.from_object({"metadata": metadata, "spec": dict(body.get("spec") or {})})
        except InvalidSpec as error:
            log.warning("MeshNode %s is malformed, its last good form stays: %s", metadata["name"], error)
            return None
        member = Member(
            name=parsed.name,
            uid=parsed.uid,
            created=parsed.created,
            generation=parsed.generation,
            spec=parsed.spec,
        )
        return _kept(body, member)

    @kopf.index(names.GROUP, names.VERSION, names.MESHNODES, id="statuses", registry=registry)
    def statuses(body: kopf.Body, **_: Any) -> Mapping[str, _Kept]:
        if body["metadata"]["name"] != node:
            return {}
        try:
            return _kept(body, MeshNode.from_object({"status": dict(body.get("status") or {})}).status)
        except InvalidSpec:
            return _kept(body, Status())

    @kopf.index("", "v1", "nodes", id="nodes", registry=registry)
    def nodes(body: kopf.Body, **_: Any) -> Mapping[str, _Kept]:
        return _kept(body, parse_node(body))

    @kopf.index(names.GROUP, names.VERSION, names.MESHCONFIGS, id="configs", registry=registry)
    def configs(body: kopf.Body, **_: Any) -> Mapping[str, _Kept]:
        return _kept(body, parse_config(body))

    @kopf.on.event(names.GROUP, names.VERSION, names.MESHNODES, registry=registry)
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHCONFIGS, registry=registry)
    @kopf.on.event("", "v1", "nodes", registry=registry)
    def changed(type: str | None, **kwargs: Any) -> None:
        event(type, {name: kwargs[name] for name in ("members", "statuses", "nodes", "configs")})

    return registry


KINDS: Final = frozenset({names.MESHCONFIGS, names.MESHNODES})
RESOURCES: Final = {
    "members": f"/apis/{names.API_VERSION}/{names.MESHNODES}",
    "nodes": "/api/v1/nodes",
}
"""Index to path, of the objects whose deletion must not be missed."""


async def prune_forever(watch: Watch, client: Client) -> None:
    """After every new list, asks for the UIDs there are, and forgets what is gone."""
    while True:
        await watch.relisted.wait()
        await asyncio.sleep(PRUNE_DELAY)
        watch.relisted.clear()
        for index, path in RESOURCES.items():
            known = watch.known(index)
            try:
                there = await client.uids(path)
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                log.warning("can't list %s, trying again: %s", path, error)
                watch.relisted.set()
                continue
            if gone := known - there:
                log.info("%d %s are gone", len(gone), path.rpartition("/")[2])
                watch.forget(gone)
