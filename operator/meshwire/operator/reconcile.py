"""From what is known of the cluster to what is to be written next. Pure: inputs in, actions out.

The actions of one plan are independent of one another; whoever applies them may stop, fail or crash after
any. What then is there is the input of the next plan. An empty plan means that all is as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain

from meshwire.api import conditions, names
from meshwire.api.conditions import Condition
from meshwire.api.fields import Network
from meshwire.api.meshconfig import MeshConfig, Mode, missing_families
from meshwire.api.meshnode import MeshNode, Phase, Spec
from meshwire.api.meshstatus import MeshStatus
from meshwire.operator import claims, phases, quarantine, rotation, secrecy, summary
from meshwire.operator.cidrs import Published, covers, without_cidr
from meshwire.operator.claims import Conflict, Share
from meshwire.operator.objects import Config, EpochSecret, KeySecret, Node
from meshwire.operator.phases import Live, Order
from meshwire.operator.secrecy import Next, Secrecy
from meshwire.operator.summary import Pressure

ISSUING = frozenset({Phase.ENABLING, Phase.ENFORCING})
"""Phases in which nodes get keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything by node name, epoch secrets by epoch. `status` None: there is no MeshStatus yet.
    `found_cidrs`: what the cluster's own configuration tells of its pod CIDRs; None where it couldn't be
    read. `recent_ids`: numbers freed lately, the longest free first. `published`: what agents can know of
    pods on nodes without CIDR. `pressure` None: not known yet."""

    nodes: Mapping[str, Node]
    mesh_nodes: Mapping[str, MeshNode]
    secrets: Mapping[str, KeySecret]
    config: Config | None
    status: MeshStatus | None
    found_cidrs: tuple[Network, ...] | None
    recent_ids: tuple[int, ...]
    now: datetime
    published: Published = Published()
    pressure: Pressure | None = None
    epoch_secrets: Mapping[str, EpochSecret] = field(default_factory=dict)

    @property
    def mesh_config(self) -> MeshConfig | None:
        """None where there is none, or none that can be acted upon."""
        return self.config.config if self.config else None


@dataclass(frozen=True, slots=True)
class CreateMeshNode:
    node: str
    owner: str
    """uid of the Node"""
    spec: Spec


@dataclass(frozen=True, slots=True)
class PatchSpec:
    """`stolen`: the node's keys are withdrawn with this because its sealing key is another."""

    node: str
    resource_version: str
    spec: Spec
    stolen: bool = False


@dataclass(frozen=True, slots=True)
class DeleteMeshNode:
    """`owner`: uid of the Node that is gone."""

    node: str
    uid: str
    owner: str


@dataclass(frozen=True, slots=True)
class IssueKey:
    """A new key pair for the node and the epoch, into the Secret; `secret` is the one to replace, of which
    the key of epoch `beside` stays. `renewed` where a key of this epoch was there before. `secret_digest`:
    of the epoch secret that goes with it; empty: none does."""

    node: str
    epoch: int
    sealing_key: str
    owner: str
    """uid of the MeshNode"""
    secret: KeySecret | None
    renewed: bool
    beside: int = 0
    secret_digest: str = ""


@dataclass(frozen=True, slots=True)
class MakeEpochSecret:
    """Unless there is one."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DeleteEpochSecret:
    secret: EpochSecret


@dataclass(frozen=True, slots=True)
class WithdrawKeys:
    """Keys of epochs that have ended go out of the Secret."""

    secret: KeySecret
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdoptSecret:
    """The Secret names a MeshNode that is gone as its owner: name the present one."""

    secret: KeySecret
    owner: str


@dataclass(frozen=True, slots=True)
class DeleteSecret:
    secret: KeySecret


@dataclass(frozen=True, slots=True)
class LiftTaint:
    node: str


@dataclass(frozen=True, slots=True)
class WriteConfigStatus:
    resource_version: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """`create`: the MeshStatus has to be made first. `under_pressure`: policy maps of some node fill up, as
    they did not before. `previous` is the status before; `left_out` are nodes that a rotation which ends
    with this didn't wait for. `secret_lost`: the epoch secret is gone, and only another epoch helps."""

    status: MeshStatus
    create: bool
    previous: MeshStatus
    under_pressure: bool = False
    left_out: tuple[str, ...] = ()
    secret_lost: bool = False


