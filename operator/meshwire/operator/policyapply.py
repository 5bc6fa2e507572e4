"""Carries out the actions of policy, each by one write that the API server refuses if we were wrong about
what is there."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final

from meshwire.api import conditions, names
from meshwire.api.meshendpointslice import MeshEndpointSlice
from meshwire.api.meshidentity import MeshIdentity
from meshwire.api.meshpolicy import Kind
from meshwire.api.meshpolicyreport import MeshPolicyReport
from meshwire.kube.client import ApiError, Client
from meshwire.operator.identities import CreateIdentity, DeleteIdentity, MarkIdentity
from meshwire.operator.objects import Identity, PolicyObject, Slice
from meshwire.operator.policyreconcile import Action, CreateReport, DeleteReport, DeleteUnused
from meshwire.operator.policystatus import WritePolicyStatus
from meshwire.operator.policyworld import PolicyWorld
from meshwire.operator.slices import CreateSlice, DeleteSlice, WriteSlice
from meshwire.operator.world import MESH_PATH

IDENTITIES: Final = f"{MESH_PATH}/{names.MESHIDENTITIES}"
SLICES: Final = f"{MESH_PATH}/{names.MESHENDPOINTSLICES}"
REPORTS: Final = f"{MESH_PATH}/{names.MESHPOLICYREPORTS}"


def resource_of(action: Action) -> str:
    """The resource (plural) that the action writes."""
    match action:
        case CreateIdentity() | MarkIdentity() | DeleteIdentity() | DeleteUnused():
            return names.MESHIDENTITIES
        case CreateSlice() | WriteSlice() | DeleteSlice():
            return names.MESHENDPOINTSLICES
        case CreateReport() | DeleteReport():
            return names.MESHPOLICYREPORTS


def subject_of(action: Action) -> Hashable:
    """What the action is about, however often it is planned."""
    match action:
        case CreateIdentity():
            return action.labels
        case MarkIdentity() | DeleteIdentity() | DeleteUnused():
            return action.identity.name
        case CreateSlice():
            return action.name
        case WriteSlice() | DeleteSlice():
            return action.slice.name
        case CreateReport():
            return action.node, action.owner
        case DeleteReport():
            return action.report.uid


@dataclass(frozen=True, slots=True)
class PolicyHands:
    """Everything raises what Client raises."""

    client: Client
    world: PolicyWorld

    async def apply(self, action: Action) -> None:
        match action:
            case CreateIdentity():
                body = MeshIdentity(number=action.number, labels=action.labels).to_dict()
                self._wrote_identity(await self.client.create(IDENTITIES, body))
            case MarkIdentity():
                since = action.unused_since
                annotation = None if since is None else conditions.timestamp(since)
                metadata = {
                    "resourceVersion": action.identity.resource_version,
                    "annotations": {names.UNUSED_SINCE_ANNOTATION: annotation},
                }
                self._wrote_identity(
                    await self.client.patch(f"{IDENTITIES}/{action.identity.name}", {"metadata": metadata})
                )
            case DeleteIdentity(identity):
                await self._delete(
                    names.MESHIDENTITIES, identity.name, identity.uid, identity.resource_version
                )
            case DeleteUnused(identity):
                await self._delete(names.MESHIDENTITIES, identity.name, identity.uid)
            case CreateSlice():
                new = MeshEndpointSlice(name=action.name, endpoints=action.endpoints)
                self._wrote_slice(await self.client.create(SLICES, new.to_dict()))
            case WriteSlice():
                spec = MeshEndpointSlice(name=action.slice.name, endpoints=action.endpoints).to_dict()[
                    "spec"
                ]
                self._wrote_slice(
                    await self.client.patch(
                        f"{SLICES}/{action.slice.name}",
                        {"metadata": {"resourceVersion": action.slice.resource_version}, "spec": spec},
                    )
                )
            case DeleteSlice(old):
                await self._delete(names.MESHENDPOINTSLICES, old.name, old.uid, old.resource_version)
            case CreateReport():
                await self._create_report(action)
            case DeleteReport(report):
                await self._delete(names.MESHPOLICYREPORTS, report.name, report.uid)

    async def write_status(self, action: WritePolicyStatus) -> None:
        policy = action.policy
        name = policy.key.rpartition("/")[2]
        if policy.kind is Kind.CLUSTER_MESH_POLICY:
            resource, path = names.CLUSTERMESHPOLICIES, f"{MESH_PATH}/{names.CLUSTERMESHPOLICIES}/{name}"
        else:
            resource = names.MESHPOLICIES
            path = f"{MESH_PATH}/namespaces/{policy.namespace}/{resource}/{name}"
        answer = await self.client.patch(
            f"{path}/status",
            {
                "metadata": {"resourceVersion": policy.resource_version},
                "status": action.status.to_dict(),
            },
        )
        self.world.wrote(resource, PolicyObject.from_object(answer, policy.kind))

    async def _create_report(self, action: CreateReport) -> None:
        owner = {"apiVersion": "v1", "kind": "Node", "name": action.node, "uid": action.owner}
        answer = await self.client.create(
            REPORTS,
            {
                "apiVersion": names.API_VERSION,
                "kind": "MeshPolicyReport",
                "metadata": {"name": action.node, "ownerReferences": [owner]},
            },
        )
        self.world.wrote(names.MESHPOLICYREPORTS, MeshPolicyReport.from_object(answer))

    async def _delete(self, resource: str, name: str, uid: str, version: str = "") -> None:
        """Deletes that very object, in that very state if a version is given; one that is gone already is no
        error."""
        preconditions = {"uid": uid, **({"resourceVersion": version} if version else {})}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
        try:
            await self.client.request("DELETE", f"{MESH_PATH}/{resource}/{name}", body=body)
        except ApiError as error:
            if error.status != 404:
                raise
        self.world.deleted(resource, name, uid)

    def _wrote_identity(self, answer: dict[str, Any]) -> None:
        self.world.wrote(names.MESHIDENTITIES, Identity.from_object(answer))

    def _wrote_slice(self, answer: dict[str, Any]) -> None:
        self.world.wrote(names.MESHENDPOINTSLICES, Slice.from_object(answer))
