"""Which phase the cluster is in, and when it moves on: the table of docs/architecture.md. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from meshwire.api.meshnode import MeshNode, Phase


@dataclass(frozen=True, slots=True)
class Order:
    """What a node is told to do."""

    phase: Phase
    epoch: int


_RANK: Final = {phase: rank for rank, phase in enumerate(Phase)}

_ALLOWED: Final[Mapping[Phase, Collection[Phase]]] = {
    Phase.OFF: (Phase.ENABLING, Phase.ENFORCING),
    Phase.ENABLING: (Phase.ENFORCING, Phase.DISABLING),
    Phase.ENFORCING: (Phase.DISABLING,),
    Phase.DISABLING: (Phase.DRAINING,),
    Phase.DRAINING: (Phase.OFF,),
}
"""As the CRD of MeshNode allows."""

_TOWARDS_OFF: Final[Mapping[Phase, Phase]] = {
    Phase.ENABLING: Phase.DISABLING,
    Phase.ENFORCING: Phase.DISABLING,
    Phase.DISABLING: Phase.DRAINING,
    Phase.DRAINING: Phase.OFF,
    Phase.OFF: Phase.OFF,
}

_WITHOUT_JOINING: Final = frozenset({Phase.DISABLING, Phase.DRAINING})
"""On the way to Off a node that is Off already stays so."""


def given(orders: Iterable[Order], *, fallback: Order) -> Order:
    """The order in force, from those already given. A phase spreads node by node, so the one furthest on
    is the cluster's; orders of older epochs are left-overs and say nothing. `fallback` counts where no
    order was given."""
    orders = tuple(orders)
    newest = max((order.epoch for order in orders), default=0)
    current = [order for order in orders if order.epoch == newest and order.phase is not Phase.OFF]
    if current:
        return max(current, key=lambda order: _RANK[order.phase])
    if orders:
        return Order(Phase.OFF, newest)
    return fallback


def following(
    order: Order,
    *,
    wanted: bool,
    highest_epoch: int,
    mesh_nodes: Collection[MeshNode],
    live: Collection[MeshNode],
) -> Order:
    """The order to give next; the same one while there is something to wait for. `mesh_nodes` are those of
    all nodes, `live` those of live nodes. Nothing moves on by the word of no node at all: when every Node
    looks dead, it is our view that is wrong."""
    if order.phase is Phase.OFF:
        return Order(Phase.ENABLING, highest_epoch + 1) if wanted else order
    if order.phase in (Phase.ENABLING, Phase.ENFORCING) and not wanted:
        return Order(Phase.DISABLING, order.epoch)
    if not live or not all(arrived(node, order) for node in mesh_nodes):
        return order
    if all(has_moved(node, order, live) for node in live):
        match order.phase:
            case Phase.ENABLING:
                return Order(Phase.ENFORCING, order.epoch)
            case Phase.DISABLING:
                return Order(Phase.DRAINING, order.epoch)
            case Phase.DRAINING:
                return Order(Phase.OFF, order.epoch)
    return order


def arrived(node: MeshNode, order: Order) -> bool:
    """The order was given to this node."""
    if order.phase in _WITHOUT_JOINING and node.spec.phase is Phase.OFF:
        return True
    return Order(node.spec.phase, node.spec.epoch) == order


def has_moved(node: MeshNode, order: Order, live: Collection[MeshNode]) -> bool:
    """The node reports, of its present spec, what the next phase waits for."""
    if order.phase in _WITHOUT_JOINING and node.spec.phase is Phase.OFF:
        return True
    if not node.current:
        return False
    match order.phase:
        case Phase.ENABLING:
            # A node that joined after the report must be among its peers, or Enforcing would cut the two
            # off.
            peers = sum(1 for peer in live if peer.name != node.name and peer.spec.public_key(order.epoch))
            return node.status.active_epoch == order.epoch and node.status.peers >= peers
        case Phase.ENFORCING:
            return node.status.active_epoch == order.epoch
        case Phase.DISABLING:
            return not node.status.strict
        case Phase.DRAINING | Phase.OFF:
            return node.status.active_epoch == 0


def order_for(current: Order | None, order: Order) -> Order:
    """What one node is told, while the cluster's order is `order`: the order itself, or, for a node that
    was left behind, the next step from where it is. `current` is what it was told last; None for a new
    node."""
    if current is None:
        return Order(Phase.OFF, order.epoch) if order.phase in _WITHOUT_JOINING else order
    if current == order:
        return order
    if current.phase is Phase.OFF and order.phase in (*_WITHOUT_JOINING, Phase.OFF):
        return Order(Phase.OFF, max(current.epoch, order.epoch))
    if current.phase is Phase.OFF or (
        current.epoch == order.epoch and order.phase in _ALLOWED[current.phase]
    ):
        return order
    return Order(_TOWARDS_OFF[current.phase], current.epoch)
