"""What is known of pods, identities, endpoints and policies. Each kind has a watch of its own, apart from
kopf's: kopf keeps whole objects until its first list is complete, doesn't tell when that is, and where it
ends everything it watches ends. Tens of thousands of pods must not be able to hold up encryption."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import structlog

from meshwire.api import names
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import PolicySettings
from meshwire.api.meshnode import Phase
from meshwire.api.meshpolicy import Kind
from meshwire.api.meshpolicyreport import MeshPolicyReport
from meshwire.kube.client import ApiError, Client
from meshwire.kube.follow import follow
from meshwire.kube.watching import missing_kinds
from meshwire.operator import policyreconcile, policystatus
from meshwire.operator.cidrs import without_cidr
from meshwire.operator.identities import GRACE
from meshwire.operator.objects import Config, Identity, Namespace, Pod, PolicyObject, Slice
from meshwire.operator.store import Overlay
from meshwire.operator.summary import Pressure
from meshwire.operator.watches import Watched
from meshwire.operator.world import MESH_PATH, list_all

log = structlog.get_logger(__name__)
T = TypeVar("T")

KINDS: Final = frozenset(
    {
        names.MESHPOLICIES,
        names.CLUSTERMESHPOLICIES,
        names.MESHIDENTITIES,
        names.MESHENDPOINTSLICES,
        names.MESHPOLICYREPORTS,
    }
)
SETTINGS_DEBOUNCE: Final = 0.2
"""Seconds in which news of nodes and settings gather: each look goes through all nodes."""
RETRY: Final = 10.0
"""Seconds before it is tried again whether the CRDs are there."""


def policy_report(source: Mapping[str, Any]) -> MeshPolicyReport:
    """One that can't be read says nothing, so that an agent can't stop the others' from being counted."""
    try:
        return MeshPolicyReport.from_object(source)
    except InvalidSpec:
        return MeshPolicyReport.from_object({**source, "status": {}})


def mesh_policy(source: Mapping[str, Any]) -> PolicyObject:
    return PolicyObject.from_object(source, Kind.MESH_POLICY)


def cluster_mesh_policy(source: Mapping[str, Any]) -> PolicyObject:
    return PolicyObject.from_object(source, Kind.CLUSTER_MESH_POLICY)


def _policy(config: Config | None) -> PolicySettings | None:
    """What a MeshConfig says; None where it can't be acted upon."""
    if config is None:
        return PolicySettings()
    return config.config.policy if config.config else None


def _name(metadata: Mapping[str, Any]) -> str:
    return str(metadata["name"])


def _full_name(metadata: Mapping[str, Any]) -> str:
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def _uid(metadata: Mapping[str, Any]) -> str:
    return str(metadata["uid"])


@dataclass(slots=True)
class Watch(Generic[T]):
    """One kind's objects by `key` of their metadata. `parse` must not raise; an object for which it gives
    None counts as absent. `gone` is told (key, uid) of what was deleted. While `ended` is a set, their
    uids gather there."""

    path: str
    parse: Callable[[Mapping[str, Any]], T | None]
    key: Callable[[Mapping[str, Any]], str] = _name
    changed: Callable[[], None] = lambda: None
    gone: Callable[[str, str], None] = lambda key, uid: None
    needed: asyncio.Event = field(default_factory=asyncio.Event)
    complete: bool = False
    items: dict[str, T] = field(default_factory=dict)
    ended: set[str] | None = None
    _uids: dict[str, str] = field(default_factory=dict)

    async def run(self, client: Client) -> None:
        """For ever, as long as `needed`."""
        while True:
            await self.needed.wait()
            async for kind, entries in follow(client, self.path, self._entry):
                if not self.needed.is_set():
                    break
                if kind == "LISTED":
                    self._replace(entries)
                else:
                    for key, uid, item in entries:
                        self._put(key, uid, None if kind == "DELETED" else item, gone=kind == "DELETED")
            self.complete = False
            self.items.clear()
            self._uids.clear()

    def _entry(self, source: Mapping[str, Any]) -> tuple[str, str, T | None]:
        metadata = source["metadata"]
        return self.key(metadata), metadata["uid"], self.parse(source)

    def _replace(self, entries: list[tuple[str, str, T | None]]) -> None:
        there = {key: uid for key, uid, _ in entries}
        for key, uid in list(self._uids.items()):
            if there.get(key) != uid:
                self._put(key, uid, None, gone=True)
        for key, uid, item in entries:
            self._put(key, uid, item)
        if not self.complete:
            self.complete = True
            self.changed()

    def _put(self, key: str, uid: str, item: T | None, *, gone: bool = False) -> None:
        before = self.items.get(key)
        if item is not None:
            # Also where it is equal: the resource version may be another.
            self.items[key] = item
            self._uids[key] = uid
        elif self._uids.get(key) == uid:
            self.items.pop(key, None)
            del self._uids[key]
        if gone:
            if self.ended is not None:
                self.ended.add(uid)
            self.gone(key, uid)
        if gone or before != item:
            self.changed()


