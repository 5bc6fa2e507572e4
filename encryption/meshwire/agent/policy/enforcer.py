"""The policy loop: any event only wakes it, and it brings the node's policy maps and filters to what they
should be."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import aiohttp
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.agent.kernel import Metrics
from meshwire.agent.loop import Health, describe
from meshwire.agent.policy.events import Hub
from meshwire.agent.policy.feed import Feed, News, sources, watch
from meshwire.agent.policy.kernel import PolicyKernel
from meshwire.agent.policy.model import Model, Surroundings
from meshwire.agent.policy.room import Fill, pressure
from meshwire.agent.settings import Settings
from meshwire.agent.watch import World
from meshwire.api import names
from meshwire.api.fields import Network
from meshwire.api.meshconfig import MeshConfig, PolicySettings
from meshwire.api.meshpolicy import PolicyMode
from meshwire.api.meshpolicyreport import (
    INVALID,
    MAP_FULL,
    MAX_MESSAGE,
    MAX_POLICIES,
    TOO_LARGE,
    Failure,
    InForce,
    MapPressure,
    MeshPolicyReport,
)
from meshwire.encryption.model import DEVICE_ADDRESS, DEVICES, Link
from meshwire.kube.client import ApiError, Client

T = TypeVar("T")

log = logging.getLogger("meshwire.agent")

RESYNC: Final = 30.0
"""Seconds between looks at devices and filters when nothing has happened."""
READ_MAPS_EVERY: Final = 300.0
"""Seconds between reads of all that the maps hold: nobody but us writes to them, and they may be large."""
SETTLE: Final = 0.01
"""Seconds that further events have to join one that has come."""
DEVICE_POLL: Final = 0.05
"""Seconds between looks for the device of a pod that has an address: the CNI may still be at work."""
RETRY: Final = 1.0
NEVER: Final = float("-inf")
"""On time.monotonic()'s clock."""
REPORT_EVERY: Final = 0.5
"""Seconds between reports."""
MAX_NAMES: Final = 5
"""Pods that the log names before it only counts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to. `waiting`: for devices of pods. `in_force` are policies that select pods of this
    node, `failed` those that it can't carry out. `closed`: namespace/name of the pods that get and send
    nothing, for want of room."""

    waiting: bool
    in_force: tuple[InForce, ...]
    failed: tuple[Failure, ...]
    metrics: Metrics
    maps: Mapping[str, Fill]
    closed: tuple[str, ...]


