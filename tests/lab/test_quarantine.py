"""A node that people take out of the mesh: how soon it is nobody's peer any more, what still gets through,
what the others notice of it, and how it comes back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from meshwire.api.meshstatus import MeshStatus
from meshwire.api.names import NAMESPACE, secret_name
from meshwire.kube.client import ApiError, Client, Cluster
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise

ROUNDS = int(os.environ.get("MESHWIRE_QUARANTINES", "3"))
"""In a row; a soak asks for twenty."""
OUTCAST = "node3"
OTHERS = ("node1", "node2")


def quarantine(exercise: Exercise, quarantined: bool) -> None:
    patch = json.dumps({"spec": {"quarantined": quarantined}})
    exercise.lab.kubectl("patch", "meshnode", OUTCAST, "--type=merge", "-p", patch)


def is_revoked(exercise: Exercise) -> bool:
    found = exercise.mesh_status().get("quarantines", [])
    return len(found) == 1 and bool(found[0].get("revokedAt")) and not found[0]["waiting"]


def is_back(exercise: Exercise) -> bool:
    """Its new keys have been proven with both others."""
    status = exercise.mesh_node(OUTCAST)["status"]
    return bool(
        not exercise.mesh_status().get("quarantines")
        and status["activeEpoch"]
        and status["handshakes"] == len(OTHERS)
        and all(exercise.mesh_node(node)["status"]["peers"] == len(OTHERS) for node in OTHERS)
    )


def key(exercise: Exercise) -> str:
    (found,) = exercise.mesh_node(OUTCAST)["spec"]["keys"]
    return str(found["publicKey"])


def rotate(exercise: Exercise) -> None:
    """New keys for all but the one in quarantine."""
    epoch = exercise.mesh_status()["epoch"]
    exercise.rotate(wait=False)
    exercise.wait_until(
        lambda: (
            not exercise.mesh_status().get("rotation")
            and all(exercise.mesh_node(node)["status"]["activeEpoch"] > epoch for node in OTHERS)
            and not any("retiring" in exercise.mesh_node(node)["spec"]["encryption"] for node in OTHERS)
        ),
        "keys have changed",
        seconds=60,
    )


def quarantine_drops(exercise: Exercise, node: str) -> float:
    text = exercise.lab.on_node(
        node,
        "python3",
        "-c",
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9871/metrics').read().decode())",
    ).stdout
    lines = [line for line in text.splitlines() if "drop_quarantined" in line.lower() and "packets" in line]
    assert lines, "no such reason"
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def wait_for_drops(exercise: Exercise, before: Mapping[str, float], *nodes: str) -> None:
    """A node's page shows what was counted when the agent looked last."""
    exercise.wait_until(
        lambda: all(quarantine_drops(exercise, node) > before[node] for node in nodes),
        "what is dropped is counted by its reason",
    )


def test_a_quarantined_node_is_nobodys_peer_and_nobody_else_notices(
    encrypted: Exercise, tmp_path: Path
) -> None:
    lab = encrypted.lab
    targets = {node: encrypted.probe(node).addresses for node in lab.nodes}
    first_key, took, told = key(encrypted), [], []
    with Capture(tmp_path / "wire.pcap") as capture, encrypted.flows(udp_rate=500, nodes=OTHERS) as flows:
        for number in range(ROUNDS):
            before, began = key(encrypted), time.monotonic()
            quarantine(encrypted, True)
            encrypted.wait_until(lambda: is_revoked(encrypted), "nobody has it as a peer any more")
            took.append(time.monotonic() - began)
            told.append(MeshStatus.from_object(lab.get("meshstatus", "mesh")).quarantines[0].seconds)
            for node in OTHERS:
                assert encrypted.mesh_node(node)["status"]["peers"] == 1
            spec = encrypted.mesh_node(OUTCAST)["spec"]
            assert not spec["keys"] and spec["quarantined"]
            assert secret_name(OUTCAST) not in lab.kubectl("get", "secrets", "-n", NAMESPACE, "-o", "name")
            if number == 0:
                drops = {node: quarantine_drops(encrypted, node) for node in lab.nodes}
                for address in targets[OUTCAST]:
                    assert not encrypted.run("node1", "ask", address)["complete"]
                for node in OTHERS:
                    for address in targets[node]:
                        assert not encrypted.run(OUTCAST, "ask", "--udp", address)["complete"]
                wait_for_drops(encrypted, drops, "node1", OUTCAST)
                assert encrypted.mesh_status()["encryption"] == "WireGuard"
                rows = {row["type"]: row for row in encrypted.mesh_status()["conditions"]}
                assert rows["Quarantine"]["reason"] == "Revoked" and OUTCAST in rows["Quarantine"]["message"]
                assert rows["Ready"]["status"] == "True" and OUTCAST in rows["Ready"]["message"]
                # Nothing waits for it: keys change meanwhile.
                encrypted.set_encryption(True, wait=False, keyRotation={"interval": "0s", "overlap": "5s"})
                rotate(encrypted)
            quarantine(encrypted, False)
            encrypted.wait_until(lambda: is_back(encrypted), f"{OUTCAST} is back", seconds=60)
            assert key(encrypted) != before
    report = capture.report
    print(f"{flows.packets} packets between the others, {flows.lost} lost; on the wire: {report}")
    print(
        f"until nobody had it as a peer any more, {ROUNDS} rounds: "
        + ", ".join(
            f"{name} p50 {sorted(values)[ROUNDS // 2]:.2f} s, p95 {sorted(values)[ROUNDS * 95 // 100]:.2f} s"
            for name, values in (("kubectl to MeshStatus", took), ("as MeshStatus says", told))
        )
    )
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
    assert report and report.clear == 0 and report.wireguard_by_type.get(4, 0) > 100, report
    assert key(encrypted) != first_key
    for node in OTHERS:
        for address in targets[OUTCAST]:
            assert encrypted.run(node, "ask", address)["complete"]
    events = lab.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}").split()
    assert {"Quarantined", "Revoked", "QuarantineEnded"} <= set(events)


async def test_a_node_cant_end_its_own_quarantine(encrypted: Exercise) -> None:
    """By the token that runs its agent."""
    lab = encrypted.lab
    credentials = lab.paths.token_directory(OUTCAST)
    server = lab.kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    account = Cluster(server=server, ca_file=credentials / "ca.crt", token_file=credentials / "token")
    path = f"/apis/meshwire.dev/v1alpha1/meshnodes/{OUTCAST}"
    quarantine(encrypted, True)
    try:
        encrypted.wait_until(lambda: is_revoked(encrypted), "nobody has it as a peer any more")
        async with Client(account) as client:
            for refused in (
                client.patch(path, {"spec": {"quarantined": False}}),
                client.patch(path, {"spec": {"revocation": None}}),
                client.delete(path),
                client.delete(f"/api/v1/nodes/{OUTCAST}"),
            ):
                with pytest.raises(ApiError) as refusal:
                    await refused
                assert refusal.value.status in (403, 422), refusal.value
            # What comes along with its status is not taken.
            await client.patch(f"{path}/status", {"spec": {"quarantined": False}, "status": {"leaked": 0}})
        assert encrypted.mesh_node(OUTCAST)["spec"]["quarantined"]
    finally:
        quarantine(encrypted, False)
        encrypted.wait_until(lambda: is_back(encrypted), f"{OUTCAST} is back", seconds=60)
