"""Clusters of other shapes: one family only, an overlay, a wide wire. Each is a lab in namespaces of its
own, beside the other tests' lab."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import json, subprocess, sys, time
from pathlib import Path
from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import Settings

subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
settings["families"] = tuple(settings["families"])
lab = Lab(directory / "lab")
found = {}

def talk(exercise, name):
    with Capture(directory / f"{name}.pcap") as capture:
        with exercise.flows(services=True) as flows:
            time.sleep(2)
        pings = [exercise.run(node, "ping", "--count=3", target)["lost"]
                 for node, targets in exercise.pairs() for target in targets]
    report = capture.report
    found[name] = {
        "lost": flows.lost, "broken": flows.broken, "pings_lost": sum(pings), "pings": len(pings),
        "clear": report.clear, "wireguard": report.wireguard, "complete": report.is_complete,
        "examples": report.examples,
    }

try:
    lab.up(Settings(**settings))
    exercise = Exercise(lab)
    exercise.deploy()
    talk(exercise, "before")
    exercise.set_encryption(True)
    talk(exercise, "encrypted")
    device = f"meshwire_wg{exercise.mesh_status()['epoch'] % 2}"
    found["mtu"] = int(lab.on_node("node1", "cat", f"/sys/class/net/{device}/mtu").stdout)
    found["guarded"] = [
        name for name in ("eth0", "vxlan.1")
        if "mw_to_netdev" in lab.on_node(
            "node1", "tc", "filter", "show", "dev", name, "egress", check=False).stdout
    ]
    with exercise.flows() as flows:
        exercise.set_encryption(False)
    found["off"] = {"lost": flows.lost, "broken": flows.broken}
finally:
    lab.down()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("settings", "pings", "mtu"),
    [
        pytest.param({"families": ["v4"]}, 1, 1420, id="IPv4 only"),
        pytest.param({"families": ["v6"]}, 1, 1420, id="IPv6 only"),
        pytest.param(
            {"families": ["v4", "v6"], "overlay": "vxlan"}, 2, 1420, id="VXLAN overlay, dual stack"
        ),
        pytest.param(
            {"families": ["v6", "v4"], "underlay_mtu": 9000}, 2, 8920, id="jumbo frames, IPv6 first"
        ),
    ],
)
def test_a_cluster_of_another_shape_is_encrypted(
    settings: dict[str, object], pings: int, mtu: int, tmp_path: Path
) -> None:
    command = ["unshare", "--mount", "--net", "--propagation", "private", sys.executable, "-c", SCRIPT]
    arguments = [str(tmp_path), json.dumps({"nodes": 2, **settings})]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("before", "encrypted"):
        stretch = found[name]
        assert stretch["complete"] and stretch["lost"] == 0 and not stretch["broken"], stretch
        assert (stretch["pings"], stretch["pings_lost"]) == (pings, 0)
    assert found["before"]["clear"] > 100 and found["before"]["wireguard"] == 0
    assert found["encrypted"]["clear"] == 0, found["encrypted"]["examples"]
    assert found["encrypted"]["wireguard"] > 100
    assert found["off"] == {"lost": 0, "broken": []}
    assert found["mtu"] == mtu
    # The overlay's device, where there is one, and the wire below it.
    assert found["guarded"] == (["eth0", "vxlan.1"] if "overlay" in settings else ["eth0"])
