"""From Meshwire's objects to what is wrong, why it matters and what to do. Pure: objects, time in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from meshwire.api import conditions, names
from meshwire.api.meshconfig import MeshConfig, Mode, Userspace
from meshwire.api.meshnode import Implementation, MeshNode, Phase
from meshwire.api.meshpolicyreport import MAP_FULL
from meshwire.api.meshstatus import MeshStatus
from meshwire.cli.findings import UNGUARDED_BOOT, Finding, failure, warning
from meshwire.encryption.bootguard import (
    NO_NFT,
    NO_SYSTEMD,
    NOT_KEPT,
    NOT_LOADED,
    NOT_MOUNTED,
    NOT_WRITABLE,
)

OPERATOR_LOG: Final = f"kubectl -n {names.NAMESPACE} logs deployment/meshwire-operator"
IN_CLEAR: Final = "traffic between pods of different nodes travels in clear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that one `meshwire status` reads; `config` and `status` are None where there is no such object.
    `alive` is Node name -> whether it is Ready; None where the reader may not list Nodes."""

    config: MeshConfig | None
    status: MeshStatus | None
    meshnodes: Sequence[MeshNode]
    alive: Mapping[str, bool] | None

    def is_live(self, node: MeshNode) -> bool:
        """Whether the others wait for this node. One that nobody could ask about counts as live."""
        return self.alive is None or self.alive.get(node.name, False)

    @property
    def wanted(self) -> Phase:
        """The phase the MeshConfig asks for in the end."""
        return Phase.ENFORCING if self.config and self.config.encryption.enabled else Phase.OFF

    @property
    def is_judged(self) -> bool:
        """Whether the operator has looked at the MeshConfig as it is now."""
        if self.config is None:
            return True
        accepted = conditions.find(self.config.conditions, conditions.ACCEPTED)
        return accepted is not None and accepted.observed_generation >= self.config.generation


def is_ready(snapshot: Snapshot) -> bool:
    """Whether the cluster is in the state that the MeshConfig, as it is now, asks for."""
    status = snapshot.status
    return (
        status is not None
        and conditions.is_true(status.conditions, conditions.READY, generation=0)
        and snapshot.is_judged
        and status.phase == snapshot.wanted
    )


def diagnose(snapshot: Snapshot) -> list[Finding]:
    """What is wrong or worth knowing, causes before their effects. Empty where encryption is in force
    everywhere and nothing needs attention."""
    return [
        *_diagnose_config(snapshot),
        *_diagnose_mesh(snapshot),
        *(finding for node in snapshot.meshnodes for finding in _diagnose_node(node, snapshot)),
        *_diagnose_userspace(snapshot),
        *_diagnose_versions(snapshot.meshnodes),
    ]


def _diagnose_config(snapshot: Snapshot) -> Iterator[Finding]:
    config = snapshot.config
    if config is None:
        yield warning(
            "meshconfig",
            f"There is no MeshConfig `{names.CONFIG_NAME}`, so encryption is off",
            why=IN_CLEAR,
            todo="kubectl apply a MeshConfig with spec.encryption.enabled: true",
        )
        return
    accepted = conditions.find(config.conditions, conditions.ACCEPTED)
    if not snapshot.is_judged:
        yield failure(
            "meshconfig",
            "The operator has not looked at the MeshConfig since it was last changed",
            why="the nodes still do what the previous one asked for",
            todo=f"wait a few seconds, then see whether the operator runs: {OPERATOR_LOG}",
        )
    elif accepted and not accepted.status:
        yield failure(
            "meshconfig",
            f"The MeshConfig is refused: {_words(accepted)}",
            why="the nodes keep the last state that was accepted",
            todo="correct what the message names; kubectl explain meshconfig.spec describes every field",
        )
    if not config.encryption.enabled:
        yield warning(
            "encryption",
            "Encryption is off, as the MeshConfig says",
            why=IN_CLEAR,
            todo="set spec.encryption.enabled: true in the MeshConfig when you want it on",
        )
    elif config.encryption.mode is Mode.PERMISSIVE:
        yield warning(
            "encryption",
            "The mode is Permissive: plaintext between pods of different nodes is counted, not dropped",
            why="a node without a working tunnel sends in clear",
            todo="set spec.encryption.mode: Strict once LEAKED no longer rises",
        )


