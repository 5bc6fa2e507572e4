"""Starts and stops a lab's long-running processes, recorded by pid and start time; everything they start
inherits the lab's id in its environment, by which `down` finds it even after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from meshwire.lab.model import PATIENCE, LabError, Paths

MARK: Final = "MESHWIRE_LAB_ID"
"""Environment variable that says which lab a process belongs to."""

INHERITED: Final = (
    "HOME",
    "LANG",
    "PYTHONPATH",
    "TMPDIR",
    "TERM",
    "GOMAXPROCS",
    "TZ",
    "MESHWIRE_LAB_PATIENCE",
)
"""Of our own environment; a KUBECONFIG or a proxy setting of the person at the terminal is none of the lab's
business."""


@dataclass(frozen=True, slots=True)
class Process:
    """`started` is the kernel's start time in clock ticks: with the pid, an identity no later process
    shares."""

    component: str
    pid: int
    started: int
    command: tuple[str, ...]

    def is_running(self) -> bool:
        return _start_time(self.pid) == self.started


def environment(lab_id: str, **extra: str) -> dict[str, str]:
    """What every process of the lab starts with."""
    search = [
        str(Path(sys.executable).parent),
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ]
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**inherited, "PATH": ":".join(search), "PYTHONUNBUFFERED": "1", MARK: lab_id, **extra}


def in_namespaces(netns: str, *, mounts_of: int | None = None) -> list[str]:
    """Command prefix that enters a named network namespace, and the mount namespace of process
    `mounts_of`."""
    mounts = [f"--mount=/proc/{mounts_of}/ns/mnt"] if mounts_of else []
    return ["nsenter", f"--net=/run/netns/{netns}", *mounts, "--"]


def start(
    paths: Paths,
    component: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
) -> Process:
    """Starts a process that outlives us; what it prints goes to the component's log."""
    if (running := find(paths, component)) and running.is_running():
        raise LabError(f"{component} runs already (pid {running.pid})")
    with paths.log(component).open("ab") as log:
        child = subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(env),
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    return record(paths, component, child.pid, command)


def record(paths: Paths, component: str, pid: int, command: Sequence[str]) -> Process:
    """Notes a process that runs already."""
    process = Process(component, pid, _start_time(pid) or 0, tuple(command))
    paths.processes.mkdir(parents=True, exist_ok=True)
    (paths.processes / f"{component}.json").write_text(json.dumps(asdict(process)))
    return process


def find(paths: Paths, component: str) -> Process | None:
    """The recorded process, running or not."""
    try:
        raw = json.loads((paths.processes / f"{component}.json").read_text())
    except FileNotFoundError:
        return None
    return Process(raw["component"], raw["pid"], raw["started"], tuple(raw["command"]))


def find_all(paths: Paths) -> tuple[Process, ...]:
    names = sorted(path.stem for path in paths.processes.glob("*.json"))
    return tuple(process for name in names if (process := find(paths, name)))


def stop(paths: Paths, component: str, *, kill: bool = False, timeout: float = 15) -> bool:
    """Ends a component and forgets it: SIGTERM and, after `timeout` seconds, SIGKILL; or SIGKILL at once.
    Tells whether it ran."""
    process = find(paths, component)
    if not process:
        return False
    was_running = process.is_running()
    if was_running:
        _signal(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        if not _wait_until_gone([process], timeout):
            _signal(process.pid, signal.SIGKILL)
            _wait_until_gone([process], timeout)
    (paths.processes / f"{component}.json").unlink(missing_ok=True)
    return was_running


def marked(lab_id: str) -> Iterator[int]:
    """Pids of all processes that carry the lab's id, whoever started them."""
    wanted = f"{MARK}={lab_id}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def kill_marked(lab_id: str, *, timeout: float = 10) -> int:
    """SIGKILL to all of them until none is left; their number. Raises LabError."""
    killed: set[int] = set()
    deadline = time.monotonic() + timeout * PATIENCE
    while left := [pid for pid in marked(lab_id) if _start_time(pid) is not None]:
        if time.monotonic() > deadline:
            raise LabError(f"processes {left} of the lab don't end")
        killed.update(left)
        kill_all(left)
    return len(killed)


def kill_all(pids: Iterable[int], *, timeout: float = 5) -> None:
    """SIGKILL, and wait until they are gone."""
    processes = [Process("", pid, started, ()) for pid in pids if (started := _start_time(pid)) is not None]
    for process in processes:
        _signal(process.pid, signal.SIGKILL)
    _wait_until_gone(processes, timeout)


def resident_kib(pid: int) -> int:
    """Resident memory in KiB, with what it shares with others (the control plane's programs are one file); 0
    for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def _wait_until_gone(processes: Iterable[Process], timeout: float) -> bool:
    deadline = time.monotonic() + timeout * PATIENCE
    for process in processes:
        while process.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _start_time(pid: int) -> int | None:
    """None where there is no such process, or only its exit status is left."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return int(fields[18])
        # Our own children are zombies until somebody asks for their status.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return None
