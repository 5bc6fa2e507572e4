"""Starts the agent's parts and ends them: the loop, the watch, the netlink monitor, the metrics page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from importlib.metadata import version

import aiohttp
import kopf

from meshwire.agent import metrics, state
from meshwire.agent.kernel import Kernel
from meshwire.agent.loop import Agent, Look, describe, observe_and_plan
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World, make_registry
from meshwire.encryption import keys, netlink
from meshwire.kube.client import Client, Cluster

log = logging.getLogger("meshwire.agent")

RESTART_SECONDS = 3.0
"""Between attempts to watch an API server that can't be reached."""


async def run(settings: Settings, cluster: Cluster) -> None:
    """Until SIGTERM or SIGINT."""
    sealing_key = keys.find_or_create_sealing_key(settings.sealing_key_file)
    kernel = Kernel(settings)
    async with Client(cluster) as client:
        agent = Agent(settings, kernel, client, sealing_key)
        with contextlib.closing(netlink.open_monitor()) as monitor:
            asyncio.get_running_loop().add_reader(monitor, _drain, monitor, agent)
            runner = await metrics.serve(agent.health, *settings.metrics_address)
            work = asyncio.create_task(agent.run(version("meshwire")), name="loop")
            watch = asyncio.create_task(watch_forever(settings, cluster, agent.publish), name="watch")
            try:
                done, _ = await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asyncio.get_running_loop().remove_reader(monitor)
                for task in (work, watch):
                    task.cancel()
                await asyncio.gather(work, watch, return_exceptions=True)
                await runner.cleanup()
                agent.close()
        for task in done:
            task.result()


async def preview(settings: Settings, cluster: Cluster) -> None:
    """Prints what the agent would do next. It loads no programs, so filters that are in place count as
    outdated."""
    first: asyncio.Future[Callable[[], World]] = asyncio.get_running_loop().create_future()

    def publish(snapshot: Callable[[], World]) -> None:
        if not first.done():
            first.set_result(snapshot)

    watch = asyncio.create_task(watch_forever(settings, cluster, publish))
    snapshot = await first
    try:
        look = await asyncio.to_thread(_look_once, settings, snapshot())
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    for problem in look.problems:
        print(f"! {problem.reason}: {problem.message}")
    for action in look.todo:
        print(action)


def _look_once(settings: Settings, world: World) -> Look:
    with contextlib.closing(Kernel(settings)) as kernel:
        return observe_and_plan(
            kernel,
            settings.node,
            world,
            held=keys.read_held(settings.held_keys_file),
            last_good=state.read_config(settings.config_file),
        )


async def watch_forever(
    settings: Settings, cluster: Cluster, publish: Callable[[Callable[[], World]], None]
) -> None:
    """Ends with the process's SIGTERM or SIGINT, which kopf handles; whatever else ends kopf is tried
    again."""
    while True:
        registry, kopf_settings = make_registry(settings.node, cluster, publish)
        try:
            await kopf.operator(registry=registry, settings=kopf_settings, clusterwide=True, standalone=True)
            return
        except (aiohttp.ClientError, OSError, kopf.LoginError, RuntimeError) as error:
            log.warning("can't watch the API server, the node stays as it is: %s", describe(error))
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_SECONDS):
                await stop.wait()
                return


def _drain(monitor: socket.socket, agent: Agent) -> None:
    with contextlib.suppress(BlockingIOError, OSError):
        while monitor.recv(65536):
            pass
    agent.wake()
