"""Carries out actions, each by one write that the API server refuses if we were wrong about what is
there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from meshwire.api import conditions, names
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import MeshStatus
from meshwire.kube.client import JSON_PATCH, ApiError, Client, Object
from meshwire.kube.events import Event
from meshwire.operator import keys
from meshwire.operator.objects import Config, EpochSecret, KeySecret, Node, epoch_secret_in, mesh_node
from meshwire.operator.reconcile import (
    Action,
    AdoptSecret,
    CreateMeshNode,
    DeleteEpochSecret,
    DeleteMeshNode,
    DeleteSecret,
    IssueKey,
    LiftTaint,
    MakeEpochSecret,
    PatchSpec,
    WithdrawKeys,
    WriteConfigStatus,
    WriteStatus,
)
from meshwire.operator.rounds import Outdated
from meshwire.operator.world import MESH_PATH, World, secrets_path

NODES: Final = "/api/v1/nodes"
MESH_NODES: Final = f"{MESH_PATH}/{names.MESHNODES}"
MESH_STATUSES: Final = f"{MESH_PATH}/{names.MESHSTATUSES}"


@dataclass(frozen=True, slots=True)
class Hands:
    """`announce` is given what is worth an Event."""

    client: Client
    world: World
    announce: Callable[[Event], None]

    async def apply(self, action: Action) -> None:
        """Raises what Client raises, Outdated, and keys.UnusableSealingKey."""
        match action:
            case CreateMeshNode():
                await self._create_mesh_node(action)
            case PatchSpec():
                await self._patch_spec(action)
            case DeleteMeshNode():
                await self._delete_mesh_node(action)
            case IssueKey():
                await self._issue_key(action)
            case MakeEpochSecret():
                await self._make_epoch_secret(action)
            case DeleteEpochSecret():
                await self._delete_epoch_secret(action)
            case WithdrawKeys():
                await self._withdraw_keys(action)
            case AdoptSecret():
                await self._adopt_secret(action)
            case DeleteSecret():
                await self._delete_secret(action)
            case LiftTaint():
                await self._lift_taint(action)
            case WriteConfigStatus():
                await self._write_config_status(action)
            case WriteStatus():
                await self._write_status(action)

    async def _create_mesh_node(self, action: CreateMeshNode) -> None:
        created = mesh_node(
            await self.client.create(
                MESH_NODES,
                {
                    "apiVersion": names.API_VERSION,
                    "kind": "MeshNode",
                    "metadata": {
                        "name": action.node,
                        "ownerReferences": [_owner("v1", "Node", action.node, action.owner)],
                    },
                    "spec": action.spec.to_dict(),
                },
            )
        )
        self.world.mesh_nodes.wrote(created)
        self.announce(
            _node_event(
                action.node, created.uid, "NodeAdded", "Create", f"joined as number {action.spec.id}"
            )
        )

    async def _patch_spec(self, action: PatchSpec) -> None:
        patched = await self.client.patch(
            f"{MESH_NODES}/{action.node}",
            {"metadata": {"resourceVersion": action.resource_version}, "spec": action.spec.to_dict()},
        )
        written = mesh_node(patched)
        self.world.mesh_nodes.wrote(written)
        if action.stolen:
            self.announce(
                _node_event(
                    action.node,
                    written.uid,
                    "KeyWithdrawn",
                    "WithdrawKey",
                    "it has another sealing key than its keys are sealed to: its host's disk is another, and"
                    " nobody is to take who has the old one for this node",
                    warning=True,
                )
            )

    async def _delete_mesh_node(self, action: DeleteMeshNode) -> None:
        node = await self.client.find(f"{NODES}/{action.node}")
        if node and node["metadata"]["uid"] == action.owner:
            self.world.nodes.wrote(Node.from_object(node))
            raise Outdated(f"node {action.node} is still there")
        known = self.world.mesh_nodes.over(self.world.watched().mesh_nodes).get(action.node)
        await self._delete(f"{MESH_NODES}/{action.node}", action.uid)
        self.world.mesh_nodes.deleted(action.node, action.uid)
        if known:
            self.world.freed([known.spec.id])
        self.announce(
            _node_event(
                action.node, action.uid, "NodeRemoved", "Delete", "its Node is gone: its keys go too"
            )
        )

    async def _issue_key(self, action: IssueKey) -> None:
        sealed = keys.issue(node=action.node, epoch=action.epoch, sealing_key=action.sealing_key)
        epoch = str(action.epoch)
        sealed_secret = await self._sealed_epoch_secret(action) if action.secret_digest else None
        metadata: dict[str, Any] = {
            "name": names.secret_name(action.node),
            "labels": {
                "app.kubernetes.io/part-of": "meshwire",
                names.NODE_LABEL: action.node,
                names.EPOCH_LABEL: epoch,
            },
            "annotations": {
                names.SEALED_TO_ANNOTATION: action.sealing_key,
                f"{names.PUBLIC_KEY_ANNOTATION}{epoch}": sealed.public_key,
            },
            "ownerReferences": [_owner(names.API_VERSION, "MeshNode", action.node, action.owner)],
        }
        data: dict[str, str | None] = {
            names.secret_data_key(action.epoch): base64.b64encode(sealed.sealed).decode()
        }
        if sealed_secret:
            metadata["annotations"][f"{names.SECRET_DIGEST_ANNOTATION}{epoch}"] = action.secret_digest
            data[names.sealed_secret_data_key(action.epoch)] = base64.b64encode(sealed_secret).decode()
        path = secrets_path(self.world.namespace)
        if action.secret is None:
            body = {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "Opaque",
                "metadata": metadata,
                "data": data,
            }
            written = await self.client.create(path, body)
        else:
            for key in action.secret.keys:
                if key.epoch not in (action.epoch, action.beside):
                    data |= _no_data(key.epoch)
                    metadata["annotations"] |= _no_annotations(key.epoch)
            if not sealed_secret:
                data[names.sealed_secret_data_key(action.epoch)] = None
                metadata["annotations"][f"{names.SECRET_DIGEST_ANNOTATION}{epoch}"] = None
            metadata["resourceVersion"] = action.secret.resource_version
            written = await self.client.patch(
                f"{path}/{names.secret_name(action.node)}", {"metadata": metadata, "data": data}
            )
        self.world.secrets.wrote(KeySecret.from_object(written))
        self.announce(
            _node_event(
                action.node,
                action.owner,
                "KeyRenewed" if action.renewed else "KeyIssued",
                "IssueKey",
                f"new key for epoch {epoch}{why_renewed(action) if action.renewed else ''}",
                warning=action.renewed,
            )
        )

    async def _make_epoch_secret(self, action: MakeEpochSecret) -> None:
        path = secrets_path(self.world.private_namespace)
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {
                "name": names.epoch_secret_name(action.epoch),
                "labels": {
                    "app.kubernetes.io/part-of": "meshwire",
                    names.EPOCH_SECRET_LABEL: str(action.epoch),
                },
            },
            # There must never be two of one epoch.
            "immutable": True,
            "data": {names.EPOCH_SECRET_DATA_KEY: base64.b64encode(keys.new_epoch_secret()).decode()},
        }
        try:
            made = await self.client.create(path, body)
        except ApiError as error:
            if error.status != 409:
                raise
            # Somebody was first, perhaps we before a crash: that one counts.
            made = await self.client.get(f"{path}/{names.epoch_secret_name(action.epoch)}")
        self.world.epoch_secrets.wrote(EpochSecret.from_object(made))

    async def _sealed_epoch_secret(self, action: IssueKey) -> bytes:
        """What is there now is read: the one that is meant, or none."""
        path = secrets_path(self.world.private_namespace)
        found = await self.client.get(f"{path}/{names.epoch_secret_name(action.epoch)}")
        if EpochSecret.from_object(found).digest != action.secret_digest:
            raise Outdated(f"the secret of epoch {action.epoch} is another")
        return keys.seal_epoch_secret(
            epoch_secret_in(found), node=action.node, epoch=action.epoch, sealing_key=action.sealing_key
        )

    async def _delete_epoch_secret(self, action: DeleteEpochSecret) -> None:
        secret = action.secret
        path = secrets_path(self.world.private_namespace)
        await self._delete(f"{path}/{names.epoch_secret_name(secret.epoch)}", secret.uid)
        self.world.epoch_secrets.deleted(secret.name, secret.uid)

    async def _withdraw_keys(self, action: WithdrawKeys) -> None:
        secret = action.secret
        data: dict[str, None] = {}
        annotations: dict[str, None] = {}
        for epoch in action.epochs:
            data |= _no_data(epoch)
            annotations |= _no_annotations(epoch)
        body = {
            "metadata": {
                "resourceVersion": secret.resource_version,
                "annotations": annotations,
            },
            "data": data,
        }
        path = f"{secrets_path(self.world.namespace)}/{names.secret_name(secret.node)}"
        self.world.secrets.wrote(KeySecret.from_object(await self.client.patch(path, body)))

    async def _adopt_secret(self, action: AdoptSecret) -> None:
        node = action.secret.node
        body = {
            "metadata": {
                "resourceVersion": action.secret.resource_version,
                "ownerReferences": [_owner(names.API_VERSION, "MeshNode", node, action.owner)],
            }
        }
        path = f"{secrets_path(self.world.namespace)}/{names.secret_name(node)}"
        self.world.secrets.wrote(KeySecret.from_object(await self.client.patch(path, body)))

    async def _delete_secret(self, action: DeleteSecret) -> None:
        secret = action.secret
        found = await self.client.find(f"{MESH_NODES}/{secret.node}")
        spec = mesh_node(found).spec if found else None
        if spec and spec.phase is not Phase.OFF and not spec.revocation:
            raise Outdated(f"the MeshNode of {secret.node} still needs its key")
        await self._delete(
            f"{secrets_path(self.world.namespace)}/{names.secret_name(secret.node)}", secret.uid
        )
        self.world.secrets.deleted(secret.node, secret.uid)

    async def _lift_taint(self, action: LiftTaint) -> None:
        node = await self.client.get(f"{NODES}/{action.node}")
        taints = node["spec"].get("taints") or []
        kept = [taint for taint in taints if taint["key"] != names.NOT_READY_TAINT]
        if kept != taints:
            # A list has no resource version of its own: the patch holds only while the list is what we read.
            change = {"op": "replace", "value": kept} if kept else {"op": "remove"}
            node = await self.client.patch(
                f"{NODES}/{action.node}",
                [
                    {"op": "test", "path": "/spec/taints", "value": taints},
                    {"path": "/spec/taints", **change},
                ],
                content_type=JSON_PATCH,
            )
            self.announce(
                Event(
                    kind="Node",
                    name=action.node,
                    # `kubectl describe node` looks for Events by this instead of the uid.
                    uid=action.node,
                    api_version="v1",
                    reason="DatapathReady",
                    action="LiftTaint",
                    note=f"pods may come: the datapath is in force, taint {names.NOT_READY_TAINT} is lifted",
                )
            )
        self.world.nodes.wrote(Node.from_object(node))

    async def _write_config_status(self, action: WriteConfigStatus) -> None:
        answer = await self.client.patch(
            f"{MESH_PATH}/{names.MESHCONFIGS}/{names.CONFIG_NAME}/status",
            {
                "metadata": {"resourceVersion": action.resource_version},
                "status": {"conditions": conditions.to_list(action.conditions)},
            },
        )
        config = Config.from_object(answer)
        self.world.configs.wrote(config)
        accepted = conditions.find(action.conditions, conditions.ACCEPTED)
        if accepted and accepted.status is False:
            self.announce(
                Event(
                    kind="MeshConfig",
                    name=config.name,
                    uid=config.uid,
                    api_version=names.API_VERSION,
                    reason=accepted.reason,
                    action="Accept",
                    note=accepted.message,
                    warning=True,
                )
            )

    async def _write_status(self, action: WriteStatus) -> None:
        version, uid = action.status.resource_version, action.status.uid
        if action.create:
            created = await self.client.create(
                MESH_STATUSES,
                {
                    "apiVersion": names.API_VERSION,
                    "kind": "MeshStatus",
                    "metadata": {"name": names.STATUS_NAME},
                },
            )
            version, uid = created["metadata"]["resourceVersion"], created["metadata"]["uid"]
        answer = await self.client.patch(
            f"{MESH_STATUSES}/{names.STATUS_NAME}/status",
            {"metadata": {"resourceVersion": version}, "status": action.status.to_dict()},
        )
        self.world.statuses.wrote(MeshStatus.from_object(answer))
        if action.status.phase is not action.previous.phase:
            ready = conditions.find(action.status.conditions, conditions.READY)
            self.announce(
                Event(
                    kind="MeshStatus",
                    name=names.STATUS_NAME,
                    uid=uid,
                    api_version=names.API_VERSION,
                    reason="PhaseChanged",
                    action="ChangePhase",
                    note=f"{action.previous.phase} -> {action.status.phase}, epoch {action.status.epoch}: "
                    + (ready.message if ready else ""),
                )
            )

        for event in (*rotation_news(action, uid), *quarantine_news(action)):
            self.announce(event)

        pressure = conditions.find(action.status.conditions, conditions.POLICY_MAP_PRESSURE)
        if action.under_pressure and pressure:
            self.announce(
                Event(
                    kind="MeshStatus",
                    name=names.STATUS_NAME,
                    uid=uid,
                    api_version=names.API_VERSION,
                    reason=conditions.POLICY_MAP_PRESSURE,
                    action="JudgePolicy",
                    note=pressure.message,
                    warning=True,
                )
            )

    async def _delete(self, path: str, uid: str) -> None:
        """Deletes that very object; one that is gone already is no error."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        try:
            await self.client.request("DELETE", path, body=body)
        except ApiError as error:
            if error.status != 404:
                raise


