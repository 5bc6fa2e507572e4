"""What a node says of itself in MeshNode.status, from what it should be and what it is. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from meshwire.api import conditions, names
from meshwire.api.meshnode import Phase, Revoked, Status
from meshwire.encryption.model import (
    HANDSHAKE_LIFETIME,
    Desired,
    Device,
    Observed,
    Problem,
    SettingsFlags,
)
from meshwire.encryption.plan import has_all

MAX_BEHIND: Final = 32
"""Nodes that a node which hasn't moved yet names as those it waits for; with more it names none."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Packets since the datapath was loaded."""

    leaked: int = 0
    dropped: int = 0


def report(
    desired: Desired | None,
    observed: Observed,
    *,
    previous: Status,
    generation: int,
    sealing_key: str,
    problems: Sequence[Problem],
    counts: Counts,
    version: str,
    drained: bool = False,
) -> Status:
    """The status to publish. `generation` is that of the spec which `desired` came from, `problems` what
    went wrong besides `desired.problems`; `previous` gives the condition's transition time. `drained`: what
    was sent into a tunnel before it was left has had its time to get out; while keys change, a node hasn't
    moved before."""
    status = replace(
        previous,
        observed_generation=generation,
        sealing_key=sealing_key,
        implementation=observed.implementation,
        leaked=counts.leaked,
        dropped=counts.dropped,
        agent_version=version,
    )
    everything = [*problems, *(desired.problems if desired else ())]
    if desired is None:
        everything.append(
            Problem("WaitingForOperator", "the operator has not given this node a number and a phase")
        )
        return _with_condition(status, False, everything, "", "", observed)

    prepared = {device.epoch for device in desired.devices if is_prepared(device, observed)}
    active = _active_epoch(desired, observed, prepared, drained)
    behind = sorted(left_behind(desired, observed))
    handshakes = _handshakes(desired, observed)
    status = replace(
        status,
        prepared_epoch=max(prepared & {desired.epoch, desired.retiring}, default=0),
        active_epoch=active,
        # Who has moved but for a few dead nodes names them: nobody must be left behind. Every node hears of
        # it, so who has just begun doesn't count them all.
        unreached=tuple(behind) if active == desired.epoch or len(behind) <= MAX_BEHIND else (),
        revoked=_revoked(desired, observed),
        strict=_is_strict(desired, observed),
        peers=len(handshakes),
        handshakes=sum(observed.now - latest < HANDSHAKE_LIFETIME for latest in handshakes.values()),
    )
    done, reason, message = _progress(desired, observed, status)
    return _with_condition(status, done, everything, reason, message, observed)


def _revoked(desired: Desired, observed: Observed) -> tuple[Revoked, ...]:
    """Nodes that this one has let go of: no device has a peer that it shouldn't have, and nothing is sent
    there."""
    wanted = {device.name: {peer.public_key for peer in device.peers} for device in desired.devices}
    if any(not state.peers.keys() <= wanted.get(name, set()) for name, state in observed.wireguard.items()):
        return ()
    nodes = observed.datapath.nodes if observed.datapath else {}
    return tuple(
        Revoked(number, revocation)
        for number, revocation in sorted(desired.revocations.items())
        if number not in nodes
    )


def is_prepared(device: Device, observed: Observed) -> bool:
    """The device is up with its key, port and peers, and their preshared keys."""
    link, state = observed.links.get(device.name), observed.wireguard.get(device.name)
    if link is None or not link.up or state is None:
        return False
    return (
        state.public_key == device.key.public_key
        and state.port == device.port
        and all(
            peer.public_key in state.peers
            and has_all(peer, state.peers[peer.public_key])
            and peer.preshared_key == state.peers[peer.public_key].preshared_key
            for peer in device.peers
        )
    )


def unmoved(desired: Desired, observed: Observed) -> frozenset[int]:
    """Numbers of live nodes that are not reached through the epoch's device yet."""
    link = observed.links.get(names.device_name(desired.epoch))
    nodes = observed.datapath.nodes if observed.datapath else {}
    return frozenset(
        number for number in desired.live_ids if link is None or nodes.get(number) != link.index
    )


def left_behind(desired: Desired, observed: Observed) -> frozenset[int]:
    """Of a rotation: numbers of peers, live or not, that are not sent to by the new epoch."""
    if not desired.retiring:
        return frozenset()
    link = observed.links.get(names.device_name(desired.epoch))
    nodes = observed.datapath.nodes if observed.datapath else {}
    return frozenset(
        number for number in desired.redirects if link is None or nodes.get(number) != link.index
    )


def has_just_moved(desired: Desired, observed: Observed, told: Status) -> frozenset[int]:
    """Of a rotation: numbers of nodes that are sent to by the new epoch, and of which that was not told
    yet."""
    if not desired.retiring:
        return frozenset()
    moved = frozenset(desired.redirects) - left_behind(desired, observed)
    return moved & frozenset(told.unreached) if told.active_epoch == desired.epoch else moved


