"""MeshStatus: what all nodes' answers come to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from meshwire.api import conditions, names
from meshwire.api.meshconfig import Mode
from meshwire.api.meshnode import MeshNode, Phase
from meshwire.api.meshpolicyreport import MAP_FULL, MapPressure
from meshwire.api.meshstatus import MeshStatus, Quarantine
from meshwire.operator.claims import Conflict
from meshwire.operator.objects import Node
from meshwire.operator.pairs import judge_pairs
from meshwire.operator.phases import Live, Order, has_moved, unreached
from meshwire.operator.quarantine import MAX_TOLD
from meshwire.operator.rotation import Rotated

MAX_NAMES: Final = 5
"""Nodes a message names before it only counts."""

MAX_LEAKED: Final = 2**63 - 1
"""What the API can hold: one node that reports nonsense must not keep the others' numbers from being
written."""

NEEDS_A_PERSON: Final = frozenset(
    {
        "DeviceNotFound",
        "UplinkNotFound",
        "WireGuardUnavailable",
        "DatapathRefused",
        "DuplicateKey",
        "KeyRefused",
        names.CLUSTER_CIDR_MISSING,
    }
)
"""Reasons of an agent that waiting does not cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whether Strict covers every pod address, also of nodes nobody knows yet."""

    whole: bool
    reason: str
    message: str


LEFT_OUT: Final[Mapping[str, str]] = {
    "identities": "addresses are unknown",
    "services": "services are judged as ordinary addresses",
}
"""What becomes of whatever a map has no room for; in any other, pods are closed."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the nodes report of their policy maps. `enabled`: any node judges packets by policies; `nodes`:
    maps that fill up, of those nodes that have such; `judging`: which nodes do judge."""

    enabled: bool
    nodes: Mapping[str, tuple[MapPressure, ...]]
    judging: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What `summarize` looks at. `order` is the one in force, `has_keys` whether any key of its epoch
    exists, `rotated` how far the change of keys is, `config_problem` why the MeshConfig is not acted upon.
    `pressure` None: not known yet."""

    nodes: Mapping[str, Node]
    mesh_nodes: Mapping[str, MeshNode]
    order: Order
    highest_epoch: int
    mode: Mode
    has_keys: bool
    conflicts: Sequence[Conflict]
    config_problem: str
    scope: Scope
    pressure: Pressure | None
    quarantines: tuple[Quarantine, ...]
    previous: MeshStatus
    rotated: Rotated
    now: datetime


