"""What a node's systemd does at boot with the units that somebody has put into its /etc/systemd/system: it
starts those that come before kubelet. Of systemd as much as that takes."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from meshwire.lab.model import LabError

SYSTEMD: Final = Path("/etc/systemd/system")
TARGET: Final = "multi-user.target"
KUBELET: Final = "kubelet.service"

Unit = Mapping[tuple[str, str], Sequence[str]]
"""(section, name) -> values."""


def parse_unit(text: str) -> Unit:
    found: dict[tuple[str, str], list[str]] = {}
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and line[0] not in "#;":
            name, _, value = line.partition("=")
            found.setdefault((section, name.strip()), []).append(value.strip())
    return found


def find_units(directory: Path) -> dict[str, Unit]:
    """What is enabled in the target, by name; `directory` is the node's SYSTEMD. A link that leads nowhere
    enables nothing."""
    found = {}
    for link in sorted((directory / f"{TARGET}.wants").glob("*.service")):
        if not link.is_symlink():
            continue
        # It names its target as the node sees it.
        target = directory / link.readlink().name
        if link.readlink().parent == SYSTEMD and target.is_file():
            found[link.name] = parse_unit(target.read_text())
    return found


def boot(directory: Path, enter: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """Runs what has to have been run when kubelet starts, with the prefix `enter`, which leads onto the
    node. Names of the units that ran. A unit that fails is a LabError: a node would only log it, but here
    somebody wants to know."""
    ran = []
    for name, unit in find_units(directory).items():
        befores = {each for value in unit.get(("Unit", "Before"), ()) for each in value.split()}
        if KUBELET not in befores:
            continue
        conditions = unit.get(("Unit", "ConditionPathExists"), ())
        if any(_run([*enter, "test", "-e", path], env).returncode for path in conditions):
            continue
        for command in unit.get(("Service", "ExecStart"), ()):
            done = _run([*enter, *shlex.split(command)], env)
            if done.returncode:
                raise LabError(f"{name}: {command} ended with {done.returncode}: {done.stderr.strip()}")
        ran.append(name)
    return tuple(ran)


def _run(command: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=dict(env))