def waits_for(desired: Desired, observed: Observed) -> frozenset[int]:
    """Numbers of live nodes whose first handshake would change what is sent to them."""
    match desired.phase:
        case Phase.ENABLING:
            return unmoved(desired, observed)
        case Phase.ENFORCING | Phase.DISABLING:
            return left_behind(desired, observed) & desired.live_ids
        case _:
            return frozenset()


def sends_encrypted(observed: Observed) -> bool:
    """To at least one node."""
    return bool(observed.datapath and observed.datapath.nodes)


def _handshakes(desired: Desired, observed: Observed) -> dict[str, float]:
    """The latest one with each peer; of a rotation each node counts once."""
    nodes = {peer.public_key: peer.node for device in desired.devices for peer in device.peers}
    found: dict[str, float] = {}
    for epoch in {desired.epoch, desired.retiring} - {0}:
        state = observed.wireguard.get(names.device_name(epoch))
        for key, peer in state.peers.items() if state else ():
            node = nodes.get(key, key)
            found[node] = max(found.get(node, 0.0), peer.handshake)
    return found


def _active_epoch(desired: Desired, observed: Observed, prepared: Collection[int], drained: bool) -> int:
    match desired.phase:
        case Phase.ENABLING:
            return desired.epoch if desired.epoch in prepared and not unmoved(desired, observed) else 0
        case Phase.ENFORCING | Phase.DISABLING:
            empty = not desired.retiring or drained or desired.retiring not in prepared
            if desired.epoch in prepared and empty and not left_behind(desired, observed) & desired.live_ids:
                # Nothing leaves by another way: who is not reached through the epoch is not reached.
                return desired.epoch
            return desired.retiring if desired.retiring in prepared else 0
        case Phase.DRAINING:
            return 0 if drained and not sends_encrypted(observed) else desired.epoch
        case Phase.OFF:
            return 0


def _is_strict(desired: Desired, observed: Observed) -> bool:
    settings = observed.datapath.settings if observed.datapath else None
    if desired.phase is Phase.ENFORCING and any(
        problem.reason == names.CLUSTER_CIDR_MISSING for problem in desired.problems
    ):
        # The drop is in force, and there are packets that it can't know to be pods'.
        return False
    return (
        settings is not None
        and SettingsFlags.STRICT in settings.flags
        and desired.attachments <= observed.attachments
    )


def _progress(desired: Desired, observed: Observed, status: Status) -> tuple[bool, str, str]:
    """(order carried out, reason, message)."""
    if desired.phase is Phase.OFF:
        return True, "Off", "encryption is off"
    if desired.phase is Phase.DRAINING:
        if status.active_epoch:
            return False, "Preparing", "leaving the tunnels"
        return True, "Ready", "traffic is in clear; the devices still receive"
    if not status.prepared_epoch:
        return False, "Preparing", f"setting up epoch {desired.epoch}"
    if desired.phase is Phase.ENABLING and status.active_epoch == 0:
        waiting = len(unmoved(desired, observed))
        return (
            False,
            "Preparing",
            f"waiting for the first handshake with {waiting} of {len(desired.live_ids)} nodes",
        )
    if desired.strict and not status.strict:
        return False, "Preparing", "the drop is not in force yet"
    if desired.retiring and status.active_epoch != desired.epoch:
        return True, "Ready", f"epoch {desired.epoch} takes over from {desired.retiring}, node by node"
    return True, "Ready", f"epoch {desired.epoch} carries all traffic to other nodes' pods"


def _with_condition(
    status: Status, done: bool, problems: Sequence[Problem], reason: str, message: str, observed: Observed
) -> Status:
    blocking = [problem for problem in problems if problem.blocking]
    messages = [problem.message for problem in (*blocking, *(p for p in problems if not p.blocking))]
    ready = done and not blocking
    return replace(
        status,
        conditions=conditions.set_condition(
            status.conditions,
            type=conditions.READY,
            status=ready,
            reason=blocking[0].reason if blocking else reason,
            message="; ".join(dict.fromkeys([*messages] or [message])),
            observed_generation=status.observed_generation,
            now=datetime.fromtimestamp(observed.now, UTC),
        ),
    )


def is_urgent(old: Status, new: Status) -> bool:
    """Whether others wait for what changed. Counters may be late: every node hears of every write."""
    counters_as_before = replace(
        new,
        peers=old.peers,
        handshakes=old.handshakes,
        leaked=old.leaked,
        dropped=old.dropped,
        unreached=old.unreached,
        # That a node is let go of is waited for; that it may come back isn't.
        revoked=new.revoked if set(new.revoked) - set(old.revoked) else old.revoked,
    )
    return counters_as_before != old
