"""Traffic between nodes while something happens to them, and a record of the wire."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from meshwire.lab.capture import Capture
from meshwire.lab.exercise import Exercise, Flows
from meshwire.lab.traffic import PORT

RESULTS = os.environ.get("MESHWIRE_SOAK_RESULTS")
"""A file that gets a line of JSON for every record, if set."""
EAGER = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Of one spell of traffic. `udp_gap_ms`, `tcp_stall_ms`: the longest time nothing arrived of a flow."""

    what: str
    seconds: float
    packets: int
    lost: int
    clear: int
    udp_gap_ms: float
    tcp_stall_ms: float

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.packets} packets in {self.seconds:.0f} s, {self.lost} lost, {self.clear} in"
            f" clear; longest gap of a UDP flow {self.udp_gap_ms:.0f} ms, of a TCP stream"
            f" {self.tcp_stall_ms:.0f} ms"
        )


@contextmanager
def watched(
    exercise: Exercise,
    directory: Path,
    what: str,
    *,
    rate: int,
    nodes: Sequence[str] | None = None,
    data: bool = True,
) -> Iterator[Flows]:
    """Every two nodes have a UDP flow of `rate` packets per second in each direction, shared by the
    families, and TCP beside it. Nothing of it may be lost, or be in clear. Without `data` the record of the
    wire leaves out what WireGuard sends, which is what long ones can afford."""
    families = len(exercise.lab.state.settings.families)
    began = time.monotonic()
    with Capture(directory / f"wire-{time.monotonic_ns()}.pcap", data=data) as capture:
        with exercise.flows(udp_rate=rate // families, tcp_rate=50_000, nodes=nodes) as flows:
            yield flows
    report = capture.report
    assert report
    record = Record(
        what=what,
        seconds=time.monotonic() - began,
        packets=flows.packets,
        lost=flows.lost,
        clear=report.clear,
        udp_gap_ms=longest_silence(flows, "udp"),
        tcp_stall_ms=longest_silence(flows, "tcp"),
    )
    note(record)
    if flows.lost:
        print(json.dumps(flows.broken))
    assert flows.lost == 0 and not flows.broken, json.dumps(flows.broken)
    # The record itself may have gaps on a busy machine: that nothing in clear was in it must not hang on it.
    assert report.clear == 0, report
    if data:
        # Handshakes and keepalives alone would be a few dozen.
        assert report.wireguard_by_type.get(4, 0) > 100, report


def longest_silence(flows: Flows, kind: str) -> float:
    return max((flow.longest_silence_ms for flow in flows.ended if flow.kind == kind), default=0.0)


def note(record: Record) -> None:
    print(record)
    if RESULTS:
        with Path(RESULTS).open("a") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")


@contextmanager
def eager(exercise: Exercise) -> Iterator[None]:
    """On every node a pod sends to all nodes' probes from its first breath on, whatever becomes of it: what
    could leak, leaks."""
    script = (
        "import socket, sys, time\n"
        "while True:\n"
        "    for target in sys.argv[1:]:\n"
        "        family = socket.AF_INET6 if ':' in target else socket.AF_INET\n"
        "        with socket.socket(family, socket.SOCK_DGRAM) as sock:\n"
        "            try:\n"
        f"                sock.sendto(b'eager', (target, {PORT}))\n"
        "            except OSError:\n"
        "                pass\n"
        "    time.sleep(0.02)\n"
    )
    targets = [
        *exercise.services(),
        *(address for node in exercise.lab.nodes for address in exercise.probe(node).addresses),
    ]
    labels = {"app": EAGER}
    container = {"name": EAGER, "image": "host", "command": ["python", "-c", script, *targets]}
    exercise.lab.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": EAGER, "namespace": "default"},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"terminationGracePeriodSeconds": 0, "containers": [container]},
                },
            },
        }
    )
    try:
        yield
    finally:
        exercise.lab.kubectl("delete", "daemonset", EAGER)
