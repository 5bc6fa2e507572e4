"""A loop of rounds: something changed, look at everything, write what is missing, look again until nothing
is."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, TypeVar

import aiohttp
import structlog

from meshwire.kube.client import ApiError
from meshwire.operator.keys import UnusableSealingKey
from meshwire.operator.metrics import Metrics

log = structlog.get_logger(__name__)
A = TypeVar("A")

DEBOUNCE: Final = 0.1
"""Seconds between a change and the look at it, in which further ones gather."""
SHARE: Final = 2.0
"""A loop rests so many times as long as its last look took, before the next: however much there is to look
at, most of the processor's time is left, and what happens after a rest is looked at without delay."""
WRITE_TIMEOUT: Final = 4.0
"""Seconds a write may take: with lease.RENEW_DEADLINE less than lease.DURATION, so that a replica that
lost its lease has nothing under way when the next one begins."""
CONCURRENCY: Final = 8
"""Writes at a time."""
BACKOFF: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds after a failed round, one after another."""


class NoLongerLeader(Exception):
    """The lease was lost in the middle of a round."""


class Outdated(Exception):
    """A last look before deleting showed that there is nothing to delete."""


@dataclass(slots=True)
class Rounds(ABC):
    """What all loops have in common. `leads` tells whether this replica may act at this moment. An error, a
    bug included, ends a round and nothing else: each loop goes on, whatever becomes of the others."""

    idle_seconds: ClassVar[float] = 60.0
    """Between looks when nothing happens."""
    debounce_seconds: ClassVar[float] = DEBOUNCE

    metrics: Metrics
    leads: Callable[[], bool]
    _wake: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _rests_until: float = field(default=0.0, init=False)
    """On time.monotonic()'s clock."""

    @abstractmethod
    async def _round(self) -> bool | None:
        """One look and what follows from it. True: look again at once; None: something failed, try
        later."""

    @abstractmethod
    def _distrust(self) -> None:
        """What is known may be wrong: a round failed."""

    @property
    def pause(self) -> float:
        """Seconds until the next look if nothing happens."""
        return self.idle_seconds

    @property
    def debounce(self) -> float:
        """Seconds between being woken and the look."""
        return max(self.debounce_seconds, self._rests_until - time.monotonic())

    def _looked(self, started: float) -> float:
        """To be called after a look that began then (time.monotonic()); how many seconds it took."""
        now = time.monotonic()
        self._rests_until = now + SHARE * (now - started)
        return now - started

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """For ever."""
        failures = 0
        while True:
            pause = BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else self.pause
            try:
                async with asyncio.timeout(pause):
                    # After a failure only time helps: the change we wait for may never come.
                    await (asyncio.Event() if failures else self._wake).wait()
            except TimeoutError:
                pass
            await asyncio.sleep(self.debounce)
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
                self._distrust()
            except Exception:
                # A bug must not end the process: encryption goes on without us, but nodes could not join.
                failures += 1
                self.metrics.failures.inc()
                log.exception("reconciling failed")
                self._distrust()
            else:
                failures = failures + 1 if again is None else 0
                if again:
                    self._wake.set()

    async def _carry_out(
        self,
        actions: Sequence[A],
        apply: Callable[[A], Awaitable[None]],
        conflict: Callable[[A], None],
    ) -> bool | None:
        """The actions are independent of each other, so one that fails does not hold up the rest.
        `conflict` is told of those that somebody else's writes have overtaken."""
        slots = asyncio.Semaphore(CONCURRENCY)
        results = await asyncio.gather(
            *(self._act(action, apply, slots) for action in actions), return_exceptions=True
        )
        failed = False
        for action, result in zip(actions, results, strict=True):
            match result:
                case None:
                    pass
                case Outdated() | ApiError(status=404 | 409):
                    conflict(action)
                case ApiError() | UnusableSealingKey() | asyncio.CancelledError():
                    failed = True
                case BaseException():
                    raise result
        return None if failed else True

    async def _act(self, action: A, apply: Callable[[A], Awaitable[None]], slots: asyncio.Semaphore) -> None:
        async with slots:
            kind = type(action).__name__
            if not self.leads():
                raise NoLongerLeader("this replica is no longer the leader")
            try:
                async with asyncio.timeout(WRITE_TIMEOUT):
                    await apply(action)
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
