"""A node boots, and its pods send to all others from their first breath, before its agent is there."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.watch import EAGER, eager

from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import PodRecord
from meshwire.lab.model import LabError

BOOTS = "node3"
UNTOUCHED = ("node1", "node2")
SECONDS = 4.0
"""That the agent is away for."""
TABLE = ("inet", "meshwire_boot")


@pytest.fixture
def guarded(exercise: Exercise) -> Iterator[Exercise]:
    exercise.set_encryption(True, bootGuard="Systemd")
    exercise.wait_until(lambda: all(in_place(exercise, node) for node in exercise.lab.nodes), "it is kept")
    yield exercise
    if not exercise.lab.pid(f"{BOOTS}.agent"):
        exercise.lab.start_agent(BOOTS)
    # What the others have counted goes with their programs.
    exercise.set_encryption(False)
    exercise.wait_for_probes()
    exercise.wait_until(lambda: not exercise.leftovers(), "nothing is left over")


def in_place(exercise: Exercise, node: str) -> bool:
    found = exercise.mesh_node(node)["status"]["conditions"]
    return any((each["type"], each["status"]) == ("BootGuard", "True") for each in found)


def table(exercise: Exercise) -> str:
    """What nft shows of the guard in force; empty where there is none."""
    return exercise.lab.on_node(BOOTS, "nft", "list", "table", *TABLE, check=False).stdout


def held(exercise: Exercise) -> list[int]:
    """Packets, by family."""
    return [int(count) for count in re.findall(r"counter packets (\d+)", table(exercise))]


def find_eager(exercise: Exercise) -> PodRecord | None:
    """The eager pod of the node that boots, where that and the probe run."""
    with contextlib.suppress(LabError, ValueError):
        exercise.probe(BOOTS)
        for path in exercise.lab.paths.pods(BOOTS).glob(f"default_{EAGER}-*.json"):
            return exercise.lab.find_pod(path.stem.partition("_")[2])
    return None


def wait_for_pods(exercise: Exercise) -> PodRecord:
    exercise.wait_until(lambda: find_eager(exercise) is not None, f"the pods of {BOOTS} run")
    found = find_eager(exercise)
    assert found
    return found


def reaches(exercise: Exercise) -> bool:
    return all(
        exercise.run(one, "ask", address)["complete"]
        for one, other in ((BOOTS, "node1"), ("node1", BOOTS))
        for address in exercise.probe(other).addresses
    )


def leaked(exercise: Exercise) -> int:
    return sum(exercise.mesh_node(node)["status"]["leaked"] for node in exercise.lab.nodes)


def test_nothing_is_in_clear_until_the_agent_is_there(guarded: Exercise, tmp_path: Path) -> None:
    lab = guarded.lab
    with eager(guarded):
        wait_for_pods(guarded)
        with Capture(tmp_path / "wire.pcap") as capture, guarded.flows(nodes=UNTOUCHED) as flows:
            lab.reboot_node(BOOTS, wait=False, agent=False)
            assert table(guarded), "the node's init has loaded it before there was a pod"
            sender = wait_for_pods(guarded)
            time.sleep(SECONDS)
            # They do send, in both families, and to each other they may.
            counts = held(guarded)
            assert len(counts) == 2 and min(counts) > 50, table(guarded)
            for address in guarded.probe(BOOTS).addresses:
                ask = ("python", "-m", "meshwire.lab.traffic", "ask", address)
                assert json.loads(lab.exec(sender.name, *ask).stdout.splitlines()[-1])["complete"]
            lab.start_agent(BOOTS)
            guarded.wait_until(lambda: not table(guarded), "the agent has taken it off")
            guarded.wait_until(lambda: reaches(guarded), f"{BOOTS} is back", seconds=60)
            time.sleep(1)
        report = capture.report
        print(f"{counts} packets held; {flows.packets} between the others, {flows.lost} lost; {report}")
        assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
        assert report and report.clear == 0, report
        # A count alone is told of within ten seconds.
        time.sleep(11)
        assert leaked(guarded) == 0
    lab.wait_ready()
    guarded.wait_for_phase("Enforcing")
    assert in_place(guarded, BOOTS), "for the boot after this one"
    guarded.wait_until(lambda: not guarded.leftovers(), "nothing is left over")


def test_without_it_there_is(guarded: Exercise, tmp_path: Path) -> None:
    """So the test above could fail. Off takes away what was there."""
    lab = guarded.lab
    guarded.set_encryption(True)
    guarded.wait_until(lambda: not guarded.leftovers(), "it is taken off the disk")
    with eager(guarded):
        wait_for_pods(guarded)
        with Capture(tmp_path / "wire.pcap") as capture:
            lab.reboot_node(BOOTS, wait=False, agent=False)
            assert not table(guarded)
            wait_for_pods(guarded)
            time.sleep(SECONDS)
            lab.start_agent(BOOTS)
            guarded.wait_until(lambda: reaches(guarded), f"{BOOTS} is back", seconds=60)
        assert capture.report and capture.report.clear > 50, capture.report
        guarded.wait_until(lambda: leaked(guarded) > 50, "the others have seen it")
    lab.wait_ready()


def test_what_was_turned_off_meanwhile_holds_nobody_back(guarded: Exercise) -> None:
    lab = guarded.lab
    lab.reboot_node(BOOTS, agent=False)
    assert table(guarded)
    guarded.set_encryption(False, wait=False)
    time.sleep(2)
    assert table(guarded), "there is nobody yet who knows"
    lab.start_agent(BOOTS)
    guarded.wait_for_phase("Off", strict=False)
    guarded.wait_until(lambda: not guarded.leftovers(), "it is taken off the node, and off its disk")
    assert not table(guarded) and reaches(guarded)
