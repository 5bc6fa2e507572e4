"""The supervisor's hold on a process that isn't its own program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwire.agent import userspace

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SLOW = """
import socket, sys, time
sockets = [socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)]
print("one", flush=True)
time.sleep(0.3)
sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
sys.stdin.readline()
print(*(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in sockets), flush=True)
"""


@pytest.fixture
def slow() -> Iterator[subprocess.Popen[str]]:
    """Has its IPv6 socket, and its IPv4 one after a while, as wireguard-go in a node that has much to do."""
    command, pipe = [sys.executable, "-c", SLOW], subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout and process.stdout.readline() == "one\n"
        yield process
        process.kill()


def test_sockets_of_both_families_get_large_buffers(slow: subprocess.Popen[str], tmp_path: Path) -> None:
    if not all(userspace._has(family) for family in (socket.AF_INET, socket.AF_INET6)):
        pytest.skip("needs IPv4 and IPv6")
    started = userspace._start_time(slow.pid)
    (tmp_path / "lo.pid").write_text(f"{slow.pid} {started}\n")
    userspace._widen(tmp_path, "lo")
    output, _ = slow.communicate("\n", timeout=10)
    assert all(int(size) >= userspace.RECEIVE_BUFFER for size in output.split()), output
