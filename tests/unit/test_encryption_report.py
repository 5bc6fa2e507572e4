"""What a node says of itself."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from meshwire.api import conditions
from meshwire.api.meshnode import Phase, Status
from meshwire.encryption.model import (
    Attachment,
    Datapath,
    Desired,
    Device,
    DeviceState,
    Direction,
    HeldKey,
    Link,
    Observed,
    Peer,
    PeerState,
    Problem,
    SecretKey,
    Settings,
    SettingsFlags,
)
from meshwire.encryption.report import Counts, is_urgent, report

NOW = 1_800_000_000.0
KEY, OTHER = (b64encode(bytes([n]) * 32).decode() for n in (1, 2))
NETWORK = ip_network("10.244.2.0/24")
GUARD = Attachment("eth0", Direction.EGRESS, "mw_to_netdev")


def wanted(phase: Phase, flags: SettingsFlags = SettingsFlags.NONE, **more: Any) -> Desired:
    fields: dict[str, Any] = {
        "epoch": 1,
        "settings": Settings(flags, 1, 1420),
        "devices": (
            Device(
                name="meshwire_wg1",
                epoch=1,
                key=HeldKey(1, KEY, SecretKey(bytes(32))),
                port=51872,
                mtu=1420,
                peers=(
                    Peer(
                        node="b",
                        public_key=OTHER,
                        endpoint=None,
                        allowed_ips=frozenset({NETWORK}),
                        keepalive=25,
                    ),
                ),
            ),
        ),
        "attachments": frozenset({GUARD}),
        "live_ids": frozenset({2}),
        **more,
    }
    return Desired(phase=phase, **fields)


def seen(
    flags: SettingsFlags = SettingsFlags.NONE, *, moved: bool = True, handshake: float = NOW, **more: Any
) -> Observed:
    peer = PeerState(public_key=OTHER, allowed_ips=frozenset({NETWORK}), handshake=handshake)
    fields: dict[str, Any] = {
        "links": {"meshwire_wg1": Link(index=9, name="meshwire_wg1", up=True)},
        "wireguard": {
            "meshwire_wg1": DeviceState(name="meshwire_wg1", public_key=KEY, port=51872, peers={OTHER: peer})
        },
        "datapath": Datapath({}, {2: 9} if moved else {}, Settings(flags, 1, 1420)),
        "attachments": frozenset({GUARD}),
        "now": NOW,
        **more,
    }
    return Observed(**fields)


def tell(
    desired: Desired | None,
    observed: Observed,
    *problems: Problem,
    previous: Status | None = None,
    drained: bool = False,
) -> Status:
    return report(
        desired,
        observed,
        previous=previous or Status(),
        generation=7,
        sealing_key=KEY,
        problems=problems,
        counts=Counts(leaked=3, dropped=4),
        version="1.2.3",
        drained=drained,
    )


STRICT = SettingsFlags.STRICT | SettingsFlags.ENFORCING
UNCOVERED = Problem("ClusterCIDRMissing", "set them")
WITHOUT_POD = (
    Device(
        name="meshwire_wg1",
        epoch=1,
        key=HeldKey(1, KEY, SecretKey(bytes(32))),
        port=51872,
        mtu=1420,
        peers=(
            Peer(
                node="b",
                public_key=OTHER,
                endpoint=None,
                allowed_ips=frozenset({NETWORK}),
                keepalive=25,
                pods=frozenset({b"\n\xf4\x02\x07"}),
            ),
        ),
    ),
)


@pytest.mark.parametrize(
    ("desired", "observed", "epochs", "strict", "reason"),
    [
        (wanted(Phase.ENABLING), seen(moved=False), (1, 0), False, "Preparing"),
        (wanted(Phase.ENABLING), seen(), (1, 1), False, "Ready"),
        (wanted(Phase.ENABLING, live_ids=frozenset()), seen(moved=False), (1, 1), False, "Ready"),
        (wanted(Phase.ENABLING), seen(wireguard={}), (0, 0), False, "Preparing"),
        (wanted(Phase.ENFORCING, STRICT), seen(), (1, 1), False, "Preparing"),
        (wanted(Phase.ENFORCING, STRICT), seen(STRICT), (1, 1), True, "Ready"),
        (wanted(Phase.ENFORCING, STRICT), seen(STRICT, moved=False), (1, 1), True, "Ready"),
        (wanted(Phase.ENFORCING, STRICT), seen(STRICT, attachments=frozenset()), (1, 1), False, "Preparing"),
        (
            wanted(Phase.ENFORCING, SettingsFlags.ENFORCING),
            seen(SettingsFlags.ENFORCING),
            (1, 1),
            False,
            "Ready",
        ),
        # The drop is in force, and yet there are packets that it can't know to be pods'.
        (
            wanted(Phase.ENFORCING, STRICT, problems=(UNCOVERED,)),
            seen(STRICT),
            (1, 1),
            False,
            "ClusterCIDRMissing",
        ),
        # While turning off it counts that nothing is dropped any more.
        (
            wanted(Phase.DISABLING, problems=(replace(UNCOVERED, blocking=False),)),
            seen(STRICT),
            (1, 1),
            True,
            "Ready",
        ),
        # A peer lacks one pod's address.
        (wanted(Phase.ENFORCING, STRICT, devices=WITHOUT_POD), seen(STRICT), (0, 0), True, "Preparing"),
        (wanted(Phase.DISABLING), seen(), (1, 1), False, "Ready"),
        (wanted(Phase.DRAINING), seen(), (1, 1), False, "Preparing"),
        (wanted(Phase.DRAINING), seen(moved=False), (1, 1), False, "Preparing"),
        (Desired(phase=Phase.OFF), seen(), (0, 0), False, "Off"),
        (None, seen(), (0, 0), False, "WaitingForOperator"),
    ],
)
def test_progress(
    desired: Desired | None, observed: Observed, epochs: tuple[int, int], strict: bool, reason: str
) -> None:
    status = tell(desired, observed)
    condition = conditions.find(status.conditions, conditions.READY)
    assert condition is not None
    assert (status.prepared_epoch, status.active_epoch) == epochs
    assert (status.strict, condition.reason) == (strict, reason)


def test_a_drained_node_says_so_once_it_sends_nothing_more_into_the_tunnel() -> None:
    status = tell(wanted(Phase.DRAINING), seen(moved=False), drained=True)
    condition = conditions.find(status.conditions, conditions.READY)
    assert condition is not None
    assert (status.active_epoch, condition.reason) == (0, "Ready")
    assert tell(wanted(Phase.DRAINING), seen(), drained=True).active_epoch == 1


def test_counters_and_the_rest() -> None:
    status = tell(wanted(Phase.ENFORCING, STRICT), seen(STRICT, handshake=NOW - 181))
    assert (status.peers, status.handshakes, status.leaked, status.dropped) == (1, 0, 3, 4)
    assert (status.observed_generation, status.sealing_key, status.agent_version) == (7, KEY, "1.2.3")


def test_a_blocking_problem_is_the_reason_and_every_message_is_told() -> None:
    status = tell(
        wanted(
            Phase.ENFORCING, STRICT, problems=(Problem("DuplicateKey", "b has c's key", blocking=False),)
        ),
        seen(STRICT),
        Problem("DatapathRefused", "the verifier says no"),
    )
    [condition] = status.conditions
    assert (condition.status, condition.reason) == (False, "DatapathRefused")
    assert condition.message == "the verifier says no; b has c's key"


def test_another_nodes_problem_does_not_make_this_one_unready() -> None:
    problem = Problem("DuplicateKey", "b has c's key", blocking=False)
    [condition] = tell(wanted(Phase.ENFORCING, STRICT, problems=(problem,)), seen(STRICT)).conditions
    assert (condition.status, condition.reason, condition.message) == (True, "Ready", "b has c's key")


def test_nothing_new_says_the_same_again() -> None:
    first = tell(wanted(Phase.ENFORCING, STRICT), seen(STRICT))
    later = tell(wanted(Phase.ENFORCING, STRICT), seen(STRICT, now=NOW + 100), previous=first)
    assert later == first


def test_counters_alone_are_not_urgent() -> None:
    status = tell(wanted(Phase.ENFORCING, STRICT), seen(STRICT))
    assert not is_urgent(status, replace(status, peers=9, handshakes=9, leaked=9, dropped=9))
    assert is_urgent(status, replace(status, strict=False))
