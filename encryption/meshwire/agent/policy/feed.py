"""From the API server's lists and events to the model's calls. Pure; what reads the API is below."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshwire.agent.policy.model import Model
from meshwire.agent.policy.objects import (
    Backends,
    Namespace,
    Pod,
    Refused,
    Service,
    Slice,
    compact,
    parse_backends,
    parse_namespace,
    parse_pod,
    parse_service,
)
from meshwire.api import names, policyobjects
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshendpointslice import MeshEndpointSlice
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import Policy
from meshwire.kube.client import Client, Object
from meshwire.kube.follow import follow

log = logging.getLogger("meshwire.agent")

NETWORK_POLICIES: Final = "networkpolicies"
SLICES_OF_OTHERS: Final = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io"
"""Those whose addresses no selector tells: written by hand, and the API server's own."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A pod that has no network of its own, or not any more."""

    uid: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """What the API server would not have taken under our CRDs. Whoever it is about stays unknown."""

    uid: str


@dataclass(frozen=True, slots=True)
class Source:
    """A resource: where its objects are, and how to read them."""

    path: str
    parse: Callable[[Object], Any]
    params: Mapping[str, str]


def sources(node: str, *, network_policies: bool) -> dict[str, Source]:
    """By resource."""
    mesh = f"/apis/{names.API_VERSION}"
    found = {
        "pods": Source("/api/v1/pods", _pod, {"fieldSelector": f"spec.nodeName={node}"}),
        "namespaces": Source("/api/v1/namespaces", parse_namespace, {}),
        "services": Source("/api/v1/services", parse_service, {}),
        "endpointslices": Source(
            "/apis/discovery.k8s.io/v1/endpointslices", parse_backends, {"labelSelector": SLICES_OF_OTHERS}
        ),
        names.MESHIDENTITIES: Source(f"{mesh}/{names.MESHIDENTITIES}", _identity, {}),
        names.MESHENDPOINTSLICES: Source(f"{mesh}/{names.MESHENDPOINTSLICES}", _slice, {}),
        names.MESHPOLICIES: Source(f"{mesh}/{names.MESHPOLICIES}", _mesh_policy, {}),
        names.CLUSTERMESHPOLICIES: Source(f"{mesh}/{names.CLUSTERMESHPOLICIES}", _mesh_policy, {}),
    }
    if network_policies:
        found[NETWORK_POLICIES] = Source("/apis/networking.k8s.io/v1/networkpolicies", _network_policy, {})
    return found


def _identity(source: Object) -> MeshIdentity | Malformed:
    try:
        return MeshIdentity.from_object(source)
    except InvalidSpec as error:
        return _malformed(source, error)


def _slice(source: Object) -> Slice | Malformed:
    try:
        return compact(MeshEndpointSlice.from_object(source))
    except InvalidSpec as error:
        return _malformed(source, error)


def _malformed(source: Object, error: InvalidSpec) -> Malformed:
    name = source["metadata"]["name"]
    log.warning("%s %s is malformed and left out: %s", source.get("kind"), name, error)
    return Malformed(name)


def _pod(source: Object) -> Pod | Gone:
    return parse_pod(source) or Gone(source["metadata"]["uid"])


def _mesh_policy(source: Object) -> Policy | Refused:
    try:
        return policyobjects.mesh_policy(source)
    except InvalidSpec as error:
        return _refused(source, error)


def _network_policy(source: Object) -> Policy | Refused:
    try:
        return policyobjects.network_policy(source)
    except InvalidSpec as error:
        return _refused(source, error)


def _refused(source: Object, error: InvalidSpec) -> Refused:
    metadata = source["metadata"]
    return Refused(metadata["uid"], metadata.get("generation", 0), error)


@dataclass(frozen=True, slots=True)
class News:
    """What `follow` has brought of a resource: LISTED, ADDED, MODIFIED or DELETED."""

    resource: str
    kind: str
    items: list[Any]


class Feed:
    """Gives a model what there is. It knows what was there before, so that a new list takes away what was
    deleted while nobody watched."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[str, set[Hashable]] = {}

    def listed(self) -> frozenset[str]:
        """Resources of which everything is known."""
        return frozenset(self._known)

    def take(self, news: News) -> None:
        known = self._known.setdefault(news.resource, set())
        keys = {_key(item): item for item in news.items}
        if news.kind == "DELETED":
            for key in keys.keys() & known:
                known.discard(key)
                self._remove(news.resource, key)
            return
        if news.kind == "LISTED":
            for key in known - keys.keys():
                self._remove(news.resource, key)
            known.intersection_update(keys)
        for key, item in keys.items():
            known.add(key)
            self._put(item)

    def forget(self, resource: str) -> None:
        """Nobody asks for it any more."""
        for key in self._known.pop(resource, set()):
            self._remove(resource, key)

    def _put(self, item: Any) -> None:
        model = self._model
        match item:
            case Pod():
                model.put_pod(item)
            case Gone():
                model.remove_pod(item.uid)
            case Namespace():
                model.put_namespace(item)
            case Service():
                model.put_service(item)
            case Backends():
                model.put_backends(item)
            case MeshIdentity():
                model.put_identity(item)
            case Slice():
                model.put_slice(item)
            case Policy():
                model.put_policy(item)
            case Refused():
                model.refuse_policy(item)

    def _remove(self, resource: str, key: Any) -> None:
        model = self._model
        match resource:
            case "pods":
                model.remove_pod(key)
            case "namespaces":
                model.remove_namespace(key)
            case "services":
                model.remove_service(key)
            case "endpointslices":
                model.remove_backends(key)
            case names.MESHIDENTITIES:
                model.remove_identity(key)
            case names.MESHENDPOINTSLICES:
                model.remove_slice(key)
            case _:
                model.remove_policy(key)


def _key(item: Any) -> Hashable:
    """What tells an object from others of its resource."""
    match item:
        case MeshIdentity():
            return item.number
        case Slice() | Namespace():
            return item.name
        case _:
            uid: str = item.uid
            return uid


async def watch(client: Client, resource: str, source: Source, take: Callable[[News], None]) -> None:
    """For ever."""
    async for kind, items in follow(client, source.path, source.parse, **source.params):
        take(News(resource, kind, items))
        # A list of thousands must not keep the others waiting.
        await asyncio.sleep(0)
