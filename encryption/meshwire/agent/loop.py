"""The one loop: any event only wakes it, and it makes the node what it should be."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from pyroute2 import NetlinkError

from meshwire.agent import state
from meshwire.agent.kernel import Kernel, Metrics
from meshwire.agent.settings import Settings
from meshwire.agent.userspace import CannotStart
from meshwire.agent.watch import World
from meshwire.api import names
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Phase, Status
from meshwire.bpf import loader, tc
from meshwire.bpf.layouts import Reason
from meshwire.encryption import keys, report
from meshwire.encryption.desired import Inputs, desired, judge_config
from meshwire.encryption.model import (
    DEVICES,
    Desired,
    HeldKey,
    Member,
    Observed,
    Problem,
    SecretKey,
    device_sysctls,
)
from meshwire.encryption.plan import Action, LoadDatapath, Plan, WriteSysctls, plan
from meshwire.kube.client import ApiError, Client

log = logging.getLogger("meshwire.agent")

RESYNC: Final = 30.0
"""Seconds between looks at the kernel when nothing has happened."""
HANDSHAKE_POLL: Final = 0.2
"""Seconds between looks while a peer waits for its first handshake, of which nobody tells us."""
SETTLE: Final = 0.02
"""Seconds that further events have to join one that has come."""
COUNTERS_EVERY: Final = 10.0
"""Seconds between status writes for counters alone."""
RETRIES: Final = (1.0, 2.0, 5.0, 10.0, 30.0)

_LEAKED: Final = (Reason.CLEAR_LEAKED, Reason.CLEAR_ARRIVED, Reason.DROP_CLEAR_ARRIVED)


@dataclass(slots=True)
class Health:
    """For the metrics page and the liveness probe."""

    runs: int = 0
    errors: int = 0
    last_run: float = 0.0
    seconds: float = 0.0
    desired: Desired | None = None
    observed: Observed | None = None
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """What should be, what is, and what to do about it. `config` is the MeshConfig in force."""

    config: MeshConfig
    desired: Desired | None
    observed: Observed
    todo: Plan
    problems: tuple[Problem, ...]


def observe_and_plan(
    kernel: Kernel,
    node: str,
    world: World,
    *,
    held: Mapping[int, HeldKey],
    last_good: MeshConfig | None,
) -> Look:
    """Changes nothing. Raises what observing raises."""
    mode = (last_good or MeshConfig()).encryption.userspace
    if isinstance(world.config, MeshConfig):
        mode = world.config.encryption.userspace
    observed = kernel.observe(mode, [path for device in DEVICES for path, _ in device_sysctls(device)])
    config, problem = judge_config(world.config, last_good, observed.links)
    wanted = desired(
        Inputs(
            node=node,
            members=world.members,
            nodes=world.nodes,
            config=config,
            held=held,
            links=observed.links,
            routes=observed.routes,
            implementation=observed.implementation,
            hold=problem is not None and not observed.pinned,
        )
    )
    return Look(
        config, wanted, observed, plan(wanted, observed) if wanted else (), (problem,) if problem else ()
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of the loop came to."""

    desired: Desired | None
    observed: Observed
    applied: Plan
    problems: tuple[Problem, ...]
    metrics: Metrics
    failed: bool


