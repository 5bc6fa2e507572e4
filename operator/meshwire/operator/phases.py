"""Which phase the cluster is in, and when it moves on: the table of docs/architecture.md. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from meshwire.api.meshnode import MeshNode, Phase, Spec


@dataclass(frozen=True, slots=True)
class Order:
    """What a node is told to do. `retiring`: the epoch before, still in use beside `epoch`; 0: none."""

    phase: Phase
    epoch: int
    retiring: int = 0


@dataclass(frozen=True, slots=True)
class Live:
    """The MeshNodes of live nodes, and what each of them is held against, found once for all: `by_number`
    their names, `keyed` by epoch who publishes a key."""

    nodes: tuple[MeshNode, ...] = ()
    by_number: Mapping[int, frozenset[str]] = field(default_factory=dict)
    keyed: Mapping[int, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[MeshNode]) -> Live:
        nodes = tuple(nodes)
        by_number: dict[int, set[str]] = {}
        keyed: dict[int, set[str]] = {}
        for node in nodes:
            # While an older node has the number too, there are two of it.
            by_number.setdefault(node.spec.id, set()).add(node.name)
            for key in node.spec.keys:
                keyed.setdefault(key.epoch, set()).add(node.name)
        return cls(
            nodes,
            {number: frozenset(names) for number, names in by_number.items()},
            {epoch: frozenset(names) for epoch, names in keyed.items()},
        )


def order_of(spec: Spec) -> Order:
    """The order that a MeshNode's spec holds."""
    return Order(spec.phase, spec.epoch, spec.retiring)


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
        furthest = max(current, key=lambda order: _RANK[order.phase])
        # No order of an epoch takes up the one before again: the first without it is the end of it.
        return replace(furthest, retiring=min(order.retiring for order in current))
    if orders:
        return Order(Phase.OFF, newest)
    return fallback


def following(
    order: Order,
    *,
    wanted: bool,
    rotate: bool = False,
    retire: bool = False,
    highest_epoch: int,
    mesh_nodes: Collection[MeshNode],
    live: Live,
) -> Order:
    """The order to give next; the same one while there is something to wait for. `mesh_nodes` are those of
    all nodes. `rotate`: new keys are wanted; `retire`: the overlap is over.
    Nothing moves on by the word of no node at all: when every Node
    looks dead, it is our view that is wrong."""
    if order.phase is Phase.OFF:
        return Order(Phase.ENABLING, highest_epoch + 1) if wanted else order
    if order.phase in (Phase.ENABLING, Phase.ENFORCING) and not wanted:
        return Order(Phase.DISABLING, order.epoch, order.retiring)
    if not live.nodes or not all(arrived(node, order) for node in mesh_nodes):
        return order
    if order.phase is Phase.ENFORCING:
        if order.retiring:
            return replace(order, retiring=0) if retire and all_rotated(order, live) else order
        if not rotate:
            return order
        return Order(Phase.ENFORCING, next_epoch(order.epoch, highest_epoch), retiring=order.epoch)
    if all(has_moved(node, order, live) for node in live.nodes):
        match order.phase:
            case Phase.ENABLING:
                return Order(Phase.ENFORCING, order.epoch)
            case Phase.DISABLING:
                return Order(Phase.DRAINING, order.epoch, order.retiring)
            case Phase.DRAINING:
                return Order(Phase.OFF, order.epoch)
    return order


def next_epoch(epoch: int, highest: int) -> int:
    """The lowest that was never used and lives on the other device than `epoch`."""
    return highest + 1 if (highest + 1 - epoch) % 2 else highest + 2


def all_rotated(order: Order, live: Live) -> bool:
    """Of a rotation: no live node sends to another by the old keys, or will. A node that never had one need
    not be asked."""
    concerned = [node for node in live.nodes if node.spec.public_key(order.retiring)]
    return any(has_moved(node, order, live) for node in live.nodes) and all(
        has_moved(node, order, live) for node in concerned
    )


def arrived(node: MeshNode, order: Order) -> bool:
    """The order was given to this node."""
    if order.phase in _WITHOUT_JOINING and node.spec.phase is Phase.OFF:
        return True
    return order_of(node.spec) == order


def has_moved(node: MeshNode, order: Order, live: Live) -> bool:
    """The node reports, of its present spec, what the next phase waits for."""
    if order.phase in _WITHOUT_JOINING and node.spec.phase is Phase.OFF:
        return True
    if not node.current:
        return False
    match order.phase:
        case Phase.ENABLING:
            # A node that joined after the report must be among its peers, or Enforcing would cut the two
            # off.
            keyed = live.keyed.get(order.epoch, frozenset())
            peers = len(keyed) - (node.name in keyed)
            return node.status.active_epoch == order.epoch and node.status.peers >= peers
        case Phase.ENFORCING:
            # What it doesn't reach by the new keys was not live for it, and may be for us.
            return node.status.active_epoch == order.epoch and not (order.retiring and unreached(node, live))
        case Phase.DISABLING:
            return not node.status.strict
        case Phase.DRAINING | Phase.OFF:
            return node.status.active_epoch == 0


def unreached(node: MeshNode, live: Live) -> frozenset[str]:
    """Live nodes to which it reports that it doesn't send by the order's epoch yet."""
    return frozenset().union(*(live.by_number.get(number, ()) for number in node.status.unreached))


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
        current.epoch == order.epoch and order.phase in (current.phase, *_ALLOWED[current.phase])
    ):
        return order
    if (
        current.phase is Phase.ENFORCING
        and order.epoch > current.epoch
        and order.phase in (Phase.ENFORCING, Phase.DISABLING)
    ):
        # A rotation has begun, or several have passed: there is no need to go through plaintext.
        return order
    step = _TOWARDS_OFF[current.phase]
    return Order(step, current.epoch, 0 if step is Phase.OFF else current.retiring)
