"""What production does to a mesh, again and again, under traffic: keys change, agents and operator are
killed, agents of another version take over, the control plane is away, and in the end all of it at random.
Short by themselves; `make soak` makes them long."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.watch import Record, eager, longest_silence, note, watched

from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("MESHWIRE_SOAK") == "1"
RATE = int(os.environ.get("MESHWIRE_SOAK_RATE", "2000" if LONG else "400"))
"""UDP packets per second between every two nodes, each direction."""
SEED = int(os.environ.get("MESHWIRE_SOAK_SEED", "1"))
ROTATIONS = 100 if LONG else 1
RESTARTS = 50 if LONG else 3
UPGRADES = 20 if LONG else 3
CALM_SECONDS = 300 if LONG else 3
OUTAGE_SECONDS = 600 if LONG else 10
STORM_SECONDS = 1800 if LONG else 45
QUICK = {"interval": "0s", "overlap": "5s"}


@pytest.fixture
def mesh(exercise: Exercise) -> Iterator[Exercise]:
    """Encryption is in force, keys change on demand, nodes have a boot guard; whatever a test stopped runs
    again, and nothing is left over that nobody needs."""
    exercise.set_encryption(True, keyRotation=QUICK, bootGuard="Systemd")
    wait_until_whole(exercise)
    yield exercise
    lab = exercise.lab
    if not lab.pid("apiserver"):
        lab.start_apiserver()
    if not lab.pid("operator"):
        lab.start_operator()
    for node in lab.nodes:
        if not lab.pid(f"{node}.agent"):
            lab.start_agent(node)
    wait_until_whole(exercise)
    exercise.wait_until(lambda: not exercise.leftovers(), "nothing is left over", seconds=60)
    assert all(exercise.mesh_node(node)["status"]["leaked"] == 0 for node in lab.nodes)


def wait_until_whole(exercise: Exercise) -> None:
    """Every node has every other as a peer that answers."""
    exercise.wait_for_phase("Enforcing", seconds=180)
    exercise.wait_for_probes(seconds=180)
    wanted = len(exercise.lab.nodes) - 1

    def is_whole() -> bool:
        found = [exercise.mesh_node(node)["status"] for node in exercise.lab.nodes]
        return all(
            status["peers"] == wanted == status["handshakes"] and not status.get("unreachable")
            for status in found
        )

    exercise.wait_until(is_whole, "all nodes are peers", seconds=120)

    def answer() -> bool:
        return all(
            exercise.run(node, "ask", target)["complete"]
            for node, targets in exercise.pairs()
            for target in targets
        )

    exercise.wait_until(answer, "all pairs answer", seconds=60)


def test_nothing_happens(mesh: Exercise, tmp_path: Path) -> None:
    """What the others are to be compared with: a machine that loses packets by itself proves nothing."""
    with watched(mesh, tmp_path, f"nothing, {CALM_SECONDS} s", rate=RATE, data=not LONG):
        time.sleep(CALM_SECONDS)


def test_keys_change(mesh: Exercise, tmp_path: Path) -> None:
    before, took = mesh.mesh_status()["epoch"], []
    with watched(mesh, tmp_path, f"{ROTATIONS} rotations", rate=RATE, data=not LONG):
        for _ in range(ROTATIONS):
            began = time.monotonic()
            mesh.rotate()
            took.append(time.monotonic() - began)
    took.sort()
    print(f"a rotation of 3 nodes: p50 {took[len(took) // 2]:.1f} s, longest {took[-1]:.1f} s")
    assert mesh.mesh_status()["epoch"] == before + ROTATIONS


def test_agents_are_killed(mesh: Exercise, tmp_path: Path) -> None:
    lab = mesh.lab
    with watched(mesh, tmp_path, f"{RESTARTS} agent restarts", rate=RATE, data=not LONG):
        for number in range(RESTARTS):
            node = lab.nodes[number % len(lab.nodes)]
            lab.stop_agent(node, kill=number % 2 == 0)
            lab.start_agent(node)
            wait_until_heard(mesh, node)


def wait_until_heard(exercise: Exercise, node: str) -> None:
    """Until the agent that runs now serves what it counts."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9871/metrics').status)"
    exercise.wait_until(
        lambda: "200" in exercise.lab.on_node(node, "python3", "-c", script, check=False).stdout,
        f"{node}'s agent is back",
    )


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """PYTHONPATHs of other versions: with other programs, and with a map of another size besides, whose
    content has to be carried over."""
    changes = (
        ("#define MW_SECOND 1000000000ULL", "#define MW_SECOND 1000000001ULL"),
        ("#define MW_MAX_PREFIXES 131072", "#define MW_MAX_PREFIXES 65536"),
    )
    found = []
    for number in range(len(changes)):
        folder = tmp_path_factory.mktemp("version") / "bpf"
        shutil.copytree(ROOT / "bpf", folder)
        header = folder / "include" / "meshwire" / "types.h"
        text = header.read_text()
        for old, new in changes[: number + 1]:
            assert old in text
            text = text.replace(old, new)
        header.write_text(text)
        subprocess.run(["make", "-s", "-C", folder, "programs"], check=True)
        found.append(str(folder))
    return found


def program_ids(exercise: Exercise, node: str) -> set[str]:
    shown = exercise.lab.on_node(node, "tc", "filter", "show", "dev", "eth0", "egress").stdout
    return {word for word, before in zip(shown.split()[1:], shown.split(), strict=False) if before == "id"}


def wait_for_programs(exercise: Exercise, node: str, *, other_than: set[str]) -> None:
    exercise.wait_until(
        lambda: program_ids(exercise, node).isdisjoint(other_than), f"{node} has other programs"
    )


