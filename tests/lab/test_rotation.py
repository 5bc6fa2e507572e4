"""Keys change under traffic: nothing is lost, nothing is in clear, nothing is left over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.lab.watch import watched

from meshwire.api.names import NAMESPACE, OPERATOR_NAMESPACE, device_name, secret_name
from meshwire.lab.exercise import Exercise

ROTATIONS = 1
RATE = 500
"""UDP packets per second between every two nodes, each direction."""
QUICK = {"interval": "0s", "overlap": "5s"}


@pytest.fixture(scope="module")
def rate(exercise: Exercise) -> int:
    """As many packets per second as get through while keys stay as they are, RATE at most: what a busy
    machine loses by itself says nothing about keys."""
    exercise.set_encryption(True, keyRotation=QUICK)
    families = len(exercise.lab.state.settings.families)
    found = RATE
    while True:
        with exercise.flows(udp_rate=found // families, tcp_rate=50_000) as flows:
            time.sleep(4)
        seconds = 4 * len(flows.ended)
        # Senders that fall behind are no sign of room either.
        if (
            flows.lost == 0 and not flows.broken and flows.packets > found // families * seconds / 2
        ) or found < 100:
            print(f"{found} packets per second get through")
            return found
        found //= 2


@pytest.fixture
def rotating(exercise: Exercise) -> Exercise:
    """Encryption is in force, and keys change on demand."""
    exercise.set_encryption(True, keyRotation=QUICK)
    return exercise


def assert_nothing_is_left(exercise: Exercise) -> None:
    """Of any epoch but the present one: no device, key, peer."""
    epoch = exercise.mesh_status()["epoch"]
    device, other = device_name(epoch), device_name(epoch + 1)
    kept = exercise.lab.kubectl("get", "secrets", "-n", OPERATOR_NAMESPACE, "-o", "name").split()
    assert kept == [f"secret/meshwire-epoch-{epoch}"]
    for node in exercise.lab.nodes:
        spec = exercise.mesh_node(node)["spec"]
        assert spec["encryption"] == {"phase": "Enforcing", "epoch": epoch}
        assert [key["epoch"] for key in spec["keys"]] == [epoch]
        secret = exercise.lab.get("secret", secret_name(node), "-n", NAMESPACE)
        assert sorted(secret["data"]) == [f"epoch-{epoch}", f"epoch-{epoch}-secret"]
        of_epochs = sorted(name for name in secret["metadata"]["annotations"] if "epoch" in name)
        assert of_epochs == [
            f"meshwire.dev/epoch-secret-digest-{epoch}",
            f"meshwire.dev/public-key-epoch-{epoch}",
        ]
        links = exercise.lab.on_node(node, "ls", "/sys/class/net").stdout.split()
        assert device in links and other not in links
        held = json.loads((exercise.lab.paths.lib(node) / "keys.json").read_text())
        assert list(held) == [str(epoch)]
        status = exercise.mesh_node(node)["status"]
        assert status["peers"] == len(exercise.lab.nodes) - 1 == status["handshakes"]
        assert status["leaked"] == 0


def test_keys_change_under_traffic(rotating: Exercise, rate: int, tmp_path: Path) -> None:
    before = rotating.mesh_status()
    with watched(rotating, tmp_path, f"{ROTATIONS} rotations", rate=rate):
        for number in range(ROTATIONS):
            began = time.monotonic()
            rotating.rotate()
            print(f"rotation {number + 1}: {time.monotonic() - began:.1f} s")
    after = rotating.mesh_status()
    assert after["epoch"] == before["epoch"] + ROTATIONS
    assert after["rotations"] == before.get("rotations", 0) + ROTATIONS
    assert after["encryption"] == "WireGuard" and after["lastRotation"]["epoch"] == after["epoch"]
    assert_nothing_is_left(rotating)


def test_operator_and_agent_die_while_keys_change(rotating: Exercise, rate: int, tmp_path: Path) -> None:
    before = rotating.mesh_status()["epoch"]
    lab = rotating.lab
    with watched(rotating, tmp_path, "a rotation, operator and agent killed", rate=rate):
        rotating.rotate(wait=False)
        rotating.wait_until(
            lambda: rotating.mesh_node("node2")["spec"]["encryption"].get("retiring") == before,
            "keys begin to change",
        )
        lab.stop_operator(kill=True)
        lab.stop_agent("node1", kill=True)
        time.sleep(1)
        lab.start_agent("node1")
        lab.start_operator()
        rotating.wait_until(
            lambda: rotating.mesh_status()["rotations"] and not rotating.mesh_status().get("rotation"),
            "the change comes to its end",
            seconds=120,
        )
        rotating.wait_for_phase("Enforcing")
    assert rotating.mesh_status()["epoch"] == before + 1
    assert_nothing_is_left(rotating)


def test_a_node_goes_down_while_keys_change_twice(rotating: Exercise, rate: int, tmp_path: Path) -> None:
    lab, before = rotating.lab, rotating.mesh_status()["epoch"]
    with watched(rotating, tmp_path, "two rotations, a node down", rate=rate, nodes=("node1", "node2")):
        rotating.rotate(wait=False)
        lab.reboot_node("node3")
        command = [sys.executable, "-m", "meshwire.cli", "rotate", "--wait"]
        kubeconfig = ["--kubeconfig", str(lab.paths.kubeconfig)]
        done = subprocess.run([*command, *kubeconfig], capture_output=True, text=True, timeout=700)
        assert done.returncode == 0, done.stderr
    rotating.wait_for_phase("Enforcing")
    rotating.wait_for_probes()
    assert rotating.mesh_status()["epoch"] >= before + 1
    assert_nothing_is_left(rotating)
    with watched(rotating, tmp_path, "after that", rate=min(rate, 200)):
        time.sleep(3)