def _diagnose_mesh(snapshot: Snapshot) -> Iterator[Finding]:
    status = snapshot.status
    if status is None:
        yield failure(
            "operator",
            f"The operator has never written the MeshStatus `{names.STATUS_NAME}`",
            why="without an operator no node gets keys or orders",
            todo=f"see whether it runs and what it says: {OPERATOR_LOG}",
        )
        return
    stalled = conditions.find(status.conditions, conditions.STALLED)
    if stalled and stalled.status:
        yield failure(
            "operator",
            f"The operator can't go on: {_words(stalled)}",
            why="waiting will not help",
            todo=f"see what it says: {OPERATOR_LOG}",
        )
    yield from _diagnose_phase(status, snapshot)
    scope = conditions.find(status.conditions, conditions.STRICT_SCOPE)
    if scope and not scope.status and snapshot.wanted is Phase.ENFORCING:
        yield warning(
            "strict scope",
            _words(scope),
            why="packets to a pod of a node that nobody has heard of yet can't be told from other traffic",
            todo="set spec.network.clusterCIDRs in the MeshConfig to all pod addresses of the cluster",
        )
    pressure = conditions.find(status.conditions, conditions.POLICY_MAP_PRESSURE)
    if pressure and pressure.status:
        is_full = pressure.reason == MAP_FULL
        yield (failure if is_full else warning)(
            "policy maps",
            _words(pressure),
            why="pods whose rules don't fit are closed, and addresses that don't fit belong to nobody"
            if is_full
            else "pods whose rules won't fit will be closed",
            todo="write policies with fewer single ports and blocks, leave labels that differ from pod to"
            " pod out of identities (spec.policy.excludedLabels), or have fewer kinds of pods on the node",
        )


def _diagnose_phase(status: MeshStatus, snapshot: Snapshot) -> Iterator[Finding]:
    live = [node for node in snapshot.meshnodes if snapshot.is_live(node)]
    match status.phase:
        case Phase.ENABLING:
            yield _in_transition(
                "Encryption is being turned on",
                [node.name for node in live if node.status.active_epoch != node.spec.epoch],
                why="pairs of nodes without a proven tunnel still talk in clear, and nothing is dropped yet",
            )
        case Phase.DISABLING:
            yield _in_transition(
                "Encryption is being turned off",
                [node.name for node in live if node.status.strict],
                why="nodes send through the tunnels until nobody drops plaintext any more",
            )
        case Phase.DRAINING:
            yield _in_transition(
                "Encryption is being turned off",
                [node.name for node in live if node.status.active_epoch],
                why="the tunnels stay until nobody sends through them any more",
            )
        case phase if snapshot.is_judged and phase != snapshot.wanted:
            yield failure(
                "operator",
                f"The MeshConfig asks for the phase {snapshot.wanted}, and it is still {phase}",
                why="no node has been told to change",
                todo=f"wait a few seconds, then see what the operator says: {OPERATOR_LOG}",
            )
        case _:
            ready = conditions.find(status.conditions, conditions.READY)
            if ready and not ready.status and all(node.ready for node in live):
                # No node explains it, so the operator's own words have to.
                yield failure(
                    "mesh",
                    _words(ready),
                    why="the operator does not count the mesh as ready",
                    todo=f"wait a few seconds, then see what it says: {OPERATOR_LOG}",
                )


def _in_transition(what: str, lagging: Sequence[str], *, why: str) -> Finding:
    if lagging:
        return failure(
            "mesh",
            f"{what}; waiting for {', '.join(lagging)}",
            why=why,
            todo="wait; what keeps a node is told below",
        )
    return failure(
        "mesh",
        f"{what}; every node has done its part, and the operator has to give the next order",
        why=why,
        todo=f"wait a few seconds, then see what the operator says: {OPERATOR_LOG}",
    )