def why_renewed(action: IssueKey) -> str:
    """For a key that follows one of the same epoch."""
    if action.secret is None:
        return ": its Secret was gone"
    if action.secret.sealed_to != action.sealing_key:
        return ": its sealing key is another; the key sealed to the one before was withdrawn"
    return ": its Secret held none"


def rotation_news(action: WriteStatus, uid: str) -> Iterator[Event]:
    """Events for the steps of a rotation that this status is the first to tell of. `uid` is that of the
    MeshStatus."""
    before, after = action.previous.rotation, action.status.rotation

    def event(reason: str, note: str) -> Event:
        return Event(
            kind="MeshStatus",
            name=names.STATUS_NAME,
            uid=uid,
            api_version=names.API_VERSION,
            reason=reason,
            action="RotateKeys",
            note=note,
        )

    if after and (before is None or before.from_epoch != after.from_epoch):
        why = f"asked for by {names.ROTATE_ANNOTATION}" if after.request else "by the interval"
        if action.secret_lost:
            why = "whose epoch secret is gone: no node could have got a key of it any more"
        yield event("RotationBegan", f"new keys follow those of epoch {after.from_epoch}, {why}")
    if after and after.moved_at and not (before and before.moved_at):
        yield event(
            "RotationMoved",
            f"all live nodes send by epoch {action.status.epoch};"
            f" epoch {after.from_epoch} ends after the overlap",
        )
    last = action.status.last_rotation
    if last and action.status.rotations > action.previous.rotations:
        yield event(
            "RotationFinished", f"only the keys of epoch {last.epoch} are left, after {last.seconds} s"
        )
        for node in action.left_out:
            yield _node_event(
                node,
                "",
                "NodeLeftOut",
                "RotateKeys",
                f"not live while keys changed: it joins epoch {last.epoch} when it is back",
                warning=True,
            )