@dataclass(slots=True)
class PolicyWorld:
    """`mesh` are the watches of nodes and settings, which the encryption's loop has anyway. One callback
    says that there is something to look at for identities and endpoints, one for what is said about
    policies, and one that other maps fill up. Watches run on every replica, so that the next leader knows
    all."""

    client: Client
    mesh: Callable[[], Watched]
    endpoints_changed: Callable[[], None] = lambda: None
    policies_changed: Callable[[], None] = lambda: None
    pressure_changed: Callable[[], None] = lambda: None
    mesh_changed: asyncio.Event = field(default_factory=asyncio.Event)
    """To be set when `mesh` has something new."""
    stale: set[str] = field(default_factory=set)
    """Resources of which a list has to be read before anything is written."""
    recent: dict[int, datetime] = field(default_factory=dict)
    """Numbers of deleted identities, and when."""
    watches: dict[str, Watch[Any]] = field(init=False)
    _overlays: dict[str, Overlay[Any]] = field(init=False)
    _pressure: Pressure | None = None

    def __post_init__(self) -> None:
        self.watches = {
            "pods": Watch[Pod]("/api/v1/pods", Pod.from_object, _uid),
            "namespaces": Watch[Namespace]("/api/v1/namespaces", Namespace.from_object),
            names.MESHIDENTITIES: Watch[Identity](
                f"{MESH_PATH}/{names.MESHIDENTITIES}", Identity.from_object, gone=self._identity_gone
            ),
            names.MESHENDPOINTSLICES: Watch[Slice](
                f"{MESH_PATH}/{names.MESHENDPOINTSLICES}", Slice.from_object
            ),
            names.MESHPOLICYREPORTS: Watch[MeshPolicyReport](
                f"{MESH_PATH}/{names.MESHPOLICYREPORTS}", policy_report
            ),
            names.MESHPOLICIES: Watch[PolicyObject](
                f"{MESH_PATH}/{names.MESHPOLICIES}", mesh_policy, _full_name
            ),
            names.CLUSTERMESHPOLICIES: Watch[PolicyObject](
                f"{MESH_PATH}/{names.CLUSTERMESHPOLICIES}", cluster_mesh_policy, _full_name
            ),
        }
        self._overlays = {resource: Overlay() for resource in KINDS}
        for resource, watch in self.watches.items():
            if resource in KINDS and watch.gone is not self._identity_gone:
                watch.gone = self._overlays[resource].deletion_seen
        for resource in ("pods", "namespaces"):
            self.watches[resource].changed = self._both_changed
        for resource in (names.MESHIDENTITIES, names.MESHENDPOINTSLICES):
            self.watches[resource].changed = self._endpoints_changed
        for resource in (names.MESHPOLICIES, names.CLUSTERMESHPOLICIES):
            self.watches[resource].changed = self._policies_changed
        self.watches[names.MESHPOLICYREPORTS].changed = self._reports_changed

    async def wait_for_kinds(self) -> None:
        """For ever. The watches begin when there is something to watch."""
        complaint = ""
        while True:
            try:
                missing = await missing_kinds(self.client, KINDS)
                problem = f"the API server knows no {', '.join(sorted(missing))}" if missing else ""
            except (ApiError, OSError) as error:
                problem = str(error)
            if not problem:
                for resource in KINDS:
                    self.watches[resource].needed.set()
                await asyncio.Event().wait()
            if problem != complaint:
                log.warning("can't watch what policy needs, trying again", error=problem)
                complaint = problem
            await asyncio.sleep(RETRY)

    async def follow_settings(self) -> None:
        """For ever. Pods are watched only where policy is on, or encryption needs their addresses."""
        last: tuple[Config | None, frozenset[str]] | None = None
        while True:
            await self.mesh_changed.wait()
            await asyncio.sleep(SETTINGS_DEBOUNCE)
            self.mesh_changed.clear()
            # Once: it is made anew from all nodes, several times a second while they report.
            mesh = self.mesh()
            config = mesh.configs.get(names.CONFIG_NAME)
            without = self._without_cidr(config, mesh)
            if config is None or config.config is not None:
                enabled = bool(config and config.config and config.config.policy.enabled)
                for resource in ("pods", "namespaces"):
                    if enabled or without:
                        self.watches[resource].needed.set()
                    else:
                        self.watches[resource].needed.clear()
            news = config, without
            if news != last:
                last = news
                self._both_changed()

    def distrust(self, *resources: str) -> None:
        self.stale.update(resources or KINDS)

    def wrote(self, resource: str, item: Any) -> None:
        self._overlays[resource].wrote(item)

    def deleted(self, resource: str, name: str, uid: str) -> None:
        self._overlays[resource].deleted(name, uid)
        if resource == names.MESHIDENTITIES:
            self._freed(name)

    async def gather(self) -> policyreconcile.Inputs | None:
        """None: not everything is known yet. Raises what Client raises."""
        if not self._complete(*KINDS):
            return None
        for resource in (names.MESHENDPOINTSLICES, names.MESHIDENTITIES, names.MESHPOLICYREPORTS):
            await self._relist(resource)
        config = await self._config()
        mesh = self.mesh()
        settings, needed = _policy(config), self._without_cidr(config, mesh)
        if settings and (settings.enabled or needed) and not self._complete("pods", "namespaces"):
            return None
        if settings and not settings.enabled and not mesh.nodes:
            # No cluster is without nodes: they aren't known yet, nor what encryption needs.
            settings = None
        now = datetime.now(UTC)
        for number, freed in list(self.recent.items()):
            if now - freed >= GRACE:
                del self.recent[number]
        return policyreconcile.Inputs(
            settings=settings,
            mesh_nodes=mesh.mesh_nodes,
            namespaces=dict(self.watches["namespaces"].items),
            pods=dict(self.watches["pods"].items),
            identities=self._over(names.MESHIDENTITIES),
            slices=self._over(names.MESHENDPOINTSLICES),
            reports=self._over(names.MESHPOLICYREPORTS),
            recent=dict(self.recent),
            now=now,
            without_cidr=needed,
        )

    async def gather_policies(self, *, counters: bool) -> policystatus.Inputs | None:
        """None: not everything is known yet. Raises what Client raises."""
        if not self._complete(*KINDS):
            return None
        for resource in (names.MESHPOLICIES, names.CLUSTERMESHPOLICIES):
            await self._relist(resource)
        settings = _policy(await self._config())
        if settings is not None and settings.enabled and not self._complete("pods", "namespaces"):
            return None
        return policystatus.Inputs(
            settings=settings,
            nodes=self.mesh().nodes,
            namespaces=dict(self.watches["namespaces"].items),
            pods=dict(self.watches["pods"].items),
            policies={
                policy.uid: policy
                for resource in (names.MESHPOLICIES, names.CLUSTERMESHPOLICIES)
                for policy in self._over(resource).values()
            },
            reports=self._over(names.MESHPOLICYREPORTS),
            counters=counters,
            now=datetime.now(UTC),
        )

    def pressure(self) -> Pressure | None:
        """Policy maps that fill up; None: not known yet."""
        watch = self.watches[names.MESHPOLICYREPORTS]
        if not watch.complete:
            return self._pressure
        reports = [report for report in watch.items.values() if report.enabled]
        return Pressure(
            bool(reports),
            {each.name: each.pressure for each in reports if each.pressure},
            frozenset(each.name for each in reports),
        )

    def _complete(self, *resources: str) -> bool:
        return all(self.watches[resource].complete for resource in resources)

    def _over(self, resource: str) -> dict[str, Any]:
        return self._overlays[resource].over(self.watches[resource].items)

    async def _relist(self, resource: str) -> None:
        if resource not in self.stale:
            return
        watch = self.watches[resource]
        self.stale.discard(resource)
        watch.ended = set()
        try:
            items, version = await list_all(self.client, watch.path, watch.parse)
            # Who ended while we listed would stay in the list for ever: the watch has told of it already.
            there = [item for item in items if item and item.uid not in watch.ended]
        except BaseException:
            self.stale.add(resource)
            raise
        finally:
            watch.ended = None
        self._overlays[resource].listed(there, watch.items, version)

    async def _config(self) -> Config | None:
        """The MeshConfig; None where there is none."""
        config = self.mesh().configs.get(names.CONFIG_NAME)
        off = config is None or (config.config is not None and not config.config.policy.enabled)
        if off and any(self.watches[resource].items for resource in KINDS):
            # All that agents know of pods is about to be deleted: not because a watch is late, or not
            # there yet.
            found = await self.client.find(f"{MESH_PATH}/{names.MESHCONFIGS}/{names.CONFIG_NAME}")
            config = Config.from_object(found) if found else None
        return config

    def _without_cidr(self, config: Config | None, mesh: Watched) -> frozenset[str]:
        """Nodes whose pods' addresses encryption needs one by one; none where it is off. A node that has
        just joined may be given its CIDR in a moment, so it counts once it is live; but while addresses are
        published, a node that is not live does count: its pods may be well."""
        encrypts = bool(config and config.config and config.config.encryption.enabled)
        if not encrypts and all(node.spec.phase is Phase.OFF for node in mesh.mesh_nodes.values()):
            return frozenset()
        published = bool(self.watches[names.MESHENDPOINTSLICES].items)
        return without_cidr(mesh.nodes.values(), also_dead=published)

    def _identity_gone(self, name: str, uid: str) -> None:
        self._overlays[names.MESHIDENTITIES].deletion_seen(name, uid)
        self._freed(name)

    def _freed(self, name: str) -> None:
        if name.isdecimal():
            self.recent[int(name)] = datetime.now(UTC)

    def _endpoints_changed(self) -> None:
        self.endpoints_changed()

    def _policies_changed(self) -> None:
        self.policies_changed()

    def _reports_changed(self) -> None:
        self.policies_changed()
        if (pressure := self.pressure()) != self._pressure:
            self._pressure = pressure
            self.pressure_changed()

    def _both_changed(self) -> None:
        self.endpoints_changed()
        self.policies_changed()
