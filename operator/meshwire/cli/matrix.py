"""`meshwire status --matrix`: who hears whom. Pure, but for printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from meshwire.api.meshnode import MeshNode, Phase, Unreachable
from meshwire.cli.diagnosis import Snapshot

if TYPE_CHECKING:
    from rich.console import Console

MAX_NODES: Final = 30
"""Above that only nodes in trouble have a row and a column."""


class Cell(StrEnum):
    """What a node (row) says of what comes from another (column)."""

    HEARS = "ok"
    DEAD = "DEAD"
    UNKNOWN = "?"
    SELF = "-"


STYLES: Final[Mapping[Cell, str]] = {
    Cell.HEARS: "green",
    Cell.DEAD: "bold red",
    Cell.UNKNOWN: "yellow",
    Cell.SELF: "dim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """`nodes` by name; `dead` is row -> column -> what the row's node says of it. `silent` are nodes that
    nobody can ask or expect anything of: their Node is not Ready, or their agent doesn't encrypt. `unnamed`:
    row -> further dead ones that its status has no room for."""

    nodes: tuple[str, ...]
    dead: Mapping[str, Mapping[str, Unreachable]] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    unnamed: Mapping[str, int] = field(default_factory=dict)

    def cell(self, row: str, column: str) -> Cell:
        if row == column:
            return Cell.SELF
        if row in self.silent or column in self.silent:
            return Cell.UNKNOWN
        if column in self.dead.get(row, {}):
            return Cell.DEAD
        return Cell.UNKNOWN if row in self.unnamed else Cell.HEARS

    @property
    def counts(self) -> dict[Cell, int]:
        """Of all ordered pairs."""
        heard = [node for node in self.nodes if node not in self.silent]
        dead = sum(len(found) for found in self.dead.values()) + sum(self.unnamed.values())
        known = len(heard) * (len(heard) - 1)
        total = len(self.nodes) * (len(self.nodes) - 1)
        return {Cell.HEARS: known - dead, Cell.DEAD: dead, Cell.UNKNOWN: total - known}

    @property
    def shown(self) -> tuple[Sequence[str], Sequence[str]]:
        """Rows and columns: all nodes, or, of many, those in trouble."""
        if len(self.nodes) <= MAX_NODES:
            return self.nodes, self.nodes
        rows = {*self.dead, *self.unnamed}
        columns = {name for found in self.dead.values() for name in found}
        return sorted(rows)[:MAX_NODES], sorted(columns)[:MAX_NODES]


def make_matrix(snapshot: Snapshot) -> Matrix:
    nodes = tuple(sorted(node.name for node in snapshot.meshnodes))
    silent = frozenset(node.name for node in snapshot.meshnodes if _is_silent(node, snapshot))
    speaking = [node for node in snapshot.meshnodes if node.name not in silent]
    dead = {
        node.name: {
            each.node: each
            for each in node.status.unreachable
            if each.node in nodes and each.node not in silent
        }
        for node in speaking
    }
    unnamed = {
        node.name: node.status.unreachable_count - len(node.status.unreachable)
        for node in speaking
        if node.status.unreachable_count > len(node.status.unreachable)
    }
    return Matrix(
        nodes=nodes,
        dead={name: found for name, found in sorted(dead.items()) if found},
        silent=silent,
        unnamed=unnamed,
    )


def _is_silent(node: MeshNode, snapshot: Snapshot) -> bool:
    status = node.status
    return not snapshot.is_live(node) or node.spec.phase is Phase.OFF or not status.prepared_epoch


def as_json(matrix: Matrix) -> dict[str, Any]:
    counts = matrix.counts
    return {
        "pairs": {
            "answer": counts[Cell.HEARS],
            "dead": counts[Cell.DEAD],
            "unknown": counts[Cell.UNKNOWN],
        },
        "dead": [
            {"at": row, "from": each.node, "since": each.since, "reason": each.reason}
            for row, found in matrix.dead.items()
            for each in found.values()
        ],
        "unnamed": dict(matrix.unnamed),
        "silent": sorted(matrix.silent),
    }


def print_matrix(console: Console, matrix: Matrix) -> None:
    """Rows hear columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts = matrix.counts
    rows, columns = matrix.shown
    if rows and columns:
        # Numbers for columns: names of nodes are long.
        numbers = {name: str(index) for index, name in enumerate(dict.fromkeys((*rows, *columns)), 1)}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", justify="right")
        table.add_column("Node hears", no_wrap=True)
        for name in columns:
            table.add_column(numbers[name], justify="center")
        for row in rows:
            cells = [matrix.cell(row, column) for column in columns]
            table.add_row(numbers[row], Text(row), *(Text(str(cell), style=STYLES[cell]) for cell in cells))
        console.print(table)
        for name in columns:
            if name not in rows:
                console.print(Text(f"{numbers[name]}: {name}"))
    console.print(
        Text(
            f"{len(matrix.nodes)} nodes; directions that work: {counts[Cell.HEARS]}, dead:"
            f" {counts[Cell.DEAD]}, unknown: {counts[Cell.UNKNOWN]}"
        )
    )
    for row, found in matrix.dead.items():
        for each in found.values():
            console.print(Text(f"{row} hears nothing from {each.node} since {each.since}: {each.reason}"))
    for row, number in matrix.unnamed.items():
        console.print(Text(f"{row} hears nothing from {number} more"))
