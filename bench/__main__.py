"""`make bench`: every figure of one run, as a table and in bench/results/latest.json; `python -m bench
PART...` some of them. Needs root. Nothing here is asserted: figures depend on the machine, so what counts
are ratios within a run, and goals are only shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench import isolated
from bench.figures import Figure
from rich.table import Table
from rich.text import Text

from meshwire.cli.findings import make_console

RESULTS: Final = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Part:
    """A module whose measure() gives a list of figures, or what `figures_of` makes figures of. It is ended
    after `seconds`."""

    module: str
    title: str
    seconds: float
    on_demand: bool = False
    """Not measured unless it is named."""


PARTS: Final = {
    "programs": Part("bench.programs", "the programs", 120),
    "peers": Part("bench.peers", "a thousand peers on one device", 300),
    "pods": Part("bench.pods", "fifty thousand pods on nodes without pod CIDR", 300),
    "throughput": Part("bench.throughput", "throughput and latency through the redirect", 300),
    "lab": Part("bench.lab", "encryption on and off, nodes that join", 600),
    "policies": Part("bench.policies", "judging by policy", 600),
    "firewall": Part("bench.firewall", "policy, iptables and nftables", 600),
    "nearby": Part("bench.nearby", "between two pods of one node", 600),
    "memory": Part("bench.memory", "an agent among a thousand nodes", 600),
    "scale": Part("bench.scale", "an agent among fifty thousand pods", 600),
    "rotation": Part("bench.rotation", "one change of keys among a hundred and a thousand nodes", 1500),
    "publishing": Part("bench.publishing", "the operator among fifty thousand pods", 1800, on_demand=True),
}

UNITS: Final = {"_ms": "ms", "_ns": "ns", "_s": "s", "_mib": "MiB"}
"""Ending of a name -> unit of what it holds."""


def figures_of(answer: Any) -> list[Figure]:
    """Figures as they are; of an object every number in it, named by the way to it."""
    if isinstance(answer, list):
        return [Figure(**figure) for figure in answer]
    return list(_numbers(answer, (), ""))


def _numbers(answer: Mapping[str, Any], path: tuple[str, ...], unit: str) -> Iterator[Figure]:
    for key, value in answer.items():
        ending = next((ending for ending in UNITS if key.endswith(ending)), "")
        name = key.removesuffix(ending).replace("_", " ")
        match value:
            case bool() | str() | list() | None:
                continue
            case dict():
                yield from _numbers(value, (*path, name), UNITS.get(ending, unit))
            case _:
                yield Figure(name=", ".join((*path, name)), value=value, unit=UNITS.get(ending, unit))


def main(chosen: list[str]) -> int:
    """Exit code: 0, or 1 where a part could not be measured."""
    console = make_console()
    if unknown := set(chosen) - PARTS.keys():
        console.print(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
        return 2
    if os.geteuid() != 0:
        console.print("the measurements need root")
        return 2
    result: dict[str, Any] = {**_machine(), "parts": {}}
    table = Table(title=f"Meshwire on {result['kernel']}, {result['cpus']} CPUs", title_justify="left")
    for heading in ("figure", "value", "unit", "how", "goal"):
        table.add_column(heading, justify="right" if heading == "value" else "left", overflow="fold")
    failed = False
    for name, part in PARTS.items():
        if name not in chosen if chosen else part.on_demand:
            continue
        table.add_section()
        table.add_row(Text(part.title, style="bold"))
        began = time.monotonic()
        measured: dict[str, Any] = {}
        try:
            with console.status(f"{part.title} (up to {part.seconds:.0f} s)"):
                answer = isolated.measure(part.module, seconds=part.seconds)
            figures = figures_of(answer)
            measured["figures"] = [figure.as_json() for figure in figures]
            if isinstance(answer, dict):
                measured["details"] = answer
            for figure in figures:
                table.add_row(figure.name, _short(figure), figure.unit, figure.spread, figure.goal)
        except isolated.Failed as error:
            failed = True
            measured["problem"] = str(error)
            # The last line of a traceback says what, the rest is in the file.
            table.add_row(Text(str(error).splitlines()[-1], style="red"))
        measured["seconds"] = round(time.monotonic() - began, 1)
        result["parts"][name] = measured
        console.print(f"{part.title}: {measured['seconds']} s")
    RESULTS.mkdir(exist_ok=True)
    # latest.json is always one whole run.
    path = RESULTS / ("partial.json" if chosen else "latest.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table)
    console.print(f"written to {path}")
    return 1 if failed else 0


def _short(figure: Figure) -> str:
    if figure.unit == "ratio":
        return f"{figure.value:.3f}"
    return f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"


def _machine() -> dict[str, Any]:
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=isolated.REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
