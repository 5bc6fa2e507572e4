"""`make demo`: a cluster on this machine, encrypted by one `kubectl apply`, and what its wire shows.

Everything is real: control plane, agents, WireGuard, packets. The lab stays up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from meshwire.lab import binaries
from meshwire.lab.capture import Capture, Report
from meshwire.lab.exercise import Exercise
from meshwire.lab.lab import Lab
from meshwire.lab.model import LabError, Settings

ROOT: Final = Path(__file__).resolve().parent.parent
SAMPLE: Final = ROOT / "config/samples/meshconfig.yaml"
TRAFFIC: Final = (sys.executable, "-m", "meshwire.lab.traffic")
ROUNDS: Final = 3
"""Questions to a service from each pod, family and protocol: kube-proxy picks another pod each time."""

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one kind of traffic: tries that were answered, and all."""

    kind: str
    good: int
    total: int


def send_traffic(exercise: Exercise) -> list[Outcome]:
    """Ping, TCP and UDP between every two pods and through the service, both families."""
    probes = [exercise.probe(node) for node in exercise.lab.nodes]
    names = [probe.name for probe in probes]
    addresses = {probe.name: probe.addresses for probe in probes}

    tries: dict[str, list[tuple[str, list[str]]]] = {}
    for source, target in permutations(names, 2):
        for address in addresses[target]:
            family = "IPv6" if ":" in address else "IPv4"
            tries.setdefault(f"ping {family}", []).append((source, ["ping", address, "--interval", "0.05"]))
            tries.setdefault(f"TCP {family}", []).append((source, ["ask", address]))
            tries.setdefault(f"UDP {family}", []).append((source, ["ask", address, "--udp"]))
    for source in names:
        for address in exercise.services() * ROUNDS:
            family = "IPv6" if ":" in address else "IPv4"
            tries.setdefault(f"TCP {family} by ClusterIP", []).append((source, ["ask", address]))
            tries.setdefault(f"UDP {family} by ClusterIP", []).append((source, ["ask", address, "--udp"]))
    return [run_tries(exercise.lab, kind, attempts) for kind, attempts in sorted(tries.items())]


def run_tries(lab: Lab, kind: str, attempts: list[tuple[str, list[str]]]) -> Outcome:
    """All at once: each is a small process in a pod."""
    processes = [lab.popen(pod, *TRAFFIC, *arguments) for pod, arguments in attempts]
    good = 0
    for process in processes:
        output, _ = process.communicate(timeout=60)
        answer = json.loads(output) if output else {"complete": False}
        good += bool(answer["complete"]) and not answer.get("lost")
    return Outcome(kind, good, len(attempts))


def observe(exercise: Exercise, path: Path) -> tuple[list[Outcome], Report]:
    capture = Capture(path)
    with capture:
        outcomes = send_traffic(exercise)
    assert capture.report
    return outcomes, capture.report


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Shows a long step while it runs, and how long it took."""
    if not console.is_terminal:
        console.print(title)
        yield lambda message: console.print(f"  {message}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1)
        yield lambda message: progress.update(task, description=f"{title}: {message}")
        progress.update(task, description=title, completed=1)


def show_wire(before: Report, after: Report) -> None:
    table = Table(title="On the wire, all ports of the underlay", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("with encryption", justify="right")
    rows = (
        ("packets captured", before.total, after.total),
        ("WireGuard", before.wireguard, after.wireguard),
        ("with a pod address in clear", before.clear, after.clear),
        ("other (API server, ARP, neighbour discovery)",
         before.other + before.non_ip, after.other + after.non_ip),
        ("unreadable or not recorded", before.unreadable + before.dropped, after.unreadable + after.dropped),
    )  # fmt: skip
    for name, first, second in rows:
        table.add_row(name, str(first), str(second))
    console.print(table)
    for example in before.examples[:2]:
        console.print(f"  before, e.g.: {example}", soft_wrap=True)
    for example in after.examples:
        console.print(f"  [red]in clear: {example}", soft_wrap=True)


def show_traffic(before: list[Outcome], after: list[Outcome]) -> None:
    table = Table(title="Answered", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("with encryption", justify="right")
    for first, second in zip(before, after, strict=True):
        table.add_row(first.kind, f"{first.good}/{first.total}", f"{second.good}/{second.total}")
    console.print(table)


def demonstrate() -> bool:
    """Whether everything was answered and nothing was in clear."""
    with step("Control plane binaries (built once, minutes)") as report:
        binaries.ensure_binaries(report=report)
    with step("Lab of three nodes") as report:
        lab = Lab(report=report)
        lab.up(Settings(nodes=3))
    with step("Workload: a pod per node, and a service"):
        exercise = Exercise(lab)
        exercise.deploy()
    with tempfile.TemporaryDirectory(prefix="meshwire-demo-") as directory:
        with step("Traffic before"):
            before, wire_before = observe(exercise, Path(directory, "before.pcap"))
        console.print(f"\n$ kubectl apply -f {SAMPLE.relative_to(ROOT)}", style="bold")
        console.print(lab.kubectl("apply", "-f", str(SAMPLE)).strip())
        with step("Encrypting"):
            lab.kubectl(
                "wait", "meshstatus/mesh", "--for=jsonpath={.status.phase}=Enforcing", "--timeout=120s"
            )
            lab.kubectl("wait", "meshstatus/mesh", "--for=condition=Ready", "--timeout=120s")
        with step("Traffic with encryption"):
            after, wire_after = observe(exercise, Path(directory, "after.pcap"))
    console.print()
    show_traffic(before, after)
    show_wire(wire_before, wire_after)
    console.print("\n$ kubectl get meshstatus,meshnodes", style="bold")
    console.print(lab.kubectl("get", "meshstatus,meshnodes"), soft_wrap=True)
    kubectl = binaries.ensure_binaries() / "kubectl"
    tool = Path(sys.executable).with_name("meshwire")
    console.print(
        "The lab is still up. Look around:\n"
        f"  export KUBECONFIG={lab.kubeconfig} PATH={kubectl.parent}:{tool.parent}:$PATH\n"
        "  kubectl get meshstatus,meshnodes -o wide\n"
        "  kubectl explain meshconfig.spec.encryption\n"
        "  meshwire status                          what holds things up, in words\n"
        "  meshwire lab node add node4              a node joins, encrypted from its first packet\n"
        "  ip netns exec mw-underlay tcpdump -ni any   the wire\n"
        "  kubectl delete meshconfig default        back to plaintext, without losing a packet\n"
        "Take it down:\n"
        "  make lab-down",
        soft_wrap=True,
    )
    answered = all(outcome.good == outcome.total for outcome in (*before, *after))
    # Without clear packets before, the capture would prove nothing by showing none after.
    return answered and wire_after.is_complete and wire_before.clear > 0 == wire_after.clear


def main() -> int:
    try:
        if demonstrate():
            return 0
        console.print("[red]Not everything was as it should be: see the tables above.")
    except (LabError, subprocess.SubprocessError) as error:
        console.print(f"[red]{error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
