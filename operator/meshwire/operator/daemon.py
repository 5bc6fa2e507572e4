"""Puts the operator's parts together: watches, lease, loops, metrics."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import kopf
import structlog

from meshwire.api import names
from meshwire.kube.client import Client, Cluster
from meshwire.kube.watching import missing_kinds
from meshwire.operator import metrics as metrics_server
from meshwire.operator.leader import Leader
from meshwire.operator.loop import Loop
from meshwire.operator.metrics import Metrics
from meshwire.operator.policyapply import PolicyHands
from meshwire.operator.policyloop import EndpointLoop, StatusLoop
from meshwire.operator.policyworld import PolicyWorld
from meshwire.operator.settings import Settings
from meshwire.operator.watches import Watched, make_registry, make_settings
from meshwire.operator.world import World

log = structlog.get_logger(__name__)

LEASE: Final = "meshwire-operator"
KINDS: Final = frozenset({names.MESHCONFIGS, names.MESHNODES, names.MESHSTATUSES})
RETRY: Final = 2.0
"""Seconds before what ended with an error is tried again, and watching where the CRDs are missing."""


async def run(settings: Settings, cluster: Cluster) -> None:
    """Until SIGTERM or SIGINT. Raises OSError where the metrics address can't be used."""
    stop = asyncio.Event()
    metrics = Metrics()
    async with Client(cluster) as client:
        leader = Leader(client, settings.namespace, LEASE, settings.identity)
        world = World(client, settings.namespace)

        def leads() -> bool:
            return leader.leads

        loop = Loop(metrics, leads, client, world, settings.identity)
        policy = PolicyWorld(client, mesh=lambda: world.watched())
        hands = PolicyHands(client, policy)
        endpoints = EndpointLoop(metrics, leads, policy, hands)
        statuses = StatusLoop(metrics, leads, policy, hands)
        policy.endpoints_changed, policy.policies_changed = endpoints.wake, statuses.wake
        world.published, endpoints.published_changed = lambda: endpoints.published, loop.wake
        world.pressure, policy.pressure_changed = policy.pressure, loop.wake

        def leadership_changed() -> None:
            loop.leadership_changed()
            endpoints.leadership_changed()
            statuses.wake()

        def publish(watched: Callable[[], Watched]) -> None:
            loop.publish(watched)
            policy.mesh_changed.set()

        leader.changed = leadership_changed
        runner = None
        if settings.metrics_address[1]:
            runner = await metrics_server.serve(
                metrics, settings.metrics_address, ready=lambda: loop.settled or not leader.leads
            )
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in {
                "lease": _for_ever(leader.run),
                "loop": _for_ever(loop.run),
                "events": _for_ever(loop.write_events),
                "endpoints": _for_ever(endpoints.run),
                "policy status": _for_ever(statuses.run),
                "policy kinds": _for_ever(policy.wait_for_kinds),
                "policy settings": _for_ever(policy.follow_settings),
                **{
                    f"watch {resource}": _for_ever(partial(each.run, client))
                    for resource, each in policy.watches.items()
                },
                "watch": watch(client, cluster, world, publish, stop, namespace=settings.namespace),
            }.items()
        ]
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Last: whoever takes over must find nothing of ours under way.
            await leader.release()
            if runner:
                await runner.cleanup()


async def watch(
    client: Client,
    cluster: Cluster,
    world: World,
    publish: Callable[[Callable[[], Watched]], None],
    stop: asyncio.Event,
    *,
    namespace: str,
) -> None:
    """Runs kopf until a signal comes, then sets `stop`. kopf watches only kinds that exist when it starts,
    and ends for good on some errors."""
    complaint = ""
    while True:
        # kopf takes the signals for itself while it runs, and doesn't give them back.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            if missing := await missing_kinds(client, KINDS):
                problem = f"the API server knows no {', '.join(sorted(missing))}: apply the CRDs"
            else:
                await kopf.operator(
                    registry=make_registry(cluster, publish, world.deletion_seen),
                    settings=make_settings(),
                    namespaces=[namespace],
                )
                # It returns when a signal came.
                stop.set()
                return
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem != complaint:
            log.warning("can't watch the API server, trying again", error=problem)
            complaint = problem
        world.relist_at = 0.0
        await asyncio.sleep(RETRY)


async def _for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """kopf, when it ends, cancels every task made since it began, whoever made it. Who was not meant goes
    on; so does whoever fails in a way nobody thought of."""
    while True:
        try:
            await work()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        except Exception:
            log.exception("a part of the operator failed, it begins anew")
            await asyncio.sleep(RETRY)