def test_agents_are_upgraded(mesh: Exercise, versions: list[str], tmp_path: Path) -> None:
    lab = mesh.lab
    try:
        with watched(mesh, tmp_path, f"{UPGRADES} agent upgrades", rate=RATE, data=not LONG):
            for number in range(UPGRADES):
                node = lab.nodes[number % len(lab.nodes)]
                # Each node gets one version after the other, and in the end the one it had.
                at = (number // len(lab.nodes) + 1) % (len(versions) + 1)
                before = program_ids(mesh, node)
                lab.stop_agent(node)
                lab.start_agent(node, **({"PYTHONPATH": versions[at - 1]} if at else {}))
                wait_for_programs(mesh, node, other_than=before)
                wait_until_heard(mesh, node)
    finally:
        for node in lab.nodes:
            lab.restart_agent(node)


def test_the_control_plane_is_away(mesh: Exercise, tmp_path: Path) -> None:
    lab = mesh.lab
    what = f"operator and API server away for {OUTAGE_SECONDS} s"
    with watched(mesh, tmp_path, what, rate=RATE, data=not LONG):
        lab.stop_operator(kill=True)
        lab.stop_apiserver()
        time.sleep(OUTAGE_SECONDS)
        lab.start_apiserver()
        lab.start_operator()
        mesh.wait_for_phase("Enforcing", seconds=180)
        mesh.rotate(seconds=300)


# The storm.


class Storm:
    """Faults, each of one node at most; who was hit is `victim`, and may lose packets until all is whole
    again."""

    def __init__(self, exercise: Exercise, seed: int) -> None:
        self.exercise = exercise
        self.lab = exercise.lab
        self.random = random.Random(seed)
        self.told: list[str] = []
        self.counts: dict[str, int] = {}

    def round(self, directory: Path) -> Record:
        """Faults on one node, and perhaps on the control plane, and keys that change on top; traffic
        between the nodes that aren't hit."""
        victim = self.random.choice(self.lab.nodes)
        faults = [self.agent_dies, self.device_goes, self.is_cut_off, self.reboots]
        hits = self.random.sample(faults, k=self.random.choice((1, 1, 2)))
        central = self.random.choice([None, self.operator_dies, self.api_server_stands_still])
        others = [node for node in self.lab.nodes if node != victim]
        began = time.monotonic()
        with self.exercise.flows(
            udp_rate=min(RATE, 1000) // len(self.lab.state.settings.families), nodes=others
        ) as flows:
            if self.random.random() < 0.5:
                self.tell("keys change")
                self.exercise.rotate(wait=False)
                time.sleep(self.random.uniform(0, 6))
            if central:
                central()
            for hit in hits:
                hit(victim)
                time.sleep(self.random.uniform(0, 3))
            wait_until_whole(self.exercise)
        record = Record(
            what=f"storm, between {' and '.join(others)}",
            seconds=time.monotonic() - began,
            packets=flows.packets,
            lost=flows.lost,
            clear=0,
            udp_gap_ms=longest_silence(flows, "udp"),
            tcp_stall_ms=longest_silence(flows, "tcp"),
        )
        print(record)
        assert flows.lost == 0 and not flows.broken, (self.told[-8:], json.dumps(flows.broken))
        return record

    def tell(self, what: str, node: str = "") -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.told.append(f"{time.strftime('%H:%M:%S')} {node} {what}".replace("  ", " "))
        print(self.told[-1])

    def agent_dies(self, node: str) -> None:
        self.tell("agent is killed", node)
        self.lab.stop_agent(node, kill=True)
        time.sleep(self.random.uniform(0, 5))
        self.lab.start_agent(node)

    def device_goes(self, node: str) -> None:
        self.tell("device is deleted", node)
        for device in self.random.sample(["meshwire_wg0", "meshwire_wg1"], k=2):
            if not self.lab.on_node(node, "ip", "link", "delete", device, check=False).returncode:
                return

    def is_cut_off(self, node: str) -> None:
        self.tell("is cut off", node)
        rules = (
            "add table inet cut",
            "add chain inet cut out { type filter hook output priority 0; }",
            "add chain inet cut in { type filter hook input priority 0; }",
            "add rule inet cut out oifname eth0 drop",
            "add rule inet cut in iifname eth0 drop",
        )
        self.lab.on_node(node, "nft", "; ".join(rules))
        time.sleep(self.random.uniform(1, 30))
        self.lab.on_node(node, "nft", "delete table inet cut")

    def reboots(self, node: str) -> None:
        self.tell("reboots", node)
        self.lab.reboot_node(node)

    def operator_dies(self) -> None:
        self.tell("operator is killed")
        self.lab.stop_operator(kill=True)
        time.sleep(self.random.uniform(0, 5))
        self.lab.start_operator()

    def api_server_stands_still(self) -> None:
        self.tell("API server stands still")
        pid = self.lab.pid("apiserver")
        assert pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self.random.uniform(1, 10))
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_storm_of_faults(mesh: Exercise, tmp_path: Path) -> None:
    storm, records = Storm(mesh, SEED), []
    deadline = time.monotonic() + STORM_SECONDS
    with eager(mesh), Capture(tmp_path / "storm.pcap", data=False) as capture:
        while time.monotonic() < deadline:
            records.append(storm.round(tmp_path))
    report = capture.report
    assert report
    note(
        Record(
            what=f"storm with seed {SEED}: " + ", ".join(f"{n}× {what}" for what, n in storm.counts.items()),
            seconds=sum(record.seconds for record in records),
            packets=sum(record.packets for record in records),
            lost=sum(record.lost for record in records),
            clear=report.clear,
            udp_gap_ms=max(record.udp_gap_ms for record in records),
            tcp_stall_ms=max(record.tcp_stall_ms for record in records),
        )
    )
    assert report.clear == 0, report
