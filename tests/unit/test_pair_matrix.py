"""Who hears whom: in MeshStatus' condition, and as `meshwire status --matrix` draws it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meshwire.api import conditions
from meshwire.api.conditions import Condition
from meshwire.api.fields import InvalidSpec
from meshwire.api.meshnode import MeshNode, Phase, Spec, Status, Unreachable
from meshwire.api.meshstatus import MeshStatus
from meshwire.cli.diagnosis import Snapshot, diagnose
from meshwire.cli.matrix import MAX_NODES, Cell, Matrix, as_json, make_matrix, print_matrix
from meshwire.operator.pairs import MAX_PAIRS, judge_pairs

SINCE = "2026-01-01T00:00:00Z"


def node(name: str, *unreachable: str, count: int | None = None, phase: Phase = Phase.ENFORCING) -> MeshNode:
    return MeshNode(
        name=name,
        generation=1,
        spec=Spec(id=1, phase=phase, epoch=1),
        status=Status(
            observed_generation=1,
            prepared_epoch=1,
            active_epoch=1,
            unreachable=tuple(
                Unreachable(node=each, since=SINCE, reason="NoAnswer") for each in unreachable
            ),
            unreachable_count=len(unreachable) if count is None else count,
            conditions=(Condition(type="Ready", status=True, reason="Ready", observed_generation=1),),
        ),
    )


def snapshot(*nodes: MeshNode, dead: tuple[str, ...] = ()) -> Snapshot:
    alive = {each.name: each.name not in dead for each in nodes}
    return Snapshot(config=None, status=None, meshnodes=nodes, alive=alive)


def drawn(matrix: Matrix) -> str:
    out = io.StringIO()
    print_matrix(Console(file=out, width=160), matrix)
    return out.getvalue()


def judged(*nodes: MeshNode, dead: tuple[str, ...] = (), phase: Phase = Phase.ENFORCING) -> object:
    by_name = {each.name: each for each in nodes}
    return judge_pairs(by_name, [name for name in by_name if name not in dead], phase, MeshStatus())


def test_an_unreachable_node_reads_as_it_was_written() -> None:
    written = node("a", "b", "c", count=40).status
    read = MeshNode.from_object({"metadata": {"name": "a"}, "status": written.to_dict()}).status
    assert (read.unreachable, read.unreachable_count) == (written.unreachable, 40)
    assert MeshNode.from_object({"metadata": {"name": "a"}, "status": {}}).status.unreachable == ()
    with pytest.raises(InvalidSpec, match=r"unreachable\[0\]"):
        MeshNode.from_object({"metadata": {"name": "a"}, "status": {"unreachable": ["b"]}})


def test_the_mesh_names_the_pairs_that_are_dead() -> None:
    assert judged(node("a"), node("b")) == (True, "AllPairsAnswer", "")
    message = f"a hears nothing from b since {SINCE} (NoAnswer)"
    assert judged(node("a", "b"), node("b")) == (False, "PairsDead", message)
    # Nobody waits for what is not live, in either direction.
    assert judged(node("a", "b"), node("b", "a"), dead=("b",)) == (True, "AllPairsAnswer", "")


def test_the_mesh_counts_what_it_does_not_name() -> None:
    names = [f"n{number:02}" for number in range(20)]
    status = judged(node("a", *names, count=45), *(node(name) for name in names))
    assert isinstance(status, tuple) and status[0] is False
    assert status[2].count("hears nothing") == MAX_PAIRS and status[2].endswith(
        f" and {45 - MAX_PAIRS} more"
    )
    assert len(status[2]) < conditions.MAX_MESSAGE


def test_without_encryption_nobody_says_anything_of_pairs() -> None:
    assert judged(node("a", "b"), node("b"), phase=Phase.OFF) is None
    known = MeshStatus(conditions=(Condition(type="PairsHealthy", status=False, reason="PairsDead"),))
    assert judge_pairs({}, [], Phase.OFF, known) == (None, "Off", "")


def test_cells() -> None:
    matrix = make_matrix(
        snapshot(
            node("a", "b", "gone"), node("b"), node("c"), node("d", phase=Phase.OFF), node("e"), dead=("c",)
        )
    )
    rows = {name: "".join(matrix.cell(name, other)[0] for other in matrix.nodes) for name in matrix.nodes}
    assert rows == {"a": "-D??o", "b": "o-??o", "c": "??-??", "d": "???-?", "e": "oo??-"}
    assert matrix.counts == {Cell.HEARS: 5, Cell.DEAD: 1, Cell.UNKNOWN: 14}
    assert as_json(matrix) == {
        "pairs": {"answer": 5, "dead": 1, "unknown": 14},
        "dead": [{"at": "a", "from": "b", "since": SINCE, "reason": "NoAnswer"}],
        "unnamed": {},
        "silent": ["c", "d"],
    }


@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    st.sets(st.integers(0, 5), max_size=3),
)
def test_counts_are_those_of_the_cells(dead: set[tuple[int, int]], away: set[int]) -> None:
    nodes = [
        node(f"n{row}", *sorted(f"n{column}" for at, column in dead if at == row != column))
        for row in range(6)
    ]
    matrix = make_matrix(snapshot(*nodes, dead=tuple(f"n{each}" for each in away)))
    cells = [matrix.cell(row, column) for row in matrix.nodes for column in matrix.nodes if row != column]
    assert matrix.counts == {each: cells.count(each) for each in (Cell.HEARS, Cell.DEAD, Cell.UNKNOWN)}


def test_a_small_matrix_is_drawn_whole() -> None:
    text = drawn(make_matrix(snapshot(node("a", "b"), node("b"), node("c"))))
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "a", "-", "DEAD", "ok"] in lines and ["2", "b", "ok", "-", "ok"] in lines
    assert "3 nodes; directions that work: 5, dead: 1, unknown: 0" in text
    assert f"a hears nothing from b since {SINCE}: NoAnswer" in text


def test_of_many_nodes_only_those_in_trouble_are_drawn() -> None:
    names = [f"n{number:03}" for number in range(MAX_NODES + 1)]
    nodes = [node(name) for name in names]
    assert "n001" not in drawn(make_matrix(snapshot(*nodes)))
    nodes[1] = replace(node("n001", "n007"))
    text = drawn(make_matrix(snapshot(*nodes)))
    assert "n001" in text and "2: n007" in text and "n002" not in text
    assert f"{len(names)} nodes; directions that work: {len(names) * MAX_NODES - 1}, dead: 1" in text


def test_status_says_who_is_not_heard() -> None:
    [finding] = [each for each in diagnose(snapshot(node("a", "b"), node("b"))) if each.check == "node a"]
    assert "hears nothing from 1 live nodes: b since" in finding.what