class Agent:
    """Everything one node's agent remembers. The kernel is touched in one thread of its own, so that it
    never holds up the API's watches."""

    def __init__(self, settings: Settings, kernel: Kernel, client: Client, sealing_key: SecretKey) -> None:
        self._settings = settings
        self._kernel = kernel
        self._client = client
        self._sealing_key = sealing_key
        self._sealing_public = keys.public_key(sealing_key)
        self._held = keys.read_held(settings.held_keys_file)
        self._config = state.read_config(settings.config_file)
        self._snapshot: Callable[[], World] | None = None
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kernel")
        self._written = 0.0
        self._published: Status | None = None
        self._failures = 0
        self.health = Health()

    def publish(self, snapshot: Callable[[], World]) -> None:
        """Called for every event from the API server."""
        self._snapshot = snapshot
        self._wake.set()

    def wake(self) -> None:
        """Called when something in the kernel has changed."""
        self._wake.set()

    async def run(self, version: str) -> None:
        """Until cancelled. Errors are logged, reported and tried again, never raised."""
        loop = asyncio.get_running_loop()
        timeout = RESYNC
        while True:
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
                await asyncio.sleep(SETTLE)
            except TimeoutError:
                pass
            self._wake.clear()
            self.health.last_run = time.monotonic()
            if self._snapshot is None:
                # Nothing is known yet, and what runs already goes on as it is.
                continue
            world = self._snapshot()
            own = world.members.get(self._settings.node)
            try:
                problems = await self._fetch_keys(own)
                outcome = await loop.run_in_executor(self._thread, self._converge, world, problems)
                self._note(outcome)
                late = await self._report(world, own, outcome, version)
                timeout = self._next(outcome, late)
            except (OSError, NetlinkError, aiohttp.ClientError, ApiError) as error:
                self.health.errors += 1
                log.warning("trying again: %s", describe(error))
                self._failures += 1
                timeout = RETRIES[min(self._failures, len(RETRIES)) - 1]

    def close(self) -> None:
        """The datapath stays in force."""
        self._thread.submit(self._kernel.close)
        self._thread.shutdown()

    def _note(self, outcome: Outcome) -> None:
        self._failures = self._failures + 1 if outcome.failed else 0
        self.health.runs += 1
        self.health.errors += outcome.failed
        self.health.seconds = time.monotonic() - self.health.last_run
        self.health.desired, self.health.observed = outcome.desired, outcome.observed
        self.health.metrics = outcome.metrics

    def _next(self, outcome: Outcome, late: float) -> float:
        """Seconds until the next look unless something happens."""
        if outcome.failed:
            return RETRIES[min(self._failures, len(RETRIES)) - 1]
        if outcome.desired and outcome.desired.phase is Phase.ENABLING:
            if report.unmoved(outcome.desired, outcome.observed):
                # On a node with thousands of peers a look takes longer: leave most of the time to others.
                return max(HANDSHAKE_POLL, 4 * self.health.seconds)
        return min(RESYNC, late)

    # Keys

    async def _fetch_keys(self, own: Member | None) -> tuple[Problem, ...]:
        """Fetches the keys that this node's MeshNode names and we don't hold. One that is refused is a
        problem, not an error: the others' traffic must not wait for it."""
        if own is None:
            return ()
        wanted = {key.epoch: key.public_key for key in own.spec.keys}
        held = {epoch: key for epoch, key in self._held.items() if wanted.get(epoch) == key.public_key}
        problems: list[Problem] = []
        if missing := sorted(wanted.keys() - held.keys()):
            path = f"/api/v1/namespaces/{self._settings.namespace}/secrets/{names.secret_name(own.name)}"
            try:
                secret = await self._client.find(path) or {}
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                return (Problem("WaitingForKey", f"can't read the key Secret: {describe(error)}"),)
            for epoch in missing:
                try:
                    held[epoch] = self._open(secret.get("data") or {}, own.name, epoch, wanted[epoch])
                except keys.KeyRefused as error:
                    problems.append(Problem("KeyRefused", str(error)))
        if held != self._held:
            keys.write_held(self._settings.held_keys_file, held)
            self._held = held
        return tuple(problems)

    def _open(self, data: dict[str, str], node: str, epoch: int, expected: str) -> HeldKey:
        sealed = data.get(f"epoch-{epoch}")
        if sealed is None:
            raise keys.KeyRefused(f"the key Secret has no key of epoch {epoch}")
        return keys.open_sealed(
            base64.b64decode(sealed), self._sealing_key, node=node, epoch=epoch, expected=expected
        )

    # The kernel; all of this runs in the kernel's thread.

    def _converge(self, world: World, problems: tuple[Problem, ...]) -> Outcome:
        """Observes, plans and applies until nothing differs, or something fails."""
        found = list(problems)
        applied: Plan = ()
        failed = False
        look = self._look(world, found)
        # Twice is what loading takes; a third time means that something else changes the same things.
        for _ in range(3):
            if not look.todo or failed:
                break
            done, error = self._apply(look.todo)
            applied += done
            if error:
                failed = True
                found.append(error)
            look = self._look(world, found)
        metrics = self._kernel.metrics()
        return Outcome(look.desired, look.observed, applied, tuple(dict.fromkeys(found)), metrics, failed)

    def _look(self, world: World, problems: list[Problem]) -> Look:
        look = observe_and_plan(
            self._kernel, self._settings.node, world, held=self._held, last_good=self._config
        )
        problems += look.problems
        if look.config is world.config and look.config != self._config:
            state.write_config(self._settings.config_file, world.config_spec)
            self._config = look.config
        return look

    def _apply(self, todo: Plan) -> tuple[Plan, Problem | None]:
        """The actions done, and what stopped them."""
        done: list[Action] = []
        for action in todo:
            log.info("%s", action)
            try:
                self._kernel.apply(action)
            except Exception as error:
                if isinstance(action, WriteSysctls):
                    # They are defaults on most nodes; a read-only /proc/sys must not keep a node in clear.
                    log.warning("%s: %s", action, describe(error))
                    continue
                log.warning("%s failed: %s", action, describe(error))
                return tuple(done), problem_of(error, str(action))
            done.append(action)
            if isinstance(action, LoadDatapath):
                # Only now is it known which of the filters in place already run the same programs.
                break
        return tuple(done), None

    # Status

    async def _report(self, world: World, own: Member | None, outcome: Outcome, version: str) -> float:
        """Writes the status if it is worth it; the answer is in how many seconds it will be, if nothing
        happens."""
        if own is None:
            return RESYNC
        current = self._published or world.status or Status()
        counts = report.Counts(
            leaked=sum(
                counter.packets for (reason, _), counter in outcome.metrics.items() if reason in _LEAKED
            ),
            dropped=sum(
                counter.packets for (reason, _), counter in outcome.metrics.items() if reason.dropped
            ),
        )
        status = report.report(
            outcome.desired,
            outcome.observed,
            previous=current,
            generation=own.generation,
            sealing_key=self._sealing_public,
            problems=outcome.problems,
            counts=counts,
            version=version,
        )
        if world.status is not None and self._published is not None and world.status != self._published:
            # Somebody else changed it, or our own write has not come back yet: then it is written once more,
            # which changes nothing.
            current = world.status
        if status == current:
            return RESYNC
        waited = time.monotonic() - self._written
        if not report.is_urgent(current, status) and waited < COUNTERS_EVERY:
            return COUNTERS_EVERY - waited
        path = f"/apis/{names.API_VERSION}/{names.MESHNODES}/{own.name}/status"
        await self._client.patch(path, {"status": status.to_dict()})
        self._published = status
        self._written = time.monotonic()
        return RESYNC


def problem_of(error: Exception, doing: str) -> Problem:
    """A failure as people read it in the Ready condition."""
    match error:
        case loader.Refused() | loader.IncompatibleMap():
            return Problem("DatapathRefused", str(error))
        case tc.Conflict():
            return Problem("FilterConflict", str(error))
        case CannotStart():
            return Problem("WireGuardUnavailable", str(error))
        case _:
            return Problem("ApplyFailed", f"{doing}: {describe(error)}")


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
