"""Gathers the inputs of `reconcile`: the watches, corrected by our own lists and writes, and the cluster's
CIDRs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import structlog

from meshwire.api import names
from meshwire.api.fields import Network
from meshwire.api.meshnode import MeshNode, Phase
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube.client import ApiError, Client, Object
from meshwire.operator import cidrs
from meshwire.operator.cidrs import Published
from meshwire.operator.objects import Config, EpochSecret, KeySecret, Node, mesh_node
from meshwire.operator.reconcile import Inputs
from meshwire.operator.store import Overlay
from meshwire.operator.summary import Pressure
from meshwire.operator.watches import Watched

log = structlog.get_logger(__name__)
T = TypeVar("T")

MESH_PATH: Final = f"/apis/{names.API_VERSION}"
PAGE: Final = 200
RELIST_SECONDS: Final = 600.0
CIDR_SECONDS: Final = 120.0
"""Between looks at the ConfigMaps that tell the cluster's pod CIDRs: they hardly ever change."""
RECENT_IDS: Final = 512
"""Freed node numbers that are given out again last."""


def secrets_path(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/secrets"


async def list_all(
    client: Client, path: str, parse: Callable[[Mapping[str, object]], T], **params: str
) -> tuple[list[T], str]:
    """Every object, parsed page by page, and the list's version. Raises what Client raises."""
    items: list[T] = []
    page: Object = {"metadata": {"continue": ""}}
    while True:
        token = page["metadata"].get("continue", "")
        page = await client.get(path, limit=str(PAGE), **params, **({"continue": token} if token else {}))
        items += map(parse, page["items"])
        if not page["metadata"].get("continue"):
            return items, page["metadata"]["resourceVersion"]


@dataclass(slots=True)
class World:
    """`relist_at` and `cidrs_at` are on time.monotonic()'s clock; 0 means at once."""

    client: Client
    namespace: str
    watched: Callable[[], Watched] = Watched
    published: Callable[[], Published] = Published
    pressure: Callable[[], Pressure | None] = lambda: None
    """What the nodes' reports say of policy maps that fill up; None: not known yet."""
    nodes: Overlay[Node] = field(default_factory=Overlay)
    mesh_nodes: Overlay[MeshNode] = field(default_factory=Overlay)
    secrets: Overlay[KeySecret] = field(default_factory=Overlay)
    epoch_secrets: Overlay[EpochSecret] = field(default_factory=Overlay)
    """Nobody watches them: none but the operator changes them."""
    private_namespace: str = names.OPERATOR_NAMESPACE
    configs: Overlay[Config] = field(default_factory=Overlay)
    statuses: Overlay[MeshStatus] = field(default_factory=Overlay)
    recent_ids: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_IDS))
    relist_at: float = 0.0
    cidrs_at: float = 0.0
    _found_cidrs: tuple[Network, ...] | None = None

    async def gather(self) -> Inputs:
        """Raises what Client raises: where something can't be listed, nothing is known."""
        if time.monotonic() >= self.relist_at:
            await self._relist()
            self.relist_at = time.monotonic() + RELIST_SECONDS
        if time.monotonic() >= self.cidrs_at:
            self._found_cidrs = await self._find_cidrs()
            self.cidrs_at = time.monotonic() + CIDR_SECONDS
        watched = self.watched()
        mesh_nodes = self.mesh_nodes.over(watched.mesh_nodes)
        config = self.configs.over(watched.configs).get(names.CONFIG_NAME)
        if config is None and any(node.spec.phase is not Phase.OFF for node in mesh_nodes.values()):
            # To read a gap as "turn it off" is the one mistake that would let plaintext out: ask.
            found = await self.client.find(f"{MESH_PATH}/{names.MESHCONFIGS}/{names.CONFIG_NAME}")
            config = Config.from_object(found) if found else None
        return Inputs(
            nodes=self.nodes.over(watched.nodes),
            mesh_nodes=mesh_nodes,
            secrets=self.secrets.over(watched.secrets),
            epoch_secrets=self.epoch_secrets.over({}),
            config=config,
            status=self.statuses.over(watched.statuses).get(names.STATUS_NAME),
            found_cidrs=self._found_cidrs,
            recent_ids=tuple(self.recent_ids),
            published=self.published(),
            now=datetime.now(UTC),
            pressure=self.pressure(),
        )

    async def _relist(self) -> None:
        # Owners after what they own: an object that is made in between must not look as if it had no owner.
        watched = self.watched()
        secrets, version = await list_all(
            self.client,
            secrets_path(self.namespace),
            KeySecret.from_object,
            labelSelector=names.NODE_LABEL,
        )
        self.secrets.listed(secrets, watched.secrets, version)
        epoch_secrets, version = await list_all(
            self.client,
            secrets_path(self.private_namespace),
            EpochSecret.from_object,
            labelSelector=names.EPOCH_SECRET_LABEL,
        )
        self.epoch_secrets.listed(epoch_secrets, {}, version)
        mesh_nodes, version = await list_all(self.client, f"{MESH_PATH}/{names.MESHNODES}", mesh_node)
        self.mesh_nodes.listed(mesh_nodes, watched.mesh_nodes, version)
        nodes, version = await list_all(self.client, "/api/v1/nodes", Node.from_object)
        self.nodes.listed(nodes, watched.nodes, version)
        configs, version = await list_all(
            self.client, f"{MESH_PATH}/{names.MESHCONFIGS}", Config.from_object
        )
        self.configs.listed(configs, watched.configs, version)
        statuses, version = await list_all(
            self.client, f"{MESH_PATH}/{names.MESHSTATUSES}", MeshStatus.from_object
        )
        self.statuses.listed(statuses, watched.statuses, version)

    async def _find_cidrs(self) -> tuple[Network, ...] | None:
        unreadable = False
        for name in cidrs.SOURCES:
            try:
                found = await self.client.find(f"/api/v1/namespaces/{cidrs.NAMESPACE}/configmaps/{name}")
                if result := cidrs.cluster_cidrs(name, (found or {}).get("data") or {}):
                    return result
            except (ApiError, cidrs.UnreadableCIDRs) as error:
                log.warning("can't tell the cluster's pod CIDRs", config_map=name, error=str(error))
                unreadable = True
        return None if unreadable else ()

    def deletion_seen(self, resource: str, name: str, uid: str) -> None:
        """The watch of `resource` (plural) has brought an object's end; Secrets go by their node's name."""
        overlays: dict[str, Overlay[Any]] = {
            "nodes": self.nodes,
            "secrets": self.secrets,
            names.MESHNODES: self.mesh_nodes,
            names.MESHCONFIGS: self.configs,
            names.MESHSTATUSES: self.statuses,
        }
        overlays[resource].deletion_seen(name, uid)

    def freed(self, ids: Iterable[int]) -> None:
        """These node numbers belong to nobody any more."""
        for number in ids:
            if number in self.recent_ids:
                self.recent_ids.remove(number)
            self.recent_ids.append(number)
