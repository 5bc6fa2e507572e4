"""Nothing of a lab stays behind, however it ended. Runs in namespaces of its own, beside the other tests'
lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = r"""
import os, signal, subprocess, sys
from pathlib import Path
from meshwire.lab import network, processes
from meshwire.lab.lab import Lab
from meshwire.lab.model import LabError, Settings

run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout
# Mounts of a lab beside would be listed, though hidden.
while " /run/netns" in Path("/proc/self/mountinfo").read_text():
    run("umount", "--recursive", "--lazy", "/run/netns")
run("mount", "-t", "tmpfs", "tmpfs", "/run")
run("ip", "link", "set", "lo", "up")

def what_is_there():
    mounts = sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    paths = [str(path) for path in (Path("/run/netns"), Path("/var/lib/meshwire")) if path.exists()]
    return network.list_netns(), run("ip", "-o", "link"), mounts, paths

before = what_is_there()
directory = Path(sys.argv[1])
lab = Lab(directory)
lab.up(Settings(nodes=1, mesh=False))
assert what_is_there() != before
lab.down()
assert what_is_there() == before, (what_is_there(), before)
assert not directory.exists()

lab.up(Settings(nodes=2, mesh=False))
first = lab.state.lab_id
# A namespace and a process that are not the lab's, however they are called.
run("ip", "netns", "add", "mw-mine")
mine = subprocess.Popen(["nsenter", "--net=/run/netns/mw-node1", "sleep", "60"])
lab.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [
    {"name": "c", "image": "host", "command": ["sh", "-c", "setsid sleep 1000 & sleep 1000"]}]}})
lab.kubectl("wait", "--for=condition=Ready", "pod/p", "--timeout=60s")
assert len(list(processes.marked(first))) > 10

# A crash: everything that could tidy up is killed.
for component in ("node1.node", "node2.node", "control"):
    os.kill(lab.pid(component), signal.SIGKILL)
lab.up(Settings(nodes=1, families=("v4",), mesh=False))
assert not list(processes.marked(first)), "processes of the first lab"
assert network.list_netns() == ["mw-control", "mw-mine", "mw-node1", "mw-underlay"], network.list_netns()
second = lab.state.lab_id
lab.down()
assert not list(processes.marked(second)), "processes of the second lab"
assert mine.poll() is None, "a process of somebody else was ended"
mine.kill(); mine.wait()
assert network.list_netns() == ["mw-mine"]
run("ip", "netns", "delete", "mw-mine")
# Down with nothing up is no error. That namespace of somebody else had kept the directory of all of them
# mounted.
lab.down()
run("umount", "/run/netns")
run("rmdir", "/run/netns")
assert what_is_there() == before, (what_is_there(), before)
assert not directory.exists()
print("nothing is left")
"""


def test_down_removes_all_it_made_and_nothing_else(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "--net", "--propagation", "private", sys.executable, "-c", SCRIPT]
    done = subprocess.run([*command, str(tmp_path / "lab")], capture_output=True, text=True)
    assert done.stdout.strip() == "nothing is left", done.stderr[-3000:]