def summarize(view: View) -> MeshStatus:
    """The new status; equal to `previous` where nothing changed."""
    phase = view.order.phase
    out = {name for name, node in view.mesh_nodes.items() if node.spec.is_out}
    live = [name for name, node in sorted(view.nodes.items()) if node.live and name not in out]
    dead = [name for name, node in sorted(view.nodes.items()) if not node.live and name not in out]
    answers = {name: view.mesh_nodes[name] for name in live if name in view.mesh_nodes}
    peers = Live.of(answers.values())
    late = frozenset(name for name, node in answers.items() if not _is_prepared(node, view.order))
    moved = [name for name, node in answers.items() if _has_moved(node, view.order, peers, late)]
    waiting = {name: problem for name in live if (problem := _problem(view, answers.get(name), peers))}
    hopeless = {
        name: problem for name, problem in waiting.items() if _reason(answers.get(name)) in NEEDS_A_PERSON
    }

    nodes, ready = len(view.nodes), len(live) - len(waiting)
    changing = phase in (Phase.ENABLING, Phase.DISABLING, Phase.DRAINING)
    refused = [conflict.message for conflict in view.conflicts]
    if view.config_problem:
        refused.insert(0, f"MeshConfig: {view.config_problem}")
    left_out = f"; not live: {listed(dead)}" if dead else ""
    left_out += f"; quarantined: {listed(out)}" if out else ""

    if refused:
        reason = view.conflicts[0].reason if view.conflicts else "MeshConfigNotAccepted"
        ready_state = (False, reason, "; ".join(refused))
    elif not live and phase is not Phase.OFF:
        ready_state = (False, "NoLiveNodes", f"no node is live{left_out}")
    elif changing:
        verb = "moved into the tunnels" if phase is Phase.ENABLING else "left the tunnels"
        who = f", waiting for {listed(waiting, waiting.get)}" if waiting else ""
        ready_state = (
            False,
            str(phase),
            f"{len(moved)} of {len(live)} live nodes have {verb}{who}{left_out}",
        )
    elif view.order.retiring and not waiting:
        behind = sorted(set(live) - set(moved))
        who = (
            f", waiting for {listed(behind, lambda name: _late(view, answers.get(name), peers))}"
            if behind
            else ""
        )
        ready_state = (
            True,
            "Rotating",
            f"{len(moved)} of {len(live)} live nodes send by epoch {view.order.epoch} alone{who}{left_out}",
        )
    elif waiting:
        ready_state = (False, "NodesNotReady", f"waiting for {listed(waiting, waiting.get)}{left_out}")
    elif phase is Phase.OFF:
        ready_state = (True, "Off", f"traffic between nodes is not encrypted{left_out}")
    else:
        ready_state = (
            True,
            "Encrypted",
            f"all {len(live)} live nodes send only through WireGuard{left_out}",
        )

    stalled_by = [*refused, *([listed(hopeless, hopeless.get)] if hopeless else [])]
    busy = changing or bool(waiting) or bool(view.order.retiring)
    # These are there once there was something to say.
    optional = (
        (conditions.POLICY_MAP_PRESSURE, _pressure(view)),
        (conditions.PAIRS_HEALTHY, judge_pairs(answers, live, phase, view.previous)),
        (conditions.QUARANTINE, _quarantine(view)),
    )
    result: tuple[conditions.Condition, ...] = view.previous.conditions
    for type, status, reason, message in (
        (conditions.READY, *ready_state),
        (
            (conditions.RECONCILING, True, "Progressing", ready_state[2])
            if busy and not stalled_by
            else (conditions.RECONCILING, False, "Stalled" if stalled_by else "UpToDate", "")
        ),
        (
            (conditions.STALLED, True, ready_state[1] if refused else "NodesNeedHelp", "; ".join(stalled_by))
            if stalled_by
            else (conditions.STALLED, False, "Working", "")
        ),
        (conditions.STRICT_SCOPE, view.scope.whole, view.scope.reason, view.scope.message),
        *((type, *state) for type, state in optional if state),
    ):
        result = conditions.set_condition(
            result,
            type=type,
            status=status,
            reason=reason,
            message=message,
            # A MeshStatus has no spec: its generation stays 1.
            observed_generation=1,
            now=view.now,
        )
    return MeshStatus(
        encryption=_encryption(view, len(moved), len(live)),
        phase=phase,
        epoch=view.highest_epoch,
        epoch_started_at=_started(view),
        rotation=view.rotated.rotation,
        last_rotation=view.rotated.last,
        rotations=view.rotated.count,
        handled_request=view.rotated.handled,
        quarantines=view.quarantines[:MAX_TOLD],
        nodes=nodes,
        nodes_ready=ready,
        leaked=min(
            sum(node.status.leaked for name, node in view.mesh_nodes.items() if name in view.nodes),
            MAX_LEAKED,
        ),
        conditions=result,
        uid=view.previous.uid,
        resource_version=view.previous.resource_version,
    )


