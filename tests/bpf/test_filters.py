"""Attaching beside other people's filters, on a veth in a namespace of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import IPRoute, NetlinkError

from meshwire.bpf import loader, tc
from meshwire.bpf.layouts import Direction
from meshwire.bpf.loader import Program, Programs

pytestmark = [pytest.mark.bpf, pytest.mark.netns]

PARENTS = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}
ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800

directions = pytest.mark.parametrize("direction", Direction, ids=["egress", "ingress"])


@dataclass(frozen=True)
class Device:
    ipr: IPRoute
    index: int

    def add_foreign(self, program: Program, direction: Direction, *, handle: int, priority: int = 1) -> None:
        """A filter such as another agent adds."""
        self.ipr.tc(
            "add-filter",
            "bpf",
            self.index,
            handle,
            parent=PARENTS[direction],
            prio=priority,
            protocol=ETH_P_ALL,
            fd=program.fd,
            name="their_filter",
            direct_action=True,
        )

    def filters(self, direction: Direction) -> list[tuple[str, int, int]]:
        """Everybody's, as (name, priority, handle) in the order they run."""
        return [
            (
                message.get_attr("TCA_OPTIONS").get_attr("TCA_BPF_NAME"),
                message["info"] >> 16,
                message["handle"],
            )
            for message in self.ipr.get_filters(index=self.index, parent=PARENTS[direction])
            if message["handle"]
        ]

    def qdiscs(self) -> set[str]:
        return {each.get_attr("TCA_KIND") for each in self.ipr.get_qdiscs(index=self.index)}


@pytest.fixture
def device(namespaces: Callable[[str], str]) -> Iterator[Device]:
    with IPRoute(netns=namespaces("tc")) as ipr:
        ipr.link("add", ifname="one", kind="veth", peer="two")
        yield Device(ipr, ipr.link_lookup(ifname="one")[0])


@pytest.fixture
def program(programs: Programs) -> Program:
    return programs.get(loader.TO_NETDEV)


@pytest.fixture
def newer(programs: Programs) -> Program:
    return programs.get(loader.TO_NETDEV_L3)


@directions
def test_a_bare_device_gets_the_filter(device: Device, program: Program, direction: Direction) -> None:
    assert tc.find_filters(device.ipr, device.index) == []
    tc.attach(device.ipr, device.index, direction, program)
    assert tc.find_filters(device.ipr, device.index) == [
        tc.Filter(device.index, direction, loader.TO_NETDEV, program.id, tc.PRIORITY, tc.HANDLE)
    ]


def test_both_directions_are_apart(device: Device, program: Program, newer: Program) -> None:
    tc.attach(device.ipr, device.index, Direction.EGRESS, program)
    tc.attach(device.ipr, device.index, Direction.INGRESS, newer)
    egress, ingress = tc.find_filters(device.ipr, device.index)
    assert (egress.direction, egress.program_id) == (Direction.EGRESS, program.id)
    assert (ingress.direction, ingress.program_id) == (Direction.INGRESS, newer.id)
    tc.detach(device.ipr, egress)
    assert tc.find_filters(device.ipr, device.index) == [ingress]


@directions
def test_a_newer_program_takes_the_place_of_the_older(
    device: Device, program: Program, newer: Program, direction: Direction
) -> None:
    tc.attach(device.ipr, device.index, direction, program)
    tc.attach(device.ipr, device.index, direction, newer)
    assert device.filters(direction) == [(newer.name, tc.PRIORITY, tc.HANDLE)]
    assert tc.find_filters(device.ipr, device.index)[0].program_id == newer.id


@directions
def test_other_peoples_filters_survive_everything(
    device: Device, program: Program, newer: Program, direction: Direction
) -> None:
    device.ipr.tc("add", "clsact", device.index)
    device.add_foreign(newer, direction, handle=1)
    device.add_foreign(newer, direction, handle=tc.HANDLE)
    device.add_foreign(newer, direction, handle=9, priority=2)
    theirs = device.filters(direction)

    tc.attach(device.ipr, device.index, direction, program)
    ours = tc.find_filters(device.ipr, device.index)
    assert [each.name for each in ours] == [program.name]
    assert device.filters(direction) == [(program.name, 1, ours[0].handle), *theirs]

    tc.attach(device.ipr, device.index, direction, newer)
    assert device.filters(direction) == [(newer.name, 1, ours[0].handle), *theirs]

    tc.detach(device.ipr, ours[0])
    assert device.filters(direction) == theirs
    assert "clsact" in device.qdiscs()


@directions
def test_a_filter_that_others_came_before_comes_first_again(
    device: Device, program: Program, direction: Direction
) -> None:
    tc.attach(device.ipr, device.index, direction, program)
    device.add_foreign(program, direction, handle=1)
    (behind,) = tc.find_filters(device.ipr, device.index)
    assert not behind.first

    tc.attach(device.ipr, device.index, direction, program)
    (again,) = tc.find_filters(device.ipr, device.index)
    assert again.first
    assert device.filters(direction) == [(program.name, 1, again.handle), ("their_filter", 1, 1)]


