"""What policy needs of each object, read from what the API server gives. Pure; what other components write
wrongly is left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final, NamedTuple

from meshwire.api.fields import InvalidSpec
from meshwire.api.meshendpointslice import MeshEndpointSlice
from meshwire.policy.identity import Labels, sorted_labels

PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""As the API names them, and IPPROTO_*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod of this node with a network of its own. `addresses` are packed, in network order; `created`
    orders pods that one after another had the same. `ports`: (name, IPPROTO_*, number) of its named
    container ports."""

    uid: str
    namespace: str
    name: str
    created: str = ""
    labels: Labels = ()
    service_account: str = ""
    addresses: tuple[bytes, ...] = ()
    ports: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    uid: str
    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`addresses` (packed) are those that kube-proxy sends on; `selector` None: its endpoints are what
    somebody writes."""

    uid: str
    namespace: str
    name: str
    labels: Mapping[str, str]
    selector: Mapping[str, str] | None
    addresses: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """An EndpointSlice: addresses (packed) of a Service."""

    uid: str
    namespace: str
    service: str
    addresses: tuple[bytes, ...]


class Remote(NamedTuple):
    """A pod that a slice has; addresses are packed, `ports` as in Pod. As small as can be: there are as many
    as the cluster has pods."""

    uid: str
    identity: int
    addresses: tuple[bytes, ...]
    node: str
    namespace: str
    name: str
    ports: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Slice:
    name: str
    pods: tuple[Remote, ...]


def compact(found: MeshEndpointSlice) -> Slice:
    """What policy needs of it."""
    return Slice(
        found.name,
        tuple(
            Remote(
                endpoint.pod.uid,
                endpoint.identity,
                tuple(address.packed for address in endpoint.addresses),
                sys.intern(endpoint.node),
                sys.intern(endpoint.pod.namespace),
                endpoint.pod.name,
                tuple((port.name, PROTOCOLS[port.protocol], port.port) for port in endpoint.ports),
            )
            for endpoint in found.endpoints
        ),
    )


def parse_pod(source: Mapping[str, Any]) -> Pod | None:
    """None: it has no network of its own, or not any more."""
    metadata, spec, status = source["metadata"], source.get("spec", {}), source.get("status", {})
    if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    texts = [item.get("ip", "") for item in status.get("podIPs") or ()] or [status.get("podIP", "")]
    ports = {
        (port["name"], PROTOCOLS.get(port.get("protocol", "TCP"), 0), port["containerPort"])
        for container in (
            *spec.get("containers", ()),
            # Those that go on running beside the others.
            *(each for each in spec.get("initContainers") or () if each.get("restartPolicy") == "Always"),
        )
        for port in container.get("ports") or ()
        if port.get("name")
    }
    return Pod(
        uid=metadata["uid"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        created=metadata.get("creationTimestamp", ""),
        labels=sorted_labels((metadata.get("labels") or {}).items()),
        service_account=spec.get("serviceAccountName", ""),
        addresses=packed(texts),
        ports=tuple(sorted(ports)),
    )


def parse_namespace(source: Mapping[str, Any]) -> Namespace:
    metadata = source["metadata"]
    return Namespace(uid=metadata["uid"], name=metadata["name"], labels=dict(metadata.get("labels") or {}))


def parse_service(source: Mapping[str, Any]) -> Service:
    metadata, spec = source["metadata"], source.get("spec", {})
    # Not external addresses, nor load balancers': whoever makes a Service may name any address there, and
    # what kube-proxy leads on from them it masquerades, so that nobody can judge it later.
    texts = spec.get("clusterIPs") or [spec.get("clusterIP", "")]
    selector = spec.get("selector")
    return Service(
        uid=metadata["uid"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        labels=dict(metadata.get("labels") or {}),
        selector=dict(selector) if selector else None,
        # Headless ones and names of elsewhere have none.
        addresses=packed(texts) if spec.get("type") != "ExternalName" else (),
    )


def parse_backends(source: Mapping[str, Any]) -> Backends:
    metadata = source["metadata"]
    return Backends(
        uid=metadata["uid"],
        namespace=metadata["namespace"],
        service=(metadata.get("labels") or {}).get("kubernetes.io/service-name", ""),
        addresses=packed(
            address
            for endpoint in source.get("endpoints") or ()
            for address in endpoint.get("addresses", ())
        ),
    )


def packed(texts: Any) -> tuple[bytes, ...]:
    """IP addresses in network order, 4 or 16 bytes; what is none is left out."""
    found: dict[bytes, None] = {}
    for text in texts:
        with suppress(ValueError):
            found[ip_address(text).packed] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Refused:
    """An object that can't be read, and why."""

    uid: str
    generation: int
    error: InvalidSpec
