"""The one loop: any event only wakes it, and it makes the node what it should be."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import aiohttp
from pyroute2.netlink.exceptions import NetlinkError

from meshwire.agent import state
from meshwire.agent.bootguard import BootGuard
from meshwire.agent.kernel import Kernel, Metrics, Part
from meshwire.agent.pairs import Counts as PairCounts
from meshwire.agent.pairs import Pairs
from meshwire.agent.policy.room import Fill
from meshwire.agent.settings import Settings
from meshwire.agent.userspace import CannotStart
from meshwire.agent.watch import World
from meshwire.api import conditions, names
from meshwire.api.meshconfig import BootGuard as BootGuardKind
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Key, Phase, Status
from meshwire.bpf import loader, tc
from meshwire.bpf.layouts import Reason
from meshwire.encryption import keys, report
from meshwire.encryption.bootguard import scope_of
from meshwire.encryption.desired import (
    WIREGUARD_UNAVAILABLE,
    Inputs,
    desired,
    judge_config,
    published_key,
)
from meshwire.encryption.model import (
    Desired,
    HeldKey,
    Member,
    Observed,
    Problem,
    SecretKey,
)
from meshwire.encryption.plan import Action, LoadDatapath, Plan, WriteSysctls, plan
from meshwire.kube import events
from meshwire.kube.client import ApiError, Client

log = logging.getLogger("meshwire.agent")

RESYNC: Final = 30.0
"""Seconds between looks at the kernel when nothing has happened."""
HANDSHAKE_POLL: Final = 0.2
"""Seconds between looks while a peer waits for its first handshake, of which nobody tells us."""
WIREGUARD_POLL: Final = 2.0
"""Seconds between looks for a WireGuard where there is none."""
DRAIN: Final = 5.0
"""Seconds between the last packet sent into a tunnel and the word that it is empty: a WireGuard outside the
kernel that gets little of a busy node's time still holds packets after two."""
SETTLE: Final = 0.02
"""Seconds that further events have to join one that has come."""
COUNTERS_EVERY: Final = 10.0
"""Seconds between status writes for counters alone."""
CONTROLLER: Final = f"{names.GROUP}/agent"
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
    pairs: PairCounts = field(default_factory=PairCounts)
    policy_metrics: Metrics = field(default_factory=dict)
    policy_maps: Mapping[str, Fill] = field(default_factory=dict)
    """By name."""
    policy_closed_pods: int = 0
    boot_guard: bool | None = None
    """In place; None: it isn't asked for."""


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
    fresh: Part = Part.ALL,
) -> Look:
    """Changes nothing. Raises what observing raises."""
    mode = (last_good or MeshConfig()).encryption.userspace
    if isinstance(world.config, MeshConfig):
        mode = world.config.encryption.userspace
    observed = kernel.observe(mode, fresh, (world.pods or {}).values())
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
            pods=world.pods,
            implementation=observed.implementation,
            config_refused=problem is not None,
            in_place=observed.pinned,
            told=world.status or Status(),
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
        self._source: Callable[[], World] | None = None
        self._guarded: Mapping[str, Member] = {}
        if not settings.pin_directory.exists():
            # A reboot: until the API server has answered, what was guarded before is guarded again.
            self._guarded = state.read_guard(settings.guard_file)
        self._boot_guard = BootGuard(settings)
        self._wake = asyncio.Event()
        self._stale = Part.ALL
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kernel")
        self._world: World | None = None
        self._outcome: Outcome | None = None
        self._own_uid = ""
        self._written = 0.0
        self._published: Status | None = None
        self._left: float | None = None
        self._moved: frozenset[int] = frozenset()
        self._failures = 0
        self._pairs = Pairs(kernel)
        self.health = Health(pairs=self._pairs.counts)

    def follow(self, source: Callable[[], World]) -> None:
        """Called for every event from the API server, with the way to ask what it has."""
        self._source = source
        self._wake.set()

    def wake(self) -> None:
        """Called when links, routes or filters have changed."""
        self._stale |= Part.NETWORK
        self._wake.set()

    async def run(self, version: str) -> None:
        """Until cancelled. Errors are logged, reported and tried again, never raised."""
        deadline = time.monotonic()
        resync = deadline
        while True:
            await self._sleep_until(deadline)
            now = time.monotonic()
            self.health.last_run = now
            if self._source is None and not self._guarded:
                # Nothing is known yet, and what runs already goes on as it is.
                deadline = now + RESYNC
                continue
            if now >= resync:
                self._stale, resync = Part.ALL, now + RESYNC
            world = self._source() if self._source else World(members=self._guarded, pods=None)
            stale = self._stale
            if now < deadline and not stale and world == self._world:
                continue
            self._stale = Part.NONE
            try:
                delay = await self._run_once(world, stale, version)
            except (OSError, NetlinkError, aiohttp.ClientError, ApiError) as error:
                self.health.errors += 1
                log.warning("trying again: %s", describe(error))
                delay = self._failed()
            self._world = world
            deadline = min(time.monotonic() + delay, resync)

    async def watch_pairs(self) -> None:
        """Until cancelled: sees whether peers are there, apart from the loop, which has more to look at."""
        while True:
            await asyncio.sleep(self._pairs.pace.look)
            outcome = self._outcome
            if outcome is None or outcome.desired is None or self._world is None:
                continue
            told = self._published or self._world.status or Status()
            try:
                news = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._pairs.look, outcome.desired, outcome.observed, told.unreachable
                )
            except (OSError, NetlinkError) as error:
                log.warning("can't look after the peers: %s", describe(error))
                continue
            if news.changed or news.lost:
                # The loop reports, and brings back a peer that somebody took away.
                self._stale |= Part.WIREGUARD
                self._wake.set()
            for happened in news.events(self._settings.node, self._own_uid):
                await self._publish(happened)

    async def _sleep_until(self, deadline: float) -> None:
        """Or until something happens."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._wake.wait()
                await asyncio.sleep(SETTLE)
        self._wake.clear()

    async def _run_once(self, world: World, stale: Part, version: str) -> float:
        """Seconds until the next run, unless something happens."""
        # What is known from before a reboot is nothing to fetch keys or to report by.
        own = world.members.get(self._settings.node) if self._source else None
        problems = await self._fetch_keys(own)
        outcome = await self._converge_in_thread(world, problems, stale)
        self.health.runs += 1
        self.health.seconds = time.monotonic() - self.health.last_run
        self.health.desired, self.health.observed = outcome.desired, outcome.observed
        self.health.metrics = outcome.metrics
        remaining = self._until_drained(outcome, world.status or Status())
        drained = remaining == 0
        delay = await self._report(world, own, outcome, version, drained=drained) if own else RESYNC
        if remaining:
            delay = min(delay, remaining)
        if outcome.failed:
            self.health.errors += 1
            return self._failed()
        self._failures = 0
        if is_waiting(outcome):
            self._stale |= Part.WIREGUARD
            # With thousands of peers a look takes longer: leave most of the time to others.
            delay = min(delay, max(HANDSHAKE_POLL, 4 * self.health.seconds))
        if outcome.desired and any(
            each.reason == WIREGUARD_UNAVAILABLE for each in outcome.desired.problems
        ):
            # Nobody tells us of a supervisor that starts, or of a module that was installed.
            delay = min(delay, WIREGUARD_POLL)
        return delay

    async def _converge_in_thread(self, world: World, problems: tuple[Problem, ...], stale: Part) -> Outcome:
        """Where the kernel can't be read, it is as it was last, and that is a problem. Raises what observing
        raises where it was never read."""
        try:
            self._outcome = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._converge, world, problems, stale
            )
        except (OSError, NetlinkError) as error:
            if self._outcome is None:
                raise
            log.warning("can't look at the node: %s", describe(error))
            problem = Problem("ObserveFailed", describe(error))
            return replace(self._outcome, applied=(), problems=(*problems, problem), failed=True)
        return self._outcome

    def _until_drained(self, outcome: Outcome, told: Status) -> float | None:
        """Seconds until the tunnels that were left can be taken for empty. None: they weren't left."""
        now = time.monotonic()
        if outcome.desired and outcome.desired.retiring and outcome.desired.phase is not Phase.DRAINING:
            moved = report.has_just_moved(outcome.desired, outcome.observed, told)
            if moved - self._moved:
                self._left = now
            self._moved = moved
            return max(0.0, self._left + DRAIN - now) if moved and self._left is not None else 0.0
        self._moved = frozenset()
        draining = outcome.desired is not None and outcome.desired.phase is Phase.DRAINING
        if not draining or outcome.failed or report.sends_encrypted(outcome.observed):
            self._left = None
            return None
        if self._left is None:
            self._left = now
        return max(0.0, self._left + DRAIN - now)

    def _failed(self) -> float:
        self._stale = Part.ALL
        self._failures += 1
        return RETRIES[min(self._failures, len(RETRIES)) - 1]

    def close(self) -> None:
        """The datapath stays in force."""
        self._thread.submit(self._kernel.close)
        self._thread.shutdown()

    # Keys

    async def _fetch_keys(self, own: Member | None) -> tuple[Problem, ...]:
        """Fetches the keys that this node's MeshNode names and we don't hold. One that is refused is a
        problem, not an error: the others' traffic must not wait for it."""
        if own is None:
            return ()
        wanted = {key.epoch: key for key in own.spec.keys}
        held = {epoch: key for epoch, key in self._held.items() if wanted.get(epoch) == published_key(key)}
        problems: list[Problem] = []
        if missing := sorted(wanted.keys() - held.keys()):
            path = f"/api/v1/namespaces/{self._settings.namespace}/secrets/{names.secret_name(own.name)}"
            try:
                secret = await self._client.find(path) or {}
            except (aiohttp.ClientError, TimeoutError, ApiError) as error:
                # Who holds another carries on with that one.
                return (Problem("WaitingForKey", f"can't read the key Secret: {describe(error)}", not held),)
            for epoch in missing:
                try:
                    held[epoch] = self._open(secret.get("data") or {}, own.name, wanted[epoch])
                except keys.KeyRefused as error:
                    problems.append(Problem("KeyRefused", str(error)))
        if held != self._held:
            keys.write_held(self._settings.held_keys_file, held)
            self._held = held
        return tuple(problems)

    def _open(self, data: dict[str, str], node: str, key: Key) -> HeldKey:
        """Raises KeyRefused; a key that should come with an epoch secret is none without."""

        def sealed(name: str, what: str) -> bytes:
            if (text := data.get(name)) is None:
                raise keys.KeyRefused(f"the key Secret has no {what} of epoch {key.epoch}")
            return base64.b64decode(text)

        private = sealed(names.secret_data_key(key.epoch), "key")
        held = keys.open_sealed(
            private, self._sealing_key, node=node, epoch=key.epoch, expected=key.public_key
        )
        if not key.secret_digest:
            return held
        shared = sealed(names.sealed_secret_data_key(key.epoch), "epoch secret")
        secret = keys.open_epoch_secret(
            shared, self._sealing_key, node=node, epoch=key.epoch, expected=key.secret_digest
        )
        return replace(held, epoch_secret=secret)

    # The kernel; all of this runs in the kernel's thread.

    def _converge(self, world: World, problems: tuple[Problem, ...], fresh: Part) -> Outcome:
        """Observes, plans and applies until nothing differs, or something fails."""
        found = list(problems)
        applied: Plan = ()
        failed = False
        look = self._look(world, found, fresh)
        self._boot_guard.find_missed(loaded=look.observed.boot_guard)
        # Twice is what loading takes; a third time means that something else changes the same things.
        for _ in range(3):
            if not look.todo or failed:
                break
            done, error = self._apply(look.todo)
            applied += done
            if error:
                failed = True
                found.append(error)
            look = self._look(world, found, Part.NONE)
        if self._source and look.desired and not failed:
            self._keep_guard(look.desired, world)
        if self._source and look.desired:
            self._keep_boot_guard(look.desired, look.config, again=fresh is Part.ALL, failed=failed)
        metrics = self._kernel.metrics()
        return Outcome(look.desired, look.observed, applied, tuple(dict.fromkeys(found)), metrics, failed)

    def _keep_guard(self, wanted: Desired, world: World) -> None:
        path = self._settings.guard_file
        if wanted.strict and world.members != self._guarded:
            state.write_guard(path, world.members.values())
            self._guarded = world.members
        elif not wanted.strict and path.exists():
            path.unlink()
            self._guarded = {}

    def _keep_boot_guard(self, wanted: Desired, config: MeshConfig, *, again: bool, failed: bool) -> None:
        is_asked = config.encryption.boot_guard is BootGuardKind.SYSTEMD
        scope = scope_of(wanted) if is_asked else None
        # It is there as soon as Strict is asked for, and no sooner gone than that has been carried out.
        if scope or not failed:
            self._boot_guard.keep(scope, again=again)
        kept = self._boot_guard.kept
        self.health.boot_guard = kept.in_place if kept else None

    def _look(self, world: World, problems: list[Problem], fresh: Part) -> Look:
        look = observe_and_plan(
            self._kernel,
            self._settings.node,
            world,
            held=self._held,
            last_good=self._config,
            fresh=fresh,
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

    async def _report(
        self, world: World, own: Member, outcome: Outcome, version: str, *, drained: bool
    ) -> float:
        """Writes the status if it is worth it; the answer is in how many seconds it will be."""
        if own.uid != self._own_uid:
            # Another MeshNode of this name knows nothing of what we told the old one.
            self._own_uid, self._published = own.uid, None
        before = self._published or world.status or Status()
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
            previous=before,
            generation=own.generation,
            sealing_key=self._sealing_public,
            problems=outcome.problems,
            counts=counts,
            version=version,
            drained=drained,
        )
        status = self._boot_guard.add_to(
            self._pairs.add_to(status), datetime.fromtimestamp(outcome.observed.now, UTC)
        )
        if status == before == world.status:
            return RESYNC
        # What differs from the API server's alone may be on its way back to us, or somebody else's doing.
        waited = time.monotonic() - self._written
        if not report.is_urgent(before, status) and waited < COUNTERS_EVERY:
            return COUNTERS_EVERY - waited
        path = f"/apis/{names.API_VERSION}/{names.MESHNODES}/{own.name}/status"
        await self._client.patch(path, {"status": status.to_dict()})
        self._published = status
        self._written = time.monotonic()
        await self._announce(own, before, status)
        return RESYNC

    async def _announce(self, own: Member, before: Status, after: Status) -> None:
        """An Event where the Ready condition's reason changed, for `kubectl describe meshnode`."""
        old, new = (conditions.find(each.conditions, conditions.READY) for each in (before, after))
        if new is None or (old and old.reason == new.reason):
            return
        happened = events.Event(
            kind="MeshNode",
            name=own.name,
            uid=own.uid,
            api_version=names.API_VERSION,
            reason=new.reason,
            action="Reconcile",
            note=new.message,
            warning=not new.status and new.reason != "Preparing",
        )
        await self._publish(happened)

    async def _publish(self, happened: events.Event) -> None:
        try:
            await events.publish(
                self._client,
                happened,
                controller=CONTROLLER,
                instance=happened.name,
                now=datetime.now(UTC),
            )
        except (aiohttp.ClientError, TimeoutError, ApiError) as error:
            log.warning("can't publish an event: %s", describe(error))


def is_waiting(outcome: Outcome) -> bool:
    """A live peer has yet to prove its first handshake, of which nobody tells us."""
    wanted = outcome.desired
    return wanted is not None and bool(report.waits_for(wanted, outcome.observed))


def problem_of(error: Exception, doing: str) -> Problem:
    """A failure as people read it in the Ready condition."""
    match error:
        case loader.Refused() | loader.IncompatibleMap():
            return Problem("DatapathRefused", str(error))
        case tc.Conflict():
            return Problem("FilterConflict", str(error))
        case CannotStart():
            return Problem(WIREGUARD_UNAVAILABLE, str(error))
        case _:
            return Problem("ApplyFailed", f"{doing}: {describe(error)}")


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
