"""Starts the agent's parts and ends them: the loops, the watch, the netlink monitor, the metrics page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version

import kopf

from meshwire.agent import metrics, state
from meshwire.agent.kernel import Kernel
from meshwire.agent.loop import Agent, Look, describe, observe_and_plan
from meshwire.agent.policy.enforcer import Enforcer
from meshwire.agent.policy.kernel import PolicyKernel
from meshwire.agent.settings import Settings
from meshwire.agent.watch import KINDS, Watch, World
from meshwire.encryption import keys, netlink
from meshwire.kube.client import Client, Cluster
from meshwire.kube.watching import make_settings, missing_kinds

log = logging.getLogger("meshwire.agent")

RESTART_SECONDS = 2.0
"""Between attempts to watch an API server that can't be reached."""


async def run(settings: Settings, cluster: Cluster) -> None:
    """Until SIGTERM or SIGINT."""
    sealing_key = keys.find_or_create_sealing_key(settings.sealing_key_file)
    async with Client(cluster) as client, asyncio.TaskGroup() as tasks:
        agent = Agent(settings, Kernel(settings), client, sealing_key)
        enforcer = Enforcer(settings, PolicyKernel(settings), client, agent.health)

        def follow(source: Callable[[], World]) -> None:
            agent.follow(source)
            enforcer.follow(source)

        def wake() -> None:
            agent.wake()
            enforcer.wake()

        runner = await metrics.serve(agent.health, *settings.metrics_address)
        work = [
            tasks.create_task(_despite_kopf(lambda: agent.run(version("meshwire"))), name="loop"),
            tasks.create_task(_despite_kopf(agent.watch_pairs), name="pairs"),
            tasks.create_task(_despite_kopf(enforcer.run), name="policy"),
        ]
        with woken_by_kernel(wake):
            try:
                await watch_forever(settings, cluster, client, follow)
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)
                await runner.cleanup()
                enforcer.close()
                agent.close()


@contextlib.contextmanager
def woken_by_kernel(wake: Callable[[], None]) -> Iterator[None]:
    """Calls `wake` whenever a link, address, route or filter changes. Raises OSError."""

    def drain() -> None:
        # Lost messages (ENOBUFS) are as good as any other reason to look again.
        with contextlib.suppress(OSError):
            while monitor.recv(65536):
                pass
        wake()

    loop = asyncio.get_running_loop()
    with contextlib.closing(netlink.open_monitor()) as monitor:
        loop.add_reader(monitor, drain)
        try:
            yield
        finally:
            loop.remove_reader(monitor)


async def preview(settings: Settings, cluster: Cluster) -> None:
    """Prints what the agent would do next. It loads no programs, so filters that are in place count as
    outdated."""
    first: asyncio.Future[Callable[[], World]] = asyncio.get_running_loop().create_future()

    def follow(source: Callable[[], World]) -> None:
        if not first.done():
            first.set_result(source)

    async with Client(cluster) as client:
        watch = asyncio.create_task(watch_forever(settings, cluster, client, follow))
        source = await first
        try:
            look = await asyncio.to_thread(_look_once, settings, source())
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    for problem in look.problems:
        print(f"! {problem.reason}: {problem.message}")
    for action in look.todo:
        print(action)


async def _despite_kopf(work: Callable[[], Awaitable[None]]) -> None:
    """kopf, when it ends, cancels every task made since it began, those too that a request of ours is
    waiting for. Who was not meant goes on."""
    while True:
        try:
            await work()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise


def _look_once(settings: Settings, world: World) -> Look:
    with contextlib.closing(Kernel(settings)) as kernel:
        return observe_and_plan(
            kernel,
            settings.node,
            world,
            held=keys.read_held(settings.held_keys_file),
            last_good=state.read_config(settings.config_file),
        )


def _tell(task: asyncio.Task[None]) -> None:
    """A task that nobody waits for must not fail in silence."""
    if not task.cancelled() and (error := task.exception()):
        log.error("%s ended: %s", task.get_name(), describe(error))


async def watch_forever(
    settings: Settings, cluster: Cluster, client: Client, follow: Callable[[Callable[[], World]], None]
) -> None:
    """Ends with the process's SIGTERM or SIGINT; whatever else ends kopf is tried again. What was known
    stays in force until the new watch knows everything."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    complaint = ""
    while not stop.is_set():
        # kopf takes the signals for itself while it runs, and doesn't give them back.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        watch = Watch(settings.node, cluster, client, follow)
        complete = asyncio.create_task(watch.complete(), name="complete")
        pods = asyncio.create_task(watch.follow_pods(), name="pods")
        try:
            if missing := await missing_kinds(client, KINDS):
                problem = f"the API server knows no {', '.join(sorted(missing))}: apply the CRDs"
            else:
                complete.add_done_callback(_tell)
                pods.add_done_callback(_tell)
                await kopf.operator(registry=watch.registry, settings=make_settings(), clusterwide=True)
                # It returns when a signal came.
                return
        except Exception as error:
            problem = describe(error)
        finally:
            complete.cancel()
            pods.cancel()
        if problem != complaint:
            log.warning("can't watch the API server, the node stays as it is: %s", problem)
            complaint = problem
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_SECONDS):
                await stop.wait()
