"""The one loop: something changed, look at everything, write what is missing, look again until nothing
is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from typing import Final

import aiohttp
import structlog

from meshwire.api import names
from meshwire.kube import events
from meshwire.kube.client import ApiError, Client
from meshwire.kube.events import Event
from meshwire.operator.apply import Hands, Outdated
from meshwire.operator.claims import Conflict
from meshwire.operator.keys import UnusableSealingKey
from meshwire.operator.metrics import Metrics
from meshwire.operator.reconcile import Action, Inputs, reconcile
from meshwire.operator.watches import Watched
from meshwire.operator.world import World

log = structlog.get_logger(__name__)

DEBOUNCE: Final = 0.1
"""Seconds between a change and the look at it, in which further ones gather."""
WRITE_TIMEOUT: Final = 4.0
"""Seconds a write may take: with lease.RENEW_DEADLINE less than lease.DURATION, so that a replica that
lost its lease has nothing under way when the next one begins."""
CONCURRENCY: Final = 8
"""Writes at a time."""
BACKOFF: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds after a failed round, one after another."""
IDLE_SECONDS: Final = 60.0
"""Between looks when nothing happens: ConfigMaps and lists have no watch."""
MAX_EVENTS: Final = 256
"""Events that wait to be written. With more at once, the rest is in the log only."""
CONTROLLER: Final = f"{names.GROUP}/operator"


class NoLongerLeader(Exception):
    """The lease was lost in the middle of a round."""


@dataclass(slots=True)
class Loop:
    """`leads` tells whether this replica may act at this moment."""

    client: Client
    world: World
    metrics: Metrics
    identity: str
    leads: Callable[[], bool]
    settled: bool = False
    """A round has found nothing left to do, at least once."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _watching: asyncio.Event = field(default_factory=asyncio.Event)
    _events: asyncio.Queue[Event] = field(default_factory=lambda: asyncio.Queue(MAX_EVENTS))
    _announced: frozenset[Conflict] = frozenset()
    _last: Inputs | None = None
    _hands: Hands = field(init=False)

    def __post_init__(self) -> None:
        self._hands = Hands(self.client, self.world, self.announce)

    def publish(self, watched: Callable[[], Watched]) -> None:
        """The watches have their first lists, or something new."""
        self.world.watched = watched
        self._watching.set()
        self._wake.set()

    def leadership_changed(self) -> None:
        # Whoever led before may have written what our watches have not brought yet.
        self.world.relist_at = 0.0
        self._last = None
        self._wake.set()

    def announce(self, event: Event) -> None:
        log.info("event", reason=event.reason, kind=event.kind, name=event.name, note=event.note)
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("too many events at once: this one is not written", reason=event.reason)

    async def run(self) -> None:
        """For ever."""
        failures = 0
        while True:
            pause = BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else IDLE_SECONDS
            try:
                async with asyncio.timeout(pause):
                    # After a failure only time helps: the change we wait for may never come.
                    await (asyncio.Event() if failures else self._wake).wait()
            except TimeoutError:
                pass
            await asyncio.sleep(DEBOUNCE)
            self._wake.clear()
            self.metrics.leader.set(self.leads())
            if not self.leads():
                failures = 0
                continue
            try:
                again = await self._round()
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError, NoLongerLeader) as error:
                failures += 1
                self.metrics.failures.inc()
                log.warning("reconciling was cut short", error=str(error) or type(error).__name__)
                self.world.relist_at = 0.0
            except Exception:
                # A bug must not end the process: encryption goes on without us, but nodes could not join.
                failures += 1
                self.metrics.failures.inc()
                log.exception("reconciling failed")
                self.world.relist_at = 0.0
            else:
                failures = failures + 1 if again is None else 0
                if again:
                    self._wake.set()

    async def write_events(self) -> None:
        """For ever. An Event that can't be written is lost: it is news, and what it tells is in the log
        too."""
        while True:
            event = await self._events.get()
            try:
                await events.publish(
                    self.client, event, controller=CONTROLLER, instance=self.identity, now=datetime.now(UTC)
                )
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("could not write an event", reason=event.reason, error=str(error))

    async def _round(self) -> bool | None:
        """One look and what follows from it. True: look again at once; None: something failed, try later."""
        inputs = await self.world.gather()
        if self._last is not None and _same(inputs, self._last):
            return False
        with self.metrics.rounds.time():
            plan = reconcile(inputs)
        if plan.conflicts is not None:
            self.metrics.observe(plan.status, len(plan.conflicts))
            self._tell_of_conflicts(plan.conflicts)
        if not plan.actions:
            self._last = inputs
            self.settled = True
            return False
        self._last = None
        return await self._carry_out(plan.actions)

    async def _carry_out(self, actions: Sequence[Action]) -> bool | None:
        """The actions are independent of each other, so one that fails does not hold up the rest."""
        slots = asyncio.Semaphore(CONCURRENCY)
        results = await asyncio.gather(
            *(self._act(action, slots) for action in actions), return_exceptions=True
        )
        failed = False
        for result in results:
            match result:
                case None:
                    pass
                case Outdated() | ApiError(status=404 | 409):
                    # Somebody else was first, or our view is old: the lists tell.
                    self.world.relist_at = 0.0
                case ApiError() | UnusableSealingKey() | asyncio.CancelledError():
                    failed = True
                case BaseException():
                    raise result
        return None if failed else True

    async def _act(self, action: Action, slots: asyncio.Semaphore) -> None:
        async with slots:
            kind = type(action).__name__
            if not self.leads():
                raise NoLongerLeader("this replica is no longer the leader")
            try:
                async with asyncio.timeout(WRITE_TIMEOUT):
                    await self._hands.apply(action)
            except Outdated as error:
                self.metrics.actions.labels(kind, "conflict").inc()
                log.info("not done after all", action=kind, why=str(error))
                raise
            except ApiError as error:
                result = "conflict" if error.status in (404, 409) else "failed"
                self.metrics.actions.labels(kind, result).inc()
                log.log(20 if result == "conflict" else 30, "refused", action=kind, error=str(error))
                raise
            except Exception as error:
                self.metrics.actions.labels(kind, "failed").inc()
                log.warning("failed", action=kind, error=str(error) or type(error).__name__)
                raise
            self.metrics.actions.labels(kind, "done").inc()

    def _tell_of_conflicts(self, conflicts: Sequence[Conflict]) -> None:
        now = frozenset(conflicts)
        for conflict in sorted(now - self._announced):
            self.announce(
                Event(
                    kind="MeshNode",
                    name=conflict.loser,
                    uid="",
                    api_version=names.API_VERSION,
                    reason=conflict.reason,
                    action="Refuse",
                    note=conflict.message,
                    warning=True,
                )
            )
        self._announced = now


def _same(one: Inputs, other: Inputs) -> bool:
    """But for the time."""
    return all(
        getattr(one, item.name) == getattr(other, item.name)
        for item in dataclass_fields(Inputs)
        if item.name != "now"
    )
