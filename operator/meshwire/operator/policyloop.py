"""The loops of policy: one for identities and endpoints, which pods wait for, and one for what is said about
policies. Neither can hold up the other, nor the loop of nodes and keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from meshwire.kube.client import ApiError
from meshwire.operator import policystatus
from meshwire.operator.cidrs import Published
from meshwire.operator.policyapply import PolicyHands, resource_of, subject_of
from meshwire.operator.policyreconcile import Action, reconcile
from meshwire.operator.policystatus import Selections
from meshwire.operator.policyworld import PolicyWorld
from meshwire.operator.rounds import Rounds

INVALID: Final = frozenset({400, 413, 422})
STATUS_DEBOUNCE: Final = 0.5
COUNTERS: Final = 10.0
"""Seconds between writes of what are only numbers."""


HELD: Final = 60.0
"""Seconds for which a write that the API server calls invalid is not tried again: one odd pod must not
make the others wait."""


@dataclass(slots=True)
class EndpointLoop(Rounds):
    world: PolicyWorld
    hands: PolicyHands
    published: Published = Published()
    published_changed: Callable[[], None] = lambda: None
    _held: dict[Hashable, float] = field(default_factory=dict)
    """Until when, on time.monotonic()'s clock, by what the write was about."""

    def leadership_changed(self) -> None:
        # Whoever led before may have written what our watches have not brought yet.
        self.world.distrust()
        self.wake()

    async def _round(self) -> bool | None:
        inputs = await self.world.gather()
        if inputs is None:
            return False
        started = time.monotonic()
        # In a thread: a look at tens of thousands of pods must not keep the leader from renewing its lease.
        plan = await asyncio.to_thread(reconcile, inputs)
        self.metrics.policy_rounds.observe(self._looked(started))
        self.metrics.identities.set(len(inputs.identities))
        self.metrics.endpoints.set(plan.endpoints)
        self.metrics.endpoint_slices.set(len(inputs.slices))
        self.metrics.contested.set(plan.contested)
        self._held = {subject: until for subject, until in self._held.items() if until > started}
        actions = [action for action in plan.actions if subject_of(action) not in self._held]
        # What comes later doesn't undo it: the next pod is always on its way.
        complete = bool(inputs.without_cidr) and (self.published.complete or not actions)
        self._publish(Published(complete, plan.families))
        if not actions:
            return False
        return await self._carry_out(
            actions, self._apply, lambda action: self.world.distrust(resource_of(action))
        )

    def _publish(self, published: Published) -> None:
        if published != self.published:
            self.published = published
            self.published_changed()

    async def _apply(self, action: Action) -> None:
        try:
            await self.hands.apply(action)
        except ApiError as error:
            if error.status in INVALID:
                self._held[subject_of(action)] = time.monotonic() + HELD
            raise

    def _distrust(self) -> None:
        self.world.distrust()


@dataclass(slots=True)
class StatusLoop(Rounds):
    idle_seconds: ClassVar[float] = COUNTERS
    debounce_seconds: ClassVar[float] = STATUS_DEBOUNCE

    world: PolicyWorld
    hands: PolicyHands
    _selections: Selections = field(default_factory=Selections)
    _counters_at: float = 0.0

    async def _round(self) -> bool | None:
        counters = time.monotonic() >= self._counters_at
        inputs = await self.world.gather_policies(counters=counters)
        if inputs is None:
            return False
        if counters:
            self._counters_at = time.monotonic() + COUNTERS
        started = time.monotonic()
        actions = await asyncio.to_thread(policystatus.plan, inputs, self._selections)
        self._looked(started)
        if not actions:
            return False
        # A conflict: somebody has just edited the policy, which the watch tells soon.
        return await self._carry_out(actions, self.hands.write_status, lambda action: None)

    def _distrust(self) -> None:
        # What it writes is judged anew each time. A conflict costs no more than a second attempt.
        pass
