"""The operator's Prometheus metrics, and the endpoints a kubelet asks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import MeshStatus


class Metrics:
    """One registry with everything in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leader = Gauge("meshwire_operator_leader", "1 on the replica that acts", registry=self.registry)
        self.rounds = Histogram(
            "meshwire_operator_reconcile_seconds", "Time of one look at everything", registry=self.registry
        )
        self.actions = Counter(
            "meshwire_operator_actions_total",
            "Writes to the API by kind and result (done, conflict, failed)",
            ["action", "result"],
            registry=self.registry,
        )
        self.failures = Counter(
            "meshwire_operator_failed_rounds_total", "Looks that an error cut short", registry=self.registry
        )
        self.nodes = Gauge("meshwire_nodes", "Nodes of the cluster", registry=self.registry)
        self.nodes_ready = Gauge(
            "meshwire_nodes_ready", "Live nodes that have carried out their orders", registry=self.registry
        )
        self.phase = Gauge(
            "meshwire_phase",
            "1 for the phase the nodes are ordered to be in",
            ["phase"],
            registry=self.registry,
        )
        self.epoch = Gauge("meshwire_epoch", "Highest epoch of keys ever used", registry=self.registry)
        self.epoch_started = Gauge(
            "meshwire_epoch_started_timestamp_seconds",
            "Since when the keys are in force that carry all traffic; 0 without keys",
            registry=self.registry,
        )
        self.rotating = Gauge(
            "meshwire_rotation_in_progress", "1 while nodes change their keys", registry=self.registry
        )
        self.rotation_started = Gauge(
            "meshwire_rotation_started_timestamp_seconds",
            "When the change of keys that is under way was decided upon; 0: none is",
            registry=self.registry,
        )
        self.rotations = Counter(
            "meshwire_rotations_total", "Changes of keys that came to their end", registry=self.registry
        )
        self.rotation_seconds = Gauge(
            "meshwire_rotation_seconds", "How long the latest of them took", registry=self.registry
        )
        self.quarantined = Gauge(
            "meshwire_quarantined_nodes", "Nodes whose keys are withdrawn", registry=self.registry
        )
        self.quarantine_waiting = Gauge(
            "meshwire_quarantine_waiting_nodes",
            "Live nodes that have not let go of some node in quarantine, the most of any",
            registry=self.registry,
        )
        self.revocation_seconds = Gauge(
            "meshwire_revocation_seconds",
            "From a quarantine to the moment when the last live node had let go of the node",
            ["node"],
            registry=self.registry,
        )
        self._rotations = 0
        self.leaked = Gauge(
            "meshwire_leaked_packets",
            "Packets between pods seen in clear while encryption was in force, as MeshStatus has it",
            registry=self.registry,
        )
        self.conflicts = Gauge(
            "meshwire_conflicts",
            "Addresses, pod CIDRs and keys that two nodes claim",
            registry=self.registry,
        )

        self.policy_rounds = Histogram(
            "meshwire_operator_policy_reconcile_seconds",
            "Time of one look at all pods and endpoints",
            registry=self.registry,
        )
        self.identities = Gauge(
            "meshwire_identities", "Label sets that have a number", registry=self.registry
        )
        self.endpoints = Gauge("meshwire_endpoints", "Pods that have an identity", registry=self.registry)
        self.endpoint_slices = Gauge(
            "meshwire_endpoint_slices", "MeshEndpointSlices they are in", registry=self.registry
        )
        self.contested = Gauge(
            "meshwire_contested_addresses",
            "Pod addresses that several pods, or a node too, claim",
            registry=self.registry,
        )

    def observe(self, status: MeshStatus, conflicts: int) -> None:
        """Takes over what a plan found."""
        self.nodes.set(status.nodes)
        self.nodes_ready.set(status.nodes_ready)
        self.epoch.set(status.epoch)
        self.leaked.set(status.leaked)
        self.conflicts.set(conflicts)
        self.epoch_started.set(_seconds(status.epoch_started_at))
        self.rotating.set(status.rotation is not None)
        self.rotation_started.set(_seconds(status.rotation.started_at) if status.rotation else 0)
        self.rotation_seconds.set(status.last_rotation.seconds if status.last_rotation else 0)
        self.quarantined.set(len(status.quarantines))
        self.quarantine_waiting.set(max((each.waiting for each in status.quarantines), default=0))
        self.revocation_seconds.clear()
        for each in status.quarantines:
            if each.revoked_at:
                self.revocation_seconds.labels(each.node).set(each.seconds)
        # MeshStatus counts across restarts; one that was deleted begins anew.
        self.rotations.inc(max(0, status.rotations - self._rotations))
        self._rotations = status.rotations
        for phase in Phase:
            self.phase.labels(str(phase)).set(phase is status.phase)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


async def serve(metrics: Metrics, address: tuple[str, int], *, ready: Callable[[], bool]) -> web.AppRunner:
    """Serves /metrics, /healthz and /readyz until the runner is cleaned up. Raises OSError."""

    async def show(request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def healthy(request: web.Request) -> web.Response:
        # Whoever answers has a running event loop. A cluster that is down is no reason to restart us.
        return web.Response(text="ok")

    async def is_ready(request: web.Request) -> web.Response:
        return web.Response(text="ok") if ready() else web.Response(status=503, text="still looking around")

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/healthz", healthy), web.get("/readyz", is_ready)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, port = address
    await web.TCPSite(runner, host, port).start()
    return runner
