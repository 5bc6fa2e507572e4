"""Whether each pair of nodes works: from what peers' counters say, one look after the other, to who is asked
for a sign of life, who is dead, and what is done about it. Pure.

A keepalive is no sign to wait for: WireGuard puts its timer off with every packet, received ones too, so of
two ends often one alone sends. What a peer must answer, even while its agent is away, is data: at once by a
packet of its own, or by a keepalive after ten seconds (KEEPALIVE_TIMEOUT). So a peer that has been quiet is
sent one small packet through the tunnel. If no answer comes, WireGuard shakes hands anew after 15 seconds;
if that fails too, the pair is dead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from meshwire.api import conditions
from meshwire.api.fields import Address
from meshwire.api.meshnode import MAX_UNREACHABLE, Unreachable
from meshwire.encryption.model import (
    HANDSHAKE_LIFETIME,
    AddressFlags,
    Desired,
    Device,
    Endpoint,
    Observed,
    Peer,
)

INITIATION: Final = 148
"""Bytes of a handshake's first message. It counts as received and proves nothing: with another preshared key
at one end, first messages are good and no handshake ever succeeds."""
MAX_INITIATIONS: Final = 8
"""Between two looks."""
ANSWER: Final = 10.0
"""Seconds after which WireGuard answers data with a keepalive, where nothing else is sent."""
PATIENCE: Final = 18.0
"""Seconds without an answer until a pair is dead. WireGuard's own remedy, a handshake, comes after 15."""
QUIET: Final = 5.0, 25.0
"""Seconds without a packet until a peer is asked: up to FEW peers, and at most."""
FEW: Final = 50
ASK_AGAIN: Final = 4.0
"""Seconds between questions while there is no answer: one lost packet is no dead pair."""
QUESTIONS: Final = 3
"""That have to stay unanswered. An agent that was held up for a while asks again before it judges."""
SETTLED: Final = 60.0
"""Seconds dead before others are told, among more than FEW peers. All of them lose a node that dies, and
each hears of what each says: until then its Node is NotReady, which says it all."""
RETRIES: Final = (15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds from one repair to the next; the last goes on."""

RESET_AGAIN: Final = 600.0
"""Seconds until a device may be made anew once more."""

PairKey = tuple[str, str]
"""Device and public key: while keys change, a node is a peer of both devices."""


class State(StrEnum):
    NEW = "New"
    """Not heard of since this process began to listen."""
    HEALTHY = "Healthy"
    SUSPECT = "Suspect"
    """An answer is overdue."""
    DEAD = "Dead"


class Repair(StrEnum):
    ENDPOINT = "Endpoint"
    """The peer's endpoint is set to what the API says."""
    RENEW = "Renew"
    """The peer alone is removed and added again. Its redirect stays, so nothing goes another way."""
    DEVICE = "Device"
    """All of a device's peers are dead: it is deleted, and the loop makes it anew. Until then what is
    redirected into it is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A peer by which traffic goes. `live`: its Node is Ready."""

    device: Device
    peer: Peer
    live: bool

    @property
    def key(self) -> PairKey:
        return self.device.name, self.peer.public_key


@dataclass(frozen=True, slots=True)
class Reading:
    """What its device says of a peer. `handshake`: Unix time of the latest, 0: never; `received`: bytes."""

    received: int = 0
    handshake: float = 0.0
    endpoint: Endpoint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often a node looks and asks. Seconds."""

    quiet: float
    look: float
    settled: float

    @property
    def ask_again(self) -> float:
        return max(ASK_AGAIN, self.look)

    @property
    def detection(self) -> float:
        """From the last packet until the pair is known to be dead, at most, while looks are on time."""
        return self.quiet + max(PATIENCE, QUESTIONS * self.ask_again) + 3 * self.look


def pace(peers: int) -> Pace:
    """A node among few others looks every second; one among 250 or more every five."""
    low, high = QUIET
    quiet = min(high, max(low, low * peers / FEW))
    return Pace(quiet=quiet, look=quiet / 5, settled=SETTLED if peers > FEW else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What is remembered of a pair. Times are monotonic, in seconds, but for `since`: RFC 3339, when a dead
    one was heard last. `asked`: the first question without an answer."""

    node: str
    live: bool
    reading: Reading
    began: float
    heard: float | None = None
    asked: float | None = None
    asked_last: float = 0.0
    questions: int = 0
    dead: float | None = None
    since: float = 0.0
    reason: str = ""
    repairs: int = 0
    next_repair: float = 0.0

    def state(self, now: float, pace: Pace) -> State:
        if self.dead is not None:
            return State.DEAD
        if self.heard is None:
            return State.NEW
        if self.asked is not None and now - self.asked > ANSWER + 2 * pace.look:
            return State.SUSPECT
        return State.HEALTHY


Tracks = Mapping[PairKey, Track]


@dataclass(frozen=True, slots=True)
class Recovery:
    """`dead`: seconds from when the death was known."""

    node: str
    dead: float
    repairs: int


@dataclass(frozen=True, slots=True)
class Death:
    """`silent`: seconds from the last packet to the verdict."""

    node: str
    silent: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one look comes to. `lost`: a peer that should be there is gone from its device."""

    tracks: Tracks = field(default_factory=dict)
    ask: tuple[Pair, ...] = ()
    repair: tuple[tuple[Repair, Pair], ...] = ()
    died: tuple[Death, ...] = ()
    recovered: tuple[Recovery, ...] = ()
    lost: bool = False


def find_pairs(desired: Desired, observed: Observed) -> tuple[Pair, ...]:
    """The peers by which the datapath sends. One that it doesn't send by yet is nobody's trouble, and a node
    that moves from one device to the other is looked at by the one that its traffic takes."""
    nodes = {
        (device.name, peer.public_key): peer.node for device in desired.devices for peer in device.peers
    }
    numbers = {
        nodes.get((redirect.device, redirect.public_key), ""): number
        for number, redirect in desired.redirects.items()
    }
    taken = observed.datapath.nodes if observed.datapath else {}
    found = []
    for device in desired.devices:
        link = observed.links.get(device.name)
        for peer in device.peers:
            number = numbers.get(peer.node, 0)
            if link and taken.get(number) == link.index:
                found.append(Pair(device=device, peer=peer, live=number in desired.live_ids))
    return tuple(found)


def find_source(desired: Desired, version: int) -> Address | None:
    """This node's own address of IP version 4 or 6."""
    own = desired.settings.local_node if desired.settings else 0
    return next(
        (
            network.network_address
            for network, entry in desired.addresses.items()
            if entry.node == own and AddressFlags.HOST in entry.flags and network.version == version
        ),
        None,
    )


def judge(
    tracks: Tracks,
    pairs: Sequence[Pair],
    readings: Mapping[PairKey, Reading],
    *,
    now: float,
    wall: float,
    pace: Pace,
) -> Round:
    """`now` is monotonic, `wall` Unix time. Whoever carries it out tells `asked` and `repaired` what was
    done: who could not be asked owes no answer."""
    after: dict[PairKey, Track] = {}
    ask, repair, died, recovered, lost = [], [], [], [], False
    for pair in pairs:
        reading = readings.get(pair.key)
        lost |= reading is None
        before = tracks.get(pair.key)
        if before is None or before.node != pair.peer.node:
            if reading:
                after[pair.key] = Track(node=pair.peer.node, live=pair.live, reading=reading, began=now)
            continue
        # What could not be read says nothing, not even once it can be again.
        track = replace(before, live=pair.live, reading=reading or before.reading)
        if reading and says_something(before.reading, reading):
            if track.dead is not None:
                recovered.append(Recovery(track.node, now - track.dead, track.repairs))
            track = replace(track, heard=now, asked=None, questions=0, dead=None, repairs=0)
        elif track.dead is None and _has_waited(track, now):
            silent = now - (track.began if track.heard is None else track.heard)
            reason = _reason(track.reading, wall)
            track = replace(track, dead=now, since=wall - silent, reason=reason, next_repair=now)
            died.append(Death(track.node, silent, reason))
        if track.dead is not None and track.live and pair.peer.endpoint and now >= track.next_repair:
            misplaced = reading is not None and reading.endpoint != pair.peer.endpoint
            repair.append((Repair.ENDPOINT if misplaced and not track.repairs else Repair.RENEW, pair))
        quiet = now - (track.began if track.heard is None else track.heard) >= pace.quiet
        if quiet and pair.peer.endpoint and now - track.asked_last >= pace.ask_again:
            ask.append(pair)
        after[pair.key] = track
    return Round(
        tracks=after,
        ask=tuple(ask),
        repair=tuple(repair),
        died=tuple(died),
        recovered=tuple(recovered),
        lost=lost,
    )


def says_something(before: Reading, now: Reading) -> bool:
    """The peer has sent what only a working session can carry. A device or peer that was made anew counts
    from 0."""
    if now.handshake > before.handshake:
        return True
    grown = now.received - (before.received if now.received >= before.received else 0)
    # First messages come every five seconds at most; a busy peer's packets may come to any number.
    return grown > MAX_INITIATIONS * INITIATION or grown % INITIATION != 0


def _has_waited(track: Track, now: float) -> bool:
    return track.asked is not None and now - track.asked >= PATIENCE and track.questions >= QUESTIONS


def _reason(reading: Reading, wall: float) -> str:
    if reading.handshake == 0:
        return "NoHandshake"
    return "NoAnswer" if wall - reading.handshake < HANDSHAKE_LIFETIME else "SessionExpired"


def asked(tracks: Tracks, keys: Collection[PairKey], now: float) -> dict[PairKey, Track]:
    """After these have been sent a packet that they must answer."""
    return {
        key: replace(
            track,
            asked=now if track.asked is None else track.asked,
            asked_last=now,
            questions=track.questions + 1,
        )
        if key in keys
        else track
        for key, track in tracks.items()
    }


def repaired(tracks: Tracks, key: PairKey, now: float) -> dict[PairKey, Track]:
    """After an attempt, whatever came of it."""
    track = tracks[key]
    wait = RETRIES[min(track.repairs, len(RETRIES) - 1)]
    return {**tracks, key: replace(track, repairs=track.repairs + 1, next_repair=now + wait)}


def find_deaf(tracks: Tracks, resets: Mapping[str, float], now: float) -> tuple[str, ...]:
    """Devices that hear nothing from any of their peers, two or more, where renewing each that is live was
    in vain: it is the device then, or the node's network, and there is nothing that works to be disturbed.
    `resets`: when each was deleted for it last."""
    by_device: dict[str, list[Track]] = {}
    for (device, _), track in tracks.items():
        by_device.setdefault(device, []).append(track)
    return tuple(
        device
        for device, found in sorted(by_device.items())
        if len(found) > 1
        and any(track.live for track in found)
        and all(_is_hopeless(track, now) for track in found)
        and now - resets.get(device, -RESET_AGAIN) >= RESET_AGAIN
    )


def _is_hopeless(track: Track, now: float) -> bool:
    """Dead, and, if it is to be repaired at all, renewed and given time to answer since."""
    if track.dead is None:
        return False
    return not track.live or (track.repairs > 0 and now - track.dead >= RETRIES[0])


def find_unreachable(
    tracks: Tracks, told: Mapping[str, Unreachable], *, now: float, pace: Pace
) -> dict[str, Unreachable]:
    """By node: the dead, if live, that others should hear of. `told` is what they know: an agent that has
    just started takes nothing back before it has listened."""
    found = {}
    for track in tracks.values():
        known = told.get(track.node)
        if track.dead is not None:
            if track.live and (known or now - track.dead >= pace.settled):
                since = conditions.timestamp(datetime.fromtimestamp(track.since, UTC))
                found[track.node] = known or Unreachable(node=track.node, since=since, reason=track.reason)
        elif known and track.heard is None:
            found[track.node] = known
    return dict(sorted(found.items()))


def listed(unreachable: Mapping[str, Unreachable]) -> tuple[Unreachable, ...]:
    """As many as a status holds."""
    return tuple(unreachable.values())[:MAX_UNREACHABLE]


def count_states(tracks: Tracks, now: float, pace: Pace) -> dict[State, int]:
    counts = dict.fromkeys(State, 0)
    for track in tracks.values():
        counts[track.state(now, pace)] += 1
    return counts