def listed(names: Collection[str], detail: Callable[[str], str | None] = lambda name: None) -> str:
    """`a, b (why) and 12 more`."""
    shown = [f"{name} ({why})" if (why := detail(name)) else name for name in sorted(names)[:MAX_NAMES]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _quarantine(view: View) -> tuple[bool, str, str] | None:
    """Status, reason and message of the condition; None: there was never one."""
    if not view.quarantines:
        is_known = conditions.find(view.previous.conditions, conditions.QUARANTINE)
        return (False, "NoneQuarantined", "") if is_known else None
    known = {each.node: each for each in view.quarantines}

    def words(name: str) -> str:
        each = known[name]
        if each.waiting:
            more = each.waiting - len(each.waiting_for)
            rest = f" and {more} more" if more else ""
            return f"still a peer of {', '.join(each.waiting_for)}{rest}"
        return f"no peer of any live node, after {each.seconds:.1f} s" if each.revoked_at else "no live node"

    lifting = all(not view.mesh_nodes[name].spec.quarantined for name in known if name in view.mesh_nodes)
    waiting = any(not each.revoked_at or each.waiting for each in view.quarantines)
    reason = "Lifting" if lifting else "Revoking" if waiting else "Revoked"
    return True, reason, listed(known, words)


def _pressure(view: View) -> tuple[bool, str, str] | None:
    """Status, reason and message of the condition; None: as it is. It is not there before policy was on."""
    if view.pressure is None:
        return None
    if not view.pressure.enabled:
        is_known = conditions.find(view.previous.conditions, conditions.POLICY_MAP_PRESSURE)
        return (False, "PolicyDisabled", "") if is_known else None
    # A node that is not live goes on judging by what its maps hold, but nobody can say how full they are.
    nodes = {
        name: found
        for name, found in view.pressure.nodes.items()
        if name in view.nodes and view.nodes[name].live
    }
    if not nodes:
        return False, "MapsHaveRoom", ""
    full = {name for name, found in nodes.items() if any(each.full for each in found)}

    def words(name: str) -> str:
        return ", ".join(_fill(each) for each in nodes[name])

    if full:
        return True, MAP_FULL, f"policy maps of these nodes are full: {listed(full, words)}"
    return True, "MapsFillUp", f"policy maps of these nodes fill up: {listed(nodes, words)}"


def _fill(each: MapPressure) -> str:
    share = 100 * each.entries // max(1, each.capacity)
    if not each.full:
        return f"{each.map}: {share} % of {each.capacity} entries"
    return f"{each.map}: {LEFT_OUT.get(each.map, 'pods are closed')}, no room in {each.capacity} entries"


def _problem(view: View, node: MeshNode | None, live: Live) -> str:
    """What keeps a live node from being ready, in few words; empty if nothing does."""
    if node is None or not node.status.observed_generation:
        return "no word from its agent"
    ready = conditions.find(node.status.conditions, conditions.READY)
    if ready and ready.status is not True:
        return f"{ready.reason}: {_first_sentence(ready.message)}" if ready.message else ready.reason
    if not node.ready:
        return "has not taken its last orders yet"
    if not (
        node.status.active_epoch in (view.order.epoch, view.order.retiring)
        if view.order.phase is Phase.ENFORCING and view.order.retiring
        else has_moved(node, view.order, live)
    ):
        return "still on its way"
    if view.order.phase is Phase.ENFORCING and view.mode is Mode.STRICT and not node.status.strict:
        return "plaintext is not dropped there yet"
    return ""


def _has_moved(node: MeshNode, order: Order, live: Live, late: frozenset[str]) -> bool:
    """As has_moved; but in a rotation a node that waits for nothing but others that are `late` has done its
    part."""
    if has_moved(node, order, live):
        return True
    if not (order.phase is Phase.ENFORCING and order.retiring and node.status.unreached):
        return False
    return _is_prepared(node, order) and unreached(node, live) <= late


def _is_prepared(node: MeshNode, order: Order) -> bool:
    return node.current and node.status.prepared_epoch == order.epoch


def _late(view: View, node: MeshNode | None, live: Live) -> str:
    if node is None or not node.current:
        return "its agent doesn't answer"
    if not _is_prepared(node, view.order):
        return f"epoch {view.order.epoch} isn't set up there"
    return f"not reached yet: {names}" if (names := listed(unreached(node, live))) else "on its way"


def _reason(node: MeshNode | None) -> str:
    ready = conditions.find(node.status.conditions, conditions.READY) if node else None
    return ready.reason if ready and ready.status is False else ""


def _first_sentence(message: str) -> str:
    return message if len(message) <= 120 else message[:119] + "…"


def _encryption(view: View, moved: int, live: int) -> str:
    match view.order.phase:
        case Phase.OFF:
            return "Off"
        case Phase.ENABLING:
            return f"Enabling {moved}/{live}"
        case Phase.ENFORCING if view.order.retiring:
            return f"Rotating {moved}/{live}"
        case Phase.ENFORCING:
            return "WireGuard" if view.mode is Mode.STRICT else "Permissive"
        case Phase.DISABLING | Phase.DRAINING:
            return f"Disabling {moved}/{live}"


def _started(view: View) -> str:
    if view.order.phase is Phase.OFF:
        return ""
    if view.rotated.in_force_since:
        return view.rotated.in_force_since
    if view.previous.epoch_started_at and (view.previous.epoch == view.highest_epoch or view.order.retiring):
        return view.previous.epoch_started_at
    return conditions.timestamp(view.now) if view.has_keys else ""
