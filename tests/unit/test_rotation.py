"""When keys change, how that is asked for, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from meshwire.api.fields import InvalidSpec
from meshwire.api.meshconfig import Encryption, KeyRotation, MeshConfig
from meshwire.api.meshnode import Phase
from meshwire.api.meshstatus import LastRotation, MeshStatus, Rotation
from meshwire.cli.rotate import is_done
from meshwire.operator.phases import Order, given, next_epoch, order_for
from meshwire.operator.rotation import follow, overlap_ends

BEGAN = "2026-01-01T00:00:00Z"
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
FORCE = Order(Phase.ENFORCING, 1)
STATUS = MeshStatus(phase=Phase.ENFORCING, epoch=1, epoch_started_at=BEGAN)


def config(*, rotate: str = "", hours: int = 24) -> MeshConfig:
    rotation = KeyRotation(interval=timedelta(hours=hours), overlap=timedelta(minutes=1))
    return MeshConfig(rotate=rotate, encryption=Encryption(enabled=True, key_rotation=rotation))


def told(status: MeshStatus, order: Order, **more: object) -> MeshStatus:
    arguments = {"config": config(), "may_begin": True, "moved": False, "now": NOW, **more}
    found = follow(status, order, **arguments)  # type: ignore[arg-type]
    return replace(
        status,
        phase=order.phase,
        rotation=found.rotation,
        last_rotation=found.last,
        rotations=found.count,
        handled_request=found.handled,
        epoch_started_at=found.in_force_since or status.epoch_started_at,
    )


@pytest.mark.parametrize(
    ("written", "interval", "overlap"),
    [
        ({}, timedelta(days=1), timedelta(minutes=1)),
        ({"interval": "1h30m", "overlap": "90s"}, timedelta(minutes=90), timedelta(seconds=90)),
        ({"interval": "0s", "overlap": "2m"}, timedelta(), timedelta(minutes=2)),
    ],
)
def test_durations_are_read(written: dict[str, str], interval: timedelta, overlap: timedelta) -> None:
    spec = {"encryption": {"keyRotation": written}}
    found = MeshConfig.from_object({"metadata": {}, "spec": spec}).encryption.key_rotation
    assert found == KeyRotation(interval=interval, overlap=overlap)


@pytest.mark.parametrize(
    "written",
    [
        {"interval": "30s"},
        {"interval": "1d"},
        {"interval": ""},
        {"overlap": "4s"},
        {"interval": "2m", "overlap": "2m"},
        {"interval": 60},
    ],
)
def test_what_makes_no_sense_is_refused(written: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec, match="keyRotation"):
        MeshConfig.from_object({"metadata": {}, "spec": {"encryption": {"keyRotation": written}}})


def test_a_long_request_is_known_by_its_hash() -> None:
    def request(value: str) -> str:
        metadata = {"annotations": {"meshwire.dev/rotate": value}}
        return MeshConfig.from_object({"metadata": metadata, "spec": {}}).rotate

    assert request("now") == "now"
    assert len(request("x" * 1000)) == 64 and request("x" * 1000) != request("x" * 999 + "y")


@pytest.mark.parametrize(
    ("asked", "hours", "begins"), [("", 24, False), ("", 12, True), ("", 0, False), ("now", 0, True)]
)
def test_keys_change_when_it_is_time_or_asked_for(asked: str, hours: int, begins: bool) -> None:
    after = told(STATUS, FORCE, config=config(rotate=asked, hours=hours))
    assert (after.rotation is not None) is begins
    assert told(STATUS, FORCE, config=config(rotate=asked, hours=hours), may_begin=False).rotation is None


def test_a_request_is_carried_out_once() -> None:
    asked = config(rotate="now")
    decided = told(STATUS, FORCE, config=asked)
    assert decided.rotation == Rotation(from_epoch=1, started_at="2026-01-01T12:00:00Z", request="now")
    assert told(decided, FORCE, config=asked) == decided
    moved = told(decided, Order(Phase.ENFORCING, 2, 1), config=asked, moved=True)
    ended = told(moved, Order(Phase.ENFORCING, 2), config=asked, now=NOW + timedelta(minutes=2))
    assert ended.rotation is None and ended.rotations == 1
    assert ended.last_rotation == LastRotation(
        epoch=2, started_at="2026-01-01T12:00:00Z", finished_at="2026-01-01T12:02:00Z"
    )
    assert ended.epoch_started_at == "2026-01-01T12:00:01Z"
    assert told(ended, Order(Phase.ENFORCING, 2), config=asked).rotation is None
    again = told(ended, Order(Phase.ENFORCING, 2), config=config(rotate="again"))
    assert again.rotation and again.rotation.from_epoch == 2


def test_the_overlap_begins_anew_when_a_node_falls_behind() -> None:
    order = Order(Phase.ENFORCING, 2, 1)
    moved = told(replace(STATUS, rotation=Rotation(from_epoch=1, started_at=BEGAN)), order, moved=True)
    assert overlap_ends(order, moved, config()) == NOW + timedelta(seconds=61)
    behind = told(moved, order, moved=False)
    assert overlap_ends(order, behind, config()) is None
    later = NOW + timedelta(minutes=5)
    assert overlap_ends(order, told(behind, order, moved=True, now=later), config()) == later + timedelta(
        seconds=61
    )
    # Another replica's clock was an hour ahead.
    assert told(moved, order, moved=True, now=NOW - timedelta(hours=1)).rotation != moved.rotation


def test_turning_encryption_on_handles_what_was_asked_before() -> None:
    off = MeshStatus(phase=Phase.OFF)
    on = told(off, Order(Phase.ENABLING, 1), config=config(rotate="before"))
    assert on.handled_request == "before"
    assert told(on, FORCE, config=config(rotate="before")).rotation is None


def test_a_rotation_without_record_goes_on() -> None:
    """Somebody deleted the MeshStatus."""
    found = told(MeshStatus(), Order(Phase.ENFORCING, 3, 2)).rotation
    assert found and found.from_epoch == 2


def test_a_status_is_read_as_it_was_written() -> None:
    rotation = Rotation(from_epoch=1, started_at=BEGAN, moved_at=BEGAN, request="now")
    last = LastRotation(epoch=1, started_at=BEGAN, finished_at="2026-01-01T00:01:10Z")
    status = replace(STATUS, rotation=rotation, last_rotation=last, rotations=1, handled_request="now")
    assert last.seconds == 70
    assert MeshStatus.from_object({"metadata": {}, "status": status.to_dict()}) == status


def test_the_next_epoch_lives_on_the_other_device() -> None:
    assert [next_epoch(1, 1), next_epoch(1, 2), next_epoch(2, 4)] == [2, 4, 5]


def test_orders_spread_node_by_node() -> None:
    begun, ended = Order(Phase.ENFORCING, 2, 1), Order(Phase.ENFORCING, 2)
    off = Order(Phase.OFF, 0)
    assert given([FORCE, begun, FORCE], fallback=off) == begun
    assert given([begun, ended, begun], fallback=off) == ended
    assert order_for(FORCE, begun) == begun and order_for(begun, ended) == ended
    # Turned off before all nodes had heard of it.
    assert order_for(FORCE, Order(Phase.DISABLING, 2, 1)) == Order(Phase.DISABLING, 2, 1)
    # Away for several of them: never by way of plaintext.
    assert order_for(FORCE, Order(Phase.ENFORCING, 5, 4)) == Order(Phase.ENFORCING, 5, 4)


def test_waiting_ends_when_all_that_was_asked_for_is_done() -> None:
    asked = config(rotate="mine")
    rotation = Rotation(from_epoch=1, started_at=BEGAN)
    assert not is_done(STATUS, asked)
    assert not is_done(replace(STATUS, handled_request="mine", rotation=rotation), asked)
    assert is_done(replace(STATUS, handled_request="mine"), asked)
    assert is_done(replace(STATUS, phase=Phase.DISABLING), asked)
