"""Looks after the pairs of nodes: reads what comes from peers, asks those that are quiet, repairs the dead.
What to do is meshwire.encryption.health's to say."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from meshwire.api import names
from meshwire.api.meshnode import Status, Unreachable
from meshwire.encryption import health, plan
from meshwire.encryption.health import Pair, PairKey, Reading, Repair, State, Tracks
from meshwire.encryption.model import Desired, Observed
from meshwire.encryption.question import question
from meshwire.kube.events import Event

log = logging.getLogger("meshwire.agent")

MAX_NAMES: Final = 5
"""Nodes that an Event names before it only counts."""


class Kernel(Protocol):
    """What of meshwire.agent.kernel.Kernel is used."""

    def read_peers(self) -> dict[PairKey, Reading]: ...

    def ask(self, device: str, packet: bytes) -> None: ...

    def apply(self, action: plan.Action) -> None: ...


@dataclass(slots=True)
class Sample:
    """Seconds."""

    count: int = 0
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds


@dataclass(slots=True)
class Counts:
    """For the metrics page. `dead` are those that others are told of."""

    states: dict[State, int] = field(default_factory=lambda: dict.fromkeys(State, 0))
    dead: int = 0
    repairs: dict[Repair, int] = field(default_factory=lambda: dict.fromkeys(Repair, 0))
    detect: Sample = field(default_factory=Sample)
    repair: Sample = field(default_factory=Sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Of one look: who is not heard of any more, and who is again. `lost`: a peer is gone from its
    device."""

    dead: Mapping[str, Unreachable] = field(default_factory=dict)
    back: Mapping[str, Unreachable] = field(default_factory=dict)
    lost: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.dead or self.back)

    def events(self, node: str, uid: str) -> Iterator[Event]:
        """About the node's MeshNode: one for all that died, one for all that came back."""
        for nodes, reason, words in (
            (self.dead, "PairDead", "nothing comes any more from"),
            (self.back, "PairRecovered", "heard again, or not waited for any longer:"),
        ):
            if not nodes:
                continue
            shown = [f"{each.node} ({each.reason} since {each.since})" for each in nodes.values()]
            rest = f" and {len(shown) - MAX_NAMES} more" if len(shown) > MAX_NAMES else ""
            yield Event(
                kind="MeshNode",
                name=node,
                uid=uid,
                api_version=names.API_VERSION,
                reason=reason,
                action="WatchPairs",
                note=f"{words} {', '.join(shown[:MAX_NAMES])}{rest}",
                warning=reason == "PairDead",
            )


class Pairs:
    """What this process remembers of its peers. `look` is for the kernel's thread; `add_to` for the loop's,
    which sees the state after one look or after the next."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._tracks: Tracks = {}
        self._pairs: tuple[Pair, ...] = ()
        self._of: tuple[Desired, Observed] | None = None
        self._unreachable: Mapping[str, Unreachable] | None = None
        self._resets: dict[str, float] = {}
        self._complained = False
        self.pace = health.pace(0)
        self.counts = Counts()

    def look(self, desired: Desired, observed: Observed, told: tuple[Unreachable, ...]) -> News:
        """Reads, judges, asks and repairs once. `told`: what the node's status says of the pairs."""
        if self._of is None or desired is not self._of[0] or observed is not self._of[1]:
            self._of = desired, observed
            self._pairs = health.find_pairs(desired, observed)
            self.pace = health.pace(len(self._pairs))
        before = self._unreachable
        if before is None:
            before = {each.node: each for each in told}
        if not self._pairs and not self._tracks and not before:
            self._unreachable = {}
            return News()
        now = time.monotonic()
        found = health.judge(
            self._tracks,
            self._pairs,
            self._kernel.read_peers() if self._pairs else {},
            now=now,
            wall=time.time(),
            pace=self.pace,
        )
        for death in found.died:
            log.warning("%s: nothing for %.0f s, and no answer: %s", death.node, death.silent, death.reason)
            self.counts.detect.add(death.silent)
        for recovery in found.recovered:
            log.info(
                "%s answers again, after %.1f s and %d repairs",
                recovery.node,
                recovery.dead,
                recovery.repairs,
            )
            self.counts.repair.add(recovery.dead)
        deaf = health.find_deaf(found.tracks, self._resets, now)
        for device in deaf:
            self._apply(Repair.DEVICE, plan.DeleteDevice(device))
            self._resets[device] = now
        tracks = found.tracks
        for step, pair in found.repair:
            if pair.device.name not in deaf:
                self._repair(step, pair)
            tracks = health.repaired(tracks, pair.key, now)
        ask = [pair for pair in found.ask if pair.device.name not in deaf]
        # After repairs: a packet for a peer that was just renewed makes it shake hands.
        self._tracks = health.asked(tracks, self._ask(desired, ask), now)
        after = health.find_unreachable(self._tracks, before, now=now, pace=self.pace)
        self._unreachable = after
        self.counts.states = health.count_states(self._tracks, now, self.pace)
        self.counts.dead = len(after)
        return News(
            dead={node: each for node, each in after.items() if node not in before},
            back={node: each for node, each in before.items() if node not in after},
            lost=found.lost,
        )

    def add_to(self, status: Status) -> Status:
        """The status with what is known of the pairs; as it is before the first look."""
        if self._unreachable is None:
            return status
        return replace(
            status,
            unreachable=health.listed(self._unreachable),
            unreachable_count=len(self._unreachable),
        )

    def _repair(self, step: Repair, pair: Pair) -> None:
        make = plan.reset_endpoint if step is Repair.ENDPOINT else plan.renew_peer
        self._apply(step, make(pair.device, pair.peer))

    def _apply(self, step: Repair, action: plan.Action) -> None:
        log.info("repair (%s): %s", step, action)
        try:
            self._kernel.apply(action)
        except Exception as error:
            # The device may be gone; the loop sees to that.
            log.warning("%s failed: %s: %s", action, type(error).__name__, error)
        self.counts.repairs[step] += 1

    def _ask(self, desired: Desired, pairs: Sequence[Pair]) -> set[PairKey]:
        """Those who were."""
        done: set[PairKey] = set()
        if not pairs:
            return done
        sources = {version: health.find_source(desired, version) for version in (4, 6)}
        for pair in pairs:
            target = pair.peer.endpoint.address if pair.peer.endpoint else None
            source = sources[target.version] if target else None
            if target is None or source is None:
                continue
            try:
                self._kernel.ask(pair.device.name, question(source, target))
            except OSError as error:
                if not self._complained:
                    log.warning("can't ask peers for a sign of life: %s", error)
                    self._complained = True
                continue
            done.add(pair.key)
        return done
