"""Nodes that nobody is to have as a peer, and who still has: docs/architecture.md, Quarantine. Pure.

Agents let go of a node as soon as its spec says `quarantined`, which people write. The operator withdraws
its keys and gives the quarantine a number, `revocation`; the agents confirm that number once each. It stays
until all live nodes have, even if the quarantine is over before: new keys must not meet a peer that still
has old ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from meshwire.api.meshnode import MeshNode, Revoked
from meshwire.api.meshstatus import Quarantine

MAX_NAMED: Final = 5
"""Nodes still waited for that MeshStatus names; it counts all."""
MAX_TOLD: Final = 64
"""Quarantines that MeshStatus tells of. All are carried out."""


def follow(
    previous: Iterable[Quarantine],
    mesh_nodes: Mapping[str, MeshNode],
    *,
    live: Collection[str],
    now: datetime,
) -> tuple[Quarantine, ...]:
    """What to say of all nodes whose keys are withdrawn, by name. `live` are the nodes whose word counts."""
    known = {(each.node, each.revocation): each for each in previous}
    # Where every node looks dead, it is our view that is wrong, and nothing is so by the word of nobody.
    is_known = any(name in mesh_nodes for name in live) or all(
        node.spec.is_out for node in mesh_nodes.values()
    )
    found = []
    for name, node in sorted(mesh_nodes.items()):
        if not (revocation := node.spec.revocation):
            continue
        asked = Quarantine(node=name, revocation=revocation, asked_at=_timestamp(now))
        told = known.get((name, revocation), asked)
        waiting = waits_for(node, mesh_nodes, live)
        found.append(
            replace(
                told,
                revoked_at=told.revoked_at or (_timestamp(now) if is_known and not waiting else ""),
                waiting=len(waiting),
                waiting_for=waiting[:MAX_NAMED],
            )
        )
    return tuple(found)


def waits_for(node: MeshNode, mesh_nodes: Mapping[str, MeshNode], live: Collection[str]) -> tuple[str, ...]:
    """Live nodes that haven't confirmed to have let go of this one. Others in quarantine aren't asked: they
    have no keys to send by."""
    confirmed = Revoked(node.spec.id, node.spec.revocation)
    return tuple(
        sorted(
            name
            for name in live
            if name != node.name
            and name in mesh_nodes
            and not mesh_nodes[name].spec.is_out
            and confirmed not in mesh_nodes[name].status.revoked
        )
    )


def revocation_of(node: MeshNode | None, quarantines: Iterable[Quarantine], *, has_secret: bool) -> int:
    """The number that the node's spec is to have, 0: it is a member. It was never used for this node
    before."""
    if node is None:
        return 0
    if node.spec.quarantined:
        # The quarantine was a change of the spec, which nobody has counted before.
        return node.spec.revocation or max(1, node.generation)
    if not node.spec.revocation or has_secret:
        return node.spec.revocation
    told = [each for each in quarantines if each.node == node.name]
    done = bool(told) and bool(told[0].revoked_at) and not told[0].waiting
    return 0 if done else node.spec.revocation


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