def _no_data(epoch: int) -> dict[str, None]:
    """Merged into a key Secret's data, it takes away what is there of an epoch."""
    return {names.secret_data_key(epoch): None, names.sealed_secret_data_key(epoch): None}


def _no_annotations(epoch: int) -> dict[str, None]:
    """The same of its annotations."""
    return {
        f"{names.PUBLIC_KEY_ANNOTATION}{epoch}": None,
        f"{names.SECRET_DIGEST_ANNOTATION}{epoch}": None,
    }


def quarantine_news(action: WriteStatus) -> Iterator[Event]:
    """Events for what this status is the first to tell of nodes in quarantine."""
    before = {(each.node, each.revocation): each for each in action.previous.quarantines}
    after = {(each.node, each.revocation): each for each in action.status.quarantines}
    for key, each in sorted(after.items()):
        known = before.get(key)
        if known is None:
            yield _node_event(
                each.node,
                "",
                "Quarantined",
                "Quarantine",
                "its keys are withdrawn; the others let go of it",
                warning=True,
            )
        if each.revoked_at and not (known and known.revoked_at):
            yield _node_event(
                each.node,
                "",
                "Revoked",
                "Quarantine",
                f"no live node has it as a peer any more, {each.seconds:.1f} s after it was quarantined",
            )
    for key, each in sorted(before.items()):
        if key not in after:
            yield _node_event(
                each.node, "", "QuarantineEnded", "Quarantine", "it may join again, with new keys"
            )


def _owner(api_version: str, kind: str, name: str, uid: str) -> Object:
    return {"apiVersion": api_version, "kind": kind, "name": name, "uid": uid}


def _node_event(name: str, uid: str, reason: str, action: str, note: str, *, warning: bool = False) -> Event:
    return Event(
        kind="MeshNode",
        name=name,
        uid=uid,
        api_version=names.API_VERSION,
        reason=reason,
        action=action,
        note=f"node {name}: {note}",
        warning=warning,
    )
