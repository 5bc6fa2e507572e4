"""Kubernetes Events (events.k8s.io/v1): what happened, for `kubectl describe` and `kubectl events`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from meshwire.kube.client import Client

NAMESPACE: Final = "default"
"""Where the API wants Events about cluster-scoped objects."""
MAX_NOTE: Final = 1024
"""Characters the API takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """About a cluster-scoped object. `action` is what was done or tried, `reason` why, both in
    UpperCamelCase."""

    kind: str
    name: str
    uid: str
    api_version: str
    reason: str
    action: str
    note: str
    warning: bool = False


async def publish(client: Client, event: Event, *, controller: str, instance: str, now: datetime) -> None:
    """Writes it. `controller` is like `meshwire.dev/operator`, `instance` tells its replicas apart. Raises
    what Client raises."""
    regarding: dict[str, Any] = {"apiVersion": event.api_version, "kind": event.kind, "name": event.name}
    if event.uid:
        regarding["uid"] = event.uid
    await client.create(
        f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events",
        {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{event.name[:50]}-", "namespace": NAMESPACE},
            "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": controller,
            "reportingInstance": instance[:128],
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "action": event.action,
            "regarding": regarding,
            "note": event.note[:MAX_NOTE],
        },
    )
