"""kopf's part: it watches, keeps projections in its indexes, and wakes the loop. It writes nothing to the
API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kopf

from meshwire.api import names
from meshwire.api.meshnode import MeshNode
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube import watching
from meshwire.kube.client import Cluster
from meshwire.kube.login import login
from meshwire.operator.objects import Config, KeySecret, Node, mesh_node


@dataclass(frozen=True, slots=True)
class Watched:
    """One moment of the watches, each kind by name (Secrets by node)."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    mesh_nodes: Mapping[str, MeshNode] = field(default_factory=dict)
    secrets: Mapping[str, KeySecret] = field(default_factory=dict)
    configs: Mapping[str, Config] = field(default_factory=dict)
    statuses: Mapping[str, MeshStatus] = field(default_factory=dict)


def make_settings() -> kopf.OperatorSettings:
    settings = watching.make_settings()
    # The only Secrets of the namespace that are ours to know.
    settings.watching.label_selectors["", "v1", "secrets"] = names.NODE_LABEL
    return settings


def make_registry(
    cluster: Cluster,
    publish: Callable[[Callable[[], Watched]], None],
    deleted: Callable[[str, str, str], None],
) -> kopf.OperatorRegistry:
    """Handlers that keep the indexes, tell `deleted` (resource, name, uid) of what is gone, and hand
    `publish` a way to read the indexes whenever something changed. kopf holds events back until every
    first list is in."""
    # Not the smart registry that `@kopf.on` has by default: its login imports the official client.
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login(cluster)

    @kopf.index("", "v1", "nodes", id="nodes", registry=registry)
    async def nodes(body: kopf.Body, **_: Any) -> Mapping[str, Node]:
        node = Node.from_object(body)
        return {node.name: node}

    @kopf.index(names.GROUP, names.VERSION, names.MESHNODES, id="mesh_nodes", registry=registry)
    async def mesh_nodes(body: kopf.Body, **_: Any) -> Mapping[str, MeshNode]:
        node = mesh_node(body)
        return {node.name: node}

    @kopf.index(
        "", "v1", "secrets", labels={names.NODE_LABEL: kopf.PRESENT}, id="secrets", registry=registry
    )
    async def secrets(body: kopf.Body, **_: Any) -> Mapping[str, KeySecret]:
        secret = KeySecret.from_object(body)
        return {secret.node: secret}

    @kopf.index(names.GROUP, names.VERSION, names.MESHCONFIGS, id="configs", registry=registry)
    async def configs(body: kopf.Body, **_: Any) -> Mapping[str, Config]:
        return {names.CONFIG_NAME: Config.from_object(body)}

    @kopf.index(names.GROUP, names.VERSION, names.MESHSTATUSES, id="statuses", registry=registry)
    async def statuses(body: kopf.Body, **_: Any) -> Mapping[str, MeshStatus]:
        return {names.STATUS_NAME: MeshStatus.from_object(body)}

    @kopf.on.event("", "v1", "nodes", registry=registry)
    @kopf.on.event("", "v1", "secrets", labels={names.NODE_LABEL: kopf.PRESENT}, registry=registry)
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHNODES, registry=registry)
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHCONFIGS, registry=registry)
    @kopf.on.event(names.GROUP, names.VERSION, names.MESHSTATUSES, registry=registry)
    async def changed(type: str, resource: kopf.Resource, meta: kopf.Meta, uid: str, **indexes: Any) -> None:
        if type == "DELETED":
            name = meta.labels[names.NODE_LABEL] if resource.plural == "secrets" else meta["name"]
            deleted(resource.plural, name, uid)
        publish(
            lambda: Watched(
                nodes=_by_name(indexes["nodes"]),
                mesh_nodes=_by_name(indexes["mesh_nodes"]),
                secrets=_by_name(indexes["secrets"]),
                configs=_by_name(indexes["configs"]),
                statuses=_by_name(indexes["statuses"]),
            )
        )

    return registry


def _by_name(index: kopf.Index[str, Any]) -> dict[str, Any]:
    # An object deleted and made anew can be there twice, until kopf has forgotten the first: the later one
    # counts.
    found = {}
    for name in index:
        items = tuple(index[name])
        found[name] = (
            items[0] if len(items) == 1 else max(items, key=lambda item: int(item.resource_version or 0))
        )
    return found