Action = (
    CreateMeshNode
    | PatchSpec
    | DeleteMeshNode
    | IssueKey
    | MakeEpochSecret
    | DeleteEpochSecret
    | WithdrawKeys
    | AdoptSecret
    | DeleteSecret
    | LiftTaint
    | WriteConfigStatus
    | WriteStatus
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`conflicts` and `status` are for events and metrics; None: not looked for this time. `look_again`:
    when there is something to do though nothing else has changed; None: no such time."""

    actions: tuple[Action, ...] = ()
    conflicts: tuple[Conflict, ...] | None = None
    status: MeshStatus = field(default_factory=MeshStatus)
    look_again: datetime | None = None


def reconcile(inputs: Inputs) -> Plan:
    """The next writes."""
    # A Node that was deleted and made anew under its old name is another node: its MeshNode has to go first.
    departed = {
        name: node
        for name, node in inputs.mesh_nodes.items()
        if name not in inputs.nodes or (node.owner and node.owner != inputs.nodes[name].uid)
    }
    if departed:
        # Alone: a new node often has the number, the address or the pod CIDRs of one that has just gone.
        return Plan(
            actions=tuple(
                DeleteMeshNode(name, node.uid, node.owner) for name, node in sorted(departed.items())
            ),
            status=inputs.status or MeshStatus(),
        )
    nodes, mesh_nodes = inputs.nodes, inputs.mesh_nodes
    previous = inputs.status or MeshStatus()

    highest = highest_epoch(inputs)
    live = _live(inputs)
    config = inputs.mesh_config
    order = _next_order(inputs, previous, highest, live)
    highest = max(highest, order.epoch)
    secret = _secrecy(inputs, order)
    cidrs, problem, scope = _cluster_cidrs(inputs, nodes)
    shares, conflicts = claims.settle(nodes, mesh_nodes, inputs.secrets)
    quarantines = quarantine.follow(
        previous.quarantines,
        mesh_nodes,
        live=[name for name, node in nodes.items() if node.live],
        now=inputs.now,
    )
    numbers = claims.allocate_ids(
        sorted(nodes, key=lambda name: (nodes[name].created, name)),
        inputs.mesh_nodes,
        recent=inputs.recent_ids,
    )
    for name in nodes:
        if _is_stolen(mesh_nodes.get(name), inputs.secrets.get(name)):
            # Nobody is to take the old keys for the node's any more when it gets new ones.
            shares[name].keys.clear()
    specs = {
        name: _spec(
            mesh_nodes.get(name),
            numbers[name],
            shares[name],
            cidrs,
            order,
            quarantine.revocation_of(mesh_nodes.get(name), quarantines, has_secret=name in inputs.secrets),
        )
        for name in sorted(nodes)
        if name in numbers
    }
    status = summary.summarize(
        summary.View(
            nodes=inputs.nodes,
            mesh_nodes=mesh_nodes,
            order=order,
            highest_epoch=highest,
            mode=config.encryption.mode if config else Mode.STRICT,
            has_keys=any(secret.public_key(order.epoch) for secret in inputs.secrets.values()),
            conflicts=conflicts,
            config_problem=problem,
            scope=scope,
            pressure=inputs.pressure,
            quarantines=quarantines,
            previous=previous,
            rotated=rotation.follow(
                previous,
                order,
                config=config,
                may_begin=bool(live.nodes)
                and all(phases.arrived(node, order) for node in mesh_nodes.values()),
                moved=phases.all_rotated(order, live),
                secret_lost=secret.next is Next.ANOTHER_EPOCH,
                now=inputs.now,
            ),
            now=inputs.now,
        )
    )
    actions = chain(
        _secret_actions(inputs, order, secret),
        _epoch_secret_actions(inputs, order, secret),
        (
            CreateMeshNode(name, nodes[name].uid, spec)
            for name, spec in specs.items()
            if name not in mesh_nodes
        ),
        (
            PatchSpec(
                name,
                mesh_nodes[name].resource_version,
                spec,
                bool(mesh_nodes[name].spec.keys)
                and not spec.keys
                and not spec.is_out
                and _is_stolen(mesh_nodes[name], inputs.secrets.get(name)),
            )
            for name, spec in specs.items()
            if name in mesh_nodes and mesh_nodes[name].spec != spec
        ),
        (
            LiftTaint(name)
            for name, node in sorted(nodes.items())
            if node.tainted and name in mesh_nodes and _is_guarded(mesh_nodes[name], inputs)
        ),
        _config_actions(inputs, problem),
        (
            [
                WriteStatus(
                    status,
                    inputs.status is None,
                    previous,
                    _begins(previous, status),
                    _left_out(inputs, previous, status, order),
                    secret.next is Next.ANOTHER_EPOCH,
                )
            ]
            if inputs.status is None or status != inputs.status
            else []
        ),
    )
    times = (rotation.overlap_ends(order, status, config), rotation.falls_due(order, status, config))
    return Plan(
        actions=tuple(actions),
        conflicts=conflicts,
        status=status,
        look_again=min((time for time in times if time is not None), default=None),
    )


def highest_epoch(inputs: Inputs) -> int:
    """Over everything the operator itself has written: no agent can push it up."""
    return max(
        chain(
            [inputs.status.epoch if inputs.status else 0],
            (node.spec.epoch for node in inputs.mesh_nodes.values()),
            (node.spec.retiring for node in inputs.mesh_nodes.values()),
            (key.epoch for node in inputs.mesh_nodes.values() for key in node.spec.keys),
            (key.epoch for secret in inputs.secrets.values() for key in secret.keys),
            (secret.epoch for secret in inputs.epoch_secrets.values()),
        )
    )


def _next_order(inputs: Inputs, previous: MeshStatus, highest: int, live: Live) -> Order:
    mesh_nodes = inputs.mesh_nodes
    # All nodes gone at once and back again: what enforced before enforces still.
    fallback = (
        Order(Phase.ENFORCING, previous.epoch)
        if previous.phase is Phase.ENFORCING
        else Order(Phase.OFF, highest)
    )
    order = phases.given((phases.order_of(node.spec) for node in mesh_nodes.values()), fallback=fallback)
    config = inputs.mesh_config
    if inputs.config and config is None:
        # It can't be read: nobody can say what is wanted.
        return order
    # Without a node nobody could be given the order, and each look would begin another epoch.
    wanted = bool(config and config.encryption.enabled and (inputs.nodes or order.phase is not Phase.OFF))
    if order.phase is Phase.OFF and without_cidr(inputs.nodes.values()) and not inputs.published.complete:
        # Who knows a pod that its peer doesn't know yet sends what that one throws away.
        wanted = False
    overlap_ends = rotation.overlap_ends(order, previous, config)
    return phases.following(
        order,
        wanted=wanted,
        rotate=rotation.is_decided(order, previous),
        retire=overlap_ends is not None and inputs.now >= overlap_ends,
        highest_epoch=highest,
        mesh_nodes=tuple(mesh_nodes.values()),
        live=live,
    )


def _live(inputs: Inputs) -> Live:
    """Of live nodes; none while one of them has no MeshNode. Nothing waits for a node in quarantine."""
    if not all(name in inputs.mesh_nodes for name, node in inputs.nodes.items() if node.live):
        return Live()
    return Live.of(
        node for name, node in inputs.mesh_nodes.items() if inputs.nodes[name].live and not node.spec.is_out
    )


def _is_guarded(node: MeshNode, inputs: Inputs) -> bool:
    """All that the MeshConfig asks for is in force on the node: pods may come. Where nobody can say what is
    wanted, they wait."""
    config = inputs.mesh_config
    if inputs.config and config is None:
        return False
    judges = inputs.pressure is not None and node.name in inputs.pressure.judging
    return node.ready and not node.spec.is_out and (judges or not (config and config.policy.enabled))


def _is_stolen(node: MeshNode | None, secret: KeySecret | None) -> bool:
    """The node has another sealing key than the one its keys are sealed to: its disk was lost, and whoever
    has it has them."""
    return (
        node is not None
        and secret is not None
        and node.status.sealing_key is not None
        and secret.owner == node.uid
        and secret.sealed_to != node.status.sealing_key
    )


def _left_out(inputs: Inputs, previous: MeshStatus, status: MeshStatus, order: Order) -> tuple[str, ...]:
    """Nodes that weren't live when a rotation came to its end, and haven't moved."""
    if status.rotations == previous.rotations:
        return ()
    return tuple(
        sorted(
            name
            for name, node in inputs.mesh_nodes.items()
            if not inputs.nodes[name].live
            and not node.spec.is_out
            and node.status.active_epoch != order.epoch
        )
    )


def _spec(
    current: MeshNode | None,
    number: int,
    share: Share,
    cidrs: tuple[Network, ...],
    order: Order,
    revocation: int,
) -> Spec:
    told = phases.order_of(current.spec) if current else None
    own = phases.order_for(told, order)
    return Spec(
        id=number,
        addresses=tuple(share.addresses),
        pod_cidrs=tuple(share.pod_cidrs),
        cluster_cidrs=cidrs,
        keys=()
        if own.phase is Phase.OFF or revocation
        else tuple(key for key in share.keys if key.epoch in (own.epoch, own.retiring)),
        phase=own.phase,
        epoch=own.epoch,
        retiring=own.retiring,
        quarantined=current is not None and current.spec.quarantined,
        revocation=revocation,
    )


def _secrecy(inputs: Inputs, order: Order) -> Secrecy:
    """Of the order's epoch."""
    if order.phase not in ISSUING:
        return Secrecy(Next.NOTHING)
    keys = chain(
        (key for node in inputs.mesh_nodes.values() for key in node.spec.keys),
        (key for secret in inputs.secrets.values() for key in secret.keys),
    )
    config = inputs.mesh_config
    return secrecy.of_epoch(
        {key.secret_digest for key in keys if key.epoch == order.epoch},
        inputs.epoch_secrets.get(str(order.epoch)),
        wanted=config.encryption.preshared_keys if config else True,
    )


def _epoch_secret_actions(inputs: Inputs, order: Order, secret: Secrecy) -> Iterable[Action]:
    orders = [phases.order_of(node.spec) for node in inputs.mesh_nodes.values()]
    # Its order comes first, as with keys.
    if secret.next is Next.SECRET and any(given.epoch == order.epoch for given in orders):
        yield MakeEpochSecret(order.epoch)
    used = {key.epoch for node in inputs.mesh_nodes.values() for key in node.spec.keys}
    for each in (order, *orders):
        if each.phase is not Phase.OFF:
            used |= {each.epoch, each.retiring}
    for _, kept in sorted(inputs.epoch_secrets.items()):
        if kept.epoch not in used:
            yield DeleteEpochSecret(kept)


def _secret_actions(inputs: Inputs, order: Order, secrecy: Secrecy) -> list[Action]:
    actions: list[Action] = []
    mesh_nodes = inputs.mesh_nodes
    # Off may be ordered while some node has not heard of it: keys go when every order says Off.
    off = order.phase is Phase.OFF and all(
        node.spec.phase is Phase.OFF and not node.spec.keys for node in mesh_nodes.values()
    )
    for name, secret in sorted(inputs.secrets.items()):
        # A MeshNode goes before its Secret, so that the others let go of the node before its key is gone.
        # One that somebody deleted by hand comes back, and takes up its Secret.
        if name not in inputs.nodes or off:
            actions.append(DeleteSecret(secret))
        elif name not in mesh_nodes:
            continue
        elif mesh_nodes[name].spec.revocation:
            # Published nowhere any more: what is left of them is the node's own copy.
            actions.append(DeleteSecret(secret))
        elif secret.owner != mesh_nodes[name].uid:
            actions.append(AdoptSecret(secret, mesh_nodes[name].uid))
    if order.phase not in ISSUING:
        return actions
    for name, node in sorted(mesh_nodes.items()):
        known = inputs.secrets.get(name)
        # Its order comes first: an epoch that is in no spec could be forgotten, and used again.
        if phases.order_of(node.spec) != order or node.spec.is_out or (known and known.owner != node.uid):
            continue
        sealing_key = node.status.sealing_key
        key = known.key(order.epoch) if known else None
        lost = secrecy.next is Next.ANOTHER_EPOCH
        # Where the epoch secret is lost, whoever has a key keeps it.
        has_key = key is not None and (lost or key.secret_digest == secrecy.digest)
        if sealing_key and (known is None or not has_key or known.sealed_to != sealing_key):
            if secrecy.next is not Next.NOTHING or (_is_stolen(node, known) and node.spec.keys):
                continue
            renewed = key is not None or node.spec.public_key(order.epoch) is not None
            beside = order.retiring if known and known.sealed_to == sealing_key else 0
            actions.append(
                IssueKey(name, order.epoch, sealing_key, node.uid, known, renewed, beside, secrecy.digest)
            )
            continue
        used = {order.epoch, order.retiring, *(key.epoch for key in node.spec.keys)}
        if known and (ended := tuple(key.epoch for key in known.keys if key.epoch not in used)):
            actions.append(WithdrawKeys(known, ended))
    return actions


def _cluster_cidrs(
    inputs: Inputs, nodes: Mapping[str, Node]
) -> tuple[tuple[Network, ...], str, summary.Scope]:
    """The cluster CIDRs to order, what is wrong with the MeshConfig (or nothing), and what Strict covers."""
    last_good = next(
        (
            node.spec.cluster_cidrs
            for _, node in sorted(inputs.mesh_nodes.items())
            if node.spec.cluster_cidrs
        ),
        (),
    )
    config = inputs.mesh_config
    if inputs.config and config is None:
        return last_good, inputs.config.problem, _scope(last_good, inputs)
    asked = config.network.cluster_cidrs if config else ()
    if asked:
        if problem := _node_inside(asked, nodes):
            return last_good, f"spec.network.clusterCIDRs: {problem}", _scope(last_good, inputs)
        return asked, "", _scope(asked, inputs)
    if inputs.found_cidrs is None:
        return last_good, "", _scope(last_good, inputs)
    if problem := _node_inside(inputs.found_cidrs, nodes):
        scope = summary.Scope(
            whole=False,
            reason="ClusterCIDRsUnusable",
            message=f"the cluster's configuration says {_join(inputs.found_cidrs)}, but {problem};"
            " Strict covers the pod CIDRs of known nodes only",
        )
        return (), "", scope
    return inputs.found_cidrs, "", _scope(inputs.found_cidrs, inputs)


def _node_inside(cidrs: tuple[Network, ...], nodes: Mapping[str, Node]) -> str:
    """Strict drops what goes to a pod address of no known node: a node's own address must not count as
    one."""
    for name, node in sorted(nodes.items()):
        for address in node.addresses:
            for cidr in cidrs:
                if address in cidr:
                    return f"{cidr} holds {address}, the address of node {name} itself"
    return ""


def _scope(cidrs: tuple[Network, ...], inputs: Inputs) -> summary.Scope:
    nodes = inputs.nodes
    if (lacking := without_cidr(nodes.values(), also_dead=bool(inputs.published.families))) and (
        missing := missing_families(cidrs, inputs.published.families)
    ):
        return summary.Scope(
            whole=False,
            reason=names.CLUSTER_CIDR_MISSING,
            message=f"no cluster CIDR {_of(missing)} is known, and there are nodes without pod CIDR"
            f" ({summary.listed(lacking)}): packets to a pod that is not known yet leave in clear; set"
            " spec.network.clusterCIDRs",
        )
    if not cidrs:
        return summary.Scope(
            whole=False,
            reason="ClusterCIDRsUnknown",
            message="Strict covers the pod CIDRs of known nodes only: set spec.network.clusterCIDRs",
        )
    outside = [
        name for name, node in nodes.items() if not all(covers(cidrs, block) for block in node.pod_cidrs)
    ]
    if outside:
        return summary.Scope(
            whole=False,
            reason="PodCIDROutside",
            message=f"pod CIDRs of {summary.listed(outside)} lie outside {_join(cidrs)}: of these, Strict"
            " covers known nodes only",
        )
    return summary.Scope(
        whole=True, reason="ClusterCIDRsKnown", message=f"Strict covers all of {_join(cidrs)}"
    )


def _of(families: Iterable[int]) -> str:
    return " or ".join(f"of IPv{version}" for version in sorted(families))


def _join(cidrs: tuple[Network, ...]) -> str:
    return ", ".join(str(cidr) for cidr in cidrs)


def _begins(previous: MeshStatus, status: MeshStatus) -> bool:
    before, now = (
        conditions.find(each.conditions, conditions.POLICY_MAP_PRESSURE) for each in (previous, status)
    )
    return bool(now and now.status) and not (before and before.status)


def _config_actions(inputs: Inputs, problem: str) -> list[Action]:
    config = inputs.config
    if config is None:
        return []
    result = conditions.set_condition(
        config.conditions,
        type=conditions.ACCEPTED,
        status=not problem,
        reason="Contradicted" if problem else "Accepted",
        message=f"{problem}; the last good state stays in force" if problem else "",
        observed_generation=config.generation,
        now=inputs.now,
    )
    return [] if result == config.conditions else [WriteConfigStatus(config.resource_version, result)]
