"""bench/load.c from Python: builds it, and runs both of its ends in network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

SOURCE: Final = Path(__file__).with_name("load.c")
PORT: Final = 7007

Mode = Literal["keep", "new"]
"""One request after the other on each connection, or a connection for each request."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Requests per second, and microseconds of one: with `new`, from connecting on."""

    per_second: float
    p50_us: float
    p99_us: float


class Load:
    """Raises CalledProcessError where a part fails. Client and server each keep to a CPU of their own where
    there are two, or with `together` to one and the same: then a request takes what it costs."""

    def __init__(self, directory: Path, *, together: bool = False) -> None:
        self._binary = directory / "load"
        cpus = sorted(os.sched_getaffinity(0))
        self._client_cpu, self._server_cpu = cpus[0], cpus[0 if together else -1]
        subprocess.run(["clang", "-O2", "-o", self._binary, SOURCE], check=True)

    @contextmanager
    def serving(self, netns: str, port: int = PORT) -> Iterator[None]:
        """A server in a named network namespace."""
        with self._running(netns, "serve", str(port)):
            yield

    def ask(
        self,
        netns: str,
        source: str,
        target: str,
        *,
        connections: int,
        seconds: float,
        mode: Mode,
        port: int = PORT,
    ) -> Answers:
        found = self._run(netns, "ask", source, target, str(port), str(connections), str(seconds), mode)
        return Answers(found["requests"] / found["seconds"], found["p50_us"], found["p99_us"])

    def flood(
        self,
        netns: str,
        source: str,
        target_netns: str,
        target: str,
        *,
        packets: int,
        answered: bool,
        size: int = 64,
    ) -> float:
        """Nanoseconds (the median over batches) of a UDP packet's way from `netns` to a socket that nobody
        reads. `answered`: the first one was, so that the flow counts as established."""
        kind = "answer" if answered else "silent"
        with self._running(target_netns, "sink", str(PORT), kind):
            found = self._run(netns, "flood", source, target, str(PORT), str(packets), str(size), kind)
        return float(found["ns"])

    @contextmanager
    def _running(self, netns: str, *arguments: str) -> Iterator[None]:
        command = self._command(netns, self._server_cpu, *arguments)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            if process.stdout.readline() != "ready\n":
                raise subprocess.CalledProcessError(process.wait(), command)
            yield
        finally:
            process.kill()
            process.communicate()

    def _run(self, netns: str, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            self._command(netns, self._client_cpu, *arguments), stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _command(self, netns: str, cpu: int, *arguments: str) -> list[str]:
        # Entering the network alone: `ip netns exec` makes a mount namespace each time.
        enter = ["nsenter", f"--net=/run/netns/{netns}", "--"]
        return [*enter, "taskset", "--cpu-list", str(cpu), str(self._binary), *arguments]