class Enforcer:
    """Everything about policy that one node's agent remembers. The model and the kernel are touched in one
    thread of their own."""

    def __init__(
        self,
        settings: Settings,
        kernel: PolicyKernel,
        client: Client,
        health: Health,
    ) -> None:
        self._settings = settings
        self._kernel = kernel
        self._client = client
        self._health = health
        self._source: Callable[[], World] | None = None
        self._wake = asyncio.Event()
        self._stale = True
        self._news: list[News] = []
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._model: Model | None = None
        self._feed: Feed | None = None
        self._asked: PolicySettings | None = None
        self._to_report: MeshPolicyReport | None = None
        self._news_to_report = asyncio.Event()
        self._synced_at = self._looked_at = NEVER
        self._guessed: frozenset[int] = frozenset()
        self._around: tuple[object, Surroundings] = (None, Surroundings())
        self._pressure: tuple[MapPressure, ...] = ()
        self._closed: tuple[str, ...] = ()
        self._hub = Hub(settings.node, settings.run_directory, lambda: self._model)

    def follow(self, source: Callable[[], World]) -> None:
        """Called for every event of Nodes, MeshNodes and the MeshConfig."""
        self._source = source
        self._wake.set()

    def wake(self) -> None:
        """Called when links, addresses, routes or filters have changed."""
        self._stale = True
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Errors are logged and tried again, never raised."""
        delay = 0.0
        beside = [
            asyncio.create_task(self._serve_events(), name="events"),
            asyncio.create_task(self._keep_reported(), name="report"),
        ]
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
                        await asyncio.sleep(SETTLE)
                self._wake.clear()
                try:
                    delay = await self._run_once()
                except (OSError, NetlinkError, aiohttp.ClientError, ApiError, TimeoutError) as error:
                    log.warning("policy: trying again: %s", describe(error))
                    self._synced_at, self._stale = NEVER, True
                    delay = RETRY
                except Exception:
                    # A bug must neither end encryption nor leave a model behind that is half right: what is
                    # in force stays, and everything is asked for anew.
                    log.exception("policy: starting over")
                    self._start_over()
                    delay = RETRY
        finally:
            for task in beside:
                task.cancel()
            self._stop_watching()

    async def _run_once(self) -> float:
        """Seconds until the next run, unless something happens."""
        world = self._source() if self._source else None
        config = world.config if world else None
        if isinstance(config, MeshConfig):
            self._asked = config.policy
        if world is None or self._asked is None:
            # Nobody has said what is wanted: what is in force stays.
            return RESYNC
        if not self._asked.enabled:
            if self._model:
                self._start_over()
            if self._stale or self._synced_at == NEVER:
                self._stale, self._synced_at = False, time.monotonic()
                self._hub.open(None)
                await self._in_thread(self._kernel.remove)
            self._pressure, self._closed = (), ()
            self._health.policy_maps, self._health.policy_closed_pods = {}, 0
            self._report(MeshPolicyReport(name=self._settings.node, enabled=False))
            return RESYNC
        self._watch_what_is_asked(self._asked)
        if not await self._take_news():
            return RESYNC
        now = time.monotonic()
        stale, self._stale = self._stale or now - self._looked_at > RESYNC, False
        resync = now - self._synced_at > READ_MAPS_EVERY
        outcome = await self._in_thread(self._converge, world, self._asked, stale, resync)
        if stale:
            self._looked_at = now
        self._health.policy_metrics, self._health.policy_maps = outcome.metrics, outcome.maps
        self._health.policy_closed_pods = len(outcome.closed)
        self._tell_of_room(outcome)
        if not self._hub.is_open:
            self._hub.open(await self._in_thread(self._kernel.open_events))
        if resync:
            self._synced_at = now
        self._report(
            MeshPolicyReport(
                name=self._settings.node,
                enabled=True,
                policies=outcome.in_force,
                failed=outcome.failed,
                pressure=self._pressure,
            )
        )
        if outcome.waiting:
            self._stale = True
            return DEVICE_POLL
        return RESYNC

    async def _serve_events(self) -> None:
        try:
            await self._hub.serve()
        except OSError as error:
            log.warning("events can't be followed on this node: %s", describe(error))

    def close(self) -> None:
        """What is in force stays in force."""
        self._thread.submit(self._kernel.close)
        self._thread.shutdown()

    # What there is

    def _watch_what_is_asked(self, asked: PolicySettings) -> None:
        wanted = sources(self._settings.node, network_policies=asked.network_policies)
        for resource in self._watches.keys() - wanted.keys():
            self._watches.pop(resource).cancel()
            self._take(News(resource, "LISTED", []))
        for resource, source in wanted.items():
            # kopf, when it ends, takes tasks of ours along: see the daemon's `_despite_kopf`.
            if resource not in self._watches or self._watches[resource].done():
                self._watches[resource] = asyncio.create_task(
                    watch(self._client, resource, source, self._take), name=f"watch {resource}"
                )

    def _stop_watching(self) -> None:
        for task in self._watches.values():
            task.cancel()
        self._watches.clear()

    def _start_over(self) -> None:
        self._stop_watching()
        self._model, self._feed, self._news = None, None, []
        self._synced_at, self._stale = NEVER, True

    def _take(self, news: News) -> None:
        self._news.append(news)
        self._wake.set()

    async def _take_news(self) -> bool:
        """Whether everything is known at least once; before, nothing is touched."""
        if self._model is None:
            if not self._watches.keys() <= {news.resource for news in self._news if news.kind == "LISTED"}:
                return False
            model = await self._in_thread(self._kernel.new_model)
            self._model, self._feed = model, Feed(model)
        news, self._news = self._news, []
        assert self._feed
        await self._in_thread(_take_all, self._feed, news)
        return True

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # The kernel; all of this runs in the policy thread.

    def _converge(self, world: World, asked: PolicySettings, stale: bool, resync: bool) -> Outcome:
        model = self._model
        assert model
        links = self._kernel.links(fresh=stale)
        around = self._surroundings(world, asked, links)
        model.set_surroundings(around)
        for pod in model.lost_devices({link.index for link in links.values()}):
            model.set_device(pod.uid, None)
        for pod in model.waiting_for_device():
            if device := self._kernel.find_device(pod.addresses):
                model.set_device(pod.uid, device)
        wanted = self._health.desired
        outward = [links[name] for name in (*(wanted.hooked if wanted else ()), *DEVICES) if name in links]
        if stale:
            self._guessed = self._kernel.guess_pod_devices(around.own or around.shared)
        self._kernel.apply(
            model, outward, self._guessed, skips_stack=asked.skips_stack, resync=resync, fresh=stale
        )
        failed = _failed(model)
        return Outcome(
            waiting=bool(model.waiting_for_device()),
            in_force=_in_force(model, failed, self._hub.would_deny),
            failed=failed,
            metrics=self._kernel.metrics(),
            maps=self._kernel.fill_of(model),
            closed=tuple(
                sorted(f"{model.pods[uid].namespace}/{model.pods[uid].name}" for uid in model.closed_pods())
            ),
        )

    def _surroundings(self, world: World, asked: PolicySettings, links: Mapping[str, Link]) -> Surroundings:
        # It says the same for most events, and comes from as many objects as there are nodes.
        source = (world.nodes, world.members.get(self._settings.node), world.config, asked, links)
        if self._around[0] != source:
            self._around = source, self._describe(world, asked, links)
        return self._around[1]

    def _describe(self, world: World, asked: PolicySettings, links: Mapping[str, Link]) -> Surroundings:
        own = world.nodes.get(self._settings.node)
        others = [node for name, node in world.nodes.items() if name != self._settings.node]
        config = world.config.network.cluster_cidrs if isinstance(world.config, MeshConfig) else ()
        member = world.members.get(self._settings.node)
        cluster: dict[Network, None] = dict.fromkeys(config)
        cluster |= dict.fromkeys(member.spec.cluster_cidrs if member else ())
        shared = tuple(cluster) if own and not own.pod_cidrs else ()
        for node in world.nodes.values():
            cluster |= dict.fromkeys(node.pod_cidrs)
        return Surroundings(
            local=frozenset(
                address.packed
                for link in links.values()
                for address in link.addresses
                if not address.is_link_local and address != DEVICE_ADDRESS
            )
            | frozenset(address.packed for address in (own.addresses if own else ())),
            remote=frozenset(address.packed for node in others for address in node.addresses),
            cluster=tuple(cluster),
            own=own.pod_cidrs if own else (),
            shared=shared,
            node=self._settings.node,
            excluded_labels=asked.excluded_labels,
        )

    # Reports

    def _tell_of_room(self, outcome: Outcome) -> None:
        """Once for each change; how much there is now is in the metrics."""
        before, self._pressure = self._pressure, pressure(self._pressure, outcome.maps)
        for each in self._pressure:
            if each not in before:
                log.warning(
                    "policy: map %s has %d of %d entries%s",
                    each.map,
                    each.entries,
                    each.capacity,
                    f" and no room for {each.left_out} more" if each.full else "",
                )
        for name in sorted({each.map for each in before} - {each.map for each in self._pressure}):
            log.info("policy: map %s has room again", name)
        if outcome.closed != self._closed:
            self._closed = outcome.closed
            if self._closed:
                shown = ", ".join(self._closed[:MAX_NAMES])
                more = f" and {len(self._closed) - MAX_NAMES} more" if len(self._closed) > MAX_NAMES else ""
                log.warning("policy: closed, as there is no room for their rules: %s%s", shown, more)
            else:
                log.info("policy: there is room for the rules of all pods again")

    def _report(self, report: MeshPolicyReport) -> None:
        if report != self._to_report:
            self._to_report = report
            self._news_to_report.set()

    async def _keep_reported(self) -> None:
        """Tells the operator what is in force here, whenever that has changed. For ever: enforcing doesn't
        wait for it."""
        while True:
            await self._news_to_report.wait()
            self._news_to_report.clear()
            report = self._to_report
            if report is None:
                continue
            path = f"/apis/{names.API_VERSION}/{names.MESHPOLICYREPORTS}/{report.name}/status"
            try:
                await self._client.patch(path, {"status": report.to_dict()})
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                # The operator makes it, where policy is on.
                if not (isinstance(error, ApiError) and error.status == 404):
                    log.warning("can't report: %s", describe(error))
                elif not report.enabled:
                    continue
                self._news_to_report.set()
                await asyncio.sleep(RETRY)
            await asyncio.sleep(REPORT_EVERY)


def _take_all(feed: Feed, news: Iterable[News]) -> None:
    for item in news:
        feed.take(item)


def _in_force(model: Model, failed: Iterable[Failure], would_deny: Mapping[str, int]) -> tuple[InForce, ...]:
    out = {failure.uid for failure in failed}
    concerned = sorted(model.concerned(), key=lambda policy: policy.uid)
    return tuple(
        InForce(policy.uid, policy.generation, would_deny.get(policy.uid, 0))
        for policy in concerned
        if policy.uid not in out
    )[:MAX_POLICIES]


def _failed(model: Model) -> tuple[Failure, ...]:
    """One for each policy: of several reasons the first, of several pods the first identity's."""
    found: dict[str, Failure] = {
        refused.uid: Failure(refused.uid, refused.generation, INVALID, str(refused.error)[:MAX_MESSAGE])
        for refused in model.refused.values()
    }

    def fail(subject: int, is_audit: bool, reason: str, message: str) -> None:
        for policy in model.policies_of(subject):
            # Where only the set of audit is missing, what is to be enforced is.
            if not is_audit or policy.mode is PolicyMode.AUDIT:
                found.setdefault(
                    policy.uid, Failure(policy.uid, policy.generation, reason, message[:MAX_MESSAGE])
                )

    for problem in model.problems:
        message = f"{problem.entries} entries for one pod where {problem.limit} fit"
        fail(problem.subject, problem.audit, TOO_LARGE, message)
    for subject, is_audit, shortage in model.shortages():
        what = "what it would deny is not told" if is_audit else "its pods get and send nothing"
        fail(subject, is_audit, MAP_FULL, f"{shortage}: {what}")
    return tuple(found[uid] for uid in sorted(found))[:MAX_POLICIES]
