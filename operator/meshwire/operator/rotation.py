"""When keys are changed, and how far such a change is: docs/architecture.md, Rotation. Pure.

A rotation is decided upon in MeshStatus before the first node is ordered to begin it, and remembered there
until the last one was ordered to end it, so that an operator may crash between any two writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from meshwire.api import conditions
from meshwire.api.meshconfig import MeshConfig
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import LastRotation, MeshStatus, Rotation
from meshwire.operator.phases import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What MeshStatus says of rotations. `in_force_since`: since when the keys are in force that a rotation
    has just left alone; empty otherwise."""

    rotation: Rotation | None
    last: LastRotation | None
    count: int
    handled: str
    in_force_since: str = ""


def is_decided(order: Order, status: MeshStatus) -> bool:
    """This order's keys are to be changed, by what the API server has of MeshStatus."""
    return (
        order.phase is Phase.ENFORCING
        and not order.retiring
        and status.rotation is not None
        and status.rotation.from_epoch == order.epoch
    )


def overlap_ends(order: Order, status: MeshStatus, config: MeshConfig | None) -> datetime | None:
    """When the old keys may go, if no node goes back; None while some node hasn't moved."""
    rotation = status.rotation
    if config is None or not order.retiring or rotation is None or rotation.from_epoch != order.retiring:
        return None
    return _time(rotation.moved_at) + config.encryption.key_rotation.overlap if rotation.moved_at else None


def falls_due(order: Order, status: MeshStatus, config: MeshConfig | None) -> datetime | None:
    """When the keys in force are old enough; None: never by themselves."""
    interval = config.encryption.key_rotation.interval if config else timedelta()
    if order.phase is not Phase.ENFORCING or order.retiring or not interval or not status.epoch_started_at:
        return None
    return _time(status.epoch_started_at) + interval


def follow(
    previous: MeshStatus,
    order: Order,
    *,
    config: MeshConfig | None,
    may_begin: bool,
    moved: bool,
    now: datetime,
    secret_lost: bool = False,
) -> Rotated:
    """What to say of rotations under `order`. `may_begin`: the order has reached all nodes, and some node
    is live. `moved`: all live nodes send by the new keys. `secret_lost`: no more keys of this epoch can be
    issued."""
    rotation, handled = previous.rotation, previous.handled_request
    result = Rotated(
        rotation=rotation, last=previous.last_rotation, count=previous.rotations, handled=handled
    )
    request = config.rotate if config else ""
    if order.retiring:
        if rotation is None or rotation.from_epoch != order.retiring:
            # Somebody deleted the MeshStatus.
            rotation = Rotation(from_epoch=order.retiring, started_at=conditions.timestamp(now))
        return replace(result, rotation=_with_moved(rotation, moved, now))
    if order.phase is Phase.ENABLING and previous.phase is Phase.OFF:
        # All keys are new: nobody who asked before can want newer ones.
        return replace(result, rotation=None, handled=request or handled)
    if order.phase is not Phase.ENFORCING:
        return replace(result, rotation=None)
    if rotation is not None and rotation.from_epoch == order.epoch:
        return result
    if rotation is not None:
        finished = LastRotation(
            epoch=order.epoch, started_at=rotation.started_at, finished_at=conditions.timestamp(now)
        )
        return replace(
            result,
            rotation=None,
            last=finished,
            count=previous.rotations + 1,
            in_force_since=rotation.moved_at or conditions.timestamp(now),
        )
    due = falls_due(order, previous, config)
    is_asked = bool(request) and request != handled
    if not may_begin or not (is_asked or secret_lost or (due is not None and now >= due)):
        return result
    begun = Rotation(
        from_epoch=order.epoch,
        started_at=conditions.timestamp(now),
        request=request if is_asked else "",
    )
    return replace(result, rotation=begun, handled=request if is_asked else handled)


def _with_moved(rotation: Rotation, moved: bool, now: datetime) -> Rotation:
    if not moved:
        return replace(rotation, moved_at="")
    # A time to come was written by a clock that is ahead of ours: the overlap begins anew.
    if rotation.moved_at and _time(rotation.moved_at) <= now + timedelta(seconds=1):
        return rotation
    # Whole seconds are written, and the overlap must not lose a part of one.
    return replace(rotation, moved_at=conditions.timestamp(now + timedelta(seconds=1)))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
