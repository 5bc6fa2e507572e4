"""The lab end to end on a kernel with a WireGuard of its own. Runs inside of the virtual machine: test_vm.py
names it to pytest, which by itself doesn't take it for a test. The tests build on each other, in this order:
bringing up a second cluster would take minutes here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab.test_policy import Town
from tests.policy_cases import CASES, TOWN, differences

from meshwire.api.names import device_name
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

pytestmark = pytest.mark.lab

ENDS = tuple(end for end in TOWN if end.name in ("x/a", "x/b", "y/b"))
"""Two on node1, one on node2."""
RULES = (
    "protocol-sctp-is-not-mistaken-for-tcp",
    "protocol-tcp-is-not-mistaken-for-sctp-on-egress",
    "deny-of-a-port-leaves-the-others",
)


@pytest.fixture(scope="module")
def exercise(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Exercise]:
    """Two nodes, a probe on each, encryption off."""
    lab = Lab(tmp_path_factory.mktemp("lab"), report=_say)
    try:
        lab.up(Settings(nodes=2))
        exercise = Exercise(lab)
        exercise.deploy()
        _say("the lab is up")
        yield exercise
    finally:
        if not lab.is_up or request.session.testsfailed:
            # The logs are gone with the machine.
            for path in sorted(lab.paths.logs.rglob("*.log")):
                print(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}")
        lab.down()


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


@contextmanager
def nothing_in_clear(directory: Path) -> Iterator[None]:
    """On the wire between the nodes, while the body runs; and something encrypted."""
    with Capture(directory / f"{time.monotonic_ns()}.pcap") as capture:
        yield
    report = capture.report
    assert report and report.is_complete, report
    assert report.clear == 0, report
    # Transport data; a handshake alone proves nothing.
    assert report.wireguard_by_type.get(4, 0) > 50, report


def devices(exercise: Exercise, node: str) -> list[str]:
    """Meshwire's WireGuard devices of the kernel."""
    links = exercise.lab.on_node(node, "ip", "-brief", "link", "show", "type", "wireguard").stdout
    return [line.split()[0] for line in links.splitlines() if line.startswith("meshwire_wg")]


def test_turned_on_under_traffic_nothing_is_lost_or_in_clear(exercise: Exercise, tmp_path: Path) -> None:
    with exercise.flows(udp_rate=10, tcp_rate=5_000, services=True) as flows:
        exercise.set_encryption(True)
        _say("encrypted")
        with nothing_in_clear(tmp_path):
            for node, targets in exercise.pairs():
                for target in targets:
                    assert exercise.run(node, "ping", "--count=3", target)["lost"] == 0
    assert not flows.broken


def test_status_says_so(exercise: Exercise) -> None:
    status = exercise.lab.kubectl("get", "meshstatus")
    print(status, exercise.lab.kubectl("get", "meshnodes"), sep="\n")
    assert status.splitlines()[1].split()[:4] == ["mesh", "WireGuard", "2/2", "1"]
    for node in exercise.lab.nodes:
        found = exercise.mesh_node(node)["status"]
        assert (found["implementation"], found["strict"], found["leaked"]) == ("Kernel", True, 0)
        assert devices(exercise, node) == ["meshwire_wg1"]


def test_a_deleted_device_comes_back_and_nothing_leaks_meanwhile(exercise: Exercise, tmp_path: Path) -> None:
    target = exercise.probe("node2").addresses[0]
    with exercise.flows(udp_rate=10, tcp_rate=5_000) as flows:
        with nothing_in_clear(tmp_path):
            exercise.lab.on_node("node1", "ip", "link", "delete", "meshwire_wg1")
            exercise.wait_until(lambda: bool(devices(exercise, "node1")), "the device is back")
            exercise.wait_until(
                lambda: bool(exercise.run("node1", "ask", target)["complete"]), "node1 reaches node2"
            )
            time.sleep(3)
    streams = [flow for flow in flows.ended if flow.kind == "tcp"]
    assert streams and all(flow.is_clean for flow in streams), flows.broken
    exercise.wait_for_phase("Enforcing")


def test_keys_change_and_nothing_is_lost_or_in_clear(exercise: Exercise, tmp_path: Path) -> None:
    """The WireGuard of the kernel: a device of each epoch, and one of them gone at the end."""
    before = exercise.mesh_status()["epoch"]
    exercise.set_encryption(True, keyRotation={"interval": "0s", "overlap": "5s"})
    with exercise.flows(udp_rate=20, tcp_rate=5_000) as flows, nothing_in_clear(tmp_path):
        exercise.rotate()
        _say("rotated")
    print(f"{flows.packets} packets, {flows.lost} lost")
    assert flows.packets > 200 and flows.lost == 0 and not flows.broken
    assert exercise.mesh_status()["epoch"] == before + 1
    for node in exercise.lab.nodes:
        assert devices(exercise, node) == [device_name(before + 1)]


def test_policies_hold_for_tcp_udp_sctp_and_icmp(exercise: Exercise) -> None:
    """In both families, on one node and between two, directly and by Services. The town stays until the lab
    goes: to take it down takes longer than the rest."""
    exercise.set_policy(True)
    town = Town(exercise, ENDS)
    assert "SCTP" in town.transports
    town.build()
    _say("the town is there")
    attempts = town.attempts(outside=False, by_service=True)
    chosen = [case for case in CASES if case.slug in RULES]
    assert len(chosen) == len(RULES)
    for case in chosen:
        for step in case.steps:
            town.change(step)
            wrong = town.compare(step.expect, attempts)
            assert not wrong, f"{case.name}:\n{differences(wrong)}"
        town.undo(case.steps)
        _say(f"holds: {case.name}")
    exercise.set_policy(False)


def test_turned_off_nothing_of_it_stays(exercise: Exercise) -> None:
    exercise.set_encryption(False)
    for node in exercise.lab.nodes:
        found = exercise.lab.on_node(
            node,
            *("sh", "-c", "tc filter show dev eth0 egress; tc filter show dev eth0 ingress; ls /sys/fs/bpf"),
        ).stdout
        assert "meshwire" not in found and "mw_" not in found, found
        assert devices(exercise, node) == []
    for node, targets in exercise.pairs():
        for target in targets:
            assert exercise.run(node, "ask", target)["complete"]
