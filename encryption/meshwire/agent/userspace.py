"""Runs userspace WireGuard devices for the agent, in a process of its own: the agent may die or be upgraded
without taking the devices along. If this process dies, they go on too. It needs nothing but the standard
library.

Protocol: one line each way over MESHWIRE_RUN_DIR/userspace.sock (0600). `ensure NAME` answers `ok` when the
device is there and can be configured, or `error TEXT`; asked again once the device is up, it sees to it that
the device can take in a burst."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from meshwire.agent import logs

DEVICES: Final = ("meshwire_wg0", "meshwire_wg1")
UAPI_SOCKETS: Final = Path("/var/run/wireguard")
SOCKET_NAME: Final = "userspace.sock"
PROGRAM: Final = "wireguard-go"

_START_SECONDS: Final = 5.0
_NICENESS: Final = -10
"""What all pods of a node send to others waits for this process, and what doesn't fit into its device's
queue is lost. So it comes before whoever sends."""
_STOP_SECONDS: Final = 2.0
_BIND_SECONDS: Final = 1.0
_TICK_SECONDS: Final = 2.0

RECEIVE_BUFFER: Final = 8 * 1024 * 1024
"""Bytes that wait for the process while it gets no processor. The default holds some 250 packets: a busy
node would lose more than that in a few tens of milliseconds."""
_SO_RCVBUFFORCE: Final = 33
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_SYS_PIDFD_GETFD: Final = 438

log = logging.getLogger("meshwire.userspace")


class CannotStart(Exception):
    """The device could not be brought up; the message says why."""


@dataclass(frozen=True, slots=True)
class Process:
    """A wireguard-go that we, or an earlier one of us, started. `started` tells it from a later process of
    that number (clock ticks since boot)."""

    pid: int
    started: int

    def alive(self) -> bool:
        return _start_time(self.pid) == self.started


def ensure_device(run_directory: Path, name: str, *, timeout: float = 10.0) -> None:
    """Asks the supervisor for a device. Raises CannotStart with its answer, or where nobody answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(run_directory / SOCKET_NAME))
            connection.sendall(f"ensure {name}\n".encode())
            with connection.makefile("r") as stream:
                answer = stream.readline().strip()
    except OSError as error:
        raise CannotStart(f"the userspace supervisor does not answer: {error}") from error
    if answer != "ok":
        raise CannotStart(answer.removeprefix("error ") or "the userspace supervisor hung up")


def available(run_directory: Path) -> bool:
    """Whether a supervisor listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(run_directory / SOCKET_NAME))
        except OSError:
            return False
        return True


def ensure(run_directory: Path, name: str) -> None:
    """Starts the device's process unless it runs. Raises CannotStart."""
    if name not in DEVICES:
        raise CannotStart(f"{name} is not a device of Meshwire")
    if _exists(name):
        if _answers(name):
            _widen(run_directory, name)
            return
        if _find_process(run_directory, name) is None:
            raise CannotStart(
                f"{name} exists, but nothing answers at its UAPI socket: it is somebody else's"
            )
    _stop(run_directory, name)
    _start(run_directory, name)


