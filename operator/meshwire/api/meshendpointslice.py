"""MeshEndpointSlice: who has which pod address, in batches, so that agents don't watch pods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from meshwire.api import fields, meshidentity, names
from meshwire.api.fields import Address, InvalidSpec
from meshwire.api.meshpolicy import Protocol

MAX_ENDPOINTS: Final = 100
"""Of one slice."""
MAX_PORTS: Final = 64
"""Named ports of one pod."""


@dataclass(frozen=True, slots=True, order=True)
class PodRef:
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    """A port that the pod's containers give a name."""

    name: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A pod: one address, or one of each family; `node` is the name of its Node."""

    addresses: tuple[Address, ...]
    identity: int
    node: str
    pod: PodRef
    ports: tuple[NamedPort, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """One item of `spec.endpoints`."""
        return {
            "addresses": [str(address) for address in self.addresses],
            "identity": self.identity,
            "node": self.node,
            "pod": {"namespace": self.pod.namespace, "name": self.pod.name, "uid": self.pod.uid},
            **(
                {
                    "ports": [
                        {"name": port.name, "protocol": str(port.protocol), "port": port.port}
                        for port in self.ports
                    ]
                }
                if self.ports
                else {}
            ),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshEndpointSlice:
    name: str
    endpoints: tuple[Endpoint, ...] = ()
    uid: str = ""
    resource_version: str = field(default="", compare=False)

    @classmethod
    def from_object(cls, source: Mapping[str, Any]) -> MeshEndpointSlice:
        """Reads a MeshEndpointSlice as the API server gives it. Raises InvalidSpec."""
        metadata, spec = fields.child(source, "metadata", ""), fields.child(source, "spec", "")
        endpoints = fields.listed(spec, "endpoints", "spec", _endpoint)
        if len(endpoints) > MAX_ENDPOINTS:
            raise InvalidSpec("spec.endpoints", f"has more than {MAX_ENDPOINTS} items")
        return cls(
            name=fields.text(metadata, "name", "metadata"),
            endpoints=endpoints,
            uid=fields.text(metadata, "uid", "metadata"),
            resource_version=fields.text(metadata, "resourceVersion", "metadata"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object to create, or to replace the stored one's spec by. `count` is there to be printed."""
        return {
            "apiVersion": names.API_VERSION,
            "kind": "MeshEndpointSlice",
            "metadata": {"name": self.name},
            "spec": {
                "count": len(self.endpoints),
                "endpoints": [endpoint.to_dict() for endpoint in self.endpoints],
            },
        }


def _endpoint(value: Any, path: str) -> Endpoint:
    source = _object(value, path)
    addresses = fields.listed(source, "addresses", path, fields.address)
    versions = [address.version for address in addresses]
    if not addresses or len(set(versions)) < len(versions):
        raise InvalidSpec(f"{path}.addresses", "must be one address, or one of each family")
    pod = fields.child(source, "pod", path)
    return Endpoint(
        addresses=addresses,
        identity=fields.integer(
            source, "identity", path, default=0, low=meshidentity.FIRST, high=meshidentity.LAST
        ),
        node=_name(source, "node", path),
        pod=PodRef(*(_name(pod, part, f"{path}.pod") for part in ("namespace", "name", "uid"))),
        ports=fields.listed(source, "ports", path, _port),
    )


def _port(value: Any, path: str) -> NamedPort:
    source = _object(value, path)
    protocol = fields.choice(source, "protocol", path, default=Protocol.TCP)
    if protocol is Protocol.ANY:
        raise InvalidSpec(f"{path}.protocol", "must be one of TCP, UDP, SCTP")
    return NamedPort(
        name=_name(source, "name", path),
        protocol=protocol,
        port=fields.integer(source, "port", path, default=0, low=1, high=65535),
    )


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidSpec(path, "must be an object")
    return value


def _name(source: Mapping[str, Any], name: str, path: str) -> str:
    found = fields.text(source, name, path)
    if not found:
        raise InvalidSpec(f"{path}.{name}", "must be given")
    return found
