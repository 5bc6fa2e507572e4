"""The condition PairsHealthy, from what nodes say of one another. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from meshwire.api import conditions
from meshwire.api.meshnode import MeshNode, Phase
from meshwire.api.meshstatus import MeshStatus

MAX_PAIRS: Final = 8
"""Pairs that a message names before it only counts."""


def judge_pairs(
    mesh_nodes: Mapping[str, MeshNode], live: Collection[str], phase: Phase, previous: MeshStatus
) -> tuple[bool | None, str, str] | None:
    """Status, reason and message; None: the condition, which is not there before encryption was on, stays
    away. Nobody speaks for a node that is not live, and it is nobody's trouble that it doesn't answer."""
    if phase is Phase.OFF:
        is_known = conditions.find(previous.conditions, conditions.PAIRS_HEALTHY)
        return (None, "Off", "") if is_known else None
    dead: list[str] = []
    rest = 0
    alive = frozenset(live)
    for name in sorted(alive & mesh_nodes.keys()):
        status = mesh_nodes[name].status
        dead += [
            f"{name} hears nothing from {each.node} since {each.since} ({each.reason})"
            for each in status.unreachable
            if each.node in alive
        ]
        rest += max(0, status.unreachable_count - len(status.unreachable))
    if not dead and not rest:
        return True, "AllPairsAnswer", ""
    rest += max(0, len(dead) - MAX_PAIRS)
    more = f" and {rest} more" if rest else ""
    return False, "PairsDead", ", ".join(dead[:MAX_PAIRS]) + more