def _start(run_directory: Path, name: str) -> None:
    if (program := shutil.which(PROGRAM)) is None:
        raise CannotStart(f"{PROGRAM} is not installed")
    # A file, not our own output: Go programs die of writing to a pipe that nobody reads any more.
    output = os.open(
        run_directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    try:
        child = subprocess.Popen(
            # Where it may not, nice says so in the log and starts the program all the same.
            ["nice", "-n", str(_NICENESS), program, "-f", name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "LOG_LEVEL": "error", "WG_PROCESS_FOREGROUND": "1"},
            start_new_session=True,
        )
    except OSError as error:
        raise CannotStart(f"{program}: {error.strerror}") from error
    finally:
        os.close(output)
    # In one step: the next supervisor must not find half of it.
    unfinished = run_directory / f"{name}.pid.new"
    unfinished.write_text(f"{child.pid} {_start_time(child.pid)}\n")
    unfinished.rename(run_directory / f"{name}.pid")
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise CannotStart(f"{PROGRAM} {name} ended with status {child.returncode}")
        if _exists(name) and _answers(name):
            log.info("started %s (%s, pid %d)", name, PROGRAM, child.pid)
            return
        time.sleep(0.01)
    _stop(run_directory, name)
    raise CannotStart(f"{PROGRAM} {name} did not come up within {_START_SECONDS:.0f} s")


def _widen(run_directory: Path, name: str) -> None:
    """Gives the device's UDP sockets a receive buffer that outlasts a pause. wireguard-go has no setting for
    it, and makes new sockets, one for each family, whenever the device comes up; a failure costs packets
    under load and nothing else."""
    process = _find_process(run_directory, name)
    flags = Path(f"/sys/class/net/{name}/flags")
    if process is None or not flags.exists() or not int(flags.read_text(), 16) & 1:
        return
    wanted = {family for family in _FAMILIES if _has(family)}
    deadline = time.monotonic() + _BIND_SECONDS
    while not (whole := _widen_sockets(process.pid) >= wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not whole:
        log.warning("%s: not all of its UDP sockets can be reached, their receive buffers stay small", name)


def _has(family: socket.AddressFamily) -> bool:
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def _widen_sockets(pid: int) -> frozenset[int]:
    """Of which families the process has UDP sockets; all of them have a large buffer now."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = set()
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        handle = os.pidfd_open(pid)
        stack.callback(os.close, handle)
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("socket:"):
                continue
            fd = libc.syscall(_SYS_PIDFD_GETFD, handle, int(entry.name), 0)
            if fd < 0:
                continue
            with socket.socket(fileno=fd) as sock:
                if sock.family in _FAMILIES and sock.type == socket.SOCK_DGRAM:
                    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
                    found.add(int(sock.family))
    return frozenset(found)


def _stop(run_directory: Path, name: str) -> None:
    """Ends what is left of the device's last process; it ends by itself when its device is deleted."""
    process = _find_process(run_directory, name)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process is None or not process.alive():
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        deadline = time.monotonic() + _STOP_SECONDS
        while process.alive() and time.monotonic() < deadline:
            _reap()
            time.sleep(0.01)
    (run_directory / f"{name}.pid").unlink(missing_ok=True)


def _find_process(run_directory: Path, name: str) -> Process | None:
    try:
        pid, started = (run_directory / f"{name}.pid").read_text().split()
        process = Process(int(pid), int(started))
    except (FileNotFoundError, ValueError):
        return None
    return process if process.alive() else None


def _start_time(pid: int) -> int:
    """0 where there is no such process, or only its exit status is left."""
    try:
        # The name in parentheses may hold anything, so count from behind it; the state comes first.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _answers(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(UAPI_SOCKETS / f"{name}.sock"))
        except OSError:
            return False
        return True


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _tidy(run_directory: Path) -> None:
    """Ends processes whose device is gone. Theirs alone: a pid file names a process that one of us
    started."""
    for name in DEVICES:
        if (process := _find_process(run_directory, name)) is None:
            continue
        if _exists(name):
            # Those that it has made since, for another port.
            _widen_sockets(process.pid)
        else:
            log.info("%s is gone, its process still runs: ending it", name)
            _stop(run_directory, name)


@contextlib.contextmanager
def _listening(run_directory: Path) -> Iterator[socket.socket]:
    run_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_directory / SOCKET_NAME
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _answer(run_directory: Path, connection: socket.socket) -> None:
    connection.settimeout(_TICK_SECONDS)
    with connection.makefile("rw") as stream:
        request = stream.readline(256)
        if match := re.fullmatch(r"ensure (\S+)\n", request):
            try:
                ensure(run_directory, match[1])
                reply = "ok"
            except CannotStart as error:
                log.warning("%s: %s", match[1], error)
                reply = f"error {error}"
        elif request:
            reply = "error unknown request"
        else:
            return
        stream.write(reply + "\n")


def serve(run_directory: Path) -> NoReturn:
    """Raises OSError where it can't listen there."""
    with _listening(run_directory) as listener:
        listener.settimeout(_TICK_SECONDS)
        log.info("listening on %s", run_directory / SOCKET_NAME)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                _reap()
                _tidy(run_directory)
                continue
            with connection, contextlib.suppress(OSError):
                _answer(run_directory, connection)
            _reap()


def _work_in_batches() -> None:
    """What we start interrupts nobody for a packet that comes: on a busy node it would do so for each, and a
    third of its time would go into changes from one process to the other. It still gets more time than
    others, by its niceness, and the next processor that is free."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:
        log.warning("can't be scheduled in batches, which costs time under load: %s", error.strerror)


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Serves until SIGTERM; the devices stay."""
    logs.configure()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _work_in_batches()
    serve(Path(environ.get("MESHWIRE_RUN_DIR", "/run/meshwire")))


if __name__ == "__main__":
    sys.exit(main())
