"""Preshared keys in tunnels that carry traffic: there from the first packet, changed without loss, and no
tunnel at all where one is missing."""

from __future__ import annotations

import json
import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tests.lab.watch import watched

from meshwire.api import preshared
from meshwire.api.names import NAMESPACE, OPERATOR_NAMESPACE, device_name, secret_name
from meshwire.kube.client import Object
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise
from meshwire.lab.model import LabError

RATE = 600
"""UDP packets per second of each flow: this is about keys."""
QUICK = {"interval": "0s", "overlap": "5s"}

READ_DEVICE = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/var/run/wireguard/{sys.argv[1]}.sock")
connection.sendall(b"get=1\\n\\n")
for line in connection.makefile():
    if line.startswith("errno"):
        break
    if line.startswith(("public_key", "preshared_key")):
        print(line, end="")
"""
"""What WireGuard itself has, whatever the agent believes."""

SEND = """
import socket, sys, time
end = time.monotonic() + 6
while time.monotonic() < end:
    for target in sys.argv[1:]:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        socket.socket(family, socket.SOCK_DGRAM).sendto(b"in clear?", (target, 4000))
    time.sleep(0.02)
"""


def in_force(exercise: Exercise, node: str, epoch: int) -> dict[str, str]:
    """Preshared keys by the peers' public keys, all in hex."""
    text = exercise.lab.on_node(node, sys.executable, "-c", READ_DEVICE, device_name(epoch)).stdout
    lines = [line.split("=") for line in text.split()]
    return {key: secret for (_, key), (_, secret) in zip(lines[::2], lines[1::2], strict=True)}


def published(exercise: Exercise, node: str) -> Object:
    [key] = exercise.mesh_node(node)["spec"]["keys"]
    return dict(key)


def epoch_secrets(exercise: Exercise) -> dict[str, bytes]:
    found = exercise.lab.get("secrets", "-n", OPERATOR_NAMESPACE, "-l", "meshwire.dev/epoch-secret")
    return {each["metadata"]["name"]: b64decode(each["data"]["secret"]) for each in found["items"]}


def assert_preshared(exercise: Exercise) -> None:
    """Every tunnel has the key that its two ends should have, and all is of one epoch."""
    epoch = exercise.mesh_status()["epoch"]
    [(name, secret)] = epoch_secrets(exercise).items()
    assert name == f"meshwire-epoch-{epoch}"
    digest = preshared.digest(secret, epoch)
    keys = {node: published(exercise, node) for node in exercise.lab.nodes}
    assert {key["epochSecretDigest"] for key in keys.values()} == {digest}
    for node in exercise.lab.nodes:
        others = [key["publicKey"] for other, key in keys.items() if other != node]
        assert in_force(exercise, node, epoch) == {
            b64decode(key).hex(): preshared.pair_key(secret, epoch, keys[node]["publicKey"], key).hex()
            for key in others
        }
        status = exercise.mesh_node(node)["status"]
        assert status["handshakes"] == len(others) and status["leaked"] == 0


@pytest.fixture
def quick(exercise: Exercise) -> Iterator[Exercise]:
    """Encryption is in force, and keys change on demand."""
    exercise.set_encryption(True, keyRotation=QUICK)
    yield exercise
    # Where a test was cut short, they may be away.
    for start in (exercise.lab.start_operator, partial(exercise.lab.start_agent, "node3")):
        with suppress(LabError):
            start()
    exercise.set_encryption(True)


def test_every_pair_has_a_preshared_key_and_gets_new_ones_without_loss(
    quick: Exercise, tmp_path: Path
) -> None:
    """Off and on again is the next epoch's, and costs no packet either."""
    if "epochSecretDigest" not in published(quick, "node1"):
        quick.rotate()
    assert_preshared(quick)
    with watched(quick, tmp_path, "preshared keys", rate=RATE):
        quick.rotate()
        assert_preshared(quick)
        before = published(quick, "node1")
        quick.set_encryption(True, keyRotation=QUICK, presharedKeys=False)
        assert published(quick, "node1") == before, "what has begun stays as it is"
        quick.rotate()
        epoch = quick.mesh_status()["epoch"]
        assert not epoch_secrets(quick)
        for node in quick.lab.nodes:
            assert "epochSecretDigest" not in published(quick, node)
            assert set(in_force(quick, node, epoch).values()) == {"00" * 32}
        quick.set_encryption(True, keyRotation=QUICK)
        quick.rotate()
        assert_preshared(quick)


def reason(exercise: Exercise, node: str) -> str:
    [ready] = exercise.mesh_node(node)["status"]["conditions"]
    return f"{ready['reason']}: {ready['message']}"


def is_refused(exercise: Exercise, node: str, why: str) -> bool:
    said = reason(exercise, node)
    return said.startswith("KeyRefused") and why in said


def test_without_its_secret_a_node_has_no_tunnel_and_sends_nothing_in_clear(
    quick: Exercise, tmp_path: Path
) -> None:
    lab, node = quick.lab, "node3"
    if "epochSecretDigest" not in published(quick, node):
        quick.rotate()
    epoch = quick.mesh_status()["epoch"]
    field = f"epoch-{epoch}-secret"
    others = lab.get("secret", secret_name("node2"), "-n", NAMESPACE)["data"][field]
    targets = [address for each in ("node1", "node2") for address in quick.probe(each).addresses]

    # Operator away: it would at once issue a whole key for half a one.
    lab.stop_operator()
    for value, expected in ((others, "not sealed to this node"), (None, "has no epoch secret")):
        lab.stop_agent(node)
        patch = json.dumps({"data": {field: value}})
        lab.kubectl("patch", "secret", secret_name(node), "-n", NAMESPACE, "--type=merge", "-p", patch)
        (lab.paths.lib(node) / "keys.json").unlink(missing_ok=True)
        with Capture(tmp_path / "wire.pcap") as capture:
            sender = lab.popen(quick.probe(node).name, "python", "-c", SEND, *map(str, targets))
            lab.start_agent(node)
            quick.wait_until(partial(is_refused, quick, node, expected), f"{node} refuses its key")
            assert sender.wait() == 0
        assert capture.report and capture.report.clear == 0, capture.report
        assert device_name(epoch) not in lab.on_node(node, "ls", "/sys/class/net").stdout.split()
    lab.start_operator()
    quick.wait_until(lambda: reason(quick, node).startswith("Ready"), f"{node} gets a new key")
    quick.wait_for_phase("Enforcing")
    quick.wait_until(
        lambda: all(quick.mesh_node(each)["status"]["handshakes"] == 2 for each in lab.nodes),
        "all are connected again",
    )
    assert quick.mesh_status()["epoch"] == epoch
    assert_preshared(quick)
    with watched(quick, tmp_path, "preshared keys", rate=RATE):
        pass
