"""The loop of nodes, keys and phases."""

from __future__ import annotations

import asyncio
import time
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
from meshwire.operator.apply import Hands
from meshwire.operator.claims import Conflict
from meshwire.operator.reconcile import Inputs, reconcile
from meshwire.operator.rounds import Rounds
from meshwire.operator.watches import Watched
from meshwire.operator.world import World

log = structlog.get_logger(__name__)

MAX_EVENTS: Final = 256
"""Events that wait to be written. With more at once, the rest is in the log only."""
CONTROLLER: Final = f"{names.GROUP}/operator"


@dataclass(slots=True)
class Loop(Rounds):
    """Nodes and their keys. Looks also when nothing happens: ConfigMaps and lists have no watch."""

    client: Client
    world: World
    identity: str
    settled: bool = False
    """A round has found nothing left to do, at least once."""
    _events: asyncio.Queue[Event] = field(default_factory=lambda: asyncio.Queue(MAX_EVENTS))
    _announced: frozenset[Conflict] = frozenset()
    _last: Inputs | None = None
    _look_again: datetime | None = None
    _hands: Hands = field(init=False)

    def __post_init__(self) -> None:
        self._hands = Hands(self.client, self.world, self.announce)

    @property
    def pause(self) -> float:
        if self._look_again is None:
            return self.idle_seconds
        until = (self._look_again - datetime.now(UTC)).total_seconds()
        # One that is over was looked at, and found to wait for something else too.
        return min(until, self.idle_seconds) if until > 0 else self.idle_seconds

    def publish(self, watched: Callable[[], Watched]) -> None:
        """The watches have their first lists, or something new."""
        self.world.watched = watched
        self.wake()

    def leadership_changed(self) -> None:
        # Whoever led before may have written what our watches have not brought yet.
        self.world.relist_at = 0.0
        self._last = None
        self.wake()

    def announce(self, event: Event) -> None:
        log.info("event", reason=event.reason, kind=event.kind, name=event.name, note=event.note)
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("too many events at once: this one is not written", reason=event.reason)

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
        inputs = await self.world.gather()
        is_time = self._look_again is not None and inputs.now >= self._look_again
        if self._last is not None and not is_time and _same(inputs, self._last):
            return False
        started = time.monotonic()
        plan = reconcile(inputs)
        self.metrics.rounds.observe(self._looked(started))
        self._look_again = plan.look_again
        if plan.conflicts is not None:
            self.metrics.observe(plan.status, len(plan.conflicts))
            self._tell_of_conflicts(plan.conflicts)
        if not plan.actions:
            self._last = inputs
            self.settled = True
            return False
        self._last = None
        # A conflict: somebody else was first, or our view is old; the lists tell.
        return await self._carry_out(plan.actions, self._hands.apply, lambda action: self._distrust())

    def _distrust(self) -> None:
        self.world.relist_at = 0.0

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