def test_leftovers_of_ours_go(device: Device, program: Program, newer: Program) -> None:
    device.ipr.tc("add", "clsact", device.index)
    for handle, priority in ((5, 1), (6, 1), (7, 3)):
        device.ipr.tc(
            "add-filter",
            "bpf",
            device.index,
            handle,
            parent=PARENTS[Direction.EGRESS],
            prio=priority,
            protocol=ETH_P_ALL,
            fd=newer.fd,
            name="mw_of_old",
            direct_action=True,
        )
    tc.attach(device.ipr, device.index, Direction.EGRESS, program)
    assert [name for name, _, _ in device.filters(Direction.EGRESS)] == [program.name]


def test_an_empty_clsact_stays_for_whoever_made_it(device: Device, program: Program) -> None:
    device.ipr.tc("add", "clsact", device.index)
    tc.attach(device.ipr, device.index, Direction.EGRESS, program)
    for each in tc.find_filters(device.ipr, device.index):
        tc.detach(device.ipr, each)
    assert device.filters(Direction.EGRESS) == []
    assert "clsact" in device.qdiscs()


def test_detaching_twice_or_from_a_device_that_is_gone_is_no_error(device: Device, program: Program) -> None:
    tc.attach(device.ipr, device.index, Direction.EGRESS, program)
    (ours,) = tc.find_filters(device.ipr, device.index)
    tc.detach(device.ipr, ours)
    tc.detach(device.ipr, ours)
    device.ipr.tc("del", "clsact", device.index)
    tc.detach(device.ipr, ours)
    device.ipr.link("del", index=device.index)
    tc.detach(device.ipr, ours)
    assert tc.find_filters(device.ipr, device.index) == []


def test_a_device_that_is_gone_takes_no_filter(device: Device, program: Program) -> None:
    with pytest.raises(NetlinkError, match="No such device"):
        tc.attach(device.ipr, 4711, Direction.EGRESS, program)


def test_a_filter_of_another_kind_in_the_way_is_a_conflict(device: Device, program: Program) -> None:
    device.ipr.tc("add", "clsact", device.index)
    device.ipr.tc(
        "add-filter",
        "u32",
        device.index,
        parent=PARENTS[Direction.EGRESS],
        prio=1,
        protocol=ETH_P_IP,
        keys=["0x0/0x0+0"],
        target=0x10001,
    )
    with pytest.raises(tc.Conflict, match=f"device {device.index} takes no egress filter"):
        tc.attach(device.ipr, device.index, Direction.EGRESS, program)
    tc.attach(device.ipr, device.index, Direction.INGRESS, program)


@directions
def test_an_ingress_qdisc_is_a_conflict(device: Device, program: Program, direction: Direction) -> None:
    device.ipr.tc("add", "ingress", device.index)
    with pytest.raises(tc.Conflict, match="ingress qdisc"):
        tc.attach(device.ipr, device.index, direction, program)
    assert "ingress" in device.qdiscs()
    assert device.filters(Direction.INGRESS) == []


@pytest.fixture
def policy(policy_programs: Programs) -> Program:
    return policy_programs.get(loader.POLICY_OUT)


@pytest.mark.parametrize("encrypting_first", [True, False], ids=["encryption first", "policy first"])
@directions
def test_policy_runs_behind_encryption(
    device: Device, program: Program, policy: Program, direction: Direction, encrypting_first: bool
) -> None:
    def encrypt() -> None:
        tc.attach(device.ipr, device.index, direction, program)

    if encrypting_first:
        encrypt()
    for _ in range(2):
        tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_OUT)
        encrypt()
        assert device.filters(direction) == [
            (program.name, tc.PRIORITY, tc.HANDLE),
            (policy.name, tc.POLICY_OUT.priority, tc.POLICY_HANDLE),
        ]
    (encrypting,) = tc.find_filters(device.ipr, device.index)
    (ours,) = tc.find_filters(device.ipr, device.index, tc.POLICY_OUT)
    assert (encrypting.name, encrypting.first) == (program.name, True)
    assert (ours.name, ours.first) == (policy.name, True)

    tc.detach(device.ipr, encrypting)
    assert tc.find_filters(device.ipr, device.index, tc.POLICY_OUT) == [ours]
    tc.detach(device.ipr, ours)
    assert device.filters(direction) == []


@directions
def test_policy_comes_first_of_its_priority_again(
    device: Device, program: Program, policy: Program, direction: Direction
) -> None:
    tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_OUT)
    device.add_foreign(program, direction, handle=1, priority=2)
    (behind,) = tc.find_filters(device.ipr, device.index, tc.POLICY_OUT)
    assert not behind.first
    tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_OUT)
    (again,) = tc.find_filters(device.ipr, device.index, tc.POLICY_OUT)
    assert again.first
    assert device.filters(direction) == [(policy.name, 2, again.handle), ("their_filter", 2, 1)]


@directions
def test_a_pods_policy_comes_before_everybody_elses(
    device: Device, program: Program, policy: Program, direction: Direction
) -> None:
    device.ipr.tc("add", "clsact", device.index)
    device.add_foreign(program, direction, handle=1)
    tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_POD)
    assert device.filters(direction) == [(policy.name, 1, tc.POLICY_HANDLE), ("their_filter", 1, 1)]
    # A device that was an uplink once.
    tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_OUT)
    tc.attach(device.ipr, device.index, direction, policy, tc.POLICY_POD)
    assert [name for name, _, _ in device.filters(direction)] == [policy.name, "their_filter"]
