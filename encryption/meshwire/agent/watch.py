"""What the API server says, kept as small values by kopf's indexes. Reads only; a change wakes the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

import kopf

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import MeshNode, Status
from meshwire.encryption.model import ClusterNode, Member
from meshwire.kube.client import Cluster
from meshwire.kube.login import login

log = logging.getLogger("meshwire.agent")

CHUNK = 100
"""Objects a page of the first list: Nodes are large, and a thousand of them at once would stay in our
memory."""


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


def make_registry(
    node: str, cluster: Cluster, publish: Callable[[Callable[[], World]], None]
) -> tuple[kopf.OperatorRegistry, kopf.OperatorSettings]:
    """Handlers that index, and publish a way to take a snapshot on every event. kopf holds events back until
    every first list is in, so the first World is whole: a peer that is missing from it is gone."""
    # Not the smart registry of `@kopf.on` without one: that imports the official client for its login.
    registry = kopf.OperatorRegistry()
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.chunk_size = CHUNK
    # A watch whose connection died in silence is noticed by the bookmarks that stay away.
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login(cluster)

    @kopf.index(names.GROUP, names.VERSION, names.MESHNODES, id="members", registry=registry)
    def members(body: kopf.Body, **_: Any) -> Mapping[str, Member] | None:
        try:
            parsed = MeshNode.from_object(
                {"metadata": dict(body["metadata"]), "spec": dict(body.get("spec") or {})}
            )
        except InvalidSpec as error:
            log.warning(
                "MeshNode %s is malformed, its last good form stays: %s", body["metadata"]["name"], error
            )
            return None
        return {
            parsed.name: Member(
                name=parsed.name, created=parsed.created, generation=parsed.generation, spec=parsed.spec
            )
        }

    @kopf.index(names.GROUP, names.VERSION, names.MESHNODES, id="statuses", registry=registry)
    def statuses(body: kopf.Body, **_: Any) -> Mapping[str, Status]:
        if body["metadata"]["name"] != node:
            return {}
        try:
            return {node: MeshNode.from_object({"status": dict(body.get("status") or {})}).status}
        except InvalidSpec:
            return {node: Status()}

    @kopf.index("", "v1", "nodes", id="nodes", registry=registry)
    def nodes(body: kopf.Body, **_: Any) -> Mapping[str, ClusterNode]:
        return {body["metadata"]["name"]: parse_node(body)}

    @kopf.index(names.GROUP, names.VERSION, names.MESHCONFIGS, id="configs", registry=registry)
    def configs(body: kopf.Body, **_: Any) -> Mapping[str, tuple[MeshConfig | InvalidSpec, dict[str, Any]]]:
        return {body["metadata"]["name"]: parse_config(body)}

    @kopf.on.event(names.GROUP, names.VERSION, names.MESHNODES, registry=registry)
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHCONFIGS, registry=registry)
    @kopf.on.event("", "v1", "nodes", registry=registry)
    def changed(**kwargs: Any) -> None:
        def snapshot() -> World:
            config, spec = _first(kwargs["configs"]).get(names.CONFIG_NAME, (None, {}))
            return World(
                members=_first(kwargs["members"]),
                nodes=_first(kwargs["nodes"]),
                config=config,
                config_spec=spec,
                status=_first(kwargs["statuses"]).get(node),
            )

        publish(snapshot)

    return registry, settings


def _first(index: kopf.Index[str, Any]) -> dict[str, Any]:
    """An index holds every object that gave a key; a name has one object."""
    return {name: next(iter(store)) for name, store in index.items()}