REASONS: Final[Mapping[str, tuple[str, str]]] = {
    "WaitingForOperator": (
        "without a number, a phase and keys from the operator it can't take part",
        f"see whether the operator runs: {OPERATOR_LOG}",
    ),
    "Preparing": (
        "it gets its device, peers and programs; its traffic does not go through tunnels yet",
        "wait; it takes seconds",
    ),
    "WaitingForKey": (
        "without a private key of its own the node can't encrypt",
        f"see whether the operator runs and may write Secrets: {OPERATOR_LOG}",
    ),
    "WaitingForEndpoints": (
        "nodes have no pod CIDR, and this one hasn't heard yet which pods are where",
        f"wait; if it stays, see whether the operator writes MeshEndpointSlices: {OPERATOR_LOG}",
    ),
    names.CLUSTER_CIDR_MISSING: (
        "nodes have no pod CIDR: packets of pods that nobody has heard of yet would leave in clear",
        "set spec.network.clusterCIDRs in the MeshConfig to all pod addresses of the cluster",
    ),
    "EpochSecretDiffers": (
        "nodes whose epoch secrets differ have no tunnel, rather than one without a preshared key",
        f"new keys end it: meshwire rotate; the operator's log says how it came about: {OPERATOR_LOG}",
    ),
    "KeyRefused": (
        "a key that was sealed for somebody else, or for another epoch, is never used",
        "if nobody tampers with Secrets, delete the Secret the message names: the operator makes a new one",
    ),
    "ConfigRejected": (
        "this node keeps the last state that was accepted",
        "correct what the message names; kubectl explain meshconfig.spec describes every field",
    ),
    "UplinkNotFound": (
        "Meshwire must sit on the device that pod traffic leaves through",
        "name it in the MeshConfig's spec.network.uplinks, or give the node a default route",
    ),
    "DeviceNotFound": (
        "Meshwire must sit on every device that pod traffic leaves through; where it sat before, it stays",
        "correct spec.network.uplinks and overlays in the MeshConfig; empty, they are found from the routes",
    ),
    "WireGuardUnavailable": (
        "the node can't encrypt at all",
        "on the node: modprobe wireguard, or /dev/net/tun with spec.encryption.userspace: Auto; "
        "`meshwire preflight` there says more",
    ),
    "DuplicateKey": (
        "two nodes with one key could read each other's traffic",
        "delete the MeshNode that should not have the key: the operator makes it a new one",
    ),
    "FilterConflict": (
        "Meshwire's filter has to be the first on the device; what was attached before stays in force",
        "see whose it is (`tc qdisc`, `tc filter show`) and move it to another priority or to clsact",
    ),
    "ObserveFailed": (
        "the agent can't see what the kernel has, so it changes nothing; what is in force stays",
        "if it lasts: run `meshwire preflight` on the node",
    ),
    "ApplyFailed": (
        "the kernel refused a step; the agent tries again",
        "if it lasts: run `meshwire preflight` on the node",
    ),
    "DuplicateID": (
        "two nodes with one number can't be told apart by the datapath",
        "delete the younger MeshNode: the operator makes it anew",
    ),
    "DuplicateAddress": (
        "an address lives on one node; the older one keeps it",
        "give every node a range of its own",
    ),
    "DatapathRefused": (
        "the kernel did not take the eBPF programs; those loaded before stay in force",
        "run `meshwire preflight` on the node, and read the verifier's words in the agent's log",
    ),
}
"""Reason of a MeshNode's Ready condition -> why it matters, what to do."""

BOOT_GUARD: Final[Mapping[str, str]] = {
    NOT_MOUNTED: "install with the component config/bootguard",
    NO_SYSTEMD: "drain the node before you reboot it; so far systemd alone can load the guard",
    NOT_WRITABLE: "put the unit config/bootguard/meshwire-boot.service into the node's image",
    NOT_KEPT: "see that the node's disk has room and /var/lib/meshwire can be written",
    NO_NFT: "install nftables on the node",
    NOT_LOADED: "see that nothing flushes nftables after the unit or keeps it from starting;"
    " what its pods sent to other nodes until the agent was there, has left in clear",
}
"""Reason of a MeshNode's BootGuard condition -> what to do."""


def _diagnose_node(node: MeshNode, snapshot: Snapshot) -> Iterator[Finding]:
    check, status = f"node {node.name}", node.status
    encryption = (snapshot.config or MeshConfig()).encryption
    ready = conditions.find(status.conditions, conditions.READY)
    if not snapshot.is_live(node):
        yield warning(
            check,
            "The Node is not Ready, so the others do not wait for it",
            why="when it comes back it has to take part before its pods can reach the others",
            todo=f"kubectl describe node {node.name}",
        )
        return
    if ready is None:
        yield failure(
            check,
            "Its agent has never reported",
            why="nothing is encrypted on this node, and nodes that are strict drop what its pods send",
            todo=_agent_log(node),
        )
        return
    if not node.current:
        yield failure(
            check,
            "Its agent has not taken up the operator's latest order",
            why="it does what it was told before, and the cluster waits for it",
            todo=f"wait a few seconds, then {_agent_log(node)}",
        )
    elif not ready.status:
        why, todo = REASONS.get(ready.reason, ("the node is not in the state it was told to be in", ""))
        yield failure(
            check, _words(ready), why=why, todo=f"{todo}; {_agent_log(node)}" if todo else _agent_log(node)
        )
    guard = conditions.find(status.conditions, conditions.BOOT_GUARD)
    if guard and not guard.status:
        yield warning(
            check,
            f"No boot guard, {_words(guard)}",
            why=UNGUARDED_BOOT,
            todo=BOOT_GUARD.get(guard.reason, _agent_log(node)),
        )
    if status.leaked:
        yield failure(
            check,
            f"{status.leaked} packets between pods were seen in clear while encryption was in force",
            why="somebody on the wire could read them",
            todo=f"the agent's metrics tell directions and reasons apart; {_agent_log(node)}",
        )
    if status.unreachable_count:
        named = ", ".join(f"{each.node} since {each.since}" for each in status.unreachable[:5])
        yield failure(
            check,
            f"It hears nothing from {status.unreachable_count} live nodes: {named}",
            why="pods of such a pair can't reach each other; the agents renew the peer again and again",
            todo=f"let UDP {encryption.port} and {encryption.port + 1} pass between them, both ways;"
            " meshwire status --matrix shows all pairs",
        )
    elif status.active_epoch and status.handshakes < status.peers:
        yield warning(
            check,
            f"{status.peers - status.handshakes} of {status.peers} peers had no handshake for 3 minutes",
            why="traffic with them may not get through"
            if encryption.keepalive
            else "normal without keepalives for peers that nobody talks to; else traffic gets lost",
            todo=f"let UDP {encryption.port} and {encryption.port + 1} pass between the nodes; "
            "`wg show` on the node tells which peer",
        )


def _agent_log(node: MeshNode) -> str:
    return (
        f"find its agent's Pod and read its log: kubectl -n {names.NAMESPACE} get pods -o wide "
        f"--field-selector spec.nodeName={node.name}"
    )


def _diagnose_userspace(snapshot: Snapshot) -> Iterator[Finding]:
    """One finding for all nodes: they usually have one kernel."""
    encryption = (snapshot.config or MeshConfig()).encryption
    slow = [
        node.name
        for node in snapshot.meshnodes
        if node.status.implementation is Implementation.USERSPACE and node.status.active_epoch
    ]
    if slow and encryption.userspace is not Userspace.ALWAYS:
        yield warning(
            "wireguard",
            f"WireGuard runs in user space, because the kernel has none, on {', '.join(slow)}",
            why="as safe, but slower and at the cost of more CPU",
            todo="use a kernel with the wireguard module; Linux has it since 5.6",
        )


def _diagnose_versions(meshnodes: Iterable[MeshNode]) -> Iterator[Finding]:
    versions = sorted({node.status.agent_version for node in meshnodes if node.status.agent_version})
    if len(versions) > 1:
        yield warning(
            "versions",
            f"The agents run different versions: {', '.join(versions)}",
            why="fine during an upgrade, not meant to last",
            todo=f"kubectl -n {names.NAMESPACE} rollout status daemonset/meshwire-agent",
        )


def _words(condition: conditions.Condition) -> str:
    return f"{condition.reason}: {condition.message}" if condition.message else condition.reason


def key_age(status: MeshStatus, now: datetime) -> int | None:
    """Seconds since the epoch's first key was made; None without keys."""
    if not status.epoch_started_at:
        return None
    return max(0, int((now - datetime.fromisoformat(status.epoch_started_at)).total_seconds()))


def as_json(snapshot: Snapshot, now: datetime) -> dict[str, Any]:
    """What `meshwire status -o json` prints; docs/cli.md describes it."""
    status = snapshot.status or MeshStatus()
    return {
        "ready": is_ready(snapshot),
        "mesh": {**status.to_dict(), "keyAgeSeconds": key_age(status, now)},
        "nodes": [
            {
                "name": node.name,
                "live": snapshot.is_live(node),
                "ready": node.ready,
                "phase": str(node.spec.phase),
                "epoch": node.spec.epoch,
                **{name: value for name, value in node.status.to_dict().items() if name != "sealingKey"},
            }
            for node in snapshot.meshnodes
        ],
        "findings": [finding.as_json() for finding in diagnose(snapshot)],
    }


def age(seconds: int | None) -> str:
    """As kubectl writes ages: one unit, and the next smaller one below ten. None is a dash."""
    if seconds is None:
        return "-"
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    for (size, unit), (smaller_size, smaller) in zip(units, units[1:], strict=False):
        whole, rest = divmod(seconds, size)
        if whole:
            return f"{whole}{unit}" + (f"{rest // smaller_size}{smaller}" if whole < 10 and rest else "")
    return f"{seconds}s"
